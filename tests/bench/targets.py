"""Measure training on targets drawn ahead against searching while training: steps per second and waiting.

For random tables of some numbers of rows, on disk and (the first of them) in an S3 server behind a proxy that delays
each request, one network is trained for some seconds from
  memory   targets held in memory, no search
  online   the table's LanceDB index, searched ahead in background threads, without reuse
  targets  what `draw-targets` has drawn before, one worker
Each time starts after the first 5 steps; `first_step_seconds` is what passes until the first batch is there. Prints
JSON. The S3 server is versitygw ($VERSITYGW), or else moto.

    python tests/bench/targets.py --rows 20000,1000000 --latency-ms 0,20,100
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import machine

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from outages import proxy  # noqa: E402
from synthetic_tables import random_table  # noqa: E402

from index.build.build_index import BuildConfig, build_index  # noqa: E402
from index.search.ann import open_search  # noqa: E402
from index.table.storage import Storage  # noqa: E402
from index.table.table import Table, open_table  # noqa: E402
from index.table.targets import open_targets, targets_folder  # noqa: E402
from pipeline.config import RuntimeConfig  # noqa: E402
from pipeline.targets.draw import DrawConfig, draw_targets  # noqa: E402
from trainer.models.registry import make_network  # noqa: E402
from trainer.objectives.base import Training  # noqa: E402
from trainer.objectives.registry import make_objective  # noqa: E402
from trainer.optimizer import Optimizer  # noqa: E402
from trainer.stream import Batch, NeighborStream, StreamConfig  # noqa: E402

BATCH, WARM_UP = 256, 5
KEYS = ("aws_access_key_id=key", "aws_secret_access_key=secret", "region=us-east-1")


def train(table: Table, size: str, source: Iterable[tuple[int, Batch]], seconds: float) -> dict[str, Any]:
    """Train a network for some seconds; return steps per second and the fraction of the time spent waiting."""
    torch.manual_seed(0)
    network, objective = make_network(table.meta, size=size), make_objective("coalescer", "default")
    optimizer, alone = Optimizer(network, steps=10**6, learning_rate=1e-3), Training(0.0, network)

    def step(batch: Batch) -> None:
        objective.loss(network, batch, alone).total.backward()  # type: ignore[no-untyped-call]
        optimizer.apply_gradients()

    opened = time.perf_counter()
    batches = iter(source)
    step(next(batches)[1])
    first = time.perf_counter() - opened
    for _, batch in itertools.islice(batches, WARM_UP - 1):
        step(batch)
    before, began, steps = getattr(source, "waiting_seconds", 0.0), time.perf_counter(), 0
    while time.perf_counter() - began < seconds and (item := next(batches, None)) is not None:
        step(item[1])
        steps += 1
    took = time.perf_counter() - began
    waited = getattr(source, "waiting_seconds", 0.0) - before
    return {
        "steps_per_second": round(steps / took, 2),
        "waiting_fraction": round(waited / took, 4),
        "first_step_seconds": round(first, 3),
        "steps": steps,
    }


def compare(table: Table, options: argparse.Namespace, requests: Any = None) -> dict[str, Any]:
    """Train on each source in turn."""
    config, targets = (
        StreamConfig(batch_size=BATCH),
        open_targets(f"{targets_folder(table.uri)}/seed0.lance", table.storage),
    )
    stream = NeighborStream(table, targets, config)
    memory = [batch for _, batch in itertools.islice(stream, 8)]
    results: dict[str, Any] = {
        "memory": train(table, options.size, enumerate(itertools.cycle(memory)), options.seconds)
    }
    for name, source in (("online", open_search(table)), ("targets", targets)):
        sent = requests.value if requests is not None else 0
        results[name] = train(table, options.size, NeighborStream(table, source, config), options.seconds)
        if requests is not None:
            steps = results[name]["steps"] + WARM_UP
            results[name]["requests_per_step"] = round((requests.value - sent) / steps, 2)
    return results


def make(folder: Path, rows: int, options: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    """Write a table, index it and draw its targets; return it with what that took."""
    wide = {"text_dim": 32, "latent_dim": 64} if rows <= 100_000 else {"text_dim": 16, "latent_dim": 32}
    table = random_table(
        folder / f"rows{rows}.lance", rows, captions=rows // 10, heldout=rows // 50, fragments=8, **wide
    )
    began = time.perf_counter()
    table = build_index(table, BuildConfig(index_type="ivf_rq")).table
    built = time.perf_counter() - began
    runtime = RuntimeConfig(device="cpu", num_workers=options.num_workers)
    report = draw_targets(table.uri, DrawConfig(images=options.steps * BATCH, batch_size=BATCH), runtime)
    size = sum(path.stat().st_size for path in Path(report["targets"]).rglob("*") if path.is_file())
    return table, {
        "rows": rows,
        **wide,
        "nprobes": table.meta.index and table.meta.index.nprobes,
        "build_index_seconds": round(built, 1),
        "targets": report["images"],
        "targets_per_second": report["targets_per_second"],
        "bytes_per_target": round(size / report["images"], 2),
    }


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run versitygw over a folder, or moto; its bucket is `bucket`."""
    if program := os.environ.get("VERSITYGW"):
        from outage import s3_server as versitygw

        with versitygw(Path(program), folder) as endpoint:
            yield endpoint
        return
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    while not (found := re.search(r"Running on (http://127.0.0.1:\d+)", server.stderr.readline())):
        assert server.poll() is None, "the S3 test server did not start"
    urllib.request.urlopen(urllib.request.Request(f"{found[1]}/bucket", method="PUT")).close()
    with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
        try:
            yield found[1]
        finally:
            server.terminate()
            server.wait()


def delay(upstream: str, seconds: Any, requests: Any, ready: Any) -> None:
    """Run the proxy in a process of its own."""
    with proxy(upstream) as outage:

        def wait(method: str, path: str) -> None:
            with requests.get_lock():
                requests.value += 1
            time.sleep(seconds.value)

        outage.refuse = wait  # type: ignore[assignment]
        ready.put(outage.url)
        while True:
            time.sleep(60)
            outage.requests.clear()


def slow_store(local: Table, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the same table and targets in a store with some latencies."""
    spawn = multiprocessing.get_context("spawn")
    seconds, requests, ready = spawn.Value("d", 0.0), spawn.Value("q", 0), spawn.Queue()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "s3") as endpoint:
        process = spawn.Process(target=delay, args=(endpoint, seconds, requests, ready), daemon=True)
        process.start()
        storage = Storage.of([f"endpoint_url={ready.get()}", *KEYS])
        name = Path(local.uri).stem
        files, path = storage.files(f"s3://bucket/{name}.lance")
        files.put(local.uri, path, recursive=True)
        files.put(targets_folder(local.uri), path.replace(".lance", ".targets"), recursive=True)
        for latency in options.latency_ms:
            seconds.value = latency / 1000
            table = open_table(f"s3://bucket/{name}.lance", version=local.version, indexed=True, storage=storage)
            yield {"latency_ms": latency, **compare(table, options, requests)}
        process.terminate()
        process.join()


def main() -> None:
    """Measure every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = lambda text: [int(each) for each in text.split(",")]  # noqa: E731
    parser.add_argument("--rows", type=integers, default=[20_000, 1_000_000])
    parser.add_argument("--latency-ms", type=integers, default=[0, 20, 100])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--num-workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for rows in options.rows:
            table, made = make(Path(folder), rows, options)
            lines.append(made | {"local": compare(table, options)})
            if options.latency_ms:
                lines[-1]["slow_store"] = list(slow_store(table, options))
    content = {"machine": machine("1 torch thread"), "size": options.size, "batch_size": BATCH, "lines": lines}
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
