"""Put a graph on Beam: the local runner or any other, and what goes wrong there as what the user can put right."""

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from index.errors import CoalescerError, TableError
from pipeline.config import RuntimeConfig

BEAM_WORKER = "run_worker"
"""What Beam calls the thread that waits for a worker process."""
INTERRUPTED = ("code -2", "code 130")
"""How the end of a worker reads that Ctrl-C has reached."""
BEAM_THREADS = (BEAM_WORKER, "beam_control_read", "read_grpc_client_inputs")


def run_beam(
    graph: Callable[[Any], object],
    run: RuntimeConfig,
    uri: str,
    *,
    watching: contextlib.AbstractContextManager[None] | None = None,
    relief: str,
) -> None:
    """Run what `graph` adds to a pipeline; a CoalescerError of a worker is raised here as what it was.

    `uri` is the table that is worked on, `watching` goes on meanwhile, `relief` is what to type if memory is short.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    options = ["--runner=FnApiRunner"]
    if run.num_workers > 1:
        options += [f"--direct_num_workers={run.num_workers}", "--direct_running_mode=multi_processing"]
    options += run.beam_options  # the last of equal options counts
    with _worker_output(), watching or contextlib.nullcontext(), _ending_with_its_workers(uri, relief):
        pipeline = beam.Pipeline(options=PipelineOptions(options))
        graph(pipeline)
        try:
            _wait(pipeline.run())
        except Exception as error:
            raise _user_error(error) or error from None


def _wait(running: Any) -> None:
    try:
        running.wait_until_finish()
    finally:
        if client := getattr(running, "client", None):  # Dask's runner leaves its client open
            client.close()


def _user_error(error: BaseException) -> CoalescerError | None:
    """The CoalescerError behind what an engine raised: workers send it as the text of a traceback."""
    kinds = {kind.__name__: kind for kind in CoalescerError.__subclasses__()}
    found = re.findall(r"index\.errors\.(\w+): (.*)", f"index.errors.{type(error).__name__}: {error}")
    for name, text in reversed(found):
        if name in kinds:
            return kinds[name](re.sub(r" \[while running .*", "", text))
    return None


@contextlib.contextmanager
def _worker_output() -> Iterator[None]:
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
def _ending_with_its_workers(uri: str, relief: str) -> Iterator[None]:
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
            f"type the same command again, with {relief}"
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
