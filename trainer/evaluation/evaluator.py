"""The metrics of a set of samples, compared with held-out rows in coordinates and as images."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from index.table.table import Table
from trainer.evaluation.energy_score import energy_score, energy_score_of_rows, named_scores, number_captions
from trainer.evaluation.features import FeatureExtractor
from trainer.evaluation.memorization import Memorization
from trainer.evaluation.metrics import (
    diversity,
    energy_distance,
    frechet,
    mean_distance,
    prdc,
    sliced_wasserstein,
    two_sample_accuracy,
)
from trainer.evaluation.referee import FEATURE_DIM, Referee
from trainer.evaluation.samples import MIN_ROWS, Advance, Decode, Samples, clock, images_at_once, is_finite
from trainer.evaluation.threads import map_batches, single_thread, split

GetImages = Callable[[slice], UInt8[np.ndarray, "_ H W 3"]]
"""Returns some images of a set."""
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
        images: GetImages,
        decode: Decode,
        referee: Referee,
        pretrained: Sequence[FeatureExtractor] = (),
        *,
        memorization: Memorization,
        scored: Sequence[str],
        device: str = "cpu",
    ) -> None:
        """Keep what samples are compared with; `images` are those of `heldout`, in order.

        The energy score is of the captions in `scored`, whatever set is measured.
        """
        self._geometry, self._decode, self._heldout, self._images = table.meta.geometry, decode, heldout, images
        self._referee, self.extractors = referee, [referee, *pretrained]
        self._memorization, self._scored, self._device = memorization, scored, device
        self._at_once = images_at_once(table.meta.image_size, device)

    def measure(
        self, samples: Samples, images: GetImages | None = None, *, advance: Advance = lambda _: None
    ) -> Measurement:
        """Compute all metrics of samples, which are decoded unless their images are passed.

        Samples that are not finite are counted, and the others measured; nothing else if those are fewer than MIN_ROWS.
        """
        finite = is_finite(samples.x)
        rate = {"non_finite_rate": float((~finite).mean())}
        if finite.sum() < MIN_ROWS:
            advance(len(finite))
            return Measurement(rate, math.nan)
        assert images is None or finite.all()
        kept = samples.finite()
        advance(int((~finite).sum()))
        features, seconds = self._extract(images or self.decode(kept.x), kept.captions, advance)
        grouped = features[0] if samples.grouped is samples.x else self._features_of_groups(kept)
        metrics = rate | self._memorization.metrics(kept.x)
        with single_thread():
            metrics |= self._compare(samples, kept, finite) | self._energy_scores(kept, grouped)
            for extractor, generated, heldout in zip(self.extractors, features, self._heldout_features, strict=True):
                metrics |= extractor.metrics(generated, heldout, kept.captions)
        return Measurement(metrics, seconds / len(kept.x))

    def measure_energy_score(self, samples: Samples) -> dict[str, float]:
        """Compute the energy scores alone; the only point of a caption is all that is predicted for it."""
        features = self._features_of_groups(samples)
        with single_thread():
            return self._energy_scores(samples, features, points=True)

    def measure_heldout(self) -> dict[str, float]:
        """Compute the metrics of the held-out rows themselves that do not compare with held-out rows."""
        features, metrics = self._heldout_features[0], self._memorization.metrics(self._heldout.x)
        with single_thread():
            group, count = number_captions(self._scored, self._heldout.captions), len(self._scored)
            scores = [energy_score_of_rows(x, group, count) for x in (self._heldout.x, features)]
            metrics |= self._diversity(self._heldout) | named_scores(*scores)
            return metrics | self._referee.adherence(features, self._heldout.captions)

    def decode(self, x: Float32[np.ndarray, "N L"]) -> GetImages:
        """Return what decodes some of the points."""
        return lambda part: self._decode(self._geometry.to_latent(x[part]))

    def _compare(self, samples: Samples, kept: Samples, finite: Bool[np.ndarray, "N"]) -> dict[str, float]:
        """Return the metrics in coordinates."""
        real = self._heldout.x
        # Recall and coverage grow with the number of samples, so both sets are cut to the same size.
        count = min(len(kept.x), len(real))
        # The two-sample test needs points that correspond.
        both = finite[: len(real)]
        pairs = [points[: len(both)][both] for points in (samples.x, real)]
        return {
            "frechet": frechet(kept.x, real),
            "sliced_wasserstein": sliced_wasserstein(kept.x, real),
            "energy_distance": energy_distance(kept.x, real),
            **({"two_sample_accuracy": two_sample_accuracy(*pairs)} if both.sum() >= MIN_ROWS else {}),
            **prdc(real[:count], kept.x[:count])._asdict(),
            **self._diversity(kept),
        }

    def _energy_scores(
        self, samples: Samples, features: Float32[np.ndarray, "P F"], *, points: bool = False
    ) -> dict[str, float]:
        """Return the energy scores in coordinates and in the referee's features."""
        truth, count = number_captions(self._scored, self._heldout.captions), len(self._scored)
        group = number_captions(self._scored, [samples.group_captions[number] for number in samples.group])
        return named_scores(
            energy_score(samples.grouped, group, self._heldout.x, truth, count, points=points),
            energy_score(features, group, self._heldout_features[0], truth, count, points=points),
        )

    def _features_of_groups(self, samples: Samples) -> Float32[np.ndarray, "P F"]:
        """Return the referee's features of the images of captions."""
        get, size = self.decode(samples.grouped), self._at_once
        parts = map_batches(
            lambda part: self._referee.extract(get(part), []), split(len(samples.grouped), size), self._device
        )
        return np.concatenate([np.zeros((0, FEATURE_DIM), np.float32), *parts])

    def _diversity(self, samples: Samples) -> dict[str, float]:
        relative = diversity(samples.grouped, samples.group) / self._heldout_distance
        return {} if math.isnan(relative) else {"diversity": relative}

    @cached_property
    def _heldout_distance(self) -> float:
        return mean_distance(self._heldout.x)

    @cached_property
    def _heldout_features(self) -> Features:
        return self._extract(self._images, self._heldout.captions)[0]

    def _extract(
        self, images: GetImages, captions: Sequence[str], advance: Advance = lambda _: None
    ) -> tuple[Features, float]:
        """Return the features of images, none of which is kept, and the seconds that it took to get the images."""

        def extract(part: slice) -> tuple[Features, float]:
            began = clock(self._device)
            batch = images(part)
            seconds = clock(self._device) - began
            return [extractor.extract(batch, captions[part]) for extractor in self.extractors], seconds

        parts = map_batches(
            extract,
            split(len(captions), self._at_once),
            self._device,
            done=lambda part: advance(part.stop - part.start),
        )
        features, seconds = zip(*parts, strict=True)
        return [np.concatenate(each) for each in zip(*features, strict=True)], sum(seconds)
