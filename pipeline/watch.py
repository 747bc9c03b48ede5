"""An encode run seen from outside: progress by the marks that shards leave, worker output kept off the terminal."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
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
INTERRUPTED = ("code -2", "code 130")
"""How the end of a worker reads that Ctrl-C has reached."""
BEAM_THREADS = (BEAM_WORKER, "beam_control_read", "read_grpc_client_inputs")
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
    died, ending = list[str](), threading.Event()

    def on_thread_error(thrown: threading.ExceptHookArgs) -> None:
        os.write(2, "".join(traceback.format_exception(thrown.exc_value)).encode())
        if thrown.thread is not None and thrown.thread.name == BEAM_WORKER and not died:
            died.append(str(thrown.exc_value))
            time.sleep(0.5)  # Ctrl-C ends the workers too: this thread's process has heard of it by then
            _kill_workers()  # Beam waits for them before it lets go
            if ending.is_set():
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def on_signal(number: int, frame: object) -> None:
        raise _WorkerDied

    hook, threading.excepthook = threading.excepthook, on_thread_error
    handler = signal.signal(signal.SIGUSR1, on_signal)
    try:
        yield
    except BaseException as error:
        ending.set()
        # Threads that lose their workers complain: into the log, not after it is closed.
        until = time.monotonic() + 2
        for thread in threading.enumerate():
            if thread.name in BEAM_THREADS:
                thread.join(max(0.0, until - time.monotonic()))
        if not died or isinstance(error, KeyboardInterrupt):
            raise
        if died[0].endswith(INTERRUPTED):
            raise KeyboardInterrupt from error
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
