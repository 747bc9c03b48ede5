"""Plot quality against intrinsic dimension, with one and two steps side by side."""

from pathlib import Path
from typing import Any

SERIES = {
    ("coalescer", "default", "nearest"): ("coalescer, default", "#1f4e8c", "o"),
    ("coalescer", "time", "nearest"): ("coalescer, time conditioning", "#3d85c6", "x"),
    ("coalescer", "paper", "nearest"): ("coalescer, paper", "#6fa8dc", "s"),
    ("flow_matching", "default", "nearest"): ("flow matching, nearest pairs", "#d08020", "^"),
    ("flow_matching", "default", "independent"): ("flow matching, independent pairs", "#b03030", "v"),
    ("mean_flow", "default", "nearest"): ("MeanFlow, nearest pairs", "#c39bd3", "d"),
    ("mean_flow", "default", "independent"): ("MeanFlow, independent pairs", "#8a5aa8", "D"),
    ("consistency", "default", "independent"): ("consistency, independent pairs", "#2e8b57", "P"),
    ("retrieved pairs", "", "nearest"): ("retrieved pairs (a perfect network)", "#777777", None),
    ("training rows", "", ""): ("training rows (as good as it gets)", "#111111", None),
}
"""Label, color and marker of each line in the plot."""
PANELS = {"frechet": "Frechet distance / 64 (lower is better)", "coverage": "coverage (higher is better)"}
STEPS = (1, 2)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot the lines of `intrinsic_dimension.table` into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 8.2), layout="constrained")
    panels = figure.subplots(len(PANELS), len(STEPS), sharex=True, sharey="row")
    dims = sorted({line["k"] for line in lines})
    for row, (metric, label) in zip(panels, PANELS.items(), strict=True):
        for axes, steps in zip(row, STEPS, strict=True):
            for key, (name, color, marker) in SERIES.items():
                series = [
                    line
                    for line in lines
                    if (line["objective"], line["preset"], line["pairs"]) == key and line["steps"] in (0, steps)
                ]
                axes.errorbar(
                    [line["k"] for line in series],
                    [line[metric]["mean"] for line in series],
                    [line[metric]["sd"] or 0 for line in series],
                    label=name,
                    color=color,
                    marker=marker,
                    markersize=5,
                    linestyle="-" if marker else "--",
                    capsize=2,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(dims, [str(k) for k in dims])
            axes.set_title(f"{steps} step{'s' * (steps > 1)}", fontsize=11)
            axes.grid(alpha=0.25)
        if metric == "frechet":
            row[0].set_yscale("log")
        row[0].set_ylabel(label)
    for axes in panels[-1]:
        axes.set_xlabel("intrinsic dimension k of the data, in 64 dimensions")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
