"""Kill encode, append, build-index and prune at random moments and at commits, and compare with an undisturbed twin.

One life is a fixed script of commands on one table. Each command is disturbed until it has had its share of kills, then
rerun until it ends: whatever happened before, the table must then equal the twin's after the same command, row by row
and bit by bit, and the index must be the one that the metadata describes. After each kill the table must equal the
twin's before or after the command. Disturbances, drawn by the seed:

    random     kill -9 of the command's processes, or of one worker, after a random time
    commit     kill -9 as soon as a new version of the table appears
    disk       writes beyond a random file size fail, as on a full disk
    deleted    a random file of the unfinished run is deleted after a kill

    python tests/bench/chaos.py --work chaos --kills 100 --seed 0        # about a quarter of an hour on two cores
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import machine

SAMPLES, SHARD = 320, 40
ATTEMPTS = 12
"""Reruns of a command before it counts as one that never ends."""


@dataclass
class Outcome:
    """What happened over all lives."""

    kills: Counter[str] = field(default_factory=Counter)
    """By command and disturbance."""
    exits: Counter[str] = field(default_factory=Counter)
    """Exit codes of commands that were not killed."""
    rows_lost: int = 0
    rows_doubled: int = 0
    rows_changed: int = 0
    false_reports: list[str] = field(default_factory=list)
    """Commands that ended with exit code 0 and a table other than the twin's."""
    wrong_states: list[str] = field(default_factory=list)
    """Tables after a kill that equal the twin's neither before nor after the command, or have a false index."""
    never_ended: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """One command of the script."""

    name: str
    argv: list[str]


def script(work: Path, table: Path) -> list[Command]:
    """Return the commands of one life: encode, index, append, index, take rows down, lay out again, prune."""
    encoders = ["--image-encoder", f"{work}/image", "--text-encoder", f"{work}/text", "--image-size", "32"]
    encode = ["encode", "--table", str(table), *encoders, "--num-workers", "2", "--device", "cpu"]
    first, second = f"{work}/data/0000[0-4].tar", f"{work}/data/*.tar"
    index = ["build-index", str(table), "--index-type", "ivf_flat"]
    return [
        Command("encode", [encode[0], first, *encode[1:]]),
        Command("build-index", index),
        Command("append", [encode[0], second, *encode[1:], "--append"]),
        Command("build-index", index),
        Command("delete", []),
        Command("build-index", [*index, "--desc-scale", "3"]),
        Command("prune", ["prune", str(table)]),
    ]


def snapshot(table: Path) -> dict[str, list[str]]:
    """Return for each id the digests of its rows over all columns; empty if there is no table."""
    import lance

    if not list(table.glob("_versions/*")):
        return {}
    rows: dict[str, list[str]] = {}
    for batch in lance.dataset(str(table)).to_batches():
        for row in batch.to_pylist():
            rows.setdefault(row["id"], []).append(hashlib.sha1(repr(sorted(row.items())).encode()).hexdigest())
    return rows


def false_index(table: Path) -> str | None:
    """Return what is wrong with the index that a trainer would use, or None."""
    import numpy as np

    from index.errors import TableError
    from index.report.recall import evaluation_queries
    from index.search.ann import ApproximateSearch
    from index.search.exact import ExactSearch
    from index.table.table import open_table

    try:
        opened = open_table(table, indexed=True)
    except TableError as error:
        return None if "has no index" in str(error) or "no table at" in str(error) else str(error)
    index = opened.meta.index
    if index is None or index.index_type == "none":
        return None
    names = [each["name"] for each in opened.dataset().list_indices()]
    if not names:
        return f"version {opened.version} describes {index.index_type}, and there is no index"
    queries = evaluation_queries(opened, 256)
    found, exact = (search.nearest(queries).row_id[:, 0] for search in (ApproximateSearch(opened), ExactSearch(opened)))
    recall = float(np.mean(found == exact))
    if recall < index.recall_at_1 - 0.1:
        return f"recall@1 {recall:.3f} where the metadata promises {index.recall_at_1:.3f}"
    return None


def start(argv: list[str], log: Path, file_limit: int | None = None) -> subprocess.Popen[bytes]:
    """Start a `pipeline` command in a process group of its own."""
    code = "from pipeline.cli import main; main()"
    limit = ["-c", f'ulimit -f {file_limit}; exec "$@"', "bash"] if file_limit else ["-c", 'exec "$@"', "bash"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            ["bash", *limit, sys.executable, "-c", code, *argv],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, directly or not."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def kill(process: subprocess.Popen[bytes], dice: random.Random) -> str:
    """Kill a command with all its processes, or one of its workers alone; returns which."""
    children = descendants(process.pid)
    if len(children) > 1 and dice.random() < 0.3:
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(children), signal.SIGKILL)
        return "worker"
    for pid in [process.pid, *children]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return "driver"


def versions(table: Path) -> int:
    """Return the number of files that stand for versions of a table and of the tables next to it."""
    return sum(len(list(each.glob("_versions/*"))) for each in table.parent.glob("*.lance"))


def disturb(command: Command, table: Path, log: Path, seconds: float, dice: random.Random, outcome: Outcome) -> None:
    """Run a command once and disturb it."""
    kind = dice.choice(["random", "random", "commit", "commit", "disk"])
    process = start(command.argv, log, dice.randint(4, 400) if kind == "disk" else None)
    known, deadline = versions(table), time.monotonic() + dice.uniform(0.3, 1.0) * seconds
    while process.poll() is None:
        if kind == "commit" and versions(table) > known:
            if dice.random() < 0.5:
                break
            known = versions(table)
        if kind == "random" and time.monotonic() > deadline:
            break
        time.sleep(0.002)
    if process.poll() is None:
        kind = f"{kind}, {kill(process, dice)}"
        outcome.kills[f"{command.name}: {kind}"] += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(120)
        kill(process, random.Random(0))
    elif kind == "disk" and process.returncode:
        outcome.kills[f"{command.name}: disk"] += 1
    else:
        outcome.exits[f"{command.name}: {process.returncode}"] += 1
    run = table.with_suffix(".encode")
    files = [path for path in run.rglob("*") if path.is_file() and "lock" not in path.name]
    if files and dice.random() < 0.2:
        dice.choice(sorted(files)).unlink(missing_ok=True)
        outcome.kills[f"{command.name}: deleted"] += 1


def finish(command: Command, log: Path, outcome: Outcome) -> bool:
    """Rerun a command until it ends with exit code 0."""
    for _ in range(ATTEMPTS):
        process = start(command.argv, log)
        code = process.wait(600)
        outcome.exits[f"{command.name}: {code}"] += 1
        if code == 0:
            return True
    outcome.never_ended.append(f"{command.name}: {log}")
    return False


def compare(found: dict[str, list[str]], expected: dict[str, list[str]], outcome: Outcome) -> bool:
    """Count what differs between two snapshots; returns whether they are equal."""
    outcome.rows_lost += len(expected.keys() - found.keys())
    outcome.rows_doubled += sum(len(rows) - 1 for rows in found.values())
    outcome.rows_changed += len(found.keys() - expected.keys())
    outcome.rows_changed += sum(found[key] != expected[key] for key in found.keys() & expected.keys())
    return found == expected


def take_down(table: Path) -> None:
    """Delete some rows, as after a request to take images down."""
    import lance

    lance.dataset(str(table)).delete("id < '10'")


class Twin:
    """The undisturbed table: what each command leaves, and how long it takes."""

    def __init__(self, work: Path) -> None:
        """Run the script once."""
        self.snapshots: list[dict[str, list[str]]] = [{}]
        self.seconds: list[float] = []
        folder, log = work / "twin", work / "twin.log"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for command in script(work, folder / "t.lance"):
            started = time.monotonic()
            if command.name == "delete":
                take_down(folder / "t.lance")
            elif code := start(command.argv, log).wait():
                raise SystemExit(f"the twin's {command.name} ended with {code}: {log}")
            self.seconds.append(time.monotonic() - started)
            self.snapshots.append(snapshot(folder / "t.lance"))


class Life:
    """A table whose commands are disturbed."""

    def __init__(self, work: Path, number: int, seed: int, twin: Twin, outcome: Outcome) -> None:
        """Start with an empty folder; the seed and the number decide what happens."""
        self.work, self.name, self.twin, self.outcome = work, f"life-{number}", twin, outcome
        self.dice = random.Random(f"{seed}-{number}")
        self.folder = work / self.name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.table, self.log = self.folder / "t.lance", self.folder / "log"

    def run(self) -> None:
        """Run the script to its end."""
        for number, command in enumerate(script(self.work, self.table)):
            before, after = self.twin.snapshots[number : number + 2]
            if command.name == "delete":
                take_down(self.table)
            else:
                for _ in range(self.dice.randint(1, 4)):
                    disturb(command, self.table, self.log, self.twin.seconds[number], self.dice, self.outcome)
                    self._check(command, self.outcome.wrong_states, snapshot(self.table) in (before, after))
                finish(command, self.log, self.outcome)
            self._check(command, self.outcome.false_reports, compare(snapshot(self.table), after, self.outcome))
        if b"Traceback" in self.log.read_bytes():
            self.outcome.tracebacks.append(str(self.log))

    def _check(self, command: Command, faults: list[str], right: bool) -> None:
        if not right:
            faults.append(f"{self.name}, {command.name}: rows differ from the twin's")
        if wrong := false_index(self.table):
            faults.append(f"{self.name}, {command.name}: {wrong}")


def prepare(work: Path) -> None:
    """Draw the shards and save two small encoders."""
    from pipeline.demo.shapes import write_demo_data
    from trainer.autoencoders.image import ImageAutoencoderConfig, fit_image_autoencoder
    from trainer.autoencoders.text import TextAutoencoderConfig, fit_text_autoencoder

    if (work / "data").exists():
        return
    write_demo_data(work / "data", num_samples=SAMPLES, image_size=32, seed=0, samples_per_shard=SHARD)
    fit_image_autoencoder([str(work / "data")], ImageAutoencoderConfig(steps=2), work / "image")
    fit_text_autoencoder([str(work / "data")], TextAutoencoderConfig(steps=2), work / "text")


def campaign(work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Live lives until so many disturbances have happened; returns the report."""
    prepare(work)
    began, twin, outcome, lives = time.monotonic(), Twin(work), Outcome(), 0
    while outcome.kills.total() < kills:
        Life(work, lives, seed, twin, outcome).run()
        lives += 1
    report = asdict(outcome) | {"kills": dict(outcome.kills), "exits": dict(outcome.exits)}
    return {
        "machine": machine(),
        "seed": seed,
        "lives": lives,
        "disturbances": outcome.kills.total(),
        "seconds": round(time.monotonic() - began),
        **report,
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, encoders, tables and logs")
    parser.add_argument("--kills", type=int, default=100, help="disturbances in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    report = campaign(args.work.absolute(), args.kills, args.seed)
    print(json.dumps(report, indent=2))
    broken = ("rows_lost", "rows_doubled", "rows_changed", "false_reports", "wrong_states", "never_ended")
    sys.exit(any(report[name] for name in broken))


if __name__ == "__main__":
    main()
