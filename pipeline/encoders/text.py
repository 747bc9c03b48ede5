"""Text encoders: captions to text embeddings and token embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from index.errors import EncoderError
from pipeline.encoders.devices import encoding
from pipeline.encoders.families import SENTENCE_TRANSFORMERS
from pipeline.encoders.files import loading, locate
from pipeline.encoders.sentence import SentenceModel, is_sentence_transformer
from pipeline.encoders.tokenizers import UNLIMITED, telling_pairs
from pipeline.encoders.transformer import Encoded, TransformerModel

TRIAL_TOKENS = 1024
"""Longer captions are not tried before a run."""


class TransformersTextEncoder:
    """A text model of transformers or sentence-transformers; `ref` says how its vectors are pooled."""

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        revision: str | None = None,
        pooling: str | None = None,
        prompt: str | None = None,
    ) -> None:
        """Load a folder or hub id that holds a text model and its tokenizer, to compute in `dtype`.

        Args:
            name: folder or hub id.
            device: torch device.
            dtype: of the computation.
            revision: commit of a hub id.
            pooling: one of `POOLINGS`; None or empty: the model's own.
            prompt: text that is put before each caption; None: the model's own default, which most lack.

        Raises:
            EncoderError: it cannot be loaded, is of no family that is known, its weights do not match its config, or it
                has no tokenizer of its own.
        """
        with loading(name, "a text encoder"):
            place = locate(name, revision, "text")
            own = is_sentence_transformer(place.folder) and (pooling or SENTENCE_TRANSFORMERS) == SENTENCE_TRANSFORMERS
            self._model: SentenceModel | TransformerModel = (
                SentenceModel(place, device, dtype) if own else TransformerModel(place, pooling or None, device, dtype)
            )
        if prompt in self._model.prompts:
            text = self._model.prompts[prompt]
            raise EncoderError(f"--text-prompt {prompt} is the name of a prompt of {name}: type its text, {text!r}")
        self.ref = replace(self._model.ref, prompt=self._model.default_prompt if prompt is None else prompt)
        self.model, self.tokenizer, self.max_length = self._model.model, self._model.tokenizer, self._model.max_length

    def text_dim(self) -> int:
        """Return the dimensions of a text embedding.

        Raises EncoderError if the model cannot encode, or gives captions that differ the same vector.
        """
        with encoding(self.ref):
            named = self.tokenizer.model_max_length < UNLIMITED
            # A limit that no tokenizer names is tried here, and not by the first long caption of a run.
            dim = self.encode(["a", "a" + " a" * (0 if named else min(self.max_length, TRIAL_TOKENS))]).shape[1]
            pairs = telling_pairs(self.tokenizer)
            vectors = self.encode([caption for pair in pairs for caption in pair])
        if np.abs(vectors[::2] - vectors[1::2]).max() <= np.finfo(np.float16).eps * np.abs(vectors).max():
            raise EncoderError(
                f"{self.ref.class_name} {self.ref.name} gives {pairs[0][0]!r} and {pairs[0][1]!r} the same vector, and "
                "so other captions that differ: its tokenizer is not the model's own; copy that into its folder"
            )
        return int(dim)

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Return text embeddings as the model pools them; a caption that repeats is encoded once."""
        return self.encode_tokens(captions, num_tokens=0)[:, 0]

    def encode_counted(self, captions: Sequence[str]) -> tuple[Float32[np.ndarray, "B T"], Bool[np.ndarray, "B"]]:
        """Return text embeddings, and which captions were truncated to `max_length` tokens."""
        embeddings, inputs = self._encode(captions, 0)
        full = {caption for caption, length in inputs.items() if length >= self.max_length}
        return embeddings[:, 0], np.array([caption in full and self._exceeds(caption) for caption in captions], bool)

    def encode_tokens(self, captions: Sequence[str], *, num_tokens: int) -> Float32[np.ndarray, "B 1+{num_tokens} T"]:
        """Return the text embedding and then the first `num_tokens` token embeddings, padded with zeros.

        A prompt's tokens come before the caption's. Raises EncoderError if the model's token embeddings have other
        dimensions than its text embedding.
        """
        return self._encode(captions, num_tokens)[0]

    def _encode(
        self, captions: Sequence[str], num_tokens: int
    ) -> tuple[Float32[np.ndarray, "B 1+{num_tokens} T"], dict[str, int]]:
        """Return embeddings, and the number of tokens of each distinct caption after truncation."""
        unique = list(dict.fromkeys(captions))
        encoded = self._model.encode(unique, self.ref.prompt)
        vectors = np.asarray(encoded.pooled.float().cpu())
        embeddings = np.zeros((len(unique), 1 + num_tokens, vectors.shape[1]), np.float32)
        embeddings[:, 0] = vectors
        if num_tokens:
            tokens = self._tokens(encoded, vectors.shape[1])[:, :num_tokens]
            embeddings[:, 1 : 1 + tokens.shape[1]] = tokens
        position = {caption: i for i, caption in enumerate(unique)}
        return embeddings[[position[caption] for caption in captions]], dict(zip(unique, encoded.lengths, strict=True))

    def _tokens(self, encoded: Encoded, text_dim: int) -> Float32[np.ndarray, "B tokens T"]:
        if encoded.tokens is None or encoded.tokens.shape[2] != text_dim:
            dim = "no" if encoded.tokens is None else encoded.tokens.shape[2]
            raise EncoderError(
                f"{self.ref.name} gives text embeddings of {text_dim} dimensions, and token embeddings of {dim}: a "
                "network reads both only where they are equal; train one with --num-tokens 0"
            )
        return np.asarray(encoded.tokens.float().cpu())

    def _exceeds(self, caption: str) -> bool:
        return len(self.tokenizer([self.ref.prompt + caption], verbose=False)["input_ids"][0]) > self.max_length

    def save(self, folder: Path) -> None:
        """Write a folder of the same library with the tokenizer, in the data types of the weights as they were read."""
        self._model.save(folder)
