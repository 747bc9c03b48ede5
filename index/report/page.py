"""The index report as one self-contained page: plots, retrieved examples, and every metric.

Example images are the originals if the table keeps them, else latents decoded by a decoder that the caller passes.
"""

import html
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from index.report.html import image_tag, page, svg
from index.report.html import table as html_table
from index.report.recall import evaluation_queries, evaluation_rows
from index.report.report import IndexReport
from index.search.ann import open_search
from index.space.queries import Purpose
from index.table.rows import RowReader
from index.table.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_EXAMPLES, NUM_NEIGHBORS = 6, 4
STYLE = "svg{max-width:32%} figure{width:11em} img{width:96px;height:96px;object-fit:cover;display:block}"
BLUE, RED, GRAY = "#4878a8", "#c44e52", "#888"

Decode = Callable[[Float32[np.ndarray, "B C H W"]], UInt8[np.ndarray, "B H W 3"]]
"""Latents to pixels."""


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A query's caption and the pairs retrieved for it, nearest first."""

    caption: str
    captions: list[str]
    distances: list[float]
    images: list[bytes] | None
    """Encoded images; None without originals and decoder."""

    def to_html(self) -> str:
        """Return the caption as a heading over one figure per retrieved pair."""
        figures = []
        for number, (caption, distance) in enumerate(zip(self.captions, self.distances, strict=True)):
            image = "" if self.images is None else image_tag(self.images[number], alt=caption)
            text = f"{html.escape(caption)}<br>distance {distance:.2f}"
            figures.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
        return f"<h3>{html.escape(self.caption)}</h3><p>{''.join(figures)}</p>"


def index_page(
    table: Table, report: IndexReport, *, decode: Decode | None = None, seed: int = 0, memory: int | None = None
) -> str:
    """Return the page of a report on `table`; retrieving its examples holds at most `memory` bytes of vectors."""
    nested = ("sweep", "candidates", "balance", "full_space", "warnings")
    metrics = [(name, value) for name, value in asdict(report).items() if name not in nested]
    if report.full_space is not None:
        metrics += list(asdict(report.full_space).items())
    if report.balance is not None:
        metrics += [(f"balance {name}", value) for name, value in asdict(report.balance).items()]
    parts = [
        *(f'<p class="warning">{html.escape(warning)}</p>' for warning in report.warnings),
        _plots(report),
        "<h2>Retrieved pairs of held-out captions with random R</h2>",
        *(example.to_html() for example in retrieve_examples(table, decode, seed=seed, memory=memory)),
        "<h2>All metrics</h2>",
        f"<p>{html.escape(measured_on(report))}</p>",
        html_table(metrics),
    ]
    return page(f"Index of {table.uri.rpartition('/')[2]}", "\n".join(parts), style=STYLE)


def measured_on(report: IndexReport) -> str:
    """Say on how many rows and queries the metrics of a report rest."""
    heldout = "held-out captions" if report.rows > report.train_rows else "training captions, as none are held out"
    queries = report.sweep_captions * report.sweep_points
    return (
        f"Recall and speed: {report.recall_queries:,} queries of {heldout}, which did not choose nprobes. "
        f"Hit counts: {report.hubness_queries:,} queries of training, which did not fit the balance; linear probe: "
        f"{report.linear_probe_queries:,} of them. Perplexity, self-retrieval rate and sweep: {queries:,} queries, "
        f"{report.sweep_captions:,} captions with {report.sweep_points:,} noise points each, against all "
        f"{report.sweep_rows:,} training rows."
    )


def retrieve_examples(
    table: Table, decode: Decode | None = None, *, seed: int = 0, memory: int | None = None
) -> list[Example]:
    """Retrieve the nearest pairs of a few evaluation queries, through the search that a trainer uses."""
    rows = evaluation_rows(table, NUM_EXAMPLES, seed=seed, purpose=Purpose.EXAMPLES)
    queries = evaluation_queries(table, NUM_EXAMPLES, seed=seed, purpose=Purpose.EXAMPLES)
    captions, reader = table.take(rows, "caption"), RowReader.of(table)
    pairs = open_search(table, memory=memory).nearest(queries, NUM_NEIGHBORS)
    # Fewer than NUM_NEIGHBORS if the table has fewer training rows.
    retrieved = reader.take(pairs.row_id.ravel(), ["caption"])[0].reshape(pairs.row_id.shape)
    images: list[bytes] | None = None
    if table.stores_images:
        images = reader.take(pairs.row_id.ravel(), ["image"])[0].tolist()
    elif decode is not None:
        images = _decoded(table, pairs.latent, decode)
    count = pairs.row_id.shape[1]
    return [
        Example(
            caption=str(captions[i]),
            captions=retrieved[i].tolist(),
            distances=np.sqrt(pairs.distance[i]).tolist(),
            images=None if images is None else images[i * count : (i + 1) * count],
        )
        for i in range(NUM_EXAMPLES)
    ]


def _decoded(table: Table, latent: Float16[np.ndarray, "B K L"], decode: Decode) -> list[bytes]:
    """Decode latents to PNG."""
    return [_png(pixels) for pixels in decode(latent.reshape(-1, *table.meta.latent_shape).astype(np.float32))]


def _png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def _plots(report: IndexReport) -> str:
    """Plot hit counts, recall against latency if an index was measured, and the sweep of desc_scale."""
    from matplotlib.figure import Figure

    plots = [_plot_hit_counts, *([_plot_recall] if report.candidates else []), _plot_sweep]
    images = []
    for plot in plots:
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        plot(figure.subplots(), report)
        images.append(svg(figure))
    return "".join(images)


def _plot_hit_counts(axes: "Axes", report: IndexReport) -> None:
    most = int(np.flatnonzero(report.hit_counts).max())
    rows = np.array(report.hit_counts[: most + 2], float)
    hits = np.arange(len(rows))
    mean = report.hubness_queries / report.train_rows
    # Poisson, term by term: the factorial of 32 overflows an int64.
    uniform = np.exp(-mean) * np.cumprod(np.concatenate([[1.0], mean / hits[1:]])) * rows.sum()
    axes.bar(hits, rows, color=BLUE, label="measured")
    axes.plot(hits, uniform, color=RED, marker=".", label="uniform sampling (Poisson)")
    last = f" ({hits[-1]}: or more)" if len(rows) == len(report.hit_counts) else ""
    axes.set(
        title=f"Hits per row in {report.hubness_queries:,} queries",
        xlabel=f"hits{last}",
        ylabel="rows",
        yscale="symlog",
    )
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="small")


def _plot_recall(axes: "Axes", report: IndexReport) -> None:
    for setting in dict.fromkeys((each.index_type, each.refine_factor) for each in report.candidates):
        points = [each for each in report.candidates if (each.index_type, each.refine_factor) == setting]
        index_type, refine_factor = setting
        label = index_type.upper() + (f", refine factor {refine_factor}" if refine_factor > 1 else "")
        axes.plot(
            [each.p50_ms for each in points], [each.tuning_recall_at_1 for each in points], marker="o", label=label
        )
        for each in points:
            axes.annotate(str(each.nprobes), (each.p50_ms, each.tuning_recall_at_1), fontsize=7)
    axes.set(title="Recall against latency, by nprobes", xlabel="ms per batch of 256 queries", ylabel="recall@1")
    axes.legend(fontsize="small")


def _plot_sweep(axes: "Axes", report: IndexReport) -> None:
    points = sorted([*report.sweep, report], key=lambda point: point.desc_scale)
    scales = [point.desc_scale for point in points]
    axes.plot(scales, [point.perplexity for point in points], marker="o", color=BLUE)
    axes.axvline(report.desc_scale, color=GRAY, linestyle=":")
    axes.set(title="Sweep of desc_scale", xlabel="desc_scale (dotted: this table)", xscale="log", yscale="log")
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0.9, max(10.0, 1.2 * max(point.perplexity for point in points)))
    axes.set_ylabel("perplexity of the target", color=BLUE)
    right = axes.twinx()
    right.plot(scales, [point.self_retrieval_rate for point in points], marker="s", color=RED)
    right.set_ylabel("self-retrieval rate", color=RED)
    right.set_ylim(-0.05, 1.05)
