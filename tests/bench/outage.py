"""Encode from and to an S3 server that goes away at a random request, and compare with an undisturbed run.

Each seed draws the request at which the store goes away, and for how long. The run must end with the undisturbed table,
or with exit code 2 and one line; after exit code 2 the same command without an outage must end with that table. The
server is versitygw ($VERSITYGW), behind the proxy of tests/outages.py.

    python tests/bench/outage.py --seeds 30 --max-seconds 60 --json outage.json      # about an hour on two cores
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


def encode(table: str, encoders: list[str], endpoint: str) -> tuple[int, str]:
    """Run the command; return its exit code and the last line that it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = [f"--storage-option={option}" for option in (f"endpoint={endpoint}", *KEYS)]
    command = ["encode", "s3://bucket/shapes", "--table", table, "--device", "cpu", *encoders, *options]
    run = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    return run.returncode, (run.stderr.strip().splitlines() or [""])[-1]


def content(table: str, endpoint: str) -> str:
    """Return a hash of all rows, in the order of their ids."""
    opened = open_table(table, storage=Storage.of([f"endpoint={endpoint}", *KEYS]))
    rows = opened.dataset().to_table().sort_by("id").to_pylist()
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def disturbed(
    seed: int, expected: str, encoders: list[str], outage: Outage, options: argparse.Namespace
) -> dict[str, Any]:
    """Encode once with an outage, and once more if that ends with exit code 2."""
    rng, table = random.Random(seed), f"s3://bucket/{seed}/t.lance"
    first, seconds = rng.randrange(options.requests), rng.uniform(1, options.max_seconds)
    outage.requests.clear()
    outage.away(lambda method, path: len(outage.requests) > first, seconds)
    began = time.monotonic()
    code, line = encode(table, encoders, outage.url)
    took = time.monotonic() - began
    at = outage.requests[first] if len(outage.requests) > first else None
    outage.refuse = lambda method, path: None
    published = is_table(table, Storage.of([f"endpoint={outage.url}", *KEYS]))
    same = published and content(table, outage.url) == expected
    result = {"seed": seed, "request": first, "at": at, "outage_seconds": round(seconds, 1), "exit": code}
    result |= {"same": same, "published": published, "seconds": round(took, 1), "last_line": line if code else ""}
    result["ok"] = (code == 0 and same) or (code == 2 and (same or not published))
    if code:
        result["rerun_exit"], _ = encode(table, encoders, outage.url)
        result["rerun_same"] = result["rerun_exit"] == 0 and content(table, outage.url) == expected
        result["ok"] = result["ok"] and result["rerun_same"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
        work = Path(folder)
        encoders = make_encoders(work)
        shapes = work / "s3" / "bucket" / "shapes"
        write_demo_data(shapes, num_samples=SAMPLES, image_size=32, seed=0, samples_per_shard=SHARD)
        code, line = encode("s3://bucket/undisturbed/t.lance", encoders, outage.url)
        assert code == 0, line
        expected = content("s3://bucket/undisturbed/t.lance", outage.url)
        options.requests = len(outage.requests)
        runs = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            runs.append(disturbed(seed, expected, encoders, outage, options))
            print(json.dumps(runs[-1]), flush=True)
            report = {
                "machine": machine(),
                "max_seconds": options.max_seconds,
                "requests": options.requests,
                "seeds": len(runs),
                "undisturbed_table": sum(run["exit"] == 0 and run["same"] for run in runs),
                "exit_2": sum(run["exit"] == 2 for run in runs),
                "wrong": [run["seed"] for run in runs if not run["ok"]],
                "runs": runs,
            }
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.json}: {len(runs)} seeds, {len(report['wrong'])} wrong")
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
