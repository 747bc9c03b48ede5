"""Do the next items' work in a background thread while the last one is being used."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Iterate `items` in order, up to `depth` of them made in advance; what they raise is raised here.

    When the consumer stops early, the thread stops after the item that it is making.
    """
    made: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, item: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                made.put((kind, item), timeout=0.1)
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
        except BaseException as error:  # handed over to the consumer, whatever it is
            put("error", error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = made.get()
            if kind == "end":
                return
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
