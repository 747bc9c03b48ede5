"""What every objective has: a loss to train a network with, a step to sample it with, and classifier-free guidance.

    objective.loss(network, batch, training) -> Loss
    objective.step(network, StepInput(x, text, i, n, guidance_scale, noise)) -> StepOutput

An objective is a frozen dataclass of its hyperparameters. Network, pairs and budget are the same for all objectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from index.table.schema import TableMeta
from trainer.models.base import Prediction
from trainer.objectives.hyperparameters import check_hyperparameters, fraction
from trainer.stream import Batch


class Training(NamedTuple):
    """What a loss may depend on besides network and batch."""

    progress: float
    """Fraction of the training steps that are done, 0 to 1."""
    teacher: Callable[..., Prediction]
    """The network with its averaged weights; no gradient flows through it."""
    whole: Batch | None = None
    """The batch of this process that the batch of a loss is a part of, if gradients are accumulated."""
    first: int = 0
    """The first row of the part in it."""


class Loss(NamedTuple):
    """What is minimized, and its terms for the log."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepInput:
    """One of the n steps from noise to a latent."""

    x: Float[Tensor, "B L"]
    """Where the previous step ended; noise R for the first."""
    text: Float[Tensor, "B K T"]
    i: int
    """Index of the step, 0 to n - 1."""
    n: int
    """num_inference_steps."""
    guidance_scale: float = 1.0
    """w of classifier-free guidance; 1 leaves guidance out and saves its evaluation."""
    noise: Callable[[], Float[Tensor, "B L"]]
    """Draws fresh noise, for objectives that add some between steps."""

    def full(self, value: float) -> Float[Tensor, "B"]:
        """Return the value once for each image."""
        return torch.full((len(self.x),), value, device=self.x.device)


class StepOutput(NamedTuple):
    """Where a step ends."""

    x: Float[Tensor, "B L"]
    confidence: Float[Tensor, "B"]
    """0 to 1 for the coalescer; NaN for objectives that predict none."""

    @classmethod
    def without_confidence(cls, x: Float[Tensor, "B L"]) -> "StepOutput":
        """Return a step of an objective that predicts no confidence."""
        return cls(x, torch.full((len(x),), torch.nan, device=x.device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(ABC):
    """The base of all objectives, with the hyperparameter that all share."""

    dropout: float = fraction(0.1)
    """Fraction of training inputs that are unconditional, which is what guidance needs."""

    dropout_column: ClassVar[int] = 0
    """The column of `Batch.uniforms` that decides which."""
    has_confidence: ClassVar[bool] = False
    """Whether steps predict a confidence."""

    def __post_init__(self) -> None:
        """Raise OptionError if a hyperparameter is out of its range."""
        check_hyperparameters(self)

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the loss of one batch, averaged over its rows."""

    @abstractmethod
    def step(self, network: nn.Module, inputs: StepInput) -> StepOutput:
        """Take one of n steps from noise to a latent."""

    def check(self, meta: TableMeta | None = None, num_tokens: int = 0) -> None:  # noqa: B027 (an optional hook)
        """Raise OptionError or RunError if training needs something that is missing or does not fit the table.

        Nothing by default. Called without arguments before a table is open.
        """

    def cond_mask(self, batch: Batch) -> Bool[Tensor, "B"]:
        """Return False for the training inputs that are unconditional."""
        return batch.uniforms[:, self.dropout_column] >= self.dropout


def guide(
    predict: Callable[[Bool[Tensor, "B"] | None], Float[Tensor, "B L"]], inputs: StepInput
) -> Float[Tensor, "B L"]:
    """Apply classifier-free guidance: unconditional + w (conditional - unconditional), w the guidance scale.

    Ho and Salimans, arXiv 2207.12598, with w = 1 for no guidance.

    Args:
        predict: returns what is extrapolated, such as a velocity, for a cond_mask; None is conditional.
        inputs: the step.
    """
    conditional = predict(None)
    if inputs.guidance_scale == 1:
        return conditional
    unconditional = predict(torch.zeros(len(inputs.x), dtype=torch.bool, device=inputs.x.device))
    return unconditional + inputs.guidance_scale * (conditional - unconditional)
