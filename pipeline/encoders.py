"""Image and text encoders: diffusers autoencoders and transformers text models, from a folder or the hub.

Those that made a table are opened again by pipeline/stored_encoders.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from index.errors import EncoderError, OptionError, one_line
from index.table.schema import EncoderRef
from pipeline.model_files import load_autoencoder, load_text_model
from pipeline.tokenizers import UNLIMITED, max_length

if TYPE_CHECKING:
    import torch

POOLING_MODELS = ("CLIP", "Siglip")
"""Prefixes of classes whose own pooled output is the text embedding; all others: the mean over tokens."""
PADDED_MODELS = ("Siglip",)
"""Prefixes of classes that were trained on captions padded to the maximum length, without an attention mask."""
TRIAL_TOKENS = 1024
"""Longer captions are not tried before a run."""
CPU_BATCH_PIXELS = 2**17
"""A CPU takes larger batches in parts: activations that leave its caches cost a tenth of the speed."""


@runtime_checkable
class ImageEncoder(Protocol):
    """Maps images to latents."""

    ref: EncoderRef

    def encode(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B C h w"]:
        """Return the autoencoder's latents, without its scaling factor."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Maps captions to text embeddings."""

    ref: EncoderRef

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Return pooled embeddings, not normalized."""
        ...


class DiffusersAutoencoder:
    """AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel; the latent is the mode of a distribution."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None) -> None:
        """Load a folder or hub id (`ORG/NAME`, `ORG/NAME/SUBFOLDER`, `...@REVISION`), to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.ref = load_autoencoder(name, revision)
        self.device, self.dtype = device, _prepare(self.model, device, dtype)

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
        with _encoding(self.ref):
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
            return np.asarray(torch.cat([_split_if_out_of_memory(forward, part) for part in parts]))

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


class TransformersTextEncoder:
    """A CLIP or SigLIP text model, pooled by itself, or another text encoder, pooled by the mean over tokens.

    Of a model with encoder and decoder, such as BART, the encoder is used.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None) -> None:
        """Load a folder or hub id that holds a text model and its tokenizer, to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.tokenizer, self.ref = load_text_model(name, revision)
        self._saved_dtype, self.device = self.model.dtype, device
        self._encoder = (
            self.model.get_encoder() if getattr(self.model.config, "is_encoder_decoder", False) else self.model
        )
        _prepare(self._encoder, device, dtype)
        self.max_length = max_length(self.model, self.tokenizer)

    def text_dim(self) -> int:
        """Return the dimensions of a text embedding; raises EncoderError if the model cannot encode."""
        with _encoding(self.ref):
            named = self.tokenizer.model_max_length < UNLIMITED
            # A limit that no tokenizer names is tried here, and not by the first long caption of a run.
            return int(self.encode(["a", "a" + " a" * (0 if named else min(self.max_length, TRIAL_TOKENS))]).shape[1])

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Return pooled embeddings, not normalized; a caption that repeats is encoded once."""
        return self.encode_tokens(captions, num_tokens=0)[:, 0]

    def encode_counted(self, captions: Sequence[str]) -> tuple[Float32[np.ndarray, "B T"], Bool[np.ndarray, "B"]]:
        """Return pooled embeddings, and which captions were truncated to `max_length` tokens."""
        embeddings, inputs = self._encode(captions, 0)
        full = {caption for caption, length in inputs.items() if length >= self.max_length}
        return embeddings[:, 0], np.array([caption in full and self._exceeds(caption) for caption in captions], bool)

    def encode_tokens(self, captions: Sequence[str], *, num_tokens: int) -> Float32[np.ndarray, "B 1+{num_tokens} T"]:
        """Return the pooled embedding and then the first `num_tokens` token embeddings, padded with zeros."""
        return self._encode(captions, num_tokens)[0]

    def _encode(
        self, captions: Sequence[str], num_tokens: int
    ) -> tuple[Float32[np.ndarray, "B 1+{num_tokens} T"], dict[str, int]]:
        """Return embeddings, and the number of tokens of each distinct caption after truncation."""
        import torch
        from torch.nn.functional import pad

        unique = list(dict.fromkeys(captions))
        ids, mask = self._tokenize(unique)
        with torch.inference_mode():
            masked = {} if self._is_one_of(PADDED_MODELS) else {"attention_mask": mask}
            outputs = self._encoder(input_ids=ids, **masked)
            states = outputs.last_hidden_state
            pooled = outputs.pooler_output if self._is_one_of(POOLING_MODELS) else mean_pool(states, mask)
            tokens = (states * mask[..., None])[:, :num_tokens]
            embeddings = torch.cat([pooled[:, None], pad(tokens, (0, 0, 0, num_tokens - tokens.shape[1]))], 1)
        position = {caption: i for i, caption in enumerate(unique)}
        lengths = dict(zip(unique, mask.sum(1).tolist(), strict=True))
        return np.asarray(embeddings.float().cpu())[[position[caption] for caption in captions]], lengths

    def _tokenize(self, captions: list[str]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return token ids and mask, on the device."""
        inputs = self.tokenizer(
            captions,
            padding="max_length" if self._is_one_of(PADDED_MODELS) else True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        return inputs["input_ids"], inputs["attention_mask"]

    def _exceeds(self, caption: str) -> bool:
        return len(self.tokenizer([caption], verbose=False)["input_ids"][0]) > self.max_length

    def _is_one_of(self, prefixes: tuple[str, ...]) -> bool:
        return self.ref.class_name.startswith(prefixes)

    def save(self, folder: Path) -> None:
        """Write a transformers folder with the tokenizer in it, in the data type of the weights as they were read."""
        dtype = self._encoder.dtype
        self.model.to(self._saved_dtype).save_pretrained(folder)
        self._encoder.to(dtype)
        self.tokenizer.save_pretrained(folder)


def latent_of(encoded: Any) -> "torch.Tensor":
    """Return the latent tensor in the output of a diffusers autoencoder's `encode`."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()  # type: ignore[no-any-return]
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent  # type: ignore[no-any-return]


def mean_pool(states: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the mean (B, T) of the token states (B, tokens, T) at which the mask (B, tokens) is 1."""
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def resolve_device(device: str = "auto") -> str:
    """Return `device`, or for auto the first of cuda, mps and cpu that is available.

    Raises OptionError if the device does not exist on this machine.
    """
    import torch

    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(
                f"--device {device} cannot be used ({reason}): use auto, cpu, cuda, cuda:N or mps"
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def _encoding(ref: EncoderRef) -> Iterator[None]:
    """Turn the exceptions of a first encoding into an EncoderError: models raise those of any class."""
    try:
        yield
    except Exception as error:
        raise EncoderError(
            f"{ref.class_name} {ref.name} cannot encode ({one_line(error, typed=True)}): use another encoder"
        ) from error


def _prepare(model: "torch.nn.Module", device: str, dtype: str) -> "torch.dtype":
    """Move a model to a device for inference, and return its torch dtype."""
    import torch

    torch_dtype: torch.dtype = getattr(torch, dtype)
    model.to(device, torch_dtype).eval().requires_grad_(False)
    return torch_dtype


def _split_if_out_of_memory(
    forward: Callable[["torch.Tensor"], "torch.Tensor"], batch: "torch.Tensor"
) -> "torch.Tensor":
    """Return `forward(batch)`, computed in halves if the device runs out of memory."""
    import torch

    try:
        return forward(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([_split_if_out_of_memory(forward, half) for half in batch.chunk(2)])
