"""Encode one shard: read and decode its samples ahead, encode them in batches, write rows and rejects.

Every sample becomes a row, is counted as filtered, goes to the rejects table with a reason, or is counted as already
present in the table that is appended to, which is found out before it is decoded. Reading and decoding run in threads
while the encoders work on the batch before.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, UInt8

from index.background import prefetch
from index.space.moments import Moments
from index.table.codec import to_json_dict
from index.table.schema import REJECTS, TRAIN, content_hash, sample_id, split_of
from index.table.storage import is_local
from index.table.table import list_array, rejects_uri
from pipeline.beam.write_lance import write_fragments
from pipeline.encode.checkpoints import ShardCheckpoint
from pipeline.encode.job import EncodeJob
from pipeline.encode.ledger import content_identity, identity_to_read
from pipeline.encode.present import PresentRows
from pipeline.filters import Filtered, FilterReason, Filters
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Sample, Unreadable, decode_caption, decode_meta

PREFETCHED_BATCHES = 2
MAX_DETAIL = 500
"""Characters of a reject's detail."""


def write_shard(job: EncodeJob, shard: str, duplicates: frozenset[int] = frozenset()) -> ShardCheckpoint:
    """Encode one shard to files that no commit refers to yet, and save its checkpoint.

    `duplicates` are the positions of samples in the shard that --dedup excludes. Raises OutOfReachError if the shard
    stays out of reach.
    """
    identity = identity_to_read(shard, job.reading(shard))
    encoder, storage = ShardEncoder(job, shard, duplicates=duplicates), job.runtime.storage
    interval = 0.5 if is_local(job.uri) else 5.0
    saved_at = compute_seconds = 0.0
    start = time.perf_counter()

    # Lance pulls this generator in its own thread, where Beam's metrics would be lost: time and progress are kept here.
    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal saved_at, compute_seconds
        resumed = time.perf_counter()
        for batch in encoder.batches():
            if time.perf_counter() - saved_at > interval:
                job.checkpoints.save_progress(shard, encoder.samples)
                saved_at = time.perf_counter()
            compute_seconds += time.perf_counter() - resumed
            yield batch
            resumed = time.perf_counter()
        compute_seconds += time.perf_counter() - resumed

    fragments = write_fragments(job.uri, job.schema, batches(), storage)
    write_seconds = time.perf_counter() - start - compute_seconds
    rejects = pa.RecordBatch.from_pylist(encoder.rejects, schema=REJECTS)
    checkpoint = ShardCheckpoint(
        shard,
        identity=identity,
        device=encoder.image_encoder.device,
        samples=encoder.samples_read,
        rows=encoder.rows,
        already_present=encoder.already_present,
        complete=encoder.complete,
        truncated_captions=encoder.truncated_captions,
        rejects_by_reason=encoder.rejects_by_reason,
        reject_example=_describe(encoder.rejects[0]) if encoder.rejects else "",
        unused_captions=encoder.unused_captions,
        uncounted=encoder.uncounted,
        filtered_by_reason=encoder.filtered_by_reason,
        seconds_by_step={k: round(value, 3) for k, value in {**encoder.seconds, "write": write_seconds}.items()},
        moments=to_json_dict(encoder.moments) if encoder.moments else None,
        fragments=fragments,
        reject_fragments=write_fragments(rejects_uri(job.uri), REJECTS, iter([rejects]), storage),
    )
    checkpoint.check()
    job.checkpoints.save(checkpoint)
    return checkpoint


def finished_shard(job: EncodeJob, shard: str) -> ShardCheckpoint | None:
    """Return the checkpoint of a shard if it still holds: the shard has not changed since, and its files exist."""
    checkpoint, storage = job.checkpoints.load(shard, moments=True), job.runtime.storage
    if checkpoint is None or content_identity(shard, job.read_options) not in ("", checkpoint.identity):
        return None
    written = {job.uri: checkpoint.fragments, rejects_uri(job.uri): checkpoint.reject_fragments}
    paths = [
        f"{uri}/data/{file['path']}"
        for uri, fragments in written.items()
        for fragment in fragments
        for file in fragment["files"]
    ]
    return checkpoint if all(storage.exists(path) for path in paths) else None


class _AlreadyPresent:
    """What becomes of a sample that the table has."""


@dataclass(slots=True)
class _DecodedSample:
    """A sample that is ready to be encoded."""

    sample: Sample
    row_id: str
    image_hash: bytes
    caption: str
    pixels: UInt8[np.ndarray, "H W 3"]
    width: int
    height: int


@dataclass(slots=True)
class _Reject:
    """A row of the rejects table, and the number of samples that it stands for; None if that is unknown."""

    row: dict[str, str]
    count: int | None = 1


@dataclass(slots=True)
class _DecodedBatch:
    """Samples to encode together, and those that were rejected or filtered among them."""

    samples: list[_DecodedSample]
    rejects: list[_Reject] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    already_present: int = 0


class ShardEncoder:
    """Turns the samples of one shard into record batches. Counts are complete once `batches` is exhausted."""

    def __init__(
        self,
        job: EncodeJob,
        shard: str,
        *,
        max_samples: int | None = None,
        duplicates: frozenset[int] = frozenset(),
    ) -> None:
        """Load the encoders; nothing is read before `batches`. `max_samples` defaults to the job's own limit."""
        self.job, self.shard = job, shard
        self.max_samples = job.samples_per_shard.get(shard) if max_samples is None else max_samples
        self.duplicates = duplicates
        self.image_encoder, self.text_encoder = job.load_encoders()
        self.present = None if job.base is None else PresentRows(job.uri, job.run_id, job.runtime.storage)
        self.samples_read = 0
        self.complete = False
        """Whether the shard was read to its end."""
        self.rows = self.truncated_captions = 0
        self.already_present = 0
        self.rejects: list[dict[str, str]] = []
        self.rejected: Counter[str] = Counter()
        self.uncounted = 0
        """Rejects that stand for an unknown number of samples, and count as one."""
        self.unused_captions = 0
        self.filtered: Counter[str] = Counter()
        self.moments: Moments | None = None
        """Of the training rows."""
        self.seconds = dict.fromkeys(("read", "decode", "wait", "encode"), 0.0)
        """By step. Reading and decoding run while the encoders work; `wait` is how long encoding waited for them."""

    @property
    def samples(self) -> int:
        """Number of samples of which the outcome is known so far."""
        return self.rows + self.rejected.total() + self.filtered.total() + self.already_present

    @property
    def rejects_by_reason(self) -> dict[str, int]:
        """Number of rejected samples for each reason."""
        return dict(self.rejected)

    @property
    def filtered_by_reason(self) -> dict[str, int]:
        """Number of filtered samples for each reason."""
        return {str(reason): count for reason, count in self.filtered.items()}

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the shard's rows in the order of its samples."""
        quiet_pillow(self.job.config.filters.max_pixels)
        start = time.perf_counter()
        for decoded in prefetch(self._decode_batches(), PREFETCHED_BATCHES):
            self.seconds["wait"] += time.perf_counter() - start
            self._add_rejects(decoded.rejects)
            self.filtered += decoded.filtered
            self.already_present += decoded.already_present
            if decoded.samples:
                batch = self._encode(decoded.samples)
                self.rows += len(batch)
                yield batch
            start = time.perf_counter()

    def _decode_batches(self) -> Iterator[_DecodedBatch]:
        runtime, size = self.job.runtime, self.job.runtime.batch_size
        source = read_samples(self.shard, self.job.reading(self.shard))
        samples = enumerate(islice(source, self.max_samples))
        batch, is_damaged = _DecodedBatch([]), False
        with ThreadPoolExecutor(runtime.decode_threads, thread_name_prefix="decode") as pool:
            while True:
                start = time.perf_counter()
                chunk = list(islice(samples, size))
                self.seconds["read"] += time.perf_counter() - start
                if not chunk:
                    break
                is_damaged = is_damaged or any(not sample.key for _, sample in chunk)
                start = time.perf_counter()
                for (_, sample), outcome in zip(chunk, pool.map(self._decode, chunk), strict=True):
                    count = sample.count if isinstance(sample, Unreadable) else 1
                    self.samples_read += count or 1
                    if isinstance(outcome, _DecodedSample):
                        batch.samples.append(outcome)
                    elif isinstance(outcome, Filtered):
                        batch.filtered[outcome.reason] += 1
                    elif isinstance(outcome, _AlreadyPresent):
                        batch.already_present += 1
                    else:
                        batch.rejects.append(_Reject(_reject_row(sample, outcome), count))
                self.seconds["decode"] += time.perf_counter() - start
                if len(batch.samples) >= size:
                    samples_left = batch.samples[size:]
                    batch.samples = batch.samples[:size]
                    yield batch
                    batch = _DecodedBatch(samples_left)
        self.complete = not is_damaged and (self.max_samples is None or next(source, None) is None)
        yield batch

    def _decode(
        self, element: tuple[int, Sample | Unreadable]
    ) -> _DecodedSample | Rejected | Filtered | _AlreadyPresent:
        position, sample = element
        if isinstance(sample, Unreadable):
            return Rejected(sample.reason, sample.detail)
        config = self.job.config
        try:
            caption = valid_caption(sample, config.filters)
            image_bytes = sample.image or b""
            image_hash = content_hash(image_bytes)
            row_id = sample_id(sample.key, image_bytes, caption if self.job.has_image_hash else None)
            if image_bytes and self._is_present(sample, row_id, image_hash, caption):
                return _AlreadyPresent()
            if position in self.duplicates or (image_bytes and self._is_copy_of_a_row(image_hash, caption)):
                return Filtered(FilterReason.DUPLICATE)
            filters = config.filters
            image = decode_image(sample.image, config.image_size, filters.check_size, filters.max_pixels)
        except (Rejected, Filtered) as outcome:
            return outcome
        return _DecodedSample(sample, row_id, image_hash, caption, image.pixels, image.width, image.height)

    def _is_present(self, sample: Sample, row_id: str, image_hash: bytes, caption: str) -> bool:
        """Return whether the table has the sample: by its id, or by image and caption if it has no key of its own."""
        if self.present is None:
            return False
        compares_pairs = not sample.has_own_key and self.job.can_hash_images
        return self.present.has_id(row_id) or (compares_pairs and self.present.has_pair(image_hash, caption))

    def _is_copy_of_a_row(self, image_hash: bytes, caption: str) -> bool:
        dedup = self.job.config.filters.dedup
        if self.present is None or dedup is None:
            return False
        return self.present.has_image(image_hash) if dedup == "image" else self.present.has_pair(image_hash, caption)

    def _add_rejects(self, rejects: list[_Reject]) -> None:
        """Add rejects; those that the rejects table has, because the shard is read again, are only counted."""
        for reject in rejects:
            if self.present is not None and self.present.has_reject(reject.row):
                self.already_present += reject.count or 1
                continue
            self.rejects.append(reject.row)
            self.rejected[reject.row["reason"]] += reject.count or 1
            self.uncounted += reject.count is None

    def _encode(self, samples: list[_DecodedSample]) -> pa.RecordBatch:
        start = time.perf_counter()
        latent = self.image_encoder.encode(np.stack([each.pixels for each in samples])).reshape(len(samples), -1)
        text, truncated = self.text_encoder.encode_counted([each.caption for each in samples])
        with np.errstate(over="ignore"):
            latent, text = latent.astype(np.float16), text.astype(np.float16)
        valid = np.ones(len(samples), bool)
        for row, each in enumerate(samples):
            fault = _fault(latent[row], RejectReason.BAD_LATENT) or _fault(text[row], RejectReason.BAD_EMBEDDING)
            if fault is not None:
                self._add_rejects([_Reject(_reject_row(each.sample, fault))])
                valid[row] = False
        self.unused_captions += sum(each.sample.unused_captions for each in samples)
        self.truncated_captions += int((truncated & valid).sum())
        kept = [each for each, is_valid in zip(samples, valid, strict=True) if is_valid]
        batch = self._record_batch(kept, text[valid], latent[valid])
        self.seconds["encode"] += time.perf_counter() - start
        return batch

    def _record_batch(
        self, samples: list[_DecodedSample], text: Float16[np.ndarray, "B T"], latent: Float16[np.ndarray, "B L"]
    ) -> pa.RecordBatch:
        # Tables without image hashes are split by id.
        split_by = [each.image_hash if self.job.has_image_hash else bytes.fromhex(each.row_id) for each in samples]
        splits = [split_of(each, self.job.config.val_fraction) for each in split_by]
        # Of the float16 values, so that they can be recomputed from the table.
        train = np.array(splits) == TRAIN
        if train.any():
            moments = Moments.of(text[train], latent[train])
            self.moments = moments if self.moments is None else self.moments + moments
        columns: dict[str, Any] = {
            "id": [each.row_id for each in samples],
            "caption": [each.caption for each in samples],
            "key": [each.sample.key for each in samples],
            "shard": [each.sample.shard for each in samples],
            "split": splits,
            "image_hash": [each.image_hash for each in samples],
            "width": [each.width for each in samples],
            "height": [each.height for each in samples],
            "meta": [each.sample.meta.decode() for each in samples],
            "image": [each.sample.image for each in samples],
            "text": list_array(text),
            "latent": list_array(latent),
        }
        schema = self.job.schema
        return pa.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema=schema)


def valid_caption(sample: Sample, filters: Filters) -> str:
    """Return a sample's caption.

    Raises Rejected if its caption or metadata is invalid, Filtered if a filter on either excludes it.
    """
    caption = decode_caption(sample.caption, sample.note)
    fields = decode_meta(sample.meta)
    filters.check_caption(caption)
    filters.check_meta(fields, caption)
    return caption


def _fault(encoded: Float16[np.ndarray, "D"], reason: RejectReason) -> Rejected | None:
    """Return why an encoder's output cannot be stored, or None if it can."""
    if not np.isfinite(encoded).all():
        return Rejected(reason, "not finite in float16")
    return None if encoded.any() else Rejected(reason, "all zero")


def _describe(reject: dict[str, str]) -> str:
    return f"{reject['key'] or 'the end'} of {reject['shard']}: {reject['reason']}, {reject['detail']}"


def _reject_row(sample: Sample | Unreadable, rejected: Rejected) -> dict[str, str]:
    return {
        "key": sample.key,
        "shard": sample.shard,
        "reason": str(rejected.reason),
        "detail": rejected.detail[:MAX_DETAIL],
    }
