"""Run a graph on the local Beam runner or any other, and raise failures of its workers as CoalescerErrors."""

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
"""Beam's name for the thread that waits for a worker process."""
BEAM_THREADS = (BEAM_WORKER, "beam_control_read", "read_grpc_client_inputs")
INTERRUPTED = ("code -2", "code 130")
"""Ends of the exit messages of workers that Ctrl-C stopped."""


def run_beam(
    graph: Callable[[Any], object],
    runtime: RuntimeConfig,
    uri: str,
    *,
    monitor: contextlib.AbstractContextManager[None] | None = None,
    memory_advice: str,
) -> None:
    """Build a pipeline with `graph`, run it, and wait for its end inside the context `monitor`.

    `uri` is the table that errors are about, `memory_advice` the options to change if a worker ran out of memory.
    Raises a worker's CoalescerError as it was raised there, and TableError if a worker process dies.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    options = ["--runner=FnApiRunner"]
    if runtime.num_workers > 1:
        options += [f"--direct_num_workers={runtime.num_workers}", "--direct_running_mode=multi_processing"]
    options += runtime.beam_options  # the last of equal options counts
    with _worker_log(), monitor or contextlib.nullcontext(), _watch_workers(uri, memory_advice):
        pipeline = beam.Pipeline(options=PipelineOptions(options))
        graph(pipeline)
        try:
            _wait(pipeline.run())
        except Exception as error:
            raise _user_error(error) or error from None


def _wait(result: Any) -> None:
    try:
        result.wait_until_finish()
    finally:
        if client := getattr(result, "client", None):  # Dask's runner leaves its client open
            client.close()


def _user_error(error: BaseException) -> CoalescerError | None:
    """Return the CoalescerError behind a runner's exception, if any: workers send it as the text of a traceback."""
    classes = {each.__name__: each for each in CoalescerError.__subclasses__()}
    matches = re.findall(r"index\.errors\.(\w+): (.*)", f"index.errors.{type(error).__name__}: {error}")
    for name, text in reversed(matches):
        if name in classes:
            return classes[name](re.sub(r" \[while running .*", "", text))
    return None


@contextlib.contextmanager
def _worker_log() -> Iterator[None]:
    """Redirect the stderr of Beam and its worker processes to a file, so that the terminal is left to the progress.

    Workers inherit file descriptor 2, so the descriptor is redirected, not only `sys.stderr`. The file is in the folder
    for temporary files, since the disk of the table may be full, and is kept if the block raises an unknown error.
    """
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    with (
        os.fdopen(os.dup(2), "w", buffering=1) as terminal,
        tempfile.NamedTemporaryFile(prefix="beam-", suffix=".log", delete=False) as file,
    ):
        os.dup2(file.fileno(), 2)
        stderr, sys.stderr = sys.stderr, terminal if sys.stderr is sys.__stderr__ else sys.stderr
        try:
            yield
            Path(file.name).unlink()
        except CoalescerError:
            Path(file.name).unlink()
            raise
        except Exception as error:
            error.add_note(f"log of Beam's workers: {file.name}")
            raise
        finally:
            sys.stderr = stderr
            os.dup2(terminal.fileno(), 2)


class _WorkerDied(BaseException):
    """Raised in the main thread, in the middle of Beam's waiting."""


@contextlib.contextmanager
def _watch_workers(uri: str, memory_advice: str) -> Iterator[None]:
    """Raise TableError if a worker process of the local runner dies; Beam itself would wait for it forever."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    exit_messages, leaving = list[str](), threading.Event()

    def on_thread_error(thrown: threading.ExceptHookArgs) -> None:
        os.write(2, "".join(traceback.format_exception(thrown.exc_value)).encode())
        if thrown.thread is not None and thrown.thread.name == BEAM_WORKER and not exit_messages:
            exit_messages.append(str(thrown.exc_value))
            time.sleep(0.5)  # Ctrl-C ends the workers too: by then this process has received it as well
            _kill_workers()  # Beam waits for the others before it returns
            if leaving.is_set():
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def on_signal(number: int, frame: object) -> None:
        raise _WorkerDied

    hook, threading.excepthook = threading.excepthook, on_thread_error
    handler = signal.signal(signal.SIGUSR1, on_signal)
    try:
        yield
    except BaseException as error:
        leaving.set()
        # Threads that lose their workers print errors: let them do so into the log, before it is closed.
        deadline = time.monotonic() + 2
        for thread in threading.enumerate():
            if thread.name in BEAM_THREADS:
                thread.join(max(0.0, deadline - time.monotonic()))
        if not exit_messages or isinstance(error, KeyboardInterrupt):
            raise
        if exit_messages[0].endswith(INTERRUPTED):
            raise KeyboardInterrupt from error
        raise TableError(
            f"{uri} is not finished: a worker process died ({exit_messages[0]}), possibly out of memory: "
            f"rerun the same command to resume, with {memory_advice}"
        ) from error
    finally:
        signal.signal(signal.SIGUSR1, handler)
        threading.excepthook = hook


def _kill_workers() -> None:
    """Kill the worker processes of the local runner."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "sdk_worker_main" in " ".join(process.cmdline()):
                process.kill()
