"""The training loop: network, objective, optimizer and stream, from one checkpoint to the end."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.errors import RunError
from index.search.ann import open_search
from index.search.neighbors import NeighborSearch
from index.table.table import Table
from index.table.targets import Targets
from index.terminal import print_status
from trainer.checkpoints import TrainingRecord, checked, checkpoints, load_checkpoint, open_network, save_checkpoint
from trainer.config import FitConfig, RuntimeConfig
from trainer.models.base import count_flops
from trainer.models.registry import make_network
from trainer.objectives.base import Loss, Training
from trainer.objectives.registry import make_objective
from trainer.optimizer import Optimizer
from trainer.run_folder import open_run_text_encoder
from trainer.stream import Batch, EncodeTokens, NeighborStream, measure_reuse, plan_reuse
from trainer.targets import check_targets, open_run_targets
from trainer.tracking import Conveniences, Preview, RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_STEPS = 20
"""Training steps between two lines of the log."""


class Trainer:
    """The parts of one training run."""

    def __init__(
        self, accelerator: "Accelerator", table: Table, config: FitConfig, out: Path, runtime: RuntimeConfig
    ) -> None:
        """Build the network from the seed, or from the weights of another run, and check that it suits the table.

        Raises OptionError or RunError if it does not.
        """
        self.accelerator, self.table, self.config, self.out, self.runtime = accelerator, table, config, out, runtime
        self.device = str(accelerator.device)
        self.objective = make_objective(config.objective, config.preset, **config.hyperparameters)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            network = make_network(table.meta, size=config.size, network=config.network, num_tokens=config.num_tokens)
        self.objective.check(table.meta, network.num_tokens)
        self.network = network.to(accelerator.device)
        self.conveniences = Conveniences()
        self.start, self.record = 0, TrainingRecord()
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        config = self.config
        rate = self.network.default_learning_rate if config.learning_rate is None else config.learning_rate
        self.optimizer = Optimizer(self.network, steps=config.steps, learning_rate=rate, ema_window=config.ema_window)

    def start_from(self, run: Path) -> None:
        """Replace the fresh weights by the averaged ones of another run; raise RunError if they do not fit."""
        self.network.load_state_dict(checked(open_network(run).state_dict(), self.network, f"--init {run}"))
        self._make_optimizer()

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one."""
        self.start, self.record = load_checkpoint(self.out, self.network, self.optimizer)

    @property
    def is_trained(self) -> bool:
        """Return whether no training step is left."""
        return self.start >= self.config.steps

    def open_stream(self) -> None:
        """Open the search or the targets drawn ahead, choose how often pairs are reused, and open the stream.

        Raises OptionError if the targets do not fit the run.
        """
        self.source = self._open_source()
        self.encode_tokens = self._open_token_encoder()
        self.config = replace(self.config, reuse=self._choose_reuse())
        self.stream = self._make_stream(self.start)

    def _open_source(self) -> NeighborSearch | Targets | None:
        targets = open_run_targets(self.table.uri, self.runtime.targets, self.table.storage)
        if targets is None and self.config.coupling == "independent":
            print_status("--coupling independent trains each caption on its own latent: nothing is searched")
            return None
        if targets is None:
            return open_search(
                self.table,
                exact=self.config.search == "exact",
                device=self.device,
                process=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
            )
        check_targets(targets, self.table, self.config)
        return targets

    def save_checkpoint(self, step: int, record: TrainingRecord) -> None:
        """Write a checkpoint, in the main process."""
        self.record = record
        if self.accelerator.is_main_process:
            keep = self.runtime.keep_checkpoints
            save_checkpoint(self.out, step, self.network, self.optimizer, record, keep=keep)

    def open_log(self) -> RunLog:
        """Return the log of this session, to be opened as a context."""
        config, size = self.config, self.config.batch_size
        return RunLog(
            self.accelerator,
            "fit",
            total=config.steps * size,
            unit="images",
            folder=self.out,
            done=self.start * size,
            seconds=self.record.seconds,
            conveniences=self.conveniences,
        )

    def open_preview(self) -> Preview:
        """Return the preview of the averaged model, which computes in the dtype of training."""
        model = self.optimizer.averaged_model
        self.accelerator.prepare_model(model, evaluation_mode=True)
        return Preview(self.out, self.table, model, self.objective, self.device, self.runtime.encoders)

    def train(self, log: RunLog, preview: Preview) -> None:
        """Run the remaining training steps, the last of which ends with a checkpoint."""
        config, before = self.config, self.record
        divergence, metrics, saved = Divergence(self.accelerator.device), before.metrics, log.seconds
        model = self._prepare_model()
        for step, batch in itertools.islice(self.stream, config.steps - self.start):
            losses, norm = self._step(model, step, batch)
            divergence.record(step, losses[-1].total, norm)
            last = step + 1 == config.steps
            logged = last or step % LOG_STEPS == 0
            due = last or log.seconds - saved > self.runtime.checkpoint_seconds
            if logged or due:
                divergence.check(self.out)
            waited = before.waiting_seconds + self.stream.waiting_seconds
            if logged:
                metrics = self._metrics(losses) | {"gradient_norm": norm.item()}
            fraction = {"waiting_fraction": waited / max(log.seconds, 1e-9)}
            log.advance(config.batch_size, **(metrics | fraction if logged else {}))
            if due:
                self.save_checkpoint(step + 1, self._record(log.seconds, waited, metrics))
                if not last and self.accelerator.is_main_process:
                    with self.conveniences.attempt("previews"):
                        log.log_image("samples", preview.grid())
                saved = log.seconds
        self.start = config.steps

    def result(self) -> dict[str, Any]:
        """Return what training came to, over all sessions of the run."""
        config, record = self.config, self.record
        return {
            "steps": config.steps,
            "images": config.steps * config.batch_size,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "flops": count_flops(self.network),
            "num_processes": self.accelerator.num_processes,
            "reuse": config.reuse,
            "seconds": round(record.seconds, 1),
            "images_per_second": round(config.steps * config.batch_size / max(record.seconds, 1e-9), 1),
            "waiting_fraction": round(record.waiting_seconds / max(record.seconds, 1e-9), 4),
            **{name: round(value, 5) for name, value in record.metrics.items()},
            "left_out": record.left_out | self.conveniences.left_out,
        }

    def _record(self, seconds: float, waited: float, metrics: dict[str, float]) -> TrainingRecord:
        left_out = self.record.left_out | self.conveniences.left_out
        return TrainingRecord(seconds=seconds, waiting_seconds=waited, metrics=metrics, left_out=left_out)

    def _open_token_encoder(self) -> EncodeTokens | None:
        """Return the encoder of token embeddings; None if the network attends to none."""
        if not self.network.num_tokens:
            return None
        encoder = open_run_text_encoder(self.out, self.table.meta, self.runtime.encoders, self.device)
        encode_tokens = partial(encoder.encode_tokens, num_tokens=self.network.num_tokens)
        encode_tokens(["a"])  # refused here rather than by a search ahead, if the encoder gives no such tokens
        return encode_tokens

    def _make_stream(self, start: int = 0) -> NeighborStream:
        return NeighborStream(
            self.table,
            self.source,
            self.config.stream(),
            start=start,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            encode_tokens=self.encode_tokens,
        )

    def _choose_reuse(self) -> int:
        """Return how many steps each retrieved pair serves; the same for all processes."""
        config = self.config
        if config.reuse is not None:
            return config.reuse
        if config.coupling == "independent" or isinstance(self.source, Targets):
            return 1
        if self.accelerator.device.type == "cpu":
            return plan_reuse(self.table, count_flops(self.network), exact=config.search == "exact")
        from accelerate.utils import broadcast_object_list

        (reuse,) = broadcast_object_list([measure_reuse(self._make_stream(), self._train_alone)])
        return int(reuse)

    def _train_alone(self, batch: Batch) -> None:
        """Compute the gradients of a batch and discard them, to measure how long a training step takes."""
        loss = self.objective.loss(self.network, batch.to(self.accelerator.device), Training(0.0, self.network)).total
        loss.backward()  # type: ignore[no-untyped-call]
        self.network.zero_grad()
        torch.accelerator.synchronize()

    def _prepare_model(self) -> nn.Module:
        """Return the network as the processes train it."""
        model: nn.Module = self.accelerator.prepare(
            torch.compile(self.network) if self.runtime.compile else self.network
        )
        return model

    def _step(self, model: nn.Module, step: int, batch: Batch) -> tuple[list[Loss], Float[Tensor, ""]]:
        """Update the weights on one batch; return the loss of each part of it and the norm of the gradient.

        Every row weighs the same, whether or not the parts are of equal size: losses are sums over the batch's rows.
        """
        whole = batch.to(self.accelerator.device)
        parts, losses, first = whole.split(self.runtime.gradient_accumulation_steps), [], 0
        training = Training(step / self.config.steps, self.optimizer.teacher, whole)
        for index, part in enumerate(parts):
            with self.accelerator.no_sync(model) if index + 1 < len(parts) else nullcontext():
                loss = self.objective.loss(model, part, training._replace(first=first))
                fraction = len(part.r) / len(whole.r)
                losses.append(Loss(loss.total * fraction, {name: x * fraction for name, x in loss.parts.items()}))
                self.accelerator.backward(losses[-1].total)
                first += len(part.r)
        return losses, self.optimizer.apply_gradients()

    def _metrics(self, losses: list[Loss]) -> dict[str, float]:
        """Return the loss and its terms, summed over the parts of a batch and averaged over the processes."""
        names = ["loss", *losses[0].parts]
        values = torch.stack([torch.stack([loss.total, *loss.parts.values()]) for loss in losses]).sum(0).detach()
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))


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
