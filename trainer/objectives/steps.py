"""What the steps of several objectives share: guidance, Euler's rule, and that they cannot say how sure they are."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.objectives.base import Step


def guided(
    told: Float[Tensor, "B L"],
    ask: Callable[[Bool[Tensor, "B"]], Float[Tensor, "B L"]],
    guidance: float,
) -> Float[Tensor, "B L"]:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): blind + w (told - blind).

    `ask(keep)` gives what is said where the description is left out; with w = 1 it is not asked.
    """
    if guidance == 1:
        return told
    blind = ask(torch.zeros(len(told), dtype=torch.bool, device=told.device))
    return blind + guidance * (told - blind)


def unsure(x: Float[Tensor, "B L"]) -> Step:
    """A step to x of an objective that has no confidence."""
    return Step(x, torch.full((len(x),), torch.nan, device=x.device))


class Euler:
    """Steps of length 1/n along a velocity, the network's direction head, which is told the time i/n."""

    __slots__ = ()

    def span(self, n: int) -> float | None:
        """What the network is told of the length of one of n steps; None: nothing."""
        return None

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
        """Guidance is on the velocity."""
        figures = {"time": i / n, "span": self.span(n)}
        clock = {
            name: torch.full((len(x),), figure, device=x.device)
            for name, figure in figures.items()
            if figure is not None
        }
        told = network(x, text, **clock).direction
        velocity = guided(told, lambda nobody: network(x, text, keep=nobody, **clock).direction, guidance)
        return unsure(x + velocity / n)
