"""How fast search is at equal recall: by type of the stored vectors, beside faiss, and as a table grows."""

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
from index.build.select import choose_index
from index.report.recall import GroundTruth, evaluation_queries, find_ground_truth, measure_recall
from index.search.ann import ApproximateSearch, ExactSearch
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.space.queries import draw_points, draw_rows
from index.table.commit import add_vectors, publish
from index.table.schema import TRAIN, EncoderRef, TableMeta, encoded_schema, split_of
from index.table.storage import Storage
from index.table.table import Table, column_array, list_array
from pipeline.beam.write_lance import fragment_of, write_fragments

BATCH, ASKED, TARGET = 1024, 8192, 0.95
TEXT_WIDTH, LATENT = 127, (8, 4, 4)

Search = Callable[[Float32[np.ndarray, "B S"]], object]


def race(rivals: dict[str, Search], queries: dict[str, Float32[np.ndarray, "M S"]], rounds: int) -> dict[str, float]:
    """Queries per second of each, two batches in flight, taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    with ThreadPoolExecutor(2) as pool:
        for turn, (name, search) in itertools.product(range(rounds + 1), rivals.items()):
            batches = [queries[name][start : start + BATCH] for start in range(0, ASKED, BATCH)]
            began = time.perf_counter()
            list(pool.map(search, batches))
            if turn:  # the first warms up
                rates[name].append(ASKED / (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in rates.items()}


def training_queries(table: Table) -> Float32[np.ndarray, "M S"]:
    """Queries as training asks them."""
    geometry, offsets = table.meta.geometry, table.positions(TRAIN)
    rows = offsets[draw_rows(len(offsets), ASKED, seed=5, step=0)]
    return geometry.queries(table.take(rows, "text"), draw_points(geometry, ASKED, seed=5, step=0))


def _truth(table: Table) -> GroundTruth:
    return find_ground_truth(ExactSearch(table), evaluation_queries(table, 2048, seed=3))


def types(data: Path, work: Path, rounds: int) -> list[dict[str, Any]]:
    """A line for each type of vector and index, with what it needs to reach the target recall, if it does."""
    source = real_tables.mnist(data, work)
    lines: dict[str, dict[str, Any]] = {}
    rivals: dict[str, Search] = {}
    for dtype, (kind, bits) in itertools.product(
        ("float16", "float32"), (("ivf_rq", 8), ("ivf_rq", 5), ("ivf_flat", None))
    ):
        name = f"{dtype} {kind}" + (f" {bits} bits" if bits else "")
        table = _with_vectors_of(source, dtype, work / "types" / f"{name.replace(' ', '-')}.lance")
        # So little memory that neither 8 bits nor, where the target is missed, IVF_FLAT comes into question.
        memory = 1 if bits == 5 else 2**40
        choice = choose_index(table, _truth(table), kind=kind, target_recall=TARGET, memory=memory, seed=0, log=None)
        ours = [line for line in choice.tried if line["index_type"] == kind]
        for refine_factor in sorted({line["refine_factor"] for line in ours}):
            reached = [
                line for line in ours if line["refine_factor"] == refine_factor and line["recall_at_1"] >= TARGET
            ]
            if not reached:
                continue
            best = min(reached, key=lambda line: line["nprobes"])
            mine = f"{name}, {refine_factor} re-ranked" if refine_factor > 1 else name
            wanted = ("nprobes", "recall_at_1", "relative_distance_error", "build_seconds", "bytes")
            lines[mine] = {key: best[key] for key in wanted}
            rivals[mine] = ApproximateSearch(choice.table, nprobes=best["nprobes"], refine_factor=refine_factor).nearest
    asked = training_queries(source)
    rates = race(rivals, dict.fromkeys(rivals, asked), rounds)
    return [{"type": name, "queries_per_second": rates[name]} | line for name, line in lines.items()]


def _with_vectors_of(source: Table, dtype: str, uri: Path) -> Table:
    """The columns that search reads, with vectors of another type."""
    import lance

    shutil.rmtree(uri, ignore_errors=True)
    rows = source.dataset().to_table(columns=["split", "text", "latent", "vector"])
    vectors = column_array(rows["vector"]).astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    dataset = lance.write_dataset(rows.set_column(3, "vector", column), uri)
    return Table(str(uri), dataset.version, source.meta)


def against_faiss(data: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Rates at the recall of the index that we choose, beside faiss's IVF with as many partitions."""
    import faiss

    table = real_tables.copy(real_tables.mnist(data, work), work / "beside-faiss.lance")
    return _beside_faiss(
        build_index(table, BuildConfig(index_type="ivf_rq", target_recall=TARGET)).table, faiss, rounds
    )


def _beside_faiss(table: Table, faiss: Any, rounds: int) -> dict[str, Any]:
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
    for probes in range(1, index.num_partitions + 1):
        theirs.nprobe = probes
        found = theirs.search(truth.queries, 1)[1][:, 0]
        reached = float((found == truth.place[:, 0]).mean())
        if reached >= recall:
            break
    asked = training_queries(table)
    # faiss shares a batch out among its threads: one batch at a time.
    alone = ThreadPoolExecutor(1)
    rivals: dict[str, Search] = {
        "lancedb": ours.nearest,
        "faiss": lambda batch: alone.submit(theirs.search, batch, 1).result(),
    }
    rates = race(rivals, dict.fromkeys(rivals, asked), rounds)
    return {
        "rows": len(vectors),
        "width": vectors.shape[1],
        "lancedb": {"recall": recall, "nprobes": index.nprobes, "refine_factor": index.refine_factor},
        "faiss": {"recall": reached, "nprobes": probes, "build_seconds": built},
        "queries_per_second": rates,
        "ratio": rates["lancedb"] / rates["faiss"],
    }


def growth(work: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    """A line for each number of rows, and each rate as a share of the first."""
    import faiss

    lines, rivals, queries = {}, dict[str, Search](), {}
    for rows in sizes:
        began = time.perf_counter()
        table = synthetic(work / f"rows-{rows}.lance", rows)
        wrote = time.perf_counter() - began
        built = build_index(table, BuildConfig(index_type="ivf_rq", target_recall=TARGET))
        name = f"{rows:,}"
        build = max(line["build_seconds"] for line in built.report["alternatives"] if "build_seconds" in line)
        kept = (
            "recall_at_1",
            "relative_distance_error",
            "nprobes",
            "num_partitions",
            "refine_factor",
            "index_bytes",
            "index_choice",
        )
        lines[name] = {"write_seconds": wrote, "index_build_seconds": build} | {
            key: built.report.get(key, built.report.get(f"index_{key}")) for key in kept
        }
        lines[name]["whole_build_seconds"] = built.report["build_seconds"]
        print(lines[name], file=sys.stderr)
        rivals[name], queries[name] = ApproximateSearch(built.table).nearest, training_queries(built.table)
        lines[name]["beside_faiss"] = _beside_faiss(built.table, faiss, rounds)
    rates = race(rivals, queries, rounds)
    first = next(iter(rates.values()))
    return {
        name: line | {"queries_per_second": rates[name], "of_the_first": rates[name] / first}
        for name, line in lines.items()
    }


def synthetic(uri: Path, rows: int, *, intrinsic: int = 16) -> Table:
    """Rows of 256 numbers on curved surfaces of few dimensions; captions share half of theirs with latents."""
    shutil.rmtree(uri, ignore_errors=True)
    size = int(np.prod(LATENT))
    law = np.random.default_rng(11)
    surfaces = {
        width: (law.standard_normal((intrinsic, 512)) / np.sqrt(intrinsic), law.standard_normal((512, width)) / 16)
        for width in (TEXT_WIDTH, size)
    }
    encoded = encoded_schema(TEXT_WIDTH, size, keep_images=False)
    blank = dict.fromkeys(encoded.names)
    moments: Moments | None = None

    def batches() -> Any:
        nonlocal moments
        for start in range(0, rows, 10_000):
            rng, count = np.random.default_rng([13, start]), min(10_000, rows - start)
            code = 2 * rng.standard_normal((count, intrinsic * 3 // 2))
            text, latent = (
                np.tanh(part @ inner) @ outer + 0.05 * rng.standard_normal((count, outer.shape[1]))
                for part, (inner, outer) in zip(
                    (code[:, :intrinsic], code[:, -intrinsic:]), surfaces.values(), strict=True
                )
            )
            ids = [f"{number:032x}" for number in rng.bit_generator.random_raw(2 * count)[:count]]
            split = [split_of(f"{number:013x}", 0.01) for number in rng.integers(16**13, size=count)]
            train = np.array(split) == TRAIN
            part = Moments.of(text[train], latent[train])
            moments = part if moments is None else moments + part
            filled = blank | {"id": ids, "caption": ids, "key": ids, "shard": ["synthetic"] * count, "split": split}
            filled |= {"width": [64] * count, "height": [64] * count, "meta": ["{}"] * count}
            filled |= {"text": list_array(text), "latent": list_array(latent)}
            yield pa.RecordBatch.from_pydict(filled, schema=encoded)

    fragments = [fragment_of(each) for each in write_fragments(str(uri), encoded, batches(), Storage())]
    assert moments is not None
    geometry = Geometry.fit(moments, name="sphere", desc_scale=2.0)
    nobody = EncoderRef(name="synthetic", class_name="none", digest="0" * 64)
    meta = TableMeta(
        image_encoder=nobody,
        text_encoder=nobody,
        image_size=64,
        crop="center",
        latent_shape=LATENT,
        text_dim=TEXT_WIDTH,
        val_fraction=0.01,
        moments=moments,
        geometry=geometry,
        run_ids=("synthetic",),
    )
    with_vectors = [add_vectors(str(uri), fragment, encoded, geometry) for fragment in fragments]
    return publish(str(uri), encoded, meta, with_vectors, "synthetic", Storage())
