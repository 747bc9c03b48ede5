"""Several runs side by side: the same captions and seeds, one table and one self-contained page."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from index.console import write_json
from trainer.evaluation.evaluate import evaluate
from trainer.sampler import Coalescer

PAGE = """<!doctype html><meta charset="utf-8"><title>Coalescer: runs compared</title>
<style>body{{font:15px/1.5 system-ui;margin:2em auto;max-width:70em}}td,th{{padding:.2em .8em;text-align:right}}
th:first-child,td:first-child{{text-align:left}}img{{width:72px;margin:2px}}</style>
<h1>Runs compared</h1><p>Distances to held-out rows in coordinates; lower is better. Floors: {floors}.</p>{tables}
"""


def compare(runs: list[Path], *, steps: list[int], captions: list[str], out: Path, seed: int = 0) -> dict[str, Any]:
    """Evaluate every run, sample the same captions from each; writes OUT/report.json and OUT/index.html."""
    reports = {
        str(run): evaluate(run, steps=steps, out=out / "runs" / f"{number}-{run.name}", seed=seed)
        for number, run in enumerate(runs, 1)
    }
    tables = []
    for metric in ("frechet", "sliced_wasserstein"):
        head = "".join(f"<th>{n} steps</th>" for n in steps)
        body = "".join(
            f"<tr><td>{html.escape(run)}</td>"
            + "".join(f"<td>{report['steps'][str(n)][metric]:.3f}</td>" for n in steps)
            for run, report in reports.items()
        )
        tables.append(f"<h2>{metric.replace('_', ' ')}</h2><table><tr><th>run</th>{head}</tr>{body}</table>")
    for run in runs if captions else []:
        coalescer = Coalescer.from_pretrained(run)
        tables.append(f"<h2>{html.escape(str(run))}, {steps[-1]} steps</h2>")
        for caption in captions:
            images = coalescer(caption, steps=steps[-1], num=4, seed=seed).images
            tables.append(f"<p>{html.escape(caption)}<br>{''.join(_inline(image) for image in images)}</p>")
    first = next(iter(reports.values()))
    floors = ", ".join(f"{name} {figures['frechet']:.3f}" for name, figures in first["floors"].items())
    result = {"runs": reports, "captions": captions, "seed": seed}
    write_json(out / "report.json", result)
    (out / "index.html").write_text(PAGE.format(floors=f"Frechet distance of {floors}", tables="".join(tables)))
    return result


def _inline(image: Any) -> str:
    data = io.BytesIO()
    image.save(data, "png")
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
