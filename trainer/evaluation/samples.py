"""Prompts of an evaluation, and what a run samples for them, with its timing.

Everything is in coordinates, the standardized latents in which the network works; see `index.space.geometry`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from torch import nn

from index.table.schema import HELDOUT
from index.table.table import Table
from trainer.evaluation.threads import map_batches, split
from trainer.sampler import CoalescerPipeline

MIN_ROWS = 8
"""Rows of a split, and samples, below which metrics mean nothing."""
BATCH = 256
"""Prompts that are sampled at once."""
DECODE_BATCH = 64
"""Latents that are decoded at once."""
CPU_PIXELS = 2**18
"""Pixels that a CPU's thread decodes at once."""
FLOAT16_MAX = 65504.0
DIVERSITY_SAMPLES, DIVERSITY_CAPTIONS = 400, 100
"""Size of the diversity set: extra samples, divided among at most this many captions, which is four for each."""

Decode = Callable[[Float32[np.ndarray, "B L"]], UInt8[np.ndarray, "B H W 3"]]
"""Flattened latents to images."""
Advance = Callable[[int], object]
"""Counts samples as done."""


@dataclass(frozen=True, eq=False, slots=True)
class Prompts:
    """Captions of held-out rows with the noise to start from; the diversity set comes last."""

    positions: Int[np.ndarray, "Q"]
    """Table positions of the rows whose captions these are. If there are more prompts than held-out rows, rows repeat
    with other noise."""
    captions: list[str]
    noise: Float32[np.ndarray, "Q L"]
    noise_ids: list[int]
    """What the noise depends on, together with `seed`."""
    seed: int
    diversity_group: Int[np.ndarray, "P"]
    """For each of the last P prompts, the number of its caption."""

    @property
    def count(self) -> int:
        """N, the number of prompts before the diversity set."""
        return len(self.captions) - len(self.diversity_group)

    @property
    def group_captions(self) -> list[str]:
        """The captions of the diversity set, by number."""
        first = np.unique(self.diversity_group, return_index=True)[1]
        return [self.captions[self.count + i] for i in first]


@dataclass(frozen=True, eq=False, slots=True)
class Samples:
    """Points to be measured, with their captions."""

    x: Float32[np.ndarray, "N L"]
    captions: list[str]
    grouped: Float32[np.ndarray, "P L"]
    """Points for diversity and energy score, which compare those of one caption."""
    group: Int[np.ndarray, "P"]
    """For each of them the number of its caption."""
    group_captions: list[str]

    @classmethod
    def for_prompts(cls, prompts: Prompts, x: Float32[np.ndarray, "Q L"]) -> "Samples":
        """Split one point per prompt into samples and diversity set."""
        n = prompts.count
        return cls(x[:n], prompts.captions[:n], x[n:], prompts.diversity_group, prompts.group_captions)

    @classmethod
    def of_rows(cls, x: Float32[np.ndarray, "N L"], captions: list[str]) -> "Samples":
        """Take rows of a table as samples, grouped by equal captions."""
        names, group = np.unique(captions, return_inverse=True)
        return cls(x, captions, x, group, names.tolist())

    def finite(self) -> "Samples":
        """Return the points that are finite, of both parts."""
        kept, grouped = is_finite(self.x), is_finite(self.grouped)
        captions = [caption for caption, keep in zip(self.captions, kept, strict=True) if keep]
        return replace(
            self, x=self.x[kept], captions=captions, grouped=self.grouped[grouped], group=self.group[grouped]
        )


def is_finite(x: Float32[np.ndarray, "N L"]) -> Bool[np.ndarray, "N"]:
    """Return which points have neither infinite coordinates nor any that a latent of a table, in float16, cannot have.

    Distances between larger ones are infinite in float32.
    """
    return np.asarray((np.abs(x) <= FLOAT16_MAX).all(1))  # NaN is not


class TextEmbeddings(NamedTuple):
    """Embeddings of all prompts, every caption encoded once."""

    unique: Float32[np.ndarray, "U K T"]
    inverse: Int[np.ndarray, "Q"]
    """For each prompt, the row of its caption."""

    def batch(self, part: slice) -> Float32[np.ndarray, "B K T"]:
        """Return the embeddings of some prompts."""
        return np.asarray(self.unique[self.inverse[part]])


@dataclass(frozen=True, eq=False, slots=True)
class SamplerOutput:
    """End points of a run for all prompts, and what they cost."""

    x: Float32[np.ndarray, "Q L"]
    confidence: Float32[np.ndarray, "Q"]
    seconds: float
    """For all prompts, text encoding and image decoding excluded; on a CPU those of one core, otherwise wall clock."""
    network_evaluations: float
    """Per sample."""


def draw_prompts(pipeline: CoalescerPipeline, table: Table, num_samples: int, seed: int) -> Prompts:
    """Draw captions of held-out rows in random order, with noise, and a diversity set of some of these captions."""
    heldout = np.random.default_rng([seed, 0]).permutation(table.positions(HELDOUT))
    positions = np.resize(heldout, num_samples)
    captions = table.take(positions[: len(heldout)], "caption")
    _, first = np.unique(captions, return_index=True)
    # In order of occurrence, which is random, so that the choice of captions depends on the seed.
    diverse = np.sort(first)[:DIVERSITY_CAPTIONS]
    repeats = DIVERSITY_SAMPLES // len(diverse)
    noise_ids = [*range(num_samples), *(num_samples + j for _ in diverse for j in range(repeats))]
    batches = range(0, len(noise_ids), BATCH)
    return Prompts(
        positions=np.concatenate([positions, positions[diverse].repeat(repeats)]),
        captions=[*np.resize(captions, num_samples).tolist(), *captions[diverse].repeat(repeats).tolist()],
        noise=np.concatenate([pipeline.noise(noise_ids[i : i + BATCH], seed, 0).cpu().numpy() for i in batches]),
        noise_ids=noise_ids,
        seed=seed,
        diversity_group=np.arange(len(diverse)).repeat(repeats),
    )


def encode_captions(pipeline: CoalescerPipeline, captions: Sequence[str]) -> TextEmbeddings:
    """Encode captions for a run's network, every distinct one once."""
    row = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    distinct = list(row)
    parts = [pipeline.encode_prompt(distinct[i : i + BATCH]) for i in range(0, len(distinct), BATCH)]
    return TextEmbeddings(np.concatenate(parts), np.array([row[caption] for caption in captions]))


def sample_prompts(
    pipeline: CoalescerPipeline, prompts: Prompts, text: TextEmbeddings, num_inference_steps: int, advance: Advance
) -> SamplerOutput:
    """Sample all prompts in batches; one more batch before them warms up and is not timed."""

    def sample(batch: slice) -> tuple[Float32[np.ndarray, "B L"], Float32[np.ndarray, "B"], float]:
        embeddings, began = text.batch(batch), clock(pipeline.device)
        x, confidence = pipeline.sample_latents(
            embeddings, prompts.noise_ids[batch], num_inference_steps=num_inference_steps, seed=prompts.seed
        )
        return x, confidence, clock(pipeline.device) - began

    batches = split(len(prompts.captions), BATCH)
    map_batches(sample, batches[:1], pipeline.device)
    with _count_calls(pipeline.network) as calls:
        parts = map_batches(sample, batches, pipeline.device, done=lambda batch: advance(len(prompts.noise_ids[batch])))
    x, confidence, seconds = zip(*parts, strict=True)
    return SamplerOutput(np.concatenate(x), np.concatenate(confidence), sum(seconds), len(calls) / len(batches))


def clock(device: str) -> float:
    """Return seconds that time work: of this thread's processor if a CPU computes, else of the wall."""
    return time.thread_time() if device == "cpu" else time.perf_counter()


def images_at_once(side: int, device: str) -> int:
    """Return how many images of a side to decode at once: the fewer the larger they are on a CPU, for each thread."""
    return DECODE_BATCH if device != "cpu" else max(1, min(DECODE_BATCH, CPU_PIXELS // side**2))


@contextmanager
def _count_calls(network: nn.Module) -> Iterator[list[None]]:
    """Return a list that grows by one with each forward pass of a network."""
    calls: list[None] = []
    hook = network.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()
