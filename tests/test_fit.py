"""Training end to end on a small table: it learns, it resumes exactly, and its folder stands on its own."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import killed
from PIL import Image
from safetensors.torch import load_file

import trainer.training_loop as loop_module
from index.build.build_index import BuildConfig, build_index
from index.errors import EncoderError, OptionError, RunError, TableError
from index.table.schema import HELDOUT
from index.table.table import open_table
from trainer.checkpoints import checkpoints
from trainer.config import FitConfig, RuntimeConfig
from trainer.fit import fit
from trainer.models.transformer import LatentTransformer
from trainer.objectives.coalescer import Coalescer
from trainer.objectives.registry import OBJECTIVES, PRESETS
from trainer.run_folder import read_config
from trainer.sampler import CoalescerPipeline
from trainer.tracking import choose_captions

CONFIG = FitConfig(size="tiny", images=300 * 64, batch_size=64)
SHORT = FitConfig(size="tiny", images=40 * 32, batch_size=32)
EVERY_STEP = RuntimeConfig(checkpoint_seconds=0.0, keep_checkpoints=100)
WEIGHTS = "network/diffusion_pytorch_model.safetensors"
CAPTIONS = ["a small red circle above a large blue square", "a large black square left of a small green circle"]


@pytest.fixture(scope="module")
def run(indexed, tmp_path_factory):
    """A short run on the indexed shapes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(indexed, CONFIG, out)
    return out


@pytest.fixture(scope="module")
def short(indexed, tmp_path_factory):
    """A shorter run."""
    out = tmp_path_factory.mktemp("short") / "run"
    fit(indexed, SHORT, out)
    return out


@pytest.fixture(scope="module")
def traced(indexed, tmp_path_factory):
    """The shorter run with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("traced") / "run"
    fit(indexed, SHORT, out, runtime=EVERY_STEP)
    return out


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(one, other) -> bool:
    a, b = (load_file(run / WEIGHTS) for run in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_reports_its_metrics(run, indexed):
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["images"]) == (300, 19_200)
    assert 0 <= result["waiting_fraction"] < 1
    # A direction independent of the target has a loss of 1. Nine in ten inputs lie between R and the pair, where
    # the direction is harder to predict than at R.
    assert result["direction"] < 0.85
    assert lines(run / "log.jsonl")[-1]["done"] == 19_200
    config = read_config(run)
    assert config["table"]["version"] == indexed.version
    assert config["objective"]["p"] == 2.0


def test_a_run_ends_with_a_grid_of_samples(run):
    with Image.open(run / "samples.png") as grid:
        assert grid.width == 8 * 136 + 8


@pytest.mark.slow
def test_samples_are_tracked_with_every_checkpoint_and_change_nothing(short, traced):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(traced / "tensorboard"), size_guidance={"images": 0}).Reload()
    samples = events.Images("samples")
    assert [image.step for image in samples] == list(range(32, 1281, 32))
    assert samples[0].encoded_image_string != samples[-1].encoded_image_string
    scalars = {"loss", "distance", "direction", "direction_length", "waiting_fraction", "rate"}
    assert scalars <= set(events.Tags()["scalars"])
    assert same_weights(short, traced)


@pytest.mark.slow
def test_a_resumed_run_logs_no_step_twice(traced, indexed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = killed(traced, tmp_path / "run", after=25)
    fit(indexed, SHORT, out, resume=True, runtime=EVERY_STEP)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("samples")] == list(range(32, 1281, 32))
    assert [event.step for event in events.Scalars("loss")] == [32, 672, 1280]
    logged = [[(line["done"], line["loss"]) for line in lines(run / "log.jsonl")] for run in (traced, out)]
    assert logged[0] == logged[1]


@pytest.fixture(scope="module")
def transformer(indexed, tmp_path_factory):
    """A short run of a transformer that attends to six token embeddings, with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("transformer") / "run"
    config = replace(SHORT, network="transformer", num_tokens=6, learning_rate=3e-3)
    # In forty steps nothing is learned near the end of a segment, where most inputs of the default lie.
    fit(indexed, replace(config, hyperparameters={"segment": 0.5, "consistency": 1.0}), out, runtime=EVERY_STEP)
    return out


@pytest.mark.slow
def test_a_transformer_attends_to_token_embeddings_and_learns(transformer):
    network = CoalescerPipeline.from_pretrained(transformer).network
    assert type(network) is LatentTransformer
    assert network.num_tokens == 6
    result = json.loads((transformer / "result.json").read_text())
    assert result["direction"] < 0.92


@pytest.mark.slow
def test_a_transformer_resumes_to_the_same_weights(transformer, indexed, tmp_path):
    out = killed(transformer, tmp_path / "run", after=13)
    fit(indexed, FitConfig(**read_config(transformer)["fit"]), out, resume=True)
    assert same_weights(transformer, out)


def test_weights_are_safetensors_only(run):
    names = [path.name for path in run.rglob("*") if path.is_file()]
    assert Path(WEIGHTS).name in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]


@pytest.mark.slow
def test_same_seed_same_weights_and_another_seed_others(short, indexed, tmp_path):
    fit(indexed, SHORT, tmp_path / "again")
    fit(indexed, replace(SHORT, seed=1), tmp_path / "other")
    assert same_weights(short, tmp_path / "again")
    assert not same_weights(short, tmp_path / "other")


def test_a_run_that_is_killed_resumes_to_the_same_weights(traced, indexed, tmp_path):
    out = killed(traced, tmp_path / "run", after=25)
    fit(indexed, SHORT, out, resume=True)
    assert same_weights(traced, out)


def test_the_latest_checkpoints_are_kept(indexed, tmp_path):
    runtime = RuntimeConfig(checkpoint_seconds=0.0, keep_checkpoints=2)
    fit(indexed, replace(SHORT, images=4 * 32), tmp_path / "run", runtime=runtime)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000000003", "step-000000004"]


@pytest.mark.slow
def test_a_run_resumes_on_the_table_version_it_began_with(shapes, encode_shapes, tmp_path):
    table = build_index(encode_shapes(shapes, tmp_path / "t.lance").table, BuildConfig()).table
    fit(table, SHORT, tmp_path / "whole", runtime=EVERY_STEP)
    out = killed(tmp_path / "whole", tmp_path / "run", after=1)
    newer = build_index(open_table(table.uri), BuildConfig(desc_scale=2.0, geometry="raw")).table
    assert newer.version > table.version
    fit(newer, SHORT, out, resume=True)
    assert same_weights(tmp_path / "whole", out)


def test_a_changed_option_is_refused_on_resume(run, indexed):
    with pytest.raises(RunError, match="was trained with --batch-size 64, not 32: leave the option out"):
        fit(indexed, replace(CONFIG, batch_size=32), run, resume=True)
    with pytest.raises(RunError, match="already trained"):
        fit(indexed, CONFIG, run, resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(run, indexed):
    before = (run / WEIGHTS).read_bytes()
    with pytest.raises(RunError, match="--resume"):
        fit(indexed, CONFIG, run)
    assert (run / WEIGHTS).read_bytes() == before


def test_resuming_nothing_is_refused(indexed, tmp_path):
    with pytest.raises(RunError, match="trainer fit"):
        fit(indexed, CONFIG, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_beginning(traced, indexed, tmp_path):
    out = killed(traced, tmp_path / "run", after=0)
    fit(indexed, SHORT, out, resume=True)
    assert same_weights(traced, out)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, zero_the_end, zero, Path.unlink], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", WEIGHTS, "network/config.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(traced, indexed, tmp_path, damage, name, capsys):
    out = killed(traced, tmp_path / "run", after=39)
    damage(checkpoints(out)[-1] / name)
    # Sampling passes over it too.
    sampled = CoalescerPipeline.from_pretrained(out)(CAPTIONS).latents
    assert "step-000000039 cannot be read" in capsys.readouterr().err
    fit(indexed, SHORT, out, resume=True)
    assert re.search(r"warning: \S*step-000000039 is damaged .*: resuming from step-000000038", capsys.readouterr().err)
    assert same_weights(traced, out)
    before = killed(traced, tmp_path / "before", after=38)
    assert np.array_equal(sampled, CoalescerPipeline.from_pretrained(before)(CAPTIONS).latents)


@pytest.mark.slow
def test_damaged_checkpoints_go_when_later_ones_are_written(traced, indexed, tmp_path):
    out = killed(traced, tmp_path / "run", after=30)
    for path in checkpoints(out)[-3:]:
        truncate(path / "state.safetensors")
    fit(indexed, SHORT, out, resume=True, runtime=RuntimeConfig(checkpoint_seconds=0.0, keep_checkpoints=2))
    assert [path.name for path in checkpoints(out)] == ["step-000000039", "step-000000040"]
    assert same_weights(traced, out)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(traced, indexed, tmp_path):
    out = killed(traced, tmp_path / "run", after=2)
    for path in checkpoints(out):
        truncate(path / "state.safetensors")
    with pytest.raises(RunError, match=r"step-000000001 is damaged .* delete \S*checkpoints to train from"):
        fit(indexed, SHORT, out, resume=True)
    with pytest.raises(RunError, match=r"no checkpoint of .* can be read .* train again"):
        CoalescerPipeline.from_pretrained(out)


def test_a_checkpoint_of_another_network_is_refused(run, indexed, tmp_path):
    config = replace(SHORT, size="small", images=2 * 32)
    fit(indexed, config, tmp_path / "whole", runtime=EVERY_STEP)
    out = killed(tmp_path / "whole", tmp_path / "run", after=1)
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(run / "checkpoints", out / "checkpoints")
    with pytest.raises(RunError, match=r"do not fit the network: \S+ has shape .* there instead of"):
        fit(indexed, config, out, resume=True)


def test_encoders_that_have_changed_are_refused(indexed, tmp_path, changed_encoder):
    changed = replace(indexed.meta.image_encoder, name=changed_encoder)
    with pytest.raises(EncoderError, match="are not those that the table is encoded with"):
        fit(replace(indexed, meta=replace(indexed.meta, image_encoder=changed)), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Poisoned(Coalescer):
    """A coalescer whose loss is NaN from step 7 of 40 on."""

    def loss(self, network, batch, training):
        loss = super().loss(network, batch, training)
        return loss if training.progress < 7 / 40 else loss._replace(total=loss.total * float("nan"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(indexed, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "poisoned", Poisoned)
    monkeypatch.setitem(PRESETS, "poisoned", PRESETS["coalescer"])
    with pytest.raises(RunError, match=r"the loss is nan .*at step 7; .*step-000000007 was written.*--learning-rate"):
        fit(indexed, replace(SHORT, objective="poisoned"), tmp_path / "run", runtime=EVERY_STEP)
    tensors = load_file(checkpoints(tmp_path / "run")[-1] / "state.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())


@pytest.mark.slow
def test_accumulated_gradients_train_as_the_whole_batch_does(indexed, tmp_path):
    """At a learning rate that does not amplify rounding."""
    gentle, trained = replace(SHORT, learning_rate=5e-4), []
    for steps in (1, 4):
        out = tmp_path / f"in-{steps}"
        fit(indexed, gentle, out, runtime=RuntimeConfig(gradient_accumulation_steps=steps))
        trained.append(load_file(out / WEIGHTS))
    whole, parts = trained
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "magic"}, "--objective 'magic'"),
        ({"preset": "magic"}, "--preset 'magic'"),
        ({"size": "magic"}, "--size 'magic'"),
        ({"search": "magic"}, "--search 'magic'"),
        ({"images": 10}, "--images 10"),
        ({"reuse": 0}, "--reuse 0"),
        ({"num_neighbors": 0}, "--num-neighbors 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"dtype": "fp8"}, "--dtype 'fp8'"),
        ({"hyperparameters": {"q": 1.0}}, "--set q is unknown for coalescer: choose one of dropout, p, segment"),
        ({"hyperparameters": {"p": "x"}}, "--set p=x is not a number"),
        ({"hyperparameters": {"p": 0.0}}, "--set p=0.0 is out of range"),
        ({"hyperparameters": {"segment": 2.0}}, "--set segment=2.0 is out of range"),
        ({"hyperparameters": {"segment": 0.7, "self_segment": 0.5}}, "are more than 1 together"),
        ({"hyperparameters": {"consistency": -1.0}}, "--set consistency=-1.0 is out of range"),
        ({"condition": "both"}, "--condition 'both' is unknown: choose one of retrieved, query"),
        ({"network": "unet"}, "--network 'unet' is unknown: choose one of auto, mlp, transformer"),
        ({"coupling": "best"}, "--coupling 'best'"),
        ({"jitter": -0.1}, "--jitter -0.1"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(OptionError, match=said):
        FitConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "flow_matching", "coupling": "independent"},
        {"preset": "paper"},
        {"preset": "paper", "search": "exact"},
        {"objective": "endpoint", "search": "exact"},
        {"objective": "shortcut", "coupling": "independent"},
        {"objective": "consistency", "coupling": "independent"},
    ],
)
def test_every_objective_trains_and_samples(indexed, tmp_path, options):
    fit(indexed, FitConfig(size="tiny", images=320, batch_size=32, **options), tmp_path / "run")
    pipeline = CoalescerPipeline.from_pretrained(tmp_path / "run")
    guidance_scale = 2.0 if pipeline.objective.dropout else 1.0
    samples = pipeline(CAPTIONS, num_images_per_prompt=2, num_inference_steps=2, guidance_scale=guidance_scale)
    assert np.isfinite(samples.latents).all()
    assert np.isnan(samples.confidence).all() == (options.get("objective", "coalescer") != "coalescer")


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 0}, {"keep_checkpoints": 0}], ids=lambda options: next(iter(options))
)
def test_runtime_options_are_checked(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')} 0 is out of range"):
        RuntimeConfig(**options)


@pytest.mark.slow
def test_a_rectified_flow_needs_its_flow_to_train_and_not_to_sample(indexed, run, tmp_path):
    flow = FitConfig(objective="flow_matching", size="tiny", images=320, batch_size=32, coupling="independent")
    fit(indexed, flow, tmp_path / "flow")
    # Without a search there is nothing to wait for.
    assert read_config(tmp_path / "flow")["fit"]["reuse"] == 1 < read_config(run)["fit"]["reuse"]
    hyperparameters = {"flow": str(tmp_path / "flow"), "solver_steps": 3.0}
    config = replace(flow, objective="rectified_flow", hyperparameters=hyperparameters)
    fit(indexed, config, tmp_path / "whole", runtime=EVERY_STEP)
    fit(indexed, config, killed(tmp_path / "whole", tmp_path / "run", after=4), resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "flow")
    assert np.isfinite(CoalescerPipeline.from_pretrained(tmp_path / "run")(CAPTIONS).latents).all()
    with pytest.raises(RunError, match="flow is not a training run"):
        fit(indexed, config, tmp_path / "another")
    assert not (tmp_path / "another").exists()


@pytest.mark.slow
def test_independent_pairs_need_no_index_and_open_no_search(encoded, tmp_path, monkeypatch, capsys):
    def opened(*arguments, **options):
        raise AssertionError("the search was opened")

    monkeypatch.setattr(loop_module, "open_search", opened)
    config = FitConfig(
        objective="flow_matching", size="tiny", images=4 * 32, batch_size=32, coupling="independent", search="exact"
    )
    fit(encoded, config, tmp_path / "whole", runtime=EVERY_STEP)
    assert "trains each caption on its own latent: nothing is searched" in capsys.readouterr().err
    fit(encoded, config, killed(tmp_path / "whole", tmp_path / "run", after=2), resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_previews_show_distinct_captions(colored, tmp_path):
    """Of a table that has few captions, each many times, in the order of its rows."""
    captions = choose_captions(colored)
    assert sorted(captions) == sorted(set(colored.take(colored.positions(HELDOUT), "caption").tolist()))


@pytest.mark.slow
def test_a_flow_of_other_coordinates_is_refused_before_a_run_is_begun(indexed, shapes, encode_shapes, tmp_path):
    raw = build_index(encode_shapes(shapes, tmp_path / "raw.lance").table, BuildConfig(geometry="raw")).table
    flow = FitConfig(objective="flow_matching", size="tiny", images=64, batch_size=32, search="exact")
    fit(raw, flow, tmp_path / "flow")
    config = replace(flow, objective="rectified_flow", hyperparameters={"flow": str(tmp_path / "flow")})
    with pytest.raises(
        RunError, match="was trained with another geometry and latents: first train a flow on this table"
    ):
        fit(indexed, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_to_the_same_weights(indexed, tmp_path):
    config = replace(SHORT, objective="shortcut", hyperparameters={"bootstrap_fraction": 0.5})
    fit(indexed, config, tmp_path / "whole", runtime=EVERY_STEP)
    fit(indexed, config, killed(tmp_path / "whole", tmp_path / "run", after=25), resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_table_without_index_is_not_trained_on(encoded):
    with pytest.raises(TableError, match="build-index"):
        open_table(encoded.uri, indexed=True)


def test_a_training_step_calls_nothing_that_an_apple_gpu_lacks(indexed, tmp_path, monkeypatch):
    """CUDA cannot be synchronized there, and gradients cannot be clipped with foreach=True."""
    from accelerate import Accelerator

    from trainer.training_loop import Trainer

    clip = torch.nn.utils.clip_grad_norm_

    def clip_as_mps_does(parameters, norm, foreach=None):
        assert not foreach
        return clip(parameters, norm, foreach=False)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_as_mps_does)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: pytest.fail("CUDA is synchronized"))
    trainer = Trainer(Accelerator(cpu=True), indexed, replace(SHORT, reuse=1), tmp_path / "run", RuntimeConfig())
    trainer.open_stream()
    _, batch = next(iter(trainer.stream))
    trainer._step(trainer.network, 0, batch)


@pytest.mark.slow
def test_training_that_waits_long_says_so_once(indexed, tmp_path, monkeypatch, capsys):
    from trainer import loop
    from trainer.stream import NeighborStream

    batches = NeighborStream.batches
    monkeypatch.setattr(NeighborStream, "batches", lambda *given: time.sleep(0.3) or batches(*given))
    monkeypatch.setattr("index.search.pairs.QUERIES_PER_SEARCH", 64)
    monkeypatch.setattr("trainer.stream.QUERIES_PER_SEARCH", 64)
    config = FitConfig(size="tiny", images=81 * 32, batch_size=32, reuse=1)
    fit(indexed, config, tmp_path / "short")
    assert "training waits" not in capsys.readouterr().err  # for less than ten seconds
    monkeypatch.setattr(loop, "MIN_SECONDS", 0.5)
    fit(indexed, config, tmp_path / "run")
    said = r"warning: training waits \d+% of the time for its batches, more than 5%: .* --reuse above 1\n"
    assert len(re.findall(said, capsys.readouterr().err)) == 1


@pytest.mark.slow
def test_the_data_type_of_a_run_is_chosen_when_it_begins(traced, indexed, tmp_path, monkeypatch):
    assert read_config(traced)["fit"]["dtype"] == "float32"
    monkeypatch.setattr("trainer.fit.default_dtype", lambda device: "bfloat16")  # as on CUDA
    fit(indexed, replace(SHORT, images=64), tmp_path / "half")
    assert read_config(tmp_path / "half")["fit"]["dtype"] == "bfloat16"
    fit(indexed, SHORT, killed(traced, tmp_path / "run", after=38), resume=True)
    assert same_weights(traced, tmp_path / "run")


def test_cuda_multiplies_in_tf32_and_only_while_it_trains(tmp_path, monkeypatch):
    from trainer.process import open_accelerator

    before = torch.get_float32_matmul_precision()
    with open_accelerator("cpu", "float32", tmp_path):
        assert torch.get_float32_matmul_precision() == before
    monkeypatch.setattr("trainer.process.resolve_device", lambda device: "cuda")
    with open_accelerator("auto", "float32", tmp_path):
        assert torch.get_float32_matmul_precision() == "high" != before
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_gradients_of_recomputed_activations_are_the_same(indexed, tmp_path, network):
    config = replace(SHORT, images=3 * 32, network=network, num_tokens=0, reuse=1)
    for name, recomputed in (("kept", False), ("recomputed", True)):
        fit(indexed, config, tmp_path / name, runtime=RuntimeConfig(gradient_checkpointing=recomputed))
    assert same_weights(tmp_path / "kept", tmp_path / "recomputed")


@pytest.mark.slow
def test_activations_are_recomputed_by_default_for_large_networks_on_an_accelerator(indexed, tmp_path, monkeypatch):
    from trainer.training_loop import Trainer

    def recomputes(device: str, size: str, wanted: bool | None = None) -> bool:
        accelerator = type("Accelerator", (), {"device": torch.device(device)})
        runtime = RuntimeConfig(gradient_checkpointing=wanted)
        network = Trainer(accelerator, indexed, replace(SHORT, size=size), tmp_path, runtime).network
        return network.is_gradient_checkpointing

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda module, device: module)
        patch.setattr("trainer.training_loop.Trainer._make_optimizer", lambda self: None)
        assert recomputes("cuda", "large")
        assert recomputes("cpu", "tiny", True)
        assert not any((recomputes("cuda", "tiny"), recomputes("cpu", "large"), recomputes("cuda", "large", False)))
