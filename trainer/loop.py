"""The loop of every training run, whatever it trains: steps, divergence, log, checkpoints, previews.

A subclass of TrainingLoop has a model and an optimizer, yields batches by step, and computes the update of a batch.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.errors import RunError
from index.terminal import print_status
from trainer.checkpoints import TrainingRecord, checkpoints, load_checkpoint, save_checkpoint
from trainer.objectives.base import Loss
from trainer.optimizer import Optimizer
from trainer.tracking import Conveniences, RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_STEPS = 20
"""Training steps between two lines of the log."""
MAX_WAITING, MIN_SECONDS = 0.05, 10.0
"""Fraction of the time that training may wait for batches without a warning, and seconds before which none is given."""


class TrainingLoop(ABC):
    """A training run from its last checkpoint to its end: `resume`, then `train` within `open_log`."""

    title: ClassVar[str]
    """Name of the run's log."""
    unit: ClassVar[str]
    """What its batches consist of."""
    optimizer: Optimizer

    def __init__(
        self,
        accelerator: "Accelerator",
        model: nn.Module,
        out: Path,
        *,
        steps: int,
        batch_size: int,
        checkpoint_seconds: float,
        keep_checkpoints: int,
        resume_command: str,
    ) -> None:
        """Prepare `steps` steps of `model` on batches of `batch_size`, to be recorded in the folder `out`."""
        self.accelerator, self.model, self.out, self.steps, self.batch_size = accelerator, model, out, steps, batch_size
        self.checkpoint_seconds, self.keep_checkpoints = checkpoint_seconds, keep_checkpoints
        self.resume_command = resume_command
        self.conveniences = Conveniences()
        self.start, self.record = 0, TrainingRecord()

    @abstractmethod
    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) from step `start` on; the same ones wherever a run starts."""

    @abstractmethod
    def _step(self, model: nn.Module, step: int, batch: Any) -> tuple[list[Loss], Float[Tensor, ""]]:
        """Update the weights on a batch; return the loss of each part of it and the norm of the gradient."""

    def _prepare_model(self) -> nn.Module:
        """Return the model as the processes train it."""
        model: nn.Module = self.accelerator.prepare(self.model)
        return model

    def waiting_seconds(self) -> float:
        """Return how long this session has waited for batches."""
        return 0.0

    def waiting_advice(self) -> str:
        """Return what to do about waiting for batches."""
        return "read from a faster disk"

    def position(self, step: int) -> dict[str, int]:
        """Return where the batch of a step is read, if its number does not tell."""
        return {}

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one."""
        self.start, self.record = load_checkpoint(self.out, self.model, self.optimizer)

    @property
    def is_trained(self) -> bool:
        """Return whether no training step is left."""
        return self.start >= self.steps

    def save_checkpoint(self, step: int, record: TrainingRecord) -> None:
        """Write a checkpoint, in the main process."""
        self.record = record
        if self.accelerator.is_main_process:
            keep, command = self.keep_checkpoints, self.resume_command
            save_checkpoint(self.out, step, self.model, self.optimizer, record, keep=keep, resume_command=command)

    def open_log(self) -> RunLog:
        """Return the log of this session, to be opened as a context."""
        return RunLog(
            self.accelerator,
            self.title,
            total=self.steps * self.batch_size,
            unit=self.unit,
            folder=self.out,
            done=self.start * self.batch_size,
            seconds=self.record.seconds,
            conveniences=self.conveniences,
        )

    def train(self, log: RunLog, preview: Callable[[RunLog], object]) -> None:
        """Run the remaining training steps, the last of which ends with a checkpoint; others with one are previewed."""
        before = self.record
        divergence, metrics, saved = Divergence(self.accelerator.device), before.metrics, log.seconds
        waiting = WaitingWarning(self.waiting_advice())
        model = self._prepare_model()
        for step, batch in itertools.islice(self.batches(), self.steps - self.start):
            losses, norm = self._step(model, step, batch)
            divergence.record(step, losses[-1].total, norm)
            last = step + 1 == self.steps
            logged = last or step % LOG_STEPS == 0
            due = last or log.seconds - saved > self.checkpoint_seconds
            if logged or due:
                divergence.check(self.out)
            waited = before.waiting_seconds + self.waiting_seconds()
            if logged:
                metrics = self._metrics(losses) | {"gradient_norm": norm.item()}
                if self.accelerator.is_main_process:
                    waiting.check(self.waiting_seconds(), log.seconds - before.seconds)
            fraction = {"waiting_fraction": waited / max(log.seconds, 1e-9)}
            log.advance(self.batch_size, **(metrics | fraction if logged else {}))
            if due:
                self.save_checkpoint(step + 1, self._record(step + 1, log.seconds, waited, metrics))
                if not last and self.accelerator.is_main_process:
                    with self.conveniences.attempt("previews"):
                        preview(log)
                saved = log.seconds
        self.start = self.steps

    def result(self) -> dict[str, Any]:
        """Return what training came to, over all sessions of the run."""
        record, count = self.record, self.steps * self.batch_size
        return {
            "steps": self.steps,
            self.unit: count,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(record.seconds, 1),
            f"{self.unit}_per_second": round(count / max(record.seconds, 1e-9), 1),
            "waiting_fraction": round(record.waiting_seconds / max(record.seconds, 1e-9), 4),
            **{name: round(value, 5) for name, value in record.metrics.items()},
            "left_out": record.left_out | self.conveniences.left_out,
        }

    def _record(self, step: int, seconds: float, waited: float, metrics: dict[str, float]) -> TrainingRecord:
        return TrainingRecord(
            seconds=seconds,
            waiting_seconds=waited,
            metrics=metrics,
            left_out=self.record.left_out | self.conveniences.left_out,
            position=self.position(step),
        )

    def _metrics(self, losses: list[Loss]) -> dict[str, float]:
        """Return the loss and its terms, summed over the parts of a batch and averaged over the processes."""
        names = ["loss", *losses[0].parts]
        values = torch.stack([torch.stack([loss.total, *loss.parts.values()]) for loss in losses]).sum(0).detach()
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))


class WaitingWarning:
    """Says once if a session waits long for its batches; what it waits before the first check is not counted."""

    def __init__(self, advice: str) -> None:
        """Say what to do about it."""
        self._advice, self._said = advice, False
        self._first: tuple[float, float] | None = None

    def check(self, waited: float, seconds: float) -> None:
        """Warn if more than MAX_WAITING of the seconds since the first check were waited; both are of the session."""
        self._first = self._first or (waited, seconds)
        waited, seconds = waited - self._first[0], seconds - self._first[1]
        if self._said or seconds < MIN_SECONDS or waited <= MAX_WAITING * seconds:
            return
        self._said = True
        print_status(
            f"warning: training waits {waited / seconds:.0%} of the time for its batches, more than "
            f"{MAX_WAITING:.0%}: {self._advice}"
        )


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
