"""What makes search mean something: latents <-> coordinates, the stored vector, the query vector.

    coordinates   x = (latent - mean) / std                       the network, R and the sampler live here
    image part    x, or with `center` what the description does not tell of it; on `sphere` scaled to length sqrt(L)
    text part     desc_scale * kappa * t/|t|
    vector        concat(text part, image part, balance, zeros)   width S, a multiple of 8
    query         concat(desc_scale * kappa * DE/|DE|, R, 0, zeros)

kappa puts a random pair of descriptions as far apart as a random pair of image parts (root mean square), so
desc_scale is dimensionless and means the same for every encoder. The balance coordinate of row i is
sqrt(max(g) - g_i) for dual potentials g, hence |query - vector_i|^2 = |query - v_i|^2 + max(g) - g_i: any L2 index
then returns the balanced neighbor. Without potentials it is zero. Plain numpy, no I/O.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from index.errors import OptionError
from index.space.centering import Centering
from index.space.moments import Moments, unit
from index.table.codec import pack, unpack

KINDS = ("sphere", "standard", "raw")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Geometry:
    """How rows and queries of one table are laid out and compared."""

    kind: str
    """sphere: standardized, then on the sphere of radius sqrt(L). standard: each dimension standardized.
    raw: latents as they are."""
    desc_scale: float
    """Weight of the description against the latent in the search; above 1 unless the user insists."""
    kappa: float
    """Length of the text part at desc_scale 1."""
    mean: Float32[np.ndarray, "L"]
    std: Float32[np.ndarray, "L"]
    text_dim: int
    """T."""
    centering: Centering | None = None
    """What is taken out of coordinates before they are compared; queries stay as they are."""

    @classmethod
    def fit(
        cls,
        moments: Moments,
        *,
        kind: str = "sphere",
        desc_scale: float,
        allow_small_desc_scale: bool = False,
        centering: Centering | None = None,
    ) -> "Geometry":
        """The geometry of a table with these moments; OptionError where an option is not allowed."""
        check_desc_scale(desc_scale, allow_small=allow_small_desc_scale)
        if kind not in KINDS:
            raise OptionError(f"geometry {kind!r} is unknown: choose one of {', '.join(KINDS)}")
        mean, std = moments.latent_mean.astype(np.float32), moments.latent_std.astype(np.float32)
        standardized = kind != "raw" or centering is not None
        image_distance = np.sqrt(2.0 * (len(std) if standardized else np.square(moments.latent_std).sum()))
        if kind == "raw":
            mean, std = np.zeros_like(mean), np.ones_like(std)
        # All descriptions alike: no length of the text part changes a search, so any will do.
        kappa = float(image_distance / moments.text_distance) if moments.text_distance > 1e-6 else 1.0
        return cls(
            kind=kind,
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
        """S: text, image and balance parts, rounded up to the multiple of 8 that IVF_RQ asks for."""
        return -(-(self.text_dim + self.latent_dim + 1) // 8) * 8

    def to_coordinates(self, latent: Float[np.ndarray, "*B L"]) -> Float32[np.ndarray, "*B L"]:
        """Latents as the autoencoder gives them -> coordinates."""
        return np.asarray((latent.astype(np.float32) - self.mean) / self.std, np.float32)

    def to_latent(self, x: Float[np.ndarray, "*B L"]) -> Float32[np.ndarray, "*B L"]:
        """Coordinates -> latents that the autoencoder can decode."""
        return np.asarray(x.astype(np.float32) * self.std + self.mean, np.float32)

    def project(self, x: Float[np.ndarray, "*B L"]) -> Float32[np.ndarray, "*B L"]:
        """Coordinates, or a Gaussian draw, to the space in which image parts are compared."""
        x = x.astype(np.float32)
        return unit(x) * np.float32(np.sqrt(self.latent_dim)) if self.kind == "sphere" else x

    def image_part(
        self, text: Float[np.ndarray, "B T"], latent: Float[np.ndarray, "B L"]
    ) -> Float32[np.ndarray, "B L"]:
        """What of rows is compared with R."""
        x = self.to_coordinates(latent)
        return self.project(x if self.centering is None else self.centering.residual(text, x))

    def vectors(
        self,
        text: Float[np.ndarray, "B T"],
        latent: Float[np.ndarray, "B L"],
        balance: Float[np.ndarray, "B"] | None = None,
    ) -> Float32[np.ndarray, "B S"]:
        """The stored vectors of rows; `balance` is sqrt(max(g) - g_i), zero where no potentials were fitted."""
        return self._concat(text, self.image_part(text, latent), balance)

    def queries(self, description: Float[np.ndarray, "B T"], r: Float[np.ndarray, "B L"]) -> Float32[np.ndarray, "B S"]:
        """The queries for descriptions DE and random points R, which are already in the space of `project`."""
        return self._concat(description, r.astype(np.float32), None)

    def _concat(
        self,
        text: Float[np.ndarray, "B T"],
        image: Float[np.ndarray, "B L"],
        balance: Float[np.ndarray, "B"] | None,
    ) -> Float32[np.ndarray, "B S"]:
        out = np.zeros((len(text), self.vector_dim), np.float32)
        out[:, : self.text_dim] = self.desc_scale * self.kappa * unit(text.astype(np.float32))
        out[:, self.text_dim : self.text_dim + self.latent_dim] = image
        if balance is not None:
            out[:, self.text_dim + self.latent_dim] = balance
        return out

    def balance_of(self, vectors: Float[np.ndarray, "B S"]) -> Float[np.ndarray, "B"]:
        """The balance coordinate of stored vectors."""
        return vectors[:, self.text_dim + self.latent_dim]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; exact."""
        content = {name: pack(getattr(self, name)) for name in self.__slots__}
        return content | {"centering": None if self.centering is None else self.centering.to_dict()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Geometry":
        """The inverse of `to_dict`."""
        centering = content.get("centering")
        plain = {name: unpack(value) for name, value in content.items() if name != "centering"}
        return cls(**plain, centering=None if centering is None else Centering.from_dict(centering))

    def same_as(self, other: "Geometry") -> bool:
        """Whether both lay out every row and query alike."""
        return self.to_dict() == other.to_dict()


def check_desc_scale(desc_scale: float, *, allow_small: bool = False) -> None:
    """OptionError unless desc_scale is above 1, or above 0 where small values are allowed."""
    if not (desc_scale > (0 if allow_small else 1) and np.isfinite(desc_scale)):
        hint = "0" if allow_small else "1 (or add --allow-small-desc-scale)"
        raise OptionError(f"--desc-scale {desc_scale:g} is not allowed: give a number above {hint}, for instance 4")
