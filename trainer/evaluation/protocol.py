"""The evaluation protocol of a table: the same prompts, references and referee for every run that was trained on it.

In coordinates, where the network works, samples are compared with the latents of held-out rows. As images they are
compared, by the referee, with the images of those rows: the originals if the table stores them, so that the loss of the
autoencoder counts, and otherwise their decoded latents. References are measured by the same metrics. The same run,
options and seed give the same report, except for times.
"""

import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32, UInt8

from index.errors import RunError, TableError
from index.ranges import COUNT, MACHINE_LIMIT, SEED, Range, check_ranges
from index.table.schema import HELDOUT, TRAIN
from index.table.storage import Storage, write_json, write_text
from index.table.table import READ_COLUMNS, Table, open_table
from index.terminal import Progress
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.features import load_extractors
from trainer.evaluation.measurements import Measurements
from trainer.evaluation.memorization import Memorization
from trainer.evaluation.referee import open_referee
from trainer.evaluation.references import (
    RECONSTRUCTIONS,
    Reference,
    energy_references,
    references,
    retrieve_pairs,
    row_images,
    row_samples,
)
from trainer.evaluation.report import evaluation_page, steps_label
from trainer.evaluation.run_evaluation import Protocol
from trainer.evaluation.samples import (
    MIN_ROWS,
    Decode,
    draw_prompts,
)
from trainer.objectives.coalescer import Coalescer
from trainer.run_folder import EncoderPlaces, find_run, read_config
from trainer.sampler import CoalescerPipeline

NUM_SAMPLES = 2000
CANDIDATES = 100
"""Captions among which a matcher ranks the true one."""
HELDOUT_ROWS, ENERGY_SCORES = "held-out rows", "energy scores"
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


def evaluate(run: str | Path, config: EvaluationConfig, out: Path) -> dict[str, Any]:
    """Evaluate a run, write OUT/report.json and OUT/index.html, and return the report.

    Called again after it was stopped, it goes on from what it had measured, in OUT/measurements.
    """
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
        measured = isinstance(pipeline.objective, Coalescer)
        reason = "none of its predictions is finite" if measured else f"{objective} trains no confidence"
        report["left_out"]["calibration"] = reason
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "report.json", report)
    grid = protocol.image_grid({steps_label(n): x for n, x in result.shown.items()})
    write_text(out / "index.html", evaluation_page(report, grid))
    return report


def open_protocol(run: Path, pipeline: CoalescerPipeline, config: EvaluationConfig, out: Path) -> Protocol:
    """Open a run's table, train its referee if there is none yet, and measure the references.

    Raises OptionError, RunError or TableError if extractors, run or table do not allow an evaluation.
    """
    pretrained, device = load_extractors(config.clip, config.inception, pipeline.device), pipeline.device
    table = _open_table(run, config.storage)
    num_samples = config.num_samples or min(NUM_SAMPLES, 4 * table.count(HELDOUT))
    prompts, decode = draw_prompts(pipeline, table, num_samples, config.seed), _decoder(pipeline)
    candidates, encode_text = min(CANDIDATES, len(set(prompts.captions))), pipeline.text_encoder.encode
    referee, settings = open_referee(table, decode, encode_text, candidates=candidates, out=out, device=device)
    pairs = retrieve_pairs(table, prompts, device)
    # In the order of the prompts: the two-sample test relies on samples and rows that correspond.
    heldout = np.array(list(dict.fromkeys(prompts.positions.tolist())))
    images, memorization = row_images(table, heldout, decode), Memorization(table, num_samples, device)
    evaluator = Evaluator(
        table,
        row_samples(table, heldout),
        images,
        decode,
        referee,
        pretrained,
        memorization=memorization,
        scored=prompts.group_captions,
        device=device,
    )
    measurements = Measurements(
        out / "measurements",
        table=[table.uri, table.version, table.meta.to_json()],
        prompts=[num_samples, config.seed],
        extractors=[extractor.digest for extractor in evaluator.extractors],
        candidates=candidates,
        device=device,
    )
    found = references(table, prompts, pairs, pipeline.image_encoder, decode, evaluator) | {
        ENERGY_SCORES: Reference(0, lambda _: energy_references(table, prompts, evaluator)),
        HELDOUT_ROWS: Reference(0, lambda _: evaluator.measure_heldout()),
    }
    measured = _measure_references(found, measurements, out)
    left_out = {} if RECONSTRUCTIONS in measured else {RECONSTRUCTIONS: NO_IMAGES}
    if memorization.left_out:
        left_out["copied_rate"] = memorization.left_out
    energy_scores, itself = measured.pop(ENERGY_SCORES), measured.pop(HELDOUT_ROWS)
    return Protocol(
        table,
        prompts,
        heldout,
        pairs,
        decode,
        evaluator,
        measurements,
        references=measured,
        energy_score_references=energy_scores,
        heldout_metrics=itself,
        left_out=left_out,
        referee=settings,
        device=device,
    )


def _measure_references(sets: dict[str, Reference], measurements: Measurements, out: Path) -> dict[str, dict[str, Any]]:
    """Return the metrics of each reference; those that are kept are not measured again."""
    kept = {name: measurements.load(reference=name) for name in sets}
    total = sum(each.images for each in sets.values())
    done = sum(sets[name].images for name, each in kept.items() if each is not None)
    with Progress("measure references", total=total, unit="images", log=out / "log.jsonl", done=done) as bar:
        for name, each in sets.items():
            kept[name] = kept[name] or measurements.save(each.measure(bar.advance), reference=name)
    return {name: each.content for name, each in kept.items() if each is not None}


def _open_table(run: Path, storage: Storage) -> Table:
    config = read_config(run)["table"]
    try:
        table = open_table(config["uri"], version=config["version"], storage=storage)
    except TableError as error:
        raise RunError(f"the table of {run} cannot be opened: {error}") from error
    table.hold_remote(READ_COLUMNS)
    for split, size in ((HELDOUT, "larger"), (TRAIN, "smaller")):
        if (rows := table.count(split)) < MIN_ROWS:
            raise TableError(
                f"{table.uri} has {rows} {split} rows, an evaluation needs {MIN_ROWS}: "
                f"encode it with a {size} --val-fraction"
            )
    return table


def _decoder(pipeline: CoalescerPipeline) -> Decode:
    shape, encoder = pipeline.meta.latent_shape, pipeline.image_encoder
    # Those that decode with a fixed seed set it for all threads.
    alone = threading.Lock() if encoder.kind.alone else contextlib.nullcontext()

    def decode(latents: Float32[np.ndarray, "B L"]) -> UInt8[np.ndarray, "B H W 3"]:
        with alone:
            return encoder.decode(latents.reshape(-1, *shape))

    return decode
