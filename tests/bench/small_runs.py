"""Small training runs for the toy benchmarks: a bank of pairs, a small network trained on it, and its samples.

The objectives, the optimizer and the network's layers are the project's. Only the network is smaller than `tiny`,
because a benchmark trains a hundred of them on one core. No condition is dropped out, since no guidance is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from index.search.pairs import NUM_UNIFORMS
from index.space.queries import draw_uniforms
from trainer.models.base import Network
from trainer.models.mlp import LatentMLP
from trainer.objectives.base import Objective, StepInput, Training
from trainer.objectives.registry import make_objective
from trainer.optimizer import Optimizer
from trainer.stream import Batch

BATCH = 256
NUM_LAYERS = 3
LEARNING_RATE, EMA_DECAY = 5e-3, 0.998


@dataclass(frozen=True, eq=False, slots=True)
class Bank:
    """Pairs drawn ahead, in a random order and in coordinates."""

    r: Float32[np.ndarray, "B L"]
    text: Float32[np.ndarray, "B T"]
    y: Float32[np.ndarray, "B L"]

    def batch(self, step: int, seed: int) -> Batch:
        """Return the pairs of a training step with uniforms of its own; the bank is cycled through."""
        rows = (step * BATCH + np.arange(BATCH)) % len(self.r)
        r, text, y = (torch.from_numpy(part[rows]) for part in (self.r, self.text, self.y))
        uniforms = torch.from_numpy(draw_uniforms(BATCH, NUM_UNIFORMS, seed=seed, step=step))
        return Batch(r=r, text=text[:, None], y=y, uniforms=uniforms)


def make_toy_objective(name: str, preset: str = "default") -> Objective:
    """Make an objective without condition dropout; preset `time` is the default one with time conditioning."""
    if preset == "time":
        return make_objective(name, "default", dropout=0.0, time_conditioning=True)
    return make_objective(name, preset, dropout=0.0)


def train(objective: Objective, bank: Bank, *, steps: int, hidden_dim: int, seed: int) -> Network:
    """Train a new network and return it with its averaged weights."""
    torch.manual_seed(seed)
    network = LatentMLP([bank.y.shape[1], 1, 1], bank.text.shape[1], hidden_dim, NUM_LAYERS)
    optimizer = Optimizer(network, steps=steps, learning_rate=LEARNING_RATE, ema_decay=EMA_DECAY)
    for step in range(steps):
        training = Training(step / steps, optimizer.teacher)
        optimizer.step(objective.loss(network, bank.batch(step, seed), training).total)
    averaged: Network = optimizer.averaged_model.eval()
    return averaged


@torch.inference_mode()
def sample(
    objective: Objective,
    network: Network,
    r: Float32[np.ndarray, "B L"],
    text: Float32[np.ndarray, "B T"],
    steps: int,
    noise: Callable[[], Float32[np.ndarray, "B L"]],
) -> Float32[np.ndarray, "B L"]:
    """Return the samples of so many steps from R; `noise` draws fresh noise of the same distribution."""
    x, condition = torch.from_numpy(r), torch.from_numpy(text)[:, None]
    for i in range(steps):
        inputs = StepInput(x=x, text=condition, i=i, n=steps, noise=lambda: torch.from_numpy(noise()))
        x = objective.step(network, inputs).x
    return x.numpy()


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and standard deviation of a metric over the seeds."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
