"""The families of text models that encode captions: which class loads them, and how its token states are pooled."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from index.errors import EncoderError

if TYPE_CHECKING:
    import torch

SENTENCE_TRANSFORMERS = "sentence-transformers"
"""The pooling of a folder with modules.json: whatever its own modules do."""
POOLINGS = ("pooled", "projected", "mean", "cls", "last", SENTENCE_TRANSFORMERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How the models of one `model_type` of config.json are loaded and called."""

    classes: Mapping[str, str]
    """The class of transformers for each pooling; the first is the default."""
    unused: tuple[str, ...] = ()
    """Prefixes of weights that a checkpoint holds and the text encoder does not use: other towers, decoders, heads."""
    padded: bool = False
    """Trained on captions padded to the maximum length, without an attention mask."""


HEADS = ("classifier.", "score.", "qa_outputs.", "pooler.", "embeddings.position_ids")
"""Prefixes of heads that checkpoints of any family may hold, and of a buffer that earlier versions saved."""


def _with_vision(classes: Mapping[str, str], *, padded: bool = False) -> Family:
    unused = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias")
    return Family(classes=classes, unused=(*unused, "text_model.embeddings.position_ids"), padded=padded)


def _encoder(class_name: str, *heads: str) -> Family:
    return Family(classes={"mean": class_name, "cls": class_name}, unused=heads)


def _t5(class_name: str) -> Family:
    return Family(classes={"mean": class_name}, unused=("decoder.", "lm_head."))


def _decoder(class_name: str) -> Family:
    return Family(classes={"mean": class_name, "last": class_name}, unused=("lm_head.",))


_CLIP = _with_vision({"pooled": "CLIPTextModel", "projected": "CLIPTextModelWithProjection"})
_SIGLIP = _with_vision({"pooled": "SiglipTextModel"}, padded=True)
_SIGLIP2 = _with_vision({"pooled": "Siglip2TextModel"}, padded=True)

FAMILIES = {
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_text_model": _SIGLIP2,
    "t5": _t5("T5EncoderModel"),
    "mt5": _t5("MT5EncoderModel"),
    "umt5": _t5("UMT5EncoderModel"),
    "bart": Family(classes={"mean": "BartModel"}, unused=("decoder.", "lm_head.", "final_logits_bias")),
    "albert": _encoder("AlbertModel", "predictions.", "sop_classifier."),
    "bert": _encoder("BertModel", "cls."),
    "camembert": _encoder("CamembertModel", "lm_head."),
    "deberta": _encoder("DebertaModel", "cls.", "lm_predictions.", "mask_predictions."),
    "deberta-v2": _encoder("DebertaV2Model", "cls.", "lm_predictions.", "mask_predictions."),
    "distilbert": _encoder("DistilBertModel", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    "electra": _encoder(
        "ElectraModel", "discriminator_predictions.", "generator_predictions.", "generator_lm_head.", "cls."
    ),
    "modernbert": _encoder("ModernBertModel", "head.", "decoder."),
    "mpnet": _encoder("MPNetModel", "lm_head."),
    "roberta": _encoder("RobertaModel", "lm_head."),
    "xlm-roberta": _encoder("XLMRobertaModel", "lm_head."),
    "gemma": _decoder("GemmaModel"),
    "gemma2": _decoder("Gemma2Model"),
    "gemma3_text": _decoder("Gemma3TextModel"),
    "gpt2": _decoder("GPT2Model"),
    "llama": _decoder("LlamaModel"),
    "mistral": _decoder("MistralModel"),
    "qwen2": _decoder("Qwen2Model"),
    "qwen3": _decoder("Qwen3Model"),
}
"""By `model_type` of config.json."""


def find_family(name: str, model_type: str | None) -> Family:
    """Return the family of a model; raises EncoderError with those that there are if it is of none."""
    family = FAMILIES.get(model_type or "")
    if family is None:
        known = ", ".join(sorted(each for each in FAMILIES if not each.endswith("_text_model")))
        kind = f"is of model_type {model_type}" if model_type else "names no model_type in its config.json"
        raise EncoderError(f"{name} {kind}: text encoders are {known}, or a sentence-transformers folder")
    return family


def choose_pooling(name: str, given: str | None, allowed: Iterable[str]) -> str:
    """Return the given pooling, or the first of those allowed. Raises EncoderError if the model has no such pooling."""
    poolings = tuple(allowed)
    if given is not None and given not in poolings:
        raise EncoderError(f"--text-pooling {given} does not fit {name}: use {' or '.join(poolings)}")
    return given or poolings[0]


def pool(pooling: str, outputs: "dict[str, torch.Tensor]", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the text embeddings (B, T) in a model's outputs.

    The mask (B, tokens) is 1 at a caption's own tokens, which come first.
    """
    if pooling == "pooled":
        return outputs["pooler_output"]
    if pooling == "projected":
        return outputs["text_embeds"]
    states = outputs["last_hidden_state"]
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[range(len(states)), (mask.sum(1) - 1).clamp(min=0)]
    return mean_pool(states, mask)


def mean_pool(states: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the mean (B, T) of the token states (B, tokens, T) at which the mask (B, tokens) is 1."""
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
