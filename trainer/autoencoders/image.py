"""Train an image autoencoder on a source's own pictures; what is saved is an ordinary diffusers AutoencoderKL.

Few latent numbers make the coalescer's task easier (what can be known of a target from a random point falls with
their count), so the default is a 4 x 4 grid of 2 channels whatever the picture's size.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from index.errors import OptionError
from trainer.autoencoders.data import load_pictures
from trainer.optimizer import Optimizer
from trainer.tracking import Watch

WIDTHS = {"tiny": 8, "small": 16, "base": 32, "large": 64}
"""Channels at full resolution; they double with every halving, up to eight times as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAutoencoderConfig:
    """How an image autoencoder is built and trained."""

    size: str = "tiny"
    image_size: int = 32
    """Side of the square pictures, in pixels."""
    grid: int = 4
    """Side of the latent grid; the picture's side is this times a power of two."""
    latent_channels: int = 2
    steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 5e-3
    kl_weight: float = 1e-4
    val_fraction: float = 0.05
    limit: int = 100_000
    """Pictures to train on at most; they are held in memory."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit each other."""
        if self.size not in WIDTHS:
            raise OptionError(f"--size {self.size!r} is unknown: choose one of {', '.join(WIDTHS)}")
        halvings = math.log2(self.image_size / self.grid) if min(self.image_size, self.grid) > 0 else -1.0
        if halvings < 1 or halvings != int(halvings):
            raise OptionError(
                f"--image-size {self.image_size} is not {self.grid} (--grid) times a power of two: try {self.grid * 8}"
            )

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        levels = int(math.log2(self.image_size // self.grid)) + 1
        return tuple(WIDTHS[self.size] * min(2**level, 8) for level in range(levels))


def fit_image_autoencoder(sources: list[str], config: ImageAutoencoderConfig, out: Path) -> dict[str, Any]:
    """Train, save to `out`, and report the PSNR of held-out pictures in dB (None where none are held out)."""
    from diffusers import AutoencoderKL

    pictures = load_pictures(
        sources, config.image_size, val_fraction=config.val_fraction, limit=config.limit, log=out / "log.jsonl"
    )
    torch.manual_seed(config.seed)
    channels = config.block_out_channels
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=config.latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=config.image_size,
    ).to(memory_format=torch.channels_last)
    optimizer = Optimizer(model, steps=config.steps, learning_rate=config.learning_rate, ema_decay=0.99)
    rng = np.random.default_rng(config.seed)
    with Watch("fit image autoencoder", total=config.steps, unit="steps", folder=out) as watch:
        for step in range(config.steps):
            x = to_signal(pictures.train[rng.integers(len(pictures.train), size=config.batch_size)])
            latent = model.encode(x).latent_dist
            error = (model.decode(latent.sample()).sample - x).square().mean()
            kl = latent.kl().mean() / x[0].numel()
            optimizer.step(error + config.kl_weight * kl)
            figures = {} if step % 50 else {"mse": error.item(), "kl": kl.item()}
            watch.advance(1, **figures)
    optimizer.use_average()
    model.save_pretrained(out)
    return {
        "psnr_db": psnr(model, pictures.heldout) if len(pictures.heldout) else None,
        "heldout_pictures": len(pictures.heldout),
        "train_pictures": len(pictures.train),
        "latent_shape": [config.latent_channels, config.grid, config.grid],
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        "seconds": round(watch.bar.seconds, 1),
    }


def to_signal(pixels: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Pixels as a signal in [-1, 1]."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def psnr(model: Any, pixels: UInt8[np.ndarray, "B H W 3"]) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, in dB."""
    each = []
    for start in range(0, len(pixels), 100):
        x = to_signal(pixels[start : start + 100])
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        each.append(-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)).clamp(min=1e-10)))
    return float(torch.cat(each).mean())
