"""Tokenizers of text encoders: find them, tell them apart, and how many tokens a model reads."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from index.errors import EncoderError
from pipeline.encoders.files import Place

MAX_TOKENS = 512
"""Limit for models with relative positions whose tokenizer names no limit, as T5 was trained."""
UNLIMITED = 10**6
"""A tokenizer that names no limit has a larger `model_max_length`."""
VOCABULARIES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("*.model",))
"""Files that hold a vocabulary, of which a tokenizer needs one group whole. Without, transformers makes one up."""
PROBES = (
    "a small red circle left of a large blue square",
    'An OLD photograph, ca. 1900: Zurich\'s "Bahnhofstrasse" (no. 12) -- 3.50 CHF/kg!',
    "na\u00efve fa\u00e7ade \u00e0 la carte, stra\u00dfe, \u0441\u043e\u0431\u0430\u043a\u0430",
    "\u732b\u3068\u72ac, \u0643\u0644\u0628, \U0001f431",
    "supercalifragilisticexpialidocious  two  spaces\tand\na line",
)
"""Texts whose tokens tell one tokenizer from another with the same vocabulary."""
PAIRS = (
    ("a small red circle", "a large blue square"),
    (
        "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
        "\u0441\u0438\u043d\u0438\u0439 \u043a\u0432\u0430\u0434\u0440\u0430\u0442",
    ),
    ("\u732b", "\u72ac"),
    ("1", "2"),
)
"""Captions of equal length that differ, so that a tokenizer that knows none of their words gives them equal tokens."""


def load_tokenizer(place: Place, rows: int) -> Any:
    """Load the tokenizer of a model with `rows` token embeddings.

    Raises EncoderError if there is none, or if it is another model's.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(find_tokenizer(place, place.folder))
    check_tokenizer(place.name, tokenizer, rows)
    # As in GPT-2, or added to the tokenizer alone. Padding is masked, so any token will do.
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or min(tokenizer.get_vocab())
    return tokenizer


def find_tokenizer(place: Place, folder: Path) -> Path:
    """Return the folder of a model's tokenizer: its own, or of a pipeline's text_encoder_2 tokenizer_2 beside it.

    Raises EncoderError if neither holds one.
    """
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    for each in (folder, beside):
        if any(all(any(each.glob(name)) for name in names) for names in VOCABULARIES):
            return each
    also = f" or {beside}" if beside != folder else ""
    files = ", ".join(" with ".join(names) for names in VOCABULARIES)
    raise EncoderError(f"no tokenizer in {place.name}{also} (one of {files}): copy the model's own there")


def check_tokenizer(name: str, tokenizer: Any, rows: int) -> None:
    """Raise EncoderError if a tokenizer knows no words, or more than the model has token embeddings for."""
    added = set(tokenizer.get_added_vocab())
    words = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    if not set(words) - set(tokenizer.all_special_tokens):
        raise EncoderError(f"no tokenizer in {name}, whose files give one without words: copy the model's own there")
    # Tokens added for images, as in Gemma 3, may lie beyond the embeddings of the text model; no caption has them.
    used = {*words.values(), *(i for ids in tokenizer([*PROBES], verbose=False)["input_ids"] for i in ids)}
    if max(used) >= rows:
        raise EncoderError(
            f"the tokenizer of {name} has token ids up to {max(used):,}, the model {rows:,} token embeddings: it is "
            "another model's; copy the model's own there"
        )


def telling_pairs(tokenizer: Any) -> list[tuple[str, str]]:
    """Return pairs of captions that differ and have equally many tokens; any text encoder must tell some apart."""
    added = set(tokenizer.get_added_vocab())
    words = [word for word in sorted(tokenizer.get_vocab()) if word not in added]
    texts = [tokenizer.convert_tokens_to_string([word]).strip() for word in words[:: max(1, len(words) // 16)]]
    known = sorted({text for text in texts if text}, key=lambda text: (_num_tokens(tokenizer, text), text))
    pairs = [*PAIRS, *itertools.pairwise(known)]
    # Where lengths differ, the positions of tokens alone make vectors differ.
    equal = [pair for pair in pairs if _num_tokens(tokenizer, pair[0]) == _num_tokens(tokenizer, pair[1])]
    return equal or pairs


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer([text], verbose=False)["input_ids"][0])


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
