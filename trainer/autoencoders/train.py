"""What both autoencoders are configured by, and what they add to the loop."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.ranges import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, TOTAL, check_choices, check_ranges
from index.table.storage import Storage
from pipeline.sources.sample import ReadOptions
from trainer.autoencoders.data import Batches, Samples
from trainer.config import AUTO, DTYPES
from trainer.loop import TrainingLoop
from trainer.models.base import SIZE_NAMES
from trainer.objectives.base import Loss
from trainer.optimizer import Optimizer
from trainer.tracking import RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

EMA_DECAY = 0.99
MEASURED, PREVIEWED = 2000, 256
"""Held-out samples that are measured at the end of training, and at its checkpoints."""
TRAINING = "training"
"""The folder in DIR of everything but the model and its report."""
_NOISE = 1
"""Of the random numbers of a step; its batch is drawn by the samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What both autoencoders are configured by; with the source it decides the result."""

    steps: Annotated[int, COUNT]
    """Training steps."""
    batch_size: Annotated[int, COUNT]
    learning_rate: Annotated[float, POSITIVE]
    """Peak learning rate."""
    limit: Annotated[int | None, TOTAL] = None
    """Maximum number of samples to train and measure on; None: all."""
    size: str = "tiny"
    val_fraction: Annotated[float, FRACTION] = 0.05
    """Fraction of samples that are held out to measure on."""
    dtype: str = AUTO
    """bfloat16: forward and backward passes run under autocast; weights stay float32. auto: that on CUDA."""
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        """Raise OptionError if a name is unknown or a number out of range."""
        check_ranges(self)
        check_choices(self, size=SIZE_NAMES, dtype=DTYPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRuntime:
    """How an autoencoder is trained; its weights are the same up to floating-point rounding."""

    device: str = "auto"
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE] = 120.0
    """Seconds between two checkpoints."""
    keep_checkpoints: Annotated[int, COUNT] = 2
    """Number of latest checkpoints to keep."""
    storage: Storage = field(default_factory=Storage.of)
    """How to reach sources on object stores; not saved, as it may hold credentials."""

    def __post_init__(self) -> None:
        """Raise OptionError if a number is out of range."""
        check_ranges(self)


class AutoencoderLoop(TrainingLoop, Generic[T]):
    """An autoencoder, its samples and its optimizer for the loop."""

    kind: ClassVar[str]
    """image or text."""
    config_class: ClassVar[type[TrainConfig]]
    metrics: ClassVar[tuple[str, ...]]
    """Names of what is measured."""

    def __init__(
        self,
        accelerator: "Accelerator",
        shards: list[str],
        config: TrainConfig,
        out: Path,
        runtime: TrainRuntime,
    ) -> None:
        """Read the first samples and build the model from the seed. Raises SourceError if there are no samples."""
        self.config, self.device = config, str(accelerator.device)
        samples = self.make_samples(shards, ReadOptions(storage=runtime.storage))
        self.samples = Batches(samples, batch_size=config.batch_size, steps=config.steps, seed=config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            model = self.make_model().to(accelerator.device)
        super().__init__(
            accelerator,
            model,
            out / TRAINING,
            steps=config.steps,
            batch_size=config.batch_size,
            checkpoint_seconds=runtime.checkpoint_seconds,
            keep_checkpoints=runtime.keep_checkpoints,
            resume_command=f"trainer fit-autoencoder --resume --out {out}",
        )
        self.optimizer = Optimizer(model, steps=config.steps, learning_rate=config.learning_rate, ema_decay=EMA_DECAY)

    @abstractmethod
    def make_samples(self, shards: list[str], options: ReadOptions) -> Samples[T]:
        """Return the samples of some shards as the config has them."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return the model with fresh weights, which may depend on the first samples."""

    @abstractmethod
    def loss(self, batch: list[T], generator: torch.Generator) -> Loss:
        """Return the loss of a batch; the generator, on the CPU, is the step's own."""

    @abstractmethod
    def measure(self, limit: int) -> dict[str, float]:
        """Return metrics of the averaged model on at most `limit` held-out samples; none if no samples are held out."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what else is reported of the averaged model, once it is saved."""

    @abstractmethod
    def show(self, log: RunLog) -> str:
        """Pass reconstructions by the averaged model to the log, and return them as HTML."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the averaged model as its library saves it."""

    def batches(self) -> Iterator[tuple[int, list[T]]]:
        """Yield (step, batch) from step `start` on."""
        return self.samples.read(self.start, self.record.position)

    def waiting_seconds(self) -> float:
        """Return how long this session has waited for samples."""
        return self.samples.waiting_seconds

    def position(self, step: int) -> dict[str, int]:
        """Return where the batch of a step is read."""
        return self.samples.position(step)

    def preview(self, log: RunLog) -> None:
        """Pass metrics and reconstructions of the averaged model to the trackers."""
        log.log_now(**self.measure(PREVIEWED))
        self.show(log)

    def _prepare_model(self) -> nn.Module:
        return self.model  # its parts are called, not it, so that nothing is to be wrapped

    def _step(self, model: nn.Module, step: int, batch: list[T]) -> tuple[list[Loss], Float[Tensor, ""]]:
        seed = np.random.default_rng([self.config.seed, step, _NOISE]).integers(2**63)
        with self.accelerator.autocast():
            loss = self.loss(batch, torch.Generator().manual_seed(int(seed)))
        self.accelerator.backward(loss.total)
        return [loss], self.optimizer.apply_gradients()
