"""The worker processes of Beam's local runner: notice that one died, and let none outlive the command.

Beam itself waits for a dead worker forever. At the regular end of a run workers end one after another within moments,
so a worker counts as dead if it is gone, others are not, or the run goes on, and nothing has changed for a while.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import psutil

from index.background import repeat

COMMAND = "sdk_worker_main"
"""Beam's module that a worker process runs, part of its command line."""
POLL_SECONDS, QUIET_SECONDS = 0.5, 5.0


class WorkerDied(BaseException):
    """Raised in the main thread, in the middle of Beam's waiting."""


class LocalWorkers:
    """The worker processes that this process has started so far."""

    def __init__(self) -> None:
        self._seen: dict[int, psutil.Process] = {}
        self._gone, self._since = 0, time.monotonic()

    def has_lost_one(self) -> bool:
        """Return whether a worker is gone, and that was so `QUIET_SECONDS` ago."""
        self._look()
        gone = sum(not _is_alive(process) for process in self._seen.values())
        if gone != self._gone:
            self._gone, self._since = gone, time.monotonic()
        return gone > 0 and time.monotonic() - self._since >= QUIET_SECONDS

    def kill(self) -> None:
        """Kill all of them, at work or not: what they have not finished is done again by the next run."""
        self._look()
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid not in self._seen and any(COMMAND in part for part in process.cmdline()):
                    self._seen[process.pid] = process


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def watch_workers() -> Iterator[None]:
    """Raise WorkerDied in the main thread if a worker process of the local runner dies while the block runs.

    A signal that ends the command (Ctrl-C, SIGTERM) kills the workers first, since Beam would wait for their work, and
    leaves the block as the exception that its handler raises, whatever Beam makes of it on the way.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    workers, interrupts, leaving = LocalWorkers(), list[BaseException](), False

    def check() -> None:
        if workers.has_lost_one():
            workers.kill()  # Beam waits for the others before it returns
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def on_death(number: int, frame: FrameType | None) -> None:
        if not leaving:
            raise WorkerDied

    def killing_first(handler: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
        def on_signal(number: int, frame: FrameType | None) -> None:
            workers.kill()
            try:
                handler(number, frame)
            except BaseException as interrupt:
                interrupts.append(interrupt)
                raise

        return on_signal

    with contextlib.ExitStack() as stack:
        stack.enter_context(_handler(signal.SIGUSR1, on_death))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(handler := signal.getsignal(number)):
                stack.enter_context(_handler(number, killing_first(handler)))
        stack.enter_context(repeat(POLL_SECONDS, check))
        try:
            yield
        except BaseException as error:
            if interrupts and error is not interrupts[0]:
                raise interrupts[0] from None
            raise
        finally:
            leaving = True
            workers.kill()


@contextlib.contextmanager
def _handler(number: int, handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
