"""One way to take a training step: AdamW, a one-cycle learning rate, clipped gradients, averaged weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor, nn


class Optimizer:
    """Everything beside the weights that a training step changes."""

    def __init__(self, model: nn.Module, *, steps: int, learning_rate: float, ema_decay: float) -> None:
        """For `steps` steps in all; the rate rises over the first twentieth and falls as a cosine."""
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(
            self.parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adam, learning_rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
        )
        self.average = EMAModel(
            self.parameters, decay=ema_decay, use_ema_warmup=True, inv_gamma=10.0, power=1.0, foreach=True
        )

    def step(self, loss: Tensor) -> None:
        """Descend along the gradient of a loss."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.descend()

    def descend(self) -> Float[Tensor, ""]:
        """Descend along the gradients that have gathered, let the average follow, and return their norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()
        self.average.step(self.parameters)
        return norm

    def teacher(self, model: nn.Module) -> Callable[..., Any]:
        """The model with the averaged weights, as they are whenever it is called; nothing is learned through it."""
        names = [name for name, _ in model.named_parameters()]

        def ask(*given: Any, **named: Any) -> Any:
            with torch.no_grad():
                weights = dict(zip(names, self.average.shadow_params, strict=True))
                return torch.func.functional_call(model, weights, given, named)

        return ask

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self.average.store(self.parameters)
        self.use_average()
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def use_average(self) -> None:
        """Copy the averaged weights into the model."""
        self.average.copy_to(self.parameters)
