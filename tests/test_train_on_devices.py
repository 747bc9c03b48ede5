"""Training, sampling and evaluation on every device that is here, and on one that is simulated on the CPU.

The simulated device finds tensors of two devices in one operation, and training steps that wait for their device.
"""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import Killed, killed
from safetensors.torch import load_file
from simulated_device import DEVICE, recorded_waits, run_simulated

from index.table.table import open_table
from trainer import loop
from trainer.autoencoders.image import ImageAutoencoderConfig, ImageAutoencoderLoop, fit_image_autoencoder
from trainer.autoencoders.text import TextAutoencoderConfig, TextAutoencoderLoop, fit_text_autoencoder
from trainer.autoencoders.train import TrainRuntime
from trainer.config import FitConfig, RuntimeConfig
from trainer.evaluation.protocol import EvaluationConfig, evaluate
from trainer.fit import fit
from trainer.objectives.registry import OBJECTIVES
from trainer.sampler import CoalescerPipeline
from trainer.training_loop import Trainer

pytestmark = pytest.mark.slow

WEIGHTS = "network/diffusion_pytorch_model.safetensors"
CAPTIONS = ["a small red circle above a large blue square", "a large black square left of a small green circle"]
TRANSFORMER = {"network": "transformer", "num_tokens": 6}
AUTOENCODERS = {
    "image": (
        fit_image_autoencoder,
        ImageAutoencoderLoop,
        ImageAutoencoderConfig(steps=4, batch_size=8, image_size=16, dtype="float32"),
    ),
    "text": (fit_text_autoencoder, TextAutoencoderLoop, TextAutoencoderConfig(steps=4, batch_size=8, dtype="float32")),
}
ROUNDING = {"cpu": 0.0, "simulated": 1e-4, "cuda": 2e-2, "mps": 1e-2}
"""Relative difference of losses from those of the CPU that float32 (TF32 on CUDA) may make in a few small steps."""


def device(name: str, here: bool):
    absent = pytest.mark.skipif(not here, reason=f"no {name} device on this machine")
    return pytest.param(name, marks=[pytest.mark.gpu, absent])


ACCELERATORS = [
    "simulated",
    device("cuda", torch.cuda.is_available()),
    device("mps", torch.backends.mps.is_available()),
]
on_accelerators = pytest.mark.parametrize("device", ACCELERATORS)
on_devices = pytest.mark.parametrize("device", ["cpu", *ACCELERATORS])


def run_on(device: str, check, *args):
    """Call `check(device, ...)` for a device, in the process of the simulated one if it is that."""
    return run_simulated(check, DEVICE, *args) if device == "simulated" else check(device, *args)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def few_steps(steps: int, **options) -> FitConfig:
    return FitConfig(
        size="tiny", images=steps * 16, batch_size=16, learning_rate=1e-4, dtype="float32", reuse=1, **options
    )


def train(device: str, table: str, run: Path, config: FitConfig, **runtime) -> list[str]:
    """Train a run and return what its steps have waited for; only the simulated device tells."""
    with waits_within((Trainer, "_step"), (loop.Divergence, "record")) as waits:
        fit(open_table(table), config, run, runtime=RuntimeConfig(device=device, **runtime))
    return waits


@contextlib.contextmanager
def waits_within(*methods):
    """Yield a list of what some methods, each by its class and name, wait for in the block."""
    waits = []

    def recorded(method):
        def call(*args, **kwargs):
            with recorded_waits() as found:
                result = method(*args, **kwargs)
            waits.extend(found)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in methods:
            patch.setattr(kind, name, recorded(getattr(kind, name)))
        yield waits


def train_and_sample(device: str, table: str, run: Path, config: FitConfig) -> tuple[list[str], np.ndarray]:
    waits = train(device, table, run, config)
    pipeline = CoalescerPipeline.from_pretrained(run, device=device)
    with waits_within((type(pipeline.objective), "step")) as found:
        samples = pipeline(CAPTIONS, num_images_per_prompt=2, num_inference_steps=2, guidance_scale=2.0)
    # Noise that steps add is drawn on the CPU.
    return waits + [each for each in found if "to the device" not in each], samples.latents


def train_resume_and_evaluate(device: str, table: str, folder: Path, config: FitConfig) -> dict:
    table = (
        shutil.copytree(Path(table).parent, folder / "db", ignore=shutil.ignore_patterns("referee-*"))
        / Path(table).name
    )  # without a referee
    whole, resumed = folder / "whole", folder / "resumed"
    every_step = RuntimeConfig(device=device, checkpoint_seconds=0.0, keep_checkpoints=100)
    fit(open_table(str(table)), config, whole, runtime=every_step)
    fit(open_table(str(table)), config, killed(whole, resumed, after=10), resume=True, runtime=every_step)
    return evaluate(
        resumed, EvaluationConfig(num_inference_steps=[2], num_samples=64, device=device), folder / "report"
    )


@on_devices
def test_a_run_trains_resumes_samples_and_is_evaluated(device, indexed, tmp_path):
    report = run_on(device, train_resume_and_evaluate, indexed.uri, tmp_path, few_steps(20))
    whole, resumed = (load_file(tmp_path / run / WEIGHTS) for run in ("whole", "resumed"))
    exact = device in ("cpu", "simulated")
    for name in whole:
        assert torch.allclose(whole[name], resumed[name], rtol=0, atol=0 if exact else 1e-4), name
    assert all(np.isfinite(value) for value in report["metrics"]["2"].values())
    train("cpu", indexed.uri, tmp_path / "cpu", few_steps(20))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cpu"), rel=ROUNDING[device])


@pytest.mark.parametrize("network", [{"network": "mlp"}, TRANSFORMER], ids=["mlp", "transformer"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@on_accelerators
def test_every_objective_trains_and_samples_with_every_network(device, objective, network, indexed, tmp_path):
    hyperparameters = {}
    if objective == "rectified_flow":
        train("cpu", indexed.uri, tmp_path / "flow", few_steps(1, objective="flow_matching", **network))
        hyperparameters = {"flow": str(tmp_path / "flow"), "solver_steps": 2.0}
    config = few_steps(3, objective=objective, hyperparameters=hyperparameters, **network)
    waits, latents = run_on(device, train_and_sample, indexed.uri, tmp_path / "run", config)
    # A flow is loaded in the first step.
    assert [each for each in waits if "to the device" not in each or "rectified_flow.py" not in each] == []
    assert np.isfinite(latents).all()
    train("cpu", indexed.uri, tmp_path / "cpu", config)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=ROUNDING[device])


@on_accelerators
def test_accumulated_recomputed_and_exactly_searched_training_waits_for_nothing_either(device, indexed, tmp_path):
    options = {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}
    for name, network in (("mlp", {"network": "mlp", "search": "exact"}), ("transformer", TRANSFORMER)):
        run = tmp_path / f"{device}-{name}"
        assert run_on(device, _train_with, indexed.uri, run, few_steps(3, **network), options) == []
        train("cpu", indexed.uri, tmp_path / name, few_steps(3, **network))
        assert losses(run) == pytest.approx(losses(tmp_path / name), rel=max(ROUNDING[device], 1e-5))


def _train_with(device, table, run, config, options) -> list[str]:
    return train(device, table, run, config, **options)


def train_autoencoders(device: str, source: str, folder: Path) -> dict[str, list[str]]:
    """Train both autoencoders, stop and resume them; return what their steps have waited for."""
    waits, runtime = {}, TrainRuntime(device=device, checkpoint_seconds=0.0)
    save = loop.save_checkpoint

    def save_and_stop(out, step, *args, **options):
        save(out, step, *args, **options)
        if step == 2:
            raise Killed

    for kind, (fit_autoencoder, loop_class, config) in AUTOENCODERS.items():
        with waits_within((loop_class, "_step"), (loop.Divergence, "record")) as waits[kind]:
            fit_autoencoder([source], config, folder / kind, runtime=runtime)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", save_and_stop)
            with pytest.raises(Killed):
                fit_autoencoder([source], config, folder / f"{kind}-resumed", runtime=runtime)
        fit_autoencoder([source], config, folder / f"{kind}-resumed", resume=True, runtime=runtime)
    return waits


@on_devices
def test_both_autoencoders_train_and_resume(device, shapes, tmp_path):
    waits = run_on(device, train_autoencoders, str(shapes), tmp_path)
    # BERT itself looks whether there is any padding.
    assert {place.rpartition(":")[0] for place in waits["text"]} <= {"aten::_local_scalar_dense of () at text.py"}
    assert waits["image"] == []
    train_autoencoders("cpu", str(shapes), tmp_path / "cpu")
    for kind in AUTOENCODERS:
        whole, resumed, expected = (
            losses(tmp_path / name / "training") for name in (kind, f"{kind}-resumed", f"cpu/{kind}")
        )
        assert whole == pytest.approx(expected, rel=ROUNDING[device])
        assert resumed == pytest.approx(whole, rel=ROUNDING[device])


def mistakes(device: str) -> tuple[str, list[str]]:
    x, y = torch.ones(3, device=device), torch.ones(3)
    with pytest.raises(RuntimeError, match="to be on one device") as error:
        x + y
    with recorded_waits() as waits:
        _ = x.sum().item(), x.cpu(), x.tolist(), x[x > 0], y.to(device), (x > 0).any() and 1
        x.add_(1).copy_(y.to(device, non_blocking=True))  # waits for nothing
        torch.manual_seed(0)
    return str(error.value), waits


def test_the_simulated_device_finds_mistakes():
    _, waits = run_simulated(mistakes, DEVICE)
    assert waits == [
        "aten::_local_scalar_dense of ()",
        "aten::_to_copy to the CPU, of (3,)",
        "tolist",
        "aten::index of (3,) by a mask",
        "aten::copy_ to the device, of (3,)",
        "aten::_local_scalar_dense of ()",
        "global generator seeded",
    ]
