"""An evaluation on one self-contained page: figures over steps beside their floors, whether confidence can be
believed, and samples beside what a perfect network would have drawn."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from trainer.evaluation.plots import COLORS, HALF, HIGHER, LOWER, NEITHER, Curve, diagram, over_steps, svg

if TYPE_CHECKING:
    from PIL.Image import Image

MEANING = {
    "frechet": ("of Gaussians fitted to both, in coordinates", LOWER),
    "sliced_wasserstein": ("root mean square over directions", LOWER),
    "energy_distance": ("2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased, so it may be below 0", LOWER),
    "two_sample_accuracy": ("of a classifier that tells samples from held-out rows", HALF),
    "precision": ("share of samples that lie among held-out rows", HIGHER),
    "recall": ("share of held-out rows that lie among samples", HIGHER),
    "density": ("how densely held-out rows lie around samples; 1 of equal laws", NEITHER),
    "coverage": ("share of held-out rows with a sample near", HIGHER),
    "diversity": ("distance of two samples of a caption, over that of two held-out rows", NEITHER),
    "nearest_ratio": ("median distance to the nearest training row, over that to the second", NEITHER),
    "copied_rate": ("share with that ratio below 1/3", NEITHER),
    "feature_frechet": ("in features of the referee, as pictures", LOWER),
    "feature_kernel": ("squared kernel distance in the same", LOWER),
    "class_accuracy": ("share that the referee takes for what the caption says", HIGHER),
    "caption_rank": ("mean, of the true caption among others, by the referee", LOWER),
    "caption_first": ("share whose true caption comes first", HIGHER),
    "inception_frechet": ("FID", LOWER),
    "inception_kernel": ("KID", LOWER),
    "clip_score": ("100 times the cosine of picture and caption", HIGHER),
    "confidence": ("mean, at the first step", ""),
    "evaluations": ("of the network, a picture", ""),
    "ms_per_latent": ("milliseconds to sample, captions encoded, nothing decoded", ""),
    "ms_per_decoding": ("milliseconds to decode a latent", ""),
}
"""What each figure is, and which way it is good; in the order of the page."""
STYLE = """body{font:15px/1.5 system-ui;margin:2em auto;max-width:76em;padding:0 1em}svg{max-width:24.5%;height:auto}
td,th{padding:.15em .6em;text-align:right}th:first-child{text-align:left}img{max-width:100%}td.meaning{text-align:left}
table{border-collapse:collapse;font-size:13px}tr:nth-child(even){background:#f4f4f4}td.run{font-weight:600}
.note{color:#555;font-size:13px}p b{white-space:nowrap}"""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>{style}</style>
<h1>{title}</h1><p>{told}</p><h2>Over steps, beside the floors</h2><p>{plots}</p>
<h2>Can its confidence be believed?</h2><p>{reliability}</p>
<h2>Pictures</h2><img alt="samples, retrieved pairs and held-out rows" src="data:image/png;base64,{pictures}">
<h2>All figures</h2><table>{figures}</table>{notes}</html>
"""


def steps_said(n: int) -> str:
    """A number of steps in words."""
    return f"{n} step{'s' * (n > 1)}"


def columns_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The run at each step count, the floors, and held-out rows themselves."""
    steps: dict[str, dict[str, float]] = {steps_said(int(n)): figures for n, figures in report["steps"].items()}
    return {**steps, **report["floors"], "held-out rows": report["heldout"]}


def lines_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The same the other way round, a line for each figure."""
    columns = columns_of(report)
    known = {name for figures in columns.values() for name in figures}
    return {
        name: {column: figures[name] for column, figures in columns.items() if name in figures}
        for name in MEANING
        if name in known
    }


def evaluation_page(report: dict[str, Any], pictures: "Image") -> str:
    """The page of a report, with a sheet of pictures."""
    key = " ".join(f'<b style="color:{color};white-space:nowrap">&#9644; {name}</b>' for name, color in COLORS.items())
    levels = report["floors"] | {"held-out rows": report["heldout"]}
    drawn = [
        over_steps(name, good, [curve], levels)
        for name, (_, good) in MEANING.items()
        if good and (curve := _curve(report, name)).points
    ]
    diagrams = [diagram(name, content) for name, content in report["reliability"].items()]
    sheet = io.BytesIO()
    pictures.save(sheet, "png")
    return PAGE.format(
        style=STYLE,
        title=html.escape(f"Evaluation of {report['run']}"),
        told=f"{report['samples']:,} samples for each step count, beside {report['heldout_rows']:,} held-out rows "
        f"(pictures: {report['heldout_pictures']}). {key}",
        plots="".join(svg(figure) for figure in drawn),
        reliability="".join(svg(figure) for figure in diagrams) or html.escape(report["left_out"]["reliability"]),
        pictures=base64.b64encode(sheet.getvalue()).decode(),
        figures=_table(report),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(report)),
    )


def _curve(report: dict[str, Any], name: str) -> Curve:
    steps = report["steps"].items()
    return Curve(COLORS["run"], {int(n): (figures[name], 0.0) for n, figures in steps if name in figures})


def _table(report: dict[str, Any]) -> str:
    columns = columns_of(report)
    runs = len(report["steps"])
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for name, line in lines_of(report).items():
        cells = (f"{line[column]:.4g}" if column in line else "" for column in columns)
        shown = "".join(f'<td class="{"run" if i < runs else ""}">{cell}</td>' for i, cell in enumerate(cells))
        meaning = "; ".join(part for part in MEANING[name] if part)
        body.append(f"<tr><th>{name.replace('_', ' ')}</th>{shown}<td class='meaning'>{html.escape(meaning)}</td></tr>")
    return f"<tr><th></th>{head}<td></td></tr>{''.join(body)}"


def _notes(report: dict[str, Any]) -> list[str]:
    referee = report["referee"]
    return [
        f"The referee is a {referee['kind']}, trained on decoded latents of {referee['trained_on']:,} training rows; "
        "all runs on this version of the table share it. "
        + (f"It ranks {referee['among']} captions." if referee["kind"] == "matcher" else ""),
        f"Times are on {report['device']}, {report['batch_size']} samples at once. The referee was trained in "
        f"{referee['seconds']:.0f} s, once; the evaluation took {report['seconds']:.0f} s.",
        *(f"Left out: {name}, because {reason}." for name, reason in report["left_out"].items()),
    ]
