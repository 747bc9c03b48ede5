"""The training of a network on a table: objective, optimizer and stream for the loop."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.search.ann import open_search
from index.search.neighbors import NeighborSearch
from index.table.table import Table
from index.table.targets import Targets
from index.terminal import print_status
from pipeline.encoders.devices import default_dtype
from trainer.checkpoints import checked, open_network
from trainer.config import FitConfig, RuntimeConfig
from trainer.loop import TrainingLoop
from trainer.models.base import count_flops
from trainer.models.registry import make_network
from trainer.objectives.base import Loss, Training
from trainer.objectives.registry import make_objective
from trainer.optimizer import Optimizer
from trainer.run_folder import open_run_text_encoder
from trainer.stream import Batch, EncodeTokens, NeighborStream, plan_reuse, sent_ahead
from trainer.targets import check_targets, open_run_targets
from trainer.tokens import TokenEncoder
from trainer.tracking import Preview

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainer(TrainingLoop):
    """The parts of one training run."""

    title, unit = "fit", "images"

    def __init__(
        self, accelerator: "Accelerator", table: Table, config: FitConfig, out: Path, runtime: RuntimeConfig
    ) -> None:
        """Build the network from the seed, or from the weights of another run, and check that it suits the table.

        Raises OptionError or RunError if it does not.
        """
        self.table, self.config, self.runtime = table, config, runtime
        self.device = str(accelerator.device)
        self.objective = make_objective(config.objective, config.preset, **config.hyperparameters)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            network = make_network(table.meta, size=config.size, network=config.network, num_tokens=config.num_tokens)
        self.objective.check(table.meta, network.num_tokens)
        self.network = network.to(accelerator.device)
        super().__init__(
            accelerator,
            self.network,
            out,
            steps=config.steps,
            batch_size=config.batch_size,
            checkpoint_seconds=runtime.checkpoint_seconds,
            keep_checkpoints=runtime.keep_checkpoints,
            resume_command=f"trainer fit --resume --out {out}",
        )
        if self._checkpoints_gradients():
            self.network.enable_gradient_checkpointing()
        self._make_optimizer()

    def _checkpoints_gradients(self) -> bool:
        wanted = self.runtime.gradient_checkpointing
        return self.config.size == "large" and self.accelerator.device.type != "cpu" if wanted is None else wanted

    def _make_optimizer(self) -> None:
        config = self.config
        rate = self.network.default_learning_rate if config.learning_rate is None else config.learning_rate
        self.optimizer = Optimizer(self.network, steps=config.steps, learning_rate=rate, ema_window=config.ema_window)

    def start_from(self, run: Path) -> None:
        """Replace the fresh weights by the averaged ones of another run; raise RunError if they do not fit."""
        self.network.load_state_dict(checked(open_network(run).state_dict(), self.network, f"--init {run}"))
        self._make_optimizer()

    def open_stream(self) -> None:
        """Open the search or the targets drawn ahead, choose how often pairs are reused, and open the stream.

        Raises OptionError if the targets do not fit the run.
        """
        self.source = self._open_source()
        self.encode_tokens = self._open_token_encoder()
        self.config = replace(self.config, reuse=self._choose_reuse())
        self.stream = self._make_stream(self.start)

    def _open_source(self) -> NeighborSearch | Targets | None:
        targets = open_run_targets(self.table.uri, self.runtime.targets, self.table.storage)
        if targets is None and self.config.coupling == "independent":
            print_status("--coupling independent trains each caption on its own latent: nothing is searched")
            return None
        if targets is None:
            return open_search(
                self.table,
                exact=self.config.search == "exact",
                device=self.device,
                process=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
            )
        check_targets(targets, self.table, self.config)
        return targets

    def open_preview(self) -> Preview:
        """Return the preview of the averaged model, which computes in the dtype of training."""
        model = self.optimizer.averaged_model
        self.accelerator.prepare_model(model, evaluation_mode=True)
        return Preview(self.out, self.table, model, self.objective, self.device, self.runtime.encoders)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) of this process from step `start` on."""
        return sent_ahead(islice(self.stream, self.steps - self.start), self.accelerator.device)

    def waiting_seconds(self) -> float:
        """Return how long this session has waited for batches."""
        return self.stream.waiting_seconds

    def waiting_advice(self) -> str:
        """Return what to do about waiting for batches."""
        reuse = f"train a new run with a --reuse above {self.config.reuse}"
        if isinstance(self.source, Targets):
            return reuse
        return f"draw targets ahead with `pipeline draw-targets`, or {reuse}"

    def result(self) -> dict[str, Any]:
        """Return what training came to, over all sessions of the run."""
        return super().result() | {
            "flops": count_flops(self.network),
            "num_processes": self.accelerator.num_processes,
            "reuse": self.config.reuse,
        }

    def _open_token_encoder(self) -> EncodeTokens | None:
        """Return the encoder of token embeddings; None if the network attends to none."""
        if not self.network.num_tokens:
            return None
        device = self.device
        encoder = open_run_text_encoder(self.out, self.table.meta, self.runtime.encoders, device, default_dtype(device))
        return TokenEncoder(partial(encoder.encode_tokens, num_tokens=self.network.num_tokens), device)

    def _make_stream(self, start: int = 0) -> NeighborStream:
        return NeighborStream(
            self.table,
            self.source,
            self.config.stream(),
            start=start,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            encode_tokens=self.encode_tokens,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _choose_reuse(self) -> int:
        """Return how many steps each retrieved pair serves; the same on every device and in every process."""
        config = self.config
        if config.reuse is not None:
            return config.reuse
        if config.coupling == "independent" or isinstance(self.source, Targets):
            return 1
        return plan_reuse(self.table, count_flops(self.network), exact=config.search == "exact")

    def _prepare_model(self) -> nn.Module:
        """Return the network as the processes train it."""
        model: nn.Module = self.accelerator.prepare(
            torch.compile(self.network) if self.runtime.compile else self.network
        )
        return model

    def _step(self, model: nn.Module, step: int, batch: Batch) -> tuple[list[Loss], Float[Tensor, ""]]:
        """Update the weights on one batch; return the loss of each part of it and the norm of the gradient.

        Every row weighs the same, whether or not the parts are of equal size: losses are sums over the batch's rows.
        """
        whole = batch.to(self.accelerator.device)
        parts, losses, first = whole.split(self.runtime.gradient_accumulation_steps), [], 0
        training = Training(step / self.config.steps, self.optimizer.teacher, whole)
        for index, part in enumerate(parts):
            with self.accelerator.no_sync(model) if index + 1 < len(parts) else nullcontext():
                loss = self.objective.loss(model, part, training._replace(first=first))
                fraction = len(part.r) / len(whole.r)
                losses.append(Loss(loss.total * fraction, {name: x * fraction for name, x in loss.parts.items()}))
                self.accelerator.backward(losses[-1].total)
                first += len(part.r)
        return losses, self.optimizer.apply_gradients()
