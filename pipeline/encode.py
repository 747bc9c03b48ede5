"""Encode image-caption shards into a table: plan the run, put it on Beam, watch it, report it.

Running the same command again goes on where it was stopped, shard by shard; on a finished table it does nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import index.errors
from index.console import Progress, write_json
from index.errors import SourceError, TableError
from index.geometry import check_desc_scale
from index.table import Table, is_table, open_table, reports_of, table_uri
from pipeline.rows import EncodeConfig, EncodeJob, RunConfig, open_encoders
from pipeline.sink import ShardPart, WriteLance, finished_part, rows_begun
from pipeline.sources import Broken, list_shards, read_samples


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """The table that came out, and the report of the run; `done_before` where there was nothing to do."""

    table: Table | None
    """None after a dry run."""
    report: dict[str, Any]
    done_before: bool = False


def plan_encode(sources: list[str], config: dict[str, Any]) -> EncodeConfig:
    """The config for some sources and options; the sources are listed now."""
    check_desc_scale(config.get("desc_scale", 4.0), allow_small=config.get("allow_small_desc_scale", False))
    return EncodeConfig(shards=tuple(list_shards(sources)), **config)


def encode(config: EncodeConfig, run: RunConfig, table: str, *, dry_run: bool = False) -> Encoded:
    """Encode all shards and publish the table; goes on where an earlier run of the same config stopped.

    A dry run checks sources, encoders and target, reports the plan, and writes nothing.
    """
    uri = table_uri(table)
    takes = _takes(config)
    image, text = open_encoders(config.image_encoder, config.text_encoder, run.device)
    blank = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    settings = {**asdict(config), "image_digest": image.ref.digest, "text_digest": text.ref.digest}
    # A run that stopped for too many rejects goes on when more are allowed, so that limit is no part of its identity.
    identity = {name: value for name, value in settings.items() if name != "max_reject_share"}
    job = EncodeJob(
        config=config,
        run=run,
        image_ref=image.ref,
        text_ref=text.ref,
        latent_shape=image.encode(blank).shape[1:],
        text_width=text.encode(["a"]).shape[1],
        run_id=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        takes=takes,
    )
    report_path = reports_of(uri) / "encode.json"
    marks = uri.removesuffix(".lance") + f".encode/{job.run_id}"
    done_before = is_table(uri) and job.run_id in open_table(uri).meta.run_ids
    if is_table(uri) and not done_before:
        raise TableError(f"{table} exists{_changes(report_path, settings)}: name another --table, or delete it first")
    if dry_run:
        plan = {"shards": len(config.shards), "latent_shape": list(job.latent_shape), "text_width": job.text_width}
        return Encoded(None, plan)
    began = time.monotonic()
    if not done_before:
        _run_beam(job, uri, marks)
    # A run that was stopped between its commit and its report still has its marks.
    if Path(marks).exists():
        parts = [part for shard in config.shards if (part := finished_part(marks, shard)) is not None]
        seconds = None if done_before else time.monotonic() - began
        report = _report(job, parts, seconds) | {"table": uri, "settings": settings}
        write_json(report_path, report)
        shutil.rmtree(Path(marks).parent)
    return Encoded(open_table(uri), json.loads(report_path.read_text()), done_before)


def _takes(config: EncodeConfig) -> dict[str, int]:
    """How many samples to read of each shard, so that all together are the first `limit`; SourceError where none is."""
    left = 1 if config.limit is None else config.limit
    takes = dict.fromkeys(config.shards, 0)
    for shard in config.shards:
        for sample in read_samples(shard):
            takes[shard] += not isinstance(sample, Broken)
            left -= not isinstance(sample, Broken)
            if left == 0:
                return {} if config.limit is None else takes
    if not any(takes.values()):
        raise SourceError(
            f"no samples in {len(config.shards)} shards ({config.shards[0]} ...): is the source complete?"
        )
    return takes


def _changes(report_path: Path, settings: dict[str, Any]) -> str:
    if not report_path.exists():
        return " and was written by other means"
    before = json.loads(report_path.read_text())["settings"]
    changed = [name for name, value in json.loads(json.dumps(settings)).items() if before.get(name) != value]
    return f" and was encoded with another {', '.join(changed)}"


def _run_beam(job: EncodeJob, uri: str, marks: str) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    outcome = Path(marks) / "outcome.json"
    outcome.unlink(missing_ok=True)
    shards = list(job.config.shards)
    options = ["--runner=FnApiRunner"]
    if job.run.workers > 1:
        options += [f"--direct_num_workers={job.run.workers}", "--direct_running_mode=multi_processing"]
    options += job.run.beam_options  # the last of equal options counts
    reports = reports_of(uri)
    with _worker_output(reports / "encode.workers.log"), _watching(marks, shards, reports / "encode.jsonl"):
        pipeline = beam.Pipeline(options=PipelineOptions(options))
        pipeline | "Shards" >> beam.Create(shards) | WriteLance(uri, job, marks, job.run_id)
        pipeline.run().wait_until_finish()
    result = json.loads(outcome.read_text())
    if "error" in result:
        raise getattr(index.errors, result["error"])(result["text"])


@contextlib.contextmanager
def _worker_output(path: Path) -> Iterator[None]:
    """Send what Beam and its worker processes say to a file; this process keeps the terminal for its progress.

    Workers inherit descriptor 2, so it is the descriptor that moves, not `sys.stderr`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    with os.fdopen(os.dup(2), "w", buffering=1) as terminal, path.open("ab") as log:
        os.dup2(log.fileno(), 2)
        shown, sys.stderr = sys.stderr, terminal if sys.stderr is sys.__stderr__ else sys.stderr
        try:
            yield
        finally:
            sys.stderr = shown
            os.dup2(terminal.fileno(), 2)


@contextlib.contextmanager
def _watching(marks: str, shards: list[str], log: Path) -> Iterator[None]:
    """Show progress by the marks that shards leave, whatever process or machine writes them.

    How many images there are is not known before the end; the finished shards' mean stands in for the others.
    """
    finished: dict[str, ShardPart] = {}

    def look() -> int:
        """Read what is new; returns the samples done so far."""
        for shard in shards:
            part = None if shard in finished else finished_part(marks, shard)
            if part is not None:
                finished[shard] = replace(part, summary={})
        under_way = sum(rows_begun(marks, shard) for shard in shards if shard not in finished)
        return sum(part.rows + part.rejected for part in finished.values()) + under_way

    with Progress("encode", total=None, unit="images", log=log, done=look()) as bar:
        stop = threading.Event()

        def show() -> None:
            done = look()
            if finished:
                mean = sum(part.rows + part.rejected for part in finished.values()) / len(finished)
                bar.expect(max(done, round(mean * len(shards))))
            rejects = sum(part.rejected for part in finished.values())
            bar.advance(done - bar.done, shards=f"{len(finished)}/{len(shards)}", rejects=rejects)

        def follow() -> None:
            while not stop.wait(0.5):
                show()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            show()


def _report(job: EncodeJob, parts: list[ShardPart], seconds: float | None) -> dict[str, Any]:
    """What was done, and how fast where `seconds` were measured from the first shard to the commit."""
    spent = dict(sum((Counter(part.summary["seconds"]) for part in parts), Counter()))
    rows = sum(part.rows for part in parts)
    return {
        "rows": rows,
        "rejects": sum(part.rejected for part in parts),
        "rejects_by_reason": dict(sum((Counter(part.summary["reasons"]) for part in parts), Counter())),
        "shards": len(parts),
        "seconds": seconds and round(seconds, 2),
        "images_per_second": seconds and round(rows / seconds, 1),
        "seconds_by_step": {name: round(value, 2) for name, value in spent.items()},
        "image_encoder": asdict(job.image_ref),
        "text_encoder": asdict(job.text_ref),
        "latent_shape": list(job.latent_shape),
        "text_width": job.text_width,
        "run_id": job.run_id,
        "workers": job.run.workers,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("apache-beam", "torch", "diffusers", "transformers", "pylance", "pyarrow")
        },
    }
