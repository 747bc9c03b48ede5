"""A training run on disk: all files of RUN/ that later commands read.

    RUN/config.json                         settings: fit, objective, table
    RUN/network                             the network with averaged weights, to sample with
    RUN/image_encoder, RUN/text_encoder     copies of encoders that are folders; others are opened by their hub id
    RUN/checkpoints/step-N                  everything that a training step updates, to resume from

Safetensors and JSON only. Each file is written under a temporary name and renamed, a checkpoint as a whole folder, so a
run that is killed resumes from its last checkpoint.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from index.errors import RunError, one_line
from index.table.schema import TableMeta
from index.table.storage import write_json
from pipeline.encoders.hub import fetch, open_snapshot
from pipeline.encoders.hub_names import RUN, HubName
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.parts import SMALL
from pipeline.encoders.stored import open_image_encoder, open_text_encoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.models.base import Network
from trainer.optimizer import Optimizer

FORMAT = "coalescer-run-3"
NETWORK = "network"
"""The folder in RUN of the network to sample with; see trainer.models.registry.load_network."""
ENCODER_FOLDERS = ("image_encoder", "text_encoder")
"""The folders in RUN of copies of encoders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPlaces:
    """Folders or hub ids to open encoders from; None: the run's copy, or else where the table was encoded with them."""

    image_encoder: str | None = None
    text_encoder: str | None = None


NOT_MOVED = EncoderPlaces()


def create_run_folder(
    folder: Path, meta: TableMeta, settings: dict[str, Any], places: EncoderPlaces = NOT_MOVED
) -> None:
    """Write the encoders of a new run, then the config.json that makes the folder a run.

    Raises:
        RunError: the folder is a run already.
        EncoderError: an encoder is not where it was, or is not the one that the table was encoded with.
    """
    if (folder / "config.json").exists():
        raise RunError(f"{folder} is a training run already: add --resume to resume it, or use another --out")
    encoders: dict[str, DiffusersAutoencoder | TransformersTextEncoder] = {
        "image_encoder": open_image_encoder(meta.image_encoder, places.image_encoder),
        "text_encoder": open_text_encoder(meta.text_encoder, places.text_encoder),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoder in encoders.items():
        if Path(encoder.ref.name) == (folder / name).absolute():
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        if Path(encoder.ref.name).is_dir():  # a hub id can be opened from anywhere
            encoder.save(folder / name)
    write_json(folder / "config.json", settings)


def open_encoders(
    folder: Path, meta: TableMeta, places: EncoderPlaces, device: str
) -> tuple[DiffusersAutoencoder, TransformersTextEncoder]:
    """Open the encoders of a run. Raises EncoderError if they are not those of its table."""
    image = open_image_encoder(meta.image_encoder, places.image_encoder or _copy(folder, "image_encoder"), device)
    return image, open_run_text_encoder(folder, meta, places, device)


def open_run_text_encoder(folder: Path, meta: TableMeta, places: EncoderPlaces, device: str) -> TransformersTextEncoder:
    """Open the text encoder of a run. Raises EncoderError if it is not that of its table."""
    return open_text_encoder(meta.text_encoder, places.text_encoder or _copy(folder, "text_encoder"), device)


def _copy(folder: Path, name: str) -> str | None:
    return str(folder / name) if (folder / name).is_dir() else None


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
                "folder that `trainer fit --out` has made was uploaded as it is (`hf upload ORG/NAME RUN`)"
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
    folder, _, name = file.rpartition("/")
    if not folder:
        return name in ("config.json", "result.json")
    return folder in (NETWORK, *ENCODER_FOLDERS) and name.endswith((*SMALL, ".safetensors"))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings in RUN/config.json; raise RunError if the folder is not a training run of this version."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"{folder} is not a training run: it has no config.json; create one with `trainer fit TABLE --out {folder}`"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}): train again with `trainer fit TABLE --out {folder}`") from error
    if config.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {config.get('format')!r} instead of {FORMAT!r}, from other software or another "
            "version: use a folder that `trainer fit` of this version has written"
        )
    return config


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise RunError if a run cannot be resumed with these settings because it began with others."""
    saved = read_config(folder)
    for part in ("objective", "table", "fit"):
        for name, value in settings[part].items():
            if saved[part].get(name) != value and name != "meta":
                raise RunError(
                    f"{folder} was trained with {name} {saved[part].get(name)} instead of {value}: resume with the "
                    "same options, or use another --out"
                )


def save_network(folder: Path, network: Network) -> None:
    """Write RUN/network as diffusers saves models."""
    temporary = folder / f"{NETWORK}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    shutil.rmtree(folder / NETWORK, ignore_errors=True)
    temporary.rename(folder / NETWORK)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".tmp")


def save_checkpoint(folder: Path, step: int, network: nn.Module, optimizer: Optimizer, *, keep: int) -> None:
    """Write the state before step `step`, and delete all but the last `keep` checkpoints."""
    tensors, state = optimizer.state()
    tensors |= {f"network.{name}": value for name, value in network.state_dict().items()}
    final = folder / "checkpoints" / f"step-{step:09d}"
    temporary = final.with_suffix(".tmp")
    for old in (temporary, final):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save(temporary / "state.safetensors", tensors)
    write_json(temporary / "state.json", {"step": step, **state})
    temporary.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, network: nn.Module, optimizer: Optimizer) -> int:
    """Restore the last checkpoint and return the step to resume from; 0 if there is no checkpoint.

    Raises:
        RunError: it cannot be read, or is of another network. The message names the checkpoint before it.
    """
    complete = checkpoints(folder)
    if not complete:
        return 0
    last = complete[-1]
    try:
        state = json.loads((last / "state.json").read_text())
        tensors = load_file(last / "state.safetensors")
        weights = {key.removeprefix("network."): each for key, each in tensors.items() if key.startswith("network.")}
        network.load_state_dict(_checked(weights, network, folder))
        optimizer.load_state(tensors, state)
    except (SafetensorError, OSError, ValueError, KeyError, RunError) as error:
        previous = f"step {int(complete[-2].name[5:])}" if len(complete) > 1 else "the beginning"
        raise RunError(
            f"{last} is not a checkpoint of this run ({one_line(error)}): delete it to resume from {previous}"
        ) from error
    return int(state["step"])


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    temporary.replace(path)


def _checked(weights: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != actual:
        name = min(name for name in expected | actual if expected.get(name) != actual.get(name))
        raise RunError(
            f"the weights in {folder} do not fit the network: {name} has shape {actual.get(name)} instead of "
            f"{expected.get(name)}"
        )
    return weights
