"""Small training runs for the toy benchmarks: a bank of pairs, a small network trained on it, and its samples.

The objectives, the optimizer and the network's layers are the project's. Only the network is narrower than `tiny`,
because a benchmark trains a hundred of them on one core. No condition is dropped out, since no guidance is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from index.space.queries import draw_uniforms
from trainer.models.base import Network, NetworkConfig
from trainer.models.mlp import MLP, Block
from trainer.objectives.base import Objective, Training, make_objective
from trainer.optimizer import Optimizer
from trainer.stream import NUM_UNIFORMS, Batch

BATCH = 256
DEPTH = 3
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


class SmallMLP(MLP):
    """The project's MLP with another width and depth."""

    def __init__(self, latent_dim: int, text_dim: int, width: int) -> None:
        shape = {"channels": latent_dim, "height": 1, "width": 1, "text_dim": text_dim}
        Network.__init__(self, NetworkConfig(kind="mlp", size="tiny", **shape))
        self.read = nn.Linear(latent_dim + text_dim + 2, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 + latent_dim)


def objective_of(name: str, preset: str = "default") -> Objective:
    """Make an objective without condition dropout; `clock` is the default preset with time conditioning."""
    if preset == "clock":
        return make_objective(name, "default", dropout=0.0, clock=True)
    return make_objective(name, preset, dropout=0.0)


def train(objective: Objective, bank: Bank, *, steps: int, width: int, seed: int) -> Network:
    """Train a new network and return it with its averaged weights."""
    torch.manual_seed(seed)
    network = SmallMLP(bank.y.shape[1], bank.text.shape[1], width)
    optimizer = Optimizer(network, steps=steps, learning_rate=LEARNING_RATE, ema_decay=EMA_DECAY)
    for step in range(steps):
        training = Training(step / steps, optimizer.teacher)
        optimizer.step(objective.loss(network, bank.batch(step, seed), training).total)
    averaged: Network = optimizer.averaged_model.eval()
    return averaged


@torch.inference_mode()
def lead(
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
        x = objective.step(network, x, condition, i, steps, 1.0, lambda: torch.from_numpy(noise())).x
    return x.numpy()


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and standard deviation of a metric over the seeds."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
