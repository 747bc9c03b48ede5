"""The update of a training step: AdamW with clipped gradients, a one-cycle learning rate, averaged weights."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

EMA_WINDOW = 0.1
"""Default window of the averaged weights, as a fraction of the training steps done."""


class Optimizer:
    """All state, besides the weights, that a training step updates."""

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        learning_rate: float,
        ema_window: float = EMA_WINDOW,
        ema_decay: float = 1.0,
    ) -> None:
        """Prepare `steps` training steps; the learning rate rises over the first 5% of them and falls as a cosine.

        See `ema_decay` for the averaged weights.
        """
        self.parameters = list(model.parameters())
        self._model, self._steps, self._learning_rate = model, steps, learning_rate
        self._ema_window, self._ema_decay = ema_window, ema_decay
        device = self.parameters[0].device.type
        kernels = {"fused": True} if device == "cuda" else {"foreach": device != "mps"}
        self.adam = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, **kernels)
        self._schedule = self._make_schedule(0)
        self.averaged_model: Any = copy.deepcopy(model).requires_grad_(False)
        """A module like the one in training, to preview, to save and to sample with."""
        self._num_averaged = 0

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
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self._schedule.step()
        self._update_average()
        return norm

    def _update_average(self) -> None:
        """Move the averaged weights toward those in training; the first update copies them.

        torch's AveragedModel copies its counter to the device each time, and waits for the device to do so.
        """
        decay = min(ema_decay(self._num_averaged, self._ema_window), self._ema_decay)
        averaged = [each.detach() for each in self.averaged_model.parameters()]
        current = [each.detach() for each in self._model.parameters()]
        get_ema_multi_avg_fn(decay)(averaged, current, self._num_averaged)  # type: ignore[no-untyped-call]
        for kept, buffer in zip(self.averaged_model.buffers(), self._model.buffers(), strict=True):
            kept.copy_(buffer)
        self._num_averaged += 1

    def _make_schedule(self, step: int) -> torch.optim.lr_scheduler.OneCycleLR:
        """Return the learning rate's schedule at a step; it depends on step and length alone, not on the past."""
        return torch.optim.lr_scheduler.OneCycleLR(
            self.adam,
            self._learning_rate,
            total_steps=self._steps + 1,
            pct_start=0.05,
            cycle_momentum=False,
            last_epoch=step - 1,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the state for a checkpoint, as named tensors and as counters; without the averaged model itself."""
        tensors = {
            f"adam.{index}.{name}": torch.as_tensor(value)
            for index, state in self.adam.state_dict()["state"].items()
            for name, value in state.items()
        }
        return tensors, {"num_updates": self._schedule.last_epoch, "num_averaged": self._num_averaged}

    def load_state(self, tensors: dict[str, Tensor], average: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Restore what `state` has returned, and the averaged weights.

        Raises KeyError or RuntimeError if it belongs to another model.
        """
        adam = self.adam.state_dict()
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                adam["state"].setdefault(int(index), {})[name] = tensor
        self.adam.load_state_dict(adam)
        self._schedule = self._make_schedule(counters["num_updates"])
        self.averaged_model.load_state_dict(average)
        self._num_averaged = int(counters["num_averaged"])


def ema_decay(updates: int, window: float) -> float:
    """Return the decay of the averaged weights after a number of updates: 1 - 1 / (1 + window * updates).

    The average thus reaches back over a fraction of the training so far, whatever its length: the power-function
    averaging of EDM2 (Karras et al., arXiv 2312.02696) with gamma = 1 / window - 1; 0.1 is their sigma_rel of 0.083.
    """
    return 1 - 1 / (1 + updates / (1 / window))
