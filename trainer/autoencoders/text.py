"""Train a text autoencoder on a source's own captions; the result is an ordinary BERT-like model and tokenizer.

The text embedding of a caption is the mean of its token embeddings. A decoder that reads nothing else predicts all
tokens at once, so its accuracy measures what the text embedding holds. It reads the embedding's direction with noise
added, because search compares directions: noise pushes captions of different tokens apart. The decoder is not saved.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from index.ranges import COUNT, NOT_NEGATIVE, POSITIVE, TOTAL, Range
from pipeline.encoders.families import mean_pool
from pipeline.encoders.files import quiet_libraries
from trainer.autoencoders.data import load_captions
from trainer.autoencoders.train import TrainConfig, train
from trainer.objectives.base import Loss

SHAPES = {"tiny": (64, 2), "small": (128, 3), "base": (256, 4), "large": (512, 6)}
"""Hidden size and number of layers of the encoder."""
NUM_HEADS = 4
DECODER_LAYERS = 2
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAutoencoderConfig(TrainConfig):
    """How a text autoencoder is built and trained."""

    vocab_size: Annotated[int, COUNT] = 4000
    """Maximum number of BPE tokens."""
    max_length: Annotated[int, Range(3, 4096)] = 48
    """Tokens to which a caption is truncated."""
    steps: Annotated[int, COUNT] = 1400
    batch_size: Annotated[int, COUNT] = 64
    learning_rate: Annotated[float, POSITIVE] = 2e-3
    noise: Annotated[float, NOT_NEGATIVE] = 0.5
    """Norm of the noise on the unit vector that the decoder reads."""
    limit: Annotated[int, TOTAL] = 1_000_000


class Decoder(nn.Module):
    """Text embeddings to logits of the caption's tokens, all positions at once."""

    def __init__(self, dim: int, layers: int, max_length: int, vocab_size: int) -> None:
        """Initialize one learned query per position."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(max_length, dim) * 0.1)
        self.embed = nn.Linear(dim, dim)
        layer = nn.TransformerEncoderLayer(dim, NUM_HEADS, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, text: Float[Tensor, "B T"], length: int) -> Float[Tensor, "B length V"]:
        """Return the logits of the first `length` positions."""
        h = self.queries[:length] + self.embed(text)[:, None]
        logits: Tensor = self.head(self.layers(h))
        return logits


def fit_text_autoencoder(sources: list[str], config: TextAutoencoderConfig, out: Path) -> dict[str, Any]:
    """Train an autoencoder, save its encoder to `out`, and return its metrics.

    Token accuracy is the fraction of tokens of held-out captions that are decoded; None if no captions are held out.
    """
    captions = load_captions(
        sources, val_fraction=config.val_fraction, limit=config.limit, storage=config.storage, log=out / "log.jsonl"
    )
    tokenizer = train_tokenizer(captions.train, config)
    torch.manual_seed(config.seed)
    model = make_text_autoencoder(config, tokenizer)
    ids, mask = tokenize(tokenizer, captions.train)

    def loss(rng: np.random.Generator) -> Loss:
        rows = torch.from_numpy(rng.integers(len(ids), size=config.batch_size))
        length = int(mask[rows].sum(1).max())
        tokens, is_token = ids[rows, :length], mask[rows, :length]
        text = embed(model["encoder"], tokens, is_token)
        noisy = text + config.noise * torch.randn_like(text) / math.sqrt(text.shape[1])
        logits = model["decoder"](noisy, length)
        error = cross_entropy(logits.flatten(0, 1), tokens.masked_fill(is_token == 0, -100).flatten())
        return Loss(error, {"cross_entropy": error})

    averaged, seconds = train("text", model, loss, config, out)
    encoder, heldout = averaged["encoder"], captions.heldout
    with quiet_libraries():
        encoder.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return {
        **(token_accuracy(averaged, *tokenize(tokenizer, heldout)) if heldout else {"token_accuracy": None}),
        "heldout_captions": len(heldout),
        "train_captions": len(captions.train),
        "text_dim": encoder.config.hidden_size,
        "vocab_size": len(tokenizer),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "steps": config.steps,
        "seconds": round(seconds, 1),
    }


def make_text_autoencoder(config: TextAutoencoderConfig, tokenizer: Any) -> nn.ModuleDict:
    """Return a BertModel and its decoder with fresh weights."""
    from transformers import BertConfig, BertModel

    dim, layers = SHAPES[config.size]
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=2 * dim,
        max_position_embeddings=config.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = BertModel(shape, add_pooling_layer=False)
    decoder = Decoder(dim, DECODER_LAYERS, config.max_length, len(tokenizer))
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def train_tokenizer(captions: list[str], config: TextAutoencoderConfig) -> Any:
    """Return a BPE tokenizer of the captions, for transformers.

    Not WordPiece, whose trainer orders tokens and breaks ties differently each time.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=config.max_length, **names)


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Int[Tensor, "N length"], Int[Tensor, "N length"]]:
    """Return the token ids of captions and their attention mask, padded to the longest caption."""
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def embed(encoder: Any, ids: Int[Tensor, "B length"], mask: Int[Tensor, "B length"]) -> Float[Tensor, "B T"]:
    """Return text embeddings of unit norm."""
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return normalize(mean_pool(states, mask), dim=-1)


@torch.inference_mode()
def token_accuracy(
    model: nn.ModuleDict, ids: Int[Tensor, "N length"], mask: Int[Tensor, "N length"]
) -> dict[str, float]:
    """Return the fractions of tokens, and of whole captions, that are decoded from the text embedding without noise."""
    batches = []
    for start in range(0, len(ids), 256):
        tokens, is_token = ids[start : start + 256], mask[start : start + 256]
        predicted = model["decoder"](embed(model["encoder"], tokens, is_token), tokens.shape[1]).argmax(-1)
        batches.append((predicted == tokens) | (is_token == 0))
    correct = torch.cat(batches)
    # [CLS] and [SEP] are at the ends of every caption: counting them would inflate the accuracy.
    counted = (mask == 1) & (ids != SPECIAL_TOKENS.index("[CLS]")) & (ids != SPECIAL_TOKENS.index("[SEP]"))
    return {
        "token_accuracy": float((correct & counted).sum() / counted.sum()),
        "caption_accuracy": float(correct.all(1).float().mean()),
    }
