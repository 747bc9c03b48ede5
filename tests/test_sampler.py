"""Sampling: images depend on their prompt and noise alone, and an exported folder is all that sampling needs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from index.errors import EncoderError, OptionError, RunError
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.config import FitConfig, RuntimeConfig
from trainer.evaluation.protocol import EvaluationConfig, evaluate
from trainer.fit import fit
from trainer.grid import draw_grid, wrap_caption
from trainer.models.registry import make_network
from trainer.objectives.base import StepInput
from trainer.objectives.registry import make_objective
from trainer.run_folder import EncoderPlaces, read_config
from trainer.sampler import CoalescerPipeline, export_run, noise_indices

PROMPTS = ["a small red circle above a large blue square", "a large black square left of a small green circle"]


@pytest.fixture(scope="module")
def make_pipeline(indexed, image_encoder, text_encoder):
    """A function that makes a pipeline with fresh weights."""

    def make(objective="coalescer", preset="default", **network_options):
        torch.manual_seed(0)
        network = make_network(indexed.meta, size="tiny", **network_options)
        encoders = DiffusersAutoencoder(image_encoder, "cpu"), TransformersTextEncoder(text_encoder, "cpu")
        return CoalescerPipeline(network, make_objective(objective, preset), indexed.meta, *encoders, "cpu")

    return make


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    """A coalescer with fresh weights."""
    return make_pipeline()


@pytest.fixture(scope="module")
def models(image_encoder, text_encoder, tmp_path_factory):
    """Copies of both encoders, which a run was trained with."""
    folder = tmp_path_factory.mktemp("models")
    places = {}
    for name, source in (("image_encoder", image_encoder), ("text_encoder", text_encoder)):
        places[name] = str(shutil.copytree(source, folder / name.partition("_")[0]))
    return EncoderPlaces(**places)


@pytest.fixture(scope="module")
def run(indexed, models, tmp_path_factory):
    """A run of two training steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(indexed, FitConfig(size="tiny", images=2 * 32, batch_size=32), out, runtime=RuntimeConfig(encoders=models))
    return out


def point_to(run, folder, **names):
    """Copy a run, and write other places of its encoders into it."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    meta = json.loads(config["table"]["meta"])
    for name, place in names.items():
        meta[name]["name"] = place
    config["table"] |= {"uri": "/nowhere/gone.lance", "meta": json.dumps(meta)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_prompt_has_its_images(pipe):
    output = pipe(PROMPTS, num_images_per_prompt=3)
    assert len(output.images) == 6
    assert output.images[0].size == (32, 32)
    assert output.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert output.latents.shape == (6, 2, 4, 4)
    assert output.confidence.shape == (6,)
    assert ((output.confidence > 0) & (output.confidence < 1)).all()


def test_images_are_the_decoded_latents(pipe):
    output = pipe(PROMPTS[0])
    assert np.array_equal(np.asarray(output.images[0]), pipe.image_encoder.decode(output.latents)[0])


def test_an_image_depends_on_its_prompt_seed_and_index_alone(pipe):
    many = pipe(PROMPTS, num_images_per_prompt=5, seed=7, batch_size=4).latents
    (alone,) = pipe(PROMPTS[1], seed=7).latents
    assert np.allclose(many[5], alone, atol=1e-5)
    assert not np.allclose(many[5], many[6], atol=1e-2)
    assert not np.allclose(pipe(PROMPTS[1], seed=8).latents[0], alone, atol=1e-2)


def test_no_two_images_of_a_call_start_from_the_same_noise(pipe):
    indices = noise_indices([*PROMPTS, PROMPTS[0]], 3)
    assert len(set(indices)) == 9
    noise = pipe.noise(indices, 0, 0)
    assert torch.pdist(noise).min() > 1
    assert noise_indices(PROMPTS[1:], 3) == indices[3:6], "whatever other prompts there are"
    twice = pipe([PROMPTS[0], PROMPTS[0]]).latents
    assert not np.allclose(twice[0], twice[1], atol=1e-2)


def test_steps_are_those_of_the_objective(pipe):
    text = pipe.encode_prompt(PROMPTS)
    x, confidence = pipe.sample_latents(text, [4, 9], num_inference_steps=3, seed=5)
    expected, first = pipe.noise([4, 9], 5, 0), None
    with torch.inference_mode():
        for i in range(3):
            inputs = StepInput(x=expected, text=torch.from_numpy(text), i=i, n=3, noise=pytest.fail)
            expected, step_confidence = pipe.objective.step(pipe.network, inputs)
            first = step_confidence if first is None else first
    assert np.allclose(x, expected.numpy(), atol=1e-5)
    assert np.allclose(confidence, first.numpy(), atol=1e-6)


def test_noise_between_steps_is_fresh_and_reproducible(make_pipeline):
    pipe = make_pipeline("consistency")
    one, again = (pipe(PROMPTS[0], num_inference_steps=3).latents for _ in range(2))
    assert np.array_equal(one, again)
    assert not torch.allclose(pipe.noise([0], 0, 0, 1), pipe.noise([0], 0, 0, 2))
    assert np.isnan(pipe(PROMPTS[0]).confidence).all()


def test_redraws_keep_the_candidate_of_the_highest_confidence(pipe):
    text = torch.from_numpy(pipe.encode_prompt(PROMPTS[:1])).expand(8, -1, -1)
    indices = noise_indices(PROMPTS[:1], 8)
    candidates, confidences = [], []
    with torch.inference_mode():
        for attempt in range(4):
            inputs = StepInput(x=pipe.noise(indices, 3, attempt), text=text, i=0, n=1, noise=pytest.fail)
            x, confidence = pipe.objective.step(pipe.network, inputs)
            candidates.append(pipe.geometry.to_latent(x.numpy()))
            confidences.append(confidence.numpy())
    best = np.argmax(confidences, axis=0)
    assert len(set(best.tolist())) > 1
    options = {"num_inference_steps": 1, "num_images_per_prompt": 8, "seed": 3}
    output = pipe(PROMPTS[0], redraws=3, **options)
    assert np.allclose(output.confidence, np.max(confidences, axis=0), atol=1e-5)
    for index, attempt in enumerate(best):
        assert np.allclose(output.latents[index].ravel(), candidates[attempt][index], atol=1e-4)


def test_redraws_cost_their_first_step_alone(pipe):
    calls = []
    hook = pipe.network.register_forward_hook(lambda *_: calls.append(1))
    output = pipe(PROMPTS[0], num_inference_steps=4, redraws=7)
    hook.remove()
    assert len(calls) == 8 + 3
    text = pipe.encode_prompt(PROMPTS[:1]).repeat(8, 0)
    (index,) = noise_indices(PROMPTS[:1], 1)
    # The image is the one that goes on from the noise of the highest confidence.
    starts = torch.cat([pipe.noise([index], 0, attempt) for attempt in range(8)])
    x, first = starts, None
    with torch.inference_mode():
        for i in range(4):
            inputs = StepInput(x=x, text=torch.from_numpy(text), i=i, n=4, noise=pytest.fail)
            x, confidence = pipe.objective.step(pipe.network, inputs)
            first = confidence if first is None else first
    assert np.allclose(output.latents.ravel(), pipe.geometry.to_latent(x.numpy())[first.argmax()], atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "preset", "options", "said"),
    [
        (
            "coalescer",
            "paper",
            {"guidance_scale": 2.0},
            r"--guidance-scale 2 .*\(dropout 0\): use --guidance-scale 1",
        ),
        ("coalescer", "paper", {"guidance_scale": 0.0}, r"--guidance-scale 0 extrapolates from samples without"),
        (
            "flow_matching",
            "default",
            {"redraws": 3},
            r"but flow_matching predicts none: use --redraws 0",
        ),
    ],
)
def test_what_a_network_was_not_trained_for_is_refused(make_pipeline, objective, preset, options, said):
    pipe = make_pipeline(objective, preset)
    with pytest.raises(OptionError, match=said):
        pipe(PROMPTS, **options)


def test_guidance_extrapolates_from_the_unconditional_sample(pipe):
    text = pipe.encode_prompt(PROMPTS)

    def sample(text, w):
        return pipe.sample_latents(text, [0, 1], num_inference_steps=1, guidance_scale=w)[0]

    unconditional, conditional = sample(text, 0.0), sample(text, 1.0)
    assert np.allclose(unconditional, sample(text[::-1].copy(), 0.0), atol=1e-5)
    assert not np.allclose(unconditional, conditional, atol=1e-2)
    assert np.allclose(sample(text, 3.0), unconditional + 3 * (conditional - unconditional), atol=1e-4)


def test_prompts_come_with_the_token_embeddings_that_the_network_reads(make_pipeline):
    pipe = make_pipeline(network="transformer", num_tokens=6)
    text = pipe.encode_prompt(PROMPTS)
    assert text.shape == (2, 7, 16)
    assert np.allclose(text[:, 0], pipe.text_encoder.encode(PROMPTS), atol=2e-3)
    shorter = text.copy()
    shorter[:, 6] = 0
    one, other = (pipe.sample_latents(each, range(2), num_inference_steps=1)[0] for each in (text, shorter))
    assert not np.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "--num-inference-steps 0 is out of range: use 1 or more"),
        ({"num_images_per_prompt": 0}, "--num-images-per-prompt 0 is out of range: use 1 or more"),
        ({"redraws": -1}, "--redraws -1 is out of range: use 0 or more"),
    ],
)
def test_counts_out_of_range_are_refused(pipe, options, message):
    with pytest.raises(OptionError, match=message):
        pipe(PROMPTS, **options)


@pytest.mark.parametrize("prompt", [[], ["  "], "", ["a circle", ""]])
def test_empty_prompts_are_refused(pipe, prompt):
    with pytest.raises(OptionError, match="a prompt is empty: pass at least one caption"):
        pipe(prompt)


def test_a_run_refers_to_its_encoders_where_it_has_found_them(run, models, indexed, tmp_path):
    assert not [name for name in ("image_encoder", "text_encoder") if (run / name).exists()]
    pipe = CoalescerPipeline.from_pretrained(run)
    assert (pipe.image_encoder.ref.name, pipe.text_encoder.ref.name) == (models.image_encoder, models.text_encoder)
    moved = point_to(run, tmp_path / "moved", image_encoder="/nowhere/gone")
    with pytest.raises(EncoderError, match=r"opened at /nowhere/gone .*--image-encoder; .*`trainer export RUN"):
        CoalescerPipeline.from_pretrained(moved)
    there = EncoderPlaces(image_encoder=models.image_encoder)
    expected = pipe(PROMPTS).latents
    assert np.array_equal(CoalescerPipeline.from_pretrained(moved, encoders=there)(PROMPTS).latents, expected)


def test_encoders_that_have_changed_are_refused(run, tmp_path, changed_encoder):
    changed = point_to(run, tmp_path / "changed", image_encoder=changed_encoder)
    with pytest.raises(EncoderError, match=r"are not those that the table is encoded with .*--image-encoder"):
        CoalescerPipeline.from_pretrained(changed)


def test_a_run_of_an_earlier_version_has_its_encoders_inside(run, image_encoder, text_encoder, tmp_path):
    earlier = point_to(run, tmp_path / "earlier", image_encoder="/nowhere/gone", text_encoder="/nowhere/gone")
    shutil.copytree(image_encoder, earlier / "image_encoder")
    shutil.copytree(text_encoder, earlier / "text_encoder")
    expected = CoalescerPipeline.from_pretrained(run)(PROMPTS).latents
    assert np.array_equal(CoalescerPipeline.from_pretrained(earlier)(PROMPTS).latents, expected)


def test_a_resumed_run_remembers_where_its_encoders_are_now(run, models, indexed, tmp_path, changed_encoder):
    def resume(images=3 * 32, **places):
        config = FitConfig(size="tiny", images=images, batch_size=32)
        return fit(indexed, config, moved, resume=True, runtime=RuntimeConfig(encoders=EncoderPlaces(**places)))

    moved = point_to(run, tmp_path / "moved", image_encoder="/nowhere/gone")
    with pytest.raises(EncoderError, match="are not those that the table is encoded with"):
        resume(image_encoder=changed_encoder)
    # Training itself reads no images: without the encoder it goes on, and says what it leaves out and what to type.
    assert "name its folder or hub id by --image-encoder" in resume()["left_out"]["samples.png"]
    resume(4 * 32, image_encoder=models.image_encoder)
    assert (moved / "samples.png").exists()
    pipe = CoalescerPipeline.from_pretrained(moved)
    assert (pipe.image_encoder.ref.name, pipe.text_encoder.ref.name) == (models.image_encoder, models.text_encoder)


def test_an_exported_folder_stands_alone(run, indexed, tmp_path):
    encoders = {}
    for name in ("image", "text"):
        ref = getattr(CoalescerPipeline.from_pretrained(run), f"{name}_encoder").ref
        encoders[f"{name}_encoder"] = str(shutil.copytree(ref.name, tmp_path / "models" / name))
    there = point_to(run, tmp_path / "run", **encoders)
    pipe = CoalescerPipeline.from_pretrained(there)
    expected = pipe(PROMPTS).latents
    export_run(there, tmp_path / "out" / "exported")
    shutil.rmtree(there)
    shutil.rmtree(tmp_path / "models")
    moved = (tmp_path / "out" / "exported").rename(tmp_path / "elsewhere")
    assert {path.name for path in moved.iterdir()} == {
        *("config.json", "network", "image_encoder", "text_encoder", "result.json")
    }
    assert str(tmp_path) not in (moved / "config.json").read_text()
    again = CoalescerPipeline.from_pretrained(moved)
    assert np.array_equal(again(PROMPTS).latents, expected)
    again.save_pretrained(tmp_path / "twice")
    assert np.array_equal(CoalescerPipeline.from_pretrained(tmp_path / "twice")(PROMPTS).latents, expected)
    assert read_config(tmp_path / "twice") == read_config(moved)
    with pytest.raises(RunError, match="twice is there already and is not an empty folder: use another --out"):
        export_run(moved, tmp_path / "twice")
    with pytest.raises(RunError, match=r"was made by `trainer export` and has nothing to resume: .* --init"):
        fit(indexed, FitConfig(), moved, resume=True)
    started = replace(FitConfig(size="tiny", images=32, batch_size=32), init=str(moved))
    assert fit(indexed, started, tmp_path / "started")["steps"] == 1


@pytest.mark.parametrize("objective", ["coalescer", "consistency"])
def test_a_pipeline_of_any_components_can_be_saved(make_pipeline, objective, tmp_path):
    pipe = make_pipeline(objective)
    pipe.save_pretrained(tmp_path / "saved")
    saved = CoalescerPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert saved.objective == pipe.objective
    assert np.array_equal(saved(PROMPTS).latents, pipe(PROMPTS).latents)
    config = EvaluationConfig(num_inference_steps=[1], num_samples=16, device="cpu")
    with pytest.raises(RunError, match=r"the table of .*saved cannot be opened: '' is not the name of a table"):
        evaluate(tmp_path / "saved", config, tmp_path / "report")


def test_what_is_not_a_run_is_refused(run, tmp_path):
    with pytest.raises(
        RunError, match="none is not a run: use a folder that `trainer fit --out` has made, or a hub id"
    ):
        CoalescerPipeline.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no config\.json"):
        CoalescerPipeline.from_pretrained(tmp_path / "empty")
    shutil.copytree(run, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RunError, match="from other software"):
        CoalescerPipeline.from_pretrained(tmp_path / "foreign")


def test_weights_of_another_shape_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "network" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dim": 384}))
    with pytest.raises(RunError, match=r"do not fit its config\.json"):
        CoalescerPipeline.from_pretrained(tmp_path / "run")


def test_a_grid_shows_every_image_once_in_order(pipe):
    from PIL import Image

    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grid = np.asarray(draw_grid([Image.new("RGB", (4, 4), c) for c in colors], ["a"] * 3, columns=2)).astype(int)
    middles = [np.argwhere((grid == color).all(-1)).mean(0) for color in colors]
    assert middles[0][0] == middles[1][0] < middles[2][0]
    assert middles[0][1] == middles[2][1] < middles[1][1]
    assert [int((grid == color).all(-1).sum()) for color in colors] == [128 * 128] * 3


def test_captions_are_wrapped_between_words():
    assert wrap_caption("one two three four", len, 9) == ["one two", "three", "four"]
    assert wrap_caption("unbreakable word", len, 5) == ["unbreakable", "word"]
