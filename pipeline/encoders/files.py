"""Find the files of an encoder: a folder by its absolute path, a hub id by its commit.

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

if TYPE_CHECKING:
    import torch

UNREAD_FILES = ["*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.tflite", "onnx/*", "*.md"]
"""Files of a hub repository that are never read: other formats of the same weights."""

WEIGHT_FIXES = {
    "missing_keys": "get the whole weights, or the config.json that belongs to them",
    "unexpected_keys": "its config.json must name the class that made them (saving it again would only drop them); if "
    "that class is not supported, use another encoder",
    "mismatched_keys": "get the config.json that belongs to them",
}
"""What to do about weights that do not match: saving them again would keep a wrong model."""


class Place(NamedTuple):
    """Where the files of an encoder are."""

    name: str
    """Absolute folder, or hub id without its revision, as it is stored with a table."""
    folder: Path
    """On this machine: of a hub id the folder in the cache, with the other parts of its pipeline beside it."""
    revision: str | None
    """Commit of a hub repository; None for a folder."""


def locate(name: str, revision: str | None = None) -> Place:
    """Find a folder, or fetch what is needed of a hub id `ORG/NAME`, `ORG/NAME/SUBFOLDER`, `...@REVISION`.

    Raises EncoderError if there is no such folder and the name is no hub id, or what the hub client raises.
    """
    folder = os.path.abspath(os.path.expanduser(name))
    if Path(folder).is_dir():
        return Place(folder, Path(folder), None)
    if name.startswith((".", "/", "~")) or name.count("/") < 1:
        raise EncoderError(f"no folder {name}: use a folder with config.json and model weights, or a hub id ORG/NAME")
    hub_id, _, typed = name.partition("@")
    organization, repository, *subfolders = hub_id.split("/")
    subfolder = "/".join(subfolders)
    from huggingface_hub import snapshot_download

    beside = subfolder.replace("text_encoder", "tokenizer")
    cached = snapshot_download(
        f"{organization}/{repository}",
        revision=revision or typed or None,
        allow_patterns=[f"{part}/*" for part in {subfolder, beside}] if subfolder else None,
        ignore_patterns=UNREAD_FILES,
    )
    # The cache keeps it as .../snapshots/COMMIT.
    return Place(hub_id, Path(cached) / subfolder, Path(cached).name)


def find_encoder(name: str, role: str) -> tuple[str, str | None]:
    """Return the absolute folder of an encoder and None, or its hub id and commit. Raises EncoderError."""
    with loading(name, f"the {role} encoder"):
        place = locate(name)
    return place.name, place.revision


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
def loading(name: str, role: str) -> Iterator[None]:
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


def check_weights(name: str, info: dict[str, Any], exclude: tuple[str, ...] = ()) -> None:
    """Raise EncoderError if `from_pretrained` reported weights that do not match the model."""
    for problem in WEIGHT_FIXES:
        keys = sorted(str(key) for key in info.get(problem) or () if not str(key).startswith(exclude))
        if keys:
            raise EncoderError(
                f"the weights of {name} do not match its config ({len(keys)} {problem.replace('_', ' ')}, such as "
                f"{keys[0]}): {WEIGHT_FIXES[problem]}"
            )
