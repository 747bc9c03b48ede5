"""What is recorded of a training run: a progress bar, RUN/log.jsonl, accelerate's trackers, grids of samples."""

import json
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from index.table.schema import HELDOUT, TRAIN
from index.table.storage import write_text
from index.table.table import Table
from index.terminal import Progress
from trainer.grid import draw_grid
from trainer.models.base import Network
from trainer.objectives.base import Objective
from trainer.run_folder import NOT_MOVED, EncoderPlaces
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

TRACKER = "tensorboard"
"""Tracker of accelerate, and the folder in RUN that it writes to."""
PREVIEW_CAPTIONS, PREVIEW_STEPS = 16, 2


class RunLog:
    """`with RunLog(accelerator, "fit", total=n, unit="images", folder=RUN) as log: log.advance(256, loss=0.3)`.

    The log has one line for each call that passes metrics, so two runs can be compared line by line. Only the main
    process writes.
    """

    def __init__(
        self, accelerator: "Accelerator", title: str, *, total: int, unit: str, folder: Path, done: int = 0
    ) -> None:
        """Log into `folder`. A run that is resumed at `done` drops the lines that were logged beyond it."""
        self._accelerator, self._main = accelerator, accelerator.is_main_process
        self._progress = Progress(title, total=total, unit=unit, done=done, silent=not self._main)
        self._path = folder / "log.jsonl"
        if self._main and self._path.exists():
            kept = [line for line in self._path.read_text().splitlines(keepends=True) if _is_valid(line, title, done)]
            write_text(self._path, "".join(kept))

    def __enter__(self) -> "RunLog":
        """Show the progress bar and open the trackers."""
        if self._main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # TensorBoard discards what the interrupted run has recorded beyond the resumed step.
        self._accelerator.init_trackers(TRACKER, init_kwargs={TRACKER: {"purge_step": self._progress.done + 1}})
        self._progress.__enter__()
        return self

    @property
    def seconds(self) -> float:
        """Return the seconds since the log was opened."""
        return self._progress.seconds

    def advance(self, count: int, **metrics: float) -> None:
        """Count `count` units as done, and log the metrics if there are any."""
        self._progress.advance(count, **metrics)
        if not metrics or not self._main:
            return
        progress = self._progress
        metrics["rate"] = round(progress.rate, 3)
        self._accelerator.log(metrics, step=progress.done)
        line = {"step": progress.title, "done": progress.done, "total": progress.total, "unit": progress.unit}
        line |= {"time": round(time.time(), 3), "seconds": round(progress.seconds, 3), **metrics}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def log_image(self, name: str, image: "Image") -> None:
        """Pass an image to the trackers."""
        for tracker in self._accelerator.trackers:
            tracker.log_images({name: np.asarray(image)[None]}, step=self._progress.done, dataformats="NHWC")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the trackers and the progress bar."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._progress.__exit__(kind, error, trace)


def _is_valid(line: str, title: str, done: int) -> bool:
    """Return whether a line is complete, and is of another title or not beyond `done`."""
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return bool(content.get("step") != title or content["done"] <= done)


class Preview:
    """Samples of the same captions from the same noise, to compare a network at different training steps."""

    def __init__(
        self,
        folder: Path,
        table: Table,
        network: Network,
        objective: Objective,
        device: str,
        encoders: EncoderPlaces = NOT_MOVED,
    ) -> None:
        """Choose captions of held-out rows, or of training rows if none are held out; encoders are opened later."""
        split = HELDOUT if len(table.positions(HELDOUT)) else TRAIN
        self._captions = table.take(table.positions(split)[:PREVIEW_CAPTIONS], "caption").tolist()
        self._open = partial(CoalescerPipeline.from_network, network, objective, table.meta, folder, device, encoders)
        self._pipeline: CoalescerPipeline | None = None

    def grid(self) -> "Image":
        """Return a grid of samples of the network's present weights."""
        self._pipeline = self._pipeline or self._open()
        return draw_grid(self._pipeline(self._captions, num_inference_steps=PREVIEW_STEPS).images, self._captions)
