"""Training end to end on a small table: it learns, it resumes exactly, and its folder stands on its own."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from index.build.build_index import BuildConfig, build_index
from index.errors import EncoderError, OptionError, RunError, TableError
from index.table.table import open_table
from trainer import fit as fit_module
from trainer import folder as folder_module
from trainer.config import FitConfig, RuntimeConfig
from trainer.fit import fit
from trainer.run_folder import checkpoints, read_config
from trainer.sampler import Coalescer

CONFIG = FitConfig(size="tiny", images=300 * 64, batch_size=64)
SHORT = FitConfig(size="tiny", images=40 * 32, batch_size=32)


@pytest.fixture(scope="module")
def run(indexed, tmp_path_factory):
    """A short run on the indexed shapes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(indexed, CONFIG, out)
    return out


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_learns_and_says_what_it_did(run, indexed):
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["images"]) == (300, 19_200)
    assert 0 <= result["waiting_fraction"] < 1
    # Knowing nothing of the direction costs 1. Nine in ten inputs lie on the way, where it is harder to tell than at R.
    assert result["direction"] < 0.85
    assert lines(run / "log.jsonl")[-1]["done"] == 19_200
    assert list((run / "tensorboard").iterdir())
    config = read_config(run)
    assert config["table"]["version"] == indexed.version
    assert config["objective"]["p"] == 2.0


def test_a_run_ends_with_pictures_and_a_page(run, indexed):
    with Image.open(run / "samples.png") as grid:
        assert grid.width == 8 * 136 + 8
    page = (run / "index.html").read_text()
    assert page.count("<svg") == 9
    assert "Captions of held-out rows, 2 steps each" in page
    assert "<th>images_per_second</th>" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_samples_are_shown_on_the_way_and_change_nothing(short, indexed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(indexed, SHORT, tmp_path / "run", machine=EVERY_STEP)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = events.Images("samples")
    assert [each.step for each in shown] == list(range(32, 1281, 32))
    assert shown[0].encoded_image_string != shown[-1].encoded_image_string
    assert {"loss", "distance", "direction", "direction_length", "waiting", "rate"} <= set(events.Tags()["scalars"])
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(short[name], weights[name]) for name in short)


@pytest.fixture(scope="module")
def attentive(indexed, tmp_path_factory):
    """A short run of a transformer that reads six token states."""
    out = tmp_path_factory.mktemp("attentive") / "run"
    config = FitConfig(network="transformer", num_tokens=6, size="tiny", images=40 * 32, batch_size=32, learning_rate=3e-3)
    # Forty steps are too few to learn anything of the way near its end, where most inputs of the default lie.
    fit(indexed, replace(config, hyperparameters={"segment": 0.5, "consistency": 1.0}), out)
    return out


def test_a_transformer_reads_token_states_and_learns(attentive):
    network = read_config(attentive)["network"]
    assert (network["kind"], network["tokens"], network["channels"], network["height"]) == ("transformer", 6, 2, 4)
    result = json.loads((attentive / "result.json").read_text())
    assert result["direction"] < 0.92
    coalescer = Coalescer.from_pretrained(attentive)
    assert coalescer.describe(CAPTIONS).shape == (2, 7, 16)
    samples = coalescer(CAPTIONS, num=2)
    assert samples.latents.shape == (4, 2, 4, 4)
    # A word more changes what is drawn, by its token state too.
    text = coalescer.describe(CAPTIONS)
    shorter = text.copy()
    shorter[:, 6] = 0
    one, other = (coalescer.coordinates(each, range(2), steps=1)[0] for each in (text, shorter))
    assert not np.allclose(one, other, atol=1e-4)


def test_a_transformer_resumes_to_the_same_weights(attentive, indexed, tmp_path, monkeypatch):
    config = FitConfig(**read_config(attentive)["fit"])
    fit_until(13, monkeypatch, indexed, config, tmp_path / "run")
    fit(indexed, config, tmp_path / "run", resume=True)
    whole, resumed = (load_file(each / "model.safetensors") for each in (attentive, tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_weights_are_safetensors_only(run):
    names = [path.name for path in run.rglob("*") if path.is_file()]
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]


@pytest.fixture(scope="module")
def short(indexed, tmp_path_factory):
    """The weights of a shorter run."""
    out = tmp_path_factory.mktemp("short") / "run"
    fit(indexed, SHORT, out)
    return load_file(out / "model.safetensors")


def test_same_seed_same_weights_and_another_seed_others(short, indexed, tmp_path):
    fit(indexed, SHORT, tmp_path / "again")
    fit(indexed, replace(SHORT, seed=1), tmp_path / "other")
    weights = short
    again, others = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "other"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not all(torch.equal(weights[name], others[name]) for name in weights)


EVERY_STEP = RuntimeConfig(checkpoint_seconds=-1.0)


def fit_until(step, monkeypatch, *given):
    """Train, and end as by Ctrl-C after the checkpoint of a step."""
    whole = fit_module.save_checkpoint

    def stop(out, at, *given, **named):
        whole(out, at, *given, **named)
        if at == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(*given, machine=EVERY_STEP)


def test_a_run_that_is_stopped_resumes_to_the_same_weights(short, indexed, tmp_path, monkeypatch):
    fit_until(25, monkeypatch, indexed, SHORT, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000000024", "step-000000025"]
    fit(indexed, SHORT, tmp_path / "run", resume=True, machine=EVERY_STEP)
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(short[name], resumed[name]) for name in short)


def test_a_run_resumes_on_the_table_version_it_began_with(shapes, encode_shapes, tmp_path, monkeypatch):
    table = build_index(encode_shapes(shapes, tmp_path / "t.lance").table, BuildConfig()).table
    fit(table, SHORT, tmp_path / "whole")
    fit_until(1, monkeypatch, table, SHORT, tmp_path / "run")
    newer = build_index(open_table(table.uri), BuildConfig(desc_scale=2.0, geometry="raw")).table
    assert newer.version > table.version
    fit(newer, SHORT, tmp_path / "run", resume=True)
    weights, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_changed_option_is_refused_on_resume(run, indexed):
    with pytest.raises(RunError, match="another batch_size"):
        fit(indexed, replace(CONFIG, batch_size=32), run, resume=True)
    with pytest.raises(RunError, match="already trained"):
        fit(indexed, CONFIG, run, resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(run, indexed):
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="--resume"):
        fit(indexed, CONFIG, run)
    assert (run / "model.safetensors").read_bytes() == before


def test_resuming_nothing_is_refused(indexed, tmp_path):
    with pytest.raises(RunError, match="trainer fit"):
        fit(indexed, CONFIG, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_run_stopped_before_its_first_checkpoint_begins_again(short, indexed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(indexed, SHORT, tmp_path / "run")
    fit(indexed, SHORT, tmp_path / "run", resume=True)
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(short[name], resumed[name]) for name in short)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(short, indexed, tmp_path, monkeypatch):
    out = tmp_path / "run"
    fit_until(25, monkeypatch, indexed, SHORT, out)
    last = checkpoints(out)[-1]
    path = last / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        RunError, match=r"step-000000025 is no checkpoint of this run .* remove it to resume from step 24"
    ):
        fit(indexed, SHORT, out, resume=True)
    shutil.rmtree(last)
    fit(indexed, SHORT, out, resume=True)
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(short[name], resumed[name]) for name in short)


def test_a_checkpoint_of_another_network_is_refused(run, indexed, tmp_path, monkeypatch):
    fit_until(1, monkeypatch, indexed, replace(SHORT, size="small"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match=r"do not fit the network.*remove it to resume from the beginning"):
        fit(indexed, replace(SHORT, size="small"), tmp_path / "run", resume=True)


def test_encoders_that_have_changed_are_refused(indexed, tmp_path, changed_encoder, monkeypatch):
    whole = folder_module.DiffusersAutoencoder
    monkeypatch.setattr(folder_module, "DiffusersAutoencoder", lambda name: whole(changed_encoder))
    with pytest.raises(EncoderError, match="other weights than the table"):
        fit(indexed, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(indexed, tmp_path, monkeypatch):
    whole, calls = fit_module.make_objective, []

    def poisoned(*given, **hyperparameters):
        objective = whole(*given, **hyperparameters)

        class Poisoned(type(objective)):
            def loss(self, *given):
                loss = super().loss(*given)
                calls.append(1)
                return loss if len(calls) < 8 else loss._replace(total=loss.total * float("nan"))

        return Poisoned()

    monkeypatch.setattr(fit_module, "make_objective", poisoned)
    with pytest.raises(RunError, match=r"the loss is nan at step 7 .*step-000000007 is from before.*--learning-rate"):
        fit(indexed, SHORT, tmp_path / "run", machine=EVERY_STEP)
    tensors = load_file(checkpoints(tmp_path / "run")[-1] / "state.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_batch_in_parts_trains_as_the_whole_does(indexed, tmp_path):
    """At a learning rate that does not amplify rounding."""
    gentle, trained = replace(SHORT, learning_rate=5e-4), []
    for accumulate in (1, 4):
        out = tmp_path / f"in-{accumulate}"
        fit(indexed, gentle, out, machine=RuntimeConfig(gradient_accumulation_steps=accumulate))
        trained.append(load_file(out / "model.safetensors"))
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
        ({"hyperparameters": {"q": 1.0}}, "--set q is unknown for coalescer: choose one of p, segment"),
        ({"hyperparameters": {"p": "x"}}, "--set p=x is no number"),
        ({"hyperparameters": {"p": 0.0}}, "p 0.0 is no power"),
        ({"hyperparameters": {"segment": 2.0}}, "segment 2.0 is no share"),
        ({"hyperparameters": {"segment": 0.7, "own": 0.5}}, "segment 0.7 and own 0.5 are more than 1"),
        ({"hyperparameters": {"consistency": -1.0}}, "consistency -1.0 is no weight"),
        ({"condition": "both"}, "--condition 'both' is unknown: choose one of close, query"),
        ({"network": "unet"}, "--network 'unet' is unknown: choose one of auto, mlp, transformer"),
        ({"coupling": "best"}, "--coupling 'best'"),
        ({"jitter": -0.1}, "--jitter -0.1"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(OptionError, match=said):
        FitConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "flow_matching", "coupling": "independent"},
        {"preset": "paper"},
        {"preset": "paper", "search": "exact"},
        {"objective": "endpoint", "search": "exact"},
        {"objective": "mean_flow"},
        {"objective": "mean_flow", "network": "transformer", "tokens": 6},
        {"objective": "shortcut", "coupling": "independent"},
        {"objective": "consistency", "coupling": "independent"},
        {"objective": "imle", "hyperparameters": {"pool": 3.0}},
    ],
)
def test_every_objective_trains_and_samples(indexed, tmp_path, options):
    fit(indexed, FitConfig(size="tiny", images=320, batch_size=32, **options), tmp_path / "run")
    samples = Coalescer.from_pretrained(tmp_path / "run")(CAPTIONS, num=2, steps=2, guidance=2.0)
    assert np.isfinite(samples.latents).all()
    assert np.isnan(samples.confidence).all() == (options.get("objective", "coalescer") != "coalescer")


def test_a_rectified_flow_needs_its_flow_to_train_and_not_to_sample(indexed, run, tmp_path, monkeypatch):
    flow = FitConfig(objective="flow_matching", size="tiny", images=320, batch_size=32, coupling="independent")
    fit(indexed, flow, tmp_path / "flow")
    # Where nothing is searched there is nothing to wait for.
    assert read_config(tmp_path / "flow")["fit"]["reuse"] == 1 < read_config(run)["fit"]["reuse"]
    hyperparameters = {"flow": str(tmp_path / "flow"), "solver_steps": 3.0}
    config = replace(flow, objective="rectified_flow", hyperparameters=hyperparameters)
    fit(indexed, config, tmp_path / "whole")
    fit_until(4, monkeypatch, indexed, config, tmp_path / "run")
    fit(indexed, config, tmp_path / "run", resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    shutil.rmtree(tmp_path / "flow")
    assert np.isfinite(Coalescer.from_pretrained(tmp_path / "run")(CAPTIONS).latents).all()
    with pytest.raises(RunError, match="flow is no training run"):
        FitConfig(objective="rectified_flow", hyperparameters=hyperparameters)


def test_a_flow_of_other_coordinates_is_refused_before_a_run_is_begun(indexed, shapes, encode_shapes, tmp_path):
    raw = build_index(encode_shapes(shapes, tmp_path / "raw.lance").table, BuildConfig(geometry="raw")).table
    flow = FitConfig(objective="flow_matching", size="tiny", images=64, batch_size=32, search="exact")
    fit(raw, flow, tmp_path / "flow")
    config = replace(flow, objective="rectified_flow", hyperparameters={"flow": str(tmp_path / "flow")})
    with pytest.raises(RunError, match="was trained with other geometry and latents: first train a flow on this table"):
        fit(indexed, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_teacher_resumes_to_the_same_weights(indexed, tmp_path, monkeypatch):
    config = replace(SHORT, objective="shortcut", hyperparameters={"share": 0.5})
    fit(indexed, config, tmp_path / "whole")
    fit_until(25, monkeypatch, indexed, config, tmp_path / "run")
    fit(indexed, config, tmp_path / "run", resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


CAPTIONS = ["a small red circle above a large blue square", "a large black square left of a small green circle"]


def test_samples_are_pictures_of_the_captions(run):
    samples = Coalescer.from_pretrained(run)(CAPTIONS, num=3, steps=2)
    assert len(samples.images) == 6
    assert samples.images[0].size == (32, 32)
    assert samples.captions == [CAPTIONS[0]] * 3 + [CAPTIONS[1]] * 3
    assert samples.latents.shape == (6, 2, 4, 4)
    assert samples.confidence.shape == (6,)
    assert (samples.confidence > 0).all()


def test_an_image_depends_on_its_seed_alone(run):
    coalescer = Coalescer.from_pretrained(run)
    many = coalescer(CAPTIONS, num=5, seed=7, batch_size=4).latents
    (alone,) = coalescer(CAPTIONS[1], num=1, seed=7).latents
    assert np.allclose(many[5], alone, atol=1e-5)
    assert not np.allclose(many[5], many[6], atol=1e-2)
    assert not np.allclose(coalescer(CAPTIONS[1], seed=8).latents[0], alone, atol=1e-2)


def test_redraws_keep_the_surest_point(run):
    coalescer = Coalescer.from_pretrained(run)
    plain, chosen = coalescer(CAPTIONS, num=8), coalescer(CAPTIONS, num=8, redraws=5)
    assert (chosen.confidence >= plain.confidence - 1e-5).all()
    assert chosen.confidence.mean() > plain.confidence.mean()


def test_guidance_changes_the_picture(run):
    coalescer = Coalescer.from_pretrained(run)
    assert not np.allclose(coalescer(CAPTIONS).latents, coalescer(CAPTIONS, guidance=3.0).latents, atol=1e-3)


def test_a_run_folder_stands_on_its_own(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = json.loads((moved / "config.json").read_text())
    config["table"]["uri"] = "/nowhere/gone.lance"
    meta = json.loads(config["table"]["meta"])
    meta["image_encoder"]["name"] = meta["text_encoder"]["name"] = "/nowhere/gone"
    config["table"]["meta"] = json.dumps(meta)
    (moved / "config.json").write_text(json.dumps(config))
    expected = Coalescer.from_pretrained(run)(CAPTIONS).latents
    assert np.array_equal(Coalescer.from_pretrained(moved)(CAPTIONS).latents, expected)


@pytest.mark.parametrize("call", [{"steps": 0}, {"num": 0}, {"redraws": -1}])
def test_nonsense_is_refused(run, call):
    with pytest.raises(OptionError, match="--steps"):
        Coalescer.from_pretrained(run)(CAPTIONS, **call)


def test_empty_captions_are_refused(run):
    for captions in ([], ["  "], ""):
        with pytest.raises(OptionError, match="caption"):
            Coalescer.from_pretrained(run)(captions)


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(RunError, match="no run at"):
        Coalescer.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no config\.json"):
        Coalescer.from_pretrained(tmp_path / "empty")
    shutil.copytree(run, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RunError, match="other software"):
        Coalescer.from_pretrained(tmp_path / "foreign")


def test_weights_of_another_shape_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = read_config(run)
    config["network"]["size"] = "small"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="do not fit the network"):
        Coalescer.from_pretrained(tmp_path / "run")


def test_a_table_without_index_is_not_trained_on(encoded):
    with pytest.raises(TableError, match="build-index"):
        open_table(encoded.uri, indexed=True)
