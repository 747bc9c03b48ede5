"""Image and text encoders: any diffusers autoencoder, any transformers text model, from a folder or the hub.

Weights are safetensors only and remote code is never trusted. A folder whose weights do not match its class would
load with a mere warning and then encode wrongly, so missing and unexpected weights are refused here.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from index.errors import EncoderError, OptionError
from index.table.schema import EncoderRef

if TYPE_CHECKING:
    import torch

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
PIXELS_AT_ONCE = 2**17
"""A CPU takes larger batches in parts: activations that leave its caches cost a tenth of the speed."""
# Parts of a checkpoint that its text model does not use: other towers, decoders, heads.
UNUSED_WEIGHTS = (
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
    "decoder.",
    "lm_head.",
    "cls.",
    "pooler.",
    "embeddings.position_ids",
    "text_model.embeddings.position_ids",
)


@runtime_checkable
class ImageEncoder(Protocol):
    """Pixels to latents."""

    ref: EncoderRef

    def encode(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B C h w"]:
        """Latents as the autoencoder gives them, unscaled."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to one vector each."""

    ref: EncoderRef

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Pooled embeddings, not normalized."""
        ...


class DiffusersAutoencoder:
    """AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel; of a distribution the mode is taken."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32") -> None:
        """Open a folder or hub id (`org/name` or `org/name/subfolder`); it computes in `dtype`."""
        self.model, self.ref = _load_autoencoder(name)
        self.device, self.dtype = device, _placed(self.model, device, dtype)

    def encode(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B C h w"]:
        """Latents as the autoencoder gives them, unscaled; a batch too large for the device is split."""
        import torch

        def forward(part: torch.Tensor) -> torch.Tensor:
            x = part.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
            return latent_of(self.model.encode(x.to(self.dtype))).float().cpu()

        whole = torch.from_numpy(pixels)
        if self.device.startswith("cuda"):
            parts: Sequence[torch.Tensor] = [whole.pin_memory()]
        else:
            parts = torch.split(whole, max(1, PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2])))
        with torch.inference_mode():
            return np.asarray(torch.cat([_in_parts(forward, part) for part in parts]))

    def decode(self, latent: Float32[np.ndarray, "B C h w"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Pixels of latents."""
        import torch

        with torch.inference_mode():
            x = self.model.decode(torch.from_numpy(latent).to(self.device, self.dtype)).sample
            x = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return np.asarray(x.permute(0, 2, 3, 1).cpu())

    def save(self, folder: Path) -> None:
        """Write an ordinary diffusers folder."""
        self.model.save_pretrained(folder)


def open_decoder(ref: EncoderRef) -> Callable[[Float32[np.ndarray, "B C h w"]], UInt8[np.ndarray, "B H W 3"]] | None:
    """Return the decoder of the autoencoder that made a table; None if it cannot be opened or its weights changed."""
    try:
        autoencoder = DiffusersAutoencoder(ref.name)
    except EncoderError:
        return None
    return autoencoder.decode if autoencoder.ref.digest == ref.digest else None


def latent_of(encoded: Any) -> "torch.Tensor":
    """The latent tensor in whatever a diffusers autoencoder's `encode` returns."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()  # type: ignore[no-any-return]
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent  # type: ignore[no-any-return]


class TransformersTextEncoder:
    """A CLIP text model by its pooled output, a T5 encoder or any BERT-like model by the mean of its token states."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32") -> None:
        """Open a folder or hub id that holds a text model and its tokenizer; it computes in `dtype`."""
        self.model, self.tokenizer, self.ref = _load_text_model(name)
        self.device = device
        _placed(self.model, device, dtype)
        limits = (
            self.tokenizer.model_max_length,
            getattr(self.model.config, "max_position_embeddings", None),
        )
        self.max_length = min(limit for limit in limits if limit)

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Pooled embeddings, not normalized; a caption that repeats is encoded once."""
        return self.describe(captions, tokens=0)[:, 0]

    def describe(self, captions: Sequence[str], *, tokens: int) -> Float32[np.ndarray, "B K T"]:
        """Pooled embeddings, and after each the states of its first `tokens` tokens; zeros where there are fewer."""
        import torch
        from torch.nn.functional import pad

        each = list(dict.fromkeys(captions))
        given = self.tokenizer(each, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt").to(
            self.device
        )
        mask = given["attention_mask"]
        with torch.inference_mode():
            out = self.model(input_ids=given["input_ids"], attention_mask=mask)
            states = out.last_hidden_state
            pooled = out.pooler_output if self.ref.class_name.startswith("CLIP") else mean_pool(states, mask)
            states = (states * mask[..., None])[:, :tokens]
            whole = torch.cat([pooled[:, None], pad(states, (0, 0, 0, tokens - states.shape[1]))], 1)
        place = {caption: i for i, caption in enumerate(each)}
        return np.asarray(whole.float().cpu())[[place[caption] for caption in captions]]

    def save(self, folder: Path) -> None:
        """Write an ordinary transformers folder, the tokenizer in it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _placed(model: "torch.nn.Module", device: str, dtype: str) -> "torch.dtype":
    """Make a model ready to run; returns its dtype."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    model.to(device, kind).eval().requires_grad_(False)
    return kind


def _in_parts(forward: Callable[["torch.Tensor"], "torch.Tensor"], batch: "torch.Tensor") -> "torch.Tensor":
    """`forward` of a batch, in halves where the device's memory does not hold the whole."""
    import torch

    try:
        return forward(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([_in_parts(forward, half) for half in batch.chunk(2)])


def mean_pool(states: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Mean of the token states (B, tokens, T) where the mask (B, tokens) is 1."""
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def _load_autoencoder(name: str) -> tuple[Any, EncoderRef]:
    import diffusers

    with _explained(name, "image autoencoder"):
        place = _place(name)
        kind = diffusers.AutoencoderKL.load_config(**place).get("_class_name")
        if kind not in AUTOENCODERS:
            raise EncoderError(f"{name} holds a {kind}; image encoders are {', '.join(AUTOENCODERS)}")
        model, info = getattr(diffusers, kind).from_pretrained(
            place["pretrained_model_name_or_path"],
            subfolder=place.get("subfolder"),
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    _refuse_mismatch(name, info)
    return model, EncoderRef(name=name, class_name=kind, digest=digest_of(model))


def _load_text_model(name: str) -> tuple[Any, Any, EncoderRef]:
    import transformers

    with _explained(name, "text model"):
        place = _place(name)
        path, subfolder = place["pretrained_model_name_or_path"], place.get("subfolder", "")
        config = transformers.AutoConfig.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
        family = {
            "clip": "CLIPTextModel",
            "clip_text_model": "CLIPTextModel",
            "t5": "T5EncoderModel",
            "mt5": "MT5EncoderModel",
            "umt5": "UMT5EncoderModel",
        }.get(config.model_type, "AutoModel")
        model, info = getattr(transformers, family).from_pretrained(
            path,
            subfolder=subfolder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        # A pipeline folder keeps its tokenizer beside the text encoder.
        words = subfolder.replace("text_encoder", "tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder=words, trust_remote_code=False)
    _refuse_mismatch(name, info, without=UNUSED_WEIGHTS)
    digest = digest_of(model, without=UNUSED_WEIGHTS)
    return model, tokenizer, EncoderRef(name=name, class_name=type(model).__name__, digest=digest)


def _place(name: str) -> dict[str, str]:
    """A folder as it is; a hub id of more than two parts as repository and subfolder."""
    if Path(name).is_dir():
        return {"pretrained_model_name_or_path": name}
    if name.startswith((".", "/", "~")) or name.count("/") < 1:
        raise EncoderError(f"no folder {name}: give a folder with config.json and model weights, or a hub id ORG/NAME")
    organization, repository, *rest = name.split("/")
    place = {"pretrained_model_name_or_path": f"{organization}/{repository}"}
    return place | ({"subfolder": "/".join(rest)} if rest else {})


@contextlib.contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn whatever the libraries raise while loading into an EncoderError."""
    quiet_libraries()
    try:
        yield
    except EncoderError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        text = " ".join(str(error).split())[:200]
        hint = "" if Path(name).is_dir() else " (is it a hub id, and can the hub be reached?)"
        raise EncoderError(f"{name} cannot be opened as {what}: {text}{hint}") from error


def quiet_libraries() -> None:
    """Keep the warnings, retries and progress bars of the model libraries off our terminal."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")


def _refuse_mismatch(name: str, info: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(k) for k in info.get(trouble) or () if not str(k).startswith(without))
        if keys:
            raise EncoderError(
                f"{name}: its weights do not fit its config, {len(keys)} {trouble.replace('_', ' ')} "
                f"such as {keys[0]}: save it again with save_pretrained"
            )


def digest_of(model: "torch.nn.Module", without: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and bytes of all weights but those that start with one of some prefixes, in hex."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pick_device(wanted: str = "auto") -> str:
    """`cuda`, `mps` or `cpu`: the first there is, unless one is named; OptionError where that is not there."""
    import torch

    if wanted != "auto":
        try:
            torch.empty(1, device=wanted)
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"--device {wanted} cannot be used: {str(error).splitlines()[0]}") from error
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
