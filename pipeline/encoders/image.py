"""Diffusers autoencoders as image encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8

from index.errors import EncoderError, OptionError
from index.table.schema import EncoderRef
from pipeline.encoders.devices import encoding, prepare, split_if_out_of_memory
from pipeline.encoders.files import check_weights, digest_of, loading, locate

if TYPE_CHECKING:
    import torch

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
CPU_BATCH_PIXELS = 2**17
"""A CPU takes larger batches in parts: activations that leave its caches cost a tenth of the speed."""


class DiffusersAutoencoder:
    """AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel; the latent is the mode of a distribution."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None) -> None:
        """Load a folder or hub id (`ORG/NAME`, `ORG/NAME/SUBFOLDER`, `...@REVISION`), to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.ref = load_autoencoder(name, revision)
        self.device, self.dtype = device, prepare(self.model, device, dtype)

    @property
    def factor(self) -> int:
        """By how much the sides of a latent are smaller than those of its image."""
        config = self.model.config
        channels = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return int(2 ** (len(channels) - 1))

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return C, H, W of the latent of a square image, measured on a blank one.

        Raises OptionError if the side is no multiple of `factor`, EncoderError if the model cannot encode.
        """
        below = image_size // self.factor * self.factor
        if below != image_size:
            fits = [str(size) for size in (below, below + self.factor) if size]
            raise OptionError(
                f"--image-size {image_size} does not fit {self.ref.class_name} {self.ref.name}, which shrinks images "
                f"by {self.factor}: use {' or '.join(fits)}"
            )
        with encoding(self.ref):
            _, channels, height, width = self.encode(np.zeros((1, image_size, image_size, 3), np.uint8)).shape
        return channels, height, width

    def encode(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B C h w"]:
        """Return latents without the scaling factor; a batch that exceeds the device's memory is split."""
        import torch

        def forward(part: torch.Tensor) -> torch.Tensor:
            x = part.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
            return latent_of(self.model.encode(x.to(self.dtype))).float().cpu()

        batch = torch.from_numpy(pixels)
        if self.device.startswith("cuda"):
            parts: Sequence[torch.Tensor] = [batch.pin_memory()]
        else:
            parts = torch.split(batch, max(1, CPU_BATCH_PIXELS // (pixels.shape[1] * pixels.shape[2])))
        with torch.inference_mode():
            return np.asarray(torch.cat([split_if_out_of_memory(forward, part) for part in parts]))

    def decode(self, latent: Float32[np.ndarray, "B C h w"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Return the images of latents."""
        import torch

        with torch.inference_mode():
            x = self.model.decode(torch.from_numpy(latent).to(self.device, self.dtype)).sample
            x = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return np.asarray(x.permute(0, 2, 3, 1).cpu())

    def save(self, folder: Path) -> None:
        """Write a diffusers folder."""
        self.model.save_pretrained(folder)


def load_autoencoder(name: str, revision: str | None) -> tuple[Any, EncoderRef]:
    """Load a diffusers autoencoder; raises EncoderError if there is none or its weights do not match its config."""
    import diffusers

    with loading(name, "an image encoder"):
        place = locate(name, revision, "image")
        class_name = diffusers.AutoencoderKL.load_config(place.folder).get("_class_name")
        if class_name not in AUTOENCODERS:
            raise EncoderError(f"{name} is a {class_name}, not an autoencoder: use one of {', '.join(AUTOENCODERS)}")
        model, info = getattr(diffusers, class_name).from_pretrained(
            place.folder, variant=place.variant, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    check_weights(name, info)
    digest = digest_of(model)
    return model, EncoderRef(name=place.name, class_name=class_name, digest=digest, revision=place.revision)


def latent_of(encoded: Any) -> "torch.Tensor":
    """Return the latent tensor in the output of a diffusers autoencoder's `encode`."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()  # type: ignore[no-any-return]
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent  # type: ignore[no-any-return]
