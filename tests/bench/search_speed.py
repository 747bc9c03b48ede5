"""The speed of search at equal recall: by index and vector type, against faiss, and as a table grows."""

import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import real_tables
from jaxtyping import Float32

from index.build.build_index import BuildConfig, build_index
from index.build.select import select_index
from index.report.recall import GroundTruth, evaluation_queries, find_ground_truth, measure_recall
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.space.queries import draw_points, draw_rows
from index.table.commit import publish
from index.table.schema import TRAIN, EncoderRef, TableMeta, encoded_schema, split_of
from index.table.storage import Storage
from index.table.table import Table, column_array, list_array
from index.table.vectors import add_vectors
from pipeline.beam.write_lance import fragment_from_dict, write_fragments

BATCH, NUM_QUERIES, TARGET = 1024, 8192, 0.95
TEXT_DIM, LATENT = 127, (8, 4, 4)

Search = Callable[[Float32[np.ndarray, "B S"]], object]


def race(searches: dict[str, Search], queries: dict[str, Float32[np.ndarray, "M S"]], rounds: int) -> dict[str, float]:
    """Return the queries per second of each search, with two batches in flight; the searches take turns."""
    rates: dict[str, list[float]] = {name: [] for name in searches}
    with ThreadPoolExecutor(2) as pool:
        for turn, (name, search) in itertools.product(range(rounds + 1), searches.items()):
            batches = [queries[name][start : start + BATCH] for start in range(0, NUM_QUERIES, BATCH)]
            began = time.perf_counter()
            list(pool.map(search, batches))
            if turn:  # the first warms up
                rates[name].append(NUM_QUERIES / (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in rates.items()}


def training_queries(table: Table) -> Float32[np.ndarray, "M S"]:
    """Sample queries as training does."""
    geometry, train = table.meta.geometry, table.positions(TRAIN)
    rows = train[draw_rows(len(train), NUM_QUERIES, seed=5, step=0)]
    return geometry.queries(table.take(rows, "text"), draw_points(geometry, NUM_QUERIES, seed=5, step=0))


def _truth(table: Table) -> GroundTruth:
    return find_ground_truth(ExactSearch(table), evaluation_queries(table, 2048, seed=3))


def types(data: Path, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Return a line for each vector type, index type and refine factor that reaches the target recall."""
    source = real_tables.mnist(data, work)
    lines: dict[str, dict[str, Any]] = {}
    searches: dict[str, Search] = {}
    for dtype, (index_type, bits) in itertools.product(
        ("float16", "float32"), (("ivf_rq", 8), ("ivf_rq", 5), ("ivf_flat", None))
    ):
        name = f"{dtype} {index_type}" + (f" {bits} bits" if bits else "")
        table = _with_vectors_of(source, dtype, work / "types" / f"{name.replace(' ', '-')}.lance")
        # Too little memory for 8 bits, and for IVF_FLAT if the target is missed.
        memory = 1 if bits == 5 else 2**40
        truth = _truth(table)
        selection = select_index(
            table, truth, truth, index_type=index_type, target_recall=TARGET, memory=memory, seed=0
        )
        reached = [
            each for each in selection.candidates if each.index_type == index_type and each.tuning_recall_at_1 >= TARGET
        ]
        for refine_factor in sorted({each.refine_factor for each in reached}):
            best = min((each for each in reached if each.refine_factor == refine_factor), key=lambda each: each.nprobes)
            label = f"{name}, refine factor {refine_factor}" if refine_factor > 1 else name
            names = ("nprobes", "tuning_recall_at_1", "build_seconds", "index_bytes")
            lines[label] = {key: getattr(best, key) for key in names}
            search = ApproximateSearch(selection.table, nprobes=best.nprobes, refine_factor=refine_factor)
            searches[label] = search.nearest
    rates = race(searches, dict.fromkeys(searches, training_queries(source)), rounds)
    return [{"type": name, "queries_per_second": rates[name]} | line for name, line in lines.items()]


def _with_vectors_of(source: Table, dtype: str, uri: Path) -> Table:
    """Copy the columns that search reads, with vectors of another type."""
    import lance

    shutil.rmtree(uri, ignore_errors=True)
    rows = source.dataset().to_table(columns=["split", "text", "latent", "vector"])
    vectors = column_array(rows["vector"]).astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    dataset = lance.write_dataset(rows.set_column(3, "vector", column), uri)
    return Table(str(uri), dataset.version, source.meta)


def against_faiss(data: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Compare rates with faiss's IVF of as many partitions, at the recall of the selected index."""
    import faiss

    table = real_tables.copy(real_tables.mnist(data, work), work / "faiss.lance")
    return _compare_with_faiss(
        build_index(table, BuildConfig(index_type="ivf_rq", target_recall=TARGET)).table, faiss, rounds
    )


def _compare_with_faiss(table: Table, faiss: Any, rounds: int) -> dict[str, Any]:
    ours, truth = ApproximateSearch(table), _truth(table)
    recall = measure_recall(ours, truth).recall_at_1
    index = table.meta.index
    assert index is not None
    vectors = table.column("vector").astype(np.float32)
    quantizer = faiss.IndexFlatL2(vectors.shape[1])
    theirs = faiss.IndexIVFFlat(quantizer, vectors.shape[1], index.num_partitions)
    began = time.perf_counter()
    theirs.train(vectors)
    theirs.add(vectors)
    built = time.perf_counter() - began
    for nprobes in range(1, index.num_partitions + 1):
        theirs.nprobe = nprobes
        nearest = theirs.search(truth.queries, 1)[1][:, 0]
        faiss_recall = float((nearest == truth.positions[:, 0]).mean())
        if faiss_recall >= recall:
            break
    queries = training_queries(table)
    # faiss splits a batch among its threads: one batch at a time.
    one_thread = ThreadPoolExecutor(1)
    searches: dict[str, Search] = {
        "lancedb": ours.nearest,
        "faiss": lambda batch: one_thread.submit(theirs.search, batch, 1).result(),
    }
    rates = race(searches, dict.fromkeys(searches, queries), rounds)
    return {
        "rows": len(vectors),
        "dim": vectors.shape[1],
        "lancedb": {"recall_at_1": recall, "nprobes": index.nprobes, "refine_factor": index.refine_factor},
        "faiss": {"recall_at_1": faiss_recall, "nprobes": nprobes, "build_seconds": built},
        "queries_per_second": rates,
        "ratio": rates["lancedb"] / rates["faiss"],
    }


def growth(work: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    """Return a line for each number of rows, with its rate as a fraction of the first."""
    import faiss

    lines, searches, queries = {}, dict[str, Search](), {}
    for rows in sizes:
        began = time.perf_counter()
        table = synthetic(work / f"rows-{rows}.lance", rows)
        write_seconds = time.perf_counter() - began
        built = build_index(table, BuildConfig(index_type="ivf_rq", target_recall=TARGET))
        name = f"{rows:,}"
        build = max(each.build_seconds or 0.0 for each in built.report.candidates)
        names = (
            "recall_at_1",
            "relative_distance_error",
            "nprobes",
            "num_partitions",
            "refine_factor",
            "index_bytes",
            "index_choice",
        )
        lines[name] = {"write_seconds": write_seconds, "index_build_seconds": build}
        lines[name] |= {key: getattr(built.report, key) for key in names}
        lines[name]["total_build_seconds"] = built.report.build_seconds
        print(lines[name], file=sys.stderr)
        searches[name], queries[name] = ApproximateSearch(built.table).nearest, training_queries(built.table)
        lines[name]["faiss"] = _compare_with_faiss(built.table, faiss, rounds)
    rates = race(searches, queries, rounds)
    first = next(iter(rates.values()))
    return {
        name: line | {"queries_per_second": rates[name], "fraction_of_first": rates[name] / first}
        for name, line in lines.items()
    }


def synthetic(
    uri: Path,
    rows: int,
    *,
    intrinsic: int = 16,
    text_dim: int = TEXT_DIM,
    latent: tuple[int, int, int] = LATENT,
) -> Table:
    """Write rows on curved surfaces of few dimensions; text embeddings and latents share half of those."""
    shutil.rmtree(uri, ignore_errors=True)
    size = int(np.prod(latent))
    rng = np.random.default_rng(11)
    surfaces = {
        dim: (rng.standard_normal((intrinsic, 512)) / np.sqrt(intrinsic), rng.standard_normal((512, dim)) / 16)
        for dim in (text_dim, size)
    }
    encoded = encoded_schema(text_dim, size, keep_images=False)
    blank = dict.fromkeys(encoded.names)
    moments: Moments | None = None

    def batches() -> Any:
        nonlocal moments
        for start in range(0, rows, 10_000):
            rng, count = np.random.default_rng([13, start]), min(10_000, rows - start)
            code = 2 * rng.standard_normal((count, intrinsic * 3 // 2))
            text, latents = (
                np.tanh(part @ inner) @ outer + 0.05 * rng.standard_normal((count, outer.shape[1]))
                for part, (inner, outer) in zip(
                    (code[:, :intrinsic], code[:, -intrinsic:]), surfaces.values(), strict=True
                )
            )
            ids = [f"{number:032x}" for number in rng.bit_generator.random_raw(2 * count)[:count]]
            hashes = [rng.bytes(16) for _ in range(count)]
            split = [split_of(each, 0.01) for each in hashes]
            train = np.array(split) == TRAIN
            part = Moments.of(text[train], latents[train])
            moments = part if moments is None else moments + part
            columns = blank | {"id": ids, "caption": ids, "key": ids, "shard": ["synthetic"] * count, "split": split}
            columns |= {"width": [64] * count, "height": [64] * count, "meta": ["{}"] * count}
            columns |= {"text": list_array(text), "latent": list_array(latents), "image_hash": hashes}
            yield pa.RecordBatch.from_pydict(columns, schema=encoded)

    fragments = [fragment_from_dict(each) for each in write_fragments(str(uri), encoded, batches(), Storage())]
    assert moments is not None
    geometry = Geometry.fit(moments, name="sphere", desc_scale=2.0)
    encoder = EncoderRef(name="synthetic", class_name="none", digest="0" * 64)
    meta = TableMeta(
        image_encoder=encoder,
        text_encoder=encoder,
        image_size=64,
        crop="center",
        latent_shape=latent,
        text_dim=text_dim,
        val_fraction=0.01,
        moments=moments,
        geometry=geometry,
        run_ids=("synthetic",),
    )
    with_vectors = [add_vectors(str(uri), fragment, encoded, geometry) for fragment in fragments]
    return publish(str(uri), encoded, meta, with_vectors, "synthetic", Storage(), mode="overwrite")
