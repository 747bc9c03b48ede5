"""Run a graph on the local Beam runner or any other, and raise failures of its workers as CoalescerErrors."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.beam.engine import (
    check_engine,
    engine_failure,
    is_dask_without_workers,
    unfinished_futures,
    user_error,
)
from pipeline.beam.log import Unfinished, engine_log
from pipeline.beam.workers import WorkerDied, watch_workers
from pipeline.config import RuntimeConfig

DASK_POLL_MILLISECONDS = 10_000
DASK_PATIENCE = 6
"""Polls in a row without any Dask worker after which a run ends."""
CLOSE_SECONDS = 2.0


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
    Raises a worker's CoalescerError as it was raised there, OptionError if the runner or its options are wrong, and
    TableError if the engine or a worker process dies. Returns only if the whole graph was run.
    """
    options = check_engine(runtime)
    with engine_log(), monitor or contextlib.nullcontext():
        try:
            with watch_workers(), _new_pipeline(options) as pipeline:
                graph(pipeline)
                _wait(pipeline.run())
        except WorkerDied:
            raise Unfinished(
                f"{uri} is not finished: a worker process died, possibly out of memory: "
                f"rerun the same command to resume, with {memory_advice}"
            ) from None
        except (Exception, asyncio.CancelledError) as error:
            if (known := user_error(error)) is not None:
                raise known from None
            if (reason := engine_failure(error)) is not None:
                raise Unfinished(
                    f"{uri} is not finished: the engine or a worker of it stopped ({reason}): "
                    "see that it runs, then rerun the same command to resume"
                ) from None
            raise


@contextlib.contextmanager
def _new_pipeline(options: Any) -> Iterator[Any]:
    """Yield a pipeline, and remove its folder for temporary files, which Beam leaves if it is interrupted."""
    import apache_beam as beam

    pipeline = beam.Pipeline(options=options)
    try:
        yield pipeline
    finally:
        shutil.rmtree(pipeline.local_tempdir, ignore_errors=True)


def _wait(result: Any) -> None:
    """Wait for the end of a run; on Ctrl-C, cancel it, so that it does not go on without the command."""
    from apache_beam.runners.runner import PipelineState

    try:
        state = _wait_for_dask(result) if hasattr(result, "futures") else result.wait_until_finish()
        if state != PipelineState.DONE:
            raise ConnectionError(f"the run ended as {state}")
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):
            result.cancel()
        raise
    finally:
        if client := getattr(result, "client", None):  # Dask's runner leaves its client open
            with contextlib.suppress(Exception):
                client.close(timeout=CLOSE_SECONDS)


def _wait_for_dask(result: Any) -> Any:
    """Wait for a run on Dask. Raises ConnectionError if its tasks are lost, or wait for workers that do not come."""
    polls = 0
    while True:
        try:
            state = result.wait_until_finish(DASK_POLL_MILLISECONDS)
        except TimeoutError:
            polls = polls + 1 if is_dask_without_workers(result) else 0
            if polls >= DASK_PATIENCE:
                raise ConnectionError("the scheduler has no workers") from None
        else:
            if (reason := unfinished_futures(result)) is not None:
                raise ConnectionError(reason)
            return state
