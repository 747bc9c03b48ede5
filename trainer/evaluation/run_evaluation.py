"""One run against what all runs of a table share: the same prompts, held-out rows, references and referee."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8

from index.table.table import Table
from index.terminal import Progress
from pipeline.encoders.files import digest_of
from trainer.evaluation.calibration import measure_calibration
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.measurements import Measurements
from trainer.evaluation.references import row_images
from trainer.evaluation.samples import (
    BATCH,
    Advance,
    Decode,
    Prompts,
    SamplerOutput,
    Samples,
    encode_captions,
    is_finite,
    sample_prompts,
)
from trainer.grid import draw_grid
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

GRID_CAPTIONS, GRID_NOISES = 6, 3
"""Captions whose images are shown on the page, and the images of each, from different noise."""


class RunEvaluation(NamedTuple):
    """What was measured of one run."""

    metrics: dict[str, dict[str, float]]
    """By num_inference_steps."""
    shown: dict[int, Float32[np.ndarray, "P L"]]
    """Samples of the prompts that the page shows, by num_inference_steps."""
    calibration: dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Protocol:
    """What all evaluations of a table share; made by `open_protocol`."""

    table: Table
    prompts: Prompts
    heldout: Int[np.ndarray, "M"]
    """Table positions of the held-out rows, in the order of the prompts."""
    pairs: Float32[np.ndarray, "Q L"]
    """The retrieved pair of each prompt, which a perfect network would sample."""
    decode: Decode
    evaluator: Evaluator
    measurements: Measurements
    references: dict[str, dict[str, float]]
    """Metrics by reference."""
    energy_score_references: dict[str, dict[str, float]]
    """Energy scores of points that need no network, by name."""
    heldout_metrics: dict[str, float]
    """Metrics of the held-out rows that do not compare with held-out rows."""
    left_out: dict[str, str]
    """Why metrics and references are missing."""
    referee: dict[str, Any]
    """Settings of the referee."""
    device: str

    def evaluate(
        self, pipeline: CoalescerPipeline, num_inference_steps: list[int], log: Path, *, title: str = "evaluate"
    ) -> RunEvaluation:
        """Sample from a run and compute its metrics; what an earlier evaluation has measured of it is taken up."""
        run = _identity(pipeline)
        found = {n: self.measurements.load(run=run, num_inference_steps=n) for n in num_inference_steps}
        calibration = self.measurements.load(run=run, calibration=True)
        todo = [n for n, measurement in found.items() if measurement is None]
        if todo or calibration is None:
            text = encode_captions(pipeline, self.prompts.captions)
        images, latents = self.prompts.count, len(self.prompts.captions)
        total, done = (len(each) * (images + latents) for each in (found, found.keys() - todo))
        with Progress(title, total=total, unit="latents and images", log=log, done=done) as bar:
            for n in todo:
                samples = sample_prompts(pipeline, self.prompts, text, n, bar.advance)
                metrics = self._measure(samples, bar.advance)
                shown = samples.x[self.shown]
                found[n] = self.measurements.save(metrics, shown, run=run, num_inference_steps=n)
        if calibration is None:
            measured = measure_calibration(pipeline, self.prompts, text, self.pairs)
            calibration = self.measurements.save(measured, run=run, calibration=True)
        results = {n: each for n, each in found.items() if each is not None}
        return RunEvaluation(
            {str(n): each.content for n, each in results.items()},
            {n: each.shown for n, each in results.items()},
            calibration.content,
        )

    @property
    def shown(self) -> Int[np.ndarray, "P"]:
        """The prompts whose images are shown on the page: several noises of each caption of the diversity set."""
        first: Int[np.ndarray, G] = np.unique(self.prompts.diversity_group, return_index=True)[1]
        return self.prompts.count + (first[:GRID_CAPTIONS, None] + np.arange(GRID_NOISES)).ravel()

    def _measure(self, output: SamplerOutput, advance: Advance) -> dict[str, float]:
        """Return the metrics of samples and their cost."""
        samples = Samples.for_prompts(self.prompts, output.x)
        metrics, seconds_per_image = self.evaluator.measure(samples, advance=advance)
        confidence = output.confidence[is_finite(output.x)]
        if len(confidence) and not np.isnan(confidence).all():
            metrics["confidence"] = float(np.nanmean(confidence))
        if not np.isnan(seconds_per_image):
            metrics["ms_per_decoding"] = seconds_per_image * 1e3
        return metrics | {
            "network_evaluations": output.network_evaluations,
            "ms_per_latent": output.seconds / len(output.x) * 1e3,
        }

    def image_grid(self, shown: dict[str, Float32[np.ndarray, "P L"]]) -> "Image":
        """Draw some rows for each of some captions: samples of one noise, the retrieved pair, the held-out row.

        `shown` has samples of the prompts that `self.shown` names; those that are not finite are black.
        """
        from PIL import Image

        prompts, columns = self.prompts, shown | {"retrieved pair": self.pairs[self.shown]}
        images = {name: self._draw(x) for name, x in columns.items()}
        heldout = row_images(self.table, prompts.positions[self.shown], self.decode)(slice(None))
        tiles = []
        for row, prompt in enumerate(self.shown):
            tiles += [(column[row], name) for name, column in images.items()]
            tiles.append((heldout[row], prompts.captions[prompt]))
        return draw_grid(
            [Image.fromarray(image) for image, _ in tiles], [label for _, label in tiles], columns=len(columns) + 1
        )

    def _draw(self, x: Float32[np.ndarray, "P L"]) -> UInt8[np.ndarray, "P H W 3"]:
        finite = is_finite(x)[:, None]
        images = self.decode(self.table.meta.geometry.to_latent(np.where(finite, x, 0)))
        return np.where(finite[:, :, None, None], images, 0).astype(np.uint8)

    def summary(self) -> dict[str, Any]:
        """Return the part of a report that all runs share."""
        return {
            "table": {"uri": self.table.uri, "version": self.table.version},
            "seed": self.prompts.seed,
            "num_samples": self.prompts.count,
            "heldout_rows": len(self.heldout),
            "heldout_images": "originals" if self.table.stores_images else "decoded latents",
            "batch_size": BATCH,
            "device": self.device,
            "referee": self.referee,
            "references": self.references,
            "energy_score_references": self.energy_score_references,
            "heldout": self.heldout_metrics,
            "left_out": dict(self.left_out),
        }


def _identity(pipeline: CoalescerPipeline) -> dict[str, Any]:
    """Return what samples of a run depend on."""
    objective, config = pipeline.objective, pipeline.network.config
    return {
        "network": [type(pipeline.network).__name__, digest_of(pipeline.network)],
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "objective": [type(objective).__name__, asdict(objective)],
    }
