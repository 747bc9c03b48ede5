"""What can be seen of a training run: a bar, RUN/log.jsonl and TensorBoard scalars, from one call."""

from pathlib import Path
from types import TracebackType
from typing import Any

from index.console import Progress


class Watch:
    """`with Watch("fit", total=images, unit="images", folder=RUN) as watch: watch.advance(256, loss=0.3)`."""

    def __init__(self, title: str, *, total: int, unit: str, folder: Path, done: int = 0) -> None:
        """Log into `folder`; `done` says how much an earlier run has already counted."""
        self.bar = Progress(title, total=total, unit=unit, log=folder / "log.jsonl", done=done)
        self._folder = folder

    def __enter__(self) -> "Watch":
        """Start the bar and open the TensorBoard file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder / "tensorboard"))
        self.bar.__enter__()
        return self

    def advance(self, count: int, **figures: Any) -> None:
        """Count `count` units done and note figures; scalars are written once per tick of the bar."""
        if self.bar.advance(count, **figures):
            for name, value in self.bar.figures.items():
                self._writer.add_scalar(name, value, self.bar.done)
            self._writer.add_scalar("rate", self.bar.rate, self.bar.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both."""
        self._writer.close()
        self.bar.__exit__(kind, error, trace)
