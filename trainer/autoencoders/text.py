"""Train a text autoencoder on a source's own captions; the result is an ordinary BERT-like model and tokenizer.

The text embedding of a caption is the mean of its token embeddings. A decoder that reads nothing else predicts all
tokens at once, so its accuracy measures what the text embedding holds. It reads the embedding's direction with noise
added, because search compares directions: noise pushes captions of different tokens apart. The decoder is not saved.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from index.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range
from index.report.html import table
from pipeline.encoders.families import mean_pool
from pipeline.encoders.files import quiet_libraries
from pipeline.sources.sample import ReadOptions
from trainer.autoencoders.data import CAPTION_BYTES, Samples, decode_text, window_of
from trainer.autoencoders.run import fit_autoencoder
from trainer.autoencoders.train import MEASURED, AutoencoderLoop, TrainConfig, TrainRuntime
from trainer.objectives.base import Loss
from trainer.stream import send
from trainer.tracking import RunLog

SHAPES = {"tiny": (64, 2), "small": (128, 3), "base": (256, 4), "large": (512, 6)}
"""Hidden size and number of layers of the encoder."""
NUM_HEADS = 4
DECODER_LAYERS = 2
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SHOWN, MEASURED_AT_ONCE = 16, 256
"""Held-out captions that are shown with what is decoded of them, and captions that are decoded at once."""


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


class TextAutoencoder(nn.Module):
    """An encoder, which is what is trained for, and its decoder."""

    def __init__(self, encoder: Any, decoder: Decoder) -> None:
        """Take the parts."""
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def save_pretrained(self, folder: Path) -> None:
        """Write all weights, for a checkpoint."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")


class TextAutoencoderLoop(AutoencoderLoop[str]):
    """A text autoencoder in training on the cross entropy of a caption's tokens."""

    kind, title, unit = "text", "fit text autoencoder", "captions"
    config_class, metrics = TextAutoencoderConfig, ("token_accuracy", "caption_accuracy")
    config: TextAutoencoderConfig

    def make_samples(self, shards: list[str], options: ReadOptions) -> Samples[str]:
        """Return the distinct captions of some shards."""
        return caption_samples(shards, self.config, options)

    def make_model(self) -> TextAutoencoder:
        """Return a model with fresh weights, for the tokens of the first captions."""
        self.tokenizer = train_tokenizer(self.samples.first.train, self.config)
        return make_text_autoencoder(self.config, self.tokenizer)

    def loss(self, batch: list[str], generator: torch.Generator) -> Loss:
        """Return the loss of captions."""
        model: Any = self.model
        ids, mask = tokenize(self.tokenizer, batch, self.device)
        text = embed(model.encoder, ids, mask)
        noise = send(torch.randn(text.shape, generator=generator), self.device)
        noisy = text + self.config.noise * noise / math.sqrt(text.shape[1])
        logits = model.decoder(noisy, ids.shape[1])
        error = cross_entropy(logits.flatten(0, 1), ids.masked_fill(mask == 0, -100).flatten())
        return Loss(error, {"cross_entropy": error})

    def measure(self, limit: int) -> dict[str, float]:
        """Return the fractions of tokens and of held-out captions that are decoded."""
        heldout = self.samples.first.heldout[:limit]
        return token_accuracy(self.optimizer.averaged_model, self.tokenizer, heldout, self.device) if heldout else {}

    def describe(self) -> dict[str, Any]:
        """Return numbers of captions, and what their embeddings are like."""
        return {
            "heldout_captions": len(self.samples.first.heldout[:MEASURED]),
            "train_captions": self.record.position["seen"],
            "text_dim": self.optimizer.averaged_model.encoder.config.hidden_size,
            "vocab_size": len(self.tokenizer),
        }

    def show(self, log: RunLog) -> str:
        """Pass captions and what is decoded of them to the log, and return them as HTML."""
        first, model = self.samples.first, self.optimizer.averaged_model
        captions = (first.heldout or first.train)[:SHOWN]
        decoded = reconstruct(model, self.tokenizer, captions, self.device)
        pairs = list(zip(captions, decoded, strict=True))
        log.log_now(reconstructions="\n".join(f"    {line}" for pair in pairs for line in (*pair, "")))  # as typed
        return table(pairs, head=("caption", "decoded from its embedding"))

    def save(self, folder: Path) -> None:
        """Write the encoder as a transformers folder with its tokenizer."""
        # These are of the last call, which is another one in a run that was only finished.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        with quiet_libraries():
            self.optimizer.averaged_model.encoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def result(self) -> dict[str, Any]:
        """Return what training came to; the decoder is no part of what is saved."""
        encoder = self.optimizer.averaged_model.encoder
        return super().result() | {"parameters": sum(p.numel() for p in encoder.parameters())}


def fit_text_autoencoder(
    sources: list[str],
    config: TextAutoencoderConfig,
    out: Path,
    *,
    resume: bool = False,
    runtime: TrainRuntime | None = None,
) -> dict[str, Any]:
    """Train an autoencoder, save its encoder to `out`, and return its metrics; see `fit_autoencoder`."""
    return fit_autoencoder(TextAutoencoderLoop, sources, config, out, resume=resume, runtime=runtime)


def caption_samples(shards: list[str], config: TextAutoencoderConfig, options: ReadOptions) -> Samples[str]:
    """Return the distinct captions of some shards; equal captions are in the same split."""
    return Samples(
        kind="captions",
        shards=shards,
        decode=decode_text,
        window=window_of(CAPTION_BYTES, config.steps * config.batch_size),
        val_fraction=config.val_fraction,
        distinct=True,
        limit=config.limit,
        seed=config.seed,
        options=options,
    )


def make_text_autoencoder(config: TextAutoencoderConfig, tokenizer: Any) -> TextAutoencoder:
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
    return TextAutoencoder(encoder, Decoder(dim, DECODER_LAYERS, config.max_length, len(tokenizer)))


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


def tokenize(
    tokenizer: Any, captions: list[str], device: str
) -> tuple[Int[Tensor, "N length"], Int[Tensor, "N length"]]:
    """Return the token ids of captions and their attention mask, padded to the longest caption, on the device."""
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    ids, mask = (tokens[name] for name in ("input_ids", "attention_mask"))
    if device.startswith("cuda"):
        ids, mask = ids.pin_memory(), mask.pin_memory()
    return send(ids, device), send(mask, device)


def embed(encoder: Any, ids: Int[Tensor, "B length"], mask: Int[Tensor, "B length"]) -> Float[Tensor, "B T"]:
    """Return text embeddings of unit norm."""
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return normalize(mean_pool(states, mask), dim=-1)


@torch.inference_mode()
def token_accuracy(
    model: TextAutoencoder, tokenizer: Any, captions: Sequence[str], device: str = "cpu"
) -> dict[str, float]:
    """Return the fractions of tokens, and of whole captions, that are decoded from the text embedding without noise."""
    found = tokens = whole = 0
    for ids, mask, predicted in _decoded(model, tokenizer, captions, device):
        correct = (predicted == ids) | (mask == 0)
        # [CLS] and [SEP] are at the ends of every caption: counting them would inflate the accuracy.
        counted = (mask == 1) & (ids != SPECIAL_TOKENS.index("[CLS]")) & (ids != SPECIAL_TOKENS.index("[SEP]"))
        found, tokens = found + int((correct & counted).sum()), tokens + int(counted.sum())
        whole += int(correct.all(1).sum())
    return {"token_accuracy": found / tokens, "caption_accuracy": whole / len(captions)}


@torch.inference_mode()
def reconstruct(model: TextAutoencoder, tokenizer: Any, captions: Sequence[str], device: str = "cpu") -> list[str]:
    """Return what is decoded of the text embeddings of captions."""
    return [
        tokenizer.decode(row[is_token == 1], skip_special_tokens=True)
        for _, mask, predicted in _decoded(model, tokenizer, captions, device)
        for row, is_token in zip(predicted, mask, strict=True)
    ]


def _decoded(
    model: TextAutoencoder, tokenizer: Any, captions: Sequence[str], device: str
) -> Iterator[tuple[Int[Tensor, "B length"], Int[Tensor, "B length"], Int[Tensor, "B length"]]]:
    """Yield the token ids of captions, their mask, and the most likely tokens given the text embedding."""
    for start in range(0, len(captions), MEASURED_AT_ONCE):
        ids, mask = tokenize(tokenizer, list(captions[start : start + MEASURED_AT_ONCE]), device)
        yield ids, mask, model.decoder(embed(model.encoder, ids, mask), ids.shape[1]).argmax(-1)
