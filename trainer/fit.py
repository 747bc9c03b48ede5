"""Train a network on a table's targets: `fit(table, FitConfig(), Path("RUN"))`.

The run folder holds the network and, in config.json, the objective, the version and geometry of the table, and where
its encoders are, with their digests. A run that is killed at any moment resumes to the same weights and is finished, on
the version of the table that it began with.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from index.errors import RunError
from index.table.readers import needed_by
from index.table.schema import TableMeta
from index.table.table import READ_COLUMNS, Table
from index.terminal import print_status
from pipeline.encoders.devices import default_dtype, resolve_device
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.stored import open_image_encoder, open_text_encoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.checkpoints import checkpoints
from trainer.config import AUTO, FitConfig, RuntimeConfig
from trainer.process import open_accelerator
from trainer.resume import check_resumed, open_run_table, settings_of
from trainer.run_folder import (
    ENCODER_FOLDERS,
    RESULT,
    SAMPLES,
    EncoderPlaces,
    check_is_new,
    create_run_folder,
    discard_results,
    read_config,
    save_network,
    write_config,
    write_whole,
)
from trainer.targets import is_searching
from trainer.tracking import Preview, RunLog
from trainer.training_loop import Trainer


def fit(
    table: Table, config: FitConfig, out: Path, *, resume: bool = False, runtime: RuntimeConfig | None = None
) -> dict[str, Any]:
    """Train a network, or resume its training, write RUN, and return the metrics in RUN/result.json.

    Under `accelerate launch` or `torchrun` the processes divide the slots of each batch.

    Raises:
        RunError: `out` is a training run already, cannot be resumed with these settings, or the loss is not finite.
        EncoderError: an encoder is not the one that the table was encoded with.
    """
    runtime = runtime or RuntimeConfig()
    if config.init is not None:
        config = replace(config, init=str(Path(config.init).absolute()))
    if resume:
        table = open_run_table(out, table.uri, table.storage, indexed=is_searching(config, runtime))
        config = check_resumed(out, config)
    else:
        check_is_new(out)
    table.hold_remote(READ_COLUMNS)
    if config.dtype == AUTO:
        config = replace(config, dtype=default_dtype(resolve_device(runtime.device)))
    with open_accelerator(runtime.device, config.dtype, out) as accelerator:
        main = accelerator.is_main_process
        trainer = Trainer(accelerator, table, config, out, runtime)
        if resume:
            _continue_run(trainer)
        else:
            _create_run(trainer)
        accelerator.wait_for_everyone()
        with needed_by(table, out) if main else nullcontext():
            _train(trainer)
        # From here on the run is complete, and does not need its version of the table.
        result = trainer.result()
        if main:
            write_whole(out / RESULT, result)
        accelerator.wait_for_everyone()
        return result


def _create_run(trainer: Trainer) -> None:
    """Check everything that a new run needs, the quick before the slow, then create its folder."""
    out, config, table, runtime = trainer.out, trainer.config, trainer.table, trainer.runtime
    main = trainer.accelerator.is_main_process
    if config.init is not None:
        _warn_of_other_encoders(Path(config.init), table.meta)
        trainer.start_from(Path(config.init))
    if main:
        trainer.table = _check_encoders(table, runtime.encoders, ENCODER_FOLDERS)
    trainer.open_stream()
    if not main:
        return
    create_run_folder(out)
    if config.init is not None:
        # The other run may change or go; this one then has its weights.
        trainer.save_checkpoint(0, trainer.record)
    write_config(out, settings_of(trainer.table, trainer.config, runtime))


def _continue_run(trainer: Trainer) -> None:
    """Restore a run's last checkpoint; if its training goes on, remove what an earlier end of it has left."""
    trainer.resume()
    given = [name for name in ENCODER_FOLDERS if getattr(trainer.runtime.encoders, name) is not None]
    trainer.table = _check_encoders(trainer.table, trainer.runtime.encoders, given)
    settings = settings_of(trainer.table, trainer.config, trainer.runtime)
    if trainer.accelerator.is_main_process:
        if not checkpoints(trainer.out):
            print_status(f"{trainer.out} has no checkpoint yet: training it from the beginning")
        write_config(trainer.out, settings)
        if not trainer.is_trained:
            discard_results(trainer.out)
    if not trainer.is_trained:
        trainer.open_stream()


def _train(trainer: Trainer) -> None:
    """Run the steps that are left, then write the network and samples."""
    preview = trainer.open_preview()
    with trainer.open_log() as log:
        if not trainer.is_trained:
            trainer.train(log, lambda log: log.log_image("samples", preview.grid()))
        if trainer.accelerator.is_main_process:
            _export(trainer, log, preview)


def _export(trainer: Trainer, log: RunLog, preview: Preview) -> None:
    save_network(trainer.out, trainer.optimizer.averaged_model)
    with trainer.conveniences.attempt(SAMPLES):
        grid = preview.grid()
        temporary = trainer.out / f"{SAMPLES}.tmp"
        grid.save(temporary, "png")
        temporary.replace(trainer.out / SAMPLES)
        log.log_image("samples", grid)


def _check_encoders(table: Table, places: EncoderPlaces, names: Iterable[str]) -> Table:
    """Return a table with its encoders where they were found.

    Raises EncoderError if one of those named is not there, or is not the same any more.
    """
    openers: dict[str, Callable[..., DiffusersAutoencoder | TransformersTextEncoder]]
    openers = {"image_encoder": open_image_encoder, "text_encoder": open_text_encoder}
    found = {}
    for name in names:
        ref, given = getattr(table.meta, name), getattr(places, name)
        here = openers[name](ref, given).ref
        found[name] = replace(ref, name=here.name, revision=here.revision)
    return table.at(table.version, replace(table.meta, **found))


def _warn_of_other_encoders(run: Path, meta: TableMeta) -> None:
    """Warn if weights to start from were trained on latents or text embeddings of other encoders."""
    try:
        other = TableMeta.from_json(read_config(run)["table"]["meta"])
    except RunError as error:
        raise RunError(f"--init {run} cannot be used: {error}") from error
    for name in ("image_encoder", "text_encoder"):
        if getattr(other, name).digest != getattr(meta, name).digest:
            kind = name.replace("_", " ")
            print_status(f"warning: --init {run} was trained with another {kind}: its weights may be of little use")
