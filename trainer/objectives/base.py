"""What a network is trained for and how it is sampled: the coalescer and its rivals, behind the same two functions.

    loss(network, batch, training) -> Loss
    step(network, x, text, i, n, guidance, noise) -> Step          the i-th of n steps from x, i = 0 ... n - 1

An objective is a frozen dataclass of its hyperparameters. The network, the pairs and the budget are the same for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from index.errors import OptionError
from index.table.schema import TableMeta
from trainer.models.base import Prediction
from trainer.objectives.hyperparameters import read_dial
from trainer.stream import Batch


class Training(NamedTuple):
    """What a loss may ask about the run that it is part of."""

    progress: float
    """Share of the steps that are done, 0 to 1."""
    teacher: Callable[..., Prediction]
    """The network with its averaged weights; nothing is learned through it."""


class Loss(NamedTuple):
    """What is minimized, and its parts for the log."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


class Step(NamedTuple):
    """Where a step has led, and how sure the network was, 0 to 1; NaN where an objective cannot say."""

    x: Float[Tensor, "B L"]
    confidence: Float[Tensor, "B"]


@runtime_checkable
class Objective(Protocol):
    """The two functions."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """The loss of one batch."""
        ...

    def step(
        self,
        network: nn.Module,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        i: int,
        n: int,
        guidance: float,
        noise: Callable[[], Float[Tensor, "B L"]],
    ) -> Step:
        """The i-th of n steps; `noise` draws fresh random points, for those that need some on the way."""
        ...


@runtime_checkable
class RestsOnRun(Protocol):
    """An objective that is trained with the help of another run, and sampled without."""

    def check(self, meta: TableMeta | None = None, tokens: int = 0) -> None:
        """OptionError or RunError where that run is missing, or does not fit the table and a network's tokens."""
        ...


def make_objective(name: str, preset: str, **hyperparameters: Any) -> Objective:
    """An objective by its name and preset, with single hyperparameters changed; OptionError where there is none."""
    from trainer.objectives import (
        coalescer,
        consistency,
        endpoint,
        flow_matching,
        imle,
        mean_flow,
        rectified_flow,
        shortcut,
    )

    presets: dict[str, Mapping[str, Callable[..., Objective]]] = {
        "coalescer": coalescer.PRESETS,
        "endpoint": endpoint.PRESETS,
        "flow_matching": flow_matching.PRESETS,
        "rectified_flow": rectified_flow.PRESETS,
        "mean_flow": mean_flow.PRESETS,
        "shortcut": shortcut.PRESETS,
        "consistency": consistency.PRESETS,
        "imle": imle.PRESETS,
    }
    if name not in presets:
        raise OptionError(f"--objective {name!r} is unknown: choose one of {', '.join(presets)}")
    if preset not in presets[name]:
        raise OptionError(f"--preset {preset!r} is unknown for {name}: choose one of {', '.join(presets[name])}")
    known = {dial.name: dial.default for dial in fields(presets[name][preset]())}  # type: ignore[arg-type]
    for dial in hyperparameters:
        if dial not in known:
            raise OptionError(f"--set {dial} is unknown for {name}: choose one of {', '.join(known)}")
    return presets[name][preset](
        **{dial: read_dial(dial, value, known[dial]) for dial, value in hyperparameters.items()}
    )
