"""Self-contained pages and terminal tables of an evaluation and of a comparison of runs."""

import html
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from index.report.html import image_tag, page, svg
from trainer.evaluation.plots import COLORS, Curve, plot_calibration, plot_metric

if TYPE_CHECKING:
    from PIL.Image import Image

LOWER, HIGHER, HALF, REAL = "lower is better", "higher is better", "0.5 is best", "best as of real rows"


class Metric(NamedTuple):
    """What a metric means and which values are good."""

    meaning: str
    goal: str = ""
    """Empty for metrics that are not plotted."""


METRICS = {
    "non_finite_rate": Metric("fraction of samples that are not finite; the other metrics are of the finite ones"),
    "frechet": Metric("Frechet distance of Gaussians fitted to both sets, in coordinates", LOWER),
    "sliced_wasserstein": Metric("root mean square over random directions", LOWER),
    "energy_distance": Metric("2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased, so possibly below 0", LOWER),
    "two_sample_accuracy": Metric("accuracy of a classifier of samples against held-out rows", HALF),
    "precision": Metric("fraction of samples in the neighborhood of a held-out row", HIGHER),
    "recall": Metric("fraction of held-out rows in the neighborhood of a sample", HIGHER),
    "density": Metric("neighborhoods of held-out rows per sample; 1 for equal distributions", REAL),
    "coverage": Metric("fraction of held-out rows with a sample in their neighborhood", HIGHER),
    "diversity": Metric("distance of two samples of one caption, relative to two held-out rows", REAL),
    "energy_score": Metric("distance to a caption's held-out rows, less half the spread, in coordinates", LOWER),
    "energy_score_error": Metric("its standard error over captions"),
    "energy_score_distance": Metric("mean distance of samples to the held-out rows of their caption"),
    "energy_score_spread": Metric("mean distance of two samples of one caption"),
    "nearest_ratio": Metric("median distance to the nearest training row, relative to that of another image", REAL),
    "copied_rate": Metric("fraction of samples with a ratio below 1/3", REAL),
    "feature_frechet": Metric("Frechet distance of the referee's image features", LOWER),
    "feature_mmd": Metric("squared kernel distance of the same features", LOWER),
    "feature_energy_score": Metric("the energy score in the same features", LOWER),
    "feature_energy_score_error": Metric("its standard error over captions"),
    "feature_energy_score_distance": Metric("mean distance to the held-out images of the caption, in features"),
    "feature_energy_score_spread": Metric("mean distance of two images of one caption, in features"),
    "class_accuracy": Metric("fraction of images that the referee classifies as their caption", HIGHER),
    "class_accuracy_error": Metric("its standard error"),
    "caption_rank": Metric("mean rank of the true caption among candidates, by the referee", LOWER),
    "caption_top1": Metric("fraction of images whose true caption ranks first", HIGHER),
    "caption_top1_error": Metric("its standard error, samples of one caption taken together"),
    "fid": Metric("Frechet distance of Inception features", LOWER),
    "kid": Metric("squared kernel distance of Inception features", LOWER),
    "clip_score": Metric("100 times the cosine similarity of image and caption", HIGHER),
    "confidence": Metric("mean confidence at the first step"),
    "network_evaluations": Metric("per sample"),
    "ms_per_latent": Metric("milliseconds to sample a latent, without text encoding and decoding"),
    "ms_per_decoding": Metric("milliseconds to decode a latent"),
}
"""All metrics, in the order of the pages."""
MAIN = (
    "non_finite_rate",
    "frechet",
    "feature_frechet",
    "two_sample_accuracy",
    "recall",
    "coverage",
    "class_accuracy",
    "caption_top1",
)
"""Metrics of a comparison that are shown on the terminal."""
ERRORS_KNOWN = tuple(name.removesuffix("_error") for name in METRICS if name.endswith("_error"))
"""Metrics whose references are shown with their standard errors."""
GROUP_COLORS = (
    "#1f4e8c",
    "#c0392b",
    "#1e8449",
    "#8e44ad",
    "#d68910",
    "#117a8b",
    "#7b4a12",
    "#d6336c",
    "#5f6a6a",
    "#6c9a0f",
)
STYLE = """body{max-width:76em}svg{max-width:24.5%;height:auto}img{max-width:100%}table{font-size:13px}
td,th{padding:.15em .6em;text-align:right}th:first-child,td.meaning{text-align:left}td.run{font-weight:600}
tr:nth-child(even){background:#8882}.note{opacity:.8;font-size:13px}b{white-space:nowrap}"""


def evaluation_page(report: dict[str, Any], grid: "Image") -> str:
    """Return the page of an evaluation, with a grid of images."""
    references = all_references(report)
    curves = {name: _run_curve(report, name) for name in METRICS}
    plots = [_plot(name, [curve], references) for name, curve in curves.items() if curve.points and METRICS[name].goal]
    diagrams = [svg(plot_calibration(_title(name), content)) for name, content in report["calibration"].items()]
    left_out = html.escape(report["left_out"].get("calibration", ""))
    body = [
        f"<p>{_sizes(report)}. {_legend(COLORS)}</p>",
        f"<h2>Metrics by inference steps, with references</h2><p>{''.join(plots)}</p>",
        f"<h2>Calibration of the confidence</h2><p>{''.join(diagrams) or left_out}</p>",
        f"<h2>Images</h2>{_image(grid, 'samples, retrieved pairs and held-out rows')}",
        f"<h2>All metrics</h2>{_metrics_table(report)}",
        *(f'<p class="note">{html.escape(note)}</p>' for note in _notes(report)),
    ]
    return page(f"Evaluation of {report['run']}", "\n".join(body), style=STYLE)


def comparison_page(report: dict[str, Any], grids: "Sequence[Image]") -> str:
    """Return the page of a comparison, with grids of images."""
    colors = dict(zip(report["groups"], itertools.cycle(GROUP_COLORS), strict=False))
    names = [name for name in METRICS if _is_measured(report, name)]
    references = {name: row for name, row in all_references(report).items() if name != "held-out rows"}
    reference_colors = {name: COLORS[name] for name in references}
    plots = [_plot(name, _group_curves(report, name, colors), references) for name in names if METRICS[name].goal]
    body = [
        f"<p>{_sizes(report)} of {html.escape(report['table']['uri'])}. Runs that differ only in their seed are one "
        "group: the mean, with one standard deviation as error bar.</p>",
        f"<p>{_legend(colors)} references: {_legend(reference_colors, '&#9476;')}</p>",
        *(f'<p class="note">{html.escape(line)}</p>' for line in _runs_by_group(report)),
        f"<h2>Metrics by inference steps, with references</h2><p>{''.join(plots)}</p>",
        f"<h2>Images, {steps_label(report['shown_num_inference_steps'])} each</h2>",
        *(f"<p>{_image(grid, 'samples')}</p>" for grid in grids),
        f"<h2>All metrics</h2>{_training_table(report)}",
        *(_group_table(report, name) for name in names),
    ]
    return page("Comparison of runs", "\n".join(body), style=STYLE)


def all_references(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of everything that needs no run."""
    return {**report["references"], **report["energy_score_references"], "held-out rows": report["heldout"]}


def metrics_by_name(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return a row for each metric of an evaluation: the run by steps, the references, and held-out rows themselves.

    References of the energy score alone are left out.
    """
    columns = {name: row for name, row in _columns(report).items() if name not in report["energy_score_references"]}
    return _rows(columns)


def _rows(columns: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    rows = {name: {column: row[name] for column, row in columns.items() if name in row} for name in METRICS}
    return {name: row for name, row in rows.items() if row}


def metrics_with_goals(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `metrics_by_name` with a column that says which values are good."""
    goals = {LOWER: "lower", HIGHER: "higher", HALF: "0.5", REAL: "as real", "": "-"}
    return {name: {"best": goals[METRICS[name].goal], **row} for name, row in metrics_by_name(report).items()}


def main_metrics(report: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the main metrics of a comparison: for each metric a row per group, with its means by steps."""
    return {
        name: {
            label: {steps_label(int(n)): row[name][0] for n, row in group["metrics"].items() if name in row}
            for label, group in report["groups"].items()
        }
        for name in MAIN
        if _is_measured(report, name) and not (name == "non_finite_rate" and _are_all_finite(report))
    }


def metric_title(report: dict[str, Any], name: str) -> str:
    """Return the name of a metric, which values are good, and the largest standard error of a run of a comparison."""
    rows = [row for run in report["runs"] for row in run["metrics"].values()]
    errors = [row[f"{name}_error"] for row in rows if f"{name}_error" in row]
    notes = [METRICS[name].goal, f"standard error of a run up to {max(errors):.2g}" if errors else ""]
    shown = "; ".join(note for note in notes if note)
    return f"{name} ({shown})" if shown else name


def reference_line(report: dict[str, Any], name: str) -> str:
    """Return a metric of all references as one line, with standard errors where they are known."""
    parts = []
    for reference, row in all_references(report).items():
        error = f" ± {row[f'{name}_error']:.2g}" if f"{name}_error" in row else ""
        parts += [f"{reference} {row[name]:.4g}{error}"] if name in row else []
    return ", ".join(parts)


def steps_label(n: int) -> str:
    """Return a number of inference steps in words."""
    return f"{n} step{'s' * (n > 1)}"


def format_value(mean: float, deviation: float) -> str:
    """Return a mean as HTML, with its standard deviation unless that is zero."""
    text = f"{mean:,.0f}" if abs(mean) >= 10_000 else f"{mean:.4g}"
    return text + (f" &plusmn; {deviation:.2g}" if deviation else "")


def _columns(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    run = {steps_label(int(n)): row for n, row in report["metrics"].items()}
    return {**run, **all_references(report)}


def _is_measured(report: dict[str, Any], name: str) -> bool:
    return any(name in row for group in report["groups"].values() for row in group["metrics"].values())


def _runs_by_group(report: dict[str, Any]) -> list[str]:
    runs = {label: [run["run"] for run in report["runs"] if run["label"] == label] for label in report["groups"]}
    return [f"{label}: {', '.join(paths)}" for label, paths in runs.items()]


def _are_all_finite(report: dict[str, Any]) -> bool:
    rows = [row for group in report["groups"].values() for row in group["metrics"].values()]
    return not any(row["non_finite_rate"][0] for row in rows if "non_finite_rate" in row)


def _plot(name: str, curves: Sequence[Curve], references: dict[str, dict[str, float]]) -> str:
    values = {reference: row[name] for reference, row in references.items() if name in row}
    goal = METRICS[name].goal
    return svg(plot_metric(_title(name), goal, curves, values, log=goal == LOWER))


def _run_curve(report: dict[str, Any], name: str) -> Curve:
    return Curve(COLORS["run"], {int(n): (row[name], 0.0) for n, row in report["metrics"].items() if name in row})


def _group_curves(report: dict[str, Any], name: str, colors: dict[str, str]) -> list[Curve]:
    return [
        Curve(colors[label], {int(n): tuple(row[name]) for n, row in group["metrics"].items() if name in row})
        for label, group in report["groups"].items()
        if any(name in row for row in group["metrics"].values())
    ]


def _metrics_table(report: dict[str, Any]) -> str:
    """Return a row for each metric and a column for each number of steps and reference."""
    columns, runs = _columns(report), len(report["metrics"])
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for name, row in _rows(columns).items():
        cells = [f"{row[column]:.4g}" if column in row else "" for column in columns]
        cells = [f'<td class="run">{cell}</td>' if i < runs else f"<td>{cell}</td>" for i, cell in enumerate(cells)]
        body.append(f'<tr><th>{_title(name)}</th>{"".join(cells)}<td class="meaning">{_meaning(name)}</td></tr>')
    return f"<table><tr><th></th>{head}<td></td></tr>{''.join(body)}</table>"


def _group_table(report: dict[str, Any], name: str) -> str:
    """Return a row for each group and reference and a column for each number of steps."""
    steps = report["num_inference_steps"]
    rows = [
        _table_row(label, [group["metrics"][str(n)].get(name) for n in steps])
        for label, group in report["groups"].items()
    ]
    rows += [
        _table_row(reference, [[row[name], 0.0]]) for reference, row in all_references(report).items() if name in row
    ]
    head = "".join(f"<th>{n}</th>" for n in steps)
    title = f'<h3>{_title(name)}</h3><p class="note">{_meaning(name)}</p>'
    return f"{title}<table><tr><th>inference steps</th>{head}</tr>{''.join(rows)}</table>"


def _training_table(report: dict[str, Any]) -> str:
    """Return what training cost: a row for each group."""
    names = next(iter(report["groups"].values()))["training"]
    head = "".join(f"<th>{name}</th>" for name in ("runs", *names))
    rows = [
        _table_row(label, [[float(group["runs"]), 0.0], *group["training"].values()])
        for label, group in report["groups"].items()
    ]
    return f"<h3>training</h3><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _table_row(label: str, values: Iterable[list[float] | None]) -> str:
    cells = "".join(f"<td>{'' if value is None else format_value(*value)}</td>" for value in values)
    return f"<tr><th>{html.escape(label)}</th>{cells}</tr>"


def _title(name: str) -> str:
    return name.replace("_", " ")


def _meaning(name: str) -> str:
    return html.escape("; ".join(part for part in METRICS[name] if part))


def _sizes(report: dict[str, Any]) -> str:
    return (
        f"{report['num_samples']:,} samples for each number of steps, {report['heldout_rows']:,} held-out rows "
        f"(images: {report['heldout_images']})"
    )


def _legend(colors: dict[str, str], marker: str = "&#9644;") -> str:
    return " ".join(f'<b style="color:{color}">{marker} {html.escape(name)}</b>' for name, color in colors.items())


def _image(image: "Image", alt: str) -> str:
    data = io.BytesIO()
    image.save(data, "png")
    return image_tag(data.getvalue(), alt=alt)


def _notes(report: dict[str, Any]) -> list[str]:
    referee = report["referee"]
    ranking = f" It ranks the true caption among {referee['candidates']}." if referee["type"] == "matcher" else ""
    return [
        f"The referee is a {referee['type']}, trained on decoded latents of {referee['train_rows']:,} training rows; "
        f"all runs on this version of the table share it.{ranking}",
        f"Times were measured on {report['device']} with batches of {report['batch_size']} samples. Training the "
        f"referee took {referee['seconds']:.0f} s, once; this evaluation took {report['seconds']:.0f} s.",
        *(f"Left out: {name}, because {reason}." for name, reason in report["left_out"].items()),
    ]
