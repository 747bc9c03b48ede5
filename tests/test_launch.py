"""Training in processes of its own: killed at any moment, or started by a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoints import checkpoints

pytestmark = pytest.mark.slow

TRAINER = str(Path(sys.executable).parent / "trainer")
OPTIONS = ["--size", "tiny", "--images", "6400", "--batch-size", "32", "--device", "cpu"]
GENTLE = ["--learning-rate", "0.0005"]
"""Ten times lower than usual, so that rounding errors do not grow from step to step."""
TIMED = ("time", "seconds", "rate", "waiting_fraction")


def command(table, out, *more: str) -> list[str]:
    return [TRAINER, "fit", table.uri, "--out", str(out), *OPTIONS, *more]


def curve(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(indexed, tmp_path_factory):
    out = tmp_path_factory.mktemp("launch") / "run"
    subprocess.run(command(indexed, out), check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def gentle(indexed, tmp_path_factory):
    out = tmp_path_factory.mktemp("launch") / "gentle"
    subprocess.run(command(indexed, out, *GENTLE), check=True, capture_output=True)
    return out


def test_a_killed_run_resumes_to_the_same_weights_and_curve(undisturbed, indexed, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(command(indexed, out, "--checkpoint-seconds", "0.1"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "network/diffusion_pytorch_model.safetensors").exists()
    subprocess.run(command(indexed, out, "--resume"), check=True, capture_output=True)
    weights, resumed = (load_file(run / "network/diffusion_pytorch_model.safetensors") for run in (undisturbed, out))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert len(curve(out)) == 11
    assert curve(out) == curve(undisturbed)


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--nproc-per-node=2", "--master-port=29511", "--no-python"], 2),
        # On CPUs accelerate starts several only through MPI.
        (["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--no_python"], 1),
    ],
)
def test_launched_processes_train_as_one_does(gentle, indexed, tmp_path, launcher, processes):
    out = tmp_path / "run"
    launched = [sys.executable, "-m", *launcher, *command(indexed, out, *GENTLE)]
    done = subprocess.run(launched, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "result.json").read_text())["num_processes"] == processes
    assert done.stdout.count("images_per_second") == 1
    # The same slots, summed in another order: the same loss to float precision all along.
    one, two = ([line["loss"] for line in curve(run)] for run in (gentle, out))
    assert two == pytest.approx(one, rel=1e-5)


def test_two_processes_share_the_gradients_of_mean_flow(indexed, tmp_path):
    """Its derivative bypasses the wrapper that sums gradients; the gradient of its loss does not."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29512"]
    for name, before in (("one", []), ("two", [*launcher, "--no-python"])):
        options = ["--objective", "mean_flow", "--images", "640"]
        subprocess.run([*before, *command(indexed, tmp_path / name, *options)], check=True, capture_output=True)
    one, two = (curve(tmp_path / name) for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    weights, shared = (
        load_file(tmp_path / name / "network/diffusion_pytorch_model.safetensors") for name in ("one", "two")
    )
    assert all(torch.allclose(weights[name], shared[name], atol=1e-4) for name in weights)


def test_bfloat16_trains_nearly_as_float32_does(gentle, indexed, tmp_path):
    subprocess.run(command(indexed, tmp_path / "run", *GENTLE, "--dtype", "bfloat16"), check=True, capture_output=True)
    whole, half = ([line["loss"] for line in curve(out)] for out in (gentle, tmp_path / "run"))
    assert half != whole
    assert half == pytest.approx(whole, rel=0.02)
    weights = load_file(tmp_path / "run" / "network/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_compiled_network_trains_as_it_does_uncompiled(indexed, tmp_path):
    options = [*GENTLE, "--images", "192"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        subprocess.run(command(indexed, tmp_path / name, *options, *more), check=True, capture_output=True)
    plain, compiled = ([line["loss"] for line in curve(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    weights, same = (
        load_file(tmp_path / name / "network/diffusion_pytorch_model.safetensors") for name in ("plain", "compiled")
    )
    assert all(torch.allclose(weights[name], same[name], atol=1e-4) for name in weights)
