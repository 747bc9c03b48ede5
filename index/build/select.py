"""Choose and build the index: the user asks for recall; type, partitions, probes and re-ranking are found here.

IVF_RQ in 8 bits, 5 where 8 would not fit into memory, gets the fewest probes that reach the target, with or without
re-ranking some rows by their exact distance. Where it cannot reach it at any number of probes IVF_FLAT takes its place.
What a trainer may rely on is tagged, so that a clean-up of old versions leaves it alone.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from index.errors import OptionError
from index.report.recall import GroundTruth, Recall, measure_recall
from index.search.ann import ApproximateSearch
from index.search.lance_index import VECTOR_INDEX, IndexPlan, build_whole
from index.table.commit import tag_indexed, update_meta
from index.table.schema import IndexRef
from index.table.table import Table
from index.terminal import Progress

INDEX_TYPES = ("auto", "ivf_rq", "ivf_pq", "ivf_sq", "ivf_flat", "ivf_hnsw_sq", "none")
PQ_CENTROIDS = 256
SMALL_TABLE = 10_000
"""Training rows below which comparing with all of them costs less than an index."""
RERANKED = 4
"""Rows re-ranked per row wanted; at equal probes this costs a few percent and finds what IVF_FLAT finds
(tests/bench/bench_index.py)."""

Builder = Callable[[Table, IndexPlan, Path | None], Table]
Measured = tuple[IndexRef, Recall]


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """The index that serves a table now."""

    table: Table
    recall: Recall
    why: str
    """In words, for the report."""
    tried: list[dict[str, Any]]
    """Everything that was measured."""


def choose_index(
    table: Table,
    truth: GroundTruth,
    *,
    kind: str,
    target_recall: float,
    memory: int,
    seed: int,
    build: Builder = build_whole,
    log: Path | None,
) -> Choice:
    """Build the index that was asked for, or a finer one where it cannot reach the target; store and tag the choice."""
    n = len(truth.exact.row)
    if kind == "ivf_pq" and n < PQ_CENTROIDS:
        raise OptionError(f"--index-type ivf_pq learns {PQ_CENTROIDS} centroids, the table has {n} rows: choose none")
    if kind == "none" or (kind == "auto" and n < SMALL_TABLE):
        recall = measure_recall(truth.exact, truth)
        ref = IndexRef(index_type="none", num_partitions=None, nprobes=None, recall_at_1=recall.recall_at_1)
        return Choice(_served_by(table, ref), recall, f"every query is compared with all {n:,} rows", [])
    now = table.meta.index
    if (
        now is not None
        and now.num_partitions is not None
        and kind in ("auto", now.index_type)
        and n <= 4 * now.num_partitions**2
    ):
        table, added = _with_later_rows(table)
        tried, (ref, recall) = _measure(table, now, truth, target_recall, log)
        if recall.recall_at_1 >= target_recall:
            why = f"{now.index_type} is kept, {added:,} rows were added to it; {_said(ref)}"
            return Choice(_served_by(table, ref), recall, why, _lines(tried))
    lines, why = list[dict[str, Any]](), ""
    for candidate, num_bits in _candidates(kind, n, table.meta.geometry.vector_dim, memory):
        began = time.monotonic()
        partitions = 1 if candidate == "ivf_hnsw_sq" else max(int(np.sqrt(n)), 1)
        table = build(table, IndexPlan.train(table, candidate, partitions, num_bits=num_bits, seed=seed), log)
        built = {"build_seconds": round(time.monotonic() - began, 2), "bytes": index_bytes(table)}
        blank = IndexRef(
            index_type=candidate, num_partitions=partitions, nprobes=None, recall_at_1=0.0, num_bits=num_bits
        )
        tried, (ref, recall) = _measure(table, blank, truth, target_recall, log)
        lines += [line | built for line in _lines(tried)]
        why += ("" if not why else ", more do not help; ") + _said(ref)
        if recall.recall_at_1 >= target_recall:
            break
    return Choice(_served_by(table, ref), recall, why, lines)


def _candidates(kind: str, rows: int, width: int, memory: int) -> list[tuple[str, int | None]]:
    """Types to try in turn, with their bits: the one asked for, and IVF_FLAT if it fits into memory."""
    coarse = "ivf_rq" if kind == "auto" else kind
    bits = None if coarse != "ivf_rq" else 8 if rows * width <= memory else 5
    finer = [("ivf_flat", None)] if 2 * rows * width <= memory else []
    return list(dict.fromkeys([(coarse, bits), *finer]))


def _said(ref: IndexRef) -> str:
    """What an index finds, in words."""
    name = ref.index_type if ref.num_bits is None else f"{ref.index_type} of {ref.num_bits} bits"
    ranked = f", {ref.refine_factor} rows re-ranked for each," if ref.refine_factor > 1 else ""
    return (
        f"{name} finds {ref.recall_at_1:.3f} of the nearest{ranked} with {ref.nprobes} of {ref.num_partitions} probes"
    )


def _with_later_rows(table: Table) -> tuple[Table, int]:
    """The table with the rows that came after its index assigned to the index's partitions, and how many they were."""
    added = int(table.lancedb().index_stats(VECTOR_INDEX).num_unindexed_rows)
    dataset = table.dataset()
    if added:
        dataset.optimize.optimize_indices()
    return table.at(dataset), added


def _lines(tried: list[Measured]) -> list[dict[str, Any]]:
    """What was measured of an index, a line for each number of probes and rows re-ranked."""
    kept = ("index_type", "num_bits", "num_partitions", "nprobes", "refine_factor")
    return [{name: getattr(ref, name) for name in kept} | asdict(recall) for ref, recall in tried]


def _measure(
    table: Table, index: IndexRef, truth: GroundTruth, target_recall: float, log: Path | None
) -> tuple[list[Measured], Measured]:
    """Double the probes until the target is reached or more of them change nothing, then halve the last step.

    All that was measured, and what to take: the fewest probes that reach the target, to an eighth.
    """
    assert index.num_partitions is not None
    tried = list[Measured]()
    # IVF_FLAT's distances are exact already.
    refines = (1,) if index.index_type == "ivf_flat" else (1, RERANKED)

    def reaches(nprobes: int, refine_factor: int) -> bool:
        recall = measure_recall(ApproximateSearch(table, nprobes=nprobes, refine_factor=refine_factor), truth)
        ref = replace(index, nprobes=nprobes, refine_factor=refine_factor, recall_at_1=recall.recall_at_1)
        tried.append((ref, recall))
        bar.advance(len(truth.queries), nprobes=nprobes, refine_factor=refine_factor, recall=recall.recall_at_1)
        return recall.recall_at_1 >= target_recall

    with Progress("measure recall", total=None, unit="queries", log=log) as bar:
        nprobes, before = 1, -1.0
        while not any(reaches(nprobes, refine_factor) for refine_factor in refines):
            recall = tried[-1][0].recall_at_1
            if nprobes == index.num_partitions or recall == before:
                return tried, tried[-1]
            nprobes, before = min(2 * nprobes, index.num_partitions), recall
        best, low = tried[-1], nprobes // 2
        while nprobes - low > max(1, nprobes // 8):
            middle = (low + nprobes) // 2
            if reaches(middle, best[0].refine_factor):
                nprobes, best = middle, tried[-1]
            else:
                low = middle
    return sorted(tried, key=lambda each: (each[0].nprobes, each[0].refine_factor)), best


def index_bytes(table: Table) -> int:
    """The size of the index on disk."""
    (index,) = (index for index in table.lancedb().list_indices() if index.name == VECTOR_INDEX)
    return int(index.size_bytes or 0)


def _served_by(table: Table, ref: IndexRef) -> Table:
    """Store the choice in the table's metadata, and say that this version is complete."""
    table = update_meta(table, replace(table.meta, index=ref))
    tag_indexed(table)
    return table
