"""What an evaluation asks, and the answers of a run and of the search that it was trained to foresee."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int
from torch import nn

from index.search.ann import ExactSearch
from index.table.schema import HELDOUT
from index.table.table import Table
from trainer.sampler import CoalescerPipeline

BATCH = 256
"""Captions that are answered at once."""
FAN, FANS = 256, 32
"""More questions, to see how much answers to one caption differ, and the captions that they are shared out to."""
SEARCH_BYTES = 2**31
"""Memory that the exact search may take; larger tables are read anew for each batch."""


@dataclass(frozen=True, eq=False, slots=True)
class Questions:
    """Captions of held-out rows, each with the number of a random point; the fan comes last."""

    rows: Int[np.ndarray, "Q"]
    """Positions in the table of the rows that captions are taken from; where more are asked than are held out they
    come again, with other points."""
    captions: list[str]
    r: Float32[np.ndarray, "Q L"]
    """Where a run starts."""
    numbers: list[int]
    seed: int
    fan: Int[np.ndarray, "P"]
    """For the last P questions the number of their caption."""

    @property
    def count(self) -> int:
        """N, questions before the fan."""
        return len(self.captions) - len(self.fan)


@dataclass(frozen=True, eq=False, slots=True)
class Answers:
    """Points in coordinates, each for a caption, and others that are grouped by their caption."""

    x: Float32[np.ndarray, "N L"]
    captions: list[str]
    grouped: Float32[np.ndarray, "P L"]
    group: Int[np.ndarray, "P"]

    @classmethod
    def to(cls, questions: Questions, x: Float32[np.ndarray, "Q L"]) -> "Answers":
        """Answers to all questions, in their order."""
        n = questions.count
        return cls(x[:n], questions.captions[:n], x[n:], questions.fan)

    @classmethod
    def rows(cls, x: Float32[np.ndarray, "N L"], captions: list[str]) -> "Answers":
        """Rows of a table, grouped by the captions that they happen to share."""
        return cls(x, captions, x, np.unique(captions, return_inverse=True)[1])


def make_questions(coalescer: CoalescerPipeline, table: Table, samples: int, seed: int) -> Questions:
    """As many as samples are wanted, of held-out rows in a random order."""
    heldout = np.random.default_rng([seed, 0]).permutation(table.positions(HELDOUT))
    rows = np.resize(heldout, samples)
    captions = table.take(rows[: len(heldout)], "caption")
    _, first = np.unique(captions, return_index=True)
    # In the order in which they come, so that a seed asks others.
    fans = np.sort(first)[:FANS]
    each = FAN // len(fans)
    numbers = [*range(samples), *(samples + j for _ in fans for j in range(each))]
    r = [coalescer.noise(numbers[i : i + BATCH], seed, 0).cpu().numpy() for i in range(0, len(numbers), BATCH)]
    return Questions(
        rows=np.concatenate([rows, rows[fans].repeat(each)]),
        captions=[*np.resize(captions, samples).tolist(), *captions[fans].repeat(each).tolist()],
        r=np.concatenate(r),
        numbers=numbers,
        seed=seed,
        fan=np.arange(len(fans)).repeat(each),
    )


class Told:
    """Captions as a network is told them, every one encoded once."""

    def __init__(self, coalescer: CoalescerPipeline, captions: Sequence[str]) -> None:
        """Encode them."""
        each = list(dict.fromkeys(captions))
        parts = [coalescer.encode_prompt(each[i : i + BATCH]) for i in range(0, len(each), BATCH)]
        self._text, self._place = np.concatenate(parts), {caption: i for i, caption in enumerate(each)}

    def __call__(self, captions: Sequence[str]) -> Float32[np.ndarray, "B K T"]:
        """Those of a batch."""
        return self._text[[self._place[caption] for caption in captions]]


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """What a run has answered, and what that took."""

    x: Float32[np.ndarray, "Q L"]
    confidence: Float32[np.ndarray, "Q"]
    seconds: float
    """For all of them, captions already encoded, nothing decoded."""
    evaluations: float
    """Of the network, per picture."""


def sample(
    coalescer: CoalescerPipeline, questions: Questions, told: Told, steps: int, advance: Callable[[int], object]
) -> Sampled:
    """Let a run answer, a batch at a time; a first batch that is not counted warms it up."""
    parts, seconds = [], 0.0
    asked = range(0, len(questions.captions), BATCH)
    with _counted(coalescer.network) as calls:
        for start in (0, *asked):
            batch = slice(start, start + BATCH)
            text = told(questions.captions[batch])
            began = time.perf_counter()
            part = coalescer.sample_latents(
                text, questions.numbers[batch], num_inference_steps=steps, seed=questions.seed
            )
            seconds += time.perf_counter() - began
            parts.append(part)
            if len(parts) == 1:
                seconds = 0.0
            else:
                advance(len(text))
    x, confidence = (np.concatenate(each) for each in zip(*parts[1:], strict=True))
    return Sampled(x, confidence, seconds, calls[0] / len(parts))


def retrieve(table: Table, questions: Questions) -> Float32[np.ndarray, "Q L"]:
    """The pairs of all questions, exactly searched, in coordinates."""
    geometry, neighbors = table.meta.geometry, ExactSearch(table, memory=SEARCH_BYTES)
    text = table.take(questions.rows, "text").astype(np.float32)
    queries = geometry.queries(text, questions.r)
    found = [neighbors.nearest(queries[i : i + 4096]).latent[:, 0] for i in range(0, len(queries), 4096)]
    return geometry.to_coordinates(np.concatenate(found))


@contextmanager
def _counted(network: nn.Module) -> Iterator[list[int]]:
    """Count how often a network is evaluated."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    hook = network.register_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()
