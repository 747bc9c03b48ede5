"""Threads of an evaluation: on a CPU, batches are computed side by side, each on one thread.

The threads among which Torch divides an operation wait for the slowest of them by spinning. Small networks consist of
small operations, so on a machine that has other work to do the waiting takes many times the processor time of the work.
A batch that is computed on one thread waits for no other, and its bits do not depend on the number of cores.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from pipeline.encoders.devices import threads_kept

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_thread() -> Iterator[None]:
    """Divide no operation of Torch or numpy among threads while the block runs."""
    with threadpool_limits(1), threads_kept():
        torch.set_num_threads(1)
        yield


def map_batches(
    function: Callable[[Item], Result],
    batches: Sequence[Item],
    device: str,
    *,
    done: Callable[[Item], object] = lambda _: None,
) -> list[Result]:
    """Return `function` of each batch, and call `done` in this thread for one after the other, in their order.

    On a CPU as many batches are computed at a time as Torch would use threads; on other devices one after the other.
    """
    results = []
    if device != "cpu":
        for batch in batches:
            results.append(function(batch))
            done(batch)
        return results
    count = max(1, min(torch.get_num_threads(), len(batches)))
    with single_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for batch, result in zip(batches, pool.map(function, batches), strict=True):
                results.append(result)
                done(batch)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def split(count: int, size: int) -> list[slice]:
    """Return the parts of `count` things, `size` in each but the last."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
