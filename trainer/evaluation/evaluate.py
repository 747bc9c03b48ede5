"""How well a run answers held-out captions, beside its floors; nothing is downloaded.

In coordinates, where the network works, samples are compared with the latents of held-out rows. As pictures they are
compared, by a small network that is trained on the table's own, with the pictures of those rows: the originals where
the table keeps them, so that what the autoencoder costs is counted in, and else their latents decoded. Every floor is
measured in the same figures. The same run, options and seed give the same report but for times.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from index.console import Progress, write_json, write_text
from index.errors import OptionError, RunError, TableError
from index.schema import HELDOUT, TRAIN
from index.table import Table, open_table
from trainer.checkpoint import read_config
from trainer.evaluation.answers import BATCH, Answers, Questions, Sampled, Told, make_questions, retrieve, sample
from trainer.evaluation.floors import keeps_pictures, measure_floors, rows_answers, rows_pictures
from trainer.evaluation.measure import Measures
from trainer.evaluation.pretrained import open_pretrained
from trainer.evaluation.referee import Decode, open_referee
from trainer.evaluation.reliability import measure_confidence
from trainer.evaluation.report import evaluation_page, steps_said
from trainer.grid import draw_grid
from trainer.sampler import Coalescer

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES = 2000
AMONG = 100
"""Captions among which the true one is looked for, where captions are no classes."""
SHOWN = 10
"""Captions whose pictures are on the page."""
NO_PICTURES = "the table keeps no pictures: encode it with --keep-images"
FEWEST = 8
"""Rows of a split, and samples, below which figures mean nothing."""


def evaluate(
    run: Path,
    *,
    steps: list[int],
    out: Path,
    samples: int | None = None,
    seed: int = 0,
    clip: Path | None = None,
    inception: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure a run at several step counts; writes OUT/report.json and OUT/index.html, and returns the report.

    Args:
        run: the run folder.
        steps: step counts to measure.
        out: folder of the report.
        samples: pictures for each step count; where fewer captions are held out they come again, with other points.
            None: 2,000, or four for each held-out row if that is less.
        seed: of everything drawn.
        clip: folder of a CLIPModel, for its score.
        inception: TorchScript file of an Inception network, for FID and KID.
        device: where networks run.
    """
    if not steps or min(steps) < 1:
        raise OptionError(f"--steps {','.join(map(str, steps))} is not allowed: give numbers above 0, such as 1,2,4,8")
    if samples is not None and samples < FEWEST:
        raise OptionError(f"--samples {samples} is too few to measure: give at least {FEWEST}, such as {SAMPLES}")
    config = read_config(run)
    coalescer = Coalescer.from_pretrained(run, device=device)
    others = open_pretrained(clip, inception, coalescer.device)
    table = _table_of(config, run)
    questions = make_questions(coalescer, table, samples or min(SAMPLES, 4 * len(table.offsets(HELDOUT))), seed)
    decode, among = _decode(coalescer), min(AMONG, len(set(questions.captions)))
    referee, known = open_referee(
        table, decode, coalescer.text_encoder.encode, among=among, out=out, device=coalescer.device
    )
    began = time.perf_counter()
    told, pairs = Told(coalescer, questions.captions), retrieve(table, questions)
    # In the order in which they are asked, so that samples and rows stand side by side.
    rows = np.array(list(dict.fromkeys(questions.rows.tolist())))
    heldout = rows_answers(table, rows)
    measures = Measures(table, heldout, rows_pictures(table, rows, decode), decode, [referee, *others])
    log, total = out / "log.jsonl", len(steps) * len(questions.captions)
    floors, figures, found = {}, {}, {}
    with Progress("measure floors", total=3 + keeps_pictures(table), unit="floors", log=log) as bar:
        for name, row in measure_floors(table, questions, pairs, coalescer.image_encoder, decode, measures):
            floors[name] = row
            bar.advance()
    with Progress("evaluate", total=total, unit="samples", log=log) as bar:
        for n in steps:
            found[n] = sample(coalescer, questions, told, n, bar.advance)
            figures[str(n)] = _figures(found[n], questions, measures)
    confidence = measure_confidence(coalescer, questions, told, pairs)
    report: dict[str, Any] = {
        "run": str(run),
        "objective": config["fit"]["objective"],
        "table": {"uri": table.uri, "version": table.version},
        "seed": seed,
        "samples": questions.count,
        "heldout_rows": len(rows),
        "heldout_pictures": "originals" if keeps_pictures(table) else "decoded latents",
        "training_rows_compared": measures.compared_with,
        "batch_size": BATCH,
        "device": coalescer.device,
        "referee": known,
        "steps": figures,
        "floors": floors,
        "heldout": measures.heldout(),
        "reliability": confidence,
        "left_out": {
            **({} if confidence else {"reliability": f"{config['fit']['objective']} teaches no confidence"}),
            **({} if "reconstructions" in floors else {"reconstructions": NO_PICTURES}),
        },
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "report.json", report)
    answers = {steps_said(n): each.x for n, each in found.items()} | {"retrieved": pairs}
    write_text(out / "index.html", evaluation_page(report, _sheet(table, questions, answers, decode)))
    return report


def _table_of(config: dict[str, Any], run: Path) -> Table:
    try:
        table = open_table(config["table"]["uri"], version=config["table"]["version"])
    except TableError as error:
        raise RunError(f"{run} cannot be compared with its table: {error}") from error
    for split, hint in ((HELDOUT, "larger"), (TRAIN, "smaller")):
        if (rows := len(table.offsets(split))) < FEWEST:
            raise TableError(f"{table.uri} holds {rows} {split} rows: encode it with a {hint} --heldout-share")
    return table


def _decode(coalescer: Coalescer) -> Decode:
    shape = coalescer.meta.latent_shape
    return lambda latents: coalescer.image_encoder.decode(latents.reshape(-1, *shape))


def _figures(found: Sampled, questions: Questions, measures: Measures) -> dict[str, float]:
    """A row of a run: as of a floor, and what it cost."""
    figures = measures.row(Answers.to(questions, found.x))
    if not np.isnan(found.confidence).all():
        figures["confidence"] = float(found.confidence.mean())
    return figures | {
        "evaluations": found.evaluations,
        "ms_per_latent": found.seconds / len(found.x) * 1e3,
        "ms_per_decoding": measures.seconds_per_picture * 1e3,
    }


def _sheet(
    table: Table, questions: Questions, answers: dict[str, Float32[np.ndarray, "Q L"]], decode: Decode
) -> "Image":
    """A line for each of some captions: what has answered it from the same point, and the row it was taken from."""
    from PIL import Image

    some = questions.count + np.unique(questions.fan, return_index=True)[1][:SHOWN]
    geometry = table.meta.geometry
    columns = {name: decode(geometry.to_latent(x[some])) for name, x in answers.items()}
    drawn = np.concatenate([*rows_pictures(table, questions.rows[some], decode)])
    tiles = []
    for line, question in enumerate(some):
        tiles += [(pictures[line], name) for name, pictures in columns.items()]
        tiles.append((drawn[line], questions.captions[question]))
    images, words = zip(*tiles, strict=True)
    return draw_grid([Image.fromarray(image) for image in images], words, columns=len(columns) + 1)
