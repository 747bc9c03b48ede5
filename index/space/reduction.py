"""The reduced search space: text and image parts, each projected to leading principal components.

    text part     P't                          P, Q: orthonormal columns
    image part    (Q'x, |x - Q Q'x|)           the last entry is the length that Q leaves out
    query         P'DE and (Q'R, 0)

The squared distance of image parts is |R - x|^2, less |R - Q Q'R|^2, which all rows share, plus 2 <R, x - Q Q'x>, which
has mean 0 because R is isotropic. So it is the expected distance in the full space given what is kept of R. Without the
last entry rows that the projection shortens would be nearer than they are and become hubs. Text parts have none: it
would put a row away from its own caption, for what is left out of a caption is not independent of the rows.

D components are split between the parts by one rule: all directions of both parts are ordered by the variance of the
rows along them, text at its desc_scale and kappa, and the first D are kept. Of all such projections this leaves out the
least expected squared length of the vectors. Each part keeps at least one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from index.errors import TableError

MIN_SEARCH_DIM = 2
"""One component of each part."""
STORED: dict[str, Any] = {"stored": True}
"""Marks a field whose array is in a file of its own once its dataclass has a digest."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Reduction:
    """Projections of the text and the image part, fitted to training rows."""

    text_dim: int
    """Components kept of the text part."""
    image_dim: int
    """Components kept of the image part."""
    text_variance: float
    """Fraction of the text part's variance that is kept."""
    image_variance: float
    """Fraction of the image part's variance that is kept."""
    fitted_rows: int
    """Training rows whose covariances were computed."""
    digest: str = ""
    """SHA-256 of the file that holds the arrays; empty before it is written."""
    text_components: Float32[np.ndarray, "T A"] | None = field(default=None, metadata=STORED)
    image_components: Float32[np.ndarray, "L B"] | None = field(default=None, metadata=STORED)

    @property
    def dim(self) -> int:
        """D: components of both parts."""
        return self.text_dim + self.image_dim

    def text(self, text: Float32[np.ndarray, "B T"]) -> Float32[np.ndarray, "B A"]:
        """Project unit text embeddings, of rows or queries."""
        return np.asarray(text @ at_hand(self.text_components, self))

    def image(self, image: Float32[np.ndarray, "B L"], *, query: bool) -> Float32[np.ndarray, "B W"]:
        """Project image parts of rows, or noise R of queries."""
        components = at_hand(self.image_components, self)
        out = np.zeros((len(image), components.shape[1] + 1), np.float32)
        out[:, :-1] = image @ components
        if not query:
            # Not from the difference of squares, which would leave a rounding error where nothing is left out.
            out[:, -1] = np.linalg.norm(image - out[:, :-1] @ components.T, axis=1)
        return out


def at_hand(array: Any, part: Any) -> Any:
    """Return an array of a part of the geometry; raises TableError if its file was not found."""
    if array is None:
        raise TableError(
            f"the table's geometry needs the file DB/NAME.lance/_weights/{part.digest}.npz, which is missing: restore "
            "it, or lay the table out without it: `pipeline build-index TABLE --search-dim full --no-center`"
        )
    return array


@dataclass(eq=False, slots=True)
class _Covariance:
    """Sums over batches of vectors, in float64."""

    total: Float64[np.ndarray, "D"] | float = 0.0
    products: Float64[np.ndarray, "D D"] | float = 0.0

    def add(self, v: Float32[np.ndarray, "B D"]) -> None:
        # The products of one batch are summed in float32, which is twice as fast, and those of batches in float64.
        self.total = self.total + v.sum(0, dtype=np.float64)
        self.products += v.T @ v

    def principal(self, count: int) -> tuple[Float64[np.ndarray, "D"], Float64[np.ndarray, "D D"]]:
        """Return the variances along the principal directions, largest first, and these directions as columns."""
        mean = np.asarray(self.total) / count
        variance, directions = np.linalg.eigh(self.products / count - np.outer(mean, mean))
        variance, directions = np.maximum(variance[::-1], 0.0), directions[:, ::-1]
        # Of v and -v, the one whose largest entry is positive: LAPACK promises neither.
        largest = np.abs(directions).argmax(0)
        return variance, directions * np.sign(directions[largest, np.arange(len(largest))])


def fit_reduction(
    batches: Iterable[tuple[Float32[np.ndarray, "_B T"], Float32[np.ndarray, "_B L"]]],
    dim: int,
    text_length: float,
) -> Reduction:
    """Fit `dim` components to batches of (unit text embeddings, image parts), each row once.

    `text_length` is desc_scale * kappa, the length of a text part.
    """
    count, text_sums, image_sums = 0, _Covariance(), _Covariance()
    for text, image in batches:
        text_sums.add(text)
        image_sums.add(image)
        count += len(text)
    assert count, "no rows"
    text_variance, text_directions = text_sums.principal(count)
    image_variance, image_directions = image_sums.principal(count)
    text_dim, image_dim = split_dim(text_length**2 * text_variance, image_variance, dim)
    return Reduction(
        text_dim=text_dim,
        image_dim=image_dim,
        text_variance=_fraction(text_variance, text_dim),
        image_variance=_fraction(image_variance, image_dim),
        fitted_rows=count,
        text_components=np.ascontiguousarray(text_directions[:, :text_dim], np.float32),
        image_components=np.ascontiguousarray(image_directions[:, :image_dim], np.float32),
    )


def split_dim(text: Float64[np.ndarray, "T"], image: Float64[np.ndarray, "L"], dim: int) -> tuple[int, int]:
    """Split `dim` components between text and image parts with these variances, each largest first."""
    # Stable, so that of equal variances the text's come first.
    order = np.argsort(-np.concatenate([text, image]), kind="stable")[:dim]
    of_text = int((order < len(text)).sum())
    of_text = min(max(of_text, 1, dim - len(image)), len(text), dim - 1)
    return of_text, dim - of_text


def _fraction(variance: Float[np.ndarray, "D"], kept: int) -> float:
    total = float(variance.sum())
    return float(variance[:kept].sum() / total) if total > 0 else 1.0
