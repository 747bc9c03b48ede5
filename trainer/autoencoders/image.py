"""Train an image autoencoder on a source's own images; the result is an ordinary diffusers AutoencoderKL.

A small latent makes the coalescer's task easier: how much of a target can be known from R falls with the number of
latent dimensions. So the default is a 4 x 4 latent of 2 channels at every image size. Mean and standard deviation of
each channel are saved as `latents_mean` and `latents_std` of the config, as other diffusers models have them.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from index.errors import OptionError
from index.ranges import COUNT, NOT_NEGATIVE, PIXELS, POSITIVE
from index.report.html import image_tag
from pipeline.sources.sample import ReadOptions
from trainer.autoencoders.data import Pixels, Samples, decode_pixels, window_of
from trainer.autoencoders.run import fit_autoencoder
from trainer.autoencoders.train import MEASURED, AutoencoderLoop, TrainConfig, TrainRuntime
from trainer.grid import draw_grid
from trainer.objectives.base import Loss
from trainer.stream import send
from trainer.tracking import RunLog

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNELS = {"tiny": 8, "small": 16, "base": 32, "large": 64}
"""Channels at full resolution; they double with every downsampling, up to eight times as many."""
SHOWN = 8
"""Held-out images that are shown with their reconstructions."""
MAX_COUNTED = 10_000
"""Training images that the statistics of latents are computed on."""
MEASURED_PIXELS = 100 * 32 * 32
"""Pixels of images that are reconstructed at once."""
MIN_STD = 1e-6


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


class ImageAutoencoderLoop(AutoencoderLoop[Pixels]):
    """An AutoencoderKL in training on squared error and a little KL divergence."""

    kind, title, unit = "image", "fit image autoencoder", "images"
    config_class, metrics = ImageAutoencoderConfig, ("psnr_db",)
    config: ImageAutoencoderConfig

    def make_samples(self, shards: list[str], options: ReadOptions) -> Samples[Pixels]:
        """Return the images of some shards."""
        return image_samples(shards, self.config, options)

    def make_model(self) -> Any:
        """Return an AutoencoderKL with fresh weights."""
        return make_image_autoencoder(self.config)

    def loss(self, batch: list[Pixels], generator: torch.Generator) -> Loss:
        """Return the loss of images."""
        x = to_signal(batch, self.device)
        model: Any = self.model
        posterior = model.encode(x).latent_dist
        # As posterior.sample(generator) does it, which waits for the device.
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=posterior.mean.dtype)
        y = model.decode(posterior.mean + posterior.std * send(noise, self.device)).sample
        mse, kl = (y - x).square().mean(), posterior.kl().mean() / x[0].numel()
        return Loss(mse + self.config.kl_weight * kl, {"mse": mse, "kl": kl})

    def measure(self, limit: int) -> dict[str, float]:
        """Return PSNR on held-out images."""
        heldout = self.samples.first.heldout[:limit]
        return {"psnr_db": psnr(self.optimizer.averaged_model, heldout, self.device)} if heldout else {}

    def describe(self) -> dict[str, Any]:
        """Return numbers of images, and what latents are like."""
        config = self.optimizer.averaged_model.config
        return {
            "heldout_images": len(self.samples.first.heldout[:MEASURED]),
            "train_images": self.record.position["seen"],
            "latent_shape": [config.latent_channels, self.config.latent_size, self.config.latent_size],
            "latents_mean": config.latents_mean,
            "latents_std": config.latents_std,
        }

    def show(self, log: RunLog) -> str:
        """Pass originals above their reconstructions to the log, and return them as HTML."""
        first = self.samples.first
        pixels = (first.heldout or first.train)[:SHOWN]
        grid = draw_pairs(pixels, list(reconstruct(self.optimizer.averaged_model, pixels, self.device)))
        log.log_image("reconstructions", grid)
        data = io.BytesIO()
        grid.save(data, "png")
        return image_tag(data.getvalue(), alt="images above their reconstructions")

    def save(self, folder: Path) -> None:
        """Write a diffusers folder, with the statistics of latents in its config."""
        model = self.optimizer.averaged_model
        mean, std = latent_statistics(model, self.samples.first.train[:MAX_COUNTED], self.device)
        model.register_to_config(latents_mean=mean, latents_std=std)
        model.save_pretrained(folder)


def fit_image_autoencoder(
    sources: list[str],
    config: ImageAutoencoderConfig,
    out: Path,
    *,
    resume: bool = False,
    runtime: TrainRuntime | None = None,
) -> dict[str, Any]:
    """Train an autoencoder, save it to `out`, and return its metrics; see `fit_autoencoder`."""
    return fit_autoencoder(ImageAutoencoderLoop, sources, config, out, resume=resume, runtime=runtime)


def image_samples(shards: list[str], config: ImageAutoencoderConfig, options: ReadOptions) -> Samples[Pixels]:
    """Return the images of some shards; one is held out if a table of the same `val_fraction` holds it out."""
    return Samples(
        kind="images",
        shards=shards,
        decode=partial(decode_pixels, image_size=config.image_size),
        window=window_of(3 * config.image_size**2, config.steps * config.batch_size),
        val_fraction=config.val_fraction,
        limit=config.limit,
        seed=config.seed,
        options=options,
    )


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
        scaling_factor=1.0,  # latents_mean and latents_std do it
    ).to(memory_format=torch.channels_last)


def to_signal(pixels: Sequence[Pixels], device: str) -> Float[Tensor, "B 3 H W"]:
    """Scale pixels to [-1, 1], on the device."""
    batch = torch.from_numpy(np.stack(pixels))
    batch = batch.pin_memory() if device.startswith("cuda") else batch
    x = send(batch, device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def psnr(model: Any, pixels: Sequence[Pixels], device: str = "cpu") -> float:
    """Return the mean peak signal-to-noise ratio of the reconstructions of images, in dB."""
    values = []
    for x in _signals(pixels, device):
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)).clamp(min=1e-10)))
    return float(torch.cat(values).mean())


@torch.inference_mode()
def latent_statistics(model: Any, pixels: Sequence[Pixels], device: str = "cpu") -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of the latents of images, over images and positions."""
    count, sums = 0, torch.zeros(2, 1, dtype=torch.float64)
    for x in _signals(pixels, device):
        latent = model.encode(x).latent_dist.mode().transpose(0, 1).flatten(1).cpu().double()
        sums, count = sums + torch.stack([latent.sum(1), latent.square().sum(1)]), count + latent.shape[1]
    mean, square = sums / count
    std = (square - mean.square()).clamp(min=MIN_STD**2).sqrt()
    return mean.float().tolist(), std.float().tolist()


@torch.inference_mode()
def reconstruct(model: Any, pixels: Sequence[Pixels], device: str = "cpu") -> UInt8[np.ndarray, "B H W 3"]:
    """Return the reconstructions of images."""
    y = torch.cat([model.decode(model.encode(x).latent_dist.mode()).sample for x in _signals(pixels, device)])
    return np.asarray(((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu())


def draw_pairs(pixels: Sequence[Pixels], reconstructions: Sequence[Pixels]) -> "Image":
    """Draw images, each above its reconstruction."""
    from PIL import Image

    names = ["original"] * len(pixels) + ["reconstruction"] * len(pixels)
    return draw_grid([Image.fromarray(each) for each in (*pixels, *reconstructions)], names, columns=len(pixels))


def _signals(pixels: Sequence[Pixels], device: str) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Yield images as signals, in batches of a bounded number of pixels."""
    size = max(1, MEASURED_PIXELS // (pixels[0].shape[0] * pixels[0].shape[1]))
    for start in range(0, len(pixels), size):
        yield to_signal(pixels[start : start + size], device)
