"""Tokenizers of text encoders: find them, tell them apart, and how many tokens a model reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

from index.errors import EncoderError

MAX_TOKENS = 512
"""Limit for models with relative positions whose tokenizer names no limit, as T5 was trained."""
UNLIMITED = 10**6
"""A tokenizer that names no limit has a larger `model_max_length`."""
PROBES = (
    "a small red circle left of a large blue square",
    'An OLD photograph, ca. 1900: Zurich\'s "Bahnhofstrasse" (no. 12) -- 3.50 CHF/kg!',
    "na\u00efve fa\u00e7ade \u00e0 la carte, stra\u00dfe, \u0441\u043e\u0431\u0430\u043a\u0430",
    "\u732b\u3068\u72ac, \u0643\u0644\u0628, \U0001f431",
    "supercalifragilisticexpialidocious  two  spaces\tand\na line",
)
"""Texts whose tokens tell one tokenizer from another with the same vocabulary."""


def tokenizer_place(path: str, subfolder: str, *, on_hub: bool) -> tuple[str, str]:
    """Return path and subfolder of a tokenizer: in a diffusers pipeline that of text_encoder_2 is in tokenizer_2."""
    if on_hub:
        return path, subfolder.replace("text_encoder", "tokenizer")
    folder = Path(path)
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    own = any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")) or any(folder.glob("*.model"))
    return str(beside if beside.is_dir() and not own else folder), ""


def prepare_tokenizer(name: str, tokenizer: Any) -> None:
    """Make a tokenizer pad on the right; raise EncoderError if there is none: transformers makes an empty one up."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise EncoderError(f"no tokenizer in {name}: save the model's own there with save_pretrained")
    tokenizer.padding_side = "right"  # a caption's first tokens are its own, whatever the batch
    if tokenizer.pad_token is None:  # as in GPT-2; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or min(tokenizer.get_vocab())


def tokenizer_digest_of(tokenizer: Any) -> str:
    """Return the SHA-256, in hex, of a tokenizer's vocabulary and limit and of the tokens of some texts.

    Not of its files, which differ between versions of the library that wrote them.
    """
    limit = tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED else None
    vocabulary = sorted(tokenizer.get_vocab().items())
    words = " ".join(token for token, _ in vocabulary[:: max(1, len(vocabulary) // 1000)])
    content = [vocabulary, limit, tokenizer([*PROBES, words], verbose=False)["input_ids"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def max_length(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a model reads: the least of what the tokenizer names and the positions that it has."""
    positions = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the one after their padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < UNLIMITED]
    return int(min(limits, default=MAX_TOKENS))
