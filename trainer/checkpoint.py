"""A training run on disk: RUN/config.json and model.safetensors to sample from, RUN/checkpoint to resume from.

Safetensors and JSON only. Every file is written aside and renamed, and the state that names the step comes last, so a
run that is killed resumes from its last whole checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from index.console import write_json
from index.errors import RunError
from trainer.optimise import Optimiser

FORMAT = "coalescer-run-1"


def save_model(folder: Path, network: nn.Module) -> None:
    """Write the weights to sample with: model.safetensors."""
    _save(folder / "model.safetensors", dict(network.state_dict()))


def load_model(folder: Path, network: nn.Module) -> None:
    """Read model.safetensors into a network of the same shape; RunError where it is missing or does not fit."""
    network.load_state_dict(_checked(_load(folder / "model.safetensors"), network, folder))


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
        raise RunError(f"{path} was written by other software: give a folder that `trainer fit` has made")
    return config


def save_checkpoint(folder: Path, step: int, network: nn.Module, optimiser: Optimiser) -> None:
    """Write all that a training step changes, as of before step `step`."""
    adam = optimiser.adam.state_dict()
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"average.{i}": value for i, value in enumerate(optimiser.average.shadow_params)}
    for number, state in adam["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    name = f"step-{step:09d}.safetensors"
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    _save(folder / "checkpoint" / name, tensors)
    state = {
        "step": step,
        "weights": name,
        "schedule": {k: v for k, v in optimiser.schedule.state_dict().items() if isinstance(v, int | float | list)},
        "average_step": optimiser.average.optimization_step,
    }
    write_json(folder / "checkpoint" / "state.json", state)
    for old in (folder / "checkpoint").glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(folder: Path, network: nn.Module, optimiser: Optimiser) -> int:
    """Restore the last whole checkpoint and return the step to go on with; RunError where it cannot be read."""
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    tensors = _load(folder / "checkpoint" / state["weights"])
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    network.load_state_dict(_checked(weights, network, folder))
    adam = optimiser.adam.state_dict()
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, field = name.split(".")
            adam["state"].setdefault(int(number), {})[field] = value
    # The schedule has set the rate of each group; it comes back with the schedule's own state.
    optimiser.schedule.load_state_dict(state["schedule"])
    for group, rate in zip(adam["param_groups"], state["schedule"]["_last_lr"], strict=True):
        group["lr"] = rate
    optimiser.adam.load_state_dict(adam)
    for place, shadow in enumerate(optimiser.average.shadow_params):
        shadow.copy_(tensors[f"average.{place}"])
    optimiser.average.optimization_step = state["average_step"]
    return int(state["step"])


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has got as far as its first checkpoint."""
    return (folder / "checkpoint" / "state.json").is_file()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(path.name + ".tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside)
    aside.replace(path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}): train again with `trainer fit`") from error


def _checked(weights: dict[str, Tensor], network: nn.Module, folder: Path) -> dict[str, Tensor]:
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != given:
        odd = sorted({name for name in wanted | given if wanted.get(name) != given.get(name)})[0]
        raise RunError(
            f"the weights in {folder} do not fit the network: {odd} is {given.get(odd)} instead of {wanted.get(odd)}"
        )
    return weights
