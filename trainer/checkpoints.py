"""Checkpoints of a training run, and the network to sample a run with, whether its training has ended or not.

    RUN/checkpoints/step-N/network          the network with averaged weights, as in RUN/network
    RUN/checkpoints/step-N/state.safetensors    everything else that a training step updates
    RUN/checkpoints/step-N/state.json       counters, the record of training so far, checksums of the other files

A checkpoint is written under a temporary name, flushed to disk and renamed, and only then are older ones deleted.
"""

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from index.errors import RunError, one_line
from index.table.storage import write_json
from index.terminal import print_status
from trainer.models.base import Network
from trainer.models.registry import load_network
from trainer.optimizer import Optimizer
from trainer.run_folder import NETWORK, flush, flush_entry

CHUNK = 1 << 24
"""Bytes that are read at once for a checksum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRecord:
    """What is known of a run's training up to a checkpoint, over all its sessions."""

    seconds: float = 0.0
    """Seconds of training, without those that a kill has lost."""
    waiting_seconds: float = 0.0
    """Seconds of them that training waited for batches."""
    metrics: dict[str, float] = field(default_factory=dict)
    """As logged last."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Conveniences that failed, with the reason."""
    position: dict[str, int] = field(default_factory=dict)
    """Where the next batch is read, if its step does not tell."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".tmp")


def save_checkpoint(
    folder: Path,
    step: int,
    network: nn.Module,
    optimizer: Optimizer,
    record: TrainingRecord,
    *,
    keep: int,
    resume_command: str,
) -> None:
    """Write the state before step `step`, then delete all but the last `keep` checkpoints up to it.

    Raises RunError if it cannot be written; earlier checkpoints then stay.
    """
    final = folder / "checkpoints" / f"step-{step:09d}"
    try:
        _write(final, step, network, optimizer, record)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)
        raise RunError(
            f"{final} cannot be written ({one_line(error)}): free space or allow writing there, then type "
            f"`{resume_command}`"
        ) from error
    # Later ones than this are damaged: training has resumed from before them.
    complete = checkpoints(folder)
    current = complete.index(final)
    for old in (*complete[: current + 1][:-keep], *complete[current + 1 :]):
        _delete(old)
    for unfinished in final.parent.glob("*.tmp"):
        shutil.rmtree(unfinished)


def _write(final: Path, step: int, network: nn.Module, optimizer: Optimizer, record: TrainingRecord) -> None:
    tensors, state = optimizer.state()
    tensors |= {f"network.{name}": value for name, value in network.state_dict().items()}
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    optimizer.averaged_model.save_pretrained(temporary / NETWORK)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / "state.safetensors"
    )
    files = {path.relative_to(temporary).as_posix(): _checksum(path) for path in _files(temporary)}
    write_json(temporary / "state.json", {"step": step, **state, "record": asdict(record), "crc32": files})
    flush(temporary)
    if final.exists():
        _delete(final)
    temporary.rename(final)
    flush_entry(final.parent)
    flush_entry(final.parent.parent)


def load_checkpoint(folder: Path, network: nn.Module, optimizer: Optimizer) -> tuple[int, TrainingRecord]:
    """Restore the last checkpoint that can be read; return the step to resume from, and the record of training so far.

    A damaged one is passed over with a warning. Without any checkpoint, training begins at step 0.

    Raises:
        RunError: none of the checkpoints can be read, or the last one is of another network.
    """
    complete = checkpoints(folder)
    for number in reversed(range(len(complete))):
        path = complete[number]
        try:
            state = _read_state(path)
            tensors, average = load_file(path / "state.safetensors"), _load_folder(path / NETWORK)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            damage = f"{path} is damaged ({one_line(error)})"
            if number == 0:
                raise RunError(
                    f"{damage}, and there is no checkpoint before it: delete {path.parent} to train from the beginning"
                ) from error
            print_status(f"warning: {damage}: resuming from {complete[number - 1].name}")
            continue
        weights = {key.removeprefix("network."): each for key, each in tensors.items() if key.startswith("network.")}
        network.load_state_dict(checked(weights, network, str(path)))
        optimizer.load_state(tensors, checked(average, network, str(path)), state)
        return int(state["step"]), TrainingRecord(**state["record"])
    return 0, TrainingRecord()


def open_network(folder: Path) -> Network:
    """Open the network of a run with its averaged weights: those at the end of training, or of the last checkpoint.

    Raises RunError if there is none that can be read.
    """
    final, error = folder / NETWORK, None
    if final.is_dir() or not checkpoints(folder):
        return load_network(final)
    # A run in training deletes checkpoints: those that are gone are looked for again, once.
    for path in [each for _ in range(2) for each in reversed(checkpoints(folder))]:
        try:
            _read_state(path)
            network = load_network(path / NETWORK)
        except (RunError, OSError, ValueError, KeyError) as failure:
            error = error or failure
            print_status(f"warning: {path} cannot be read ({one_line(failure)})")
            continue
        print_status(f"{folder} has not finished training: using the averaged weights of {path.name}")
        return network
    raise RunError(
        f"no checkpoint of {folder} can be read ({one_line(error or RunError())}): train again with `trainer fit`"
    ) from error


def checked(weights: dict[str, Tensor], network: nn.Module, place: str) -> dict[str, Tensor]:
    """Return the weights; raise RunError if their names and shapes are not those of the network."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != actual:
        name = min(name for name in expected | actual if expected.get(name) != actual.get(name))
        raise RunError(
            f"the weights in {place} do not fit the network: {name} has shape {actual.get(name, 'none')} there instead "
            f"of {expected.get(name, 'none')}"
        )
    return weights


def _read_state(path: Path) -> dict[str, Any]:
    """Return the content of state.json; raise OSError or ValueError unless all files are as written."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    for name, expected in state["crc32"].items():
        if _checksum(path / name) != expected:
            raise ValueError(f"{name} differs from its checksum")
    return state


def _load_folder(folder: Path) -> dict[str, Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _delete(path: Path) -> None:
    """Delete a checkpoint; a kill in between leaves no part of it under its name."""
    doomed = path.with_suffix(".old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
