"""The log of an engine: what Beam, its threads and its worker processes write goes to a file, not to the terminal."""

import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO

from index.errors import CoalescerError, TableError

THREADS_SECONDS = 2.0
"""How long threads of a failed run may still write to the log."""
LOGGERS = ("apache_beam", "distributed")


class Unfinished(TableError):
    """A run ended before its graph did, by no fault of our code; rerunning the command resumes it."""


@contextlib.contextmanager
def engine_log() -> Iterator[None]:
    """Redirect the stderr of Beam and its worker processes to a file, so that the terminal is left to the progress.

    Workers inherit file descriptor 2, so the descriptor is redirected, not only `sys.stderr`. The file has no name, so
    that none is left however the process ends. It is kept in the folder for temporary files, since the disk of the
    table may be full, and named in the error, if the block raises Unfinished or an unknown error.
    """
    with (
        os.fdopen(os.dup(2), "w", buffering=1) as terminal,
        tempfile.TemporaryFile("w+", buffering=1) as file,
    ):
        os.dup2(file.fileno(), 2)
        stderr, sys.stderr = sys.stderr, terminal if sys.stderr is sys.__stderr__ else sys.stderr
        try:
            with _errors_to(file):
                yield
        except Unfinished as error:
            is_empty = os.fstat(file.fileno()).st_size == 0
            raise TableError(str(error) if is_empty else f"{error}; log: {_keep(file)}") from None
        except CoalescerError:
            raise
        except Exception as error:
            error.add_note(f"log of Beam's workers: {_keep(file)}")
            raise
        finally:
            sys.stderr = stderr
            os.dup2(terminal.fileno(), 2)


def _keep(log: IO[str]) -> str:
    """Copy a log without a name to a file in the folder for temporary files, and return its path."""
    # Workers that still write share the position in the file, which must not move.
    content = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)
    with tempfile.NamedTemporaryFile(prefix="beam-", suffix=".log", delete=False) as kept:
        kept.write(content)
    return kept.name


@contextlib.contextmanager
def _errors_to(file: IO[str]) -> Iterator[None]:
    """Write the errors of the engines' loggers, and of threads that the block starts, to `file`.

    Threads that a failed block leaves behind have no place to write to any more, and are not heard.
    """
    threads, hook = set(threading.enumerate()), threading.excepthook
    handler = logging.StreamHandler(file)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    states = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]

    def on_error(thrown: threading.ExceptHookArgs) -> None:
        if thrown.thread in threads:
            hook(thrown)
        else:
            handler.emit(_record_of(thrown))

    threading.excepthook = on_error
    for logger in loggers:
        logger.setLevel(logging.ERROR)
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):  # after a signal nobody reads the log
            _wait_for(set(threading.enumerate()) - threads)
        left = set(threading.enumerate()) - threads
        threading.excepthook = lambda thrown: None if thrown.thread in left else hook(thrown)
        for logger in loggers:
            logger.handlers = [logging.NullHandler()]
        raise
    threading.excepthook = hook
    for logger, (level, handlers, propagate) in zip(loggers, states, strict=True):
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate


def _record_of(thrown: threading.ExceptHookArgs) -> logging.LogRecord:
    assert thrown.exc_value is not None
    information = (thrown.exc_type, thrown.exc_value, thrown.exc_traceback)
    return logging.LogRecord("thread", logging.ERROR, "", 0, str(thrown.thread), None, information)


def _wait_for(threads: set[threading.Thread]) -> None:
    """Wait a moment for threads: those that lose their workers print errors, which belong into the log."""
    deadline = time.monotonic() + THREADS_SECONDS
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.05)
