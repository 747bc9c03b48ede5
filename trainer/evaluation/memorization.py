"""Memorization: which samples are copies of a training image, found by comparing them with all training rows.

A sample is a copy if its nearest training row is much closer than the nearest row of another image. Rows of one image
(an image with several captions is stored once for each) have equal latents, but for what encoding in another batch
changes, so rows very near to the nearest one count as the same image.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from index.table.schema import TRAIN
from index.table.table import Table
from trainer.evaluation.threads import map_batches, split

COPY_RATIO = 1 / 3
"""A sample counts as a copy if its nearest training row is closer than this times the nearest of another image."""
SAME_IMAGE = 0.01
"""Root mean square difference per coordinate, which have unit variance, up to which rows are of the same image."""
HELD_BYTES = 2**30
"""Memory for the latents of a table; those of larger ones are read again for each set of samples."""
BLOCK_ENTRIES = 2**21
"""Entries of training latents that are compared at once."""
POINTS = 512
"""Samples that a thread compares at once."""
MAX_PRODUCTS = {"cpu": 10**13}
"""Products of two numbers, by device type, beyond which comparing a set of samples would take minutes."""
MAX_PRODUCTS_ELSEWHERE = 10**15


class Memorization:
    """Compares sets of samples with all training rows of a table."""

    def __init__(self, table: Table, num_samples: int, device: str) -> None:
        """Count the rows; `left_out` says why sets of `num_samples` cannot be compared with so many, if they cannot."""
        self._table, self._device = table, device
        self.rows, self._dim = table.count(TRAIN), table.meta.geometry.latent_dim
        products = 3 * num_samples * self.rows * self._dim
        limit = MAX_PRODUCTS.get(torch.device(device).type, MAX_PRODUCTS_ELSEWHERE)
        self.left_out = None
        if products > limit:
            self.left_out = (
                f"comparing {num_samples:,} samples with all {self.rows:,} training rows of {self._dim:,} dimensions "
                f"takes {products:.1e} products, more than {limit:.0e} on {device}: use fewer --num-samples or a GPU"
            )

    def metrics(self, x: Float32[np.ndarray, "N L"]) -> dict[str, float]:
        """Return the median ratio of the distances to the nearest row and to the nearest of another image, and copies.

        Nothing if that is left out, or all training rows are of one image.
        """
        if self.left_out:
            return {}
        ratio = nearest_ratio(x, self._blocks, self._device)
        if np.isnan(ratio).any():
            return {}
        return {"nearest_ratio": float(np.median(ratio)), "copied_rate": float((ratio < COPY_RATIO).mean())}

    def _blocks(self) -> Iterator[Float32[np.ndarray, "_ L"]]:
        """Yield all training rows in coordinates."""
        self._table.hold(["latent"], HELD_BYTES)
        for rows in self._table.column_batches("latent", TRAIN, max(256, BLOCK_ENTRIES // self._dim)):
            if len(rows):
                yield self._table.meta.geometry.to_coordinates(rows)


def nearest_ratio(
    x: Float[np.ndarray, "N L"], blocks: Callable[[], Iterable[Float[np.ndarray, "_ L"]]], device: str = "cpu"
) -> Float32[np.ndarray, "N"]:
    """Return the distance to the nearest row of all blocks over that to the nearest row of another image.

    Near 0 for a copy, near 1 for a point between rows; NaN if all rows are of one image. `blocks` is called twice.
    """
    points = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
    nearest, rows = _nearest(points, blocks(), None, device)
    other, _ = _nearest(points, blocks(), rows, device)
    ratio = (nearest / other.clamp(min=1e-12)).clamp(max=1)
    return np.asarray(ratio.where(other.isfinite(), torch.nan).cpu())


def _nearest(
    points: Float32[Tensor, "N L"],
    blocks: Iterable[Float[np.ndarray, "_ L"]],
    apart_from: Float32[Tensor, "N L"] | None,
    device: str,
) -> tuple[Float32[Tensor, "N"], Float32[Tensor, "N L"]]:
    """Return the nearest row of each point and its distance, of the rows of other images than those in `apart_from`."""
    distance, nearest = torch.full((len(points),), torch.inf, device=device), torch.zeros_like(points)
    same = SAME_IMAGE**2 * points.shape[1]
    for block in blocks:
        rows = torch.from_numpy(np.ascontiguousarray(block, np.float32)).to(device)
        squares = rows.square().sum(1)

        def compare(part: slice, rows: Tensor = rows, squares: Tensor = squares) -> None:
            # |x|^2 is the same for all rows, so the order does not need it.
            scores = torch.addmm(squares, points[part], rows.T, alpha=-2)
            if apart_from is not None:
                image = apart_from[part]
                gap = torch.addmm(squares, image, rows.T, alpha=-2) + image.square().sum(1, keepdim=True)
                scores.masked_fill_(gap <= same, torch.inf)
            least, index = scores.min(1)
            # Differences, not products: only they separate a copy's distance from rounding.
            exact = (rows[index] - points[part]).norm(dim=1).where(least.isfinite(), torch.inf)
            closer = exact < distance[part]
            distance[part] = exact.where(closer, distance[part])
            nearest[part] = rows[index].where(closer[:, None], nearest[part])

        map_batches(compare, split(len(points), POINTS), device)
    return distance, nearest
