"""Diffusers autoencoders as image encoders."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8

from index.errors import EncoderError, OptionError
from index.table.schema import EncoderRef
from pipeline.encoders.autoencoder_classes import AUTOENCODERS, REFUSED
from pipeline.encoders.devices import encoding, prepare, split_if_out_of_memory
from pipeline.encoders.files import check_weights, digest_of, loading, locate

if TYPE_CHECKING:
    import torch

CPU_BATCH_PIXELS = 2**17
"""A CPU takes larger batches in parts: activations that leave its caches cost a tenth of the speed."""
TRIAL_PIXELS = 256
"""Side of the image that is decoded on trial."""


class DiffusersAutoencoder:
    """An autoencoder of AUTOENCODERS. Latents are normalized by channel if its config has their mean and deviation.

    Otherwise they are unscaled; of a distribution they are its mode.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None) -> None:
        """Load a folder or hub id (`ORG/NAME`, `ORG/NAME/SUBFOLDER`, `...@REVISION`), to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.ref, self._files = load_autoencoder(name, revision)
        self.kind = AUTOENCODERS[self.ref.class_name]
        self.device, self.dtype = device, prepare(self.model, device, "float32" if self.kind.float32 else dtype)
        mean, std = (self.model.config.get(key) for key in ("latents_mean", "latents_std"))
        if mean is not None and std is not None and not self.kind.normalizes:
            self.ref = replace(self.ref, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))

    def normalizing_as(self, ref: EncoderRef) -> "DiffusersAutoencoder":
        """Return it with latents as a table has them, which may be older than its config, or not normalized at all."""
        other = copy.copy(self)
        other.ref = replace(self.ref, latents_mean=ref.latents_mean, latents_std=ref.latents_std)
        return other

    @property
    def factor(self) -> int:
        """By how much the sides of a latent are smaller than those of its image."""
        return self.kind.factor(self.model)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return C, h, w of the latent of a square image, measured on a blank one.

        Raises OptionError if the model gives back no images of this size, EncoderError if it cannot encode and decode.
        """
        self._check_size(image_size)
        side = image_size // self.factor
        with encoding(self.ref):
            latent = self.encode(np.zeros((1, image_size, image_size, 3), np.uint8))
        if latent.shape[2:] != (side, side):
            raise self._unlike(f"latents of {image_size} pixels have the shape {latent.shape[1:]}")
        shown = side if self.kind.image_size else min(side, max(1, TRIAL_PIXELS // self.factor))
        with encoding(self.ref, "decode"):
            decoded = self.decode(np.ascontiguousarray(latent[:, :, :shown, :shown])).shape[1]
        if decoded != shown * self.factor:
            raise self._unlike(f"latents of {shown} x {shown} are decoded to {decoded} pixels")
        return latent.shape[1], side, side

    def _unlike(self, found: str) -> EncoderError:
        return EncoderError(
            f"{self.ref.class_name} {self.ref.name} shrinks images by {self.factor} according to its config, but "
            f"{found}: use another encoder"
        )

    def _check_size(self, image_size: int) -> None:
        model = f"{self.ref.class_name} {self.ref.name}"
        if self.kind.image_size is not None:
            only = self.kind.image_size(self.model)
            if image_size != only:
                raise OptionError(
                    f"--image-size {image_size} does not fit {model}, which gives back {only} pixels: use {only}"
                )
            return
        below = image_size // self.factor * self.factor
        if below != image_size:
            fits = [str(size) for size in (below, below + self.factor) if size]
            raise OptionError(
                f"--image-size {image_size} does not fit {model}, which shrinks images by {self.factor}: "
                f"use {' or '.join(fits)}"
            )

    def encode(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B C h w"]:
        """Return latents, without the scaling factor; a batch that exceeds the device's memory is split."""
        import torch

        batch = torch.from_numpy(pixels)
        size = max(1, CPU_BATCH_PIXELS // (pixels.shape[1] * pixels.shape[2]))
        if self.device.startswith("cuda"):
            batch, size = batch.pin_memory(), len(batch)
        parts = torch.split(batch, 1 if self.kind.alone else size)
        with torch.inference_mode():
            return np.asarray(torch.cat([split_if_out_of_memory(self._encode, part) for part in parts]))

    def decode(self, latent: Float32[np.ndarray, "B C h w"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Return the images of latents; an image does not depend on its batch, nor on chance."""
        import torch

        batch = torch.from_numpy(latent)
        parts = torch.split(batch, 1 if self.kind.alone else len(batch))
        with torch.inference_mode():
            x = torch.cat([split_if_out_of_memory(self._decode, part) for part in parts])
            scale = 255 / (1 - self.kind.low)
            x = ((x - self.kind.low) * scale).round().clamp(0, 255).to(torch.uint8)
            return np.asarray(x.permute(0, 2, 3, 1).cpu())

    def _encode(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Return the float32 latents (B, C, h, w) of pixels (B, H, W, 3), on the CPU."""
        import torch

        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        x = x / (255 / (1 - self.kind.low)) + self.kind.low
        if self.kind.alpha(self.model):
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        if self.kind.time_axis:
            x = x[:, :, None].repeat(1, 1, self.kind.frames(self.model), 1, 1)
        latent = latent_of(self.model.encode(x.to(self.dtype)))
        latent = (latent[:, :, 0] if self.kind.time_axis else latent).float()
        if self.ref.latents_std:
            mean, std = self._statistics(latent)
            latent = (latent - mean) / std
        return latent.cpu()

    def _decode(self, latent: "torch.Tensor") -> "torch.Tensor":
        """Return what the model makes of latents (B, C, h, w): float32 images (B, 3, H, W) in its own range."""
        x = latent.to(self.device)
        if self.ref.latents_std:
            mean, std = self._statistics(x)
            x = x * std + mean
        x = x.to(self.dtype)
        x = x[:, :, None] if self.kind.time_axis else x
        with _fixed_seed(self.device) if self.kind.alone else contextlib.nullcontext():
            decoded = self.model.decode(x, **self.kind.decode_arguments(self.model, x))
        images = getattr(decoded, "sample", decoded)
        rgb: torch.Tensor = (images[:, :, 0] if self.kind.time_axis else images)[:, :3].float()
        return rgb

    def _statistics(self, latent: "torch.Tensor") -> "torch.Tensor":
        """Return mean and standard deviation of each channel, (2, C, 1, 1); of videos those of the first frame."""
        import torch

        values = torch.tensor([self.ref.latents_mean, self.ref.latents_std], device=latent.device)
        return values.view(2, latent.shape[1], -1)[:, :, :1, None]

    def save(self, folder: Path) -> None:
        """Write a diffusers folder: the very files that the weights were read from."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._files:
            shutil.copyfile(path, folder / path.name)


def load_autoencoder(name: str, revision: str | None) -> tuple[Any, EncoderRef, list[Path]]:
    """Load a diffusers autoencoder, and return it with the files that it was read from.

    Raises EncoderError if there is none, or its weights do not match its config.
    """
    import diffusers

    with loading(name, "an image encoder"):
        place = locate(name, revision, "image")
        class_name = _class_name(name, diffusers.AutoencoderKL.load_config(place.folder))
        model, info = getattr(diffusers, class_name).from_pretrained(
            place.folder,
            variant=place.variant,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,  # refused below, in our words
            output_loading_info=True,
        )
    check_weights(name, info)
    ref = EncoderRef(name=place.name, class_name=class_name, digest=digest_of(model), revision=place.revision)
    return model, ref, [place.folder / "config.json", *weight_files(place.folder, place.variant)]


def _class_name(name: str, config: dict[str, Any]) -> str:
    """Return the class that a config.json names; raise EncoderError if it is none of AUTOENCODERS."""
    import diffusers

    class_name = str(config.get("_class_name") or next(iter(config.get("architectures") or ["model without a class"])))
    if class_name in REFUSED:
        raise EncoderError(
            f"{name} is a {class_name}, which {REFUSED[class_name]}: use one of {', '.join(AUTOENCODERS)}"
        )
    if class_name not in AUTOENCODERS:
        raise EncoderError(f"{name} is a {class_name}, not an autoencoder: use one of {', '.join(AUTOENCODERS)}")
    if not hasattr(diffusers, class_name):
        raise EncoderError(
            f"{name} is a {class_name}, which diffusers {diffusers.__version__} does not have: "
            "update it with pip install --upgrade diffusers"
        )
    return class_name


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weights of a variant: one file, or an index and its shards."""
    suffix = f".{variant}" if variant else ""
    index = folder / f"diffusion_pytorch_model.safetensors.index{suffix}.json"
    if not index.is_file():
        return [folder / f"diffusion_pytorch_model{suffix}.safetensors"]
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [index, *(folder / shard for shard in shards)]


def latent_of(encoded: Any) -> "torch.Tensor":
    """Return the latent tensor in the output of a diffusers autoencoder's `encode`."""
    if isinstance(encoded, tuple):  # VidTok's quantized latents, with their indices
        return encoded[0]  # type: ignore[no-any-return]
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()  # type: ignore[no-any-return]
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent  # type: ignore[no-any-return]


@contextlib.contextmanager
def _fixed_seed(device: str) -> Iterator[None]:
    """Give decoders that draw noise the same one for each image, and leave the global generators as they were."""
    import torch

    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(0)
        yield
