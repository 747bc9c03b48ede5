"""What the figures of a run mean: the same figures of answers that are known to be good or bad.

train rows         as good as it gets: real rows against real rows
retrieved pairs    a perfect network: the pair that an exact search finds for the same caption and point
reconstructions    what the image autoencoder costs: held-out pictures that went through it
gaussian           no knowledge: the points that a run starts from
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int

from index.table.schema import TRAIN
from index.table.table import Table
from pipeline.encoders import DiffusersAutoencoder
from pipeline.images import decode_image
from trainer.evaluation.answers import Answers, Questions
from trainer.evaluation.measure import Measures, Pictures
from trainer.evaluation.referee import DECODED, Decode

POOL = 20
"""Training rows that are looked through for captions, for each that is wanted."""


def keeps_pictures(table: Table) -> bool:
    """Whether the original pictures stand in a table."""
    return "image" in table.dataset().schema.names


def rows_answers(table: Table, rows: Int[np.ndarray, "N"]) -> Answers:
    """Rows of a table as they are."""
    x = table.meta.geometry.to_coordinates(table.take(rows, "latent"))
    return Answers.rows(x, table.take(rows, "caption").tolist())


def rows_pictures(table: Table, rows: Int[np.ndarray, "N"], decode: Decode) -> Pictures:
    """The originals, cut as they were for encoding, where a table keeps them; else what their latents decode to."""
    column = "image" if keeps_pictures(table) else "latent"
    for start in range(0, len(rows), DECODED):
        some = table.take(rows[start : start + DECODED], column)
        if column == "image":
            yield np.stack([decode_image(image, table.meta.image_size).pixels for image in some])
        else:
            yield decode(some.astype(np.float32))


def measure_floors(
    table: Table,
    questions: Questions,
    pairs: Float32[np.ndarray, "Q L"],
    encoder: DiffusersAutoencoder,
    decode: Decode,
    measures: Measures,
) -> Iterator[tuple[str, dict[str, float]]]:
    """All floors, by name; without reconstructions where a table keeps no pictures to compare them with."""
    rows = like_captions(table, questions)
    train = rows_answers(table, rows)
    yield "train rows", measures.row(train, rows_pictures(table, rows, decode))
    yield "retrieved pairs", measures.row(Answers.to(questions, pairs))
    yield "gaussian", measures.row(Answers.to(questions, questions.r))
    if keeps_pictures(table):
        x = reencoded(table, train.x, encoder, decode)
        yield "reconstructions", measures.row(Answers.rows(x, train.captions), measures.decoded(train.x))


def like_captions(table: Table, questions: Questions) -> Int[np.ndarray, "N"]:
    """For each question a training row of its caption, as long as there are some left, or else any.

    Samples have the captions of held-out rows exactly: rows with their shares of captions left to chance would look
    worse than they are.
    """
    wanted, rng = questions.captions[: questions.count], np.random.default_rng([questions.seed, 1])
    pool = rng.permutation(table.positions(TRAIN))[: POOL * len(wanted)]
    waiting: dict[str, list[int]] = {}
    for place, caption in enumerate(table.take(pool, "caption").tolist()):
        waiting.setdefault(caption, []).append(place)
    places = [waiting[caption].pop() if waiting.get(caption) else -1 for caption in wanted]
    others = iter([place for rest in waiting.values() for place in rest])
    found = [place if place >= 0 else next(others, None) for place in places]
    return pool[[place for place in found if place is not None]]


def reencoded(
    table: Table, x: Float32[np.ndarray, "N L"], encoder: DiffusersAutoencoder, decode: Decode
) -> Float32[np.ndarray, "N L"]:
    """Where points come to after another pass through the image autoencoder."""
    geometry = table.meta.geometry
    parts = []
    for start in range(0, len(x), DECODED):
        again = encoder.encode(decode(geometry.to_latent(x[start : start + DECODED])))
        parts.append(geometry.to_coordinates(again.reshape(len(again), -1)))
    return np.concatenate(parts)
