"""The index report as one self-contained page: what the table's figures look like, and what its search finds.

Pictures are the kept originals where there are any, and else latents decoded by the table's own image encoder.
"""

import base64
import html
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float16, UInt8

from index.errors import EncoderError
from index.report.recall import evaluation_queries, evaluation_rows
from index.search.ann import open_search
from index.table.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUERIES, NEAREST = 6, 4
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui;margin:2em auto;max-width:66em;padding:0 1em}}svg{{max-width:32%;height:auto}}
table{{border-collapse:collapse}}td,th{{padding:.15em .9em;text-align:left;vertical-align:top}}
img{{width:96px;height:96px;object-fit:cover;display:block}}figcaption{{font-size:12px;line-height:1.3}}
figure{{margin:0 .8em 0 0;display:inline-block;width:11em;vertical-align:top}}
.warn{{background:#fff3cd;padding:.4em 1em}}</style>
<h1>{title}</h1>{warnings}{plots}
<h2>What a description and a random point find</h2>{found}
<h2>All figures</h2><table>{figures}</table></html>
"""


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """The pairs nearest to one query."""

    asked: str
    """The caption whose description was asked for."""
    captions: list[str]
    distances: list[float]
    pictures: list[bytes] | None
    """PNG or whatever was kept; None where latents cannot be decoded."""


def index_page(table: Table, report: dict[str, Any], *, seed: int = 0) -> str:
    """HTML of a report that `build_index` made of `table`."""
    title = html.escape(f"Index of {table.uri.rpartition('/')[2]}")
    warnings = "".join(f'<p class="warn">{html.escape(text)}</p>' for text in report["warnings"])
    figures = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(json.dumps(value))}</td></tr>"
        for name, value in report.items()
        if name not in ("ladder", "alternatives", "warnings")
    )
    found = "".join(_shown(each) for each in find_examples(table, seed=seed))
    return PAGE.format(title=title, warnings=warnings, plots=_plots(report), found=found, figures=figures)


def find_examples(table: Table, *, seed: int = 0) -> list[Found]:
    """What a few queries of the real law find, through the search that a trainer uses."""
    asked = table.take(evaluation_rows(table, QUERIES, seed=seed), "caption")
    pairs = open_search(table).nearest(evaluation_queries(table, QUERIES, seed=seed), NEAREST)
    captions = table.take_row_ids(pairs.row.ravel(), "caption").reshape(pairs.row.shape)
    if "image" in table.dataset().schema.names:
        pictures = table.take_row_ids(pairs.row.ravel(), "image").tolist()
    else:
        pictures = _decoded(table, pairs.latent.reshape(-1, *table.meta.latent_shape))
    return [
        Found(
            asked=str(asked[number]),
            captions=captions[number].tolist(),
            distances=np.sqrt(pairs.distance[number]).tolist(),
            pictures=None if pictures is None else pictures[number * NEAREST : (number + 1) * NEAREST],
        )
        for number in range(QUERIES)
    ]


def _decoded(table: Table, latents: Float16[np.ndarray, "B C H W"]) -> list[bytes] | None:
    """PNG pictures of latents; None where the table's encoder is not at hand."""
    from pipeline.encoders import DiffusersAutoencoder

    try:
        encoder = DiffusersAutoencoder(table.meta.image_encoder.name)
    except EncoderError:
        return None
    if encoder.ref.digest != table.meta.image_encoder.digest:
        return None
    return [_png(pixels) for pixels in encoder.decode(latents.astype(np.float32))]


def _png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def _shown(found: Found) -> str:
    parts = []
    for number, (caption, distance) in enumerate(zip(found.captions, found.distances, strict=True)):
        picture = ""
        if found.pictures is not None:
            data = base64.b64encode(found.pictures[number]).decode()
            picture = f'<img alt="" src="data:image;base64,{data}">'
        parts.append(
            f"<figure>{picture}<figcaption>{html.escape(caption)}<br>distance {distance:.2f}</figcaption></figure>"
        )
    return f"<h3>{html.escape(found.asked)}</h3><p>{''.join(parts)}</p>"


def _plots(report: dict[str, Any]) -> str:
    """Shares, recall against latency, and the ladder of desc_scale, as SVG."""
    return "".join(
        _svg(draw, report)
        for draw, wanted in ((_draw_hits, "hits"), (_draw_recall, "alternatives"), (_draw_ladder, "ladder"))
        if report[wanted]
    )


def _svg(draw: Any, report: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    draw(figure.subplots(), report)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw_hits(axes: "Axes", report: dict[str, Any]) -> None:
    most = int(np.flatnonzero(report["hits"]).max())
    rows = np.array(report["hits"][: most + 2], float)
    times = np.arange(len(rows))
    mean = report["draws"] / report["train_rows"]
    # Poisson, term by term: a factorial of 32 is too large for nothing.
    even = np.exp(-mean) * np.cumprod(np.concatenate([[1.0], mean / times[1:]])) * rows.sum()
    axes.bar(times, rows, color="#4878a8", label="rows")
    axes.plot(times, even, color="#c44e52", marker=".", label="if all shares were even")
    last = f" ({times[-1]}: or more)" if len(rows) == len(report["hits"]) else ""
    axes.set(title=f"Times drawn, in {report['draws']:,} draws", xlabel=f"times{last}", yscale="symlog")
    axes.legend()


def _draw_recall(axes: "Axes", report: dict[str, Any]) -> None:
    tried = report["alternatives"]
    for name, refine_factor in dict.fromkeys((line["index_type"], line["refine_factor"]) for line in tried):
        lines = [line for line in tried if (line["index_type"], line["refine_factor"]) == (name, refine_factor)]
        label = name if refine_factor == 1 else f"{name}, {refine_factor} rows re-ranked"
        axes.plot([line["p50_ms"] for line in lines], [line["recall_at_1"] for line in lines], marker="o", label=label)
        for line in lines:
            axes.annotate(str(line["nprobes"]), (line["p50_ms"], line["recall_at_1"]), fontsize=7)
    axes.set(title="recall@1 by probes", xlabel="ms for a batch of 256 queries")
    axes.legend()


def _draw_ladder(axes: "Axes", report: dict[str, Any]) -> None:
    rungs = sorted([*report["ladder"], report], key=lambda rung: float(rung["desc_scale"]))
    scales = [rung["desc_scale"] for rung in rungs]
    axes.plot(scales, [rung["perplexity"] for rung in rungs], marker="o", color="#4878a8")
    axes.axvline(report["desc_scale"], color="#888", linestyle=":")
    axes.set(title="What desc_scale does", xlabel="desc_scale (dotted: this table's)", xscale="log", yscale="log")
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0.9, max(10.0, 1.2 * max(rung["perplexity"] for rung in rungs)))
    axes.set_ylabel("perplexity of the target", color="#4878a8")
    right = axes.twinx()
    right.plot(scales, [rung["self_retrieval_rate"] for rung in rungs], marker="s", color="#c44e52")
    right.set_ylabel("own-pair rate", color="#c44e52")
    right.set_ylim(-0.05, 1.05)
