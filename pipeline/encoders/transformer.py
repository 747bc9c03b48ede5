"""One text model of transformers with its tokenizer, run on a batch of captions."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from index.errors import EncoderError
from index.table.schema import EncoderRef
from pipeline.encoders.families import HEADS, choose_pooling, find_family, pool
from pipeline.encoders.files import Place, check_weights, digest_of
from pipeline.encoders.tokenizers import load_tokenizer, max_length, tokenizer_digest_of

if TYPE_CHECKING:
    import torch


class Encoded(NamedTuple):
    """What a text model makes of a batch of captions."""

    pooled: "torch.Tensor"
    """(B, T)."""
    tokens: "torch.Tensor | None"
    """(B, tokens, D), each caption's own first, then zeros; None if the model gives none."""
    lengths: list[int]
    """Tokens of each caption, after truncation."""


class TransformerModel:
    """A model of one of `FAMILIES`; of one with encoder and decoder, such as BART, the encoder."""

    def __init__(self, place: Place, pooling: str | None, device: str, dtype: str) -> None:
        """Load it to compute in `dtype`; raises EncoderError as `TransformersTextEncoder` does."""
        import transformers

        config = read_json(place.folder / "config.json", place.name)
        self._family = find_family(place.name, config.get("model_type"))
        pooling = choose_pooling(place.name, pooling, self._family.classes)
        self.model, info = getattr(transformers, self._family.classes[pooling]).from_pretrained(
            place.folder, use_safetensors=True, output_loading_info=True, variant=place.variant
        )
        unused = tuple(each for each in (*self._family.unused, *HEADS) if not self._reads(each))
        check_weights(place.name, info, exclude=unused)
        self.tokenizer: Any = load_tokenizer(place, self.model.get_input_embeddings().num_embeddings)
        if not self._family.padded:  # else the side of padding is part of how the model was trained
            self.tokenizer.padding_side = "right"
        self.ref = EncoderRef(
            name=place.name,
            class_name=type(self.model).__name__,
            digest=digest_of(self.model, exclude=unused),
            tokenizer_digest=tokenizer_digest_of(self.tokenizer),
            revision=place.revision,
            pooling=pooling,
        )
        self._stored = dtypes_of(self.model)
        two_parts = getattr(self.model.config, "is_encoder_decoder", False)
        self._encoder = self.model.get_encoder() if two_parts else self.model
        compute_in(self._encoder, device, dtype)
        self.prompts, self.default_prompt = dict[str, str](), ""
        # Of those that were trained on padded captions the trained length, whatever the tokenizer names.
        padded_length = self.model.config.max_position_embeddings if self._family.padded else None
        self.max_length: int = padded_length or max_length(self.model, self.tokenizer)

    def _reads(self, prefix: str) -> bool:
        """Return whether a projection that other poolings leave out belongs to the class that was loaded."""
        return prefix == "text_projection." and hasattr(self.model, "text_projection")

    def encode(self, captions: list[str], prompt: str) -> Encoded:
        """Run the model on captions, each after the prompt."""
        import torch

        inputs = self.tokenizer(
            [prompt + caption for caption in captions],
            padding="max_length" if self._family.padded else True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._encoder.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode():
            outputs = self._encoder(input_ids=ids, **({} if self._family.padded else {"attention_mask": mask}))
            pooled = pool(self.ref.pooling, outputs, mask)
            own = own_tokens(outputs.last_hidden_state, mask)
            return Encoded(pooled, own, mask.sum(1).tolist())

    def save(self, folder: Path) -> None:
        """Write a transformers folder with the tokenizer in it, in the data types of the weights as they were read."""
        with in_dtypes(self.model, self._stored):
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def own_tokens(states: Iterable["torch.Tensor"], masks: Iterable["torch.Tensor"]) -> "torch.Tensor":
    """Return the token states (B, tokens, D) at which masks are 1, first, whatever the side of padding; then zeros."""
    from torch.nn.utils.rnn import pad_sequence

    own = [each[mask.bool()] for each, mask in zip(states, masks, strict=True)]
    return pad_sequence(own, batch_first=True)


def compute_in(model: "torch.nn.Module", device: str, dtype: str) -> None:
    """Move a model to a device for inference, and its weights to a data type, as `from_pretrained(dtype=...)` does.

    Buffers stay in float32: rotary angles of half precision are wrong by more than a tenth after some 50 tokens.
    """
    import torch

    kept = getattr(model, "_keep_in_fp32_modules", None) or () if dtype == "float16" else ()
    model.to(device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            is_kept = any(part in kept for part in name.split("."))
            weight.data = weight.data.to(torch.float32 if is_kept else getattr(torch, dtype))


def dtypes_of(model: "torch.nn.Module") -> dict[str, "torch.dtype"]:
    """Return the data type of each weight."""
    return {name: weight.dtype for name, weight in model.named_parameters()}


@contextlib.contextmanager
def in_dtypes(model: "torch.nn.Module", dtypes: dict[str, "torch.dtype"]) -> Iterator[None]:
    """Hold the weights of a model in other data types for a while."""
    before = dtypes_of(model)
    _convert(model, dtypes)
    try:
        yield
    finally:
        _convert(model, before)


def _convert(model: "torch.nn.Module", dtypes: dict[str, "torch.dtype"]) -> None:
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])


def read_json(path: Path, name: str) -> Any:
    """Return a JSON file of a model; raises EncoderError if it is not there or holds no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EncoderError(f"{name} has no readable {path.name}: name the folder that save_pretrained wrote") from error
