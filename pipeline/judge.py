"""Read the colours and positions of drawn shapes back from pixels: does a picture follow its caption?

Every pixel takes the nearest palette colour or the ground, if one is near enough. A picture has its caption's colours
when both are there in at least `MIN_PIXELS` (of a 32-pixel picture) and no third colour has more than a third of the
smaller one; it has the relation when, moreover, the centroids lie to each other as the caption says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.demo import PALETTE, Scene

GROUND = (245, 245, 245)
TOLERANCE = 70.0
MIN_PIXELS = 12 / 32**2
THIRD_COLOUR = 0.35


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was confirmed of one picture."""

    colours: bool
    relation: bool
    """Only where the colours are confirmed too."""


def judge(pixels: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> list[Verdict]:
    """One verdict a picture."""
    return [
        judge_one(colour_map(picture), Scene.parse(caption)) for picture, caption in zip(pixels, captions, strict=True)
    ]


def colour_map(picture: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, "H W"]:
    """For each pixel the number of its palette colour; -1 for the ground and for what is like none."""
    named = np.array([*PALETTE.values(), GROUND], np.float32)
    distance = np.linalg.norm(picture[:, :, None].astype(np.float32) - named, axis=-1)
    nearest = distance.argmin(-1)
    return np.where((nearest < len(PALETTE)) & (distance.min(-1) < TOLERANCE), nearest, -1)


def judge_one(colours: Int[np.ndarray, "H W"], scene: Scene) -> Verdict:
    """Compare a colour map with the scene that it should show."""
    mass = {name: int((colours == number).sum()) for number, name in enumerate(PALETTE)}
    first, second = scene.first.colour, scene.second.colour
    smaller = min(mass[first], mass[second])
    others = max(count for name, count in mass.items() if name not in (first, second))
    if smaller < MIN_PIXELS * colours.size or others > THIRD_COLOUR * smaller:
        return Verdict(False, False)
    (y1, x1), (y2, x2) = (np.argwhere(colours == list(PALETTE).index(name)).mean(0) for name in (first, second))
    right, down = x2 - x1, y2 - y1
    ahead, aside = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[scene.relation]
    return Verdict(True, bool(ahead > colours.shape[0] / 16 and ahead > abs(aside)))
