"""The training loop of both autoencoders: AdamW and averaged weights over random batches, on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import nn

from index.errors import OptionError
from index.ranges import COUNT, FRACTION, POSITIVE, SEED, TOTAL, check_ranges
from index.table.storage import Storage
from trainer.models.base import SIZE_NAMES
from trainer.objectives.base import Loss
from trainer.optimizer import Optimizer
from trainer.tracking import TRACKER, RunLog

EMA_DECAY = 0.99
LOG_STEPS = 50
"""Training steps between two lines of the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What both autoencoders are configured by."""

    steps: Annotated[int, COUNT]
    """Training steps."""
    batch_size: Annotated[int, COUNT]
    learning_rate: Annotated[float, POSITIVE]
    """Peak learning rate."""
    limit: Annotated[int, TOTAL]
    """Maximum number of samples to read; they are held in memory."""
    size: str = "tiny"
    val_fraction: Annotated[float, FRACTION] = 0.05
    """Fraction of samples that are held out to measure on."""
    seed: Annotated[int, SEED] = 0
    storage: Storage = field(default_factory=Storage.of)
    """How to reach sources on object stores."""

    def __post_init__(self) -> None:
        """Raise OptionError if the size is unknown or a number out of range."""
        check_ranges(self)
        if self.size not in SIZE_NAMES:
            raise OptionError(f"--size {self.size!r} is unknown: choose one of {', '.join(SIZE_NAMES)}")


def train(
    name: str, model: nn.Module, loss: Callable[[np.random.Generator], Loss], config: TrainConfig, out: Path
) -> tuple[Any, float]:
    """Minimize `loss` over batches drawn from the generator; return the averaged model and the seconds it took."""
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=TRACKER, project_dir=out)
    optimizer = Optimizer(model, steps=config.steps, learning_rate=config.learning_rate, ema_decay=EMA_DECAY)
    rng = np.random.default_rng(config.seed)
    with RunLog(accelerator, f"fit {name} autoencoder", total=config.steps, unit="steps", folder=out) as log:
        for step in range(config.steps):
            total, parts = loss(rng)
            optimizer.step(total)
            log.advance(1, **({} if step % LOG_STEPS else {part: value.item() for part, value in parts.items()}))
        return optimizer.averaged_model, log.seconds
