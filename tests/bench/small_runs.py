"""What the toy benches share: a bank of pairs, a small network trained on it by an objective, and where n steps lead.

The objectives, the optimizer and the network's layers are the project's; only the network is narrower than its `tiny`,
because a toy is trained a hundred times on one core. Descriptions are never dropped, since no guidance is asked for.
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
from trainer.stream import DICE, Batch

BATCH = 256
DEPTH = 3
LEARNING_RATE, EMA_DECAY = 5e-3, 0.998


@dataclass(frozen=True, eq=False, slots=True)
class Bank:
    """RetrievedPairs drawn beforehand, in a random order, in the coordinates that the network lives in."""

    r: Float32[np.ndarray, "B L"]
    text: Float32[np.ndarray, "B T"]
    y: Float32[np.ndarray, "B L"]

    def batch(self, step: int, seed: int) -> Batch:
        """The step's pairs, each used again after all others, with uniforms of its own."""
        rows = (step * BATCH + np.arange(BATCH)) % len(self.r)
        r, text, y = (torch.from_numpy(part[rows]) for part in (self.r, self.text, self.y))
        uniforms = torch.from_numpy(draw_uniforms(BATCH, DICE, seed=seed, step=step))
        return Batch(r=r, query=text, text=text[:, None], y=y, uniforms=uniforms)


class SmallMLP(MLP):
    """The project's MLP in a shape of ours."""

    def __init__(self, latent_dim: int, text_dim: int, width: int) -> None:
        shape = {"channels": latent_dim, "height": 1, "width": 1, "text_dim": text_dim}
        Network.__init__(self, NetworkConfig(kind="mlp", size="tiny", **shape))
        self.read = nn.Linear(latent_dim + text_dim + 2, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 + latent_dim)


def objective_of(name: str, preset: str = "default") -> Objective:
    """An objective that drops no descriptions; `clock` is the default one that is told the time."""
    if preset == "clock":
        return make_objective(name, "default", dropout=0.0, clock=True)
    return make_objective(name, preset, dropout=0.0)


def train(objective: Objective, bank: Bank, *, steps: int, width: int, seed: int) -> Network:
    """A fresh network after so many steps, with its averaged weights."""
    torch.manual_seed(seed)
    network = SmallMLP(bank.y.shape[1], bank.text.shape[1], width)
    optimizer = Optimizer(network, steps=steps, learning_rate=LEARNING_RATE, ema_decay=EMA_DECAY)
    teacher = optimizer.teacher(network)
    for step in range(steps):
        optimizer.step(objective.loss(network, bank.batch(step, seed), Training(step / steps, teacher)).total)
    optimizer.use_average()
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def lead(
    objective: Objective,
    network: Network,
    r: Float32[np.ndarray, "B L"],
    text: Float32[np.ndarray, "B T"],
    steps: int,
    noise: Callable[[], Float32[np.ndarray, "B L"]],
) -> Float32[np.ndarray, "B L"]:
    """Where so many steps lead from R; `noise` draws fresh points of the same law."""
    x, told = torch.from_numpy(r), torch.from_numpy(text)[:, None]
    for i in range(steps):
        x = objective.step(network, x, told, i, steps, 1.0, lambda: torch.from_numpy(noise())).x
    return x.numpy()


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of a figure over the seeds."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
