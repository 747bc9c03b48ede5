"""Train a network on a table's nearest-neighbor targets. Progress is counted in images, so a batch may change size.

The run folder stands on its own: config.json says which table version, geometry, network and objective; encoders
that are folders are copied beside the weights, so `trainer sample` and `CoalescerPipeline.from_pretrained` need nothing
else.
"""

import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from index.errors import RunError
from index.search.ann import open_search
from index.table.schema import TableMeta
from index.table.storage import write_json
from index.table.table import Table, open_table
from pipeline.encoders import TransformersTextEncoder, pick_device
from trainer.config import FitConfig, RuntimeConfig
from trainer.folder import begin_folder, check_encoder, check_settings, encoder_of
from trainer.models.base import Network, count_flops
from trainer.models.registry import make_network
from trainer.objectives.base import Loss, Objective, Training
from trainer.objectives.registry import make_objective
from trainer.optimizer import Optimizer
from trainer.reuse import measure_reuse, plan_reuse
from trainer.run_folder import FORMAT, checkpoints, load_checkpoint, read_config, save_checkpoint, save_network
from trainer.stream import Batch, Describe, NeighborStream
from trainer.summary import Preview, write_summary
from trainer.tracking import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_STEPS = 20


def fit(
    table: Table, config: FitConfig, out: Path, *, resume: bool = False, machine: RuntimeConfig | None = None
) -> dict[str, Any]:
    """Train (or go on training), write RUN, and return what was measured: steps, seconds, losses, waiting share.

    A run goes on with the version of the table that it began with, whatever has been done to the table since. Started
    by `accelerate launch` or `torchrun`, the processes share each step's batch.
    """
    from accelerate import Accelerator

    machine = machine or RuntimeConfig()
    if resume:
        table = open_table(table.uri, version=read_config(out)["table"]["version"], indexed=True)
    meta = table.meta
    device = pick_device(machine.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=device == "cpu")
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The other half of the cores searches the next targets.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    objective = make_objective(config.objective, config.preset, **config.hyperparameters)
    torch.manual_seed(config.seed)
    network = make_network(meta, size=config.size, network=config.network, num_tokens=config.tokens)
    objective.check(meta, network.num_tokens)
    network = network.to(accelerator.device)
    open_stream = partial(
        NeighborStream,
        table,
        open_search(table, exact=config.search == "exact", device=str(accelerator.device)),
        batch_size=config.batch_size,
        seed=config.seed,
        coupling=config.coupling,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        k=config.neighbors,
        temperature=config.temperature,
        condition=config.condition,
        jitter=config.jitter,
        describe=_describe(out, meta, network.num_tokens, str(accelerator.device)),
    )
    reuse = config.reuse
    if reuse is None and resume:
        reuse = int(read_config(out)["fit"]["reuse"])
    elif reuse is None and config.coupling == "independent":
        reuse = 1
    elif reuse is None and device == "cpu":
        reuse = plan_reuse(table, count_flops(network), exact=config.search == "exact")
    elif reuse is None:
        reuse = _measured_reuse(open_stream(), network, objective, accelerator)
    config = replace(config, reuse=reuse)
    rate = network.default_learning_rate if config.learning_rate is None else config.learning_rate
    optimizer = Optimizer(network, steps=config.steps, learning_rate=rate, ema_decay=config.ema_decay)
    settings = {
        "format": FORMAT,
        "fit": asdict(config),
        "objective": asdict(objective),
        "table": {"uri": table.uri, "version": table.version, "meta": meta.to_json()},
    }
    if resume:
        check_settings(out, settings)
    start = load_checkpoint(out, network, optimizer) if resume else 0
    if start == config.steps:
        raise RunError(f"{out} is already trained for {config.images:,} images: name another --out to train anew")
    stream = open_stream(start=start, reuse=reuse)
    if accelerator.is_main_process and not resume:
        begin_folder(out, meta, settings)
    accelerator.wait_for_everyone()
    preview = Preview(out, table, network, objective, str(accelerator.device))
    result = _train(network, optimizer, objective, stream, config, machine, preview, start, accelerator)
    optimizer.use_average()
    if accelerator.is_main_process:
        save_network(out, network)
        write_json(out / "result.json", result)
        write_summary(preview, result)
    accelerator.wait_for_everyone()
    return result


def _train(
    network: Network,
    optimizer: Optimizer,
    objective: Objective,
    stream: NeighborStream,
    config: FitConfig,
    machine: RuntimeConfig,
    preview: Preview,
    start: int,
    accelerator: "Accelerator",
) -> dict[str, Any]:
    """The steps from `start` on; the last figures, and how fast it was."""
    size, saved, main, out = config.batch_size, 0.0, accelerator.is_main_process, preview.folder
    model = accelerator.prepare(torch.compile(network) if machine.compile else network)
    teacher = optimizer.teacher(network)
    figures: dict[str, float] = {}
    diverged = torch.full((3,), -1.0, device=accelerator.device)  # step, loss, norm of its gradient
    with Watch(
        "fit", total=config.steps * size, unit="images", folder=out, done=start * size, silent=not main
    ) as watch:
        for step, batch in stream:
            parts = batch.to(accelerator.device).split(machine.accumulate)
            losses = []
            for number, part in enumerate(parts):
                with accelerator.no_sync(model) if number + 1 < len(parts) else nullcontext():
                    losses.append(objective.loss(model, part, Training(step / config.steps, teacher)))
                    accelerator.backward(losses[-1].total / len(parts))
            norm = optimizer.descend()
            here = torch.stack([torch.full_like(norm, step), losses[-1].total.detach(), norm])
            diverged = torch.where((diverged[0] < 0) & ~norm.isfinite(), here, diverged)
            last = step + 1 == config.steps
            logged = last or step % LOG_STEPS == 0
            due = last or watch.bar.seconds - saved > machine.checkpoint_seconds
            if (logged or due) and diverged[0] >= 0:
                raise RunError(_diverged(out, *diverged.tolist()))
            if logged:
                figures = _figures(losses, accelerator) | {"gradient_norm": norm.item()}
                figures["waiting"] = stream.waited / max(watch.bar.seconds, 1e-9)
            watch.advance(size, **(figures if logged else {}))
            if due:
                if main:
                    save_checkpoint(out, step + 1, network, optimizer, keep=machine.keep)
                    with optimizer.averaged():
                        watch.show("samples", preview.grid())
                saved = watch.bar.seconds
            if last:
                break
        seconds = watch.bar.seconds
    return {
        "steps": config.steps,
        "images": config.steps * size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops_per_evaluation": count_flops(network),
        "processes": accelerator.num_processes,
        "reuse": config.reuse,
        "seconds": round(seconds, 1),
        "images_per_second": round((config.steps - start) * size / seconds, 1),
        "waiting_fraction": round(stream.waited / seconds, 4),
        **{name: round(value, 5) for name, value in figures.items() if name != "waiting"},
    }


def _describe(out: Path, meta: TableMeta, tokens: int, device: str) -> Describe | None:
    """What gives token states of captions, where the network reads any."""
    if not tokens:
        return None
    encoder = TransformersTextEncoder(encoder_of(out, meta, "text_encoder"), device)
    check_encoder(meta.text_encoder, encoder.ref)
    return partial(encoder.describe, tokens=tokens)


def _measured_reuse(stream: NeighborStream, network: Network, objective: Objective, accelerator: "Accelerator") -> int:
    """How many steps each draw is to serve, measured here; the same for all processes."""
    from accelerate.utils import broadcast_object_list

    def train(batch: Batch) -> None:
        objective.loss(network, batch.to(accelerator.device), Training(0.0, network)).total.backward()  # type: ignore[no-untyped-call]
        network.zero_grad()
        torch.cuda.synchronize()

    (chosen,) = broadcast_object_list([measure_reuse(stream, train)])
    return int(chosen)


def _figures(losses: list[Loss], accelerator: "Accelerator") -> dict[str, float]:
    """The loss and its parts, averaged over the parts of a batch and the processes."""
    names = ["loss", *losses[0].parts]
    values = torch.stack([torch.stack([loss.total, *loss.parts.values()]) for loss in losses]).mean(0).detach()
    return dict(zip(names, accelerator.reduce(values, "mean").tolist(), strict=True))


def _diverged(out: Path, step: float, loss: float, norm: float) -> str:
    """What to say when a gradient was not finite."""
    whole = checkpoints(out)
    good = f"{whole[-1]} is from before" if whole else "no checkpoint was written before"
    return (
        f"the loss is {loss} at step {step:.0f} and its gradient {norm}, {good}: train anew with a --learning-rate "
        "below the one of this run"
    )
