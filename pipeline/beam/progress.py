"""Show the progress of a graph by the files that its workers leave, as a store lists them; engines tell little."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from index.background import repeat
from index.errors import OutOfReachError
from index.table.storage import Storage
from index.terminal import Progress

POLL_SECONDS = 1.0


@contextlib.contextmanager
def watch_files(
    title: str, count: Callable[[Storage], int], storage: Storage, *, total: int, unit: str, log: Path | None
) -> Iterator[None]:
    """Show a progress bar while the block runs; `count` lists what is done so far, of `total` units."""
    # It looks again soon: a look that waited for the store would keep Ctrl-C waiting.
    impatient = replace(storage, patience=0.0)
    with Progress(title, total=total, unit=unit, log=log, done=count(storage)) as bar:

        def look() -> None:
            with contextlib.suppress(OutOfReachError):
                bar.advance(count(impatient) - bar.done)

        with repeat(POLL_SECONDS, look):
            yield
        look()
