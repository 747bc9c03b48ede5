"""A training run of either autoencoder: its settings, its folder, and what it adds to the loop.

    DIR                                 what it trains, as save_pretrained of diffusers or transformers writes it
    DIR/report.json                     metrics; the last file that a run writes
    DIR/training/settings.json          what the run began with
    DIR/training/shards.json            the shards that its sources had
    DIR/training/checkpoints, log.jsonl, tensorboard    as those of `trainer fit`
    DIR/training/index.html             metrics and reconstructions of held-out samples

The model is moved into DIR file by file at the end, its config.json last: before that, DIR is not a model.
"""

import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from index.errors import OptionError, RunError
from index.ranges import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, TOTAL, check_ranges, option_of
from index.report.html import page, table
from index.table.storage import Storage
from index.terminal import print_status
from pipeline.encoders.devices import default_dtype, resolve_device
from pipeline.sources.listing import list_shards
from pipeline.sources.sample import ReadOptions
from trainer.autoencoders.data import Batches, Samples
from trainer.checkpoints import checkpoints
from trainer.loop import TrainingLoop
from trainer.models.base import SIZE_NAMES
from trainer.objectives.base import Loss
from trainer.optimizer import Optimizer
from trainer.process import open_accelerator
from trainer.run_folder import flush, flush_entry, write_whole
from trainer.tracking import RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

EMA_DECAY = 0.99
MEASURED, PREVIEWED = 2000, 256
"""Held-out samples that are measured at the end of training, and at its checkpoints."""
DTYPES = ("auto", "float32", "bfloat16")
FORMAT = "coalescer-autoencoder-1"
TRAINING, SETTINGS, SHARDS, PAGE, REPORT = "training", "settings.json", "shards.json", "index.html", "report.json"
MODEL_CONFIG = "config.json"
_NOISE = 1
"""Of the random numbers of a step; its batch is drawn by the samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What both autoencoders are configured by; with the source it decides the result."""

    steps: Annotated[int, COUNT]
    """Training steps."""
    batch_size: Annotated[int, COUNT]
    learning_rate: Annotated[float, POSITIVE]
    """Peak learning rate."""
    limit: Annotated[int | None, TOTAL] = None
    """Maximum number of samples to train and measure on; None: all."""
    size: str = "tiny"
    val_fraction: Annotated[float, FRACTION] = 0.05
    """Fraction of samples that are held out to measure on."""
    dtype: str = "auto"
    """bfloat16: forward and backward passes run under autocast; weights stay float32. auto: that on CUDA."""
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        """Raise OptionError if a name is unknown or a number out of range."""
        check_ranges(self)
        for name, choices in {"size": SIZE_NAMES, "dtype": DTYPES}.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"--{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRuntime:
    """How an autoencoder is trained; its weights are the same up to floating-point rounding."""

    device: str = "auto"
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE] = 120.0
    """Seconds between two checkpoints."""
    keep_checkpoints: Annotated[int, COUNT] = 2
    """Number of latest checkpoints to keep."""
    storage: Storage = field(default_factory=Storage.of)
    """How to reach sources on object stores; not saved, as it may hold credentials."""

    def __post_init__(self) -> None:
        """Raise OptionError if a number is out of range."""
        check_ranges(self)


class AutoencoderLoop(TrainingLoop, Generic[T]):
    """An autoencoder, its samples and its optimizer for the loop."""

    kind: ClassVar[str]
    """image or text."""
    config_class: ClassVar[type[TrainConfig]]
    metrics: ClassVar[tuple[str, ...]]
    """Names of what is measured."""

    def __init__(
        self,
        accelerator: "Accelerator",
        shards: list[str],
        config: TrainConfig,
        out: Path,
        runtime: TrainRuntime,
    ) -> None:
        """Read the first samples and build the model from the seed. Raises SourceError if there are no samples."""
        self.config, self.device = config, str(accelerator.device)
        samples = self.make_samples(shards, ReadOptions(storage=runtime.storage))
        self.samples = Batches(samples, batch_size=config.batch_size, steps=config.steps, seed=config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            model = self.make_model().to(accelerator.device)
        super().__init__(
            accelerator,
            model,
            out / TRAINING,
            steps=config.steps,
            batch_size=config.batch_size,
            checkpoint_seconds=runtime.checkpoint_seconds,
            keep_checkpoints=runtime.keep_checkpoints,
            resume_command=f"trainer fit-autoencoder --resume --out {out}",
        )
        self.optimizer = Optimizer(model, steps=config.steps, learning_rate=config.learning_rate, ema_decay=EMA_DECAY)

    @abstractmethod
    def make_samples(self, shards: list[str], options: ReadOptions) -> Samples[T]:
        """Return the samples of some shards as the config has them."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return the model with fresh weights, which may depend on the first samples."""

    @abstractmethod
    def loss(self, batch: list[T], generator: torch.Generator) -> Loss:
        """Return the loss of a batch; the generator, on the CPU, is the step's own."""

    @abstractmethod
    def measure(self, limit: int) -> dict[str, float]:
        """Return metrics of the averaged model on at most `limit` held-out samples; none if no samples are held out."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what else is reported of the averaged model, once it is saved."""

    @abstractmethod
    def show(self, log: RunLog) -> str:
        """Pass reconstructions by the averaged model to the log, and return them as HTML."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the averaged model as its library saves it."""

    def batches(self) -> Iterator[tuple[int, list[T]]]:
        """Yield (step, batch) from step `start` on."""
        return self.samples.read(self.start, self.record.position)

    def waiting_seconds(self) -> float:
        """Return how long this session has waited for samples."""
        return self.samples.waiting_seconds

    def position(self, step: int) -> dict[str, int]:
        """Return where the batch of a step is read."""
        return self.samples.position(step)

    def preview(self, log: RunLog) -> None:
        """Pass metrics and reconstructions of the averaged model to the trackers."""
        log.log_now(**self.measure(PREVIEWED))
        self.show(log)

    def _prepare_model(self) -> nn.Module:
        return self.model  # its parts are called, not it, so that nothing is to be wrapped

    def _step(self, model: nn.Module, step: int, batch: list[T]) -> tuple[list[Loss], Float[Tensor, ""]]:
        seed = np.random.default_rng([self.config.seed, step, _NOISE]).integers(2**63)
        with self.accelerator.autocast():
            loss = self.loss(batch, torch.Generator().manual_seed(int(seed)))
        self.accelerator.backward(loss.total)
        return [loss], self.optimizer.apply_gradients()


def fit_autoencoder(
    loop_class: type[AutoencoderLoop[Any]],
    sources: list[str],
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    runtime: TrainRuntime | None = None,
) -> dict[str, Any]:
    """Train an autoencoder, or resume its training; write `out`, and return the metrics in its report.json.

    Raises:
        RunError: `out` holds a model already, cannot be resumed with this config, or the loss is not finite.
        SourceError: there are no training samples.
    """
    runtime, folder = runtime or TrainRuntime(), out / TRAINING
    device = resolve_device(runtime.device)
    if resume:
        config = resumed_config(loop_class, out, {name: getattr(config, name) for name in names_of(type(config))})
        shards = json.loads((folder / SHARDS).read_text())["shards"]
    else:
        check_is_new(out)
        config = replace(config, dtype=default_dtype(device) if config.dtype == "auto" else config.dtype)
        shards = list_shards(sources, ReadOptions(storage=runtime.storage))
    with open_accelerator(runtime.device, config.dtype, folder, searches=False) as accelerator:
        if accelerator.num_processes > 1:
            raise OptionError("fit-autoencoder trains in one process: start it without `accelerate launch`")
        loop = loop_class(accelerator, shards, config, out, runtime)
        if resume:
            _continue_run(loop, runtime)
        else:
            _create_run(loop, sources, shards, runtime)
        with loop.open_log() as log:
            if not loop.is_trained:
                loop.train(log, loop.preview)
            report = _finish(loop, log, out)
    write_whole(out / REPORT, report)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of no use to a run that has ended
    return report


def check_is_new(out: Path) -> None:
    """Raise RunError if a folder holds an autoencoder, or the training of one, already."""
    if (out / TRAINING / SETTINGS).exists() and not (out / REPORT).exists():
        raise RunError(f"{out} holds an autoencoder in training: add --resume to go on with it, or use another --out")
    if (out / MODEL_CONFIG).exists() or (out / REPORT).exists():
        raise RunError(f"{out} holds a model already: use another --out")


def read_settings(out: Path) -> dict[str, Any]:
    """Return what a run began with; raise RunError if the folder is not a run of this version."""
    path = out / TRAINING / SETTINGS
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{out} is not an autoencoder in training ({path.name} cannot be read): train one with `trainer "
            f"fit-autoencoder image|text SOURCE --out {out}`"
        ) from error
    if settings.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {settings.get('format')!r} instead of {FORMAT!r}, from another version: train a new one"
        )
    return settings


def resumed_config(loop_class: type[AutoencoderLoop[Any]], out: Path, typed: Mapping[str, Any]) -> Any:
    """Return the config of a run. Raises RunError if `typed`, options by field, contradict it, or if it has ended."""
    settings = read_settings(out)
    if (out / REPORT).exists():
        raise RunError(f"{out} is already trained for {settings['fit']['steps']:,} steps: use another --out")
    for name, value in {"kind": loop_class.kind, **typed}.items():
        before = settings["kind"] if name == "kind" else settings["fit"][name]
        if value != before and not (name == "dtype" and value == "auto"):
            option = name if name == "kind" else option_of(name)
            raise RunError(
                f"{out} is trained with {option} {before}, not {value}: leave the option out to resume it, or use "
                "another --out"
            )
    return loop_class.config_class(**settings["fit"])


def names_of(config_class: type) -> list[str]:
    """Return the fields of a config."""
    return [each.name for each in fields(config_class)]


def _create_run(loop: AutoencoderLoop[Any], sources: list[str], shards: list[str], runtime: TrainRuntime) -> None:
    """Create the folder of a new run, which is one once it has settings, and remove what no run has left."""
    loop.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(loop.out / "checkpoints", ignore_errors=True)
    write_whole(loop.out / SHARDS, {"sources": sources, "shards": shards})
    _write_settings(loop, runtime)


def _continue_run(loop: AutoencoderLoop[Any], runtime: TrainRuntime) -> None:
    """Restore a run's last checkpoint."""
    loop.resume()
    if not checkpoints(loop.out):
        print_status(f"{loop.out.parent} has no checkpoint yet: training it from the beginning")
    _write_settings(loop, runtime)


def _write_settings(loop: AutoencoderLoop[Any], runtime: TrainRuntime) -> None:
    kept = {name: getattr(runtime, name) for name in names_of(TrainRuntime) if name != "storage"}
    settings = {"format": FORMAT, "kind": loop.kind, "fit": asdict(loop.config), "runtime": kept}
    write_whole(loop.out / SETTINGS, settings)


def _finish(loop: AutoencoderLoop[Any], log: RunLog, out: Path) -> dict[str, Any]:
    """Measure the averaged model, write it and the page, and return the report."""
    _export(loop, out)
    measured = loop.measure(MEASURED)
    log.log_now(**measured)
    metrics = dict.fromkeys(loop.metrics) | measured | loop.describe()
    with loop.conveniences.attempt(PAGE):
        rows = table((name.replace("_", " "), value) for name, value in metrics.items())
        write_whole(loop.out / PAGE, page(f"{loop.kind} autoencoder", rows + loop.show(log)))
    return metrics | loop.result()


def _export(loop: AutoencoderLoop[Any], out: Path) -> None:
    """Move a whole copy of the model into its folder, config.json last."""
    temporary = loop.out / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    loop.save(temporary)
    flush(temporary)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == MODEL_CONFIG):
        path.replace(out / path.name)
    temporary.rmdir()
    flush_entry(out)
