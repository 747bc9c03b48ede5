"""Going on with a run: --resume alone, more --images, a table that was moved, and --init from another run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trainer.cli
from index.build.build_index import BuildConfig, build_index
from index.errors import RunError
from index.table.table import open_table
from trainer.checkpoints import checkpoints
from trainer.config import FitConfig, RuntimeConfig
from trainer.fit import fit
from trainer.optimizer import Optimizer, ema_decay
from trainer.run_folder import read_config

CONFIG = FitConfig(size="tiny", images=6 * 32, batch_size=32, hyperparameters={"p": 1.5})
EVERY_STEP = RuntimeConfig(device="cpu", checkpoint_seconds=0.0, keep_checkpoints=100)
WEIGHTS = "network/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(indexed, tmp_path_factory):
    """A run of six steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(indexed, CONFIG, out, runtime=EVERY_STEP)
    return out


@pytest.fixture
def stopped(whole, tmp_path):
    """The run as a kill after its third step would leave it."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in checkpoints(out)[3:]:
        shutil.rmtree(path)
    shutil.rmtree(out / "network")
    (out / "result.json").unlink()
    return out


@pytest.fixture
def trainer_fit(monkeypatch, capsys):
    """A function that runs `trainer fit` in this process and returns its exit code and errors."""

    def run(*argv) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trainer", "fit", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            trainer.cli.main()
        return ended.value.code, capsys.readouterr().err

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / WEIGHTS)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_resume_needs_no_other_option(whole, stopped, trainer_fit):
    assert trainer_fit("--resume", "--out", stopped)[0] == 0
    assert same(weights(whole), weights(stopped))
    assert len(checkpoints(stopped)) >= 4, "--keep-checkpoints and --checkpoint-seconds are those of the run"


@pytest.mark.slow
def test_a_run_remembers_how_it_was_computed(stopped, trainer_fit):
    trainer_fit("--resume", "--out", stopped, "--keep-checkpoints", 1)
    assert [path.name for path in checkpoints(stopped)] == ["step-000000006"]
    assert read_config(stopped)["runtime"]["keep_checkpoints"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 64], "--batch-size 32, not 64: leave the option out to resume it, or use another --out"),
        (["--set", "p=2"], "--set p=1.5, not p=2.0: leave"),
        (["--objective", "endpoint"], "--objective coalescer, not endpoint"),
        (["--seed", 1], "--seed 0, not 1"),
        (["--images", 64], "--images 192, not 64"),
        (["--ema-window", 0.2], "--ema-window 0.1, not 0.2"),
    ],
)
def test_options_that_contradict_the_run_are_refused(stopped, trainer_fit, options, message):
    before = sorted(stopped.rglob("*"))
    code, errors = trainer_fit("--resume", "--out", stopped, *options)
    assert code == 2
    assert f"error: {stopped} was trained with {message}" in errors
    assert sorted(stopped.rglob("*")) == before


def test_options_that_agree_are_accepted(whole, stopped, indexed, trainer_fit):
    options = ["--size", "tiny", "--images", 192, "--batch-size", 32, "--set", "p=1.5", "--seed", 0]
    assert trainer_fit(indexed.uri, "--resume", "--out", stopped, *options)[0] == 0
    assert same(weights(whole), weights(stopped))


def test_without_resume_a_table_is_needed(tmp_path, trainer_fit):
    code, errors = trainer_fit("--out", tmp_path / "run")
    assert code == 2
    assert "error: TABLE is missing: name a table, or add --resume" in errors


@pytest.mark.slow
def test_more_images_train_a_finished_run_on_and_always_to_the_same_weights(whole, tmp_path, indexed, trainer_fit):
    """At the step that it has reached, in the schedule of the new length."""
    longer = []
    for name in ("one", "two"):
        out = tmp_path / name
        shutil.copytree(whole, out)
        assert trainer_fit("--resume", "--out", out, "--images", 12 * 32)[0] == 0
        longer.append(weights(out))
    assert same(*longer)
    assert not same(longer[0], weights(whole))
    assert json.loads((tmp_path / "one" / "result.json").read_text())["images"] == 384
    assert read_config(tmp_path / "one")["fit"]["images"] == 384
    # The schedule of the first half was another one, so this is not the run that was this long from the beginning.
    fit(indexed, replace(CONFIG, images=12 * 32), tmp_path / "from the beginning", runtime=EVERY_STEP)
    assert not same(longer[0], weights(tmp_path / "from the beginning"))
    done = [json.loads(line)["done"] for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert done == [32, 192, 384]


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_is_trained_on_goes_on(whole, tmp_path, indexed):
    longer = replace(CONFIG, images=12 * 32)
    for name in ("one", "two"):
        shutil.copytree(whole, tmp_path / name)
        fit(indexed, longer, tmp_path / name, resume=True, runtime=EVERY_STEP)
    out = tmp_path / "two"
    for path in checkpoints(out)[8:]:
        shutil.rmtree(path)
    (out / "result.json").unlink()
    fit(indexed, longer, out, resume=True, runtime=EVERY_STEP)
    assert same(weights(tmp_path / "one"), weights(out))


def test_the_learning_rate_of_a_longer_run_is_that_of_its_step_in_the_new_length():
    def make(steps):
        torch.manual_seed(0)
        return Optimizer(torch.nn.Linear(2, 2), steps=steps, learning_rate=0.1)

    short, long = make(10), make(20)
    for optimizer, steps in ((short, 10), (long, 10)):
        for _ in range(steps):
            optimizer.step(optimizer._model(torch.ones(1, 2)).sum())
    resumed = make(20)
    tensors, counters = short.state()
    resumed.load_state(tensors, short.averaged_model.state_dict(), counters)
    rates = [each.adam.param_groups[0]["lr"] for each in (short, long, resumed)]
    assert rates[2] == rates[1] > rates[0]


def test_a_table_that_was_moved_is_named_again(stopped, whole, indexed, tmp_path, trainer_fit):
    moved = tmp_path / "elsewhere" / "other.lance"
    shutil.copytree(indexed.uri, moved)
    config = json.loads((stopped / "config.json").read_text())
    config["table"]["uri"] = "/nowhere/gone.lance"
    (stopped / "config.json").write_text(json.dumps(config))
    code, errors = trainer_fit("--resume", "--out", stopped)
    assert code == 2
    assert "no table at /nowhere/gone.lance" in errors
    assert trainer_fit(moved, "--resume", "--out", stopped)[0] == 0
    assert same(weights(whole), weights(stopped))
    assert read_config(stopped)["table"]["uri"] == str(moved)


@pytest.mark.slow
def test_another_table_is_refused(stopped, indexed, shapes, encode_shapes, tmp_path):
    other = encode_shapes(shapes, tmp_path / "other.lance", val_fraction=0.3).table
    other = build_index(open_table(other.uri), BuildConfig(index_type="ivf_rq", target_recall=0.95)).table
    with pytest.raises(RunError, match=r"other\.lance is not the table that .* is trained on"):
        fit(other, CONFIG, stopped, resume=True)


@pytest.mark.slow
def test_a_run_starts_from_the_averaged_weights_of_another(whole, indexed, tmp_path):
    started = tmp_path / "started"
    config = replace(CONFIG, seed=5, images=2 * 32, init=str(whole))
    fit(indexed, config, started, runtime=EVERY_STEP)
    first = load_file(checkpoints(started)[0] / WEIGHTS)
    assert checkpoints(started)[0].name == "step-000000000"
    assert same(first, weights(whole))
    # Resuming before the first training step needs the other run no more.
    copy = tmp_path / "copy"
    shutil.copytree(started, copy)
    for path in checkpoints(copy)[1:]:
        shutil.rmtree(path)
    (copy / "result.json").unlink()
    saved = json.loads((copy / "config.json").read_text())
    fit(indexed, replace(config, reuse=saved["fit"]["reuse"]), copy, resume=True, runtime=EVERY_STEP)
    assert same(weights(started), weights(copy))


def test_a_run_in_training_can_be_started_from(stopped, indexed, tmp_path):
    fit(indexed, replace(CONFIG, images=32, init=str(stopped)), tmp_path / "next", runtime=EVERY_STEP)
    last = load_file(checkpoints(stopped)[-1] / WEIGHTS)
    assert same(last, load_file(checkpoints(tmp_path / "next")[0] / WEIGHTS))


def test_weights_that_do_not_fit_are_refused_with_both_shapes(whole, indexed, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"--init \S+ do not fit .*: \S+ has shape \(.*\) there instead of \(.*\)"):
        fit(indexed, replace(CONFIG, size="small", init=str(whole)), out)
    with pytest.raises(RunError, match=r"--init \S+nowhere cannot be used: \S+ is not a training run"):
        fit(indexed, replace(CONFIG, init=str(tmp_path / "nowhere")), out)
    assert not out.exists()


def test_the_average_reaches_back_over_a_fraction_of_training_whatever_its_length():
    for steps in (1_000, 1_000_000):
        assert 1 / (1 - ema_decay(steps, 0.1)) == pytest.approx(1 + 0.1 * steps)
    # As before, up to 5,000 steps: the warmup 1 - 1 / (1 + n / 10).
    assert [ema_decay(n, 0.1) for n in range(5000)] == [1 - 1 / (1 + n / 10) for n in range(5000)]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["coalescer", "imle"])
def test_every_row_weighs_the_same_in_parts_of_unequal_size(indexed, tmp_path, objective):
    """Ten rows in four parts are 3, 3, 3 and 1. IMLE compares each with a pool of the whole batch."""
    config = FitConfig(size="tiny", images=20, batch_size=10, learning_rate=1e-5, objective=objective, reuse=1)
    runs = []
    for parts in (1, 4):
        runtime = replace(EVERY_STEP, gradient_accumulation_steps=parts)
        runs.append(fit(indexed, config, tmp_path / str(parts), runtime=runtime))
    assert runs[1]["loss"] == pytest.approx(runs[0]["loss"], rel=1e-5)
    assert runs[1]["gradient_norm"] == pytest.approx(runs[0]["gradient_norm"], rel=1e-4)
    first, second = (json.loads((tmp_path / each / "log.jsonl").read_text().splitlines()[0]) for each in ("1", "4"))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
