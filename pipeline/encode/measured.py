"""The encoders of a run: load them once per process, and measure them once per content.

What a run must know of its encoders before it encodes, digests of weights and shapes of what they give, is kept with
the plan of the run and the report of the table, under a key of the files' bytes. A command that finds its own key there
loads no weights.
"""

import gc
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from index.table.codec import from_json_dict, to_json_dict
from index.table.schema import EncoderRef
from pipeline.config import EncodeConfig
from pipeline.encoders.files import Place, content_digest, find_encoder
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder

Encoders = tuple[DiffusersAutoencoder, TransformersTextEncoder]
PACKAGES = ("diffusers", "sentence-transformers", "transformers")
"""Other versions of them may read the same files in another way."""
_loading = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredEncoders:
    """What is known of both encoders once they were loaded."""

    key: str
    """Of the files' bytes and of the options that change what is made of them."""
    image_ref: EncoderRef
    text_ref: EncoderRef
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    text_dim: int
    max_tokens: int
    """That the text encoder reads of a caption."""


def measure(config: EncodeConfig, device: str, dtype: str, known: Iterable[Any]) -> MeasuredEncoders:
    """Return what is among `known`, JSON objects of earlier measurements, or load the encoders and measure it.

    Raises EncoderError or OptionError if an encoder is not there, or does not fit the options.
    """
    image, text = find_encoder(config.image_encoder, "image"), find_encoder(config.text_encoder, "text")
    key = _key(image, text, config)
    for content in known:
        if isinstance(content, dict) and content.get("key") == key:
            measured = from_json_dict(MeasuredEncoders, content)
            return replace(
                measured,
                image_ref=replace(measured.image_ref, name=image.name, revision=image.revision),
                text_ref=replace(measured.text_ref, name=text.name, revision=text.revision),
            )
    image_encoder, text_encoder = cached_encoders(
        (image.name, image.revision), (text.name, text.revision), config, device, dtype
    )
    return MeasuredEncoders(
        key=key,
        image_ref=image_encoder.ref,
        text_ref=text_encoder.ref,
        latent_shape=image_encoder.latent_shape(config.image_size),
        text_dim=text_encoder.text_dim(),
        max_tokens=text_encoder.max_length,
    )


def to_json(measured: MeasuredEncoders) -> dict[str, Any]:
    """Return a measurement as it is kept."""
    return to_json_dict(measured)


def cached_encoders(
    image: tuple[str, str | None], text: tuple[str, str | None], config: EncodeConfig, device: str, dtype: str
) -> Encoders:
    """Return encoders by (name, revision), loaded once per process for any number of threads."""
    with _loading:
        return _load_encoders(image, text, device, dtype, config.text_pooling, config.text_prompt)


def free_encoders() -> None:
    """Free the models of this process, which the work of other processes does not need."""
    _load_encoders.cache_clear()
    gc.collect()


@lru_cache(maxsize=1)
def _load_encoders(
    image: tuple[str, str | None],
    text: tuple[str, str | None],
    device: str,
    dtype: str,
    pooling: str | None,
    prompt: str | None,
) -> Encoders:
    return (
        DiffusersAutoencoder(image[0], device, dtype, revision=image[1]),
        TransformersTextEncoder(text[0], device, dtype, revision=text[1], pooling=pooling, prompt=prompt),
    )


def _key(image: Place, text: Place, config: EncodeConfig) -> str:
    options = [config.image_size, config.text_pooling, config.text_prompt]
    versions = [importlib.metadata.version(name) for name in PACKAGES]
    content = [content_digest(image), content_digest(text), options, versions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
