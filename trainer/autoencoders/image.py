"""Train an image autoencoder on a source's own images; the result is an ordinary diffusers AutoencoderKL.

A small latent makes the coalescer's task easier: how much of a target can be known from R falls with the number of
latent dimensions. So the default is a 4 x 4 latent of 2 channels at every image size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from index.errors import OptionError
from index.ranges import COUNT, NOT_NEGATIVE, PIXELS, POSITIVE, TOTAL
from trainer.autoencoders.data import load_images
from trainer.autoencoders.train import TrainConfig, train
from trainer.objectives.base import Loss

CHANNELS = {"tiny": 8, "small": 16, "base": 32, "large": 64}
"""Channels at full resolution; they double with every downsampling, up to eight times as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAutoencoderConfig(TrainConfig):
    """How an image autoencoder is built and trained."""

    image_size: Annotated[int, PIXELS] = 32
    """Side of the square images, in pixels."""
    latent_size: Annotated[int, COUNT] = 4
    """Side of the square latents; the image size is this times a power of two."""
    latent_channels: Annotated[int, COUNT] = 2
    steps: Annotated[int, COUNT] = 1200
    batch_size: Annotated[int, COUNT] = 16
    learning_rate: Annotated[float, POSITIVE] = 5e-3
    kl_weight: Annotated[float, NOT_NEGATIVE] = 1e-4
    limit: Annotated[int, TOTAL] = 100_000

    def __post_init__(self) -> None:
        """Raise OptionError if the sizes are unknown or do not fit each other."""
        TrainConfig.__post_init__(self)
        if self.downsamplings < 1 or self.image_size != self.latent_size * 2**self.downsamplings:
            raise OptionError(
                f"--image-size {self.image_size} is not --latent-size {self.latent_size} times 2, 4, 8 ...: use for "
                f"instance --image-size {self.latent_size * 8}"
            )

    @property
    def downsamplings(self) -> int:
        """Return how many times the encoder halves the side of an image."""
        return (max(self.image_size, 1) // self.latent_size).bit_length() - 1

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Return the channels at each resolution, from the image's to the latent's."""
        return tuple(CHANNELS[self.size] * min(2**level, 8) for level in range(self.downsamplings + 1))


def fit_image_autoencoder(sources: list[str], config: ImageAutoencoderConfig, out: Path) -> dict[str, Any]:
    """Train an autoencoder, save it to `out`, and return its metrics; PSNR is None if no images are held out."""
    images = load_images(
        sources,
        config.image_size,
        val_fraction=config.val_fraction,
        limit=config.limit,
        storage=config.storage,
        log=out / "log.jsonl",
    )
    torch.manual_seed(config.seed)
    model = make_image_autoencoder(config)

    def loss(rng: np.random.Generator) -> Loss:
        x = to_signal(images.train[rng.integers(len(images.train), size=config.batch_size)])
        posterior = model.encode(x).latent_dist
        mse = (model.decode(posterior.sample()).sample - x).square().mean()
        kl = posterior.kl().mean() / x[0].numel()
        return Loss(mse + config.kl_weight * kl, {"mse": mse, "kl": kl})

    averaged, seconds = train("image", model, loss, config, out)
    averaged.save_pretrained(out)
    return {
        "psnr_db": psnr(averaged, images.heldout) if len(images.heldout) else None,
        "heldout_images": len(images.heldout),
        "train_images": len(images.train),
        "latent_shape": [config.latent_channels, config.latent_size, config.latent_size],
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        "seconds": round(seconds, 1),
    }


def make_image_autoencoder(config: ImageAutoencoderConfig) -> Any:
    """Return an AutoencoderKL with fresh weights."""
    from diffusers import AutoencoderKL

    channels = config.block_out_channels
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=config.latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=config.image_size,
    ).to(memory_format=torch.channels_last)


def to_signal(pixels: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Scale pixels to [-1, 1]."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def psnr(model: Any, pixels: UInt8[np.ndarray, "B H W 3"]) -> float:
    """Return the mean peak signal-to-noise ratio of the reconstructions of images, in dB."""
    values = []
    for start in range(0, len(pixels), 100):
        x = to_signal(pixels[start : start + 100])
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)).clamp(min=1e-10)))
    return float(torch.cat(values).mean())
