"""The configuration of a training run: FitConfig decides its result, RuntimeConfig only how it is computed."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from index.errors import OptionError
from index.ranges import COUNT, COUNT_FROM_0, NOT_NEGATIVE, POSITIVE, SEED, TOTAL, Range, check_choices, check_ranges
from trainer.models.base import SIZE_NAMES
from trainer.models.registry import NETWORK_NAMES
from trainer.objectives.registry import make_objective
from trainer.optimizer import EMA_WINDOW
from trainer.run_folder import EncoderPlaces
from trainer.stream import StreamConfig

SEARCHES = ("ann", "exact")
AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """Everything but the table that the result of a training run depends on; saved in RUN/config.json."""

    objective: str = "coalescer"
    preset: str = "default"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of the objective that differ from the preset."""
    coupling: str = "nearest"
    """nearest: pairs are retrieved by vector search. independent: each caption with its own latent and any R."""
    network: str = "auto"
    """mlp, transformer, or auto: a transformer for latents of 16 rows or more."""
    size: str = "small"
    num_tokens: Annotated[int | None, COUNT_FROM_0] = None
    """Token embeddings that a transformer attends to, next to the pooled text embedding. None: 77 for a transformer."""
    images: Annotated[int, TOTAL] = 1_000_000
    """Training targets in all: the batch size times the number of training steps."""
    batch_size: Annotated[int, COUNT] = 256
    """Targets per training step, over all processes."""
    learning_rate: Annotated[float | None, POSITIVE] = None
    """Peak learning rate. None: the default of the network's architecture and size."""
    ema_window: Annotated[float, Range(0, 1, above=True)] = EMA_WINDOW
    """Window of the averaged weights, as a fraction of the training steps done; see trainer.optimizer.ema_decay."""
    init: str | None = None
    """Run folder whose averaged weights the network starts from. None: fresh weights."""
    seed: Annotated[int, SEED] = 0
    search: str = "ann"
    """ann: the table's LanceDB index. exact: brute force over vectors that are held on the device."""
    reuse: Annotated[int | None, COUNT] = None
    """Training steps that each retrieved pair serves. None: the rule of trainer.stream.plan_reuse."""
    num_neighbors: Annotated[int, COUNT] = 1
    """k: each pair is sampled from the k nearest neighbors of its query."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Softmax temperature over the squared distances of those k neighbors."""
    condition: str = "retrieved"
    """Condition the network on the retrieved pair's text embedding (retrieved) or on the query's own (query)."""
    jitter: Annotated[float, NOT_NEGATIVE] = 0.0
    """Length of the Gaussian noise on query embeddings, as a fraction of their norm."""
    dtype: str = AUTO
    """bfloat16: forward and backward passes run under autocast; weights stay float32. auto, until a run begins:
    bfloat16 on CUDA and float32 elsewhere."""

    def __post_init__(self) -> None:
        """Raise OptionError for values that cannot be trained with; no file is read."""
        make_objective(self.objective, self.preset, **self.hyperparameters)
        check_choices(self, network=NETWORK_NAMES, size=SIZE_NAMES, search=SEARCHES, dtype=DTYPES)
        check_ranges(self)
        if self.images < self.batch_size:
            raise OptionError(
                f"--images {self.images} is less than one batch of --batch-size {self.batch_size}: use at least one "
                "batch"
            )
        self.stream()

    @property
    def steps(self) -> int:
        """Return the number of training steps."""
        return self.images // self.batch_size

    def stream(self) -> StreamConfig:
        """Return the part of this configuration that decides the batches."""
        return StreamConfig(
            batch_size=self.batch_size,
            seed=self.seed,
            coupling=self.coupling,
            num_neighbors=self.num_neighbors,
            temperature=self.temperature,
            condition=self.condition,
            jitter=self.jitter,
            reuse=self.reuse or 1,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """How a training run is computed; its result is the same up to floating-point rounding."""

    device: str = "auto"
    gradient_accumulation_steps: Annotated[int, COUNT] = 1
    """Parts that each batch is split into to save memory; their gradients are accumulated."""
    compile: bool = False
    """Compile the network with torch.compile."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice instead of keeping them for the gradient. None: for size large on an accelerator."""
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE] = 120.0
    """Seconds between two checkpoints."""
    keep_checkpoints: Annotated[int, COUNT] = 2
    """Number of latest checkpoints to keep."""
    targets: str | None = None
    """Name or path of targets that `pipeline draw-targets` has drawn ahead; None: search while training."""
    encoders: EncoderPlaces = field(default_factory=EncoderPlaces)
    """Where the table's encoders are, if they were moved."""

    def __post_init__(self) -> None:
        """Raise OptionError if a number is out of range."""
        check_ranges(self)
