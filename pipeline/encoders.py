"""Image and text encoders: diffusers autoencoders and transformers text models, from a folder or the hub.

Weights are read from safetensors only, and remote code is never run. The libraries load weights that do not match the
model with a mere warning and then encode wrongly, so missing, unexpected and mismatched weights are refused here.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from index.errors import EncoderError, OptionError, one_line
from index.table.schema import EncoderRef

if TYPE_CHECKING:
    import torch

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Classes by `model_type` of config.json, for models of which only the text encoder is used; all others: AutoModel."""
UNUSED_WEIGHTS = (
    *("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    *("decoder.", "lm_head.", "cls.", "pooler."),
    *("embeddings.position_ids", "text_model.embeddings.position_ids"),
)
"""Prefixes of weights that a checkpoint holds and its text encoder does not use: other towers, decoders, heads."""
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

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32") -> None:
        """Load a folder or hub id (`org/name` or `org/name/subfolder`), to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.ref = _load_autoencoder(name)
        self.device, self.dtype = device, _prepare(self.model, device, dtype)

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
    """A CLIP text model, pooled by itself, or a T5 encoder or BERT-like model, pooled by the mean over tokens."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32") -> None:
        """Load a folder or hub id that holds a text model and its tokenizer, to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.tokenizer, self.ref = _load_text_model(name)
        self.device = device
        _prepare(self.model, device, dtype)
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None))
        self.max_length = min(limit for limit in limits if limit)

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Return pooled embeddings, not normalized; a caption that repeats is encoded once."""
        return self.encode_tokens(captions, num_tokens=0)[:, 0]

    def encode_tokens(self, captions: Sequence[str], *, num_tokens: int) -> Float32[np.ndarray, "B 1+{num_tokens} T"]:
        """Return the pooled embedding and then the first `num_tokens` token embeddings, padded with zeros."""
        import torch
        from torch.nn.functional import pad

        unique = list(dict.fromkeys(captions))
        inputs = self.tokenizer(
            unique, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        mask = inputs["attention_mask"]
        with torch.inference_mode():
            outputs = self.model(input_ids=inputs["input_ids"], attention_mask=mask)
            states = outputs.last_hidden_state
            pooled = outputs.pooler_output if self.ref.kind.startswith("CLIP") else mean_pool(states, mask)
            tokens = (states * mask[..., None])[:, :num_tokens]
            embeddings = torch.cat([pooled[:, None], pad(tokens, (0, 0, 0, num_tokens - tokens.shape[1]))], 1)
        position = {caption: i for i, caption in enumerate(unique)}
        return np.asarray(embeddings.float().cpu())[[position[caption] for caption in captions]]

    def save(self, folder: Path) -> None:
        """Write a transformers folder with the tokenizer in it."""
        self.model.save_pretrained(folder)
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


def digest_of(model: "torch.nn.Module", exclude: tuple[str, ...] = ()) -> str:
    """Return the SHA-256, in hex, of the names and bytes of all weights except those with an excluded prefix."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(exclude):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def quiet_libraries() -> None:
    """Silence the warnings, retries and progress bars of diffusers, transformers and huggingface_hub."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")


def _load_autoencoder(name: str) -> tuple[Any, EncoderRef]:
    import diffusers

    with _loading(name, "an image encoder"):
        path, subfolder = _locate(name)
        class_name = diffusers.AutoencoderKL.load_config(path, subfolder=subfolder or None).get("_class_name")
        if class_name not in AUTOENCODERS:
            raise EncoderError(f"{name} is a {class_name}, not an autoencoder: use one of {', '.join(AUTOENCODERS)}")
        model, info = getattr(diffusers, class_name).from_pretrained(
            path,
            subfolder=subfolder or None,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    _check_weights(name, info)
    return model, EncoderRef(name=name, kind=class_name, digest=digest_of(model))


def _load_text_model(name: str) -> tuple[Any, Any, EncoderRef]:
    import transformers

    with _loading(name, "a text encoder"):
        path, subfolder = _locate(name)
        config = transformers.AutoConfig.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
        model, info = getattr(transformers, TEXT_MODELS.get(config.model_type, "AutoModel")).from_pretrained(
            path,
            subfolder=subfolder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        # In a diffusers pipeline the tokenizer of text_encoder_2 is in tokenizer_2.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, subfolder=subfolder.replace("text_encoder", "tokenizer"), trust_remote_code=False
        )
    _check_weights(name, info, exclude=UNUSED_WEIGHTS)
    digest = digest_of(model, exclude=UNUSED_WEIGHTS)
    return model, tokenizer, EncoderRef(name=name, kind=type(model).__name__, digest=digest)


def _locate(name: str) -> tuple[str, str]:
    """Return a folder or hub repository, and the subfolder that a hub id of more than two parts names (else empty)."""
    if Path(name).is_dir():
        return name, ""
    if name.startswith((".", "/", "~")) or name.count("/") < 1:
        raise EncoderError(f"no folder {name}: use a folder with config.json and model weights, or a hub id ORG/NAME")
    organization, repository, *subfolders = name.split("/")
    return f"{organization}/{repository}", "/".join(subfolders)


@contextlib.contextmanager
def _loading(name: str, role: str) -> Iterator[None]:
    """Turn the exceptions of the model libraries into an EncoderError."""
    quiet_libraries()
    try:
        yield
    except EncoderError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        fix = "save it with save_pretrained" if Path(name).is_dir() else "check the hub id and the connection"
        raise EncoderError(f"{name} cannot be loaded as {role} ({one_line(error)}): {fix}") from error


def _check_weights(name: str, info: dict[str, Any], exclude: tuple[str, ...] = ()) -> None:
    """Raise EncoderError if `from_pretrained` reported weights that do not match the model."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(problem) or () if not str(key).startswith(exclude))
        if keys:
            raise EncoderError(
                f"the weights of {name} do not match its config ({len(keys)} {problem.replace('_', ' ')}, such as "
                f"{keys[0]}): save it again with save_pretrained"
            )


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
