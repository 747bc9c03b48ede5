"""Time what an encode run does besides encoding, on 100,000 simulated shards and 20,000 fragments: JSON to stdout.

Shards are empty files. Their checkpoints are written as workers write them; a fifth of them name a fragment, and all
fragments share one data file of four rows. Measured are start, resume, watch, metadata, publish, inspect, append and
prune: seconds, files read, and the growth of resident memory while it ran.

    python tests/bench/many_shards.py --shards 100000 --fragments 20000      # about ten minutes, 2 GB of disk
"""

import argparse
import importlib
import json
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from machine import machine

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from synthetic_tables import _filler  # noqa: E402

from index.report.report import describe  # noqa: E402
from index.space.moments import Moments  # noqa: E402
from index.table.codec import to_json_dict  # noqa: E402
from index.table.lock import hold_lock  # noqa: E402
from index.table.prune import prune  # noqa: E402
from index.table.schema import TRAIN, EncoderRef  # noqa: E402
from index.table.storage import Storage  # noqa: E402
from index.table.table import list_array, open_table  # noqa: E402
from pipeline.beam.layout import Layout  # noqa: E402
from pipeline.beam.write_lance import write_fragments  # noqa: E402
from pipeline.config import EncodeConfig, RuntimeConfig  # noqa: E402
from pipeline.encode.checkpoints import LAYOUT, Checkpoints, ShardCheckpoint, Watch  # noqa: E402
from pipeline.encode.graph import ShardFragments, _PlanLayout  # noqa: E402
from pipeline.encode.job import EncodeJob  # noqa: E402
from pipeline.encode.ledger import shard_identities  # noqa: E402
from pipeline.encode.measured import MeasuredEncoders  # noqa: E402
from pipeline.encode.publish import publish_run, read_outcome  # noqa: E402
from pipeline.encode.resume import begin, remaining_work  # noqa: E402
from pipeline.encode.shard import finished_shard  # noqa: E402

T = TypeVar("T")
LATENT, TEXT, ROWS = (4, 4, 4), 16, 4
CHECKPOINT = re.compile(r"/[0-9a-f]{24}\.json$")
TRIED = 1000


class Meter:
    """Measures operations of this process."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self._process, self._reads = psutil.Process(), Counter[str]()
        read_json = Storage.read_json

        def counted(storage: Storage, uri: str) -> Any:
            self._reads["checkpoints" if CHECKPOINT.search(uri) else "moments" if "moments" in uri else "others"] += 1
            return read_json(storage, uri)

        Storage.read_json = counted  # type: ignore[method-assign]

    def __call__(self, name: str, operation: Callable[[], T], shards: int = 1) -> T:
        """Run an operation and record it; memory is per shard."""
        self._reads.clear()
        before = peak = self._process.memory_info().rss
        stop = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.01):
                peak = max(peak, self._process.memory_info().rss)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        began = time.monotonic()
        result = operation()
        seconds = time.monotonic() - began
        stop.set()
        thread.join()
        self.results[name] = {
            "seconds": round(seconds, 2),
            "memory_bytes_per_shard": round(max(0, peak - before) / shards),
            "read": dict(self._reads),
        }
        print(name, self.results[name], file=sys.stderr, flush=True)
        return result


def make_job(uri: str, shards: list[str], *, append: bool = False) -> EncodeJob:
    """Return a job without encoders."""
    encoder = EncoderRef(name="synthetic", class_name="none", digest="0" * 64)
    config = EncodeConfig(
        shards=tuple(shards),
        image_encoder="synthetic",
        text_encoder="synthetic",
        image_size=8,
        append=append,
        max_reject_rate=1.0,
    )
    encoders = MeasuredEncoders(
        key="", image_ref=encoder, text_ref=encoder, latent_shape=LATENT, text_dim=TEXT, max_tokens=77
    )
    return EncodeJob.create(config, RuntimeConfig(device="cpu"), uri, encoders)


def write_checkpoints(job: EncodeJob, fragments: int) -> None:
    """Write the checkpoints of all shards; `fragments` of them name the same file of four rows."""
    import pyarrow as pa

    rng, schema, shards = np.random.default_rng(0), job.schema, job.config.shards
    text, latent = rng.normal(size=(ROWS, TEXT)), rng.normal(size=(ROWS, int(np.prod(LATENT))))
    values = {"id": [f"{n:032x}" for n in range(ROWS)], "split": [TRAIN] * ROWS}
    values |= {"text": list_array(text), "latent": list_array(latent)}
    columns = {
        name: values[name] if name in values else _filler(schema.field(name).type, ROWS) for name in schema.names
    }
    (fragment,) = write_fragments(
        job.uri, schema, iter(pa.Table.from_pydict(columns, schema=schema).to_batches()), Storage()
    )
    moments = to_json_dict(Moments.of(text, latent))
    every = len(shards) // fragments
    identities = shard_identities(shards, job.read_options)
    for number, (shard, identity) in enumerate(zip(shards, identities, strict=True)):
        has_rows = number % every == 0 and number // every < fragments
        job.checkpoints.save(
            ShardCheckpoint(
                shard,
                identity=identity,
                samples=ROWS,
                rows=ROWS if has_rows else 0,
                complete=True,
                filtered_by_reason={} if has_rows else {"too_small": ROWS},
                seconds_by_step=dict.fromkeys(("read", "decode", "wait", "encode", "write"), 1.234),
                moments=moments if has_rows else None,
                fragments=[fragment] if has_rows else [],
            )
        )


def lay_out(job: EncodeJob) -> None:
    """Plan the layout, and record one file of vectors for all fragments."""
    shards = list(_PlanLayout(job).process(len(job.config.shards)))
    fragments, layout = ShardFragments(job), Layout.read(job.checkpoints.uri(LAYOUT), Storage(), job.uri)
    digest = layout.digest
    (fragment,) = fragments.load(shards[0])
    written = fragments.add_vectors(shards[0], fragment, layout)
    for shard in shards:
        fragments.write_record(shard, digest, [written])


def publish(job: EncodeJob) -> None:
    outcome = read_outcome(job)
    with hold_lock(job.uri, job.runtime.storage, "encode") as lock:
        publish_run(job, outcome, [], lock)


def bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checkpoint_bytes(folder: Path) -> dict[str, int]:
    """Return the size of a checkpoint and of its moments at 4x32x32 latents and text embeddings of 768."""
    rng = np.random.default_rng(0)
    moments = Moments.of(rng.normal(size=(8, 768)).astype(np.float16), rng.normal(size=(8, 4096)).astype(np.float16))
    Checkpoints(str(folder)).save(ShardCheckpoint("s", moments=to_json_dict(moments)))
    sizes = {path.suffix: path.stat().st_size for path in folder.rglob("*.*")}
    return {"checkpoint": sizes[".json"], "moments": sizes.get(".txt", 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--fragments", type=int, default=20_000)
    options = parser.parse_args()
    count, meter = options.shards, Meter()
    for name in ("lance", "lancedb", "apache_beam"):  # what they take is not for the shards
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, uri = folder / "shards", str(folder / "db" / "t.lance")
        source.mkdir()
        shards = [f"{source}/{number:08}.tar" for number in range(count + count // 100)]
        for shard in shards:
            Path(shard).touch()
        first, more = shards[:count], shards[count:]

        work = meter("start: plan", lambda: remaining_work(make_job(uri, first)), count)
        meter("start: begin", lambda: begin(work), count)
        job = work.job
        meter("workers: write checkpoints", lambda: write_checkpoints(job, options.fragments), count)
        run = Path(job.checkpoints.folder)
        sizes = {"plan": (run / "plan.json").stat().st_size, "run folder": bytes_under(run)}
        job = meter("resume: plan", lambda: remaining_work(make_job(uri, first)), count).job
        tried = job.config.shards[:: max(1, count // TRIED)]
        meter("resume: a thousand finished shards", lambda: [finished_shard(job, shard) for shard in tried], TRIED)
        watch = meter("watch: all checkpoints", lambda: _watched(job), count)
        meter("watch: nothing new", lambda: watch.look(job.checkpoints), count)
        meter("metadata, fragments", lambda: lay_out(job), count)
        sizes["records of vectors"] = sum(path.stat().st_size for path in run.glob("*.vectors.json"))
        meter("publish", lambda: publish(job), count)
        sizes["ledger"] = bytes_under(folder / "db" / "t_shards.lance")
        sizes["manifests"] = bytes_under(Path(uri) / "_versions")
        meter("remove the run folder", job.checkpoints.remove)
        meter("open", lambda: open_table(uri))
        meter("inspect", lambda: describe(open_table(uri)), count)

        work = meter("append: plan", lambda: remaining_work(make_job(uri, shards, append=True)), count)
        begin(work)
        job = work.job
        write_checkpoints(job, len(more))
        lay_out(job)
        meter("append: publish", lambda: publish(job), count)
        job.checkpoints.remove()
        meter("prune --dry-run", lambda: prune(open_table(uri), dry_run=True), count)
        meter("prune", lambda: prune(open_table(uri)), count)
        report = {
            "machine": machine(),
            "shards": count,
            "fragments": options.fragments,
            "operations": meter.results,
            "bytes": sizes,
            "bytes_at_4x32x32_and_768": checkpoint_bytes(folder / "wide"),
        }
    print(json.dumps(report, indent=2))


def _watched(job: EncodeJob) -> Watch:
    watch = Watch(job.config.shards)
    watch.look(job.checkpoints)
    return watch


if __name__ == "__main__":
    main()
