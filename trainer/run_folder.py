"""A training run on disk: RUN/config.json and RUN/network to sample from, RUN/checkpoints to resume from.

Safetensors and JSON only. Files are written aside and renamed, a checkpoint as a whole folder, so a run that is killed
resumes from the last one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from index.errors import RunError, one_line
from index.table.storage import write_json
from trainer.models.base import Network
from trainer.optimizer import Optimizer

FORMAT = "coalescer-run-3"
NETWORK = "network"
"""The folder in RUN that holds the network to sample with."""


def save_network(folder: Path, network: Network) -> None:
    """Write the network to sample with to RUN/network, as diffusers saves models."""
    aside = folder / f"{NETWORK}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    network.save_pretrained(aside)
    shutil.rmtree(folder / NETWORK, ignore_errors=True)
    aside.rename(folder / NETWORK)


def read_config(folder: Path) -> dict[str, Any]:
    """RUN/config.json; RunError where the folder is no run."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"{folder} is no training run: it has no config.json; make one with `trainer fit TABLE --out {folder}`"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}): train again with `trainer fit TABLE --out {folder}`") from error
    if config.get("format") != FORMAT:
        raise RunError(
            f"{path} was written by other software or an earlier version: give a folder that `trainer fit` has made"
        )
    return config


def save_checkpoint(folder: Path, step: int, network: nn.Module, optimizer: Optimizer, *, keep: int) -> None:
    """Write all that a training step changes, as of before step `step`, and keep the last `keep` checkpoints."""
    adam = optimizer.adam.state_dict()
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"average.{i}": value for i, value in enumerate(optimizer.average.shadow_params)}
    for number, state in adam["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    state = {
        "step": step,
        "schedule": {k: v for k, v in optimizer.schedule.state_dict().items() if isinstance(v, int | float | list)},
        "average_step": optimizer.average.optimization_step,
    }
    place = folder / "checkpoints" / f"step-{step:09d}"
    aside = place.with_suffix(".tmp")
    for old in (aside, place):
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    _save(aside / "state.safetensors", tensors)
    write_json(aside / "state.json", state)
    aside.rename(place)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the last one last."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".tmp")


def load_checkpoint(folder: Path, network: nn.Module, optimizer: Optimizer) -> int:
    """Restore the last checkpoint, if there is one, and return the step to go on with.

    Raises:
        RunError: it cannot be read, or is not of this network; the one before may still be good.
    """
    whole = checkpoints(folder)
    if not whole:
        return 0
    try:
        state = json.loads((whole[-1] / "state.json").read_text())
        tensors = load_file(whole[-1] / "state.safetensors")
        return _restore(state, tensors, network, optimizer, folder)
    except (SafetensorError, OSError, ValueError, KeyError, RunError) as error:
        rest = f"step {int(whole[-2].name[5:])}" if len(whole) > 1 else "the beginning"
        raise RunError(
            f"{whole[-1]} is no checkpoint of this run ({one_line(error)}): remove it to resume from {rest}"
        ) from error


def _restore(
    state: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module, optimizer: Optimizer, folder: Path
) -> int:
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    network.load_state_dict(_checked(weights, network, folder))
    adam = optimizer.adam.state_dict()
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, field = name.split(".")
            adam["state"].setdefault(int(number), {})[field] = value
    # The schedule has set the rate of each group; it comes back with the schedule's own state.
    optimizer.schedule.load_state_dict(state["schedule"])
    for group, rate in zip(adam["param_groups"], state["schedule"]["_last_lr"], strict=True):
        group["lr"] = rate
    optimizer.adam.load_state_dict(adam)
    for place, shadow in enumerate(optimizer.average.shadow_params):
        shadow.copy_(tensors[f"average.{place}"])
    optimizer.average.optimization_step = state["average_step"]
    return int(state["step"])


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(path.name + ".tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside)
    aside.replace(path)


def _checked(weights: dict[str, Tensor], network: nn.Module, folder: Path) -> dict[str, Tensor]:
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != given:
        odd = sorted({name for name in wanted | given if wanted.get(name) != given.get(name)})[0]
        raise RunError(
            f"the weights in {folder} do not fit the network: {odd} is {given.get(odd)} instead of {wanted.get(odd)}"
        )
    return weights
