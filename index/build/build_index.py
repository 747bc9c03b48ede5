"""Prepare a table for training: lay it out, build its index, and report on both."""

import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

import numpy as np

from index.build.layout import MAX_TARGET_PERPLEXITY, VectorWriter, choose_geometry, lay_out, write_vectors
from index.build.select import INDEX_TYPES, Builder, Selection, index_bytes, select_index
from index.errors import OptionError, TableError
from index.ranges import POSITIVE, SEED, Range, check_choices, check_ranges
from index.report.hubness import Hubness, measure_hubness, num_hubness_queries
from index.report.integrity import VectorIntegrity, check_vectors, explain_nonfinite
from index.report.recall import Recall, evaluation_queries, find_ground_truth
from index.report.reduction import measure_agreement
from index.report.report import BalanceReport, IndexReport, SearchSettings, find_warnings
from index.report.sweep import DESC_SCALES, SweepPoint, SweepSize, measure_sweep
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.search.kmeans import fastest_device
from index.search.lance_index import build_whole
from index.space.queries import Purpose
from index.space.reduction import MIN_SEARCH_DIM
from index.table.lock import hold_lock
from index.table.schema import TRAIN
from index.table.table import VECTOR_INDEX, Table
from index.terminal import Progress

NUM_RECALL_QUERIES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Options of `build-index`; None keeps what the table has."""

    desc_scale: float | int | str | None = None
    """Weight of the text embedding in the search; `auto` finds the one that reaches `target_perplexity`."""
    geometry: str | None = None
    """sphere, standard or raw."""
    center: bool | None = None
    """Regress latents on text embeddings and search the residuals."""
    search_dim: int | str | None = None
    """Principal components of text and image parts that are searched; `full` searches the parts themselves."""
    balance: bool | None = None
    """Fit dual potentials, so that every row is retrieved equally often; resumes from those that the table has."""
    balance_time_limit: Annotated[float, POSITIVE] = 300.0
    """Seconds that the fit may take."""
    max_memory: Annotated[int, POSITIVE] = 4 * 2**30
    """Bytes that vectors, samples and indexes take at a time. A larger table is read again for each pass and gets an
    index of lower precision."""
    index_type: str = "auto"
    """auto: exact search for small tables, otherwise IVF_RQ, or IVF_FLAT if that misses the target recall."""
    target_recall: Annotated[float, Range(0, 1, above=True)] = 0.95
    """recall@1 against exact search, on held-out captions with random R."""
    target_perplexity: Annotated[float, Range(1, MAX_TARGET_PERPLEXITY, above=True)] = 100.0
    """For desc_scale `auto`: the number of targets that R chooses among for one caption."""
    allow_small_desc_scale: bool = False
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        """Raise OptionError for values out of range, before anything is read."""
        check_choices(self, index_type=INDEX_TYPES)
        if self.search_dim not in (None, "full") and not (
            isinstance(self.search_dim, int) and self.search_dim >= MIN_SEARCH_DIM
        ):
            raise OptionError(
                f"--search-dim {self.search_dim} is out of range: use a whole number of at least {MIN_SEARCH_DIM}, one "
                "component each of text and image, or full"
            )
        check_ranges(self)


@dataclass(frozen=True, eq=False, slots=True)
class Built:
    """A table that can be trained on, and its report."""

    table: Table
    report: IndexReport


def build_index(
    table: Table, config: BuildConfig, build: Builder = build_whole, write: VectorWriter = write_vectors
) -> Built:
    """Lay a table out, select and build its index, and write the report to DB/NAME.reports/index.json.

    `write` writes the search vectors and `build` makes the index itself, here or on a Beam runner. Until the new index
    is complete, the last complete version serves. Raises TableError if the table has no training rows or vectors that
    are not finite, or if another command writes to it, OptionError if an option does not fit the table.
    """
    with hold_lock(table.uri, table.storage, "build-index"):
        built = _build(table, config, build, write)
        built.table.write_report("index", asdict(built.report))
        return built


def _build(table: Table, config: BuildConfig, build: Builder, write: VectorWriter) -> Built:
    """Do all of it but writing the report."""
    began, log = time.monotonic(), table.log("index")
    # Whatever needs rows again takes them from memory, if they fit.
    table.hold(("split", "text", "latent"), config.max_memory // 4)
    if table.count(TRAIN) == 0:
        raise TableError(f"{table.uri} has no training rows: encode more samples or lower --val-fraction")
    geometry = choose_geometry(
        table,
        name=config.geometry,
        desc_scale=config.desc_scale,
        center=config.center,
        search_dim=config.search_dim,
        allow_small=config.allow_small_desc_scale,
        target_perplexity=config.target_perplexity,
        memory=config.max_memory,
        seed=config.seed,
    )
    table, balance = lay_out(
        table,
        geometry,
        balance=config.balance,
        memory=config.max_memory,
        time_limit=config.balance_time_limit,
        seed=config.seed,
        log=log,
        write=write,
    )
    table.hold(("split", "text", "latent", "vector"), config.max_memory // 4)
    integrity = check_vectors(table, config.max_memory)
    if integrity.nonfinite_vectors:
        raise TableError(
            f"{integrity.nonfinite_vectors} vectors of {table.uri} are not finite: {explain_nonfinite(table)}"
        )
    # The other half is for the index and its sample, while it is built and searched.
    exact = ExactSearch(table, fastest_device(), config.max_memory // 2)
    queries = [
        evaluation_queries(table, NUM_RECALL_QUERIES, seed=config.seed, purpose=purpose)
        for purpose in (Purpose.NPROBES, Purpose.RECALL)
    ]
    tuning, fresh = find_ground_truth(exact, np.concatenate(queries)).split(NUM_RECALL_QUERIES)
    selection = select_index(
        table,
        tuning,
        fresh,
        index_type=config.index_type,
        target_recall=config.target_recall,
        memory=config.max_memory // 2,
        seed=config.seed,
        build=build,
        log=log,
    )
    return Built(selection.table, _measure(selection, exact, integrity, balance, config, began))


def _measure(
    selection: Selection,
    exact: ExactSearch,
    integrity: VectorIntegrity,
    balance: BalanceReport | None,
    config: BuildConfig,
    began: float,
) -> IndexReport:
    """Measure hubness and the sweep of desc_scale, and complete the report."""
    table, geometry = selection.table, selection.table.meta.geometry
    neighbors = exact if table.meta.uses_exact_search else ApproximateSearch(table, memory=config.max_memory // 2)
    total = num_hubness_queries(len(exact.row_ids))
    with Progress("measure hubness", total=total, unit="queries", log=table.log("index")) as bar:
        hubness = measure_hubness(geometry, neighbors, exact, seed=config.seed, progress=bar.advance)
    sweep_size, (*sweep, at_scale) = measure_sweep(
        exact, geometry, (*DESC_SCALES, geometry.desc_scale), seed=config.seed
    )
    report = IndexReport(
        **_values(SearchSettings, _settings(selection, len(exact.row_ids), config, time.monotonic() - began)),
        **_values(Recall, selection.recall),
        **_values(Hubness, hubness),
        **_values(SweepSize, sweep_size),
        **_values(SweepPoint, at_scale),
        **_values(VectorIntegrity, integrity),
        full_space=measure_agreement(table, seed=config.seed),
        balance=balance,
        sweep=sweep,
        candidates=selection.candidates,
    )
    return replace(report, warnings=find_warnings(report))


def _values(group: type, record: Any) -> dict[str, Any]:
    """Return the fields of a group of metrics from a record that has them."""
    return {field.name: getattr(record, field.name) for field in fields(group)}


def _settings(selection: Selection, train_rows: int, config: BuildConfig, seconds: float) -> SearchSettings:
    """Collect what the metrics of a report were measured at."""
    table, geometry, index = selection.table, selection.table.meta.geometry, selection.table.meta.index
    assert index is not None
    size, num_unindexed, reduction = 0, 0, geometry.reduction
    if not table.meta.uses_exact_search:
        size = index_bytes(table)
        num_unindexed = int(table.lancedb().index_stats(VECTOR_INDEX).num_unindexed_rows)
    return SearchSettings(
        table=table.uri,
        version=table.version,
        rows=table.dataset().count_rows(),
        train_rows=train_rows,
        geometry=geometry.name,
        center=geometry.centering is not None,
        explained_variance=None if geometry.centering is None else geometry.centering.explained_variance,
        search_dim=None if reduction is None else reduction.dim,
        search_text_dim=None if reduction is None else reduction.text_dim,
        search_image_dim=None if reduction is None else reduction.image_dim,
        text_variance=None if reduction is None else reduction.text_variance,
        image_variance=None if reduction is None else reduction.image_variance,
        kappa=geometry.kappa,
        vector_dim=geometry.vector_dim,
        index_type=index.index_type,
        num_partitions=index.num_partitions,
        nprobes=index.nprobes,
        num_bits=index.num_bits,
        refine_factor=index.refine_factor,
        index_choice=selection.reason,
        index_bytes=size,
        num_unindexed_rows=num_unindexed,
        build_seconds=round(seconds, 2),
        target_recall=config.target_recall,
        target_perplexity=config.target_perplexity if config.desc_scale == "auto" else None,
    )
