"""The referee of a table: a small network that judges whether images follow their captions, and gives their features.

If a table has few distinct captions they are classes and the referee is a classifier. Otherwise it is a contrastive
model as CLIP is, which embeds images and the table's text embeddings in one space. It is trained once per table, on
decoded latents of training rows: a table need not keep its images, and a run cannot generate anything else. Training
has a fixed budget, some twenty seconds on one core for images of 32 pixels; for larger ones decoding takes most of the
time. All runs on the table share the result, DB/NAME.reports/referee-KEY, where KEY is a hash of the table's version,
its encoders and the budget.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from index.errors import RunError
from index.table.schema import TRAIN
from index.table.storage import is_local, write_json
from index.table.table import Table, reports_of
from index.terminal import Progress
from pipeline.encoders.files import digest_of
from trainer.evaluation.metrics import frechet, kernel_mmd
from trainer.evaluation.samples import Advance, Decode, images_at_once
from trainer.evaluation.threads import map_batches, single_thread, split

BUDGET = {
    "format": 3,
    "rows": 8192,
    "max_epochs": 60,
    "max_steps": 600,
    "batch_size": 128,
    "learning_rate": 3e-3,
    "seed": 0,
}
"""How the referee is trained. Training ends after `max_epochs` or `max_steps`, whichever comes first."""
MAX_CLASSES = 100
FEATURE_DIM, JOINT_DIM = 64, 64
"""Dimensions of the image features, and of the space that images and captions share."""
MAX_SIDE = 64
"""Larger images are downscaled to this side: their content is judged, not their texture."""
RETRIEVAL_BATCH = 1024

EncodeText = Callable[[Sequence[str]], Float32[np.ndarray, "B T"]]


class ImageTower(nn.Module):
    """A small residual network from images to features."""

    def __init__(self) -> None:
        """Initialize the weights from torch's global generator."""
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, FEATURE_DIM], "depths": [1, 1, 1]}
        self.resnet = ResNetModel(ResNetConfig(num_channels=3, layer_type="basic", **sizes))

    def features(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B F"]:
        """Return the features of images of any size."""
        x = downscale(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # B 3 H W
        pooled: Tensor = self.resnet(x).pooler_output.flatten(1)  # B F
        return pooled


class Classifier(ImageTower):
    """The referee of a table with few distinct captions: one class per caption."""

    def __init__(self, labels: list[str]) -> None:
        """Create a head with one class for each of these captions."""
        super().__init__()
        self.labels = labels
        self.head = nn.Linear(FEATURE_DIM, len(labels))

    def loss(
        self, images: UInt8[Tensor, "B H W 3"], captions: Sequence[str], text: Float[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Return the cross entropy of the captions as classes."""
        return cross_entropy(self.head(self.features(images)), self._classes(captions).to(images.device))

    def adherence(
        self, features: Float[Tensor, "N F"], captions: Sequence[str], encode_text: EncodeText, candidates: int
    ) -> dict[str, float]:
        """Return the fraction of images that are classified as their caption."""
        correct = (self.head(features).argmax(1).cpu() == self._classes(captions)).double()
        return {"class_accuracy": float(correct.mean()), "class_accuracy_error": standard_error(correct)}

    def _classes(self, captions: Sequence[str]) -> Int[Tensor, "B"]:
        """Return class indices; -1, which is never predicted, for a caption without a class."""
        index = {label: i for i, label in enumerate(self.labels)}
        return torch.tensor([index.get(caption, -1) for caption in captions])


class Matcher(ImageTower):
    """The referee of a table with many captions: a contrastive model of images and text embeddings."""

    def __init__(self, text_dim: int) -> None:
        """Create projections of image features and of text embeddings into one space."""
        super().__init__()
        self.image_projection = nn.Linear(FEATURE_DIM, JOINT_DIM)
        self.text_projection = nn.Sequential(
            nn.Linear(text_dim, 2 * JOINT_DIM), nn.SiLU(), nn.Linear(2 * JOINT_DIM, JOINT_DIM)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        """Logarithm of the factor on cosine similarities."""

    def loss(
        self, images: UInt8[Tensor, "B H W 3"], captions: Sequence[str], text: Float[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Return InfoNCE in both directions (arXiv 2103.00020); rows with equal captions are not negatives."""
        logits = self.logit_scale.exp() * self._embed_images(self.features(images)) @ self._embed_text(text).T  # B B
        _, group = np.unique(list(captions), return_inverse=True)
        equal = torch.from_numpy(group[:, None] == group).to(logits.device).fill_diagonal_(False)
        logits = logits.masked_fill(equal, -torch.inf)
        target = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    def adherence(
        self, features: Float[Tensor, "N F"], captions: Sequence[str], encode_text: EncodeText, candidates: int
    ) -> dict[str, float]:
        """Return the mean rank of the true caption among candidates (1 is best), and how often it ranks first."""
        distinct, target = np.unique(list(captions), return_inverse=True)
        parts = [encode_text(distinct[i : i + 256].tolist()) for i in range(0, len(distinct), 256)]
        text = self._embed_text(torch.from_numpy(np.concatenate(parts)).to(features.device))
        ranks = retrieval_ranks(
            self._embed_images(features).cpu(), text.cpu(), torch.from_numpy(target), candidates=candidates
        )
        first, groups = (ranks == 1).double(), torch.from_numpy(target)
        error = standard_error(first, groups)
        return {
            "caption_rank": float(ranks.mean()),
            "caption_top1": float(first.mean()),
            "caption_top1_error": error,
        }

    def _embed_images(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B E"]:
        return normalize(self.image_projection(features), dim=1)

    def _embed_text(self, text: Float[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        return normalize(self.text_projection(normalize(text.float(), dim=1) * text.shape[1] ** 0.5), dim=1)


class Referee:
    """A trained referee as a feature extractor; made by `open_referee`."""

    def __init__(self, network: Classifier | Matcher, encode_text: EncodeText, candidates: int, device: str) -> None:
        """Move the network to the device; a matcher ranks the true caption among `candidates`."""
        self._network, self._encode_text, self._device = network.to(device).eval(), encode_text, device
        self._candidates, self.digest = candidates, digest_of(network)

    def extract(self, images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """Return the features before the head."""
        with torch.inference_mode():
            return np.asarray(self._network.features(torch.from_numpy(images).to(self._device)).cpu())

    def metrics(
        self, samples: Float32[np.ndarray, "N F"], real: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """Return distances of the features, and caption adherence."""
        distances = {"feature_frechet": frechet(samples, real), "feature_mmd": kernel_mmd(samples, real)}
        return distances | self.adherence(samples, captions)

    def adherence(self, features: Float32[np.ndarray, "N F"], captions: Sequence[str]) -> dict[str, float]:
        """Return how well images with these features follow their captions."""
        with torch.inference_mode():
            return self._network.adherence(
                torch.from_numpy(features).to(self._device), captions, self._encode_text, self._candidates
            )


def open_referee(
    table: Table, decode: Decode, encode_text: EncodeText, *, candidates: int, out: Path, device: str
) -> tuple[Referee, dict[str, Any]]:
    """Load the table's referee, trained now if there is none, and return it with its settings.

    It is kept in `out` if the table's folder is not writable. Raises RunError if its files are damaged.
    """
    meta = table.meta
    encoders = {"image_encoder": meta.image_encoder.digest, "text_encoder": meta.text_encoder.digest}
    encoders |= {"text_pooling": meta.text_encoder.pooling, "text_prompt": meta.text_encoder.prompt}
    key = {"table_version": table.version, **encoders, **BUDGET}
    name = f"referee-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    reports = Path(reports_of(table.uri))
    writable = is_local(table.uri) and os.access(reports if reports.exists() else reports.parent, os.W_OK)
    folder = (reports if writable else out) / name
    if not folder.exists():
        network, settings = _train(table, decode, device, out / "log.jsonl")
        _save(folder, network, settings | key)
    try:
        settings = json.loads((folder / "referee.json").read_text())
        network = _create(settings)
        load_model(network, folder / "model.safetensors")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder} is not a complete referee ({error}): remove it to train it again") from error
    return Referee(network, encode_text, candidates, device), {
        "folder": str(folder),
        "candidates": candidates,
        **settings,
    }


def class_labels(table: Table, *, max_classes: int = MAX_CLASSES) -> list[str] | None:
    """Return the sorted captions of training rows, if they are few and have ten rows each on average; else None."""
    labels: set[str] = set()
    rows = 0
    for captions in table.column_batches("caption", TRAIN, 8192):
        labels.update(captions.tolist())
        rows += len(captions)
        if len(labels) > max_classes:
            return None
    return sorted(labels) if 1 < len(labels) <= rows / 10 else None


def downscale(images: UInt8[Tensor, "B H W 3"]) -> UInt8[Tensor, "B h w 3"]:
    """Average images down to 64 pixels a side; smaller ones stay."""
    if images.shape[1] <= MAX_SIDE:
        return images
    means = interpolate(images.permute(0, 3, 1, 2).float(), (MAX_SIDE, MAX_SIDE), mode="area")
    return means.round().to(torch.uint8).permute(0, 2, 3, 1)


def retrieval_ranks(
    images: Float[Tensor, "N E"], captions: Float[Tensor, "M E"], target: Int[Tensor, "N"], *, candidates: int
) -> Float[Tensor, "N"]:
    """Return the rank of each image's true caption by inner product, among it and random others; ties are averaged."""
    candidates = min(candidates, len(captions))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(captions)))
    # The others are those that follow the true caption in a random order, so none of them is repeated.
    index = order[(order.argsort()[target][:, None] + torch.arange(candidates)) % len(captions)]  # N candidates
    batches = zip(torch.split(index, RETRIEVAL_BATCH), torch.split(images, RETRIEVAL_BATCH), strict=True)
    scores = torch.cat([(captions[part] @ image[:, :, None])[..., 0] for part, image in batches])
    own, others = scores[:, :1], scores[:, 1:]
    return 1 + (others > own).double().sum(1) + 0.5 * (others == own).double().sum(1)


def standard_error(values: Float[Tensor, "N"], groups: Int[Tensor, "N"] | None = None) -> float:
    """Return the standard error of the mean; values of one group, such as samples of one caption, may be alike."""
    deviations = values - values.mean()
    if groups is not None:
        deviations = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).index_add(0, groups, deviations)
    return float(deviations.square().sum().sqrt() / len(values))


def _create(settings: dict[str, Any]) -> Classifier | Matcher:
    return Classifier(settings["labels"]) if settings["type"] == "classifier" else Matcher(settings["text_dim"])


def _train(table: Table, decode: Decode, device: str, log: Path) -> tuple[Classifier | Matcher, dict[str, Any]]:
    began, seed = time.perf_counter(), int(BUDGET["seed"])
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.permutation(table.positions(TRAIN))[: int(BUDGET["rows"])])
    captions = table.take(positions, "caption")
    text = torch.from_numpy(table.take(positions, "text").astype(np.float32))
    labels = class_labels(table)
    settings: dict[str, Any] = {"type": "matcher" if labels is None else "classifier", "labels": labels}
    settings |= {"text_dim": text.shape[1], "train_rows": len(positions)}
    batch_size = min(int(BUDGET["batch_size"]), len(positions))
    steps = min(int(BUDGET["max_steps"]), int(BUDGET["max_epochs"]) * len(positions) // batch_size)
    with Progress("decode for the referee", total=len(positions), unit="images", log=log) as bar:
        images = _decode_rows(table, positions, decode, device, bar.advance)
    with (
        Progress("train referee", total=steps, unit="steps", log=log) as bar,
        torch.random.fork_rng(devices=[]),
        single_thread(),
    ):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        network = _create(settings).to(device).train()
        adam = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, BUDGET["learning_rate"], total_steps=steps)
        for step in range(steps):
            rows = rng.choice(len(positions), batch_size, replace=False)
            loss = network.loss(
                _translate(images[rows], rng).to(device), captions[rows].tolist(), text[rows].to(device)
            )
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad()
            schedule.step()
            bar.advance(1, **({} if step % 50 else {"loss": loss.item()}))
    return network, settings | {"seconds": round(time.perf_counter() - began, 1)}


def _decode_rows(
    table: Table, positions: Int[np.ndarray, "N"], decode: Decode, device: str, advance: Advance
) -> UInt8[Tensor, "N H W 3"]:
    latents = table.take(positions, "latent").astype(np.float32)
    parts = map_batches(
        lambda part: downscale(torch.from_numpy(decode(latents[part]))),
        split(len(latents), images_at_once(table.meta.image_size, device)),
        device,
        done=lambda part: advance(part.stop - part.start),
    )
    return torch.cat(parts)


def _translate(images: UInt8[Tensor, "B H W 3"], rng: np.random.Generator) -> UInt8[Tensor, "B H W 3"]:
    """Shift a batch by up to a sixteenth of its side, edges repeated, as augmentation."""
    limit = images.shape[1] // 16
    down, right = rng.integers(-limit, limit + 1, size=2)
    y, x = (torch.arange(side) for side in images.shape[1:3])
    rows, columns = (y + down).clamp(0, len(y) - 1), (x + right).clamp(0, len(x) - 1)
    return images[:, rows][:, :, columns]


def _save(folder: Path, network: Classifier | Matcher, settings: dict[str, Any]) -> None:
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_model(network, str(aside / "model.safetensors"))
    write_json(aside / "referee.json", settings)
    try:
        aside.rename(folder)
    except OSError:  # another evaluation was faster; its referee is the same
        shutil.rmtree(aside)
