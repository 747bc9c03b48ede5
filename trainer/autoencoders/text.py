"""Train a text autoencoder on a source's own captions; what is saved is an ordinary BERT-like model and tokenizer.

A caption becomes one vector, the mean of its token states; a decoder that sees nothing else says every token at once,
so its accuracy is that of the vector alone. The decoder reads the vector's direction with noise on it, because search
compares directions: captions that must be told apart are pushed apart. The decoder is not saved.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from index.errors import OptionError
from pipeline.encoders import mean_pool, quiet_libraries
from trainer.autoencoders.data import load_captions
from trainer.optimizer import Optimizer
from trainer.tracking import Watch

SIZES = {"tiny": (64, 2), "small": (128, 3), "base": (256, 4), "large": (512, 6)}
"""Width and layers."""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAutoencoderConfig:
    """How a text autoencoder is built and trained."""

    size: str = "tiny"
    vocabulary: int = 4000
    """BPE tokens at most."""
    max_tokens: int = 48
    steps: int = 1400
    batch_size: int = 64
    learning_rate: float = 2e-3
    noise: float = 0.5
    """Length of the noise on the unit vector that the decoder reads."""
    val_fraction: float = 0.05
    limit: int = 1_000_000
    """Captions to read at most."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a size that is unknown."""
        if self.size not in SIZES:
            raise OptionError(f"--size {self.size!r} is unknown: choose one of {', '.join(SIZES)}")


class Decoder(nn.Module):
    """A vector to the tokens of its caption, all positions at once."""

    def __init__(self, width: int, layers: int, tokens: int, vocabulary: int) -> None:
        """One learned query per position."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.read = nn.Linear(width, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.say = nn.Linear(width, vocabulary)

    def forward(self, vector: Float[Tensor, "B T"], tokens: int) -> Float[Tensor, "B tokens V"]:
        """Logits of the first `tokens` positions."""
        h = self.queries[:tokens] + self.read(vector)[:, None]
        logits: Tensor = self.say(self.layers(h))
        return logits


def fit_text_autoencoder(sources: list[str], config: TextAutoencoderConfig, out: Path) -> dict[str, Any]:
    """Train, save to `out`, and report how many tokens of held-out captions come back right."""
    from transformers import BertConfig, BertModel

    train, heldout = load_captions(sources, val_fraction=config.val_fraction, limit=config.limit, log=out / "log.jsonl")
    tokenizer = train_tokenizer(train, config)
    torch.manual_seed(config.seed)
    width, layers = SIZES[config.size]
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=config.max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = BertModel(shape, add_pooling_layer=False)
    model = nn.ModuleDict({"encoder": encoder, "decoder": Decoder(width, 2, config.max_tokens, len(tokenizer))})
    optimizer = Optimizer(model, steps=config.steps, learning_rate=config.learning_rate, ema_decay=0.99)
    ids, mask = tokenise(tokenizer, train)
    rng = np.random.default_rng(config.seed)
    with Watch("fit text autoencoder", total=config.steps, unit="steps", folder=out) as watch:
        for step in range(config.steps):
            rows = torch.from_numpy(rng.integers(len(train), size=config.batch_size))
            seen = int(mask[rows].sum(1).max())
            words, there = ids[rows, :seen], mask[rows, :seen]
            vector = embed(encoder, words, there)
            noisy = vector + config.noise * torch.randn_like(vector) / math.sqrt(width)
            logits = model["decoder"](noisy, seen)
            loss = cross_entropy(logits.flatten(0, 1), words.masked_fill(there == 0, -100).flatten())
            optimizer.step(loss)
            watch.advance(1, **({} if step % 50 else {"cross_entropy": loss.item()}))
    optimizer.use_average()
    quiet_libraries()
    encoder.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        **(token_accuracy(model, *tokenise(tokenizer, heldout)) if heldout else {"token_accuracy": None}),
        "heldout_captions": len(heldout),
        "train_captions": len(train),
        "text_dim": width,
        "vocabulary": len(tokenizer),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "steps": config.steps,
        "seconds": round(watch.bar.seconds, 1),
    }


def train_tokenizer(captions: list[str], config: TextAutoencoderConfig) -> Any:
    """A BPE tokenizer of these captions, as transformers opens it.

    Not WordPiece, whose trainer numbers tokens, and breaks ties, in another order each time.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    words.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=config.vocabulary, special_tokens=SPECIAL, show_progress=False)
    words.train_from_iterator(captions, trainer)
    ends = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=config.max_tokens, **names)


def tokenise(tokenizer: Any, captions: list[str]) -> tuple[Int[Tensor, "N tokens"], Int[Tensor, "N tokens"]]:
    """Token ids and their mask, padded to the longest."""
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def embed(encoder: Any, ids: Int[Tensor, "B tokens"], mask: Int[Tensor, "B tokens"]) -> Float[Tensor, "B T"]:
    """The unit vectors that the decoder reads."""
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return normalize(mean_pool(states, mask), dim=-1)


@torch.inference_mode()
def token_accuracy(
    model: nn.ModuleDict, ids: Int[Tensor, "N tokens"], mask: Int[Tensor, "N tokens"]
) -> dict[str, float]:
    """Share of tokens, and of whole captions, that the decoder says right from the vector alone."""
    right = []
    for start in range(0, len(ids), 256):
        words, there = ids[start : start + 256], mask[start : start + 256]
        said = model["decoder"](embed(model["encoder"], words, there), words.shape[1]).argmax(-1)
        right.append((said == words) | (there == 0))
    ok = torch.cat(right)
    # The checkpoints at both ends are always the same: counting them would flatter.
    counted = (mask == 1) & (ids != SPECIAL.index("[CLS]")) & (ids != SPECIAL.index("[SEP]"))
    return {
        "token_accuracy": float((ok & counted).sum() / counted.sum()),
        "caption_accuracy": float(ok.all(1).float().mean()),
    }
