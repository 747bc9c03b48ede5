"""Reference samples of known quality: what the metrics of a run are compared with.

train rows              the best that can be expected: real rows against real rows
retrieved pairs         a perfect network: the pair that an exact search retrieves for the same caption and noise
train reconstructions   the loss of the image autoencoder: the images of these training rows after one pass through it
noise                   no training: the points that a run starts from

Training rows have been seen by the autoencoder and by the referee, which so recognizes their captions better than those
of images that are new to it. How well it recognizes new ones is measured of the held-out rows themselves.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8

from index.errors import CoalescerError
from index.search.exact import ExactSearch
from index.table.rows import RowReader
from index.table.schema import TRAIN
from index.table.table import Table
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.images import decode_image
from trainer.evaluation.energy_score import reference_points
from trainer.evaluation.evaluator import Evaluator, GetImages
from trainer.evaluation.samples import Advance, Decode, Prompts, Samples, images_at_once
from trainer.evaluation.threads import map_batches, split

SEARCH_BYTES = 2**31
"""Memory for the vectors of the exact search; those of larger tables are read again for each batch of queries."""
QUERY_BATCH, THREAD_QUERIES = 4096, 512
"""Queries that are compared at once, and by each thread if the vectors are in memory."""
RETRIEVED = "retrieved_pairs"
KEPT_QUERIES = 8
"""Sets of prompts whose retrieved pairs are kept."""
CANDIDATES = 20
"""Training rows that are searched for a matching caption, per prompt."""
TRAIN_ROWS, PAIRS, NOISE, RECONSTRUCTIONS = "train rows", "retrieved pairs", "noise", "train reconstructions"


class Reference(NamedTuple):
    """A set of samples of known quality."""

    images: int
    """Images to be measured."""
    measure: Callable[[Advance], dict[str, Any]]
    """Returns the metrics."""


def row_samples(table: Table, positions: Int[np.ndarray, "N"]) -> Samples:
    """Return rows of a table as samples."""
    x = table.meta.geometry.to_coordinates(table.take(positions, "latent"))
    return Samples.of_rows(x, table.take(positions, "caption").tolist())


def row_images(table: Table, positions: Int[np.ndarray, "N"], decode: Decode) -> GetImages:
    """Return what reads original images, cropped as for encoding, or decodes latents if the table stores no images."""
    column = "image" if table.stores_images else "latent"

    def images(part: slice) -> UInt8[np.ndarray, "_ H W 3"]:
        values = table.take(positions[part], column)
        if column == "latent":
            return decode(values.astype(np.float32))
        return np.stack([decode_image(image, table.meta.image_size).pixels for image in values])

    return images


def retrieve_pairs(table: Table, prompts: Prompts, device: str = "cpu") -> Float32[np.ndarray, "Q L"]:
    """Return the latents, in coordinates, that an exact search retrieves for each prompt's caption and noise.

    Their row ids stay in DB/NAME.reports/retrieved_pairs.json, so that further runs of this table version with the same
    prompts need no search.
    """
    text = table.take(prompts.positions, "text").astype(np.float32)
    queries = table.meta.geometry.queries(text, prompts.noise)
    digest, stored = hashlib.sha256(queries.tobytes()).hexdigest(), table.report(RETRIEVED)
    known: dict[str, list[int]] = {}
    if isinstance(stored, dict) and stored.get("version") == table.version and "by_queries" in stored:
        known = stored["by_queries"]
    if digest not in known:
        known = dict([*known.items()][1 - KEPT_QUERIES :]) | {digest: _search(table, queries, device).tolist()}
        with suppress(CoalescerError):  # a table that may only be read is searched again next time
            table.write_report(RETRIEVED, {"version": table.version, "by_queries": known})
    (latent,) = RowReader.of(table).take(np.array(known[digest]), ["latent"])
    return table.meta.geometry.to_coordinates(latent)


def _search(table: Table, queries: Float32[np.ndarray, "Q S"], device: str) -> Int[np.ndarray, "Q"]:
    """Return the row id of the nearest training row of each query."""
    search = ExactSearch(table, device, SEARCH_BYTES)

    def nearest(part: slice) -> Int[np.ndarray, "B"]:
        return np.asarray(search.row_ids[search.nearest_positions(queries[part])[:, 0]])

    if search.blocks.in_memory:
        return np.concatenate(map_batches(nearest, split(len(queries), THREAD_QUERIES), device))
    return np.concatenate([nearest(part) for part in split(len(queries), QUERY_BATCH)])


def references(
    table: Table,
    prompts: Prompts,
    pairs: Float32[np.ndarray, "Q L"],
    encoder: DiffusersAutoencoder,
    decode: Decode,
    evaluator: Evaluator,
) -> dict[str, Reference]:
    """Return the references by name; reconstructions only if the table stores images."""
    positions = match_captions(table, prompts)

    def train_rows(advance: Advance) -> dict[str, float]:
        samples, images = row_samples(table, positions), row_images(table, positions, decode)
        return evaluator.measure(samples, images, advance=advance).metrics

    def points(x: Float32[np.ndarray, "Q L"]) -> Callable[[Advance], dict[str, float]]:
        return lambda advance: evaluator.measure(Samples.for_prompts(prompts, x), advance=advance).metrics

    def reconstructions(advance: Advance) -> dict[str, float]:
        train = row_samples(table, positions)
        x = reconstruct(table, train.x, encoder, decode)
        return evaluator.measure(Samples.of_rows(x, train.captions), evaluator.decode(train.x), advance=advance).metrics

    found = {
        TRAIN_ROWS: Reference(len(positions), train_rows),
        PAIRS: Reference(prompts.count, points(pairs)),
        NOISE: Reference(prompts.count, points(prompts.noise)),
    }
    return found | ({RECONSTRUCTIONS: Reference(len(positions), reconstructions)} if table.stores_images else {})


def energy_references(table: Table, prompts: Prompts, evaluator: Evaluator) -> dict[str, dict[str, float]]:
    """Return the energy scores of points that need no network, by name."""
    return {name: evaluator.measure_energy_score(samples) for name, samples in reference_points(table, prompts)}


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
    geometry = table.meta.geometry

    def pass_through(part: slice) -> Float32[np.ndarray, "_ L"]:
        latents = encoder.encode(decode(geometry.to_latent(x[part])))
        return geometry.to_coordinates(latents.reshape(len(latents), -1))

    return np.concatenate(
        map_batches(pass_through, split(len(x), images_at_once(table.meta.image_size, encoder.device)), encoder.device)
    )
