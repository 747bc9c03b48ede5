"""Draw captioned shapes to img2dataset-style shards: any number of images, each with a known scene.

"a small red circle left of a large blue square": two shapes of different colors on a near-white background, at
jittered positions. One caption in ten, chosen by hash, is never drawn for training; its images go to OUT/heldout
instead, for testing a model on unseen captions. Image i depends on (seed, i) alone.

There are 4,320 such captions. `num_backgrounds` multiplies them: "... on pale orange" has a tinted background.
"""

import colorsys
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

from index.errors import OptionError
from index.table.storage import write_json
from index.terminal import Progress

PALETTE = {
    "red": (225, 35, 35),
    "green": (25, 165, 60),
    "blue": (35, 75, 230),
    "yellow": (250, 210, 20),
    "purple": (175, 45, 215),
    "black": (25, 25, 30),
}
RADII = {"small": (0.113, 0.137), "large": (0.194, 0.225)}
"""Range of half a shape's extent, as a fraction of the image size."""
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
SHADES = {"pale": 0.10, "light": 0.18, "soft": 0.26, "bright": 0.34}
"""Saturations of backgrounds."""
HUES = ("orange", "lemon", "lime", "mint", "aqua", "sky", "lilac", "pink")
TINTS = [f"{shade} {hue}" for shade in SHADES for hue in HUES]
"""Backgrounds by name, next to the near-white one that no caption names."""
MIN_IMAGE_SIZE = 16
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape of a scene."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Two objects and the position of the first relative to the second: the content of a caption."""

    first: SceneObject
    relation: str
    second: SceneObject
    background: str = ""
    """One of `TINTS`; empty for near-white."""

    @property
    def caption(self) -> str:
        """The caption that describes the scene."""
        objects = f"{self.first} {self.relation} {self.second}"
        return f"{objects} on {self.background}" if self.background else objects

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """Return the scene that a caption describes."""
        objects, _, background = caption.partition(" on ")
        _, *first, _, size, color, shape = objects.split()
        return cls(SceneObject(*first[:3]), " ".join(first[3:]), SceneObject(size, color, shape), background)


def all_scenes(num_backgrounds: int = 1) -> Iterator[Scene]:
    """Yield every scene that can be drawn on the first backgrounds: near-white, then the tints."""
    objects = [SceneObject(*words) for words in itertools.product(RADII, PALETTE, SHAPES)]
    backgrounds = ["", *TINTS][:num_backgrounds]
    for background, first, relation, second in itertools.product(backgrounds, objects, RELATIONS, objects):
        if first.color != second.color:
            yield Scene(first, relation, second, background)


def is_heldout(scene: Scene) -> bool:
    """Return whether a scene is held out from the training shards: one in ten, by a hash of its caption."""
    return int(hashlib.sha256(scene.caption.encode()).hexdigest()[:8], 16) % 10 == 0


def draw_scene(scene: Scene, image_size: int, rng: np.random.Generator) -> Image.Image:
    """Draw an image of a scene, its objects at random positions that agree with the relation and do not touch."""
    canvas_size = image_size * SUPERSAMPLING
    image = Image.new("RGB", (canvas_size, canvas_size), _background(scene, int(rng.integers(243, 251))))
    canvas = ImageDraw.Draw(image)
    radii = [rng.uniform(*RADII[each.size]) * image_size for each in (scene.first, scene.second)]
    # Along the axis of the relation: margin, object, gap, object, margin; free space is divided at random.
    near, far = (0, 1) if scene.relation in ("left of", "above") else (1, 0)
    free = max(image_size - 3 - 2 * sum(radii), 0.0)
    margin, gap, _ = rng.dirichlet((6, 6, 6)) * free
    along = [0.0, 0.0]
    along[near] = 1 + margin + radii[near]
    along[far] = along[near] + radii[near] + 1 + gap + radii[far]
    jitter = image_size / 16
    for each, radius, position in zip((scene.first, scene.second), radii, along, strict=True):
        across = image_size / 2 + rng.uniform(-jitter, jitter)
        across = float(np.clip(across, radius + 1, image_size - radius - 1))
        x, y = (position, across) if scene.relation in ("left of", "right of") else (across, position)
        _draw_object(canvas, each, x * SUPERSAMPLING, y * SUPERSAMPLING, radius * SUPERSAMPLING)
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _background(scene: Scene, value: int) -> tuple[int, ...]:
    """Return the color of a scene's background, its largest channel being `value`."""
    if not scene.background:
        return (value,) * 3
    shade, hue = scene.background.split()
    rgb = colorsys.hsv_to_rgb((HUES.index(hue) + 0.7) / len(HUES), SHADES[shade], value)
    return tuple(round(channel) for channel in rgb)


def _draw_object(canvas: ImageDraw.ImageDraw, each: SceneObject, x: float, y: float, r: float) -> None:
    fill = PALETTE[each.color]
    if each.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif each.shape == "square":
        r *= 0.92  # about the area of the circle
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    else:
        canvas.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=fill)


def write_demo_data(
    out: Path,
    *,
    num_samples: int,
    image_size: int,
    seed: int,
    num_backgrounds: int = 1,
    samples_per_shard: int = 1000,
) -> dict[str, int]:
    """Draw training images to OUT/NNNNN.tar and one image of each held-out caption to OUT/heldout/00000.tar.

    Returns the report that is also written to OUT/demo-data.json. Raises OptionError if there are shards already.
    """
    if num_samples < 1:
        raise OptionError(f"--num-samples {num_samples} is out of range: use at least 1")
    if image_size < MIN_IMAGE_SIZE:
        raise OptionError(f"--image-size {image_size} is too small: use at least {MIN_IMAGE_SIZE} pixels")
    if any(out.glob("*.tar")):
        raise OptionError(f"{out} already holds shards: name another folder, or delete it first")
    scenes = list(all_scenes(num_backgrounds))
    heldout = [scene for scene in scenes if is_heldout(scene)]
    train = [scene for scene in scenes if not is_heldout(scene)]
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    with Progress("draw shapes", total=num_samples, unit="images", log=out / "demo-data.jsonl") as bar:
        for shard, start in enumerate(range(0, num_samples, samples_per_shard)):
            numbers = range(start, min(start + samples_per_shard, num_samples))
            drawn = [train[np.random.default_rng([seed, i, 0]).integers(len(train))] for i in numbers]
            _write_shard(out / f"{shard:05d}.tar", drawn, numbers, image_size, seed)
            bar.advance(len(drawn))
    numbers = range(num_samples, num_samples + len(heldout))
    _write_shard(out / "heldout" / "00000.tar", heldout, numbers, image_size, seed)
    report = {
        "num_samples": num_samples,
        "num_train_captions": len(train),
        "num_heldout_captions": len(heldout),
        "image_size": image_size,
        "num_backgrounds": num_backgrounds,
        "seed": seed,
    }
    write_json(out / "demo-data.json", report)
    return report


def _write_shard(path: Path, scenes: list[Scene], numbers: range, image_size: int, seed: int) -> None:
    """Write one image per scene with its caption and JSON sidecar, next to the parquet and stats of img2dataset."""
    rows: list[dict[str, Any]] = []
    temporary = path.with_suffix(".tar.tmp")
    with tarfile.open(temporary, "w") as tar:
        for scene, number in zip(scenes, numbers, strict=True):
            key = f"{number:08d}"
            png = io.BytesIO()
            draw_scene(scene, image_size, np.random.default_rng([seed, number, 1])).save(png, "png")
            row = {"key": key, "caption": scene.caption, "status": "success", "width": image_size, "height": image_size}
            truth = {"first": asdict(scene.first), "relation": scene.relation, "second": asdict(scene.second)}
            for extension, data in (
                ("png", png.getvalue()),
                ("txt", scene.caption.encode()),
                ("json", json.dumps(row | {"truth": truth}).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    stats = {"count": len(rows), "successes": len(rows), "status_dict": {"success": len(rows)}}
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))
    temporary.replace(path)
