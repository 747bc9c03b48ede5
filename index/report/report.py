"""The report of an indexed table: every metric in one typed record, and what it warns of in words.

`build-index` fills it and stores it as DB/NAME.reports/index.json, one key per field.
"""

from dataclasses import dataclass, field
from typing import Any

from index.report.hubness import Hubness
from index.report.integrity import VectorIntegrity
from index.report.recall import Recall
from index.report.reduction import FullSpaceAgreement
from index.report.sweep import SweepPoint, SweepSize
from index.space.geometry import Geometry
from index.table.ledger import ledger_summary
from index.table.schema import TRAIN, IndexRef
from index.table.table import VECTOR_INDEX, Table, complete_versions, index_is_current

UNIQUE_CAPTIONS = 1.5
"""Training rows per distinct caption below which captions count as unique."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The table version, geometry and index that the metrics of a report belong to."""

    table: str
    """URI."""
    version: int
    rows: int
    train_rows: int
    geometry: str
    center: bool
    """Whether latents are compared after a regression on text embeddings."""
    explained_variance: float | None
    """Fraction of the latents' variance that this regression explains, by cross-validation."""
    search_dim: int | None
    """Principal components that are searched, of text and image parts together; None for the full space."""
    search_text_dim: int | None
    search_image_dim: int | None
    text_variance: float | None
    """Fraction of the text part's variance that its components keep."""
    image_variance: float | None
    """The same of the image part."""
    kappa: float
    vector_dim: int
    index_type: str
    """`none` for exact search."""
    num_partitions: int | None
    nprobes: int | None
    num_bits: int | None
    refine_factor: int
    index_choice: str
    """Why this index serves the table."""
    index_bytes: int
    """Size on disk."""
    num_unindexed_rows: int
    build_seconds: float
    target_recall: float
    target_perplexity: float | None
    """What `--desc-scale auto` was asked for; None if desc_scale was given or kept."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """An index and how it is searched."""

    index_type: str
    num_bits: int | None
    num_partitions: int
    nprobes: int
    refine_factor: int
    build_seconds: float | None
    """None for an index that was kept."""
    index_bytes: int


@dataclass(frozen=True, kw_only=True)
class IndexCandidate(IndexSettings):
    """The recall and speed of an index at these settings, on the queries by which nprobes is chosen.

    The best of several measurements looks better than it is, so the report's own recall is of other queries.
    """

    tuning_queries: int
    tuning_recall_at_1: float
    tuning_recall_at_10: float
    p50_ms: float
    queries_per_second: float

    def ref(self, recall_at_1: float, uuid: str | None) -> IndexRef:
        """Return what the table's metadata stores of it: with its recall on fresh queries, and Lance's UUID."""
        return IndexRef(
            index_type=self.index_type,
            num_partitions=self.num_partitions,
            nprobes=self.nprobes,
            recall_at_1=recall_at_1,
            num_bits=self.num_bits,
            refine_factor=self.refine_factor,
            uuid=uuid,
        )


@dataclass(frozen=True, kw_only=True)
class BalanceReport:
    """The outcome of fitting dual potentials."""

    fit_chi_square: float
    """Chi-square that ended the fit, over the rows that were fitted; that of the report is of other queries and all
    training rows."""
    steps: int
    seconds: float
    stop_reason: str
    fitted_rows: int
    """Fewer than the training rows if the potentials of the others are derived from theirs."""
    resumed: bool
    """Whether the fit started from potentials stored in the table."""
    chi_square_before: float | None = None
    """Of all rows, before the fit; None if all of them were fitted."""
    chi_square: float | None = None
    """The same with the potentials that were fitted and derived; they are stored if it is not larger."""

    @property
    def applied(self) -> bool:
        """Return whether the potentials are stored in the table."""
        return self.chi_square is None or self.chi_square_before is None or self.chi_square <= self.chi_square_before


@dataclass(frozen=True, kw_only=True)
class IndexReport(VectorIntegrity, SweepPoint, SweepSize, Hubness, Recall, SearchSettings):
    """All that is known of an indexed table.

    It inherits the groups of metrics that are measured separately, so that their fields are keys of one flat JSON
    object; those of SweepPoint are measured at the table's own desc_scale.
    """

    full_space: FullSpaceAgreement | None
    """What the reduced search space loses; None for the full space."""
    balance: BalanceReport | None
    """None unless this build fitted potentials."""
    sweep: list[SweepPoint]
    """The same metrics at other values of desc_scale."""
    candidates: list[IndexCandidate]
    """Every index and search setting that was measured; empty for exact search."""
    warnings: list[str] = field(default_factory=list)


def find_warnings(report: IndexReport) -> list[str]:
    """Return a sentence for each metric that suggests that training will go badly, with what to try.

    The thresholds are those at which training was measured to suffer: a quarter of the rows beyond the anti-hub rate
    of uniform sampling, fewer than two targets per caption, a linear probe that explains nothing.
    """
    warnings = []
    excess = report.anti_hub_rate - report.expected_anti_hub_rate
    if excess > 0.25:
        warnings.append(
            f"the anti-hub rate is {report.anti_hub_rate:.0%}, {excess:.0%} above uniform sampling "
            f"(chi-square {report.chi_square:.2f}): try --balance, and --geometry sphere if it is not set"
        )
    error = report.standard_error(report.target_recall)
    if report.recall_at_1 < report.target_recall - 2 * error:
        warnings.append(
            f"recall@1 is {report.recall_at_1:.3f} on {report.recall_queries:,} queries, more than two standard errors "
            f"({error:.3f}) below --target-recall {report.target_recall:g}: raise --max-memory-gb, which allows a more "
            "precise index"
        )
    warnings += _perplexity_warnings(report)
    if report.text_distance > 0.7:
        warnings.append(
            f"the unit text embeddings of query and target are {report.text_distance:.2f} apart, so images will "
            "hardly follow their captions: try a larger --desc-scale"
        )
    if report.linear_probe_r2 is not None and report.linear_probe_r2 < 0.02:
        warnings.append(
            f"a linear probe explains R^2 = {report.linear_probe_r2:.3f} of the targets, which are close to "
            "unpredictable from (R, caption): try --center, a larger --desc-scale, or smaller latents"
        )
    if report.zero_vectors:
        warnings.append(f"{report.zero_vectors:,} search vectors are zero: encode the table again")
    if report.duplicate_vectors > 0.1 * report.rows:
        warnings.append(
            f"{report.duplicate_vectors:,} search vectors are duplicates, and only one row of each group is "
            "retrieved: encode with --dedup pair"
        )
    return warnings


def _perplexity_warnings(report: IndexReport) -> list[str]:
    """Warn of targets that hardly depend on R, and of a perplexity that `--desc-scale auto` did not reach."""
    warnings, asked = [], report.target_perplexity
    rows_per_text = report.train_rows / max(report.distinct_texts, 1)
    if asked is not None and not 0.75 <= report.perplexity / asked <= 4 / 3:
        if report.perplexity > asked:
            reason = "captions that are this much alike need a text encoder that tells them apart"
        elif report.train_rows < 10 * asked:
            reason = f"auto lets a caption choose among at most a tenth of the {report.train_rows:,} training rows"
        else:
            reason = "a smaller desc_scale would let captions retrieve images of other captions"
        warnings.append(
            f"--desc-scale auto reached a perplexity of {report.perplexity:.3g} at desc_scale {report.desc_scale:g}, "
            f"{asked:g} was asked: {reason}"
        )
    if report.perplexity < 2 and rows_per_text < UNIQUE_CAPTIONS:
        warnings.append(
            f"perplexity is {report.perplexity:.2f} targets per caption, because nearly every caption is unique "
            f"({report.distinct_texts:,} captions for {report.train_rows:,} training rows) and retrieves its own "
            "image for any R: expect no advantage over --objective endpoint or flow_matching, and keep desc_scale, "
            "since a smaller one retrieves images of other captions"
        )
    elif report.perplexity < 2:
        warnings.append(
            f"perplexity is {report.perplexity:.2f} targets per caption, so the target hardly depends on R and a "
            "caption yields one image: try a smaller --desc-scale, or --desc-scale auto"
        )
    return warnings


def describe(table: Table) -> dict[str, Any]:
    """Return what a table holds, as of its open version, and its last index report under `index_report`.

    `serving_version` is the one that trainers open: an older one while this one has no complete index.
    """
    meta, dataset = table.meta, table.dataset()
    current = index_is_current(dataset, meta.index)
    return {
        "table": table.uri,
        "version": table.version,
        "rows": dataset.count_rows(),
        "train_rows": dataset.count_rows(filter=f"split = '{TRAIN}'"),
        **ledger_summary(table),
        "image_encoder": f"{meta.image_encoder.class_name} {meta.image_encoder.name}",
        "text_encoder": f"{meta.text_encoder.class_name} {meta.text_encoder.name}",
        "image_size": meta.image_size,
        "latent_shape": list(meta.latent_shape),
        "text_dim": meta.text_dim,
        "geometry": meta.geometry.name,
        "desc_scale": meta.geometry.desc_scale,
        "search_dim": _search_dim(meta.geometry),
        "indexed": current,
        "index_type": meta.index.index_type if current and meta.index is not None else None,
        "serving_version": table.version if current else next(iter(complete_versions(dataset)), None),
        "unindexed_rows": _unindexed_rows(table) if current else None,
        "index_report": _still_true(table.report("index"), table.version),
    }


def _search_dim(geometry: Geometry) -> str:
    """Say how many dimensions are searched, and of which parts they are."""
    reduction, full = geometry.reduction, geometry.text_dim + geometry.latent_dim
    if reduction is None:
        return f"full ({full}: {geometry.text_dim} text, {geometry.latent_dim} image)"
    return f"{reduction.dim} of {full} ({reduction.text_dim} text, {reduction.image_dim} image)"


def _unindexed_rows(table: Table) -> int:
    """Return how many rows the vector index does not cover, because they were appended after it was built."""
    if table.meta.uses_exact_search:
        return 0
    stats = table.lancedb().index_stats(VECTOR_INDEX)
    return 0 if stats is None else int(stats.num_unindexed_rows)


def _still_true(report: Any, version: int) -> Any:
    """Return an index report without the counts of an earlier version, which are not those of the table now."""
    if not isinstance(report, dict) or report.get("version") == version:
        return report
    counts = ("table", "version", "rows", "train_rows", "num_unindexed_rows")
    kept = {name: value for name, value in report.items() if name not in counts}
    return {"measured_version": report.get("version"), **kept}
