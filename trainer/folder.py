"""A run folder as it is begun: config.json, and copies of the encoders that are folders themselves."""

import shutil
from pathlib import Path
from typing import Any

from index.errors import EncoderError, RunError
from index.table.schema import EncoderRef, TableMeta
from index.table.storage import write_json
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder
from trainer.run_folder import read_config


def begin_folder(out: Path, meta: TableMeta, settings: dict[str, Any]) -> None:
    """Start a run folder: the encoders first, then the config that makes it one."""
    if (out / "config.json").exists():
        raise RunError(f"{out} holds a run already: add --resume to go on with it, or name another --out")
    opened: dict[str, DiffusersAutoencoder | TransformersTextEncoder] = {
        "image_encoder": DiffusersAutoencoder(meta.image_encoder.name),
        "text_encoder": TransformersTextEncoder(meta.text_encoder.name),
    }
    for name, encoder in opened.items():
        check_encoder(getattr(meta, name), encoder.ref)
    out.mkdir(parents=True, exist_ok=True)
    for name, encoder in opened.items():
        shutil.rmtree(out / name, ignore_errors=True)
        if Path(encoder.ref.name).is_dir():  # a hub id can be opened from anywhere
            encoder.save(out / name)
    write_json(out / "config.json", settings)


def check_encoder(wanted: EncoderRef, given: EncoderRef) -> None:
    """Refuse an encoder that is not the one that a table was encoded with."""
    if given.digest != wanted.digest:
        raise EncoderError(
            f"{wanted.name} has other weights than the table was encoded with ({given.digest[:12]} instead of "
            f"{wanted.digest[:12]}): put the old ones back, or encode the table again"
        )


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a run in another way than it began."""
    before = read_config(out)
    for part in ("objective", "table", "fit"):
        for name, value in settings[part].items():
            if before[part].get(name) != value and name != "meta":
                raise RunError(
                    f"{out} was trained with another {name} ({before[part].get(name)} instead of {value}): "
                    "resume with the same options, or name another --out"
                )


def encoder_of(folder: Path, meta: TableMeta, part: str) -> str:
    """Where a run's `image_encoder` or `text_encoder` is: its own copy, or else the hub id that its table names."""
    copied = folder / part
    return str(copied) if copied.is_dir() else str(getattr(meta, part).name)
