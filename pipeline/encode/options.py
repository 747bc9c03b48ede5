"""Compare the options of a run with those of the table that it adds to, or of the run that it resumes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from index.errors import TableError
from index.table.table import Table
from pipeline.encode.job import EncodeJob
from pipeline.encode.present import can_hash_images
from pipeline.encoders.stored import check_encoder

NOT_TYPED = {
    "shards": "shards",
    "image_digest": "weights of --image-encoder",
    "text_digest": "weights of --text-encoder",
    "tokenizer_digest": "tokenizer of --text-encoder",
    "latents": "latents_mean and latents_std of --image-encoder",
}
"""How settings that are no options of their own are called in an error message."""
SHOWN_CHARACTERS = 40
"""Of an option's value in an error message."""


def check_appendable(job: EncodeJob, table: Table) -> None:
    """Raise TableError if rows of this job would differ in kind from those of the table."""
    meta, config = table.meta, job.config
    check_encoder(meta.text_encoder, replace(job.text_ref, digest=meta.text_encoder.digest), "text")
    geometry = meta.geometry
    stored = {
        "image_digest": meta.image_encoder.digest,
        "text_digest": meta.text_encoder.digest,
        "text_pooling": meta.text_encoder.pooling or job.text_ref.pooling,
        "text_prompt": meta.text_encoder.prompt,
        "image_size": meta.image_size,
        "val_fraction": meta.val_fraction,
        "keep_images": "image" in table.dataset().schema.names,
        "desc_scale": geometry.desc_scale,
        "geometry": geometry.name,
    }
    given = {
        "image_digest": job.image_ref.digest,
        "text_digest": job.text_ref.digest,
        "text_pooling": job.text_ref.pooling,
        "text_prompt": job.text_ref.prompt,
        "image_size": config.image_size,
        "val_fraction": config.val_fraction,
        "keep_images": config.keep_images,
        "desc_scale": config.desc_scale or geometry.desc_scale,
        "geometry": config.geometry or geometry.name,
    }
    if changes := changed_options(stored, given):
        raise TableError(
            f"{table.uri} was encoded with other options ({changes}): "
            "append with the same options, or leave out --append and name another --table"
        )
    if config.filters.dedup and not can_hash_images(table):
        raise TableError(
            f"--dedup {config.filters.dedup} cannot compare with the rows of {table.uri}, which an earlier version "
            "wrote without image hashes: append without --dedup, or encode the table again"
        )


def changed_options(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the options that differ with both values, as they are typed, for a message; empty if none does."""
    given = json.loads(json.dumps(given))
    return "; ".join(
        f"{NOT_TYPED.get(name) or '--' + name.replace('_', '-')}: {_shown(stored.get(name))}, now {_shown(value)}"
        for name, value in given.items()
        if stored.get(name) != value
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} from {value[0]} to {value[-1]}" if value else "none"
    return "not set" if value is None else str(value)[:SHOWN_CHARACTERS]
