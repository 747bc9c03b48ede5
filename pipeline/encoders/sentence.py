"""One model of sentence-transformers, run on a batch of captions by that library."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.errors import EncoderError
from index.table.schema import EncoderRef
from pipeline.encoders.families import SENTENCE_TRANSFORMERS
from pipeline.encoders.files import Place, check_weights, digest_of
from pipeline.encoders.tokenizers import UNLIMITED, check_tokenizer, find_tokenizer, tokenizer_digest_of
from pipeline.encoders.transformer import Encoded, compute_in, dtypes_of, in_dtypes, own_tokens, read_json

if TYPE_CHECKING:
    import torch


def is_sentence_transformer(folder: Path) -> bool:
    """Return whether a folder is of sentence-transformers."""
    return (folder / "modules.json").is_file()


class SentenceModel:
    """A folder with modules.json: its own pooling, dense layers, normalization, maximum length and default prompt."""

    def __init__(self, place: Place, device: str, dtype: str) -> None:
        """Load it to compute in `dtype`; raises EncoderError as `TransformersTextEncoder` does."""
        from sentence_transformers import SentenceTransformer

        parts = [part["path"] for part in read_json(place.folder / "modules.json", place.name)]
        _check_formats(place, parts)
        find_tokenizer(place, place.folder / parts[0])
        self.model = SentenceTransformer(
            str(place.folder), device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        transformer = getattr(self.model[0], "auto_model", None)
        self.tokenizer: Any = getattr(self.model[0], "tokenizer", None)
        if transformer is None or not hasattr(self.tokenizer, "get_vocab"):
            kind = type(self.model[0]).__name__
            raise EncoderError(
                f"the first module of {place.name} is {kind}: use a model that begins with a Transformer"
            )
        _check_loaded(place, place.folder / parts[0], transformer)
        check_tokenizer(place.name, self.tokenizer, transformer.get_input_embeddings().num_embeddings)
        self.ref = EncoderRef(
            name=place.name,
            class_name="SentenceTransformer",
            digest=_digest(self.model),
            tokenizer_digest=tokenizer_digest_of(self.tokenizer),
            revision=place.revision,
            pooling=SENTENCE_TRANSFORMERS,
        )
        self._stored = dtypes_of(self.model)
        compute_in(self.model, device, dtype)
        self.max_length = int(min(self.model.max_seq_length or UNLIMITED, UNLIMITED))
        self.prompts: dict[str, str] = {name: text for name, text in self.model.prompts.items() if text}
        self.default_prompt = self.prompts.get(self.model.default_prompt_name or "", "")

    def encode(self, captions: list[str], prompt: str) -> Encoded:
        """Run the model on captions, each after the prompt."""
        import torch

        outputs = self.model.encode(
            captions, prompt=prompt, batch_size=len(captions), output_value=None, show_progress_bar=False
        )
        pooled = torch.stack([output["sentence_embedding"] for output in outputs])
        masks = [output["attention_mask"] for output in outputs]
        lengths = [int(mask.sum()) for mask in masks]
        if any(output.get("token_embeddings") is None for output in outputs):
            return Encoded(pooled, None, lengths)
        return Encoded(pooled, own_tokens([output["token_embeddings"] for output in outputs], masks), lengths)

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers folder, in the data types of the weights as they were read."""
        with in_dtypes(self.model, self._stored):
            self.model.save_pretrained(str(folder), create_model_card=False)


def _check_formats(place: Place, parts: list[str]) -> None:
    """Raise EncoderError if the weights of a module are there in another format than safetensors alone."""
    for part in parts:
        folder = place.folder / part
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise EncoderError(
                f"{folder} holds weights as .bin only, and only safetensors are read: save the model again with "
                "SentenceTransformer(...).save_pretrained(FOLDER)"
            )


def _check_loaded(place: Place, folder: Path, transformer: Any) -> None:
    """Raise EncoderError if the library filled weights of the transformer at random, which it does with a warning."""
    _, info = type(transformer).from_pretrained(
        folder, config=transformer.config, use_safetensors=True, output_loading_info=True, device_map="meta"
    )
    # Heads and decoders that the library leaves out are unexpected, and are none of its business.
    check_weights(place.name, {**info, "unexpected_keys": ()}, exclude=("pooler.",))


def _digest(model: "torch.nn.Module") -> str:
    """Return the SHA-256, in hex, of all weights, and of what the modules after the transformer do."""
    modules = [
        [
            type(module).__name__,
            str(getattr(module, "pooling_mode", "")),
            bool(getattr(module, "include_prompt", True)),
            type(getattr(module, "activation_function", None)).__name__,
        ]
        for module in model.children()
    ]
    # The pooler of BERT is drawn at random where a checkpoint has none, and nobody reads it.
    content = [digest_of(model, exclude=("0.auto_model.pooler.", "0.model.pooler.")), modules]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
