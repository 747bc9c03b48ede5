"""Build what a trainer searches, from geometry to index, and report what came out."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from index.build.layout import settle_vectors, wanted_geometry
from index.build.select import INDEX_TYPES, Builder, choose_index, index_bytes
from index.errors import OptionError, TableError
from index.report.advice import advise
from index.report.hubness import draws_for, measure_shares
from index.report.recall import evaluation_queries, find_ground_truth
from index.report.report import count_bad_vectors, settings_of
from index.report.sweep import LADDER, measure_ladder, sample_rows
from index.search.ann import ApproximateSearch, ExactSearch
from index.search.lance_index import VECTOR_INDEX, build_whole
from index.table.schema import TRAIN
from index.table.table import Table
from index.terminal import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What the user wants of the search; None keeps what the table has."""

    desc_scale: float | int | str | None = None
    """Weight of the description in the search; `auto` picks it by `perplexity`."""
    geometry: str | None = None
    center: bool | None = None
    """Compare what descriptions do not tell of a latent, instead of the latent."""
    balance: bool | None = None
    """Fit dual potentials, so that every row is drawn equally often; goes on from those that the table has."""
    balance_time_limit: float = 300.0
    """What fitting them may take."""
    max_memory: int = 4 * 2**30
    """Bytes of vectors that are held at a time; a larger table is read again and again, and gets a coarser index."""
    index_type: str = "auto"
    """auto: exact search for small tables, IVF_RQ otherwise, and IVF_FLAT where that misses the target."""
    target_recall: float = 0.95
    """recall@1 against exact search, on held-out descriptions with random points."""
    target_perplexity: float = 100.0
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


def build_index(table: Table, config: BuildConfig, build: Builder = build_whole) -> Built:
    """Do all of it; `build` makes the index itself. The report is also written to DB/NAME.reports/index.json."""
    began = time.monotonic()
    log = table.log("index")
    if len(table.positions(TRAIN)) == 0:
        raise TableError(f"{table.uri} holds no training rows: encode more samples or lower --val-fraction")
    geometry = wanted_geometry(
        table,
        kind=config.geometry,
        desc_scale=config.desc_scale,
        center=config.center,
        allow_small=config.allow_small_desc_scale,
        perplexity=config.target_perplexity,
        seed=config.seed,
    )
    table, balanced = settle_vectors(
        table,
        geometry,
        balance=config.balance,
        memory=config.max_memory,
        seconds=config.balance_time_limit,
        seed=config.seed,
        log=log,
    )
    bad = count_bad_vectors(table)
    if bad["nan_vectors"]:
        raise TableError(f"{bad['nan_vectors']} vectors of {table.uri} are not finite: encode the table again")
    exact = ExactSearch(table, memory=config.max_memory)
    truth = find_ground_truth(exact, evaluation_queries(table, 1024, seed=config.seed))
    choice = choose_index(
        table,
        truth,
        kind=config.index_type,
        target_recall=config.target_recall,
        memory=config.max_memory,
        seed=config.seed,
        build=build,
        log=log,
    )
    table = choice.table
    neighbors = exact if table.meta.uses_exact_search else ApproximateSearch(table)
    with Progress("measure shares", total=draws_for(len(exact.row)), unit="draws", log=log) as bar:
        shares = measure_shares(table.meta.geometry, neighbors, exact, seed=config.seed, drawn=bar.advance)
    scales = (*LADDER, geometry.desc_scale)
    *ladder, at_scale = measure_ladder(table.meta.geometry, sample_rows(table, seed=config.seed), scales)
    report = {
        **settings_of(table),
        "index_choice": choice.why,
        "rows": table.dataset().count_rows(),
        "train_rows": len(exact.row),
        **_index_state(table),
        "build_seconds": round(time.monotonic() - began, 2),
        "target_recall": config.target_recall,
        **asdict(choice.recall),
        **asdict(shares),
        **{name: value for name, value in asdict(at_scale).items() if name != "desc_scale"},
        **bad,
        **{f"balance_{name}": value for name, value in (asdict(balanced) if balanced else {}).items()},
        "ladder": [asdict(rung) for rung in ladder],
        "alternatives": choice.tried,
    }
    report["warnings"] = advise(report)
    table.write_report("index", report)
    return Built(table, report)


def _index_state(table: Table) -> dict[str, int]:
    """How large the index is and how many rows it misses; an exact search has nothing of either."""
    if table.meta.uses_exact_search:
        return {"index_bytes": 0, "num_unindexed_rows": 0}
    missed = table.lancedb().index_stats(VECTOR_INDEX).num_unindexed_rows
    return {"index_bytes": index_bytes(table), "num_unindexed_rows": int(missed)}
