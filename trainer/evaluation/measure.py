"""One row of a report: how far points, and the pictures that they decode to, are from held-out rows."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from index.table.schema import TRAIN
from index.table.table import Table
from trainer.evaluation.answers import Answers
from trainer.evaluation.metrics import (
    diversity,
    energy_distance,
    frechet,
    mean_distance,
    sliced_wasserstein,
    two_sample_accuracy,
)
from trainer.evaluation.neighborhoods import COPIED, manifold, nearest_ratio
from trainer.evaluation.referee import DECODED, Decode, Referee
from trainer.evaluation.viewers import Viewer

MEMORY_BYTES = 2**30
"""Latents of training rows that samples are compared with; of larger tables every k-th row."""
BLOCK_NUMBERS = 2**20
"""Of training rows that are compared at once."""

Pictures = Iterable[UInt8[np.ndarray, "_ H W 3"]]


class Measures:
    """What all rows of a report are measured against."""

    def __init__(self, table: Table, truth: Answers, pictures: Pictures, decode: Decode, viewers: list[Viewer]) -> None:
        """Held-out rows in coordinates with their captions, and their pictures in batches; the referee comes first."""
        self._geometry, self._decode, self._viewers, self._truth = table.meta.geometry, decode, viewers, truth
        self._seen = self._look(pictures, truth.captions)
        self._apart = mean_distance(truth.x)
        train = table.positions(TRAIN)
        every = -(-len(train) * truth.x.shape[1] * 2 // MEMORY_BYTES)
        self._training: Float16[np.ndarray, "N L"] = table.take(train[::every], "latent")
        self.compared_with = len(self._training)
        """Training rows that memorization is measured against."""
        self.seconds_per_picture = math.nan
        """That the last row's decoding took."""

    def row(self, answers: Answers, pictures: Pictures | None = None) -> dict[str, float]:
        """All figures of some answers; pictures are decoded unless they are given."""
        # Of unequal sets coverage and recall would say how many there are.
        count = min(len(answers.x), len(self._truth.x))
        return {
            "frechet": frechet(answers.x, self._truth.x),
            "sliced_wasserstein": sliced_wasserstein(answers.x, self._truth.x),
            "energy_distance": energy_distance(answers.x, self._truth.x),
            "two_sample_accuracy": two_sample_accuracy(answers.x, self._truth.x),
            **manifold(self._truth.x[:count], answers.x[:count])._asdict(),
            **self._alone(answers),
            **self._figures(self._look(pictures or self.decoded(answers.x), answers.captions), answers.captions),
        }

    def heldout(self) -> dict[str, float]:
        """What held-out rows themselves come to, in figures that compare nothing with them."""
        referee = self._viewers[0]
        assert isinstance(referee, Referee)
        return self._alone(self._truth) | referee.adherence(self._seen[0], self._truth.captions)

    def decoded(self, x: Float32[np.ndarray, "N L"]) -> Pictures:
        """Pictures of points, in batches; how long they took is noted."""
        seconds = 0.0
        for start in range(0, len(x), DECODED):
            began = time.perf_counter()
            pictures = self._decode(self._geometry.to_latent(x[start : start + DECODED]))
            seconds += time.perf_counter() - began
            yield pictures
        self.seconds_per_picture = seconds / len(x)

    def _alone(self, answers: Answers) -> dict[str, float]:
        """Diversity and memorization."""
        ratio = nearest_ratio(answers.x, self._training_blocks())
        spread = diversity(answers.grouped, answers.group) / self._apart
        return {
            **({} if math.isnan(spread) else {"diversity": spread}),
            "nearest_ratio": float(np.median(ratio)),
            "copied_rate": float((ratio < COPIED).mean()),
        }

    def _training_blocks(self) -> Iterator[Float32[np.ndarray, "_ L"]]:
        rows = max(256, BLOCK_NUMBERS // self._training.shape[1])
        for start in range(0, len(self._training), rows):
            yield self._geometry.to_coordinates(self._training[start : start + rows])

    def _look(self, batches: Pictures, captions: Sequence[str]) -> list[Float32[np.ndarray, "N _"]]:
        """What each viewer sees of pictures, none of which is kept."""
        seen: list[list[Float32[np.ndarray, "_ _"]]] = [[] for _ in self._viewers]
        done = 0
        for pictures in batches:
            here = captions[done : done + len(pictures)]
            for each, viewer in zip(seen, self._viewers, strict=True):
                each.append(viewer.look(pictures, here))
            done += len(pictures)
        assert done == len(captions), (done, len(captions))
        return [np.concatenate(each) for each in seen]

    def _figures(self, seen: list[Float32[np.ndarray, "N _"]], captions: Sequence[str]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for viewer, found, truth in zip(self._viewers, seen, self._seen, strict=True):
            figures |= viewer.figures(found, truth, captions)
        return figures
