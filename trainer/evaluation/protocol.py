"""The evaluation protocol of a table: the same prompts, references and referee for every run that was trained on it.

In coordinates, where the network works, samples are compared with the latents of held-out rows. As images they are
compared, by the referee, with the images of those rows: the originals if the table stores them, so that the loss of the
autoencoder counts, and otherwise their decoded latents. References are measured by the same metrics. The same run,
options and seed give the same report, except for times.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from index.errors import RunError, TableError
from index.ranges import COUNT, MACHINE_LIMIT, SEED, Range, check_ranges
from index.table.schema import HELDOUT, TRAIN
from index.table.storage import Storage, write_json, write_text
from index.table.table import Table, open_table
from index.terminal import Progress
from trainer.evaluation.calibration import measure_calibration
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.features import load_extractors
from trainer.evaluation.referee import open_referee
from trainer.evaluation.references import measure_references, retrieve_pairs, row_images, row_samples, stores_images
from trainer.evaluation.report import evaluation_page, steps_label
from trainer.evaluation.samples import (
    BATCH,
    Decode,
    Prompts,
    SamplerOutput,
    Samples,
    draw_prompts,
    encode_captions,
    sample_prompts,
)
from trainer.grid import draw_grid
from trainer.run_folder import EncoderPlaces, find_run, read_config
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_SAMPLES = 2000
MIN_ROWS = 8
"""Rows of a split, and samples, below which metrics mean nothing."""
CANDIDATES = 100
"""Captions among which a matcher ranks the true one."""
GRID_CAPTIONS, GRID_NOISES = 6, 3
"""Captions whose images are shown on the page, and the images of each, from different noise."""
NO_IMAGES = "the table stores no images: encode it with --keep-images"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is sampled and measured."""

    num_inference_steps: Annotated[list[int], COUNT]
    """Numbers of steps to evaluate, each with all prompts."""
    num_samples: Annotated[int | None, Range(MIN_ROWS, MACHINE_LIMIT)] = None
    """Samples for each number of steps. If there are more than held-out rows, captions repeat with other noise.
    None: 2,000, or four per held-out row if that is less."""
    seed: Annotated[int, SEED] = 0
    """Seed of captions and noise."""
    clip: Path | None = None
    """Folder of a CLIPModel, for the CLIP score."""
    inception: Path | None = None
    """TorchScript file of an Inception network, for FID and KID."""
    device: str = "auto"
    """Device of all networks."""
    encoders: EncoderPlaces = field(default_factory=EncoderPlaces)
    """Where the table's encoders are, if they were moved."""
    storage: Storage = field(default_factory=Storage.of)
    """How to reach a table on an object store."""

    def __post_init__(self) -> None:
        """Raise OptionError for values that cannot be evaluated, before anything is opened."""
        check_ranges(self)


class RunEvaluation(NamedTuple):
    """Samples of one run and what was measured of them."""

    metrics: dict[str, dict[str, float]]
    """By num_inference_steps."""
    samples: dict[int, SamplerOutput]
    """By num_inference_steps."""
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
    references: dict[str, dict[str, float]]
    """Metrics by reference."""
    referee: dict[str, Any]
    """Settings of the referee."""
    device: str

    def evaluate(self, pipeline: CoalescerPipeline, num_inference_steps: list[int], log: Path) -> RunEvaluation:
        """Sample from a run and compute its metrics."""
        prompts, text = self.prompts, encode_captions(pipeline, self.prompts.captions)
        metrics, samples = {}, {}
        total = len(num_inference_steps) * len(prompts.captions)
        with Progress("evaluate", total=total, unit="samples", log=log) as bar:
            for n in num_inference_steps:
                samples[n] = sample_prompts(pipeline, prompts, text, n, bar.advance)
                metrics[str(n)] = self._measure(samples[n])
        return RunEvaluation(metrics, samples, measure_calibration(pipeline, prompts, text, self.pairs))

    def _measure(self, output: SamplerOutput) -> dict[str, float]:
        """Return the metrics of samples and their cost."""
        metrics, seconds_per_image = self.evaluator.measure(Samples.for_prompts(self.prompts, output.x))
        if not np.isnan(output.confidence).all():
            metrics["confidence"] = float(output.confidence.mean())
        return metrics | {
            "network_evaluations": output.network_evaluations,
            "ms_per_latent": output.seconds / len(output.x) * 1e3,
            "ms_per_decoding": seconds_per_image * 1e3,
        }

    def image_grid(self, samples: dict[str, Float32[np.ndarray, "Q L"]]) -> "Image":
        """Draw some rows for each of some captions: samples of one noise, its retrieved pair, the held-out row."""
        from PIL import Image

        prompts, geometry = self.prompts, self.table.meta.geometry
        first = np.unique(prompts.diversity_group, return_index=True)[1][:GRID_CAPTIONS]
        shown = prompts.count + (first[:, None] + np.arange(GRID_NOISES)).ravel()
        columns = samples | {"retrieved pair": self.pairs}
        images = {name: self.decode(geometry.to_latent(x[shown])) for name, x in columns.items()}
        heldout = np.concatenate([*row_images(self.table, prompts.positions[shown], self.decode)])
        tiles = []
        for row, prompt in enumerate(shown):
            tiles += [(column[row], name) for name, column in images.items()]
            tiles.append((heldout[row], prompts.captions[prompt]))
        return draw_grid(
            [Image.fromarray(image) for image, _ in tiles], [label for _, label in tiles], columns=len(columns) + 1
        )

    def summary(self) -> dict[str, Any]:
        """Return the part of a report that all runs share."""
        return {
            "table": {"uri": self.table.uri, "version": self.table.version},
            "seed": self.prompts.seed,
            "num_samples": self.prompts.count,
            "heldout_rows": len(self.heldout),
            "heldout_images": "originals" if stores_images(self.table) else "decoded latents",
            "train_rows_compared": self.evaluator.train_rows,
            "batch_size": BATCH,
            "device": self.device,
            "referee": self.referee,
            "references": self.references,
            "heldout": self.evaluator.measure_heldout(),
            "left_out": {} if "reconstructions" in self.references else {"reconstructions": NO_IMAGES},
        }


def evaluate(run: str | Path, config: EvaluationConfig, out: Path) -> dict[str, Any]:
    """Evaluate a run, write OUT/report.json and OUT/index.html, and return the report."""
    folder = find_run(run)
    objective = read_config(folder)["fit"]["objective"]
    began = time.perf_counter()
    pipeline = CoalescerPipeline.from_pretrained(folder, device=config.device, encoders=config.encoders)
    protocol = open_protocol(folder, pipeline, config, out)
    result = protocol.evaluate(pipeline, config.num_inference_steps, out / "log.jsonl")
    report: dict[str, Any] = {"run": str(run), "objective": objective, **protocol.summary()}
    report |= {"num_inference_steps": config.num_inference_steps, "metrics": result.metrics}
    report["calibration"] = result.calibration
    if not result.calibration:
        report["left_out"]["calibration"] = f"{objective} trains no confidence"
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "report.json", report)
    grid = protocol.image_grid({steps_label(n): output.x for n, output in result.samples.items()})
    write_text(out / "index.html", evaluation_page(report, grid))
    return report


def open_protocol(run: Path, pipeline: CoalescerPipeline, config: EvaluationConfig, out: Path) -> Protocol:
    """Open a run's table, train its referee if there is none yet, and measure the references.

    Raises OptionError, RunError or TableError if extractors, run or table do not allow an evaluation.
    """
    pretrained = load_extractors(config.clip, config.inception, pipeline.device)
    table = _open_table(run, config.storage)
    num_samples = config.num_samples or min(NUM_SAMPLES, 4 * len(table.positions(HELDOUT)))
    prompts, decode = draw_prompts(pipeline, table, num_samples, config.seed), _decoder(pipeline)
    candidates, encode_text = min(CANDIDATES, len(set(prompts.captions))), pipeline.text_encoder.encode
    referee, settings = open_referee(table, decode, encode_text, candidates=candidates, out=out, device=pipeline.device)
    pairs = retrieve_pairs(table, prompts, pipeline.device)
    # In the order of the prompts: the two-sample test relies on samples and rows that correspond.
    heldout = np.array(list(dict.fromkeys(prompts.positions.tolist())))
    images = row_images(table, heldout, decode)
    evaluator = Evaluator(table, row_samples(table, heldout), images, decode, referee, pretrained)
    references = {}
    total = 3 + stores_images(table)
    with Progress("measure references", total=total, unit="references", log=out / "log.jsonl") as bar:
        for name, metrics in measure_references(table, prompts, pairs, pipeline.image_encoder, decode, evaluator):
            references[name] = metrics
            bar.advance()
    return Protocol(table, prompts, heldout, pairs, decode, evaluator, references, settings, pipeline.device)


def _open_table(run: Path, storage: Storage) -> Table:
    config = read_config(run)["table"]
    try:
        table = open_table(config["uri"], version=config["version"], storage=storage)
    except TableError as error:
        raise RunError(f"the table of {run} cannot be opened: {error}") from error
    for split, size in ((HELDOUT, "larger"), (TRAIN, "smaller")):
        if (rows := len(table.positions(split))) < MIN_ROWS:
            raise TableError(
                f"{table.uri} has {rows} {split} rows, an evaluation needs {MIN_ROWS}: "
                f"encode it with a {size} --val-fraction"
            )
    return table


def _decoder(pipeline: CoalescerPipeline) -> Decode:
    shape = pipeline.meta.latent_shape
    return lambda latents: pipeline.image_encoder.decode(latents.reshape(-1, *shape))
