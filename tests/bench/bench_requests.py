"""Count the requests to an object store of each command, as the fragments of a table grow and its rows do not.

A table of 960 rows is encoded from 1, 4 and 16 shards, and each command runs as a process of its own. Requests are
counted by the proxy of tests/outages.py, which also delays each of them by --latency milliseconds. The server is
versitygw ($VERSITYGW). JSON goes to stdout.

    python tests/bench/bench_requests.py --latency 0 100      # about twelve minutes on two cores
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from machine import machine
from outage import KEYS, ROOT, make_encoders, s3_server

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from outages import Outage, proxy  # noqa: E402

SAMPLES, APPENDED = 960, 480
COMMANDS = ("encode", "inspect", "build-index", "fit", "sample", "evaluate", "append", "inspect more", "index more")
PLACES = (
    ("checkpoints", r"\.encode"),
    ("locks", r"\.lock"),
    ("reports", r"\.reports"),
    ("ledger, rejects", r"_(shards|rejects)\.lance"),
    ("data files", r"\.lance/data"),
    ("index files", r"\.lance/_indices"),
    ("manifests", r"\.lance"),
    ("shards", r"/s\d+/"),
)


def place(path: str) -> str:
    """Return what the path or listing of a request is about."""
    path = path.replace("%2F", "/")
    return next((name for name, pattern in PLACES if re.search(pattern, path)), "others")


def arguments(name: str, fragments: int, work: Path, encoders: list[str]) -> tuple[str, list[str]]:
    """Return the package and the arguments of a command."""
    table, run, source = f"s3://bucket/t{fragments}/t.lance", str(work / f"run{fragments}"), f"s3://bucket/s{fragments}"
    encode = ["--table", table, "--device", "cpu", "--val-fraction", "0.2", *encoders]
    index = ["--index-type", "ivf_rq", "--target-recall", "0.9"]
    fit = [table, "--out", run, "--images", "2000", "--batch-size", "100", "--size", "tiny", "--device", "cpu"]
    return {
        "encode": ("pipeline", ["encode", f"{source}/first", *encode]),
        "append": ("pipeline", ["encode", f"{source}/more", "--append", *encode]),
        "inspect": ("pipeline", ["inspect", table, "--json"]),
        "inspect more": ("pipeline", ["inspect", table, "--json"]),
        "build-index": ("pipeline", ["build-index", table, *index]),
        "index more": ("pipeline", ["build-index", table, *index]),
        "fit": ("trainer", ["fit", *fit]),
        "sample": ("trainer", ["sample", run, "a red circle", "--out", f"{run}.png", "--device", "cpu"]),
        "evaluate": (
            "trainer",
            ["evaluate", run, "--num-inference-steps", "2", "--num-samples", "200", "--device", "cpu"],
        ),
    }[name]


def execute(name: str, fragments: int, work: Path, encoders: list[str], store: Outage) -> dict[str, Any]:
    """Run a command in a process of its own; return its requests, seconds and bytes read."""
    package, command = arguments(name, fragments, work, encoders)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if name != "sample":  # it needs no table
        command += [f"--storage-option={option}" for option in (f"endpoint={store.url}", *KEYS)]
    store.requests.clear()
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", f"from {package}.cli import main; main()", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, f"{name}: {run.stderr[-3000:]}"
    counts = Counter(f"{method} {place(path)}" for method, path in store.requests)
    return {
        "command": name,
        "fragments": fragments,
        "requests": counts.total(),
        "seconds": round(time.monotonic() - began, 1),
        "by_kind": dict(counts.most_common()),
    }


def summary(runs: list[dict[str, Any]], fragments: list[int]) -> dict[str, Any]:
    """Return the requests and seconds of each command by fragments, and the requests that a fragment adds."""
    table: dict[str, Any] = {}
    for name in dict.fromkeys(run["command"] for run in runs):
        mine = [run for run in runs if run["command"] == name]
        table[name] = {
            "requests": [run["requests"] for run in mine],
            "seconds": [run["seconds"] for run in mine],
        }
        if len(fragments) > 1:
            added = (mine[-1]["requests"] - mine[0]["requests"]) / (fragments[-1] - fragments[0])
            table[name]["per_fragment"] = round(added, 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fragments", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 100.0], help="milliseconds of a request")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--log", type=Path, help="write the path of every request to this file")
    parser.add_argument("--versitygw", type=Path, default=os.environ.get("VERSITYGW", "versitygw"))
    options = parser.parse_args()
    from pipeline.demo.shapes import write_demo_data

    report: dict[str, Any] = {"machine": machine(), "rows": SAMPLES, "appended": APPENDED, "latency_ms": {}}
    for latency in options.latency:
        with (
            tempfile.TemporaryDirectory() as folder,
            s3_server(options.versitygw, Path(folder) / "s3") as endpoint,
            proxy(endpoint) as store,
        ):
            work, runs = Path(folder), []
            encoders = make_encoders(work)
            # `refuse` is asked before each request.
            store.refuse = lambda method, path, latency=latency: time.sleep(latency / 1e3)
            for count in options.fragments:
                for part, samples, seed in (("first", SAMPLES, 0), ("more", APPENDED, 1)):
                    target = work / "s3" / "bucket" / f"s{count}" / part
                    write_demo_data(
                        target, num_samples=samples, image_size=32, seed=seed, samples_per_shard=-(-samples // count)
                    )
                for name in options.commands:
                    runs.append(execute(name, count, work, encoders, store))
                    print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                    if options.log:
                        lines = [f"{count} {name} {method} {path}\n" for method, path in store.requests]
                        options.log.open("a").writelines(lines)
        report["latency_ms"][f"{latency:g}"] = {"summary": summary(runs, options.fragments), "runs": runs}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
