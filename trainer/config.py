"""What a training run is asked for: FitConfig decides its result, RuntimeConfig only how it is computed."""

from dataclasses import dataclass, field
from typing import Any

from index.errors import OptionError
from trainer.models.base import SIZE_NAMES
from trainer.models.registry import NETWORK_NAMES
from trainer.objectives.registry import make_objective
from trainer.stream import CONDITIONS, COUPLINGS

PRECISIONS = ("no", "bf16")
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
    tokens: int | None = None
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
    neighbors: int = 1
    """Draw each pair from so many of the nearest."""
    temperature: float = 1.0
    """Of that draw, in squared distance."""
    condition: str = "close"
    """Which description the network is told: the close pair's, or the one that was asked for."""
    jitter: float = 0.0
    """Noise on what is asked for, as a share of its length."""
    precision: str = "no"
    """bf16: the network computes in bfloat16, its weights stay float32."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained before anything is read."""
        make_objective(self.objective, self.preset, **self.hyperparameters).check()
        allowed = {
            "network": NETWORK_NAMES,
            "size": SIZE_NAMES,
            "search": SEARCHES,
            "condition": CONDITIONS,
            "coupling": COUPLINGS,
            "precision": PRECISIONS,
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"--{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        if self.neighbors < 1 or self.temperature <= 0:
            raise OptionError(
                f"--neighbors {self.neighbors} --temperature {self.temperature:g}: give at least 1, and above 0"
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
    accumulate: int = 1
    """Parts that each step's batch is computed in, where it does not fit into memory."""
    compile: bool = False
    """Let torch.compile translate the network."""
    checkpoint_seconds: float = 120.0
    keep: int = 2
    """Checkpoints, the last ones."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.accumulate < 1 or self.keep < 1:
            raise OptionError(f"--accumulate {self.accumulate} --keep {self.keep}: give at least 1")
