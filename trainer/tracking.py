"""What is recorded of a training run: a progress bar, RUN/log.jsonl, accelerate's trackers, grids of samples.

None of it may end a run: what fails is warned of once, and named in RUN/result.json.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from index.errors import one_line
from index.table.schema import HELDOUT, TRAIN
from index.table.table import Table
from index.terminal import Progress, print_status
from pipeline.encoders.devices import default_dtype
from trainer.grid import draw_grid
from trainer.models.base import Network
from trainer.objectives.base import Objective
from trainer.run_folder import NOT_MOVED, EncoderPlaces, write_whole
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

TRACKER = "tensorboard"
"""Tracker of accelerate, and the folder in RUN that it writes to."""
PREVIEW_CAPTIONS, PREVIEW_NOISES, PREVIEW_STEPS = 8, 4, 2
"""Distinct captions, images of each, from different noise, and their inference steps."""
PREVIEW_ROWS = 256
"""Rows, spread over the table, among whose captions those of a preview are chosen."""


class Conveniences:
    """What a run can do without: `with conveniences.attempt("samples"): ...` warns instead of raising.

    Running out of memory on a device is such a failure too. What stops a process, such as Ctrl-C, is not.
    """

    def __init__(self) -> None:
        """Begin with nothing left out."""
        self.left_out: dict[str, str] = {}
        """The first failure of each convenience."""

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Run the block; if it fails, go on after it, with a warning the first time."""
        try:
            yield
        except Exception as error:
            reason = one_line(error, typed=True)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if name not in self.left_out:
                self.left_out[name] = reason
                print_status(f"warning: training goes on without {name} ({reason})")


class RunLog:
    """`with RunLog(accelerator, "fit", total=n, unit="images", folder=RUN) as log: log.advance(256, loss=0.3)`.

    The log has one line for each call that passes metrics, so two runs can be compared line by line. Only the main
    process writes.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        title: str,
        *,
        total: int,
        unit: str,
        folder: Path,
        done: int = 0,
        seconds: float = 0.0,
        conveniences: Conveniences | None = None,
    ) -> None:
        """Log into `folder`.

        A run that is resumed at `done`, after `seconds` of training, drops the lines that were logged beyond it.
        """
        self._accelerator, self._main = accelerator, accelerator.is_main_process
        self._progress = Progress(title, total=total, unit=unit, done=done, silent=not self._main)
        self._path, self._seconds_before = folder / "log.jsonl", seconds
        self._conveniences = conveniences or Conveniences()

    def __enter__(self) -> "RunLog":
        """Show the progress bar and open the log and the trackers."""
        progress = self._progress
        with self._conveniences.attempt("log.jsonl"):
            if self._main:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._main and self._path.exists():
                lines = self._path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if _is_valid(line, progress.title, progress.done)]
                write_whole(self._path, "".join(kept))
        with self._conveniences.attempt(TRACKER):
            # TensorBoard discards what the interrupted run has recorded beyond the resumed step.
            self._accelerator.init_trackers(TRACKER, init_kwargs={TRACKER: {"purge_step": progress.done + 1}})
        progress.__enter__()
        return self

    @property
    def seconds(self) -> float:
        """Return the seconds of training, those of earlier sessions included."""
        return self._seconds_before + self._progress.seconds

    def advance(self, count: int, **metrics: float) -> None:
        """Count `count` units as done, and log the metrics if there are any."""
        self._progress.advance(count, **metrics)
        if not metrics or not self._main:
            return
        progress = self._progress
        metrics["rate"] = round(progress.rate, 3)
        with self._conveniences.attempt(TRACKER):
            self._accelerator.log(metrics, step=progress.done)
        line = {"step": progress.title, "done": progress.done, "total": progress.total, "unit": progress.unit}
        line |= {"time": round(time.time(), 3), "seconds": round(self.seconds, 3), **metrics}
        with self._conveniences.attempt("log.jsonl"), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def log_now(self, **metrics: float | str) -> None:
        """Pass metrics or texts to the trackers alone, at what is done so far."""
        with self._conveniences.attempt(TRACKER):
            self._accelerator.log(metrics, step=self._progress.done)

    def log_image(self, name: str, image: "Image") -> None:
        """Pass an image to the trackers."""
        with self._conveniences.attempt(TRACKER):
            for tracker in self._accelerator.trackers:
                tracker.log_images({name: np.asarray(image)[None]}, step=self._progress.done, dataformats="NHWC")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the trackers and the progress bar."""
        for tracker in self._accelerator.trackers:
            with self._conveniences.attempt(TRACKER):
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
    """Samples of the same captions from the same noise, to compare a network at different training steps.

    Between previews the encoders are in main memory, so that training has the memory of its device to itself.
    """

    def __init__(
        self,
        folder: Path,
        table: Table,
        network: Network,
        objective: Objective,
        device: str,
        encoders: EncoderPlaces = NOT_MOVED,
    ) -> None:
        """Sample with `network` as it is at each call; table and encoders are opened when they are first needed."""
        self._table, self._captions, self._device = table, list[str](), device
        self._open = partial(
            CoalescerPipeline.from_network,
            *(network, objective, table.meta, folder, device, encoders),
            dtype=default_dtype(device),
        )
        self._pipeline: CoalescerPipeline | None = None

    def grid(self) -> "Image":
        """Return a grid of samples of the network's present weights, several of each caption."""
        try:
            self._captions = self._captions or choose_captions(self._table)
            self._pipeline = self._pipeline or self._open()
            self._pipeline.move_encoders(self._device)
            output = self._pipeline(
                self._captions, num_inference_steps=PREVIEW_STEPS, num_images_per_prompt=PREVIEW_NOISES
            )
            self._pipeline.move_encoders("cpu")
            return draw_grid(output.images, output.prompts, columns=2 * PREVIEW_NOISES)
        except Exception:
            self._pipeline = None  # so that encoders hold no memory that training needs
            raise


def choose_captions(table: Table) -> list[str]:
    """Return distinct captions of held-out rows, or of training rows if none are held out."""
    held_out, train = table.positions(HELDOUT), table.positions(TRAIN)
    positions = held_out if len(held_out) else train
    spread = positions[:: -(-len(positions) // PREVIEW_ROWS)]
    return list(dict.fromkeys(table.take(spread, "caption").tolist()))[:PREVIEW_CAPTIONS]
