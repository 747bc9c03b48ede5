"""Plots of an evaluation: a metric by number of inference steps, and calibration curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "run": "#1f4e8c",
    "train rows": "#2e8b57",
    "retrieved pairs": "#d08020",
    "train reconstructions": "#8a5aa8",
    "noise": "#b03030",
    "random rows": "#a07040",
    "nearest caption": "#20908d",
    "caption mean": "#c05a9a",
    "held-out rows": "#777777",
}
LOG_RANGE = 20
"""Ratio of the largest value to the smallest above which an axis is logarithmic."""


class Curve(NamedTuple):
    """One metric of one run or group of runs."""

    color: str
    points: dict[int, tuple[float, float]]
    """Mean and standard deviation by num_inference_steps."""


def plot_metric(
    title: str, goal: str, curves: Sequence[Curve], references: Mapping[str, float], *, log: bool = False
) -> "Figure":
    """Plot a metric over num_inference_steps with references as dashed lines; `log` allows a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 2.6), layout="constrained")
    axes = figure.subplots()
    for name, value in references.items():
        axes.axhline(value, color=COLORS[name], linewidth=1, linestyle="--")
    for curve in curves:
        means, deviations = zip(*curve.points.values(), strict=True)
        axes.errorbar(list(curve.points), means, deviations, color=curve.color, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    steps = sorted({n for curve in curves for n in curve.points})
    axes.set_xticks(steps, [str(n) for n in steps])
    values = [*references.values(), *(mean for curve in curves for mean, _ in curve.points.values())]
    if log and min(values) > 0 and max(values) > LOG_RANGE * min(values):
        _use_log_scale(axes)
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"inference steps ({goal})", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def plot_calibration(title: str, calibration: dict[str, Any]) -> "Figure":
    """Plot observed cosine similarity over predicted confidence; a calibrated run lies on the diagonal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    predicted, observed = ([row[name] for row in calibration["bins"]] for name in ("predicted", "observed"))
    axes.plot(predicted, observed, color=COLORS["run"], marker="o", markersize=4)
    axes.set_aspect("equal")
    error, rank = calibration["calibration_error"], calibration["rank_correlation"]
    axes.set_title(f"{title}\ncalibration error {error:.3f}, rank correlation {rank:.2f}", fontsize=9)
    axes.set_xlabel("predicted confidence", fontsize=8)
    axes.set_ylabel("observed cosine to the retrieved pair", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def _use_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
