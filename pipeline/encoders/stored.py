"""Open the encoders that made a table again, from where they were or from where they are now, and check them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from index.errors import EncoderError
from index.table.commit import update_meta
from index.table.schema import EncoderRef
from index.table.table import Table
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder


def open_image_encoder(
    ref: EncoderRef, given: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> DiffusersAutoencoder:
    """Open the autoencoder that made a table, from where it was or from the folder or hub id `given`.

    Raises EncoderError if it is not there or is not the same.
    """
    with _naming_option(ref, given, "image"):
        encoder = DiffusersAutoencoder(given or ref.name, device, dtype, revision=None if given else ref.revision)
    check_encoder(ref, encoder.ref, "image")
    return encoder.normalizing_as(ref)


def open_text_encoder(
    ref: EncoderRef, given: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> TransformersTextEncoder:
    """Open the text encoder that made a table, from where it was or from the folder or hub id `given`.

    Raises EncoderError if it is not there or is not the same.
    """
    with _naming_option(ref, given, "text"):
        encoder = TransformersTextEncoder(
            given or ref.name,
            device,
            dtype,
            revision=None if given else ref.revision,
            pooling=ref.pooling,
            prompt=ref.prompt,
        )
    check_encoder(ref, encoder.ref, "text")
    return encoder


def open_decoder(ref: EncoderRef) -> Callable[[Float32[np.ndarray, "B C h w"]], UInt8[np.ndarray, "B H W 3"]] | None:
    """Return the decoder of the autoencoder that made a table; None if it cannot be opened or its weights changed."""
    try:
        return open_image_encoder(ref).decode
    except EncoderError:
        return None


def check_encoder(expected: EncoderRef, actual: EncoderRef, role: str) -> None:
    """Raise EncoderError if an encoder, or its tokenizer, is not the one that a table was encoded with."""
    pairs = {"weights": (expected.digest, actual.digest)}
    if expected.tokenizer_digest is not None:  # tables of version 1 have none
        pairs["tokenizer"] = (expected.tokenizer_digest, actual.tokenizer_digest or "none")
    for part, (before, now) in pairs.items():
        if before != now:
            raise EncoderError(
                f"the {part} of {actual.name} are not those that the table is encoded with ({now[:12]} instead of "
                f"{before[:12]}): name the original by --{role}-encoder, or encode a table of its own with this one"
            )


def is_missing(ref: EncoderRef) -> bool:
    """Return whether an encoder was a folder and is not there any more; hub ids are not looked up."""
    return Path(ref.name).is_absolute() and not Path(ref.name).is_dir()


def describe_encoders(table: Table) -> dict[str, str]:
    """Return class, place and commit of a table's encoders, and whether they are there."""
    refs = {"image_encoder": table.meta.image_encoder, "text_encoder": table.meta.text_encoder}
    return {name: _describe(ref, name) for name, ref in refs.items()}


def _describe(ref: EncoderRef, name: str) -> str:
    place = ref.name if ref.revision is None else f"{ref.name}@{ref.revision}"
    gone = f" (is not there: name its new place by --{name.replace('_', '-')})" if is_missing(ref) else ""
    return f"{ref.class_name} {place}{gone}"


def point_encoders(table: Table, image_encoder: str | None, text_encoder: str | None) -> Table:
    """Store where a table's encoders are now, and return its new version; None leaves one where it is.

    Raises EncoderError if they are not there or are not those that made the table.
    """
    changes: dict[str, Any] = {}
    if image_encoder is not None:
        changes["image_encoder"] = _moved(table.meta.image_encoder, open_image_encoder, image_encoder)
    if text_encoder is not None:
        changes["text_encoder"] = _moved(table.meta.text_encoder, open_text_encoder, text_encoder)
    return update_meta(table, replace(table.meta, **changes)) if changes else table


def _moved(ref: EncoderRef, open_encoder: Callable[[EncoderRef, str], Any], given: str) -> EncoderRef:
    now: EncoderRef = open_encoder(ref, given).ref
    return replace(ref, name=now.name, revision=now.revision)


@contextlib.contextmanager
def _naming_option(ref: EncoderRef, given: str | None, role: str) -> Iterator[None]:
    """Name the option that re-points an encoder in the error of one that is not where the table says."""
    try:
        yield
    except EncoderError as error:
        option = f"--{role}-encoder"
        if given is None and is_missing(ref):
            raise EncoderError(
                f"the {role} encoder of the table cannot be opened at {ref.name} ({str(error).partition(': ')[0]}): "
                f"if it was moved, name its folder or hub id by {option}"
            ) from error
        if given is None:
            raise EncoderError(
                f"the {role} encoder of the table cannot be opened: {error}; a copy elsewhere can be named by {option}"
            ) from error
        raise
