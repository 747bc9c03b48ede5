"""Plots of an evaluation: a figure over steps beside its floors, and whether a confidence can be believed."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "run": "#1f4e8c",
    "train rows": "#2e8b57",
    "retrieved pairs": "#d08020",
    "reconstructions": "#8a5aa8",
    "gaussian": "#b03030",
    "held-out rows": "#777777",
}
LOWER, HIGHER, HALF, NEITHER = "lower is better", "higher is better", "0.5 is perfect", "best as real rows"


class Curve(NamedTuple):
    """One figure of one kind of run."""

    color: str
    points: dict[int, tuple[float, float]]
    """By number of steps: mean and standard deviation."""


def over_steps(name: str, good: str, curves: Sequence[Curve], levels: Mapping[str, Mapping[str, float]]) -> "Figure":
    """One figure over steps, floors as horizontal lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    known = {floor: figures[name] for floor, figures in levels.items() if name in figures}
    figure = Figure(figsize=(3.4, 2.6), layout="constrained")
    axes = figure.subplots()
    for floor, value in known.items():
        axes.axhline(value, color=COLORS[floor], linewidth=1, linestyle="--")
    for curve in curves:
        means, spreads = zip(*curve.points.values(), strict=True)
        axes.errorbar(list(curve.points), means, spreads, color=curve.color, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    steps = sorted({n for curve in curves for n in curve.points})
    axes.set_xticks(steps, [str(n) for n in steps])
    values = [mean for curve in curves for mean, _ in curve.points.values()] + list(known.values())
    if good == LOWER and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.set_title(name.replace("_", " "), fontsize=10)
    axes.set_xlabel(f"steps ({good})", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def diagram(name: str, content: dict[str, Any]) -> "Figure":
    """What was said against what came of it; on the diagonal it can be believed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    said, came = ([bin[side] for bin in content["bins"]] for side in ("said", "came"))
    axes.plot(said, came, color=COLORS["run"], marker="o", markersize=4)
    axes.set_aspect("equal")
    error, rank = content["calibration_error"], content["rank_correlation"]
    axes.set_title(f"{name.replace('_', ' ')}\ncalibration error {error:.3f}, rank correlation {rank:.2f}", fontsize=9)
    axes.set_xlabel("said", fontsize=8)
    axes.set_ylabel("cosine to the searched pair", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def svg(figure: "Figure") -> str:
    """A figure as it stands in a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
