"""The worker processes of Beam's local runner: notice that one died, and let none outlive the command.

Beam itself waits for a dead worker forever; what tells of it is the exception of the thread that looks after the
worker. When a run has ended, Beam stops its workers one after another, and each may take a while: that is no death.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal

import psutil

from index.background import repeat
from pipeline.beam.engine import check_engine
from pipeline.config import RuntimeConfig
from pipeline.encoders.devices import resolve_device

Place = Literal["process", "machine", "elsewhere"]

COMMAND = "sdk_worker_main"
"""Beam's module that a worker process runs, part of its command line."""
THREAD = "run_worker"
"""Beam's name of the thread that starts a worker process, waits for it and raises its exit code."""
POLL_SECONDS, QUIET_SECONDS = 0.5, 5.0
"""A run that goes on for so long after a worker has failed waits for it."""


class WorkerDied(BaseException):
    """Raised in the main thread, in the middle of Beam's waiting."""


class LocalWorkers:
    """The worker processes of this process."""

    def __init__(self) -> None:
        self._seen: dict[int, psutil.Process] = {}
        self._failed: float | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Learn of workers that exit with an error while the block runs."""
        hook = threading.excepthook

        def on_error(thrown: threading.ExceptHookArgs) -> None:
            if thrown.thread is not None and thrown.thread.name == THREAD:
                self._failed = self._failed or time.monotonic()
            hook(thrown)

        threading.excepthook = on_error
        try:
            yield
        finally:
            threading.excepthook = hook

    def has_lost_one(self) -> bool:
        """Return whether a worker has failed, and the run does not end for it."""
        self._look()
        return self._failed is not None and time.monotonic() - self._failed >= QUIET_SECONDS

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


def num_local_workers(options: Any) -> int:
    """Return how many worker processes Beam's options ask the local runner for; 0 for other runners."""
    from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

    direct = options.view_as(DirectOptions)
    if options.view_as(StandardOptions).runner != "FnApiRunner" or direct.direct_running_mode != "multi_processing":
        return 0
    return int(direct.direct_num_workers or os.cpu_count() or 1)


def works_in(options: Any) -> Place:
    """Return where the runner of Beam's options does the work: in this process, on this machine, or elsewhere."""
    from apache_beam.options.pipeline_options import StandardOptions

    if num_local_workers(options):
        return "machine"
    return "process" if options.view_as(StandardOptions).runner == "FnApiRunner" else "elsewhere"


def check_runtime(runtime: RuntimeConfig) -> Place:
    """Check the engine, and the device if it is one of this machine; return where the engine does the work.

    Raises OptionError.
    """
    place = works_in(check_engine(runtime))
    if place != "elsewhere":
        resolve_device(runtime.device)
    return place


@contextlib.contextmanager
def watch_workers() -> Iterator[None]:
    """Raise WorkerDied in the main thread if a worker process dies while the block runs.

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
        stack.enter_context(workers.listen())
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
