"""The exam of a table: the same questions, floors and referee for every run that was trained on it.

In coordinates, where the network works, samples are compared with the latents of held-out rows. As pictures they are
compared, by a small network that is trained on the table's own, with the pictures of those rows: the originals where
the table keeps them, so that what the autoencoder costs is counted in, and else their latents decoded. Every floor is
measured in the same figures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from index.errors import OptionError, RunError, TableError
from index.table.schema import HELDOUT, TRAIN
from index.table.table import Table, open_table
from index.terminal import Progress
from trainer.evaluation.answers import BATCH, Answers, Questions, Sampled, Told, make_questions, retrieve, sample
from trainer.evaluation.floors import keeps_pictures, measure_floors, rows_answers, rows_pictures
from trainer.evaluation.measure import Measures
from trainer.evaluation.pretrained import open_pretrained
from trainer.evaluation.referee import Decode, open_referee
from trainer.evaluation.reliability import measure_confidence
from trainer.grid import draw_grid
from trainer.run_folder import read_config
from trainer.sampler import CoalescerPipeline

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamConfig:
    """What runs are asked."""

    steps: list[int]
    """Step counts to measure."""
    samples: int | None = None
    """Pictures for each step count; where fewer captions are held out they come again, with other points. None: 2,000,
    or four for each held-out row if that is less."""
    seed: int = 0
    """Of everything drawn."""
    clip: Path | None = None
    """Folder of a CLIPModel, for its score."""
    inception: Path | None = None
    """TorchScript file of an Inception network, for FID and KID."""
    device: str = "auto"
    """Where networks run."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured before anything is opened."""
        if not self.steps or min(self.steps) < 1:
            given = ",".join(map(str, self.steps))
            raise OptionError(f"--steps {given} is not allowed: give numbers above 0, such as 1,2,4,8")
        if self.samples is not None and self.samples < FEWEST:
            raise OptionError(f"--samples {self.samples} is too few to measure: give at least {FEWEST}, such as 2000")


class Result(NamedTuple):
    """What a run has come to."""

    figures: dict[str, dict[str, float]]
    """By number of steps."""
    found: dict[int, Sampled]
    reliability: dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Exam:
    """Made by `set_exam`."""

    table: Table
    questions: Questions
    rows: Int[np.ndarray, "M"]
    """Positions of the held-out rows, in the order in which they are asked."""
    pairs: Float32[np.ndarray, "Q L"]
    """What a perfect network would answer."""
    decode: Decode
    measures: Measures
    floors: dict[str, dict[str, float]]
    referee: dict[str, Any]
    """What is known of it."""
    device: str

    def take(self, coalescer: CoalescerPipeline, steps: list[int], log: Path) -> Result:
        """Let a run answer."""
        questions, told = self.questions, Told(coalescer, self.questions.captions)
        figures, found = {}, {}
        with Progress("evaluate", total=len(steps) * len(questions.captions), unit="samples", log=log) as bar:
            for n in steps:
                found[n] = sample(coalescer, questions, told, n, bar.advance)
                figures[str(n)] = self._figures(found[n])
        return Result(figures, found, measure_confidence(coalescer, questions, told, self.pairs))

    def _figures(self, found: Sampled) -> dict[str, float]:
        """A row of a run: as of a floor, and what it cost."""
        figures = self.measures.row(Answers.to(self.questions, found.x))
        if not np.isnan(found.confidence).all():
            figures["confidence"] = float(found.confidence.mean())
        return figures | {
            "evaluations": found.evaluations,
            "ms_per_latent": found.seconds / len(found.x) * 1e3,
            "ms_per_decoding": self.measures.seconds_per_picture * 1e3,
        }

    def sheet(self, answers: dict[str, Float32[np.ndarray, "Q L"]]) -> "Image":
        """A line for each of some captions: what has answered it from the same point, and the row it was taken from."""
        from PIL import Image

        questions, geometry = self.questions, self.table.meta.geometry
        some = questions.count + np.unique(questions.fan, return_index=True)[1][:SHOWN]
        shown = answers | {"retrieved": self.pairs}
        columns = {name: self.decode(geometry.to_latent(x[some])) for name, x in shown.items()}
        drawn = np.concatenate([*rows_pictures(self.table, questions.rows[some], self.decode)])
        tiles = []
        for line, question in enumerate(some):
            tiles += [(pictures[line], name) for name, pictures in columns.items()]
            tiles.append((drawn[line], questions.captions[question]))
        images, words = zip(*tiles, strict=True)
        return draw_grid([Image.fromarray(image) for image in images], words, columns=len(columns) + 1)

    def report(self) -> dict[str, Any]:
        """What holds for all runs."""
        return {
            "table": {"uri": self.table.uri, "version": self.table.version},
            "seed": self.questions.seed,
            "samples": self.questions.count,
            "heldout_rows": len(self.rows),
            "heldout_pictures": "originals" if keeps_pictures(self.table) else "decoded latents",
            "training_rows_compared": self.measures.compared_with,
            "batch_size": BATCH,
            "device": self.device,
            "referee": self.referee,
            "floors": self.floors,
            "heldout": self.measures.heldout(),
            "left_out": {} if "reconstructions" in self.floors else {"reconstructions": NO_PICTURES},
        }


def set_exam(run: Path, coalescer: CoalescerPipeline, config: ExamConfig, out: Path) -> Exam:
    """The exam of a run's table; its referee is trained now if there is none yet."""
    others = open_pretrained(config.clip, config.inception, coalescer.device)
    table = _table_of(run)
    samples = config.samples or min(SAMPLES, 4 * len(table.positions(HELDOUT)))
    questions, decode = make_questions(coalescer, table, samples, config.seed), _decode(coalescer)
    among, describe = min(AMONG, len(set(questions.captions))), coalescer.text_encoder.encode
    referee, known = open_referee(table, decode, describe, among=among, out=out, device=coalescer.device)
    pairs = retrieve(table, questions)
    # In the order in which they are asked, so that samples and rows stand side by side.
    rows = np.array(list(dict.fromkeys(questions.rows.tolist())))
    pictures = rows_pictures(table, rows, decode)
    measures = Measures(table, rows_answers(table, rows), pictures, decode, [referee, *others])
    floors = {}
    total = 3 + keeps_pictures(table)
    with Progress("measure floors", total=total, unit="floors", log=out / "log.jsonl") as bar:
        for name, row in measure_floors(table, questions, pairs, coalescer.image_encoder, decode, measures):
            floors[name] = row
            bar.advance()
    return Exam(table, questions, rows, pairs, decode, measures, floors, known, coalescer.device)


def _table_of(run: Path) -> Table:
    trained_on = read_config(run)["table"]
    try:
        table = open_table(trained_on["uri"], version=trained_on["version"])
    except TableError as error:
        raise RunError(f"{run} cannot be compared with its table: {error}") from error
    for split, hint in ((HELDOUT, "larger"), (TRAIN, "smaller")):
        if (rows := len(table.positions(split))) < FEWEST:
            raise TableError(f"{table.uri} holds {rows} {split} rows: encode it with a {hint} --val-fraction")
    return table


def _decode(coalescer: CoalescerPipeline) -> Decode:
    shape = coalescer.meta.latent_shape
    return lambda latents: coalescer.image_encoder.decode(latents.reshape(-1, *shape))
