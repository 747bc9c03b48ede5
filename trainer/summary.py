"""What a run came to, on one self-contained page: its curves, its figures, and pictures of held-out captions."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from index.console import write_text
from index.schema import HELDOUT, TRAIN
from index.table import Table
from trainer.grid import draw_grid
from trainer.sampler import Coalescer

SHOWN, STEPS = 16, 2
CURVES = ("loss", "distance", "direction", "direction_length", "velocity", "gradient_norm", "waiting", "rate")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui;margin:2em auto;max-width:70em;padding:0 1em}}svg{{max-width:24%;height:auto}}
td,th{{padding:.15em .9em;text-align:left}}img{{max-width:100%}}</style>
<h1>{title}</h1><p>{curves}</p><h2>{shown}</h2><img alt="samples" src="data:image/png;base64,{samples}">
<h2>All figures</h2><table>{figures}</table></html>
"""


def write_summary(out: Path, table: Table, result: dict[str, Any], *, device: str) -> None:
    """Write RUN/samples.png, of held-out captions where any are held out, and RUN/index.html."""
    split = HELDOUT if len(table.offsets(HELDOUT)) else TRAIN
    captions = table.take(table.offsets(split)[:SHOWN], "caption").tolist()
    samples = Coalescer.from_pretrained(out, device=device)(captions, steps=STEPS)
    draw_grid(samples.images, captions, out / "samples.png")
    page = PAGE.format(
        title=html.escape(f"Run {out.name}"),
        curves="".join(_curves(out / "log.jsonl")),
        shown=f"Captions of {'held-out' if split == HELDOUT else 'training'} rows, {STEPS} steps each",
        samples=base64.b64encode((out / "samples.png").read_bytes()).decode(),
        figures="".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in result.items()),
    )
    write_text(out / "index.html", page)


def _curves(log: Path) -> list[str]:
    """An SVG for each figure that was logged, over images."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    drawn = []
    for name in (name for name in CURVES if name in lines[-1]):
        figure = Figure(figsize=(3.4, 2.6), layout="constrained")
        axes = figure.subplots()
        points = [(line["done"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), color="#4878a8", linewidth=1)
        axes.set(title=name.replace("_", " "), xlabel="images")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        drawn.append(text.getvalue()[text.getvalue().index("<svg") :])
    return drawn
