"""The referee of a table: a small network trained on its pictures, which all runs on the table share.

It learns from decoded latents of training rows, because a table need not keep its pictures and because a run can draw
no others. The budget is fixed, some twenty seconds on one core for pictures of 32 pixels; of larger ones decoding takes
most. It is kept beside the table, DB/NAME.reports/referee-KEY, where KEY stands for the table's version, its encoders
and the budget.
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
from jaxtyping import Float32, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from index.errors import RunError
from index.table.schema import TRAIN
from index.table.storage import is_local, write_json
from index.table.table import Table, column_array, reports_of
from index.terminal import Progress
from trainer.evaluation.adherence import Classifier, Describe, Matcher, referee_network, shrunk
from trainer.evaluation.viewers import feature_distances

MOST_LABELS = 100
"""Captions that are taken for classes, where a class has ten rows on average."""
BUDGET = {"format": 2, "rows": 8192, "passes": 60, "steps": 600, "batch_size": 128, "learning_rate": 3e-3, "seed": 0}
"""Rows that it learns from, and how often it sees each or how many steps it takes, whichever is less."""
DECODED = 64
"""Latents that are decoded at once."""

Decode = Callable[[Float32[np.ndarray, "B L"]], UInt8[np.ndarray, "B H W 3"]]
"""Latents to pictures."""


class Referee:
    """A viewer: features, and whether pictures follow their captions."""

    def __init__(self, network: Classifier | Matcher, describe: Describe, among: int, device: str) -> None:
        """Made by `open_referee`; it looks for a picture's caption among so many."""
        self._network, self._describe, self._device = network.to(device).eval(), describe, device
        self._among = among

    def look(self, pictures: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """What it sees before it answers."""
        with torch.inference_mode():
            return np.asarray(self._network.features(torch.from_numpy(pictures).to(self._device)).cpu())

    def figures(
        self, found: Float32[np.ndarray, "N F"], truth: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """Distances of features, and adherence."""
        return feature_distances("feature", found, truth) | self.adherence(found, captions)

    def adherence(self, found: Float32[np.ndarray, "N F"], captions: Sequence[str]) -> dict[str, float]:
        """How far pictures with these features follow their captions."""
        with torch.inference_mode():
            return self._network.adherence(
                torch.from_numpy(found).to(self._device), captions, self._describe, self._among
            )


def open_referee(
    table: Table, decode: Decode, describe: Describe, *, among: int, out: Path, device: str
) -> tuple[Referee, dict[str, Any]]:
    """The table's referee and what is known of it; trained now if it is not there yet.

    Where nothing can be written beside the table it is kept in `out`.
    """
    meta = table.meta
    encoders = {"image_encoder": meta.image_encoder.digest, "text_encoder": meta.text_encoder.digest}
    key = {"table_version": table.version, **encoders, **BUDGET}
    name = f"referee-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    beside = Path(reports_of(table.uri))
    writable = is_local(table.uri) and os.access(beside if beside.exists() else beside.parent, os.W_OK)
    place = (beside if writable else out) / name
    if not place.exists():
        network, known = _train(table, decode, device, out / "log.jsonl")
        _keep(place, network, known | key)
    try:
        content: dict[str, Any] = json.loads((place / "referee.json").read_text())
        network = referee_network(content)
        load_model(network, place / "model.safetensors")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{place} holds no referee ({error}): remove it, and it is trained again") from error
    return Referee(network, describe, among, device), {"folder": str(place), "among": among, **content}


def labels_of(table: Table) -> list[str] | None:
    """The captions of training rows, sorted, if they can be classes."""
    seen: set[str] = set()
    rows = 0
    for batch in table.dataset().to_batches(columns=["caption"], filter=f"split = '{TRAIN}'", batch_size=8192):
        seen.update(column_array(batch["caption"]).tolist())
        rows += len(batch)
        if len(seen) > MOST_LABELS:
            return None
    return sorted(seen) if 1 < len(seen) <= rows / 10 else None


def _train(table: Table, decode: Decode, device: str, log: Path) -> tuple[Classifier | Matcher, dict[str, Any]]:
    began, seed = time.perf_counter(), int(BUDGET["seed"])
    rng, offsets = np.random.default_rng(seed), table.positions(TRAIN)
    rows = np.sort(rng.permutation(offsets)[: int(BUDGET["rows"])])
    captions = table.take(rows, "caption")
    text = torch.from_numpy(table.take(rows, "text").astype(np.float32))
    latents = table.take(rows, "latent").astype(np.float32)
    labels = labels_of(table)
    known: dict[str, Any] = {"kind": "matcher" if labels is None else "classifier", "labels": labels}
    known |= {"text_dim": text.shape[1], "trained_on": len(rows)}
    batch = min(int(BUDGET["batch_size"]), len(rows))
    steps = min(int(BUDGET["steps"]), int(BUDGET["passes"]) * len(rows) // batch)
    with Progress("train referee", total=steps, unit="steps", log=log) as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = np.array_split(latents, -(-len(rows) // DECODED))
        pictures = torch.cat([shrunk(torch.from_numpy(decode(part))) for part in parts])
        network = referee_network(known).to(device).train()
        adam = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, BUDGET["learning_rate"], total_steps=steps)
        for step in range(steps):
            some = rng.choice(len(rows), batch, replace=False)
            loss = network.loss(
                _shifted(pictures[some], rng).to(device), captions[some].tolist(), text[some].to(device)
            )
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad()
            schedule.step()
            bar.advance(1, **({} if step % 50 else {"loss": loss.item()}))
    return network, known | {"seconds": round(time.perf_counter() - began, 1)}


def _shifted(pictures: UInt8[torch.Tensor, "B H W 3"], rng: np.random.Generator) -> UInt8[torch.Tensor, "B H W 3"]:
    """A batch moved by up to a sixteenth of its side, edges repeated: what is learned should not hang on places."""
    most = pictures.shape[1] // 16
    down, right = rng.integers(-most, most + 1, size=2)
    y, x = (torch.arange(side) for side in pictures.shape[1:3])
    rows, columns = (y + down).clamp(0, len(y) - 1), (x + right).clamp(0, len(x) - 1)
    return pictures[:, rows][:, :, columns]


def _keep(place: Path, network: Classifier | Matcher, content: dict[str, Any]) -> None:
    aside = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_model(network, str(aside / "model.safetensors"))
    write_json(aside / "referee.json", content)
    try:
        aside.rename(place)
    except OSError:  # another evaluation was faster; its referee is the same
        shutil.rmtree(aside)
