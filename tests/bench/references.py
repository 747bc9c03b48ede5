"""The quality that a perfect network would reach: that of the retrieved rows themselves."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import real_tables
import torch
from jaxtyping import Float32, Int
from PIL import Image

from index.build.build_index import BuildConfig, build_index
from index.report.report import IndexReport
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.space.queries import draw_points
from index.table.table import open_table
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from pipeline.sources.sample import decode_caption
from trainer.evaluation.metrics import frechet, prdc

BATCH, TRAINING = 128, "training rows"
SPACES = (("raw", False), ("standard", False), ("sphere", False), ("sphere", True))
HUBNESS = ("chi_square", "anti_hub_rate", "expected_anti_hub_rate", "effective_row_fraction", "max_hit_rate")
BALANCE = ("stop_reason", "steps", "seconds", "fit_chi_square")


def perfect_network(data: Path, work: Path, time_limit: float) -> list[dict[str, Any]]:
    """Search each geometry, without and with balance, for test captions with random R; a line for each."""
    table = real_tables.copy(real_tables.mnist(data, work), work / "references.lance")
    images = _decode(table.column("image"))
    digits = [caption.rpartition(" ")[2] for caption in table.column("caption")]
    names = sorted(set(digits))
    embed, accuracy = _classifier(images, np.array([names.index(name) for name in digits]))
    features = embed(images)
    test = list(read_samples(list_shards([str(data / "mnist" / "test-00000.parquet")])[0]))
    test_features = embed(_decode([sample.image for sample in test]))
    labels = np.array([names.index(decode_caption(sample.caption).rpartition(" ")[2]) for sample in test])
    first = {name: digits.index(name) for name in names}
    text = table.column("text")[[first[names[label]] for label in labels]]

    def line(space: str, samples: Float32[np.ndarray, "N F"], **more: Any) -> dict[str, Any]:
        return {
            "space": space,
            "frechet": frechet(samples, test_features),
            "coverage": prdc(test_features, samples).coverage,
            "accuracy": None if space == TRAINING else accuracy(samples, labels),
            **more,
        }

    some = np.random.default_rng(0).permutation(len(features))[: len(test_features)]
    lines = [line(TRAINING, features[some])]
    for name, center in SPACES:
        for balance in (False, True):
            index_type = "auto" if (name, center, balance) == ("sphere", False, True) else "none"
            config = BuildConfig(
                geometry=name, center=center, balance=balance, balance_time_limit=time_limit, index_type=index_type
            )
            built = build_index(open_table(table.uri), config)
            geometry = built.table.meta.geometry
            queries = geometry.queries(text, draw_points(geometry, len(test_features), seed=1, step=0))
            exact = ExactSearch(built.table)
            for approximate in (False, True) if index_type == "auto" else (False,):
                search = ApproximateSearch(built.table) if approximate else exact
                rows = np.concatenate([search.nearest(part).row_id[:, 0] for part in np.array_split(queries, 10)])
                positions = exact.positions_of(rows)
                space = name + " centered" * center + " + balance" * balance + " through the index" * approximate
                metrics = _hubness(built.report, "linear_probe_r2")
                lines.append(line(space, features[positions], distinct=len(np.unique(positions)), **metrics))
                print(lines[-1], file=sys.stderr)
    return lines


def emoji(data: Path, work: Path, time_limit: float) -> list[dict[str, Any]]:
    """Measure hubness before and after balance, at a desc_scale that decides the target and at one that does not."""
    table = real_tables.copy(real_tables.emoji(data, work), work / "balanced-emoji.lance")
    lines = []
    for scale in (4.0, 0.6):
        for balance in (False, True):
            config = BuildConfig(
                desc_scale=scale, allow_small_desc_scale=True, balance=balance, balance_time_limit=time_limit
            )
            report = build_index(open_table(table.uri), config).report
            more = ("desc_scale", "perplexity", "self_retrieval_rate", "linear_probe_r2")
            lines.append({"balance": balance} | _hubness(report, *more))
    return lines


def _hubness(report: IndexReport, *more: str) -> dict[str, Any]:
    """Return the hubness metrics of a report, `more` of its fields, and how its balance was fitted."""
    balance = {} if report.balance is None else {f"balance_{name}": getattr(report.balance, name) for name in BALANCE}
    return {name: getattr(report, name) for name in (*HUBNESS, *more)} | balance


def _decode(images: Any) -> Float32[np.ndarray, "N H W"]:
    gray = (Image.open(io.BytesIO(image)).convert("L") for image in images)
    return np.stack([np.asarray(image, np.float32) / 127.5 - 1 for image in gray])


def _classifier(images: Float32[np.ndarray, "N H W"], labels: Int[np.ndarray, "N"], epochs: int = 3) -> Any:
    """Train a small ResNet; return functions for its 64 features of images and for the accuracy on features."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=int(labels.max()) + 1,
        )
    )
    steps = epochs * len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(len(images), size=BATCH)
        pixels = torch.from_numpy(images[batch])[:, None]
        loss = model(pixel_values=pixels, labels=torch.from_numpy(labels[batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()

    @torch.inference_mode()
    def embed(images: Float32[np.ndarray, "N H W"]) -> Float32[np.ndarray, "N F"]:
        parts = torch.from_numpy(images)[:, None].split(1024)
        return torch.cat([model.resnet(part).pooler_output.flatten(1) for part in parts]).numpy()

    @torch.inference_mode()
    def accuracy(features: Float32[np.ndarray, "N F"], labels: Int[np.ndarray, "N"]) -> float:
        predicted = model.classifier(torch.from_numpy(features)[:, :, None, None]).argmax(1).numpy()
        return float((predicted == labels).mean())

    return embed, accuracy
