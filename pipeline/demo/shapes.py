"""Captioned shapes drawn to img2dataset-style shards: known truth, any number of them.

"a small red circle left of a large blue square": two shapes of different colors on a near-white ground, at jittered
places. One caption in ten, chosen by hash, is never drawn for training; its pictures go to OUT/heldout instead, so
that a model can be asked for what it has not seen. Picture i depends on (seed, i) alone.
"""

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from index.terminal import Progress
from index.table.storage import write_json
from index.errors import OptionError

PALETTE = {
    "red": (225, 35, 35),
    "green": (25, 165, 60),
    "blue": (35, 75, 230),
    "yellow": (250, 210, 20),
    "purple": (175, 45, 215),
    "black": (25, 25, 30),
}
RADII = {"small": (0.113, 0.137), "large": (0.194, 0.225)}
"""Half the extent of a shape, as a range of shares of the picture's side."""
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Two shapes and how the first lies to the second: the truth behind a caption."""

    first: Thing
    relation: str
    second: Thing

    @property
    def caption(self) -> str:
        """The scene in words."""
        return f"{self.first} {self.relation} {self.second}"

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """The scene that a caption tells."""
        _, *first, _, size, color, shape = caption.split()
        return cls(Thing(*first[:3]), " ".join(first[3:]), Thing(size, color, shape))


def all_scenes() -> Iterator[Scene]:
    """Every scene that can be told."""
    things = [Thing(*words) for words in itertools.product(RADII, PALETTE, SHAPES)]
    for first, relation, second in itertools.product(things, RELATIONS, things):
        if first.color != second.color:
            yield Scene(first, relation, second)


def is_heldout(scene: Scene) -> bool:
    """Whether a scene is kept from the training shards: one in ten."""
    return int(hashlib.sha256(scene.caption.encode()).hexdigest()[:8], 16) % 10 == 0


def draw(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    """A picture of the scene, the shapes at random places that agree with it and do not touch."""
    fine = side * SUPERSAMPLING
    ground = int(rng.integers(243, 251))
    image = Image.new("RGB", (fine, fine), (ground,) * 3)
    pen = ImageDraw.Draw(image)
    radii = [rng.uniform(*RADII[thing.size]) * side for thing in (scene.first, scene.second)]
    # Along the relation's axis: margin, shape, gap, shape, margin; what is free is shared out at random.
    near, far = (0, 1) if scene.relation in ("left of", "above") else (1, 0)
    free = max(side - 3 - 2 * sum(radii), 0.0)
    margin, gap, _ = rng.dirichlet((6, 6, 6)) * free
    along = [0.0, 0.0]
    along[near] = 1 + margin + radii[near]
    along[far] = along[near] + radii[near] + 1 + gap + radii[far]
    wander = side / 16
    for thing, radius, place in zip((scene.first, scene.second), radii, along, strict=True):
        across = float(np.clip(side / 2 + rng.uniform(-wander, wander), radius + 1, side - radius - 1))
        x, y = (place, across) if scene.relation in ("left of", "right of") else (across, place)
        _draw_thing(pen, thing, x * SUPERSAMPLING, y * SUPERSAMPLING, radius * SUPERSAMPLING)
    return image.resize((side, side), Image.Resampling.BOX)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    fill = PALETTE[thing.color]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        r *= 0.92  # about the area of the circle
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    else:
        pen.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=fill)


def write_demo_data(out: Path, *, samples: int, size: int, seed: int, per_shard: int = 1000) -> dict[str, int]:
    """Draw `samples` training pictures to OUT/NNNNN.tar and one of each held-out scene to OUT/heldout/00000.tar."""
    if samples < 1 or size < 16:
        raise OptionError(f"--num-samples {samples} --image-size {size}: use at least 1 sample of at least 16 pixels")
    if any(out.glob("*.tar")):
        raise OptionError(f"{out} holds shards already: name another folder, or delete it first")
    scenes = list(all_scenes())
    heldout = [scene for scene in scenes if is_heldout(scene)]
    known = [scene for scene in scenes if not is_heldout(scene)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout").mkdir(exist_ok=True)
    with Progress("draw shapes", total=samples, unit="pictures", log=out / "demo-data.jsonl") as bar:
        for number, start in enumerate(range(0, samples, per_shard)):
            shard = range(start, min(start + per_shard, samples))
            chosen = [known[np.random.default_rng([seed, i, 0]).integers(len(known))] for i in shard]
            _write_shard(out / f"{number:05d}.tar", chosen, shard, size, seed)
            bar.advance(len(chosen))
    _write_shard(out / "heldout" / "00000.tar", heldout, range(samples, samples + len(heldout)), size, seed)
    report = {"samples": samples, "captions": len(known), "heldout_captions": len(heldout), "size": size, "seed": seed}
    write_json(out / "demo-data.json", report)
    return report


def _write_shard(path: Path, scenes: list[Scene], numbers: range, size: int, seed: int) -> None:
    rows: list[dict[str, Any]] = []
    aside = path.with_suffix(".tar.tmp")
    with tarfile.open(aside, "w") as tar:
        for scene, number in zip(scenes, numbers, strict=True):
            key = f"{number:08d}"
            picture = io.BytesIO()
            draw(scene, size, np.random.default_rng([seed, number, 1])).save(picture, "png")
            row = {"key": key, "caption": scene.caption, "status": "success", "width": size, "height": size}
            truth = {"first": asdict(scene.first), "relation": scene.relation, "second": asdict(scene.second)}
            for ending, data in (
                ("png", picture.getvalue()),
                ("txt", scene.caption.encode()),
                ("json", json.dumps(row | {"truth": truth}).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    stats = {"count": len(rows), "successes": len(rows), "status_dict": {"success": len(rows)}}
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))
    aside.replace(path)
