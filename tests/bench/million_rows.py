"""Measure every stage from drawn images to an evaluated run at one size, through the commands as a user types them.

    draw, autoencoders     captioned shapes and a tenth as many more; both autoencoders on 20,000 of them
    encode                 with two workers
    index, balance         `build-index`, then with `--balance`; IVF_RQ, as `auto` is from 10,000 training rows on
    append, index_added    the further tenth, encoded with two workers and added to the index
    inspect, prune         what opening costs; old versions removed
    fit, evaluate          a tiny network on 200,000 targets, 1,000 images

Prints one JSON line per stage, and keeps them in WORK/stages.jsonl: a bench that was killed goes on with the stage that
it was in, when it is typed again. A line has the seconds of the command and, as `work_seconds`, those that its own
report gives, without the start of Python; `cpu_seconds`, which other load on the machine changes less; rows per
second; of encode also `midway_per_second`, between one fifth and four
fifths of the rows, without the start of the workers; the peak of the memory (sum over the command's processes,
sampled); and of a table the bytes per row on disk, by column and by kind of file. The last line compares with
`--baseline`, the WORK of a smaller size: seconds per row of each stage here over there (1 is a cost that grows with the
rows alone), seconds that should not grow with rows at all, and the rate of search.

    python tests/bench/million_rows.py WORK [--rows 1000000] [--baseline WORK]
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from machine import machine

BIN = Path(sys.executable).parent
SAMPLED_SECONDS = 0.2
BACKGROUNDS = 33
"""With 4,320 captions each."""
AUTOENCODER_SAMPLES, TARGETS, EVALUATED = 20_000, 200_000, 1000
PER_ROW = ("draw", "encode", "index", "append", "index_added")
"""Stages whose cost may grow with their rows. The fit of balance ends by its time limit."""
CONSTANT = {"inspect": "seconds", "fit": "first_step_seconds"}


class Bench:
    """A folder with the data, table and run of one size, and the stages that are done."""

    def __init__(self, work: Path, rows: int) -> None:
        """Read what an earlier process has done in `work`."""
        self.work, self.rows = work, rows
        work.mkdir(parents=True, exist_ok=True)
        self.path = work / "stages.jsonl"
        self.done = read_stages(self.path)
        if any(line["rows"] != rows for line in self.done.values()):
            raise SystemExit(f"error: {work} is of another --rows: name another folder")

    def stage(self, name: str, count: int, commands: list[str], measure: Callable[[], dict[str, Any]]) -> None:
        """Run a stage's commands one after another, unless it is done, and print its line."""
        if name not in self.done:
            began = self.work / f"{name}.began"
            line: dict[str, Any] = {"stage": name, "rows": self.rows, "count": count, "resumed": began.exists()}
            if not line["resumed"]:
                began.touch()
            start, cpu, peak = time.perf_counter(), cpu_seconds(), 0
            for command in commands:
                peak = max(peak, run(command, self.work))
            line["seconds"] = round(time.perf_counter() - start, 2)
            line["cpu_seconds"] = round(cpu_seconds() - cpu, 2)
            line["peak_mib"] = round(peak / 2**20)
            line |= {"commands": commands} | measure()
            line["per_second"] = round(count / (line.get("work_seconds") or line["seconds"]), 2)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            began.unlink()
            self.done[name] = line
        print(json.dumps(self.done[name]), flush=True)

    def began(self, name: str) -> float:
        """Return the time at which a running stage was first begun."""
        return (self.work / f"{name}.began").stat().st_mtime

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file below the folder."""
        content: dict[str, Any] = json.loads((self.work / name).read_text())
        return content


def read_stages(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of finished stages by name; one that was cut short by a kill is left out."""
    lines = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        if text.endswith("}"):
            line = json.loads(text)
            lines[line["stage"]] = line
    return lines


def run(command: str, folder: Path) -> int:
    """Run a command in a folder and return the most memory that its processes held together, in bytes."""
    first, *arguments = shlex.split(command)
    with (folder / "output.log").open("a") as log:
        print(f"$ {command}", file=log, flush=True)
        process = subprocess.Popen([BIN / first, *arguments], cwd=folder, stdout=log, stderr=log)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process, peak))
    watch.start()
    code = process.wait()
    watch.join()
    if code:
        raise SystemExit(f"error: `{command}` failed with exit code {code}: see {folder / 'output.log'}")
    return peak[0]


def cpu_seconds() -> float:
    """Return the processor time of all commands so far, those of their own processes included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_memory_of(process.pid)))
        time.sleep(SAMPLED_SECONDS)


def _memory_of(pid: int) -> Iterator[int]:
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            yield process.memory_info().rss
        except psutil.Error:
            continue


def disk_of(uri: Path) -> dict[str, Any]:
    """Return the bytes per row of a table on disk, by column and by kind of file."""
    import lance
    from lance.file import LanceFileReader

    dataset = lance.dataset(str(uri))
    rows, names = dataset.count_rows(), {field.id(): field.name() for field in dataset.lance_schema.fields()}
    columns: dict[str, float] = dict.fromkeys(names.values(), 0)
    for fragment in dataset.get_fragments():
        for file in fragment.metadata.files:
            statistics = LanceFileReader(str(uri / "data" / file.path)).file_statistics().columns
            for field, column in zip(file.fields, file.column_indices, strict=True):
                if field in names and column >= 0:
                    columns[names[field]] += statistics[column].size_bytes
    kinds = {path.name: path for path in (*uri.iterdir(), *uri.parent.iterdir()) if path != uri}
    sizes = {name: sum(each.stat().st_size for each in _files(path)) for name, path in kinds.items()}
    return {
        "table_rows": rows,
        "fragments": len(dataset.get_fragments()),
        "bytes_per_row_by_column": {name: round(size / rows, 2) for name, size in columns.items()},
        "bytes_per_row_by_kind": {name: round(size / rows, 3) for name, size in sorted(sizes.items())},
    }


def _files(path: Path) -> Iterator[Path]:
    return (each for each in [path, *path.rglob("*")] if each.is_file())


def midway(log: Path, rows: int) -> dict[str, float]:
    """Return the rate of encoding between one fifth and four fifths of the rows; nothing if they came in one tick."""
    ticks = [json.loads(line) for line in log.read_text().splitlines()]
    one, four = (next(tick for tick in ticks if tick["done"] >= fifths * rows / 5) for fifths in (1, 4))
    seconds = four["seconds"] - one["seconds"]
    return {"midway_per_second": round((four["done"] - one["done"]) / seconds, 1)} if seconds else {}


def run_stages(bench: Bench) -> None:
    """Run all stages that are not done."""
    rows, added, work = bench.rows, bench.rows // 10, bench.work
    uri, run_folder = work / "db/shapes.lance", work / "run"

    def encoded() -> dict[str, Any]:
        report = bench.read("db/shapes.reports/encode.json")
        assert report["rejected"] == 0, report
        steps = {"work_seconds": report["seconds"], "seconds_by_step": report["seconds_by_step"]}
        return steps | midway(work / "db/shapes.reports/encode.jsonl", report["rows"]) | disk_of(uri)

    def indexed() -> dict[str, Any]:
        report = bench.read("db/shapes.reports/index.json")
        names = ["train_rows", "index_type", "num_bits", "num_partitions", "nprobes", "refine_factor", "index_choice"]
        names += ["recall_at_1", "queries_per_second", "anti_hub_rate", "desc_scale", "perplexity", "balance"]
        assert report["num_unindexed_rows"] == 0, report
        kept = {name: report[name] for name in names if name in report}
        return {"work_seconds": report["build_seconds"]} | kept | disk_of(uri)

    def trained() -> dict[str, Any]:
        result = bench.read("run/result.json")
        first = json.loads((run_folder / "log.jsonl").read_text().splitlines()[0])
        kept = {name: result[name] for name in ("steps", "reuse", "waiting_fraction", "images_per_second", "loss")}
        return kept | {"work_seconds": result["seconds"], "first_step_seconds": first["time"] - bench.began("fit")}

    def evaluated() -> dict[str, Any]:
        return {"report": sorted(path.name for path in (run_folder / "report").iterdir())}

    _forget(bench, "draw", work / "data", work / "more")
    draw = f"--image-size 32 --num-backgrounds {BACKGROUNDS}"
    bench.stage(
        "draw",
        rows + added,
        [
            f"pipeline demo-data data --num-samples {rows} {draw}",
            f"pipeline demo-data more --num-samples {added} --seed 1 {draw}",
        ],
        lambda: {"captions": bench.read("data/demo-data.json")["num_train_captions"]},
    )
    bench.stage(
        "autoencoders",
        AUTOENCODER_SAMPLES,
        [
            f"trainer fit-autoencoder {kind} data --out models/{kind} --limit {AUTOENCODER_SAMPLES}"
            for kind in ("image", "text")
        ],
        lambda: {},
    )
    encoders = "--image-size 32 --num-workers 2 --image-encoder models/image --text-encoder models/text"
    bench.stage("encode", rows, [f"pipeline encode data --table db/shapes.lance {encoders}"], encoded)
    index = "pipeline build-index db/shapes.lance --index-type ivf_rq"
    bench.stage("index", rows, [index], indexed)
    bench.stage("balance", rows, [f"{index} --balance"], indexed)
    bench.stage("append", added, [f"pipeline encode more --table db/shapes.lance {encoders} --append"], encoded)
    bench.stage("index_added", added, [index], indexed)
    bench.stage("inspect", 1, ["pipeline inspect db/shapes.lance"], lambda: {})
    bench.stage("prune", 1, ["pipeline prune db/shapes.lance"], lambda: disk_of(uri))
    fit = "trainer fit db/shapes.lance --out run"
    again = " --resume" if (run_folder / "config.json").exists() else ""
    bench.stage("fit", TARGETS, [f"{fit} --size tiny --images {TARGETS}{again}"], trained)
    bench.stage(
        "evaluate",
        EVALUATED,
        [f"trainer evaluate run --num-inference-steps 1,2 --num-samples {EVALUATED}"],
        evaluated,
    )


def _forget(bench: Bench, stage: str, *folders: Path) -> None:
    """Remove what a stage that cannot be resumed has left."""
    if stage not in bench.done:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def growth(small: dict[str, dict[str, Any]], large: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the stages of two sizes."""

    def per_row(name: str, measure: str) -> float:
        lines = [small[name], large[name]]
        if measure == "seconds" and all("midway_per_second" in line for line in lines):
            return round(lines[0]["midway_per_second"] / lines[1]["midway_per_second"], 3)
        costs = [(line.get("work_seconds") if measure == "seconds" else None) or line[measure] for line in lines]
        return round(costs[1] / large[name]["count"] / (costs[0] / small[name]["count"]), 3)

    return {
        "rows": [small["encode"]["rows"], large["encode"]["rows"]],
        "seconds_per_row": {name: per_row(name, "seconds") for name in PER_ROW},
        "cpu_seconds_per_row": {name: per_row(name, "cpu_seconds") for name in PER_ROW if "cpu_seconds" in small[name]},
        "seconds": {
            f"{stage} {name}": round(large[stage][name] / small[stage][name], 3) for stage, name in CONSTANT.items()
        },
        "cpu_seconds": {
            stage: round(large[stage]["cpu_seconds"] / small[stage]["cpu_seconds"], 3)
            for stage in ("inspect", "fit", "evaluate")
        },
        "queries_per_second": round(large["index"]["queries_per_second"] / small["index"]["queries_per_second"], 3),
        "peak_mib": {name: round(large[name]["peak_mib"] / small[name]["peak_mib"], 2) for name in large},
        "resumed": [name for lines in (small, large) for name, line in lines.items() if line["resumed"]],
    }


def main() -> None:
    """Run the stages and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--baseline", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments.work.resolve(), arguments.rows)
    run_stages(bench)
    total = round(sum(line["seconds"] for line in bench.done.values()), 1)
    summary: dict[str, Any] = {"machine": machine(), "rows": arguments.rows, "seconds": total}
    if arguments.baseline:
        summary["growth"] = growth(read_stages(arguments.baseline / "stages.jsonl"), bench.done)
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
