"""What a run came to, on one self-contained page: its curves, its figures, and pictures of held-out captions."""

import base64
import html
import io
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.table.schema import HELDOUT, TRAIN
from index.table.storage import write_text
from index.table.table import Table
from trainer.grid import draw_grid
from trainer.models.base import Network
from trainer.objectives.base import Objective
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN, STEPS = 16, 2
APART = ("step", "unit", "done", "total", "time", "seconds")
"""What a line of the log says of itself; the rest are curves."""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui;margin:2em auto;max-width:70em;padding:0 1em}}svg{{max-width:24%;height:auto}}
td,th{{padding:.15em .9em;text-align:left}}img{{max-width:100%}}</style>
<h1>{title}</h1><p>{curves}</p><h2>{shown}</h2><img alt="samples" src="data:image/png;base64,{samples}">
<h2>All figures</h2><table>{figures}</table></html>
"""


class Preview:
    """The same captions and seeds again and again, while a network is trained and at the end."""

    def __init__(self, folder: Path, table: Table, network: Network, objective: Objective, device: str) -> None:
        """Captions of held-out rows where any are held out; encoders are opened when a picture is first wanted."""
        self.folder = folder
        self.split = HELDOUT if len(table.positions(HELDOUT)) else TRAIN
        self._captions = table.take(table.positions(self.split)[:SHOWN], "caption").tolist()
        self._open = partial(CoalescerPipeline.from_network, network, objective, table.meta, folder, device)
        self._coalescer: CoalescerPipeline | None = None

    def grid(self) -> "Image":
        """A sheet of them as the network draws them now."""
        self._coalescer = self._coalescer or self._open()
        return draw_grid(self._coalescer(self._captions, num_inference_steps=STEPS).images, self._captions)


def write_summary(preview: Preview, result: dict[str, Any]) -> None:
    """Write RUN/samples.png and RUN/index.html."""
    out, samples = preview.folder, io.BytesIO()
    preview.grid().save(samples, "png")
    (out / "samples.png").write_bytes(samples.getvalue())
    page = PAGE.format(
        title=html.escape(f"Run {out.name}"),
        curves="".join(_curves(out / "log.jsonl")),
        shown=f"Captions of {'held-out' if preview.split == HELDOUT else 'training'} rows, {STEPS} steps each",
        samples=base64.b64encode(samples.getvalue()).decode(),
        figures="".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in result.items()),
    )
    write_text(out / "index.html", page)


def _curves(log: Path) -> list[str]:
    """An SVG for each figure that was logged, over images."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    drawn = []
    for name in (name for name in lines[-1] if name not in APART):
        figure = Figure(figsize=(3.4, 2.6), layout="constrained")
        axes = figure.subplots()
        points = [(line["done"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), color="#4878a8", linewidth=1)
        axes.set(title=name.replace("_", " "), xlabel="images")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        drawn.append(text.getvalue()[text.getvalue().index("<svg") :])
    return drawn
