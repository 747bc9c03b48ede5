"""Find and load the files of an encoder: a folder by its absolute path, a hub id by its commit.

Weights are read from safetensors only, and remote code is never run. The libraries load weights that do not match the
model with a mere warning and then encode wrongly, so missing, unexpected and mismatched weights are refused here.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from index.errors import EncoderError, one_line
from index.table.schema import EncoderRef
from pipeline.tokenizers import prepare_tokenizer, tokenizer_digest_of, tokenizer_place

if TYPE_CHECKING:
    import torch

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
"""Classes by `model_type` of config.json, for models of which only the text encoder is used; all others: AutoModel."""
UNUSED_WEIGHTS = (
    *("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias"),
    *("decoder.", "lm_head.", "cls.", "pooler.", "final_logits_bias"),
    *("embeddings.position_ids", "text_model.embeddings.position_ids"),
)
"""Prefixes of weights that a checkpoint holds and its text encoder does not use: other towers, decoders, heads."""


class Place(NamedTuple):
    """Where the libraries find the files of an encoder."""

    name: str
    """Absolute folder, or hub id without its revision, as it is stored with a table."""
    path: str
    """Folder, or hub repository."""
    subfolder: str
    """In a hub repository, else empty."""
    revision: str | None
    """Commit of a hub repository; None for a folder."""


def locate(name: str, revision: str | None = None) -> Place:
    """Find a folder, or the commit of a hub id `ORG/NAME`, `ORG/NAME/SUBFOLDER` with or without `@REVISION`.

    Raises EncoderError if there is no such folder and the name is no hub id, or what the hub client raises.
    """
    folder = os.path.abspath(os.path.expanduser(name))
    if Path(folder).is_dir():
        return Place(folder, folder, "", None)
    if name.startswith((".", "/", "~")) or name.count("/") < 1:
        raise EncoderError(f"no folder {name}: use a folder with config.json and model weights, or a hub id ORG/NAME")
    hub_id, _, typed = name.partition("@")
    organization, repository, *subfolders = hub_id.split("/")
    path, subfolder = f"{organization}/{repository}", "/".join(subfolders)
    from huggingface_hub import hf_hub_download

    config = hf_hub_download(path, "config.json", subfolder=subfolder or None, revision=revision or typed or None)
    # The cache keeps it as .../snapshots/COMMIT/[SUBFOLDER/]config.json.
    return Place(hub_id, path, subfolder, Path(config).parents[len(subfolders)].name)


def find_encoder(name: str, role: str) -> tuple[str, str | None]:
    """Return the absolute folder of an encoder and None, or its hub id and commit. Raises EncoderError."""
    with _loading(name, f"the {role} encoder"):
        place = locate(name)
    return place.name, place.revision


def load_autoencoder(name: str, revision: str | None) -> tuple[Any, EncoderRef]:
    """Load a diffusers autoencoder; raises EncoderError if there is none or its weights do not match its config."""
    import diffusers

    with _loading(name, "an image encoder"):
        place = locate(name, revision)
        where: dict[str, Any] = {"subfolder": place.subfolder or None, "revision": place.revision}
        class_name = diffusers.AutoencoderKL.load_config(place.path, **where).get("_class_name")
        if class_name not in AUTOENCODERS:
            raise EncoderError(f"{name} is a {class_name}, not an autoencoder: use one of {', '.join(AUTOENCODERS)}")
        model, info = getattr(diffusers, class_name).from_pretrained(
            place.path, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **where
        )
    _check_weights(name, info)
    digest = digest_of(model)
    return model, EncoderRef(name=place.name, class_name=class_name, digest=digest, revision=place.revision)


def load_text_model(name: str, revision: str | None) -> tuple[Any, Any, EncoderRef]:
    """Load a transformers text model and its tokenizer; raises EncoderError as `load_autoencoder` does."""
    import transformers

    with _loading(name, "a text encoder"):
        place = locate(name, revision)
        where: dict[str, Any] = {"revision": place.revision or "main", "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(place.path, subfolder=place.subfolder, **where)
        model, info = getattr(transformers, TEXT_MODELS.get(config.model_type, "AutoModel")).from_pretrained(
            place.path, subfolder=place.subfolder, use_safetensors=True, output_loading_info=True, **where
        )
        path, subfolder = tokenizer_place(place.path, place.subfolder, on_hub=place.revision is not None)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder=subfolder, **where)
    _check_weights(name, info, exclude=UNUSED_WEIGHTS)
    prepare_tokenizer(name, tokenizer)
    ref = EncoderRef(
        name=place.name,
        class_name=type(model).__name__,
        digest=digest_of(model, exclude=UNUSED_WEIGHTS),
        tokenizer_digest=tokenizer_digest_of(tokenizer),
        revision=place.revision,
    )
    return model, tokenizer, ref


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


@contextlib.contextmanager
def _loading(name: str, role: str) -> Iterator[None]:
    """Turn the exceptions of the model libraries into an EncoderError."""
    quiet_libraries()
    try:
        yield
    except EncoderError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, TypeError) as error:
        fix = (
            "save it with save_pretrained"
            if Path(name).is_dir()
            else "there is no such folder: check the path, or the hub id and the connection"
        )
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
