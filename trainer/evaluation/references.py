"""Reference samples of known quality: what the metrics of a run are compared with.

train rows         the best that can be expected: real rows against real rows
retrieved pairs    a perfect network: the pair that an exact search retrieves for the same caption and noise
reconstructions    the loss of the image autoencoder: training images after one pass through it
noise              no training: the points that a run starts from
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from jaxtyping import Float32, Int

from index.errors import CoalescerError
from index.search.exact import ExactSearch
from index.table.rows import RowReader
from index.table.schema import TRAIN
from index.table.table import Table
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.images import decode_image
from trainer.evaluation.evaluator import Evaluator, ImageBatches
from trainer.evaluation.samples import DECODE_BATCH, Decode, Prompts, Samples

SEARCH_BYTES = 2**31
"""Memory for the vectors of the exact search; those of larger tables are read again for each batch of queries."""
QUERY_BATCH = 4096
RETRIEVED = "retrieved_pairs"
CANDIDATES = 20
"""Training rows that are searched for a matching caption, per prompt."""


def stores_images(table: Table) -> bool:
    """Return whether a table stores the original images."""
    return "image" in table.dataset().schema.names


def row_samples(table: Table, positions: Int[np.ndarray, "N"]) -> Samples:
    """Return rows of a table as samples."""
    x = table.meta.geometry.to_coordinates(table.take(positions, "latent"))
    return Samples.of_rows(x, table.take(positions, "caption").tolist())


def row_images(table: Table, positions: Int[np.ndarray, "N"], decode: Decode) -> ImageBatches:
    """Yield the original images, cropped as for encoding, or decoded latents if the table stores no images."""
    column = "image" if stores_images(table) else "latent"
    for start in range(0, len(positions), DECODE_BATCH):
        values = table.take(positions[start : start + DECODE_BATCH], column)
        if column == "image":
            yield np.stack([decode_image(image, table.meta.image_size).pixels for image in values])
        else:
            yield decode(values.astype(np.float32))


def retrieve_pairs(table: Table, prompts: Prompts, device: str = "cpu") -> Float32[np.ndarray, "Q L"]:
    """Return the latents, in coordinates, that an exact search retrieves for each prompt's caption and noise.

    Their row ids stay in DB/NAME.reports/retrieved_pairs.json, so that the next run of this table version with the same
    prompts needs no search.
    """
    text = table.take(prompts.positions, "text").astype(np.float32)
    queries = table.meta.geometry.queries(text, prompts.noise)
    found = {"version": table.version, "queries": hashlib.sha256(queries.tobytes()).hexdigest()}
    stored = table.report(RETRIEVED)
    if not (isinstance(stored, dict) and found.items() <= stored.items()):
        search = ExactSearch(table, device, SEARCH_BYTES)
        batches = range(0, len(queries), QUERY_BATCH)
        ids = [search.row_ids[search.nearest_positions(queries[i : i + QUERY_BATCH])[:, 0]] for i in batches]
        stored = found | {"row_ids": np.concatenate(ids).tolist()}
        with suppress(CoalescerError):  # a table that may only be read is searched again next time
            table.write_report(RETRIEVED, stored)
    (latent,) = RowReader(table).take(np.array(stored["row_ids"]), ["latent"])
    return table.meta.geometry.to_coordinates(latent)


def measure_references(
    table: Table,
    prompts: Prompts,
    pairs: Float32[np.ndarray, "Q L"],
    encoder: DiffusersAutoencoder,
    decode: Decode,
    evaluator: Evaluator,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and metrics of each reference; reconstructions only if the table stores images."""
    positions = match_captions(table, prompts)
    train = row_samples(table, positions)
    yield "train rows", evaluator.measure(train, row_images(table, positions, decode)).metrics
    yield "retrieved pairs", evaluator.measure(Samples.for_prompts(prompts, pairs)).metrics
    yield "noise", evaluator.measure(Samples.for_prompts(prompts, prompts.noise)).metrics
    if stores_images(table):
        x = reconstruct(table, train.x, encoder, decode)
        yield (
            "reconstructions",
            evaluator.measure(Samples.of_rows(x, train.captions), evaluator.decode(train.x)).metrics,
        )


def match_captions(table: Table, prompts: Prompts) -> Int[np.ndarray, "N"]:
    """Return the position of a training row for each prompt: one of the same caption while there are any, or another.

    Samples have exactly the captions of held-out rows. Training rows drawn at random would have other caption
    frequencies and so look worse than they are.
    """
    captions, rng = prompts.captions[: prompts.count], np.random.default_rng([prompts.seed, 1])
    pool = rng.permutation(table.positions(TRAIN))[: CANDIDATES * len(captions)]
    unused: dict[str, list[int]] = {}
    for i, caption in enumerate(table.take(pool, "caption").tolist()):
        unused.setdefault(caption, []).append(i)
    matches = [unused[caption].pop() if unused.get(caption) else None for caption in captions]
    others = iter([i for rest in unused.values() for i in rest])
    chosen = [next(others, None) if match is None else match for match in matches]
    return pool[[i for i in chosen if i is not None]]


def reconstruct(
    table: Table, x: Float32[np.ndarray, "N L"], encoder: DiffusersAutoencoder, decode: Decode
) -> Float32[np.ndarray, "N L"]:
    """Decode points and encode the images again."""
    geometry, parts = table.meta.geometry, []
    for start in range(0, len(x), DECODE_BATCH):
        latents = encoder.encode(decode(geometry.to_latent(x[start : start + DECODE_BATCH])))
        parts.append(geometry.to_coordinates(latents.reshape(len(latents), -1)))
    return np.concatenate(parts)
