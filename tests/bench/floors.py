"""What a perfect network would reach: the quality of the retrieved rows themselves."""

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
from index.search.ann import ApproximateSearch, ExactSearch
from index.space.queries import draw_points
from index.table.table import open_table
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from pipeline.sources.sample import decode_caption
from trainer.evaluation.metrics import frechet, prdc

BATCH, TRAINING = 128, "training rows"
SPACES = (("raw", False), ("standard", False), ("sphere", False), ("sphere", True))
SHARES = ("chi_square", "anti_hub_rate", "expected_anti_hub_rate", "effective_share", "largest_share")
BALANCE = ("balance_stopped", "balance_steps", "balance_time_limit", "balance_chi_square")


def floors(data: Path, work: Path, seconds: float) -> list[dict[str, Any]]:
    """A line for each geometry without and with balance: test captions and random points ask for training rows."""
    table = real_tables.copy(real_tables.mnist(data, work), work / "floors.lance")
    pictures = _decoded(table.column("image"))
    digits = [caption.rpartition(" ")[2] for caption in table.column("caption")]
    names = sorted(set(digits))
    embed, accuracy = _classifier(pictures, np.array([names.index(name) for name in digits]))
    features = embed(pictures)
    test = list(read_samples(list_shards([str(data / "mnist" / "test-00000.parquet")])[0]))
    real = embed(_decoded([sample.image for sample in test]))
    right = np.array([names.index(decode_caption(sample.caption).rpartition(" ")[2]) for sample in test])
    first = {name: digits.index(name) for name in names}
    description = table.column("text")[[first[names[digit]] for digit in right]]

    def line(space: str, found: Float32[np.ndarray, "N F"], **more: Any) -> dict[str, Any]:
        return {
            "space": space,
            "frechet": frechet(found, real),
            "coverage": prdc(real, found).coverage,
            "adherence": None if space == TRAINING else accuracy(found, right),
            **more,
        }

    some = np.random.default_rng(0).permutation(len(features))[: len(real)]
    lines = [line(TRAINING, features[some])]
    for kind, center in SPACES:
        for balance in (False, True):
            index_type = "auto" if (kind, center, balance) == ("sphere", False, True) else "none"
            built = build_index(
                open_table(table.uri),
                BuildConfig(
                    geometry=kind,
                    center=center,
                    balance=balance,
                    balance_time_limit=seconds,
                    index_type=index_type,
                ),
            )
            geometry = built.table.meta.geometry
            queries = geometry.queries(description, draw_points(geometry, len(real), seed=1, step=0))
            oracle = ExactSearch(built.table)
            for exact in (True, False) if index_type == "auto" else (True,):
                neighbors = oracle if exact else ApproximateSearch(built.table)
                rows = np.concatenate([neighbors.nearest(part).row[:, 0] for part in np.array_split(queries, 10)])
                place = oracle.position_of(rows)
                name = kind + " centered" * center + " + balance" * balance + " through the index" * (not exact)
                figures = {
                    key: built.report[key] for key in (*SHARES, "linear_probe_r2", *BALANCE) if key in built.report
                }
                lines.append(line(name, features[place], distinct=len(np.unique(place)), **figures))
                print(lines[-1], file=sys.stderr)
    return lines


def emoji(data: Path, work: Path, seconds: float) -> list[dict[str, Any]]:
    """Shares of draws before and after balance, with descriptions that decide and with some that do not."""
    table = real_tables.copy(real_tables.emoji(data, work), work / "balanced-emoji.lance")
    lines = []
    for scale in (4.0, 0.6):
        for balance in (False, True):
            config = BuildConfig(
                desc_scale=scale, allow_small_desc_scale=True, balance=balance, balance_time_limit=seconds
            )
            report = build_index(open_table(table.uri), config).report
            kept = ("desc_scale", *SHARES, "perplexity", "self_retrieval_rate", "linear_probe_r2", *BALANCE)
            lines.append({"balance": balance} | {key: report[key] for key in kept if key in report})
    return lines


def _decoded(images: Any) -> Float32[np.ndarray, "N H W"]:
    pictures = (Image.open(io.BytesIO(image)).convert("L") for image in images)
    return np.stack([np.asarray(picture, np.float32) / 127.5 - 1 for picture in pictures])


def _classifier(pictures: Float32[np.ndarray, "N H W"], labels: Int[np.ndarray, "N"], epochs: int = 3) -> Any:
    """A small residual network: its 64 last features of pictures, and the share of features that it calls right."""
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
    steps = epochs * len(pictures) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        some = rng.integers(len(pictures), size=BATCH)
        given = torch.from_numpy(pictures[some])[:, None]
        loss = model(pixel_values=given, labels=torch.from_numpy(labels[some])).loss
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
    def accuracy(features: Float32[np.ndarray, "N F"], wanted: Int[np.ndarray, "N"]) -> float:
        called = model.classifier(torch.from_numpy(features)[:, :, None, None]).argmax(1).numpy()
        return float((called == wanted).mean())

    return embed, accuracy
