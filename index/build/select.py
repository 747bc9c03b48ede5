"""Select and build the index: the user sets a target recall; type, partitions, nprobes and refine factor follow.

IVF_RQ with 8 bits (5 if 8 do not fit into memory) gets the fewest nprobes that reach the target, with or without a
refine factor. If it misses the target at any nprobes, IVF_FLAT replaces it.

Every commit leaves a table that can be searched rightly: the metadata stops describing the old index before it is
replaced, and describes the new one, by its UUID, when it is complete and measured. In between, and if a build is
killed, `open_table(indexed=True)` opens the last version that is tagged as complete. Tags also keep that version from
being cleaned up.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from index.errors import OptionError
from index.report.recall import GroundTruth, Recall, measure_recall
from index.report.report import IndexCandidate
from index.search.ann import ApproximateSearch
from index.search.kmeans import CENTROID_COPIES
from index.search.lance_index import IndexPlan, build_whole
from index.search.memory import held_bytes
from index.table.commit import tag_indexed, update_meta
from index.table.schema import IndexRef
from index.table.table import VECTOR_INDEX, Table, index_uuid
from index.terminal import Progress

INDEX_TYPES = ("auto", "ivf_rq", "ivf_pq", "ivf_sq", "ivf_flat", "ivf_hnsw_sq", "none")
PQ_CENTROIDS = 256
MIN_INDEXED_ROWS = 10_000
"""Training rows below which exact search costs less than an index."""
REFINE_FACTORS = (1, 4)
"""Refine factors that are tried. At equal nprobes 4 costs a few percent of the speed and reaches the recall of IVF_FLAT
(tests/bench/bench_index.py)."""

MAX_SEGMENTS = 8
"""Segments of an index to which rows are added. A search visits nprobes partitions of each; then it is built anew."""

Builder = Callable[[Table, IndexPlan, Path | None], Table]
"""Builds the index of a plan, with a progress log, and returns the version that has it."""


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """The index that serves a table."""

    table: Table
    recall: Recall
    reason: str
    """Why it was selected, in words."""
    candidates: list[IndexCandidate]
    """Everything that was measured; empty for exact search."""


def select_index(
    table: Table,
    tuning: GroundTruth,
    fresh: GroundTruth,
    *,
    index_type: str,
    target_recall: float,
    memory: int,
    seed: int,
    build: Builder = build_whole,
    log: Path | None = None,
    refine_factors: Sequence[int] = REFINE_FACTORS,
) -> Selection:
    """Keep, build or replace the index of a table until one reaches the target recall; store and tag it.

    The queries of `tuning` choose the index and its nprobes; its recall is measured on those of `fresh`. `memory` is
    what the vectors of an index may take, in bytes. Raises OptionError if IVF_PQ has too few rows to train.
    """
    n, dim = len(tuning.exact.row_ids), table.meta.geometry.vector_dim
    if index_type == "ivf_pq" and n < PQ_CENTROIDS:
        raise OptionError(
            f"--index-type ivf_pq trains {PQ_CENTROIDS} centroids, but the table has {n} training rows: "
            "use --index-type none"
        )
    if index_type == "none" or (index_type == "auto" and n < MIN_INDEXED_ROWS):
        recall = measure_recall(fresh.exact, fresh)
        ref = IndexRef(index_type="none", num_partitions=None, nprobes=None, recall_at_1=recall.recall_at_1)
        return Selection(_served_by(table, ref), recall, f"exact search over {n:,} rows", [])
    kept = _kept_index(table, index_type, n, memory)
    if kept is not None:
        table, added = _index_new_rows(table)
        candidates, best = _tune(table, kept, tuning, target_recall, refine_factors, log, memory)
        if best.tuning_recall_at_1 >= target_recall:
            return _select(
                table, best, fresh, memory, f"kept, with {added:,} rows added; {summarize(best)}", candidates
            )
    candidates, reasons = [], []
    for candidate, num_bits in types_to_try(index_type, n, dim, memory):
        began = time.monotonic()
        num_partitions = 1 if candidate == "ivf_hnsw_sq" else most_partitions(n, dim, memory)
        plan = IndexPlan.train(table, candidate, num_partitions, num_bits=num_bits, seed=seed, memory=memory)
        table = build(table, plan, log)
        index = IndexRef(
            index_type=candidate, num_partitions=num_partitions, nprobes=None, recall_at_1=0.0, num_bits=num_bits
        )
        seconds = round(time.monotonic() - began, 2)
        measured, best = _tune(table, index, tuning, target_recall, refine_factors, log, memory, build_seconds=seconds)
        candidates += measured
        if best.tuning_recall_at_1 >= target_recall:
            reasons.append(summarize(best))
            break
        reasons.append(f"{summarize(best)}, below the target")
    return _select(table, best, fresh, memory, "; ".join(reasons), candidates)


def _select(
    table: Table, best: IndexCandidate, fresh: GroundTruth, memory: int, reason: str, candidates: list[IndexCandidate]
) -> Selection:
    """Measure the best candidate on fresh queries, and let it serve the table."""
    search = ApproximateSearch(table, nprobes=best.nprobes, refine_factor=best.refine_factor, memory=memory)
    recall = measure_recall(search, fresh)
    ref = best.ref(recall.recall_at_1, index_uuid(table.dataset()))
    return Selection(_served_by(table, ref), recall, reason, candidates)


def summarize(index: IndexCandidate) -> str:
    """Return the recall of an index on the tuning queries, at its search parameters, in words."""
    bits = "" if index.num_bits is None else f" ({index.num_bits} bits)"
    refine = f", refine factor {index.refine_factor}" if index.refine_factor > 1 else ""
    return (
        f"{index.index_type.upper()}{bits}: recall@1 {index.tuning_recall_at_1:.3f} "
        f"at nprobes {index.nprobes} of {index.num_partitions}{refine}"
    )


def index_bytes(table: Table) -> int:
    """Return the size of the vector index on disk."""
    (index,) = (index for index in table.lancedb().list_indices() if index.name == VECTOR_INDEX)
    return int(index.size_bytes or 0)


def most_partitions(rows: int, dim: int, memory: int) -> int:
    """Return how many partitions an index gets: the square root of the rows, if so many can be trained in memory."""
    affordable = held_bytes(memory) // (2 * dim * (CENTROID_COPIES + 1))
    return max(min(int(np.sqrt(rows)), affordable), 1)


def _kept_index(table: Table, index_type: str, rows: int, memory: int) -> IndexRef | None:
    """Return the table's index if it has the requested type and the table has not outgrown its partitions."""
    ref = table.meta.index
    if ref is None or ref.num_partitions is None or index_type not in ("auto", ref.index_type):
        return None
    if not _has_shape(table, ref):
        return None
    return ref if most_partitions(rows, table.meta.geometry.vector_dim, memory) <= 2 * ref.num_partitions else None


def _has_shape(table: Table, ref: IndexRef) -> bool:
    """Return whether the table's index has the type, partitions and bits of a description, in not too many segments.

    Its UUID may be another: adding rows to the index changes it, and so does LanceDB's `optimize`, which changes the
    partitions too.
    """
    uuid = index_uuid(table.dataset())
    if uuid is None or uuid.count(",") >= MAX_SEGMENTS:
        return False
    # Otherwise the statistics contain all centroids.
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
    segments = table.dataset().stats.index_stats(VECTOR_INDEX)["indices"]
    return all(
        (each["index_type"], each["num_partitions"]) == (ref.index_type.upper(), ref.num_partitions)
        and ref.num_bits in (None, each["sub_index"].get("num_bits"))
        for each in segments
    )


def types_to_try(index_type: str, rows: int, dim: int, memory: int) -> list[tuple[str, int | None]]:
    """Return index types in the order to try, with their bits: the requested one, then IVF_FLAT if it fits."""
    first = "ivf_rq" if index_type == "auto" else index_type
    bits = None if first != "ivf_rq" else 8 if rows * dim <= memory else 5
    flat = [("ivf_flat", None)] if 2 * rows * dim <= memory else []
    return list(dict.fromkeys([(first, bits), *flat]))


def _index_new_rows(table: Table) -> tuple[Table, int]:
    """Add the rows that are not indexed yet to the index, as a segment; return the table and their number.

    The segment has the partitions of the index. If Lance merged it into the index it would also join partitions, until
    each has some 8,000 rows (pylance 14: 141 partitions of 20,000 rows become 2).
    """
    added = int(table.lancedb().index_stats(VECTOR_INDEX).num_unindexed_rows)
    dataset = table.dataset()
    if added:
        others = [index.name for index in dataset.describe_indices() if index.name != VECTOR_INDEX]
        dataset.optimize.optimize_indices(index_names=others)
        dataset.optimize.optimize_indices(index_names=[VECTOR_INDEX], num_indices_to_merge=0)
    return table.at(dataset), added


def _tune(
    table: Table,
    index: IndexRef,
    tuning: GroundTruth,
    target_recall: float,
    refine_factors: Sequence[int],
    log: Path | None,
    memory: int,
    build_seconds: float | None = None,
) -> tuple[list[IndexCandidate], IndexCandidate]:
    """Find the fewest nprobes that reach the target, to within an eighth; return everything measured, and the best.

    nprobes doubles until the target is reached or recall stops rising; the last doubling is then bisected.
    """
    most, size = index.num_partitions, index_bytes(table)
    assert most is not None
    candidates = list[IndexCandidate]()

    def reaches(nprobes: int, refine_factor: int) -> bool:
        search = ApproximateSearch(table, nprobes=nprobes, refine_factor=refine_factor, memory=memory)
        recall = measure_recall(search, tuning)
        candidates.append(
            IndexCandidate(
                tuning_queries=recall.recall_queries,
                tuning_recall_at_1=recall.recall_at_1,
                tuning_recall_at_10=recall.recall_at_10,
                p50_ms=recall.p50_ms,
                queries_per_second=recall.queries_per_second,
                index_type=index.index_type,
                num_bits=index.num_bits,
                num_partitions=most,
                nprobes=nprobes,
                refine_factor=refine_factor,
                build_seconds=build_seconds,
                index_bytes=size,
            )
        )
        bar.advance(len(tuning.queries), nprobes=nprobes, refine_factor=refine_factor, recall_at_1=recall.recall_at_1)
        return recall.recall_at_1 >= target_recall

    with Progress("measure recall", total=None, unit="queries", log=log) as bar:
        # The distances of IVF_FLAT are exact already.
        refine_factors = (1,) if index.index_type == "ivf_flat" else refine_factors
        nprobes, previous = 1, -1.0
        while not any(reaches(nprobes, refine_factor) for refine_factor in refine_factors):
            recall = candidates[-1].tuning_recall_at_1
            if nprobes == most or recall == previous:
                return candidates, candidates[-1]
            nprobes, previous = min(2 * nprobes, most), recall
        best, low = candidates[-1], nprobes // 2
        while nprobes - low > max(1, nprobes // 8):
            middle = (low + nprobes) // 2
            if reaches(middle, best.refine_factor):
                nprobes, best = middle, candidates[-1]
            else:
                low = middle
    return sorted(candidates, key=lambda each: (each.nprobes, each.refine_factor)), best


def _served_by(table: Table, ref: IndexRef) -> Table:
    """Store the selected index in the table's metadata and tag this version as complete."""
    table = update_meta(table, replace(table.meta, index=ref))
    tag_indexed(table)
    return table
