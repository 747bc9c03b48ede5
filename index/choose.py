"""Choose and build the index: the user asks for recall, partitions and probes are found here.

The wanted type gets the fewest probes that reach the target. Where it cannot reach it at any number of probes, because
what it loses is lost to quantisation, IVF_FLAT takes its place. What a trainer may rely on is tagged, so that a
clean-up of old versions leaves it alone.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from index.console import Progress
from index.errors import OptionError
from index.report import Recall, Truth, measure_recall
from index.schema import IndexRef
from index.search import LanceNeighbours
from index.table import Table, tag_indexed, update_meta

INDEX_TYPES = ("auto", "ivf_rq", "ivf_pq", "ivf_sq", "ivf_flat", "ivf_hnsw_sq", "none")
VECTOR_INDEX = "vector_idx"
PQ_CENTROIDS = 256
SMALL_TABLE = 10_000
"""Training rows below which comparing with all of them costs less than an index."""


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """The index that serves a table now."""

    table: Table
    recall: Recall
    why: str
    """In words, for the report."""
    tried: list[dict[str, Any]]
    """Every type and number of probes that was measured."""


def choose_index(table: Table, truth: Truth, *, kind: str, target_recall: float, log: Path | None) -> Choice:
    """Build the index that was asked for, or a finer one where it cannot reach the target; store and tag the choice."""
    n = len(truth.exact.row)
    if kind == "ivf_pq" and n < PQ_CENTROIDS:
        raise OptionError(f"--index-type ivf_pq learns {PQ_CENTROIDS} centroids, the table has {n} rows: choose none")
    if kind == "none" or (kind == "auto" and n < SMALL_TABLE):
        recall = measure_recall(truth.exact, truth)
        ref = IndexRef(kind="none", num_partitions=None, nprobes=None, recall=recall.recall_at_1)
        return Choice(_served_by(table, ref), recall, f"every query is compared with all {n:,} rows", [])
    wanted = "ivf_rq" if kind == "auto" else kind
    now = table.meta.index
    if (
        now is not None
        and now.num_partitions is not None
        and kind in ("auto", now.kind)
        and n <= 4 * now.num_partitions**2
    ):
        table, added = _with_later_rows(table)
        probes = _fewest_probes(table, now.num_partitions, truth, target_recall, log)
        nprobes, recall = list(probes.items())[-1]
        if recall.recall_at_1 >= target_recall:
            why = f"{now.kind} is kept, {added:,} rows were added to it; it finds {recall.recall_at_1:.3f} of the "
            why += f"nearest with {nprobes} of {now.num_partitions} probes"
            ref = replace(now, nprobes=nprobes, recall=recall.recall_at_1)
            return Choice(_served_by(table, ref), recall, why, _lines(now.kind, probes))
    tried, why = [], ""
    for candidate in dict.fromkeys((wanted, "ivf_flat")):
        partitions = 1 if candidate == "ivf_hnsw_sq" else max(int(np.sqrt(n)), 1)
        table = _create(table, candidate, partitions, log)
        probes = _fewest_probes(table, partitions, truth, target_recall, log)
        tried += _lines(candidate, probes)
        nprobes, recall = list(probes.items())[-1]
        why += f"{candidate} finds {recall.recall_at_1:.3f} of the nearest with {nprobes} of {partitions} probes"
        if recall.recall_at_1 >= target_recall:
            break
        why += ", more do not help; " if candidate != "ivf_flat" else ", the most there is"
    ref = IndexRef(kind=candidate, num_partitions=partitions, nprobes=nprobes, recall=recall.recall_at_1)
    return Choice(_served_by(table, ref), recall, why, tried)


def _with_later_rows(table: Table) -> tuple[Table, int]:
    """The table with the rows that came after its index assigned to the index's partitions, and how many they were."""
    added = int(table.lancedb().index_stats(VECTOR_INDEX).num_unindexed_rows)
    dataset = table.dataset()
    if added:
        dataset.optimize.optimize_indices()
    return Table(table.uri, dataset.version, table.meta, table.storage), added


def _lines(kind: str, probes: dict[int, Recall]) -> list[dict[str, Any]]:
    """What was measured of an index, a line for each number of probes."""
    return [{"kind": kind, "nprobes": nprobes, **asdict(recall)} for nprobes, recall in probes.items()]


def _fewest_probes(
    table: Table, partitions: int, truth: Truth, target_recall: float, log: Path | None
) -> dict[int, Recall]:
    """Double the probes until the target is reached or more of them change nothing; what each number reached."""
    measured: dict[int, Recall] = {}
    nprobes = 1
    with Progress("measure recall", total=None, unit="queries", log=log) as bar:
        while True:
            before = list(measured.values())[-1:]
            recall = measured[nprobes] = measure_recall(LanceNeighbours(table, nprobes), truth)
            bar.advance(len(truth.queries), nprobes=nprobes, recall=recall.recall_at_1)
            stuck = any(r.recall_at_1 == recall.recall_at_1 for r in before)
            if recall.recall_at_1 >= target_recall or nprobes >= partitions or stuck:
                return measured
            nprobes = min(2 * nprobes, partitions)


def _create(table: Table, kind: str, partitions: int, log: Path | None) -> Table:
    dataset = table.dataset()
    extra: dict[str, Any] = {"num_bits": 8} if kind == "ivf_rq" else {}
    if kind == "ivf_pq":
        extra["num_sub_vectors"] = table.meta.geometry.width // 8
    if not any("split" in index.field_names for index in dataset.describe_indices()):
        dataset.create_scalar_index("split", "BITMAP")
    with Progress(f"build {kind}", total=None, unit="steps", log=log) as bar:

        def tick(progress: Any) -> None:
            bar.advance(1, stage=f"{progress.stage} {progress.completed}/{progress.total or '?'}")

        dataset.create_index(
            "vector",
            kind.upper(),
            name=VECTOR_INDEX,
            metric="L2",
            replace=True,
            num_partitions=partitions,
            progress_callback=tick,
            **extra,
        )
    return Table(table.uri, dataset.version, table.meta, table.storage)


def _served_by(table: Table, ref: IndexRef) -> Table:
    """Store the choice in the table's metadata, and say that this version is complete."""
    table = update_meta(table, replace(table.meta, index=ref))
    tag_indexed(table)
    return table
