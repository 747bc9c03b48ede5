"""Train a network on a table's nearest-neighbour targets. Progress is counted in images, so a batch may change size.

The run folder stands on its own: config.json says which table version, geometry, network and objective; encoders
that are folders are copied beside the weights, so `trainer sample` and `Coalescer.from_pretrained` need nothing else.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from index.console import write_json
from index.errors import EncoderError, OptionError, RunError
from index.schema import EncoderRef
from index.search import open_neighbours
from index.table import Table, open_table
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder, pick_device
from trainer.checkpoint import FORMAT, has_checkpoint, load_checkpoint, read_config, save_checkpoint, save_model
from trainer.network import SIZES, Network, NetworkConfig
from trainer.objectives import Objective, make_objective
from trainer.optimise import Optimiser
from trainer.stream import NeighborStream
from trainer.watch import Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """What a run depends on, beside its table."""

    objective: str = "coalescer"
    preset: str = "default"
    coupling: str = "nearest"
    size: str = "small"
    images: int = 1_000_000
    """Targets drawn in all, over all steps."""
    batch_size: int = 256
    learning_rate: float | None = None
    """Highest learning rate; None is one that falls with the network's width: 5e-3 for tiny, 2.5e-3 for small."""
    ema_decay: float = 0.998
    seed: int = 0
    search: str = "ann"
    """ann: the table's LanceDB index. exact: vectors held on the device."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained before anything is read."""
        make_objective(self.objective, self.preset)
        if self.size not in SIZES:
            raise OptionError(f"--size {self.size!r} is unknown: choose one of {', '.join(SIZES)}")
        if self.search not in ("ann", "exact"):
            raise OptionError(f"--search {self.search!r} is unknown: choose ann or exact")
        if self.batch_size < 1 or self.images < self.batch_size:
            raise OptionError(f"--images {self.images} is less than one batch of {self.batch_size}")

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        return 5e-3 * SIZES["tiny"][0] / SIZES[self.size][0] if self.learning_rate is None else self.learning_rate

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return self.images // self.batch_size


CHECKPOINT_SECONDS = 120.0


def fit(table: Table, config: FitConfig, out: Path, *, resume: bool = False, device: str = "auto") -> dict[str, Any]:
    """Train (or go on training), write RUN, and return what was measured: steps, seconds, losses, waiting share.

    A run goes on with the version of the table that it began with, whatever has been done to the table since.
    """
    if resume:
        table = open_table(table.uri, version=read_config(out)["table"]["version"], indexed=True)
    meta = table.meta
    device = pick_device(device)
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The other half of the cores searches the next targets.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    objective = make_objective(config.objective, config.preset)
    torch.manual_seed(config.seed)
    shape = NetworkConfig(size=config.size, latent_size=meta.geometry.latent_size, text_width=meta.text_width)
    network = Network(shape).to(device)
    optimiser = Optimiser(network, steps=config.steps, learning_rate=config.peak_rate, ema_decay=config.ema_decay)
    settings = {
        "format": FORMAT,
        "fit": asdict(config),
        "network": asdict(shape),
        "objective": asdict(objective),  # type: ignore[call-overload]
        "table": {"uri": table.uri, "version": table.version, "meta": meta.to_json()},
    }
    start = _resume(out, settings, network, optimiser) if resume else _begin(out, table, settings)
    if start == config.steps:
        raise RunError(f"{out} is already trained for {config.images:,} images: name another --out to train anew")
    stream = NeighborStream(
        table,
        open_neighbours(table, exact=config.search == "exact", device=device),
        batch_size=config.batch_size,
        seed=config.seed,
        start=start,
        coupling=config.coupling,
    )
    result = _train(network, optimiser, objective, stream, config, out, start, device)
    optimiser.use_average()
    save_model(out, network)
    write_json(out / "result.json", result)
    return result


def _train(
    network: Network,
    optimiser: Optimiser,
    objective: Objective,
    stream: NeighborStream,
    config: FitConfig,
    out: Path,
    start: int,
    device: str,
) -> dict[str, Any]:
    size, saved = config.batch_size, 0.0
    figures: dict[str, float] = {}
    with Watch("fit", total=config.steps * size, unit="images", folder=out, done=start * size) as watch:
        for step, batch in stream:
            loss = objective.loss(network, batch.to(device))
            optimiser.step(loss.total)
            last = step + 1 == config.steps
            due = last or watch.bar.seconds - saved > CHECKPOINT_SECONDS
            if due or step % 20 == 0:
                figures = {
                    "loss": loss.total.item(),
                    **{name: part.item() for name, part in loss.parts.items()},
                }
                figures["waiting"] = stream.waited / max(watch.bar.seconds, 1e-9)
                if not torch.isfinite(loss.total):
                    raise RunError(
                        f"the loss is {figures['loss']} at step {step}: lower --learning-rate, then --resume"
                    )
            watch.advance(size, **figures)
            if due:
                save_checkpoint(out, step + 1, network, optimiser)
                saved = watch.bar.seconds
            if last:
                break
        seconds = watch.bar.seconds
    return {
        "steps": config.steps,
        "images": config.steps * size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(seconds, 1),
        "images_per_second": round((config.steps - start) * size / seconds, 1),
        "waiting_share": round(stream.waited / seconds, 4),
        **{name: round(value, 5) for name, value in figures.items() if name != "waiting"},
    }


def _begin(out: Path, table: Table, settings: dict[str, Any]) -> int:
    """Start a run folder: the encoders first, then the config that makes it one."""
    if (out / "config.json").exists():
        raise RunError(f"{out} holds a run already: add --resume to go on with it, or name another --out")
    meta = table.meta
    opened: dict[str, DiffusersAutoencoder | TransformersTextEncoder] = {
        "image_encoder": DiffusersAutoencoder(meta.image_encoder.name),
        "text_encoder": TransformersTextEncoder(meta.text_encoder.name),
    }
    for name, encoder in opened.items():
        _same_encoder(getattr(meta, name), encoder.ref)
    out.mkdir(parents=True, exist_ok=True)
    for name, encoder in opened.items():
        shutil.rmtree(out / name, ignore_errors=True)
        if Path(encoder.ref.name).is_dir():  # a hub id can be opened from anywhere
            encoder.save(out / name)
    write_json(out / "config.json", settings)
    return 0


def _same_encoder(wanted: EncoderRef, given: EncoderRef) -> None:
    if given.digest != wanted.digest:
        raise EncoderError(
            f"{wanted.name} has other weights than the table was encoded with ({given.digest[:12]} instead of "
            f"{wanted.digest[:12]}): put the old ones back, or encode the table again"
        )


def _resume(out: Path, settings: dict[str, Any], network: Network, optimiser: Optimiser) -> int:
    before = read_config(out)
    for part in ("network", "objective", "table", "fit"):
        for name, value in settings[part].items():
            if before[part].get(name) != value and name != "meta":
                raise RunError(
                    f"{out} was trained with another {name} ({before[part].get(name)} instead of {value}): "
                    "resume with the same options, or name another --out"
                )
    # A run that was stopped before its first checkpoint begins again.
    return load_checkpoint(out, network, optimiser) if has_checkpoint(out) else 0
