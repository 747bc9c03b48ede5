"""Captions to images in a few steps: `Coalescer.from_pretrained(folder)("a caption", steps=2).images[0]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32

from index.errors import OptionError, RunError, one_line
from index.space.geometry import Geometry
from index.table.schema import TableMeta
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder, resolve_device
from trainer.models.base import Network
from trainer.objectives.base import Objective, make_objective
from trainer.run_folder import encoder_source, load_network, read_config

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False, slots=True)
class Samples:
    """What came out, caption by caption, `num` pictures each."""

    images: "list[Image]"
    captions: list[str]
    """The caption of each image."""
    confidence: Float32[np.ndarray, "B"]
    """How sure the network was of where to go, at the first step, 0 to 1; NaN where its objective cannot say."""
    latents: Float32[np.ndarray, "B C h w"]
    """As the autoencoder decodes them."""


class Coalescer:
    """A trained run, ready to sample."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        meta: TableMeta,
        image_encoder: DiffusersAutoencoder,
        text_encoder: TransformersTextEncoder,
        device: str,
    ) -> None:
        """Put the parts together; `from_pretrained` is the usual way."""
        self.network, self.objective, self.meta, self.device = network, objective, meta, device
        self.image_encoder, self.text_encoder = image_encoder, text_encoder

    @property
    def geometry(self) -> Geometry:
        """The geometry that the network was trained in."""
        return self.meta.geometry

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "auto") -> "Coalescer":
        """Open a run folder, or a hub repository with the same files; safetensors and JSON only.

        Raises:
            RunError: the folder or repository is no run, or its weights do not fit its config.
        """
        folder = _fetch(str(name))
        config = read_config(folder)
        device = resolve_device(device)
        network = load_network(folder)
        fitted, meta = config["fit"], TableMeta.from_json(config["table"]["meta"])
        objective = make_objective(fitted["objective"], fitted["preset"], **config["objective"])
        return cls.around(network.to(device).eval().requires_grad_(False), objective, meta, folder, device)

    @classmethod
    def around(cls, network: Network, objective: Objective, meta: TableMeta, folder: Path, device: str) -> "Coalescer":
        """A network with the encoders of its run folder."""
        return cls(
            network,
            objective,
            meta,
            DiffusersAutoencoder(encoder_source(folder, meta, "image_encoder"), device),
            TransformersTextEncoder(encoder_source(folder, meta, "text_encoder"), device),
            device,
        )

    def __call__(
        self,
        captions: str | Sequence[str],
        *,
        steps: int = 2,
        num: int = 1,
        seed: int = 0,
        guidance: float = 1.0,
        redraws: int = 0,
        batch_size: int = 64,
    ) -> Samples:
        """Draw `num` images of each caption.

        Args:
            captions: one or several.
            steps: network evaluations per image (twice as many with guidance).
            num: images per caption; the j-th starts from the same point for every caption.
            seed: with j, all that an image's point depends on, whatever the batch.
            guidance: 1 follows the caption as trained; more exaggerates it.
            redraws: further points to try per image; the one of which the network is surest is kept.
            batch_size: images at a time.
        """
        each = [captions] if isinstance(captions, str) else list(captions)
        if not each or not all(caption.strip() for caption in each):
            raise OptionError("a caption is empty: give at least one caption in words")
        if steps < 1 or num < 1 or redraws < 0:
            raise OptionError(f"--steps {steps} --num {num} --redraws {redraws}: give at least 1, 1 and 0")
        words = [caption for caption in each for _ in range(num)]
        numbers = [j for _ in each for j in range(num)]
        text = self.describe(each).repeat(num, axis=0)
        latents, confidence = [], []
        for start in range(0, len(words), batch_size):
            part = slice(start, start + batch_size)
            found = [
                self.coordinates(text[part], numbers[part], steps=steps, seed=seed, attempt=a, guidance=guidance)
                for a in range(redraws + 1)
            ]
            surest = np.stack([sure for _, sure in found]).argmax(0)
            rows = np.arange(len(surest))
            latents.append(self.geometry.to_latent(np.stack([x for x, _ in found])[surest, rows]))
            confidence.append(np.stack([sure for _, sure in found])[surest, rows])
        latent = np.concatenate(latents).reshape(-1, *self.meta.latent_shape)
        return Samples(self.decode(latent), words, np.concatenate(confidence), latent)

    def describe(self, captions: Sequence[str]) -> Float32[np.ndarray, "B K T"]:
        """Captions as the network is told them."""
        return self.text_encoder.encode_tokens(captions, num_tokens=self.network.config.tokens)

    def coordinates(
        self,
        text: Float32[np.ndarray, "B K T"],
        numbers: Sequence[int],
        *,
        steps: int,
        seed: int = 0,
        attempt: int = 0,
        guidance: float = 1.0,
    ) -> tuple[Float32[np.ndarray, "B L"], Float32[np.ndarray, "B"]]:
        """End points in coordinates, and the confidence of the first step, from points drawn by (seed, number)."""
        x, condition = self.points(numbers, seed, attempt), torch.from_numpy(text).to(self.device)
        first = None
        with torch.inference_mode():
            for i in range(steps):
                noise = partial(self.points, numbers, seed, attempt, 1 + i)
                x, sure = self.objective.step(self.network, x, condition, i, steps, guidance, noise)
                first = sure if first is None else first
        assert first is not None
        return x.cpu().numpy(), first.cpu().numpy()

    def points(self, numbers: Sequence[int], *key: int) -> Float32[torch.Tensor, "B L"]:
        """Random points, one for each number, that depend on it and the key (seed, attempt ...) alone."""
        size, (seed, *rest) = self.geometry.latent_dim, key
        points = [np.random.default_rng([seed, n, *rest]).standard_normal(size) for n in numbers]
        return torch.from_numpy(self.geometry.project(np.stack(points))).to(self.device)

    def decode(self, latents: Float32[np.ndarray, "B C h w"]) -> "list[Image]":
        """Images of latents."""
        from PIL import Image

        batches = [self.image_encoder.decode(latents[i : i + 64]) for i in range(0, len(latents), 64)]
        return [Image.fromarray(pixels) for batch in batches for pixels in batch]


def _fetch(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise RunError(f"no run at {name}: give the folder that `trainer fit --out` has made, or a hub id ORG/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (OSError, ValueError) as error:
        raise RunError(f"no folder {name}, and the hub does not give it: {one_line(error)}") from error
