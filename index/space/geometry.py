"""The search space of a table: latents <-> coordinates, the stored vector of a row, the vector of a query.

    coordinates   x = (latent - mean) / std                       the network, R and the sampler work in these
    image part    x, or with centering its residual on the text embedding; for `sphere` scaled to length sqrt(L)
    text part     desc_scale * kappa * t/|t|
                  both projected to principal components in a reduced search space, see `index.space.reduction`
    vector        concat(text part, image part, balance, zeros)   S entries, a multiple of 8
    query         concat(desc_scale * kappa * DE/|DE|, R, 0, zeros)

kappa makes the root mean square distance of two random text parts (at desc_scale 1) that of two random image parts, so
desc_scale has no unit and means the same for every encoder. The balance coordinate of row i is sqrt(max(g) - g_i) for
dual potentials g. Then |query - vector_i|^2 = |query - v_i|^2 + max(g) - g_i, where v_i is the vector without balance,
so any L2 index returns the balanced neighbor. It is zero for a table without potentials. Plain numpy, no I/O.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from index.errors import OptionError
from index.space.centering import Centering
from index.space.moments import Moments, unit
from index.space.reduction import Reduction

GEOMETRIES = ("sphere", "standard", "raw")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Geometry:
    """How rows and queries of one table become vectors."""

    name: str
    """sphere: standardized, then projected to the sphere of radius sqrt(L). standard: each dimension standardized.
    raw: latents unchanged."""
    desc_scale: float
    """Weight of the text part relative to the image part; above 1 unless the user allows less."""
    kappa: float
    """Length of the text part at desc_scale 1."""
    mean: Float32[np.ndarray, "L"]
    std: Float32[np.ndarray, "L"]
    text_dim: int
    """T."""
    centering: Centering | None = None
    """Regression that is subtracted from the coordinates of rows before they are compared; queries are unchanged."""
    reduction: Reduction | None = None
    """Projection of text and image parts before they are concatenated; None searches the full space."""

    @classmethod
    def fit(
        cls,
        moments: Moments,
        *,
        name: str = "sphere",
        desc_scale: float,
        allow_small_desc_scale: bool = False,
        centering: Centering | None = None,
    ) -> "Geometry":
        """Fit to the moments of a table's training split.

        Raises OptionError if `name` is unknown or `desc_scale` is not allowed.
        """
        check_desc_scale(desc_scale, allow_small=allow_small_desc_scale)
        if name not in GEOMETRIES:
            raise OptionError(f"--geometry {name!r} is unknown: choose one of {', '.join(GEOMETRIES)}")
        mean, std = moments.latent_mean.astype(np.float32), moments.latent_std.astype(np.float32)
        standardized = name != "raw" or centering is not None
        image_distance = np.sqrt(2.0 * (len(std) if standardized else np.square(moments.latent_std).sum()))
        if name == "raw":
            mean, std = np.zeros_like(mean), np.ones_like(std)
        # If all text embeddings are equal, the length of the text part changes no search.
        kappa = float(image_distance / moments.text_distance) if moments.text_distance > 1e-6 else 1.0
        return cls(
            name=name,
            desc_scale=desc_scale,
            kappa=kappa,
            mean=mean,
            std=std,
            text_dim=len(moments.text_sum),
            centering=centering,
        )

    @property
    def latent_dim(self) -> int:
        """L."""
        return len(self.mean)

    @property
    def vector_dim(self) -> int:
        """S: entries of text, image and balance parts, rounded up to the multiple of 8 that IVF_RQ requires."""
        return -(-(self.text_width + self.image_width + 1) // 8) * 8

    @property
    def text_width(self) -> int:
        """Entries of the text part of a vector."""
        return self.text_dim if self.reduction is None else self.reduction.text_dim

    @property
    def image_width(self) -> int:
        """Entries of the image part of a vector."""
        return self.latent_dim if self.reduction is None else self.reduction.image_dim + 1

    def to_coordinates(self, latent: Float[np.ndarray, "*B L"]) -> Float32[np.ndarray, "*B L"]:
        """Standardize latents of the image autoencoder."""
        return np.asarray((latent.astype(np.float32) - self.mean) / self.std, np.float32)

    def to_latent(self, x: Float[np.ndarray, "*B L"]) -> Float32[np.ndarray, "*B L"]:
        """Invert `to_coordinates`: latents that the image autoencoder can decode."""
        return np.asarray(x.astype(np.float32) * self.std + self.mean, np.float32)

    def project(self, x: Float[np.ndarray, "*B L"]) -> Float32[np.ndarray, "*B L"]:
        """Project coordinates or noise to the space in which image parts are compared."""
        x = x.astype(np.float32)
        return unit(x) * np.float32(np.sqrt(self.latent_dim)) if self.name == "sphere" else x

    def image_part(
        self, text: Float[np.ndarray, "B T"], latent: Float[np.ndarray, "B L"]
    ) -> Float32[np.ndarray, "B W"]:
        """Compute the part of each row's vector that is compared with R."""
        x = self.to_coordinates(latent)
        image = self.project(x if self.centering is None else self.centering.residual(text, x))
        return image if self.reduction is None else self.reduction.image(image, query=False)

    def text_part(self, text: Float[np.ndarray, "B T"]) -> Float32[np.ndarray, "B V"]:
        """Compute the part of vectors that text embeddings become, of rows and of queries, at text length 1."""
        text = unit(text.astype(np.float32))
        return text if self.reduction is None else self.reduction.text(text)

    def query_image(self, r: Float[np.ndarray, "B L"]) -> Float32[np.ndarray, "B W"]:
        """Compute the part of query vectors that noise R becomes; `project` was applied to it."""
        r = r.astype(np.float32)
        return r if self.reduction is None else self.reduction.image(r, query=True)

    def vectors(
        self,
        text: Float[np.ndarray, "B T"],
        latent: Float[np.ndarray, "B L"],
        balance: Float[np.ndarray, "B"] | None = None,
    ) -> Float32[np.ndarray, "B S"]:
        """Compute the stored vectors of rows; `balance` is sqrt(max(g) - g_i), None without potentials."""
        return self._concat(self.text_part(text), self.image_part(text, latent), balance)

    def queries(self, text: Float[np.ndarray, "B T"], r: Float[np.ndarray, "B L"]) -> Float32[np.ndarray, "B S"]:
        """Compute the query vectors of text embeddings DE and noise R that `project` was applied to."""
        return self._concat(self.text_part(text), self.query_image(r), None)

    def _concat(
        self,
        text: Float[np.ndarray, "B V"],
        image: Float[np.ndarray, "B W"],
        balance: Float[np.ndarray, "B"] | None,
    ) -> Float32[np.ndarray, "B S"]:
        out = np.zeros((len(text), self.vector_dim), np.float32)
        end = self.text_width + self.image_width
        out[:, : self.text_width] = self.desc_scale * self.kappa * text
        out[:, self.text_width : end] = image
        if balance is not None:
            out[:, end] = balance
        return out

    def balance_of(self, vectors: Float[np.ndarray, "B S"]) -> Float[np.ndarray, "B"]:
        """Return the balance coordinate of stored vectors."""
        return vectors[:, self.text_width + self.image_width]

    def same_as(self, other: "Geometry") -> bool:
        """Return whether both give every row and query the same vector."""
        mine, theirs = self._parameters(), other._parameters()
        return len(mine) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def _parameters(self) -> list[Any]:
        parts = [each for each in (self.centering, self.reduction) if each is not None]
        mine = [getattr(self, each.name) for each in fields(self) if each.name not in ("centering", "reduction")]
        # A digest stands for the arrays in its file, which may not have been read.
        theirs = [
            getattr(part, each.name)
            for part in parts
            for each in fields(part)
            if not (part.digest and each.metadata.get("stored"))
        ]
        return [*mine, *(type(part).__name__ for part in parts), *theirs]


def check_desc_scale(desc_scale: float, *, allow_small: bool = False) -> None:
    """Raise OptionError unless `desc_scale` is finite and above 1, or above 0 with `allow_small`."""
    if not (desc_scale > (0 if allow_small else 1) and np.isfinite(desc_scale)):
        hint = "0" if allow_small else "1 (or add --allow-small-desc-scale)"
        raise OptionError(f"--desc-scale {desc_scale:g} is out of range: use a number above {hint}, for instance 4")
