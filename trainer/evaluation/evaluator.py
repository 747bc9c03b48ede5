"""The metrics of a set of samples, compared with held-out rows in coordinates and as images."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from index.table.schema import TRAIN
from index.table.table import Table
from trainer.evaluation.features import FeatureExtractor
from trainer.evaluation.metrics import (
    COPY_RATIO,
    diversity,
    energy_distance,
    frechet,
    mean_distance,
    nearest_ratio,
    prdc,
    sliced_wasserstein,
    two_sample_accuracy,
)
from trainer.evaluation.referee import Referee
from trainer.evaluation.samples import DECODE_BATCH, Decode, Samples

TRAIN_BYTES = 2**30
"""Memory for the latents of training rows that samples are compared with; of larger tables every k-th row is used."""
BLOCK_ENTRIES = 2**20
"""Entries of training latents that are compared at once."""

ImageBatches = Iterable[UInt8[np.ndarray, "_ H W 3"]]
Features = list[Float32[np.ndarray, "N _"]]
"""One array for each extractor."""


class Measurement(NamedTuple):
    """All metrics of a set of samples, and the time to decode one."""

    metrics: dict[str, float]
    seconds_per_image: float
    """Of decoding, or of reading if the images were passed."""


class Evaluator:
    """Compute metrics of samples against one set of held-out rows."""

    def __init__(
        self,
        table: Table,
        heldout: Samples,
        images: ImageBatches,
        decode: Decode,
        referee: Referee,
        pretrained: Sequence[FeatureExtractor] = (),
    ) -> None:
        """Extract the features of held-out rows and read training rows; `images` are those of `heldout`, in order."""
        self._geometry, self._decode, self._heldout = table.meta.geometry, decode, heldout
        self._referee, self._extractors = referee, [referee, *pretrained]
        self._heldout_features, _ = self._extract(images, heldout.captions)
        self._heldout_distance = mean_distance(heldout.x)
        positions = table.positions(TRAIN)
        stride = -(-len(positions) * heldout.x.shape[1] * 2 // TRAIN_BYTES)
        self._train: Float16[np.ndarray, "N L"] = table.take(positions[::stride], "latent")

    @property
    def train_rows(self) -> int:
        """The number of training rows that memorization is measured against."""
        return len(self._train)

    def measure(self, samples: Samples, images: ImageBatches | None = None) -> Measurement:
        """Compute all metrics of samples, which are decoded unless their images are passed."""
        features, seconds = self._extract(images or self.decode(samples.x), samples.captions)
        real = self._heldout.x
        # Recall and coverage grow with the number of samples, so both sets are cut to the same size.
        count = min(len(samples.x), len(real))
        metrics = {
            "frechet": frechet(samples.x, real),
            "sliced_wasserstein": sliced_wasserstein(samples.x, real),
            "energy_distance": energy_distance(samples.x, real),
            "two_sample_accuracy": two_sample_accuracy(samples.x, real),
            **prdc(real[:count], samples.x[:count])._asdict(),
            **self._diversity_and_memorization(samples),
        }
        for extractor, generated, heldout in zip(self._extractors, features, self._heldout_features, strict=True):
            metrics |= extractor.metrics(generated, heldout, samples.captions)
        return Measurement(metrics, seconds / len(samples.x))

    def measure_heldout(self) -> dict[str, float]:
        """Compute the metrics of the held-out rows themselves that do not compare with held-out rows."""
        adherence = self._referee.adherence(self._heldout_features[0], self._heldout.captions)
        return self._diversity_and_memorization(self._heldout) | adherence

    def decode(self, x: Float32[np.ndarray, "N L"]) -> ImageBatches:
        """Decode points in batches."""
        for start in range(0, len(x), DECODE_BATCH):
            yield self._decode(self._geometry.to_latent(x[start : start + DECODE_BATCH]))

    def _diversity_and_memorization(self, samples: Samples) -> dict[str, float]:
        relative = diversity(samples.grouped, samples.group) / self._heldout_distance
        ratio = nearest_ratio(samples.x, self._train_blocks())
        return {
            **({} if math.isnan(relative) else {"diversity": relative}),
            "nearest_ratio": float(np.median(ratio)),
            "copied_rate": float((ratio < COPY_RATIO).mean()),
        }

    def _train_blocks(self) -> Iterator[Float32[np.ndarray, "_ L"]]:
        rows = max(256, BLOCK_ENTRIES // self._train.shape[1])
        for start in range(0, len(self._train), rows):
            yield self._geometry.to_coordinates(self._train[start : start + rows])

    def _extract(self, batches: ImageBatches, captions: Sequence[str]) -> tuple[Features, float]:
        """Return the features of images, none of which is kept, and the seconds that it took to get the images."""
        parts: list[list[Float32[np.ndarray, "_ _"]]] = [[] for _ in self._extractors]
        source, done, seconds = iter(batches), 0, 0.0
        while done < len(captions):
            began = time.perf_counter()
            images = next(source, None)
            seconds += time.perf_counter() - began
            assert images is not None, (done, len(captions))
            for part, extractor in zip(parts, self._extractors, strict=True):
                part.append(extractor.extract(images, captions[done : done + len(images)]))
            done += len(images)
        assert done == len(captions), (done, len(captions))
        return [np.concatenate(part) for part in parts], seconds
