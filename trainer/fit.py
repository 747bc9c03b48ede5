"""Train a network on a table's targets: `fit(table, FitConfig(), Path("RUN"))`.

The run folder is complete in itself: config.json holds the table's version and geometry, the network and the objective,
and encoders that are folders are copied into it. `trainer sample RUN` needs nothing else. A run resumes to the same
weights, and on the version of the table that it began with, even if the table has changed since.
"""

import itertools
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.errors import RunError
from index.search.ann import open_search
from index.table.readers import needed_by
from index.table.storage import write_json
from index.table.table import Table, open_table
from pipeline.encoders.devices import resolve_device
from trainer.config import FitConfig, RuntimeConfig
from trainer.models.base import Network, count_flops
from trainer.models.registry import make_network
from trainer.objectives.base import Loss, Training
from trainer.objectives.registry import make_objective
from trainer.optimizer import Optimizer
from trainer.run_folder import (
    FORMAT,
    check_settings,
    checkpoints,
    create_run_folder,
    load_checkpoint,
    open_run_text_encoder,
    read_config,
    save_checkpoint,
    save_network,
)
from trainer.stream import Batch, EncodeTokens, NeighborStream, measure_reuse, plan_reuse
from trainer.tracking import TRACKER, Preview, RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_STEPS = 20
"""Training steps between two lines of the log."""
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}
"""accelerate's name of each dtype."""


def fit(
    table: Table, config: FitConfig, out: Path, *, resume: bool = False, runtime: RuntimeConfig | None = None
) -> dict[str, Any]:
    """Train a network, or resume its training, write RUN, and return the metrics in RUN/result.json.

    Under `accelerate launch` or `torchrun` the processes divide the slots of each batch.

    Raises:
        RunError: `out` is a training run already, cannot be resumed with these settings, or the loss is not finite.
        EncoderError: an encoder is not the one that the table was encoded with.
    """
    if resume:
        version = read_config(out)["table"]["version"]
        table = open_table(table.uri, version=version, indexed=True, storage=table.storage)
    trainer = Trainer(table, config, out, runtime or RuntimeConfig(), resume=resume)
    trainer.open_run()
    with needed_by(table, out) if trainer.accelerator.is_main_process else nullcontext():
        result = trainer.train()
        trainer.export(result)
    return result


class Trainer:
    """The parts of one training run: network, objective, optimizer and stream."""

    def __init__(self, table: Table, config: FitConfig, out: Path, runtime: RuntimeConfig, *, resume: bool) -> None:
        """Initialize the network from the seed, and open the table's search."""
        self.table, self.config, self.out, self.runtime, self.resume = table, config, out, runtime, resume
        self.accelerator = _make_accelerator(config, runtime, out)
        self.device = str(self.accelerator.device)
        self.objective = make_objective(config.objective, config.preset, **config.hyperparameters)
        torch.manual_seed(config.seed)
        network = make_network(table.meta, size=config.size, network=config.network, num_tokens=config.num_tokens)
        self.objective.check(table.meta, network.num_tokens)
        self.network: Network = network.to(self.accelerator.device)
        self.search = open_search(table, exact=config.search == "exact", device=self.device)
        self.encode_tokens = self._open_token_encoder()
        self.config = replace(config, reuse=self._choose_reuse())
        rate = self.network.default_learning_rate if config.learning_rate is None else config.learning_rate
        self.optimizer = Optimizer(self.network, steps=config.steps, learning_rate=rate, ema_decay=config.ema_decay)

    def open_run(self) -> None:
        """Create the run folder, or restore the last checkpoint; then open the stream at the step to train next."""
        settings = self._settings()
        if self.resume:
            check_settings(self.out, settings)
        self.start = load_checkpoint(self.out, self.network, self.optimizer) if self.resume else 0
        if self.start == self.config.steps:
            raise RunError(
                f"{self.out} is already trained for {self.config.images:,} images: use another --out to start a new run"
            )
        self.stream = self._open_stream(self.start)
        if self.accelerator.is_main_process and not self.resume:
            create_run_folder(self.out, self.table.meta, settings, self.runtime.encoders)
        self.accelerator.wait_for_everyone()
        model, encoders = self.optimizer.averaged_model, self.runtime.encoders
        self.preview = Preview(self.out, self.table, model, self.objective, self.device, encoders)

    def train(self) -> dict[str, Any]:
        """Run the remaining training steps; return the last metrics and the speed."""
        config, model = self.config, self._prepare_model()
        divergence = Divergence(self.accelerator.device)
        metrics, saved, size = {}, 0.0, config.batch_size
        with RunLog(
            self.accelerator, "fit", total=config.steps * size, unit="images", folder=self.out, done=self.start * size
        ) as log:
            for step, batch in itertools.islice(self.stream, config.steps - self.start):
                losses, norm = self._step(model, step, batch)
                divergence.record(step, losses[-1].total, norm)
                last = step + 1 == config.steps
                logged = last or step % LOG_STEPS == 0
                due = last or log.seconds - saved > self.runtime.checkpoint_seconds
                if logged or due:
                    divergence.check(self.out)
                if logged:
                    metrics = self._metrics(losses) | {"gradient_norm": norm.item()}
                log.advance(size, **(metrics | self._waiting(log.seconds) if logged else {}))
                if due:
                    self._checkpoint(step + 1, log)
                    saved = log.seconds
            return self._result(log.seconds, metrics)

    def export(self, result: dict[str, Any]) -> None:
        """Write the network to sample with, the result, and a grid of samples."""
        if self.accelerator.is_main_process:
            save_network(self.out, self.optimizer.averaged_model)
            write_json(self.out / "result.json", result)
            self.preview.grid().save(self.out / "samples.png")
        self.accelerator.wait_for_everyone()

    def _open_token_encoder(self) -> EncodeTokens | None:
        """Return the encoder of token embeddings; None if the network attends to none."""
        if not self.network.num_tokens:
            return None
        encoder = open_run_text_encoder(self.out, self.table.meta, self.runtime.encoders, self.device)
        encode_tokens = partial(encoder.encode_tokens, num_tokens=self.network.num_tokens)
        encode_tokens(["a"])  # refused here rather than by a search ahead, if the encoder gives no such tokens
        return encode_tokens

    def _open_stream(self, start: int = 0) -> NeighborStream:
        return NeighborStream(
            self.table,
            self.search,
            self.config.stream(),
            start=start,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            encode_tokens=self.encode_tokens,
        )

    def _choose_reuse(self) -> int:
        """Return how many steps each retrieved pair serves; the same for all processes, and after resuming."""
        config = self.config
        if config.reuse is not None:
            return config.reuse
        if self.resume:
            return int(read_config(self.out)["fit"]["reuse"])
        if config.coupling == "independent":
            return 1
        if self.accelerator.device.type == "cpu":
            return plan_reuse(self.table, count_flops(self.network), exact=config.search == "exact")
        from accelerate.utils import broadcast_object_list

        (reuse,) = broadcast_object_list([measure_reuse(self._open_stream(), self._train_alone)])
        return int(reuse)

    def _train_alone(self, batch: Batch) -> None:
        """Compute the gradients of a batch and discard them, to measure how long a training step takes."""
        loss = self.objective.loss(self.network, batch.to(self.accelerator.device), Training(0.0, self.network)).total
        loss.backward()  # type: ignore[no-untyped-call]
        self.network.zero_grad()
        torch.cuda.synchronize()

    def _settings(self) -> dict[str, Any]:
        meta = self.table.meta
        return {
            "format": FORMAT,
            "fit": asdict(self.config),
            "objective": asdict(self.objective),
            "table": {"uri": self.table.uri, "version": self.table.version, "meta": meta.to_json()},
        }

    def _prepare_model(self) -> nn.Module:
        """Return the network as the processes train it; the averaged model computes in the same dtype."""
        self.accelerator.prepare_model(self.optimizer.averaged_model, evaluation_mode=True)
        model: nn.Module = self.accelerator.prepare(
            torch.compile(self.network) if self.runtime.compile else self.network
        )
        return model

    def _step(self, model: nn.Module, step: int, batch: Batch) -> tuple[list[Loss], Float[Tensor, ""]]:
        """Update the weights on one batch; return the loss of each part of it and the norm of the gradient."""
        parts, losses = batch.to(self.accelerator.device).split(self.runtime.gradient_accumulation_steps), []
        training = Training(step / self.config.steps, self.optimizer.teacher)
        for index, part in enumerate(parts):
            with self.accelerator.no_sync(model) if index + 1 < len(parts) else nullcontext():
                losses.append(self.objective.loss(model, part, training))
                self.accelerator.backward(losses[-1].total / len(parts))
        return losses, self.optimizer.apply_gradients()

    def _metrics(self, losses: list[Loss]) -> dict[str, float]:
        """Return the loss and its parts, averaged over the parts of a batch and the processes."""
        names = ["loss", *losses[0].parts]
        values = torch.stack([torch.stack([loss.total, *loss.parts.values()]) for loss in losses]).mean(0).detach()
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _waiting(self, seconds: float) -> dict[str, float]:
        return {"waiting_fraction": self.stream.waiting_seconds / max(seconds, 1e-9)}

    def _checkpoint(self, step: int, log: RunLog) -> None:
        if self.accelerator.is_main_process:
            keep = self.runtime.keep_checkpoints
            save_checkpoint(self.out, step, self.network, self.optimizer, keep=keep)
            log.log_image("samples", self.preview.grid())

    def _result(self, seconds: float, metrics: dict[str, float]) -> dict[str, Any]:
        config = self.config
        return {
            "steps": config.steps,
            "images": config.steps * config.batch_size,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "flops": count_flops(self.network),
            "num_processes": self.accelerator.num_processes,
            "reuse": config.reuse,
            "seconds": round(seconds, 1),
            "images_per_second": round((config.steps - self.start) * config.batch_size / seconds, 1),
            "waiting_fraction": round(self._waiting(seconds)["waiting_fraction"], 4),
            **{name: round(value, 5) for name, value in metrics.items()},
        }


class Divergence:
    """The first step whose gradient was not finite; recorded on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        """Start with no such step."""
        self._first = torch.full((3,), -1.0, device=device)  # step, loss, norm of its gradient

    def record(self, step: int, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        """Keep a step if it is the first whose gradient is not finite."""
        here = torch.stack([torch.full_like(norm, step), loss.detach(), norm])
        self._first = torch.where((self._first[0] < 0) & ~norm.isfinite(), here, self._first)

    def check(self, folder: Path) -> None:
        """Raise RunError if there was such a step."""
        step, loss, norm = self._first.tolist()
        if step < 0:
            return
        complete = checkpoints(folder)
        last = f"{complete[-1]} was written before it" if complete else "no checkpoint was written before it"
        raise RunError(
            f"the loss is {loss} and the norm of its gradient {norm} at step {step:.0f}; {last}: train a new run with "
            "a lower --learning-rate"
        )


def _make_accelerator(config: FitConfig, runtime: RuntimeConfig, out: Path) -> "Accelerator":
    """Choose the device and, on a CPU, the number of threads."""
    from accelerate import Accelerator

    device = resolve_device(runtime.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION[config.dtype], cpu=device == "cpu", log_with=TRACKER, project_dir=out
    )
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The other half of the cores is left to the searches ahead.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    return accelerator
