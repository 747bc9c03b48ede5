"""A run that is killed at any moment is finished by `--resume`, and no convenience can end one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import KILL_9, Killed, KillSwitch, killed
from PIL import Image
from safetensors.torch import load_file

import trainer.fit as fit_module
import trainer.tracking as tracking_module
import trainer.training_loop as loop_module
from index.errors import EncoderError, OptionError, RunError
from index.table.readers import readers_of
from pipeline.encoders.image import DiffusersAutoencoder
from trainer.checkpoints import checkpoints
from trainer.config import FitConfig, RuntimeConfig
from trainer.fit import fit
from trainer.sampler import CoalescerPipeline

CONFIG = FitConfig(size="tiny", images=6 * 32, batch_size=32)
EVERY_STEP = RuntimeConfig(device="cpu", checkpoint_seconds=0.0, keep_checkpoints=100)
WEIGHTS = "network/diffusion_pytorch_model.safetensors"
CAPTIONS = ["a small red circle above a large blue square"]
TIMED = ("seconds", "images_per_second", "waiting_fraction")


@pytest.fixture(scope="module")
def switch():
    switch = KillSwitch()
    yield switch
    switch.rest()


@pytest.fixture(scope="module")
def whole(indexed, tmp_path_factory):
    """A run of six steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(indexed, CONFIG, out, runtime=EVERY_STEP)
    return out


def result(run: Path) -> dict:
    return {name: value for name, value in json.loads((run / "result.json").read_text()).items() if name not in TIMED}


def assert_same_run(run: Path, other: Path) -> None:
    a, b = (load_file(each / WEIGHTS) for each in (run, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert result(run) == result(other)
    assert (run / "samples.png").read_bytes() == (other / "samples.png").read_bytes()
    assert not [*other.rglob("*.tmp")]


@pytest.mark.slow
def test_a_run_is_finished_whichever_write_of_its_end_it_was_killed_at(whole, indexed, tmp_path, switch):
    """The last step, its checkpoint, network, samples, result: each write below RUN and of the note by the table."""
    watched = (f"{tmp_path}/", readers_of(indexed.uri))
    out = killed(whole, tmp_path / "all", after=5)
    switch.watch(*watched)
    fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
    total = len(switch.writes)
    switch.rest()
    names = " ".join(switch.writes)
    for moment in ("step-000000006", "network.tmp", "samples.png", "result.json", "log.jsonl", "config.json"):
        assert moment in names
    shutil.rmtree(out)
    for at in range(total):
        out = killed(whole, tmp_path / "run", after=5)
        switch.watch(*watched, at=at)
        with pytest.raises(Killed):
            fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
        switch.rest()
        if not (out / "result.json").exists():
            fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
        assert_same_run(whole, out)
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_new_run_can_be_begun_again_whichever_write_of_its_beginning_it_was_killed_at(
    whole, indexed, tmp_path, switch
):
    config = FitConfig(size="tiny", images=32, batch_size=32, init=str(whole))
    fit(indexed, config, tmp_path / "one", runtime=EVERY_STEP)
    switch.watch(f"{tmp_path}/run/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "_train", lambda trainer: switch.rest())
        fit(indexed, config, tmp_path / "run", runtime=EVERY_STEP)
    total = len(switch.writes)
    switch.rest()
    for at in range(total):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        switch.watch(f"{tmp_path}/run/", at=at)
        with pytest.raises(Killed):
            fit(indexed, config, tmp_path / "run", runtime=EVERY_STEP)
        switch.rest()
        begun = (tmp_path / "run" / "config.json").exists()
        fit(indexed, config, tmp_path / "run", runtime=EVERY_STEP, resume=begun)
        assert_same_run(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step-000000006.tmp", "network.tmp", "samples.png.tmp", "result.json.tmp"])
def test_kill_9_at_the_end_is_finished_by_resume_without_further_options(whole, indexed, tmp_path, place):
    out = tmp_path / "run"
    options = ["--size", "tiny", "--images", "192", "--batch-size", "32", "--device", "cpu"]
    arguments = ["fit", indexed.uri, "--out", str(out), *options]
    killed = subprocess.run([sys.executable, "-c", KILL_9, *arguments, place], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    trainer = str(Path(sys.executable).parent / "trainer")
    subprocess.run([trainer, "fit", "--resume", "--out", str(out)], check=True, capture_output=True)
    assert_same_run(whole, out)


def test_a_run_in_training_is_sampled_with_the_averaged_weights_of_its_last_checkpoint(whole, tmp_path, capsys):
    ended = CoalescerPipeline.from_pretrained(whole)(CAPTIONS).latents
    last = CoalescerPipeline.from_pretrained(killed(whole, tmp_path / "six", after=6))(CAPTIONS).latents
    assert "six has not finished training: using the averaged weights of step-000000006" in capsys.readouterr().err
    assert np.array_equal(last, ended)
    earlier = CoalescerPipeline.from_pretrained(killed(whole, tmp_path / "three", after=3))(CAPTIONS).latents
    assert not np.array_equal(earlier, ended)


def test_a_run_without_a_checkpoint_cannot_be_sampled(whole, tmp_path):
    with pytest.raises(RunError, match="holds no trained network"):
        CoalescerPipeline.from_pretrained(killed(whole, tmp_path / "run", after=0))


def test_time_goes_on_where_a_run_is_resumed(whole, indexed, tmp_path):
    out = killed(whole, tmp_path / "run", after=5)
    path = checkpoints(out)[-1] / "state.json"
    state = json.loads(path.read_text())
    state["record"] |= {"seconds": 1000.0, "waiting_seconds": 500.0}
    path.write_text(json.dumps(state))
    timed = fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
    assert 1000 < timed["seconds"] < 1100
    assert timed["images_per_second"] == pytest.approx(192 / 1000, rel=0.5)
    assert timed["waiting_fraction"] == pytest.approx(0.5, rel=0.1)
    logged = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged == sorted(logged)
    assert logged[-1] > 1000


def fail(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB")


def full(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [fail, full], ids=["out of memory", "disk full"])
def test_a_preview_that_fails_costs_no_run(whole, indexed, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(DiffusersAutoencoder, "decode", error)
    fit(indexed, CONFIG, tmp_path / "run", runtime=EVERY_STEP)
    assert set(result(tmp_path / "run")["left_out"]) == {"previews", "samples.png"}
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: training goes on without previews (")
    a, b = (load_file(run / WEIGHTS) for run in (whole, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_preview_is_decoded_in_parts_that_fit_and_in_half_precision_on_a_gpu(whole, indexed, tmp_path, monkeypatch):
    decode, seen = DiffusersAutoencoder._decode, []

    def cramped(self, latent):
        seen.append((len(latent), self.dtype))
        if len(latent) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB")
        return decode(self, latent)

    monkeypatch.setattr(DiffusersAutoencoder, "_decode", cramped)
    fit(indexed, CONFIG, tmp_path / "full", runtime=EVERY_STEP)
    assert result(tmp_path / "full") == result(whole)
    images = [np.asarray(Image.open(run / "samples.png")).astype(int) for run in (whole, tmp_path / "full")]
    assert np.abs(images[0] - images[1]).max() <= 1  # a decoder's last bits depend on how many images it is given
    assert {size for size, _ in seen} == {32, 16, 8, 4}
    monkeypatch.setattr(tracking_module, "default_dtype", lambda device: "bfloat16")
    seen.clear()
    fit(indexed, CONFIG, tmp_path / "half", runtime=EVERY_STEP)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert result(tmp_path / "half") == result(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["init_trackers", "log"])
def test_a_tracker_that_fails_costs_no_run(whole, indexed, tmp_path, monkeypatch, name):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, name, full)
    fit(indexed, CONFIG, tmp_path / "run", runtime=EVERY_STEP)
    assert result(tmp_path / "run")["left_out"] == {"tensorboard": "OSError: [Errno 28] No space left on device"}
    a, b = (load_file(run / WEIGHTS) for run in (whole, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_log_that_cannot_be_written_costs_no_run(whole, indexed, tmp_path):
    out = killed(whole, tmp_path / "run", after=5)
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").mkdir()
    fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
    assert "IsADirectoryError" in result(out)["left_out"]["log.jsonl"]


def test_ctrl_c_in_a_preview_still_ends_the_run(indexed, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking_module, "draw_grid", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(indexed, CONFIG, tmp_path / "run", runtime=EVERY_STEP)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_what_to_type(whole, indexed, tmp_path, monkeypatch):
    import trainer.checkpoints as checkpoints_module

    out = killed(whole, tmp_path / "run", after=5)
    monkeypatch.setattr(checkpoints_module, "save_file", full)
    with pytest.raises(RunError, match=r"step-000000006 cannot be written \(.*No space left.*`trainer fit --resume"):
        fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
    assert len(checkpoints(out)) == 5
    monkeypatch.undo()
    fit(indexed, CONFIG, out, resume=True, runtime=EVERY_STEP)
    assert_same_run(whole, out)


def test_mistakes_are_found_before_the_search_is_opened(whole, indexed, tmp_path, monkeypatch, changed_encoder):
    def opened(*arguments, **options):
        raise AssertionError("the search was opened")

    monkeypatch.setattr(loop_module, "open_search", opened)
    with pytest.raises(RunError, match="is a training run already"):
        fit(indexed, CONFIG, whole)
    with pytest.raises(RunError, match="is already trained for 192 images: add a larger --images"):
        fit(indexed, CONFIG, whole, resume=True)
    changed = replace(indexed.meta, image_encoder=replace(indexed.meta.image_encoder, name=changed_encoder))
    with pytest.raises(EncoderError, match="are not those that the table is encoded with"):
        fit(replace(indexed, meta=changed), CONFIG, tmp_path / "run")
    flow = replace(CONFIG, objective="rectified_flow", hyperparameters={"flow": str(tmp_path / "nowhere")})
    with pytest.raises(RunError, match="nowhere is not a training run"):
        fit(indexed, flow, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def library_logging() -> list:
    """What libraries print of their own: levels, progress bars, filters of warnings."""
    import diffusers
    import huggingface_hub
    import transformers

    libraries = [diffusers.utils.logging, transformers.utils.logging, huggingface_hub.utils.logging]
    bars = [each.is_progress_bar_enabled() for each in libraries[:2]]
    bars.append(not huggingface_hub.utils.are_progress_bars_disabled())
    return [[each.get_verbosity() for each in libraries], bars, list(warnings.filters)]


@pytest.mark.slow
def test_two_fits_in_one_process_compute_in_different_dtypes_and_leave_the_process_as_it_was(
    indexed, tmp_path, monkeypatch, three_threads
):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # with it fit chooses no number of threads
    AcceleratorState._reset_state(reset_partial_state=True)
    mine = Accelerator(cpu=True)
    threads, drawn, environment = torch.get_num_threads(), torch.random.get_rng_state(), dict(os.environ)
    logging = library_logging()
    np.random.seed(7)
    drawn_by_numpy = np.random.get_state()[1].tolist()
    short = replace(CONFIG, images=2 * 32)
    losses = [fit(indexed, replace(short, dtype=name), tmp_path / name)["loss"] for name in ("float32", "bfloat16")]
    assert fit(indexed, short, tmp_path / "again")["loss"] == losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert dict(os.environ) == environment
    CoalescerPipeline.from_pretrained(tmp_path / "again")(CAPTIONS)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert np.random.get_state()[1].tolist() == drawn_by_numpy
    assert library_logging() == logging
    assert mine.state.mixed_precision == "no"
    assert Accelerator(cpu=True).state.mixed_precision == "no"


def test_a_launcher_of_another_precision_is_refused(indexed, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(OptionError, match=r"--dtype float32 is not what `accelerate launch --mixed_precision bf16`"):
        fit(indexed, CONFIG, tmp_path / "run")
