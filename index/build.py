"""Build a table's index, choose how hard to search it, and report what came out.

The user asks for recall; partitions and probes are found here. Where the wanted index cannot reach the target at any
number of probes, the exact-within-partition IVF_FLAT replaces it. What a trainer may rely on is tagged, so that a
clean-up of old versions leaves it alone.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from index.console import Progress, write_json
from index.errors import OptionError, TableError
from index.report import (
    Recall,
    Truth,
    count_bad_vectors,
    draws_for,
    find_truth,
    measure_ladder,
    measure_recall,
    measure_shares,
    real_queries,
    settings_of,
)
from index.schema import TRAIN, IndexRef
from index.search import ExactNeighbours, LanceNeighbours
from index.settle import settle_vectors, wanted_geometry
from index.table import Table, update_meta

INDEX_TYPES = ("auto", "ivf_rq", "ivf_pq", "ivf_sq", "ivf_flat", "ivf_hnsw_sq", "none")
VECTOR_INDEX = "vector_idx"
PQ_CENTROIDS = 256
SMALL_TABLE = 10_000
"""Training rows below which comparing with all of them costs less than an index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What the user wants of the search; None keeps what the table has."""

    desc_scale: float | int | str | None = None
    """Weight of the description in the search; `auto` picks it by `perplexity`."""
    geometry: str | None = None
    balance: bool | None = None
    """Fit dual potentials, so that every row is drawn equally often; costs minutes on large tables."""
    index_type: str = "auto"
    """auto: exact search for small tables, IVF_RQ with 8 bits otherwise."""
    target_recall: float = 0.95
    """recall@1 against exact search, on held-out descriptions with random points."""
    perplexity: float = 100.0
    """For `auto`: how many targets a description should choose among, over random points."""
    allow_small_desc_scale: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built before anything is read."""
        if self.index_type not in INDEX_TYPES:
            raise OptionError(f"--index-type {self.index_type!r} is unknown: choose one of {', '.join(INDEX_TYPES)}")
        if not 0 < self.target_recall <= 1:
            raise OptionError(f"--target-recall {self.target_recall:g} is not in (0, 1]: try 0.95")


@dataclass(frozen=True, eq=False, slots=True)
class Built:
    """The table as it can be trained on now, and its report."""

    table: Table
    report: dict[str, Any]


def build_index(table: Table, config: BuildConfig) -> Built:
    """Do all of it; the report is also written to DB/NAME.reports/index.json."""
    began = time.monotonic()
    log = table.reports / "index.jsonl"
    if len(table.offsets(TRAIN)) == 0:
        raise TableError(f"{table.uri} holds no training rows: encode more samples or lower --heldout-share")
    geometry = wanted_geometry(
        table,
        kind=config.geometry,
        desc_scale=config.desc_scale,
        allow_small=config.allow_small_desc_scale,
        perplexity=config.perplexity,
        seed=config.seed,
    )
    table, balanced = settle_vectors(table, geometry, balance=config.balance, seed=config.seed, log=log)
    bad = count_bad_vectors(table.column("vector"))
    if bad["nan_vectors"]:
        raise TableError(f"{bad['nan_vectors']} vectors of {table.uri} are not finite: encode the table again")
    exact = ExactNeighbours(table)
    truth = find_truth(exact, real_queries(table, 1024, seed=config.seed))
    table, recall, tried = _choose_index(table, truth, config, log)
    neighbours = exact if _is_exact(table) else LanceNeighbours(table)
    with Progress("measure shares", total=draws_for(len(exact.row)), unit="draws", log=log) as bar:
        shares = measure_shares(table, neighbours, exact, seed=config.seed, drawn=bar.advance)
    coordinate = table.meta.geometry.balance_of(exact.vectors.cpu().numpy())
    ladder = measure_ladder(table.meta.geometry, exact.text, exact.latent, balance=coordinate)
    at_scale = measure_ladder(
        table.meta.geometry, exact.text, exact.latent, (geometry.desc_scale,), balance=coordinate
    )[0]
    report = {
        **settings_of(table),
        "rows": table.dataset().count_rows(),
        "train_rows": len(exact.row),
        "index_bytes": _index_bytes(table),
        "num_unindexed_rows": _unindexed(table),
        "build_seconds": round(time.monotonic() - began, 2),
        **asdict(recall),
        **asdict(shares),
        **{name: value for name, value in asdict(at_scale).items() if name != "desc_scale"},
        **bad,
        "balance": None if balanced is None else {"chi_square": balanced.chi_square, "steps": balanced.step},
        "ladder": [asdict(rung) for rung in ladder],
        "alternatives": tried,
    }
    write_json(table.reports / "index.json", report)
    return Built(table, report)


def _choose_index(
    table: Table, truth: Truth, config: BuildConfig, log: Path
) -> tuple[Table, Recall, list[dict[str, Any]]]:
    """The index that was asked for, or a finer one where it cannot reach the target recall."""
    n = len(truth.exact.row)
    kind = config.index_type
    if kind == "ivf_pq" and n < PQ_CENTROIDS:
        raise OptionError(f"--index-type ivf_pq learns {PQ_CENTROIDS} centroids, the table has {n} rows: choose none")
    if kind == "auto":
        kind = "none" if n < SMALL_TABLE else "ivf_rq"
    tried: list[dict[str, Any]] = []
    for candidate in dict.fromkeys([kind, "ivf_flat"] if kind != "none" else []):
        partitions = 1 if candidate == "ivf_hnsw_sq" else max(int(np.sqrt(n)), 1)
        table = _create(table, candidate, partitions, log)
        nprobes = 1
        while True:
            with Progress("measure recall", total=len(truth.queries), unit="queries", log=log) as bar:
                recall = measure_recall(LanceNeighbours(table, nprobes), truth)
                bar.advance(len(truth.queries), nprobes=nprobes, recall=recall.recall_at_1)
            # What more probes no longer change is lost to quantisation, not to the partitions left out.
            stuck = bool(tried) and tried[-1]["kind"] == candidate and tried[-1]["recall_at_1"] == recall.recall_at_1
            tried.append({"kind": candidate, "nprobes": nprobes, **asdict(recall)})
            if recall.recall_at_1 >= config.target_recall or nprobes >= partitions or stuck:
                break
            nprobes = min(2 * nprobes, partitions)
        if recall.recall_at_1 >= config.target_recall or candidate == "ivf_flat":
            ref = IndexRef(kind=candidate, num_partitions=partitions, nprobes=nprobes, recall=recall.recall_at_1)
            return _tagged(update_meta(table, replace(table.meta, index=ref))), recall, tried
    recall = measure_recall(truth.exact, truth)
    ref = IndexRef(kind="none", num_partitions=None, nprobes=None, recall=recall.recall_at_1)
    return _tagged(update_meta(table, replace(table.meta, index=ref))), recall, tried


def _create(table: Table, kind: str, partitions: int, log: Path) -> Table:
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
    return Table(table.uri, dataset.version, table.meta)


def _tagged(table: Table) -> Table:
    """Keep this version from clean-up: trainers pin it."""
    tags = table.dataset().tags
    name = f"index-v{table.version}"
    if name not in tags.list():
        tags.create(name, table.version)
    return table


def _is_exact(table: Table) -> bool:
    return table.meta.index is None or table.meta.index.kind == "none"


def _index_bytes(table: Table) -> int:
    if _is_exact(table):
        return 0
    return sum(index.size_bytes or 0 for index in table.lancedb().list_indices() if index.name == VECTOR_INDEX)


def _unindexed(table: Table) -> int:
    if _is_exact(table):
        return 0
    return int(table.lancedb().index_stats(VECTOR_INDEX).num_unindexed_rows)
