"""What can be seen of a training run: a bar, RUN/log.jsonl and TensorBoard scalars, from one call."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from index.table.storage import write_text
from index.terminal import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


class Watch:
    """`with Watch("fit", total=images, unit="images", folder=RUN) as watch: watch.advance(256, loss=0.3)`.

    The log has a line for each call that brings figures, so that two runs can be compared line by line.
    """

    def __init__(self, title: str, *, total: int, unit: str, folder: Path, done: int = 0, silent: bool = False) -> None:
        """Log into `folder`; of an earlier run that had counted to `done` what it logged beyond that is dropped.

        A silent one counts, and shows and logs nothing.
        """
        self.bar = Progress(title, total=total, unit=unit, done=done, silent=silent)
        self._folder, self._log, self._silent = folder, folder / "log.jsonl", silent
        if self._log.exists() and not silent:
            before = [line for line in self._log.read_text().splitlines(keepends=True) if _whole(line, title, done)]
            write_text(self._log, "".join(before))

    def __enter__(self) -> "Watch":
        """Start the bar and open the TensorBoard file."""
        if not self._silent:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self.bar.done + 1)
        self.bar.__enter__()
        return self

    def advance(self, count: int, **figures: Any) -> None:
        """Count `count` units done, and log figures where there are any."""
        self.bar.advance(count, **figures)
        if not figures or self._silent:
            return
        figures["rate"] = round(self.bar.rate, 3)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, self.bar.done)
        line = {"step": self.bar.title, "done": self.bar.done, "total": self.bar.total, "unit": self.bar.unit}
        line |= {"time": round(time.time(), 3), "seconds": round(self.bar.seconds, 3), **figures}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def show(self, name: str, image: "Image") -> None:
        """Put a picture into TensorBoard."""
        if not self._silent:
            self.writer.add_image(name, np.asarray(image), self.bar.done, dataformats="HWC")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both."""
        if not self._silent:
            self.writer.close()
        self.bar.__exit__(kind, error, trace)


def _whole(line: str, title: str, done: int) -> bool:
    """Whether a logged line was written whole, and is of another step or not beyond `done`."""
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return bool(content.get("step") != title or content["done"] <= done)
