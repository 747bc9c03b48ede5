"""Read the colors and positions of drawn shapes back from pixels: does a picture follow its caption?

Every pixel takes the nearest palette color or the ground, if one is near enough. A picture has its caption's colors
when both are there in at least `MIN_PIXELS` (of a 32-pixel picture) and no third color has more than a third of the
smaller one; it has the relation when, moreover, the centroids lie to each other as the caption says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.demo.shapes import PALETTE, Scene

GROUND = (245, 245, 245)
TOLERANCE = 70.0
MIN_PIXELS = 12 / 32**2
THIRD_COLOR = 0.35


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was confirmed of one picture."""

    colors: bool
    relation: bool
    """Only where the colors are confirmed too."""


def judge(pixels: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> list[Verdict]:
    """One verdict a picture."""
    return [
        judge_one(color_map(picture), Scene.parse(caption)) for picture, caption in zip(pixels, captions, strict=True)
    ]


def color_map(picture: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, "H W"]:
    """For each pixel the number of its palette color; -1 for the ground and for what is like none."""
    named = np.array([*PALETTE.values(), GROUND], np.float32)
    distance = np.linalg.norm(picture[:, :, None].astype(np.float32) - named, axis=-1)
    nearest = distance.argmin(-1)
    return np.where((nearest < len(PALETTE)) & (distance.min(-1) < TOLERANCE), nearest, -1)


def judge_one(colors: Int[np.ndarray, "H W"], scene: Scene) -> Verdict:
    """Compare a color map with the scene that it should show."""
    mass = {name: int((colors == number).sum()) for number, name in enumerate(PALETTE)}
    first, second = scene.first.color, scene.second.color
    smaller = min(mass[first], mass[second])
    others = max(count for name, count in mass.items() if name not in (first, second))
    if smaller < MIN_PIXELS * colors.size or others > THIRD_COLOR * smaller:
        return Verdict(False, False)
    (y1, x1), (y2, x2) = (np.argwhere(colors == list(PALETTE).index(name)).mean(0) for name in (first, second))
    right, down = x2 - x1, y2 - y1
    ahead, aside = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[scene.relation]
    return Verdict(True, bool(ahead > colors.shape[0] / 16 and ahead > abs(aside)))
