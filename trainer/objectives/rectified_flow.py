"""Rectified flow (Liu et al., arXiv 2209.03003) with one reflow: flow matching on pairs of R and a trained flow's end.

Such pairs are the same for equal inputs, and their segments cross less, so that few Euler steps lose less. The flow is
another run, frozen. Its ends are computed during training, `solver_steps` evaluations each, and the retrieved pairs are
not used: with `--coupling independent` there is no search. To rectify again, name the run that this one makes.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.errors import OptionError, RunError
from index.table.schema import EncoderRef, TableMeta
from trainer.models.base import Network
from trainer.models.registry import load_network
from trainer.objectives.base import Loss, StepInput, Training
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.hyperparameters import positive
from trainer.run_folder import NETWORK, read_config
from trainer.stream import Batch

FLOWS = ("flow_matching", "rectified_flow")


@dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow(FlowMatching):
    """Equation 1 of the paper on the pairs of its algorithm 1, with t uniform and Euler steps."""

    flow: str = ""
    """Run folder of the flow."""
    solver_steps: int = positive(50)
    """Euler steps from R to its pair. The authors use RK45, on CIFAR-10 about 127 evaluations, once for all pairs."""

    def check(self, meta: TableMeta | None = None, num_tokens: int = 0) -> None:
        """Check the flow before training; sampling does not need it.

        Raises:
            OptionError: no flow is named.
            RunError: the flow is missing or is not a flow, or its coordinates or text embeddings are not the table's.
        """
        if not self.flow:
            raise OptionError("rectified_flow needs a flow: add --set flow=RUN, made with --objective flow_matching")
        folder = Path(self.flow)
        config = read_config(folder)
        name = config["fit"]["objective"]
        if name not in FLOWS:
            raise RunError(f"{folder} is a run of {name}: use --set flow=RUN with a run of {' or '.join(FLOWS)}")
        network = load_network(folder / NETWORK)
        if meta is not None:
            _check_fit(folder, TableMeta.from_json(config["table"]["meta"]), meta, network, num_tokens)

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the loss of flow matching with the flow's ends as y."""
        return FlowMatching.loss(self, network, replace(batch, y=self._ends(batch)), training)

    @torch.no_grad()
    def _ends(self, batch: Batch) -> Float[Tensor, "B L"]:
        """Follow the flow from R."""
        flow, x = _open_flow(self.flow, str(batch.r.device)), batch.r
        for i in range(self.solver_steps):
            # A flow's step does not depend on its hyperparameters, so ours is the flow's too.
            inputs = StepInput(x=x, text=batch.text, i=i, n=self.solver_steps, noise=lambda: batch.r)
            x = self.step(flow, inputs).x
        return x


def _check_fit(folder: Path, flow_meta: TableMeta, meta: TableMeta, network: Network, num_tokens: int) -> None:
    """Raise RunError if a flow does not live in the same coordinates, or reads other text embeddings."""
    equal = {
        "geometry": flow_meta.geometry.name == meta.geometry.name,
        "latents": flow_meta.latent_shape == meta.latent_shape
        and np.array_equal(flow_meta.geometry.mean, meta.geometry.mean)
        and np.array_equal(flow_meta.geometry.std, meta.geometry.std),
        "text encoder": _read_as(flow_meta.text_encoder) == _read_as(meta.text_encoder),
        "--num-tokens": network.num_tokens in (0, num_tokens),
    }
    different = [part for part, same in equal.items() if not same]
    if different:
        raise RunError(
            f"{folder} was trained with another {' and '.join(different)}: first train a flow on this table"
            + (f" with --num-tokens {num_tokens}" if "--num-tokens" in different else "")
        )


def _read_as(ref: EncoderRef) -> tuple[str, str, str]:
    return ref.digest, ref.pooling, ref.prompt


@lru_cache(maxsize=1)
def _open_flow(folder: str, device: str) -> Network:
    network: Network = load_network(Path(folder) / NETWORK).to(device).eval().requires_grad_(False)
    return network
