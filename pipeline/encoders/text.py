"""Text models of transformers as text encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32

from index.table.schema import EncoderRef
from pipeline.encoders.devices import encoding, prepare
from pipeline.encoders.files import check_weights, digest_of, loading, locate
from pipeline.encoders.tokenizers import UNLIMITED, max_length, prepare_tokenizer, tokenizer_digest_of, tokenizer_folder

if TYPE_CHECKING:
    import torch

TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
"""Classes by `model_type` of config.json, for models of which only the text encoder is used; all others: AutoModel."""
UNUSED_WEIGHTS = (
    *("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias"),
    *("decoder.", "lm_head.", "cls.", "pooler.", "final_logits_bias"),
    *("embeddings.position_ids", "text_model.embeddings.position_ids"),
)
"""Prefixes of weights that a checkpoint holds and its text encoder does not use: other towers, decoders, heads."""
POOLING_MODELS = ("CLIP", "Siglip")
"""Prefixes of classes whose own pooled output is the text embedding; all others: the mean over tokens."""
PADDED_MODELS = ("Siglip",)
"""Prefixes of classes that were trained on captions padded to the maximum length, without an attention mask."""
TRIAL_TOKENS = 1024
"""Longer captions are not tried before a run."""


class TransformersTextEncoder:
    """A CLIP or SigLIP text model, pooled by itself, or another text encoder, pooled by the mean over tokens.

    Of a model with encoder and decoder, such as BART, the encoder is used.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None) -> None:
        """Load a folder or hub id that holds a text model and its tokenizer, to compute in `dtype`.

        Raises EncoderError if it cannot be loaded or its weights do not match its config.
        """
        self.model, self.tokenizer, self.ref = load_text_model(name, revision)
        self._saved_dtype, self.device = self.model.dtype, device
        self._encoder = (
            self.model.get_encoder() if getattr(self.model.config, "is_encoder_decoder", False) else self.model
        )
        prepare(self._encoder, device, dtype)
        self.max_length = max_length(self.model, self.tokenizer)

    def text_dim(self) -> int:
        """Return the dimensions of a text embedding; raises EncoderError if the model cannot encode."""
        with encoding(self.ref):
            named = self.tokenizer.model_max_length < UNLIMITED
            # A limit that no tokenizer names is tried here, and not by the first long caption of a run.
            return int(self.encode(["a", "a" + " a" * (0 if named else min(self.max_length, TRIAL_TOKENS))]).shape[1])

    def encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B T"]:
        """Return pooled embeddings, not normalized; a caption that repeats is encoded once."""
        return self.encode_tokens(captions, num_tokens=0)[:, 0]

    def encode_counted(self, captions: Sequence[str]) -> tuple[Float32[np.ndarray, "B T"], Bool[np.ndarray, "B"]]:
        """Return pooled embeddings, and which captions were truncated to `max_length` tokens."""
        embeddings, inputs = self._encode(captions, 0)
        full = {caption for caption, length in inputs.items() if length >= self.max_length}
        return embeddings[:, 0], np.array([caption in full and self._exceeds(caption) for caption in captions], bool)

    def encode_tokens(self, captions: Sequence[str], *, num_tokens: int) -> Float32[np.ndarray, "B 1+{num_tokens} T"]:
        """Return the pooled embedding and then the first `num_tokens` token embeddings, padded with zeros."""
        return self._encode(captions, num_tokens)[0]

    def _encode(
        self, captions: Sequence[str], num_tokens: int
    ) -> tuple[Float32[np.ndarray, "B 1+{num_tokens} T"], dict[str, int]]:
        """Return embeddings, and the number of tokens of each distinct caption after truncation."""
        import torch
        from torch.nn.functional import pad

        unique = list(dict.fromkeys(captions))
        ids, mask = self._tokenize(unique)
        with torch.inference_mode():
            masked = {} if self._is_one_of(PADDED_MODELS) else {"attention_mask": mask}
            outputs = self._encoder(input_ids=ids, **masked)
            states = outputs.last_hidden_state
            pooled = outputs.pooler_output if self._is_one_of(POOLING_MODELS) else mean_pool(states, mask)
            tokens = (states * mask[..., None])[:, :num_tokens]
            embeddings = torch.cat([pooled[:, None], pad(tokens, (0, 0, 0, num_tokens - tokens.shape[1]))], 1)
        position = {caption: i for i, caption in enumerate(unique)}
        lengths = dict(zip(unique, mask.sum(1).tolist(), strict=True))
        return np.asarray(embeddings.float().cpu())[[position[caption] for caption in captions]], lengths

    def _tokenize(self, captions: list[str]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return token ids and mask, on the device."""
        inputs = self.tokenizer(
            captions,
            padding="max_length" if self._is_one_of(PADDED_MODELS) else True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        return inputs["input_ids"], inputs["attention_mask"]

    def _exceeds(self, caption: str) -> bool:
        return len(self.tokenizer([caption], verbose=False)["input_ids"][0]) > self.max_length

    def _is_one_of(self, prefixes: tuple[str, ...]) -> bool:
        return self.ref.class_name.startswith(prefixes)

    def save(self, folder: Path) -> None:
        """Write a transformers folder with the tokenizer in it, in the data type of the weights as they were read."""
        dtype = self._encoder.dtype
        self.model.to(self._saved_dtype).save_pretrained(folder)
        self._encoder.to(dtype)
        self.tokenizer.save_pretrained(folder)


def load_text_model(name: str, revision: str | None) -> tuple[Any, Any, EncoderRef]:
    """Load a transformers text model and its tokenizer; raises EncoderError as `load_autoencoder` does."""
    import transformers

    with loading(name, "a text encoder"):
        place = locate(name, revision, "text")
        config = transformers.AutoConfig.from_pretrained(place.folder)
        model, info = getattr(transformers, TEXT_MODELS.get(config.model_type, "AutoModel")).from_pretrained(
            place.folder, variant=place.variant, use_safetensors=True, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder(place.folder))
    check_weights(name, info, exclude=UNUSED_WEIGHTS)
    prepare_tokenizer(name, tokenizer)
    ref = EncoderRef(
        name=place.name,
        class_name=type(model).__name__,
        digest=digest_of(model, exclude=UNUSED_WEIGHTS),
        tokenizer_digest=tokenizer_digest_of(tokenizer),
        revision=place.revision,
    )
    return model, tokenizer, ref


def mean_pool(states: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the mean (B, T) of the token states (B, tokens, T) at which the mask (B, tokens) is 1."""
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
