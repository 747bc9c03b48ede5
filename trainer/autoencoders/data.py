"""The images or captions of a source in windows that fit into memory, split as `pipeline encode` splits them.

A source is read from its first shard to its last, and again, in windows of a bounded number of samples; training draws
from one window at a time, in an order of its own, while the next one is read. A small source is a single window, which
is kept. Where a window begins is a position of a few integers: whoever resumes there gets the same windows. The shards
are read in an order that the seed decides; with a limit in their own, so that it is the first samples that are read.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from index.background import prefetch
from index.errors import SourceError
from index.table.schema import HELDOUT, TRAIN, content_hash, split_of
from index.terminal import Progress, print_status
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected
from pipeline.sources.read import read_samples
from pipeline.sources.sample import ReadOptions, Sample, decode_caption

T = TypeVar("T")
Pixels = UInt8[np.ndarray, "H W 3"]

MAX_BYTES = 2**29
"""Memory for the samples of a window; up to four are held: the first, that in use, and two that were read ahead."""
MIN_SAMPLES = 10_000
"""That a window may hold, however few are drawn: some of them are held out to measure on."""
CAPTION_BYTES = 512
"""Memory that a caption is expected to take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a window begins."""

    epoch: int = 0
    shard: int = 0
    """In the order of reading."""
    sample: int = 0
    """Samples of the shard before it."""
    valid: int = 0
    """Valid samples of the epoch before it."""
    distinct: int = 0
    """Training samples of the first epoch before it; in later epochs all of them."""


@dataclass(frozen=True, slots=True)
class Window(Generic[T]):
    """Some consecutive samples of a source, and where the next ones begin."""

    train: list[T]
    heldout: list[T]
    begin: Position
    end: Position

    @property
    def is_whole(self) -> bool:
        """Return whether there are no other samples."""
        return self.end.epoch > self.begin.epoch and (self.begin.shard, self.begin.sample) == (0, 0)


@dataclass(frozen=True, kw_only=True)
class Samples(Generic[T]):
    """The valid samples of some shards."""

    kind: str
    """Plural noun of them."""
    shards: Sequence[str]
    decode: Callable[[Sample], tuple[T, bytes]]
    """Returns a sample and what decides its split; raises Rejected if it is not valid."""
    window: int
    """Valid samples of a window."""
    val_fraction: float
    distinct: bool = False
    """Whether equal samples of a window count as one."""
    limit: int | None = None
    seed: int = 0
    options: ReadOptions = field(default_factory=ReadOptions)
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Shards that cannot be read."""

    def read_first(self) -> Window[T]:
        """Read the first window. Raises SourceError if there are no training samples in it."""
        quiet_pillow()
        with Progress(f"read {self.kind}", total=None, unit=self.kind) as bar:
            window = self.read(Position(), bar.advance)
        if not window.train:
            raise SourceError(f"no training {self.kind} in the source: use shards that hold {self.kind}")
        return window

    def read(self, begin: Position, advance: Callable[[], object] = lambda: None) -> Window[T]:
        """Read the window that begins at a position; `advance` is called for each valid sample."""
        splits: dict[str, list[T]] = {TRAIN: [], HELDOUT: []}
        end, valid = Position(epoch=begin.epoch + 1), 0
        for after, sample in self._samples(begin):
            try:
                item, key = self.decode(sample)
            except Rejected:
                continue
            splits[split_of(key, self.val_fraction)].append(item)
            valid += 1
            advance()
            if begin.valid + valid == self.limit:
                break
            if valid == self.window:
                end = replace(after, valid=begin.valid + valid)
                break
        train, heldout = (list(dict.fromkeys(each)) if self.distinct else each for each in splits.values())
        return Window(train, heldout, begin, replace(end, distinct=begin.distinct + len(train) * (begin.epoch == 0)))

    def read_from(self, first: Window[T], begin: Position) -> Iterator[Window[T]]:
        """Yield the windows from a position on, for ever; a source of one window is not read again.

        Raises SourceError if there are no training samples any more.
        """
        last = begin.epoch
        while not first.is_whole:
            window = first if begin == first.begin else self.read(begin)
            last = window.end.epoch if window.train else last
            if window.end.epoch > last + 1:
                raise SourceError(f"the {self.kind} of the source are gone: bring them back and resume")
            yield window
            begin = window.end
        while True:
            yield first

    def _samples(self, begin: Position) -> Iterator[tuple[Position, Sample]]:
        """Yield the readable samples of an epoch with the position after each; warn of shards that cannot be read."""
        order = np.arange(len(self.shards))
        if self.limit is None:
            order = np.random.default_rng(self.seed).permutation(len(self.shards))
        for shard in range(begin.shard, len(order)):
            skipped = begin.sample if shard == begin.shard else 0
            for number, sample in enumerate(read_samples(self.shards[order[shard]], self.options)):
                if isinstance(sample, Sample):
                    if number >= skipped:
                        yield replace(begin, shard=shard, sample=number + 1), sample
                elif not sample.key and sample.shard not in self._warned:
                    self._warned.add(sample.shard)
                    print_status(f"warning: {sample.shard} is left out from here on ({sample.detail})")


class Batches(Generic[T]):
    """Batches of a source's training samples by step: each window is drawn whole, in random order, then the next one.

    What a step draws depends on the source, the seed and the step alone.
    """

    def __init__(self, samples: Samples[T], *, batch_size: int, steps: int, seed: int) -> None:
        """Read the first window."""
        self.samples, self.first = samples, samples.read_first()
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.waiting_seconds = 0.0
        self._window, self._start = self.first, 0

    def position(self, step: int) -> dict[str, int]:
        """Return where the batch of a step is: in the present window or in the next one."""
        start, place = self._start, self._window.begin
        if step >= start + self._steps_of(self._window):
            start, place = start + self._steps_of(self._window), self._window.end
        return {"step": start, "seen": self._window.end.distinct, **asdict(place)}

    def read(self, step: int, position: dict[str, int]) -> Iterator[tuple[int, list[T]]]:
        """Yield (step, batch) from a step on, whose window begins at what `position` returned for it."""
        start = position.get("step", 0)
        begin = Position(**{name: value for name, value in position.items() if name not in ("step", "seen")})
        with closing(prefetch(self._windows(start, begin), 1)) as windows:
            while True:
                waited = time.monotonic()
                self._start, self._window = next(windows, (self.steps, self._window))
                self.waiting_seconds += time.monotonic() - waited
                if self._start >= self.steps:
                    return
                train, end = self._window.train, self._start + self._steps_of(self._window)
                order = np.random.default_rng([self.seed, self._start]).permutation(len(train))
                for number in range(max(step, self._start), min(end, self.steps)):
                    first = (number - self._start) * self.batch_size
                    # The last batch of a window is filled up with samples of its first.
                    chosen = order[np.arange(first, first + self.batch_size) % len(order)]
                    yield number, [train[i] for i in chosen]

    def _windows(self, start: int, begin: Position) -> Iterator[tuple[int, Window[T]]]:
        """Yield the windows from a position on until the last step, each with the step that it begins with."""
        for window in self.samples.read_from(self.first, begin):
            if start >= self.steps:
                return
            if window.train:
                yield start, window
            start += self._steps_of(window)

    def _steps_of(self, window: Window[T]) -> int:
        return -(-len(window.train) // self.batch_size)


def window_of(item_bytes: int, drawn: int) -> int:
    """Return how many samples a window holds: as many as fit into memory, but not many more than training draws."""
    return max(1, min(MAX_BYTES // item_bytes, max(drawn, MIN_SAMPLES)))


def decode_pixels(sample: Sample, image_size: int) -> tuple[Pixels, bytes]:
    """Return a sample's image, and the hash by which a table of the same `val_fraction` splits it; raises Rejected."""
    return decode_image(sample.image, image_size).pixels, content_hash(sample.image or b"")


def decode_text(sample: Sample) -> tuple[str, bytes]:
    """Return a sample's caption, and a hash that puts equal captions into one split; raises Rejected."""
    caption = decode_caption(sample.caption)
    return caption, content_hash(caption.encode())
