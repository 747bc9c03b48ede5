"""The demo that `make demo` runs: from drawn shapes to images of captions that training has never seen.

Every stage is one of our commands, printed before it runs, so that it can be copied. At the end a checker reads colors
and positions from 200 generated images and counts how many follow their caption.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from index.table.storage import write_json
from index.terminal import print_table
from pipeline.demo.checker import check_images
from pipeline.demo.shapes import Scene, all_scenes, draw_scene, is_heldout

STAGES = {
    "draw images": ["pipeline demo-data {out}/data"],
    "autoencoders": [  # at the same time
        "trainer fit-autoencoder image {out}/data --out {out}/models/image",
        "trainer fit-autoencoder text {out}/data --out {out}/models/text",
    ],
    "encode": [
        "pipeline encode {out}/data --table {out}/db/shapes.lance --image-size 32 --num-workers 2 "
        "--image-encoder {out}/models/image --text-encoder {out}/models/text"
    ],
    "build index": ["pipeline build-index {out}/db/shapes.lance"],
    "train": ["trainer fit {out}/db/shapes.lance --out {out}/run --size tiny --images 800000"],
    "sample": ["trainer sample {out}/run {captions} --out {out}/samples.png --num-images-per-prompt 1"],
}
CHECKED, SHOWN = 200, 16
"""Images that are checked, and that samples.png shows."""
IMAGE_SIZE = 32


def main(out: Path) -> None:
    """Run every stage into `out`, replacing an earlier demo, then check the images and print a summary."""
    if out.exists() and any(out.iterdir()) and not (out / "data" / "demo-data.json").exists():
        raise SystemExit(f"error: {out} is not empty and does not hold an earlier demo: name another folder")
    shutil.rmtree(out, ignore_errors=True)
    captions = heldout_captions(CHECKED)
    names = {"out": shlex.quote(str(out)), "captions": shlex.join(captions[:SHOWN])}
    seconds = {
        stage: run_together([shlex.split(command.format(**names)) for command in commands])
        for stage, commands in STAGES.items()
    }
    started = time.monotonic()
    checked = check_captions(out / "run", captions)
    seconds["check"] = time.monotonic() - started
    results = read_results(out) | checked
    write_json(out / "summary.json", results | {"seconds": {stage: round(s, 1) for stage, s in seconds.items()}})
    print_table(
        "\nseconds by stage", {stage: f"{s:.1f}" for stage, s in (seconds | {"all": sum(seconds.values())}).items()}
    )
    print_table("\nresults", results)
    print(f"\nimages of captions that were held out from training: {out / 'samples.png'}")


def run_together(commands: list[list[str]]) -> float:
    """Print and run commands at the same time, on one thread each if there are several; return the seconds taken.

    Only the first one draws its bars while it runs, since two on one terminal would overwrite each other.
    """
    started = time.monotonic()
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {})
    running = []
    for number, command in enumerate(commands):
        print(f"\n$ {shlex.join(command)}", flush=True)
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if number else {}
        script = str(Path(sys.executable).parent / command[0])
        running.append(subprocess.Popen([script, *command[1:]], env=environment, text=True, **output))
    print("".join(process.communicate()[0] or "" for process in running), end="", flush=True)
    for process, command in zip(running, commands, strict=True):
        if process.returncode:
            raise SystemExit(f"error: `{shlex.join(command[:3])}` failed with exit code {process.returncode}")
    return time.monotonic() - started


def heldout_captions(count: int) -> list[str]:
    """Return captions without a training image, in a fixed random order."""
    scenes = [scene.caption for scene in all_scenes() if is_heldout(scene)]
    return [scenes[i] for i in np.random.default_rng(0).permutation(len(scenes))[:count]]


def check_captions(run: Path, captions: list[str]) -> dict[str, Any]:
    """Return how often the checker finds a caption's colors, and also its relation, in the image generated from it.

    References: the autoencoder's reconstructions of drawn images (upper bound), and the generated images paired with
    other captions (chance).
    """
    from trainer.sampler import CoalescerPipeline

    coalescer = CoalescerPipeline.from_pretrained(run)
    generated = np.stack([np.asarray(image) for image in coalescer(captions).images])
    drawn = [
        draw_scene(Scene.parse(caption), IMAGE_SIZE, np.random.default_rng([1, i]))
        for i, caption in enumerate(captions)
    ]
    encoder = coalescer.image_encoder
    reconstructed = encoder.decode(encoder.encode(np.stack([np.asarray(image) for image in drawn])))
    return {
        "images checked": len(captions),
        **_rates("", generated, captions),
        **_rates("reconstructions: ", reconstructed, captions),
        **_rates("chance: ", generated, captions[1:] + captions[:1]),
    }


def _rates(prefix: str, pixels: Any, captions: list[str]) -> dict[str, float]:
    verdicts = check_images(pixels, captions)
    return {
        f"{prefix}colors": float(np.mean([verdict.colors for verdict in verdicts])),
        f"{prefix}colors and relation": float(np.mean([verdict.relation for verdict in verdicts])),
    }


def read_results(out: Path) -> dict[str, Any]:
    """Return the main metrics that the stages reported."""

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((out / name).read_text())
        return content

    encoded, index = read("db/shapes.reports/encode.json"), read("db/shapes.reports/index.json")
    trained = read("run/result.json")
    return {
        "rows": encoded["rows"],
        "rejected": encoded["rejected"],
        "held-out PSNR, dB": read("models/image/report.json")["psnr_db"],
        "held-out token accuracy": read("models/text/report.json")["token_accuracy"],
        "recall@1": index["recall_at_1"],
        "training steps": trained["steps"],
        "waiting fraction": trained["waiting_fraction"],
    }


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except KeyboardInterrupt:
        sys.exit(130)
