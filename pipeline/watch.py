"""An encode run seen from outside: progress by the marks that shards leave, worker output kept off the terminal."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from index.console import Progress
from index.errors import CoalescerError, TableError
from pipeline.graph import STOPPED
from pipeline.job import EncodeJob
from pipeline.marks import ShardPart

LOOK_SECONDS = 0.5
BEAM_WORKER = "run_worker"
"""What Beam calls the thread that waits for a worker process."""
STOPPING_REJECTS = 1000
"""So many rejects at least, before a run is stopped on the way."""


@contextlib.contextmanager
def worker_output() -> Iterator[None]:
    """Send what Beam and its worker processes say to a file; this process keeps the terminal for its progress.

    Workers inherit descriptor 2, so it is the descriptor that moves, not `sys.stderr`. The file stands in the folder
    for temporary files, since the disk of the table may be full, and is kept where the block raises.
    """
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    with (
        os.fdopen(os.dup(2), "w", buffering=1) as terminal,
        tempfile.NamedTemporaryFile(prefix="encode-", suffix=".log", delete=False) as file,
    ):
        os.dup2(file.fileno(), 2)
        shown, sys.stderr = sys.stderr, terminal if sys.stderr is sys.__stderr__ else sys.stderr
        try:
            yield
            Path(file.name).unlink()
        except CoalescerError:
            Path(file.name).unlink()
            raise
        except Exception as error:
            error.add_note(f"what Beam's workers said: {file.name}")
            raise
        finally:
            sys.stderr = shown
            os.dup2(terminal.fileno(), 2)


class _WorkerDied(BaseException):
    """Raised in the main thread, out of whatever Beam waits for."""


@contextlib.contextmanager
def ending_with_its_workers(uri: str) -> Iterator[None]:
    """TableError when a worker process of the local runner dies, for which Beam itself would wait for ever."""
    if threading.current_thread() is not threading.main_thread():  # signals reach no other
        yield
        return
    died = list[str]()

    def on_thread_error(thrown: threading.ExceptHookArgs) -> None:
        os.write(2, "".join(traceback.format_exception(thrown.exc_value)).encode())
        if thrown.thread is not None and thrown.thread.name == BEAM_WORKER and not died:
            died.append(str(thrown.exc_value))
            _kill_workers()  # Beam waits for them before it lets go
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def on_signal(number: int, frame: object) -> None:
        raise _WorkerDied

    hook, threading.excepthook = threading.excepthook, on_thread_error
    handler = signal.signal(signal.SIGUSR1, on_signal)
    try:
        yield
    except BaseException as error:
        if not died:
            raise
        raise TableError(
            f"{uri} is not finished: a worker process died ({died[0]}), for want of memory perhaps: "
            "type the same command to go on, with fewer --workers or a smaller --batch-size"
        ) from error
    finally:
        signal.signal(signal.SIGUSR1, handler)
        threading.excepthook = hook


def _kill_workers() -> None:
    """Kill the local runner's worker processes."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "sdk_worker_main" in " ".join(process.cmdline()):
                process.kill()


@contextlib.contextmanager
def watching(job: EncodeJob, samples: int | None, log: Path | None) -> Iterator[None]:
    """Show progress, and stop a run that rejects more than is allowed whatever is still to come.

    `samples` is what there is to do; where it is not known, the finished shards' mean stands in for the others.
    """
    shards, finished = job.config.shards, dict[str, ShardPart]()
    with Progress("encode", total=samples, unit="images", log=log, done=job.marks.look(shards, finished)) as bar:
        stop = threading.Event()

        def show() -> None:
            done = job.marks.look(shards, finished)
            ended = sum(part.samples for part in finished.values())
            rejects = sum(part.rejected for part in finished.values())
            if samples is None and finished:
                bar.expect(max(done, round(ended / len(finished) * len(shards))))
            elif samples is not None and (done > samples or len(finished) == len(shards)):
                bar.expect(done)
            success = round(1 - rejects / max(1, ended), 4)
            filtered = sum(part.filtered for part in finished.values())
            bar.advance(
                done - bar.done,
                shards=f"{len(finished)}/{len(shards)}",
                success=success,
                rejects=rejects,
                **({"filtered": filtered} if filtered else {}),
            )
            allowed = job.config.max_reject_share * (samples or 0)
            if samples is not None and rejects > max(allowed, STOPPING_REJECTS):
                job.marks.write(
                    STOPPED,
                    f"{rejects:,} of {samples:,} samples are rejected already, after {len(finished):,} of "
                    f"{len(shards):,} shards: nothing was published; mend the source, or raise --max-reject-share",
                )

        def follow() -> None:
            while not stop.wait(LOOK_SECONDS):
                show()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            show()
