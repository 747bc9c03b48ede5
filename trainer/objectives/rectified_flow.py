"""Rectified flow (Liu et al., arXiv 2209.03003), one reflow: flow matching on pairs (R, where a trained flow leads R).

Such pairs are the same for equal inputs and their segments cross less, so few Euler steps lose less. The flow is
another run, frozen; its pairs are made on the way, `solver_steps` evaluations each, and the search's pairs are not
looked at: with `--coupling independent` there is no search. To rectify again, name the run that this one makes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from index.errors import OptionError, RunError
from index.table.schema import TableMeta
from trainer.models.base import Network
from trainer.objectives.base import Loss, Objective, Training, make_objective
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.hyperparameters import check_positive
from trainer.run_folder import load_network, read_config
from trainer.stream import Batch

FLOWS = ("flow_matching", "rectified_flow")


@dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow(FlowMatching):
    """The paper's equation 1 on the pairs of its algorithm 1; t is uniform, steps are Euler's."""

    flow: str = ""
    """Folder of the flow's run."""
    solver_steps: int = 50
    """Euler steps from R to its pair. The authors use RK45, on CIFAR-10 about 127 evaluations, once for all pairs."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        FlowMatching.__post_init__(self)
        check_positive(self, "solver_steps")

    def check(self, meta: TableMeta | None = None, tokens: int = 0) -> None:
        """Look at the flow before training begins; sampling does without it.

        Raises:
            OptionError: none is named.
            RunError: it is missing or no flow, or its coordinates or descriptions are not those of the table.
        """
        if not self.flow:
            raise OptionError("rectified_flow has no flow: give --set flow=RUN, made with --objective flow_matching")
        folder = Path(self.flow)
        config = read_config(folder)
        name = config["fit"]["objective"]
        if name not in FLOWS:
            raise RunError(f"{folder} is a run of {name}: give --set flow=RUN of one of {', '.join(FLOWS)}")
        network = load_network(folder)
        if meta is None:
            return
        given = TableMeta.from_json(config["table"]["meta"])
        same = {
            "geometry": given.geometry.name == meta.geometry.name,
            "latents": given.latent_shape == meta.latent_shape
            and np.array_equal(given.geometry.mean, meta.geometry.mean)
            and np.array_equal(given.geometry.std, meta.geometry.std),
            "text encoder": given.text_encoder.digest == meta.text_encoder.digest,
            "--tokens": network.config.kind == "mlp" or network.config.tokens == tokens,
        }
        other = [part for part, equal in same.items() if not equal]
        if other:
            raise RunError(
                f"{folder} was trained with other {' and '.join(other)}: first train a flow on this table"
                + (f" with --tokens {tokens}" if "--tokens" in other else "")
            )

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Flow matching towards where the flow leads."""
        objective, flow = _open(self.flow, str(batch.r.device))
        end, steps = batch.r, self.solver_steps
        with torch.no_grad():
            for i in range(steps):
                end = objective.step(flow, end, batch.text, i, steps, 1.0, lambda: batch.r).x
        return FlowMatching.loss(self, network, replace(batch, y=end), training)


@lru_cache(maxsize=1)
def _open(folder: str, device: str) -> tuple[Objective, Network]:
    config = read_config(Path(folder))
    objective = make_objective(config["fit"]["objective"], config["fit"]["preset"], **config["objective"])
    return objective, load_network(Path(folder)).to(device).eval().requires_grad_(False)


PRESETS: dict[str, Callable[..., RectifiedFlow]] = {"default": RectifiedFlow}
