"""Run a command on an S3 server that goes away at a random request, and compare with an undisturbed run.

Each seed draws the request at which the store goes away, and for how long. The command must end with the undisturbed
result (table, index, network or metrics), or with exit code 2 and one line; after exit code 2 the same command without
an outage must end with that result. The server is versitygw ($VERSITYGW), behind the proxy of tests/outages.py.

    python tests/bench/outage.py --seeds 30 --max-seconds 60 --json outage.json      # about an hour on two cores
    python tests/bench/outage.py --command fit --seeds 10
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from outages import Outage, proxy  # noqa: E402

from index.table.storage import Storage  # noqa: E402
from index.table.table import is_table, open_table  # noqa: E402

SAMPLES, SHARD = 480, 120
KEYS = ("aws_access_key_id=key", "aws_secret_access_key=secret", "region=us-east-1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server(program: Path, folder: Path) -> Iterator[str]:
    """Run versitygw over a folder."""
    (folder / "bucket").mkdir(parents=True)
    port = free_port()
    options = ("--port", f"127.0.0.1:{port}", "--admin-port", f"127.0.0.1:{free_port()}", "--keep-alive", "--quiet")
    environment = os.environ | {"ROOT_ACCESS_KEY": "key", "ROOT_SECRET_KEY": "secret"}
    server = subprocess.Popen([program, *options, "posix", folder], env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def make_encoders(work: Path) -> list[str]:
    """Write the small encoders of the tests; return them as options."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import BertConfig, BertModel

    from pipeline.demo.shapes import all_scenes
    from trainer.autoencoders.text import TextAutoencoderConfig, train_tokenizer

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(work / "image")
    captions = [scene.caption for _, scene in zip(range(2000), all_scenes(), strict=False)]
    tokenizer = train_tokenizer(captions, TextAutoencoderConfig(vocab_size=200))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(work / "text")
    tokenizer.save_pretrained(work / "text")
    return ["--image-encoder", str(work / "image"), "--text-encoder", str(work / "text"), "--image-size", "32"]


@dataclass
class Bench:
    """What all runs share: the store, seen directly and through the proxy, and the options that encoders need."""

    work: Path
    outage: Outage
    encoders: list[str]

    @property
    def store(self) -> list[str]:
        return [f"endpoint={self.outage.url}", *KEYS]

    def command(self, *argv: str) -> tuple[int, str]:
        """Run a command; return its exit code and the last line that it prints."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        options = [f"--storage-option={option}" for option in self.store]
        code = f"from {argv[0]}.cli import main; main()"
        run = subprocess.run(
            [sys.executable, "-c", code, *argv[1:], *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        return run.returncode, (run.stderr.strip().splitlines() or [""])[-1]

    def copy(self, source: str, target: str) -> None:
        """Copy a folder of the bucket, so that a command can change it."""
        shutil.copytree(self.work / "s3" / "bucket" / source, self.work / "s3" / "bucket" / target)


class Encode:
    """The whole command, from the shards to the table."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def prepare(self, name: str) -> None:
        """Make what the run `name` starts from."""

    def run(self, name: str, *, again: bool = False) -> tuple[int, str]:
        """Run it; `again` is after exit code 2."""
        command = ["pipeline", "encode", "s3://bucket/shapes", "--table", f"s3://bucket/{name}/t.lance"]
        return self.bench.command(*command, "--device", "cpu", *self.bench.encoders)

    def result(self, name: str) -> str | None:
        """Return a hash of what it has made, None if there is nothing."""
        uri, storage = f"s3://bucket/{name}/t.lance", Storage.of(self.bench.store)
        if not is_table(uri, storage):
            return None
        rows = open_table(uri, storage=storage).dataset().to_table().sort_by("id").to_pylist()
        return digest(rows)


class BuildIndex(Encode):
    """Lay out in another desc_scale and index."""

    def prepare(self, name: str) -> None:
        if not (self.bench.work / "s3" / "bucket" / "encoded").exists():
            assert super().run("encoded")[0] == 0
        self.bench.copy("encoded", name)

    def run(self, name: str, *, again: bool = False) -> tuple[int, str]:
        options = ["--desc-scale", "3", "--index-type", "ivf_rq", "--target-recall", "0.5"]
        return self.bench.command("pipeline", "build-index", f"s3://bucket/{name}/t.lance", *options)

    def result(self, name: str) -> str | None:
        storage = Storage.of(self.bench.store)
        table = open_table(f"s3://bucket/{name}/t.lance", storage=storage)
        report = table.report("index")
        if table.meta.index is None or report is None:
            return None
        measured = {key: report[key] for key in ("rows", "index_type", "nprobes", "recall_at_1", "chi_square")}
        return digest([measured, table.dataset().to_table().sort_by("id").to_pylist()])


class Fit(BuildIndex):
    """Train on an indexed table."""

    def prepare(self, name: str) -> None:
        if not (self.bench.work / "s3" / "bucket" / "indexed").exists():
            super().prepare("indexed")
            assert super().run("indexed")[0] == 0

    def run(self, name: str, *, again: bool = False) -> tuple[int, str]:
        out = ["--out", str(self.bench.work / "runs" / name)]
        if again and (self.bench.work / "runs" / name / "config.json").exists():
            return self.bench.command("trainer", "fit", "--resume", *out)
        sizes = ["--images", "20000", "--batch-size", "64", "--size", "tiny", "--reuse", "1", "--device", "cpu"]
        return self.bench.command("trainer", "fit", "s3://bucket/indexed/t.lance", *out, *sizes)

    def result(self, name: str) -> str | None:
        weights = self.bench.work / "runs" / name / "network" / "diffusion_pytorch_model.safetensors"
        return digest(weights.read_bytes()) if weights.exists() else None


class Evaluate(Fit):
    """Evaluate a run."""

    def prepare(self, name: str) -> None:
        if not (self.bench.work / "runs" / "fitted").exists():
            super().prepare("fitted")
            assert super().run("fitted")[0] == 0

    def run(self, name: str, *, again: bool = False) -> tuple[int, str]:
        options = ["--out", str(self.bench.work / "reports" / name), "--num-samples", "64", "--device", "cpu"]
        return self.bench.command("trainer", "evaluate", str(self.bench.work / "runs" / "fitted"), *options)

    def result(self, name: str) -> str | None:
        report = self.bench.work / "reports" / name / "report.json"
        return digest(without_times(json.loads(report.read_text())["metrics"])) if report.exists() else None


COMMANDS = {"encode": Encode, "build-index": BuildIndex, "fit": Fit, "evaluate": Evaluate}


def without_times(content: Any) -> Any:
    """Return a report without what depends on the moment."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if not key.startswith("ms_per_")}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def disturbed(seed: int, expected: str, command: Encode, options: argparse.Namespace) -> dict[str, Any]:
    """Run once with an outage, and once more if that ends with exit code 2."""
    outage, rng, name = command.bench.outage, random.Random(seed), str(seed)
    first, seconds = rng.randrange(options.requests), rng.uniform(1, options.max_seconds)
    command.prepare(name)
    outage.requests.clear()
    outage.away(lambda method, path: len(outage.requests) > first, seconds)
    began = time.monotonic()
    code, line = command.run(name)
    took = time.monotonic() - began
    at = outage.requests[first] if len(outage.requests) > first else None
    outage.refuse = lambda method, path: None
    made = command.result(name)
    result = {"seed": seed, "request": first, "at": at, "outage_seconds": round(seconds, 1), "exit": code}
    result |= {"same": made == expected, "made": made, "seconds": round(took, 1), "last_line": line if code else ""}
    result["ok"] = (code == 0 and made == expected) or (code == 2 and made in (None, expected))
    if code:
        result["rerun_exit"], _ = command.run(name, again=True)
        result["rerun_same"] = result["rerun_exit"] == 0 and command.result(name) == expected
        result["ok"] = result["ok"] and result["rerun_same"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--command", choices=COMMANDS, default="encode")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, default=Path("outage.json"))
    parser.add_argument("--versitygw", type=Path, default=os.environ.get("VERSITYGW", "versitygw"))
    options = parser.parse_args()
    from pipeline.demo.shapes import write_demo_data

    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server(options.versitygw, Path(folder) / "s3") as endpoint,
        proxy(endpoint) as outage,
    ):
        command = COMMANDS[options.command](Bench(Path(folder), outage, make_encoders(Path(folder))))
        shapes = Path(folder) / "s3" / "bucket" / "shapes"
        write_demo_data(shapes, num_samples=SAMPLES, image_size=32, seed=0, samples_per_shard=SHARD)
        command.prepare("undisturbed")
        outage.requests.clear()
        code, line = command.run("undisturbed")
        expected = command.result("undisturbed")
        assert code == 0, line
        assert expected is not None
        options.requests = len(outage.requests)
        runs = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            runs.append(disturbed(seed, expected, command, options))
            print(json.dumps(runs[-1]), flush=True)
            report = {
                "machine": machine(),
                "command": options.command,
                "max_seconds": options.max_seconds,
                "requests": options.requests,
                "seeds": len(runs),
                "undisturbed_result": sum(run["exit"] == 0 and run["same"] for run in runs),
                "exit_2": sum(run["exit"] == 2 for run in runs),
                "wrong": [run["seed"] for run in runs if not run["ok"]],
                "runs": runs,
            }
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.json}: {len(runs)} seeds, {len(report['wrong'])} wrong")
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
