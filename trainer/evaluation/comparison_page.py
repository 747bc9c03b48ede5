"""A comparison on one self-contained page: every figure over steps, a line for each kind of run, and their pictures."""

import base64
import html
import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.evaluation.plots import COLORS, Curve, over_steps, svg
from trainer.evaluation.report import MEANING, STYLE, steps_said

if TYPE_CHECKING:
    from PIL.Image import Image

LINES = ("#1f4e8c", "#c0392b", "#1e8449", "#8e44ad", "#d68910", "#117a8b", "#7b4a12", "#d6336c", "#5f6a6a", "#6c9a0f")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs compared</title>
<style>{style}</style>
<h1>Runs compared</h1><p>{told}</p><p>{key}</p><h2>Over steps, beside the floors</h2><p>{plots}</p>
<h2>Pictures, {shown} steps each</h2>{pictures}<h2>All figures</h2>{tables}</html>
"""


def comparison_page(report: dict[str, Any], sheets: "Sequence[Image]") -> str:
    """The page of a comparison, with sheets of pictures."""
    colors = dict(zip(report["lines"], itertools.cycle(LINES), strict=False))
    names = [name for name, (_, good) in MEANING.items() if good and _known(report, name)]
    return PAGE.format(
        style=STYLE,
        told=f"{report['samples']:,} samples for each step count, beside {report['heldout_rows']:,} held-out rows of "
        f"{html.escape(report['table']['uri'])} (pictures: {report['heldout_pictures']}). Mean of runs that differ by "
        "their seed; bars are one standard deviation.",
        key=" ".join(f'<b style="color:{c}">&#9644; {html.escape(label)}</b>' for label, c in colors.items())
        + " floors: "
        + " ".join(f'<b style="color:{COLORS[floor]}">&#9476; {floor}</b>' for floor in report["floors"]),
        plots="".join(
            svg(over_steps(name, MEANING[name][1], _curves(report, name, colors), report["floors"])) for name in names
        ),
        shown=report["shown_steps"],
        pictures="".join(f'<p><img alt="samples" src="data:image/png;base64,{_png(sheet)}"></p>' for sheet in sheets),
        tables=_cost(report) + "".join(_table(report, name) for name in MEANING if _known(report, name)),
    )


MAIN = ("frechet", "feature_frechet", "two_sample_accuracy", "recall", "coverage", "class_accuracy", "caption_first")
"""What the terminal shows."""


def columns_of(report: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The main figures: for each a line for each kind of run, and means by steps."""
    return {
        name: {
            label: {steps_said(int(n)): figures[name][0] for n, figures in line["steps"].items() if name in figures}
            for label, line in report["lines"].items()
        }
        for name in MAIN
        if _known(report, name)
    }


def _known(report: dict[str, Any], name: str) -> bool:
    return any(name in figures for line in report["lines"].values() for figures in line["steps"].values())


def _curves(report: dict[str, Any], name: str, colors: dict[str, str]) -> list[Curve]:
    """The lines that have a figure."""
    return [
        Curve(colors[label], {int(n): tuple(figures[name]) for n, figures in line["steps"].items()})
        for label, line in report["lines"].items()
        if all(name in figures for figures in line["steps"].values())
    ]


def _table(report: dict[str, Any], name: str) -> str:
    """One figure: a line for each kind of run and floor, a column for each number of steps."""
    head = "".join(f"<th>{n}</th>" for n in report["steps"])
    body = [
        _line(label, [line["steps"][str(n)].get(name) for n in report["steps"]])
        for label, line in report["lines"].items()
    ]
    floors = report["floors"] | {"held-out rows": report["heldout"]}
    body += [_line(floor, [[figures[name], 0.0]]) for floor, figures in floors.items() if name in figures]
    meaning = "; ".join(part for part in MEANING[name] if part)
    title = f"<h3>{name.replace('_', ' ')}</h3><p class='note'>{html.escape(meaning)}</p>"
    return f"{title}<table><tr><th>steps</th>{head}</tr>{''.join(body)}</table>"


def _cost(report: dict[str, Any]) -> str:
    """What training took."""
    names = next(iter(report["lines"].values()))["training"]
    head = "".join(f"<th>{name}</th>" for name in ("runs", *names))
    body = [
        _line(label, [[float(line["runs"]), 0.0], *line["training"].values()])
        for label, line in report["lines"].items()
    ]
    return f"<h3>training</h3><table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _line(label: str, cells: Sequence[list[float] | None]) -> str:
    shown = "".join(f"<td>{'' if cell is None else said(*cell)}</td>" for cell in cells)
    return f"<tr><th>{html.escape(label)}</th>{shown}</tr>"


def said(mean: float, spread: float) -> str:
    """A mean, with its standard deviation where there is one."""
    short = f"{mean:,.0f}" if abs(mean) >= 10_000 else f"{mean:.4g}"
    return short + (f" &plusmn; {spread:.2g}" if spread else "")


def _png(image: "Image") -> str:
    data = io.BytesIO()
    image.save(data, "png")
    return base64.b64encode(data.getvalue()).decode()
