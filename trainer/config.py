"""What a training run is asked for: FitConfig decides its result, RuntimeConfig only how it is computed."""

from dataclasses import dataclass, field
from typing import Any

from index.errors import OptionError
from trainer.models.base import KINDS, SIZES
from trainer.objectives.base import RestsOnRun, make_objective
from trainer.stream import CONDITIONS, COUPLINGS

DTYPES = ("float32", "bfloat16")
SEARCHES = ("ann", "exact")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """What a run depends on, beside its table."""

    objective: str = "coalescer"
    preset: str = "default"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Single settings of the objective that are not the preset's."""
    coupling: str = "nearest"
    network: str = "auto"
    """mlp, transformer, or auto: a transformer where latents have 16 rows or more."""
    size: str = "small"
    num_tokens: int | None = None
    """Token states of a description that a transformer reads beside its pooled embedding; None: at most 77."""
    images: int = 1_000_000
    """Targets drawn in all, over all steps."""
    batch_size: int = 256
    learning_rate: float | None = None
    """Highest learning rate; None is one by kind and size of network."""
    ema_decay: float = 0.998
    seed: int = 0
    search: str = "ann"
    """ann: the table's LanceDB index. exact: vectors held on the device."""
    reuse: int | None = None
    """Steps that each draw serves. None: as many as keep training from waiting for searches."""
    num_neighbors: int = 1
    """Draw each pair from so many of the nearest."""
    temperature: float = 1.0
    """Of that draw, in squared distance."""
    condition: str = "retrieved"
    """Which description the network is told: the retrieved pair's, or the query's."""
    jitter: float = 0.0
    """Noise on what is asked for, as a share of its length."""
    dtype: str = "float32"
    """bfloat16: the network computes in bfloat16, its weights stay float32."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained before anything is read."""
        objective = make_objective(self.objective, self.preset, **self.hyperparameters)
        if isinstance(objective, RestsOnRun):
            objective.check()
        allowed = {
            "network": KINDS,
            "size": SIZES,
            "search": SEARCHES,
            "condition": CONDITIONS,
            "coupling": COUPLINGS,
            "dtype": DTYPES,
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"--{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        if self.num_neighbors < 1 or self.temperature <= 0:
            raise OptionError(
                f"--num-neighbors {self.num_neighbors} --temperature {self.temperature:g}: give at least 1, and above 0"
            )
        if self.jitter < 0:
            raise OptionError(f"--jitter {self.jitter:g} is not allowed: give 0 or a share such as 0.1")
        if self.reuse is not None and self.reuse < 1:
            raise OptionError(f"--reuse {self.reuse} is not allowed: give at least 1, or leave it out")
        if self.batch_size < 1 or self.images < self.batch_size:
            raise OptionError(f"--images {self.images} is less than one batch of {self.batch_size}")

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return self.images // self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """What a run does not depend on, but for the last bits of its figures."""

    device: str = "auto"
    gradient_accumulation_steps: int = 1
    """Parts that each step's batch is computed in, where it does not fit into memory."""
    compile: bool = False
    """Let torch.compile translate the network."""
    checkpoint_seconds: float = 120.0
    keep_checkpoints: int = 2
    """Checkpoints, the last ones."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.gradient_accumulation_steps < 1 or self.keep_checkpoints < 1:
            raise OptionError(
                f"--gradient-accumulation-steps {self.gradient_accumulation_steps} --keep-checkpoints "
                f"{self.keep_checkpoints}: use 1 or more"
            )
