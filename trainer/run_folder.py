"""A training run on disk: all files of RUN/ that later commands read.

    RUN/config.json                         settings: fit, objective, table
    RUN/network                             the network with averaged weights, to sample with
    RUN/checkpoints/step-N                  everything that a training step updates; see trainer.checkpoints
    RUN/samples.png, RUN/result.json        at the end of training, result.json last of all

Encoders stay where they are: config.json has their folders or hub ids, with digests. `write_export` makes a folder that
stands alone, as do runs of earlier versions:

    DIR/config.json, DIR/network            as above
    DIR/image_encoder, DIR/text_encoder     copies of both encoders

Safetensors and JSON only. Each file is written under a temporary name and renamed, a network or checkpoint as a whole
folder, so a run that is killed at any moment can be resumed.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from index.errors import EncoderError, RunError
from index.table.schema import EncoderRef, TableMeta
from pipeline.encoders.files import quiet_libraries
from pipeline.encoders.hub import fetch, open_snapshot
from pipeline.encoders.hub_names import RUN, HubName
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.parts import SMALL
from pipeline.encoders.stored import is_missing, open_image_encoder, open_text_encoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.models.base import Network

FORMAT = "coalescer-run-4"
EXPORT_FORMAT = "coalescer-pipeline-1"
NETWORK = "network"
"""The folder in RUN of the network to sample with; see trainer.models.registry.load_network."""
RESULT, SAMPLES = "result.json", "samples.png"
ENCODER_FOLDERS = ("image_encoder", "text_encoder")
"""The folders of copies of encoders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPlaces:
    """Folders or hub ids to open encoders from; None: the copy in the folder, or else where the run has found them."""

    image_encoder: str | None = None
    text_encoder: str | None = None


NOT_MOVED = EncoderPlaces()


def check_is_new(folder: Path) -> None:
    """Raise RunError if a folder is a training run already."""
    if (folder / "config.json").exists():
        raise RunError(f"{folder} is a training run already: add --resume to resume it, or use another --out")


def create_run_folder(folder: Path) -> None:
    """Make the folder of a new run, and remove what an unfinished creation has left.

    The folder is a run once it has a config.json, which is written last; see `write_config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write RUN/config.json."""
    write_whole(folder / "config.json", {"format": FORMAT, **settings})


def write_whole(path: Path, content: str | dict[str, Any]) -> None:
    """Write text or JSON so that even after a power failure the file is the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_entry(path.parent)


def discard_results(folder: Path) -> None:
    """Delete what the end of training writes, in a run that is trained on."""
    (folder / RESULT).unlink(missing_ok=True)
    (folder / SAMPLES).unlink(missing_ok=True)
    _delete_network(folder)


def open_encoders(
    folder: Path, meta: TableMeta, places: EncoderPlaces, device: str, dtype: str = "float32"
) -> tuple[DiffusersAutoencoder, TransformersTextEncoder]:
    """Open the encoders of a run. Raises EncoderError if they are not there, or are not those of its table."""
    given = places.image_encoder or _copy(folder, "image_encoder")
    with _naming_export(meta.image_encoder, given):
        image = open_image_encoder(meta.image_encoder, given, device, dtype)
    return image, open_run_text_encoder(folder, meta, places, device, dtype)


def open_run_text_encoder(
    folder: Path, meta: TableMeta, places: EncoderPlaces, device: str, dtype: str = "float32"
) -> TransformersTextEncoder:
    """Open the text encoder of a run. Raises EncoderError if it is not there, or is not that of its table."""
    given = places.text_encoder or _copy(folder, "text_encoder")
    with _naming_export(meta.text_encoder, given):
        return open_text_encoder(meta.text_encoder, given, device, dtype)


def _copy(folder: Path, name: str) -> str | None:
    return str(folder / name) if (folder / name).is_dir() else None


@contextlib.contextmanager
def _naming_export(ref: EncoderRef, given: str | None) -> Iterator[None]:
    """Say in the error of a folder that is not there how a run is made to need none, as before an upload."""
    try:
        yield
    except EncoderError as error:
        if given is None and is_missing(ref):
            raise EncoderError(
                f"{error}; where it is, `trainer export RUN --out DIR` makes a folder that needs no other"
            ) from error
        raise


def find_run(name: str | Path) -> Path:
    """Return the folder of a run: a folder, or what is needed to sample from a hub id, in the hub cache.

    Raises RunError, with what to type, if there is none.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if not may_be_hub_id(name):
        raise RunError(f"{name} is not a run: {RUN.usage}")
    hub = HubName.parse(str(name), RUN)
    snapshot = open_snapshot(hub, RUN)
    prefix = f"{hub.subfolder}/" if hub.subfolder else ""
    inside = [file.removeprefix(prefix) for file in snapshot.files if file.startswith(prefix)]
    if not {"config.json", f"{NETWORK}/config.json"} <= set(inside):
        raise snapshot.doubt(
            RunError(
                f"{hub} is not a run: it has no config.json with {NETWORK}/ beside it; use a repository into which the "
                "folder that `trainer export --out` has made was uploaded as it is (`hf upload ORG/NAME DIR`)"
            )
        )
    fetch(snapshot, [prefix + file for file in inside if _is_sampled_with(file)], RUN)
    return snapshot.folder / hub.subfolder


def may_be_hub_id(name: str | Path) -> bool:
    """Return whether the name of a run is no folder, but could be a hub id."""
    text = str(name)
    return "/" in text and not text.startswith((".", "/", "~")) and not Path(name).is_dir()


def _is_sampled_with(file: str) -> bool:
    """Return whether a file of a run is read to sample or evaluate; checkpoints and reports are not."""
    if "/" not in file:
        return file in ("config.json", RESULT)
    # Of sentence-transformers a copy has folders in it.
    return file.startswith((f"{NETWORK}/", *(f"{each}/" for each in ENCODER_FOLDERS))) and file.endswith(
        (*SMALL, ".safetensors")
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings in config.json; raise RunError if the folder is not a run or an export of this version."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"{folder} is not a training run: it has no config.json; create one with `trainer fit TABLE --out {folder}`"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}): train again with `trainer fit TABLE --out {folder}`") from error
    if config.get("format") not in (FORMAT, EXPORT_FORMAT):
        raise RunError(
            f"{path} has format {config.get('format')!r} instead of {FORMAT!r}, from other software or another "
            "version: use a folder that `trainer fit` of this version has written"
        )
    return config


def save_network(folder: Path, network: Network) -> None:
    """Write RUN/network as diffusers saves models."""
    temporary = folder / f"{NETWORK}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    flush(temporary)
    _delete_network(folder)
    temporary.rename(folder / NETWORK)
    flush_entry(folder)


def write_export(
    folder: Path,
    settings: dict[str, Any],
    meta: TableMeta,
    network: Network,
    encoders: tuple[DiffusersAutoencoder, TransformersTextEncoder],
) -> None:
    """Write a folder that stands alone, a subfolder for each component; it has its name only when it is complete.

    Raises RunError if there is something at `folder`.
    """
    check_is_free(folder)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    image_encoder, text_encoder = encoders
    with quiet_libraries():
        network.save_pretrained(temporary / NETWORK)
        image_encoder.save(temporary / "image_encoder")
        text_encoder.save(temporary / "text_encoder")
    # Where the originals were on this machine tells others nothing; hub ids do.
    refs: dict[str, Any] = {name: _in_export(getattr(meta, name), name) for name in ENCODER_FOLDERS}
    table = settings.get("table", {}) | {"meta": replace(meta, **refs).to_json()}
    write_whole(temporary / "config.json", {**settings, "format": EXPORT_FORMAT, "table": table})
    flush(temporary)
    if folder.is_dir():
        folder.rmdir()
    temporary.rename(folder)
    flush_entry(folder.parent)


def check_is_free(folder: Path) -> None:
    """Raise RunError if there is something at a path where a folder is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already and is not an empty folder: use another --out, or delete it")


def _in_export(ref: EncoderRef, name: str) -> EncoderRef:
    return replace(ref, name=name) if Path(ref.name).is_absolute() else ref


def flush(folder: Path) -> None:
    """Flush all files and folders below a folder to disk, so that a power failure loses none."""
    entries = sorted(folder.rglob("*"))
    for path in entries:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in (*(each for each in entries if each.is_dir()), folder):
        flush_entry(path)


def flush_entry(folder: Path) -> None:
    """Flush the names in a folder to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete_network(folder: Path) -> None:
    """Delete RUN/network; a kill in between leaves no part of it under its name."""
    doomed = folder / f"{NETWORK}.old.tmp"
    shutil.rmtree(doomed, ignore_errors=True)
    if (folder / NETWORK).exists():
        (folder / NETWORK).rename(doomed)
        shutil.rmtree(doomed)
