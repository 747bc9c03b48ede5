"""The update of a training step: AdamW with clipped gradients, a one-cycle learning rate, averaged weights."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

EMA_WARMUP = 10.0
"""gamma of the warmup of the averaged weights, in training steps."""


class Optimizer:
    """All state, besides the weights, that a training step updates."""

    def __init__(self, model: nn.Module, *, steps: int, learning_rate: float, ema_decay: float) -> None:
        """Prepare `steps` training steps; the learning rate rises over the first 5% of them and falls as a cosine."""
        self.parameters = list(model.parameters())
        self._model, self._ema_decay = model, ema_decay
        self.adam = torch.optim.AdamW(
            self.parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adam, learning_rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
        )
        self._average = AveragedModel(model, multi_avg_fn=self._update_average)
        self._average.requires_grad_(False)

    @property
    def averaged_model(self) -> Any:
        """Return the averaged model: a module like the one in training, to preview, to save and to sample with."""
        return self._average.module

    def teacher(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model without a gradient, for objectives that learn from their own average."""
        with torch.no_grad():
            return self.averaged_model(*args, **kwargs)

    def step(self, loss: Tensor) -> None:
        """Backpropagate a loss and update the weights."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.apply_gradients()

    def apply_gradients(self) -> Float[Tensor, ""]:
        """Update the weights and their average from the accumulated gradients; return the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()
        self._average.update_parameters(self._model)
        return norm

    def _update_average(self, averaged: Any, current: Any, _count: Tensor | int) -> None:
        # Read the count on the CPU: reading the argument, a copy on the device, would wait for the device.
        decay = ema_decay(int(self._average.n_averaged), self._ema_decay)
        get_ema_multi_avg_fn(decay)(averaged, current, _count)  # type: ignore[no-untyped-call]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as named tensors and as JSON values, for a checkpoint."""
        tensors = {f"average.{name}": value for name, value in self.averaged_model.state_dict().items()}
        for index, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        schedule = {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, int | float | list)}
        return tensors, {"schedule": schedule, "num_averaged": int(self._average.n_averaged)}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state` has returned; raise KeyError or RuntimeError if it belongs to another model."""
        adam = self.adam.state_dict()
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                adam["state"].setdefault(int(index), {})[name] = tensor
        # The schedule has set the learning rate of each group, which is part of the schedule's own state.
        self.schedule.load_state_dict(values["schedule"])
        for group, rate in zip(adam["param_groups"], values["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.adam.load_state_dict(adam)
        average = {key.removeprefix("average."): each for key, each in tensors.items() if key.startswith("average.")}
        self.averaged_model.load_state_dict(average)
        self._average.n_averaged.fill_(values["num_averaged"])


def ema_decay(updates: int, decay: float) -> float:
    """Return the decay of the averaged weights after a number of updates: min(decay, 1 - 1 / (1 + updates / gamma)).

    The warmup of Katherine Crowson's k-diffusion, as in the EMAModel of diffusers with inv_gamma=10 and power=1.
    """
    return min(decay, 1 - 1 / (1 + updates / EMA_WARMUP))
