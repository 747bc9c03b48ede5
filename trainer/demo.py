"""The main job, end to end on drawn shapes: what `make demo` runs, each stage by its own command.

Shards -> autoencoders -> Beam encode -> Lance table -> LanceDB index -> streaming trainer -> pictures of captions that
were never drawn for training. A reader of colors and positions then says how many of 200 pictures follow theirs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from index.table.storage import write_json
from index.terminal import print_table
from pipeline.demo.checker import judge
from pipeline.demo.shapes import Scene, all_scenes, is_heldout

JUDGED = 200
SHOWN = 16
STEPS = 2


def main(out: Path) -> None:
    """Run every stage into `out`, in the place of an earlier demo; end with the pictures' name and a table."""
    if out.exists() and any(out.iterdir()) and not (out / "data" / "demo-data.json").exists():
        raise SystemExit(f"{out} is not empty and holds no earlier demo: name another folder")
    shutil.rmtree(out, ignore_errors=True)
    data, image, text = (str(out / name) for name in ("data", "models/image", "models/text"))
    table, run, picture = (str(out / name) for name in ("db/shapes.lance", "run", "samples.png"))
    captions = heldout_captions(JUDGED)
    seconds = {"draw": _stage([["pipeline", "demo-data", data]])}
    seconds["autoencoders"] = _stage(
        [
            ["trainer", "fit-autoencoder", "image", data, "--out", image],
            ["trainer", "fit-autoencoder", "text", data, "--out", text],
        ]
    )
    encoders = ["--image-encoder", image, "--text-encoder", text, "--image-size", "32"]
    seconds["encode"] = _stage([["pipeline", "encode", data, "--table", table, *encoders, "--num-workers", "2"]])
    seconds["build index"] = _stage([["pipeline", "build-index", table]])
    seconds["train"] = _stage([["trainer", "fit", table, "--out", run, "--size", "tiny", "--images", "800000"]])
    began = time.monotonic()
    _stage([["trainer", "sample", run, *captions[:SHOWN], "--out", picture, "--steps", str(STEPS), "--num", "1"]])
    followed = follow_captions(run, captions)
    seconds["sample and judge"] = time.monotonic() - began
    summary = _summary(out, seconds) | followed
    write_json(out / "summary.json", summary)
    print_table("\nThe main job, end to end", summary)
    print(f"\npictures of captions never seen in training: {picture}")


def heldout_captions(count: int) -> list[str]:
    """Captions of which no training picture was drawn, in a fixed random order."""
    scenes = [scene.caption for scene in all_scenes() if is_heldout(scene)]
    return [scenes[i] for i in np.random.default_rng(0).permutation(len(scenes))[:count]]


def follow_captions(run: str, captions: list[str]) -> dict[str, Any]:
    """Share of pictures in which the reader finds the caption's colors, and also its relation.

    Beside them the ceiling (the autoencoder's reconstructions of true pictures) and chance (the same pictures read
    with each other's captions).
    """
    from pipeline.demo.shapes import draw
    from trainer.sampler import CoalescerPipeline

    coalescer = CoalescerPipeline.from_pretrained(run)
    drawn = [np.asarray(image) for image in coalescer(captions, num_inference_steps=STEPS).images]
    true = [draw(Scene.parse(caption), 32, np.random.default_rng([1, i])) for i, caption in enumerate(captions)]
    encoder = coalescer.image_encoder
    again = encoder.decode(encoder.encode(np.stack([np.asarray(image) for image in true])))
    return {
        "judged": len(captions),
        **_shares("", np.stack(drawn), captions),
        **_shares("ceiling: ", again, captions),
        **_shares("chance: ", np.stack(drawn), captions[1:] + captions[:1]),
    }


def _shares(prefix: str, pixels: Any, captions: list[str]) -> dict[str, float]:
    verdicts = judge(pixels, captions)
    return {
        f"{prefix}colors confirmed": float(np.mean([verdict.colors for verdict in verdicts])),
        f"{prefix}colors and relation": float(np.mean([verdict.relation for verdict in verdicts])),
    }


def _stage(commands: list[list[str]]) -> float:
    """Run commands side by side, one thread each where there are several; returns the seconds they took."""
    began = time.monotonic()
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {})
    scripts = Path(sys.executable).parent
    running = []
    for number, command in enumerate(commands):
        print("\n$ " + " ".join(f'"{part}"' if " " in part else part for part in command), flush=True)
        # Two bars on one terminal would overwrite each other: the first command shows its own.
        where = {} if number == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        argv = [str(scripts / command[0]), *command[1:]]
        running.append(subprocess.Popen(argv, env=environment, text=True, **where))  # type: ignore[call-overload]
    outputs = [process.communicate()[0] for process in running]
    print("".join(output for output in outputs if output), end="", flush=True)
    for process, command in zip(running, commands, strict=True):
        if process.returncode:
            raise SystemExit(f"`{' '.join(command[:3])}` failed with exit code {process.returncode}")
    return time.monotonic() - began


def _summary(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((out / name).read_text())
        return content

    image, text = read("models/image/report.json"), read("models/text/report.json")
    encoded, index, trained = (
        read("db/shapes.reports/encode.json"),
        read("db/shapes.reports/index.json"),
        read("run/result.json"),
    )
    return {
        "rows": encoded["rows"],
        "rejects": encoded["rejects"],
        "held-out PSNR, dB": image["psnr_db"],
        "held-out token accuracy": text["token_accuracy"],
        "index": f"{index['index_kind']}, {index['index_nprobes']} probes",
        "recall@1": index["recall_at_1"],
        "training steps": trained["steps"],
        "waiting share": trained["waiting_fraction"],
        **{f"seconds: {name}": round(value, 1) for name, value in seconds.items()},
        "seconds in all": round(sum(seconds.values()), 1),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
