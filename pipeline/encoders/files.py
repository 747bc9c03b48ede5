"""Find the files of an encoder: a folder by its absolute path, a hub id by its commit.

Weights are read from safetensors only, and remote code is never run. The libraries load weights that do not match the
model with a mere warning and then encode wrongly, so missing, unexpected and mismatched weights are refused here.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from index.errors import CoalescerError, EncoderError, one_line
from pipeline.encoders.hub import fetch, open_snapshot
from pipeline.encoders.hub_names import ENCODER, HubName
from pipeline.encoders.parts import choose_part, list_files

if TYPE_CHECKING:
    import torch

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
    variant: str | None = None
    """`variant` of from_pretrained; None for plain weights."""
    files: tuple[Path, ...] = ()
    """All that is read of it."""


def locate(name: str, revision: str | None = None, role: str | None = None) -> Place:
    """Find a folder, or fetch what is needed of a hub id `ORG/NAME`, `ORG/NAME/SUBFOLDER`, `...@REVISION`.

    A commit costs no request if the cache has its files.

    Args:
        name: what the user typed, or what `Place.name` was.
        revision: commit of a hub id that was found before.
        role: image or text, to find the encoder of a pipeline by the pipeline's root.

    Raises EncoderError, with what to type, if there is no such folder and the hub does not give it.
    """
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    if folder.is_dir() and revision is None:
        part = choose_part(list_files(folder), "", role, lambda subfolder: folder / subfolder)
        files = tuple(folder / file for file in part.files)
        return Place(str(folder / part.subfolder), folder / part.subfolder, None, part.variant, files)
    if folder.is_file():
        raise EncoderError(f"{name} is a file: use the folder that it is in, with config.json and model weights")
    if name.startswith((".", "/", "~")) or "/" not in name:
        raise EncoderError(f"no folder {name}: {ENCODER.usage}")
    hub = HubName.parse(name, ENCODER)
    snapshot = open_snapshot(replace(hub, revision=revision or hub.revision), ENCODER)
    try:
        part = choose_part(snapshot.files, hub.subfolder, role, hub.at)
    except EncoderError as error:
        raise snapshot.doubt(error) from error
    fetch(snapshot, part.files, ENCODER)
    files = tuple(snapshot.folder / file for file in part.files)
    return Place(hub.at(part.subfolder).path, snapshot.folder / part.subfolder, snapshot.commit, part.variant, files)


def find_encoder(name: str, role: str) -> Place:
    """Return where the files of an encoder are, without loading them. Raises EncoderError."""
    with loading(name, f"the {role} encoder"):
        return locate(name, role=role)


def content_digest(place: Place) -> str:
    """Return the SHA-256, in hex, of the names and bytes of all files that an encoder is made of."""
    beside = place.folder.with_name(place.folder.name.replace("text_encoder", "tokenizer"))
    files = {*place.files, *(path for path in beside.glob("*") if path.is_file() and beside != place.folder)}
    digest = hashlib.sha256()
    with loading(place.name, "an encoder"):
        for path in sorted(files):
            digest.update(os.path.relpath(path, place.folder).encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the warnings, retries and progress bars of diffusers, transformers and huggingface_hub in a block.

    Random numbers that they draw, as initial weights that are then loaded, leave torch's generator as it was.
    """
    import diffusers
    import huggingface_hub
    import torch
    import transformers

    hub, libraries = huggingface_hub.utils, [diffusers.utils.logging, transformers.utils.logging]
    levels = [each.get_verbosity() for each in (*libraries, hub.logging)]
    shown = [each.is_progress_bar_enabled() for each in libraries]
    fetching_is_shown = not hub.are_progress_bars_disabled()
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        hub.logging.set_verbosity_error()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
            yield
    finally:
        for library, level, is_shown in zip((*libraries, hub.logging), levels, (*shown, False), strict=True):
            library.set_verbosity(level)
            if is_shown:
                library.enable_progress_bar()
        if fetching_is_shown:
            hub.enable_progress_bars()


@contextlib.contextmanager
def loading(name: str, role: str) -> Iterator[None]:
    """Turn the exceptions of the model libraries into an EncoderError."""
    try:
        with quiet_libraries():
            yield
    except (CoalescerError, MemoryError):
        raise
    except Exception as error:  # libraries raise exceptions of any class; tokenizers Exception itself
        raise EncoderError(
            f"{name} cannot be loaded as {role} ({one_line(error)}): check that it is one, as save_pretrained writes it"
        ) from error


def check_weights(name: str, info: dict[str, Any], exclude: tuple[str, ...] = ()) -> None:
    """Raise EncoderError if `from_pretrained` reported weights that do not match the model."""
    for problem in WEIGHT_FIXES:
        keys = sorted(str(key) for key in info.get(problem) or () if not str(key).startswith(exclude))
        if keys:
            raise EncoderError(
                f"the weights of {name} do not match its config ({len(keys)} {problem.replace('_', ' ')}, such as "
                f"{keys[0]}): {WEIGHT_FIXES[problem]}"
            )
