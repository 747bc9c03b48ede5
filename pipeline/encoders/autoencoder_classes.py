"""The autoencoders of diffusers that encode one image and give it back, and how each is called.

Factors are computed from what builds the network, not from declared ratios, which may be missing or of another size.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Model = Any
"""A diffusers autoencoder."""


def _halvings(key: str) -> Callable[[Model], int]:
    """Return a function of the model: 2 for every level but the last of the list `key` in its config."""
    return lambda model: int(2 ** (len(model.config[key]) - 1))


def _declared(model: Model) -> int:
    return int(model.config["spatial_compression_ratio"])


def _patched(model: Model) -> int:
    """Wan and Qwen-Image 2.1: patches first, then levels."""
    return _halvings("dim_mult")(model) * int(model.config["patch_size"] or 1)


def _ltx(model: Model) -> int:
    """LTX: patches first, then the levels that shrink height and width, and not time alone."""
    config = model.config
    types = config.get("downsample_type") or ["conv"] * len(config["spatio_temporal_scaling"])
    levels = zip(config["spatio_temporal_scaling"], types, strict=True)
    return int(config["patch_size"] * 2 ** sum(scaled and kind != "temporal" for scaled, kind in levels))


def _no_arguments(model: Model, latent: "torch.Tensor") -> dict[str, Any]:
    return {}


def _timestep_zero(model: Model, latent: "torch.Tensor") -> dict[str, Any]:
    """LTX decoders with a timestep: 0, as in their pipelines."""
    return {"temb": latent.new_zeros(len(latent))} if model.config["timestep_conditioning"] else {}


def _takes_alpha(model: Model) -> bool:
    channels = model.config.get("input_channels") or model.config.get("in_channels") or 3
    return bool(channels == 4 * (model.config.get("patch_size") or 1) ** 2)


class AutoencoderClass(NamedTuple):
    """How a class of diffusers is called with images."""

    factor: Callable[[Model], int]
    """By how much the sides of a latent are smaller than those of its image."""
    low: float = -1.0
    """The value of a black pixel; a white one is 1."""
    time_axis: bool = False
    """Whether tensors are (B, C, frames, H, W): an image is one frame."""
    frames: Callable[[Model], int] = lambda model: 1
    """How often the one frame is repeated for the encoder; the decoder gives back one frame."""
    alone: bool = False
    """Whether images go in one at a time: the decoder draws noise, or fails on a batch."""
    float32: bool = False
    """Whether it computes in float32 whatever is asked for: half precision gives other latents."""
    alpha: Callable[[Model], bool] = lambda model: False
    """Whether images have an alpha channel: 1 (opaque) is given, and what is decoded is left out."""
    image_size: Callable[[Model], int] | None = None
    """The only size of images that is given back; None: every multiple of the factor."""
    decode_arguments: Callable[[Model, "torch.Tensor"], dict[str, Any]] = _no_arguments
    """What `decode` needs beside the latent."""
    normalizes: bool = False
    """Whether it applies the `latents_mean` and `latents_std` of its config itself."""


_BLOCKS = _halvings("block_out_channels")
_ENCODER_BLOCKS = _halvings("encoder_block_out_channels")

AUTOENCODERS = {
    "AutoencoderKL": AutoencoderClass(_BLOCKS),
    "AutoencoderTiny": AutoencoderClass(_ENCODER_BLOCKS),
    "AutoencoderDC": AutoencoderClass(_ENCODER_BLOCKS),
    "VQModel": AutoencoderClass(_BLOCKS),
    "AsymmetricAutoencoderKL": AutoencoderClass(_halvings("down_block_out_channels")),
    "AutoencoderKLFlux2": AutoencoderClass(_BLOCKS),
    "AutoencoderKLHunyuanImage": AutoencoderClass(_declared),
    "AutoencoderKLKVAE": AutoencoderClass(_halvings("ch_mult")),
    "AutoencoderKLTemporalDecoder": AutoencoderClass(_BLOCKS, decode_arguments=lambda model, latent: {"num_frames": 1}),
    "AutoencoderRAE": AutoencoderClass(
        lambda model: int(model.decoder_patch_size),
        low=0.0,
        image_size=lambda model: int(model.decoder_image_size),
        normalizes=True,
    ),
    "ConsistencyDecoderVAE": AutoencoderClass(_ENCODER_BLOCKS, alone=True),
    "AutoencoderKLCogVideoX": AutoencoderClass(_BLOCKS, time_axis=True),
    "AutoencoderKLCosmos": AutoencoderClass(_declared, time_axis=True),
    "AutoencoderKLHunyuanImageRefiner": AutoencoderClass(_declared, time_axis=True),
    "AutoencoderKLHunyuanVideo": AutoencoderClass(_declared, time_axis=True),
    "AutoencoderKLHunyuanVideo15": AutoencoderClass(_declared, time_axis=True, alone=True),
    "AutoencoderKLKVAEVideo": AutoencoderClass(_halvings("ch_mult"), time_axis=True),
    "AutoencoderKLLTXVideo": AutoencoderClass(_ltx, time_axis=True, alone=True, decode_arguments=_timestep_zero),
    "AutoencoderKLLTX2Video": AutoencoderClass(_ltx, time_axis=True, alone=True, decode_arguments=_timestep_zero),
    "AutoencoderKLMagvit": AutoencoderClass(_BLOCKS, time_axis=True),
    "AutoencoderKLMochi": AutoencoderClass(
        # Its encoder takes sines of pixels, to 64 periods from black to white and more, that half precision blurs.
        lambda model: math.prod(model.config["spatial_expansions"]),
        time_axis=True,
        float32=True,
    ),
    "AutoencoderKLQwenImage": AutoencoderClass(_halvings("dim_mult"), time_axis=True, alpha=_takes_alpha),
    "AutoencoderKLQwenImage21": AutoencoderClass(_patched, time_axis=True, alpha=_takes_alpha),
    "AutoencoderKLWan": AutoencoderClass(_patched, time_axis=True),
    "AutoencoderVidTok": AutoencoderClass(
        lambda model: int(2 ** len(model.encoder.spatial_ds)),
        time_axis=True,
        frames=lambda model: int(model.temporal_compression_ratio),
    ),
    "Kandinsky6SRVAE": AutoencoderClass(_ENCODER_BLOCKS, time_axis=True),
}
"""By class name, those that everybody has first."""

REFUSED = {
    "AutoencoderKLAllegro": "encodes videos in pieces of many frames",
    "AutoencoderKLMiniMaxH3": "cannot decode one frame",
    "LTX2VideoDiffusionDecoderModel": "has no encoder",
}
"""Autoencoders of images that cannot take one image or give it back, and why."""
