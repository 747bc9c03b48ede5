"""Check from pixels whether an image of drawn shapes follows its caption.

Every pixel is assigned the nearest palette color or the background, if one is near enough. An image has its caption's
colors if both cover at least `MIN_AREA` of it and no third color covers more than `MAX_OTHER_COLOR` of the smaller one;
it has the relation if, moreover, the centroids of the two colors lie in the caption's direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.demo.shapes import PALETTE, Scene

BACKGROUND = (245, 245, 245)
COLOR_TOLERANCE = 70.0
"""Largest distance of a pixel from its color, in 8-bit RGB."""
MIN_AREA = 12 / 32**2
"""Fraction of the image."""
MAX_OTHER_COLOR = 0.35
"""Fraction of the smaller object's area."""
MIN_DISPLACEMENT = 1 / 16
"""Between the centroids along the relation's axis, as a fraction of the image size."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one image has its caption's colors, and its relation."""

    colors: bool
    relation: bool
    """Never without the colors."""


def check_images(images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> list[Verdict]:
    """Check each image against its caption."""
    scenes = [Scene.parse(caption) for caption in captions]
    return [check_scene(color_map(image), scene) for image, scene in zip(images, scenes, strict=True)]


def color_map(image: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, "H W"]:
    """Return the palette index of each pixel's color; -1 for the background and for colors near none of them."""
    colors = np.array([*PALETTE.values(), BACKGROUND], np.float32)
    distance = np.linalg.norm(image[:, :, None].astype(np.float32) - colors, axis=-1)
    nearest = distance.argmin(-1)
    return np.where((nearest < len(PALETTE)) & (distance.min(-1) < COLOR_TOLERANCE), nearest, -1)


def check_scene(colors: Int[np.ndarray, "H W"], scene: Scene) -> Verdict:
    """Check the color map of an image against the scene that it should show."""
    area = {name: int((colors == index).sum()) for index, name in enumerate(PALETTE)}
    first, second = scene.first.color, scene.second.color
    smaller = min(area[first], area[second])
    largest_other = max(pixels for name, pixels in area.items() if name not in (first, second))
    if smaller < MIN_AREA * colors.size or largest_other > MAX_OTHER_COLOR * smaller:
        return Verdict(False, False)
    (y1, x1), (y2, x2) = (np.argwhere(colors == list(PALETTE).index(name)).mean(0) for name in (first, second))
    right, down = x2 - x1, y2 - y1
    along, across = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[scene.relation]
    return Verdict(True, bool(along > MIN_DISPLACEMENT * colors.shape[0] and along > abs(across)))
