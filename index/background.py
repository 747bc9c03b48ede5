"""Work in background threads: `prefetch` items of an iterator, `repeat` a call while a block runs, look up many things.

The threads of `prefetch` and `repeat` are daemons that end with their consumer, so neither outlives its block and
neither holds up an exit.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")

LOOKUP_THREADS = 16


def look_up(function: Callable[[Item], T], items: Sequence[Item], *, at_once: int = 1024) -> Iterator[T]:
    """Yield the results of a function that waits for a store, in the order of the items.

    It is called in threads for `at_once` items at a time: a call that waits for its thread takes two kilobytes.
    """
    with ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup") as pool:
        for start in range(0, len(items), at_once):
            yield from pool.map(function, items[start : start + at_once])


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Iterate over `items` in order while a thread computes up to `depth` of them in advance.

    An exception of `items` is raised here, after the items before it. When the consumer stops early, the thread stops
    after the item that it is computing.
    """
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(event: str, item: T | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put((event, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over to the consumer, even a KeyboardInterrupt
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            event, item = ready.get()
            if event == "end":
                return
            if event == "error":
                assert isinstance(item, BaseException)
                raise item
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def repeat(seconds: float, function: Callable[[], object]) -> Iterator[None]:
    """Call `function` every `seconds` in a thread until the block ends; a call that has begun is waited for.

    The first call comes after `seconds`. If a call raises, there are no further ones.
    """
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(seconds):
            function()

    thread = threading.Thread(target=work, name="repeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
