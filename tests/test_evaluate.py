"""Evaluation end to end: the metrics of a run and of its references, on images whose truth is known."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError, RunError, TableError
from index.table.schema import HELDOUT, TRAIN
from index.table.table import open_table, reports_of
from pipeline.images import decode_image
from trainer.config import FitConfig
from trainer.evaluation import referee as referee_module
from trainer.evaluation import references, run_evaluation
from trainer.evaluation.calibration import measure_calibration
from trainer.evaluation.energy_score import reference_points
from trainer.evaluation.features import Clip, Inception
from trainer.evaluation.measurements import Measurements
from trainer.evaluation.memorization import Memorization
from trainer.evaluation.metrics import frechet
from trainer.evaluation.protocol import EvaluationConfig, evaluate
from trainer.evaluation.referee import Classifier, class_labels, open_referee
from trainer.evaluation.references import match_captions, retrieve_pairs
from trainer.evaluation.report import METRICS, metrics_by_name
from trainer.evaluation.samples import DIVERSITY_SAMPLES, draw_prompts, encode_captions, sample_prompts
from trainer.fit import fit
from trainer.run_folder import read_config
from trainer.sampler import CoalescerPipeline

pytestmark = pytest.mark.slow

SHORT = FitConfig(size="tiny", images=300 * 64, batch_size=64)
COST = {"confidence", "network_evaluations", "ms_per_latent", "ms_per_decoding"}
"""Metrics of runs that references do not have."""


@pytest.fixture(scope="module")
def run(indexed, tmp_path_factory):
    """A short run on the shapes, whose captions are nearly unique and whose images are not stored."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(indexed, SHORT, out)
    return out


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """The evaluation of that run."""
    return evaluate(run, EvaluationConfig(num_inference_steps=[1, 2]), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def flow(colored, tmp_path_factory):
    """A short flow matching run on the colors."""
    out = tmp_path_factory.mktemp("flow") / "run"
    fit(colored, FitConfig(objective="flow_matching", size="tiny", images=60 * 32, batch_size=32), out)
    return out


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tokenizer) -> Path:
    """A small CLIP with fresh weights, saved as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": 3}
    config = CLIPConfig(text_config=shape | text, vision_config=shape | {"image_size": 24, "patch_size": 8})
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class MeanColor(torch.nn.Module):
    """In place of Inception: three features that are easy to compute without it."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return images.float().mean((2, 3))


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A TorchScript file that is called as StyleGAN's Inception is."""
    path = tmp_path_factory.mktemp("inception") / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(MeanColor()).save(str(path))
    return path


@pytest.fixture(scope="module")
def colored_report(flow, clip, inception, tmp_path_factory):
    """The evaluation of the flow matching run with all feature extractors."""
    config = EvaluationConfig(num_inference_steps=[2], clip=clip, inception=inception)
    return evaluate(flow, config, tmp_path_factory.mktemp("report"))


def test_a_run_and_its_references_have_the_same_metrics(report):
    references = report["references"]
    assert references.keys() == {"train rows", "retrieved pairs", "noise"}
    assert report["metrics"].keys() == {"1", "2"}
    for metrics in report["metrics"].values():
        assert metrics.keys() - COST == references["retrieved pairs"].keys() == references["noise"].keys()
        assert metrics.keys() >= COST
        assert metrics["ms_per_latent"] > 0
        assert metrics["ms_per_decoding"] > 0
    # The autoencoder has fresh weights, so image metrics say little; those in coordinates do not depend on it.
    for name in ("frechet", "energy_distance", "two_sample_accuracy"):
        assert references["train rows"][name] < references["noise"][name]
    assert references["retrieved pairs"]["frechet"] < references["noise"]["frechet"]
    assert report["metrics"]["2"]["frechet"] < references["noise"]["frechet"]
    assert references["noise"]["coverage"] < references["train rows"]["coverage"]


def test_copied_rate_is_one_for_copies_and_near_zero_for_other_points(report):
    references = report["references"]
    assert references["retrieved pairs"]["copied_rate"] == 1
    assert references["retrieved pairs"]["nearest_ratio"] < 1e-3
    assert references["train rows"]["copied_rate"] == 1
    assert all(row["non_finite_rate"] == 0 for row in references.values())
    assert report["heldout"]["copied_rate"] < 0.05
    assert references["noise"]["copied_rate"] == 0


def test_a_matcher_ranks_true_captions_better_than_chance(report, indexed):
    assert report["referee"]["type"] == "matcher"
    candidates = report["referee"]["candidates"]
    assert candidates == len(set(indexed.column("caption", HELDOUT))) < 100
    chance = (candidates + 1) / 2
    assert report["heldout"]["caption_rank"] < 0.8 * chance
    assert report["references"]["noise"]["caption_rank"] > 0.7 * chance
    assert report["references"]["train rows"]["caption_rank"] <= report["heldout"]["caption_rank"]


def test_what_is_left_out_has_a_reason(report, colored_report):
    assert report["left_out"] == {"train reconstructions": "the table stores no images: encode it with --keep-images"}
    assert report["heldout_images"] == "decoded latents"
    assert colored_report["left_out"] == {"calibration": "flow_matching trains no confidence"}
    assert colored_report["heldout_images"] == "originals"
    assert "confidence" not in colored_report["metrics"]["2"]


def test_calibration_compares_confidences_with_the_cosine_to_the_retrieved_pair(run, indexed):
    pipeline = CoalescerPipeline.from_pretrained(run)
    prompts = draw_prompts(pipeline, indexed, 40, seed=0)
    pairs, text = retrieve_pairs(indexed, prompts), encode_captions(pipeline, prompts.captions)
    calibration = measure_calibration(pipeline, prompts, text, pairs)
    assert calibration.keys() == {"confidence", "direction_length"}
    n = prompts.count
    prediction = pipeline.objective.predict(
        pipeline.network, torch.from_numpy(prompts.noise[:n]), torch.from_numpy(text.batch(slice(n)))
    )
    direction, displacement = prediction.direction.numpy(), pairs[:n] - prompts.noise[:n]
    length = np.linalg.norm(direction, axis=1)
    cosine = (direction * displacement).sum(1) / length / np.linalg.norm(displacement, axis=1)
    for name, predicted in (("confidence", prediction.confidence.numpy()), ("direction_length", length)):
        order = predicted.argsort()
        bins = calibration[name]["bins"]
        assert [row["count"] for row in bins] == [4] * 10
        assert [row["predicted"] for row in bins] == pytest.approx(predicted[order].reshape(10, 4).mean(1), abs=1e-5)
        assert [row["observed"] for row in bins] == pytest.approx(cosine[order].reshape(10, 4).mean(1), abs=1e-5)


def test_a_table_with_classes_and_images_has_class_accuracy_and_reconstructions(colored_report):
    assert colored_report["referee"]["type"] == "classifier"
    assert colored_report["referee"]["labels"] == ["blue", "green", "red"]
    references = colored_report["references"]
    assert references.keys() == {"train rows", "retrieved pairs", "noise", "train reconstructions"}
    assert references["train reconstructions"].keys() == references["train rows"].keys()
    assert colored_report["heldout"].keys() >= {"class_accuracy", "diversity", "copied_rate"}
    # The autoencoder has fresh weights: its images show which class a latent is of, but do not look like originals.
    assert references["retrieved pairs"]["class_accuracy"] > 0.8
    assert references["noise"]["class_accuracy"] < 0.7
    assert references["train rows"]["feature_frechet"] < references["train reconstructions"]["feature_frechet"]


def test_train_rows_have_the_captions_of_the_prompts_while_there_are_any(flow, colored, indexed, run):
    for folder, table, repeated in ((flow, colored, True), (run, indexed, False)):
        prompts = draw_prompts(CoalescerPipeline.from_pretrained(folder), table, 40, seed=0)
        positions = match_captions(table, prompts)
        assert len(set(positions.tolist())) == len(positions) == 40
        assert set(positions.tolist()) <= set(table.positions(TRAIN).tolist())
        equal = table.take(positions, "caption") == np.array(prompts.captions[:40])
        assert equal.all() == repeated


def test_inception_and_clip_add_their_metrics(colored_report, colored):
    references, heldout, train = colored_report["references"], colored.positions(HELDOUT), colored.positions(TRAIN)
    assert {"fid", "kid", "clip_score"} <= references["train rows"].keys()

    def mean_colors(positions):
        images = [decode_image(image, 32).pixels for image in colored.take(positions, "image")]
        return np.stack([image.mean((0, 1)) for image in images])

    # Mean colors of original images need no network; with so many samples all training rows are used.
    assert colored_report["heldout_rows"] == len(heldout)
    assert colored_report["num_samples"] >= len(train)
    assert references["train rows"]["fid"] == pytest.approx(frechet(mean_colors(train), mean_colors(heldout)), rel=1e-2)
    assert references["noise"]["fid"] > references["train rows"]["fid"]


def test_inception_features_and_clip_scores_agree_with_the_models(clip, inception):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    images = np.random.default_rng(0).integers(0, 256, size=(3, 32, 32, 3), dtype=np.uint8)
    captions = ["a small red circle", "a large blue square left of a small green triangle and much more", "red"]
    features = Inception(inception, "cpu").extract(images, captions)
    assert np.allclose(features, images.mean((1, 2)), atol=1e-3)
    scores = Clip(clip, "cpu").extract(images, captions)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=list(images), return_tensors="pt")["pixel_values"]
    for i, caption in enumerate(captions):  # one by one, without padding
        tokens = tokenizer(caption, truncation=True, max_length=8, return_tensors="pt")
        with torch.inference_mode():
            image = model.get_image_features(pixel_values=pixels[i : i + 1]).pooler_output[0]
            text = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output[0]
        assert scores[i, 0] == pytest.approx(float(100 * torch.cosine_similarity(image, text, dim=0)), abs=1e-2)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report_without_training_the_referee_again(run, report, tmp_path):
    weights = Path(report["referee"]["folder"]) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = evaluate(run, EvaluationConfig(num_inference_steps=[1, 2]), tmp_path)
    assert weights.stat().st_mtime_ns == written
    assert "train referee" not in (tmp_path / "log.jsonl").read_text()
    assert without_times(again) == without_times(report)
    assert again == json.loads((tmp_path / "report.json").read_text())


def without_times(report):
    content = json.loads(json.dumps(report))
    del content["seconds"]
    for metrics in content["metrics"].values():
        del metrics["ms_per_latent"], metrics["ms_per_decoding"]
    return content


class Stopped(BaseException):
    """In place of a kill."""


def test_an_evaluation_that_is_stopped_anywhere_goes_on_to_the_same_report(run, tmp_path, monkeypatch):
    config = EvaluationConfig(num_inference_steps=[1, 2], num_samples=16)
    whole = evaluate(run, config, tmp_path / "whole")
    saved, sampled, save = [0], [], Measurements.save

    def stop_at_the_next(self, *args, **depends_on):
        if saved[0]:
            raise Stopped
        saved[0] = 1
        return save(self, *args, **depends_on)

    def count(*args):
        sampled.append(args[3])
        return sample_prompts(*args)

    monkeypatch.setattr(Measurements, "save", stop_at_the_next)
    monkeypatch.setattr(run_evaluation, "sample_prompts", count)
    stops, report = 0, None
    while report is None:
        saved[0] = 0
        try:
            report = evaluate(run, config, tmp_path / "stopped")
        except Stopped:
            stops += 1
    assert stops == len(list((tmp_path / "stopped" / "measurements").iterdir())) - 1 == 7
    assert sorted(sampled) == [1, 1, 2, 2]  # each was stopped once before it was kept
    assert without_times(report) == without_times(whole)
    assert (tmp_path / "stopped" / "index.html").is_file()
    sampled.clear()
    assert without_times(evaluate(run, config, tmp_path / "stopped")) == without_times(whole)
    assert sampled == []


def test_measurements_are_taken_up_only_for_what_they_depend_on(tmp_path):
    kept = Measurements(tmp_path, seed=0)
    shown = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept.save({"frechet": 0.1, "bins": [1, {"a": 2.5}]}, shown, run="a", num_inference_steps=2)
    found = Measurements(tmp_path, seed=0).load(run="a", num_inference_steps=2)
    assert found.content == {"frechet": 0.1, "bins": [1, {"a": 2.5}]}
    assert np.array_equal(found.shown, shown)
    assert kept.load(run="a", num_inference_steps=1) is None
    assert kept.load(run="b", num_inference_steps=2) is None
    assert Measurements(tmp_path, seed=1).load(run="a", num_inference_steps=2) is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert kept.load(run="a", num_inference_steps=2) is None


@pytest.mark.parametrize("every", [3, 1])
def test_samples_that_are_not_finite_are_counted_and_the_others_measured(run, indexed, tmp_path, monkeypatch, every):
    outputs, sample_latents, positions = [], CoalescerPipeline.sample_latents, indexed.positions(HELDOUT)

    def diverge(self, *args, **kwargs):
        x, confidence = sample_latents(self, *args, **kwargs)
        for start, value in enumerate((np.nan, np.inf, -1e30)):
            x[start * every :: 3 * every, 0] = value
        return x, confidence

    def keep(*args):
        outputs.append(sample_prompts(*args))
        return outputs[-1]

    monkeypatch.setattr(CoalescerPipeline, "sample_latents", diverge)
    monkeypatch.setattr(run_evaluation, "sample_prompts", keep)
    report = evaluate(run, EvaluationConfig(num_inference_steps=[2], num_samples=len(positions)), tmp_path)
    metrics, x = report["metrics"]["2"], outputs[0].x[: len(positions)]
    finite = np.isfinite(x).all(1) & (x[:, 0] > -1e9)
    assert metrics["non_finite_rate"] == (~finite).mean() == pytest.approx(1 / every, abs=0.02)
    if every == 1:
        assert metrics.keys() == {"non_finite_rate", "network_evaluations", "ms_per_latent"}
    else:
        # Of five samples of a caption so few may be left that it has no energy score.
        assert metrics.keys() >= {name for name in report["references"]["noise"] if "energy_score" not in name}
        assert np.isfinite(list(metrics.values())).all()
        real = indexed.meta.geometry.to_coordinates(indexed.take(positions, "latent"))
        assert metrics["frechet"] == pytest.approx(frechet(x[finite], real), rel=1e-5)
    assert "non finite rate" in (tmp_path / "index.html").read_text()


def test_points_without_a_network_have_energy_scores(report, colored_report, run, indexed):
    for each in (report, colored_report):
        assert each["energy_score_references"].keys() == {"random rows", "nearest caption", "caption mean"}
        samples = next(iter(each["metrics"].values()))
        for row in each["energy_score_references"].values():
            assert row.keys() == {name for name in samples if "energy_score" in name}
            assert row["energy_score"] == pytest.approx(row["energy_score_distance"] - row["energy_score_spread"] / 2)
        assert each["energy_score_references"]["caption mean"]["energy_score_spread"] == 0
    # Every caption has many held-out rows here, which is as good as it gets.
    colors = {name: row["energy_score"] for name, row in colored_report["energy_score_references"].items()}
    assert colors["caption mean"] < colors["nearest caption"]
    assert colored_report["heldout"]["energy_score"] < min(colors.values())
    assert colored_report["references"]["train rows"]["energy_score"] < min(colors.values())


def test_the_nearest_caption_is_that_of_the_nearest_text_embedding(run, indexed):
    prompts = draw_prompts(CoalescerPipeline.from_pretrained(run), indexed, 40, seed=0)
    points = dict(reference_points(indexed, prompts))["nearest caption"]
    train = indexed.column("text", TRAIN).astype(np.float32)
    first = prompts.count + np.unique(prompts.diversity_group, return_index=True)[1]
    text = indexed.take(prompts.positions[first], "text").astype(np.float32)
    cosine = (text @ train.T) / np.linalg.norm(text, axis=1)[:, None] / np.linalg.norm(train, axis=1)
    latents = indexed.meta.geometry.to_coordinates(indexed.column("latent", TRAIN))
    top = np.sort(cosine, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-5
    assert clear.any()
    assert np.allclose(points.grouped[clear], latents[cosine.argmax(1)][clear])


def test_comparing_with_all_rows_is_left_out_with_a_reason_if_it_takes_too_long(indexed):
    assert Memorization(indexed, 1000, "cpu").left_out is None
    memorization = Memorization(indexed, 10**12, "cpu")
    assert "1,000,000,000,000 samples with all" in memorization.left_out
    assert memorization.metrics(np.zeros((8, 32), np.float32)) == {}


def test_the_page_is_self_contained_and_shows_every_metric_and_reference(run, tmp_path):
    report = evaluate(run, EvaluationConfig(num_inference_steps=[1], num_samples=16), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert len(re.findall("<img", page)) == 1
    assert "Left out: train reconstructions, because the table stores no images" in page
    for name in ("1 step", "train rows", "retrieved pairs", "noise", "held-out rows"):
        assert f"<th>{name}</th>" in page
    for name in report["metrics"]["1"]:
        assert f"<th>{name.replace('_', ' ')}</th>" in page
        # Text is drawn as paths, with the text itself in a comment.
        assert (f"<!-- {name.replace('_', ' ')} -->" in page) == bool(METRICS[name].goal or name == "confidence")
    assert "<!-- predicted confidence -->" in page


def test_the_table_of_metrics_has_a_row_for_each_metric_and_a_column_for_each_reference(report, colored_report):
    assert metrics_by_name(report).keys() == report["metrics"]["1"].keys()
    rows = metrics_by_name(colored_report)
    assert rows["frechet"].keys() == {"2 steps", "train rows", "retrieved pairs", "noise", "train reconstructions"}
    assert rows["class_accuracy"]["held-out rows"] == colored_report["heldout"]["class_accuracy"]
    assert rows["network_evaluations"] == {"2 steps": 2.0}


def test_all_runs_of_a_table_share_a_referee(report, indexed):
    folder = Path(report["referee"]["folder"])
    assert folder.parent == Path(reports_of(indexed.uri))
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "referee.json"]
    assert [path.name for path in folder.parent.glob("referee-*")] == [folder.name]


def test_a_referee_is_kept_in_the_report_if_the_folder_of_the_table_is_read_only(flow, colored, tmp_path, monkeypatch):
    monkeypatch.setattr(referee_module.os, "access", lambda *_: False)
    monkeypatch.setitem(referee_module.BUDGET, "max_steps", 2)
    encoder = CoalescerPipeline.from_pretrained(flow).image_encoder

    def open_again():
        decode = lambda latents: encoder.decode(latents.reshape(-1, 2, 4, 4))  # noqa: E731
        return open_referee(colored, decode, lambda _: None, candidates=3, out=tmp_path, device="cpu")[1]

    folder = Path(open_again()["folder"])
    assert folder.parent == tmp_path
    before = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    open_again()
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "model.safetensors").write_bytes(b"?")
    with pytest.raises(RunError, match=r"is not a complete referee .*: remove it to train it again"):
        open_again()


def test_the_referee_downscales_larger_images():
    torch.manual_seed(0)
    network = Classifier(["a", "b"]).eval()
    small = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.inference_mode():
        assert torch.equal(network.features(large), network.features(small))
        assert not torch.allclose(network.features(large), network.features(small.flip(0)))


def test_captions_are_classes_if_they_are_few_and_frequent(colored, indexed):
    assert class_labels(colored) == ["blue", "green", "red"]
    assert class_labels(colored, max_classes=2) is None
    assert class_labels(indexed) is None


def test_more_prompts_than_held_out_rows_repeat_rows_with_other_noise(run, indexed):
    pipeline, heldout = CoalescerPipeline.from_pretrained(run), indexed.positions(HELDOUT)
    prompts = draw_prompts(pipeline, indexed, 2 * len(heldout), seed=3)
    positions = prompts.positions[: prompts.count]
    assert (np.unique(positions, return_counts=True)[1] == 2).all()
    assert set(positions.tolist()) == set(heldout.tolist())
    assert prompts.captions == indexed.take(prompts.positions, "caption").tolist()
    assert len(np.unique(prompts.noise[: prompts.count], axis=0)) == prompts.count


def test_the_diversity_set_has_the_same_noise_for_every_caption(run, indexed):
    prompts = draw_prompts(CoalescerPipeline.from_pretrained(run), indexed, 40, seed=3)
    assert 0 < len(prompts.diversity_group) <= DIVERSITY_SAMPLES
    noise = prompts.noise[prompts.count :].reshape(prompts.diversity_group.max() + 1, -1, prompts.noise.shape[1])
    assert (noise == noise[:1]).all()
    assert len(np.unique(noise[0], axis=0)) == noise.shape[1] > 1


def test_a_run_starts_from_the_noise_of_the_prompts(run, indexed):
    pipeline = CoalescerPipeline.from_pretrained(run)
    prompts = draw_prompts(pipeline, indexed, 40, seed=3)
    text = encode_captions(pipeline, prompts.captions)
    output = sample_prompts(pipeline, prompts, text, 1, lambda _: None)
    noise = torch.from_numpy(prompts.noise)
    prediction = pipeline.objective.predict(pipeline.network, noise, torch.from_numpy(text.batch(slice(None))))
    expected = noise + prediction.distance[:, None] * prediction.direction
    assert np.allclose(output.x, expected.numpy(), atol=1e-4)


def test_retrieved_pairs_agree_with_brute_force(run, indexed):
    prompts = draw_prompts(CoalescerPipeline.from_pretrained(run), indexed, 12, seed=0)
    geometry, vectors = indexed.meta.geometry, indexed.column("vector", TRAIN).astype(np.float32)
    queries = geometry.queries(indexed.take(prompts.positions, "text").astype(np.float32), prompts.noise)
    squares = np.square(queries[:, None] - vectors[None]).sum(2)
    expected = geometry.to_coordinates(indexed.column("latent", TRAIN)[squares.argmin(1)])
    first, second = np.sort(squares, axis=1)[:, :2].T
    clear = second - first > 1e-2  # closer ones depend on rounding
    assert clear.mean() > 0.95
    assert np.allclose(retrieve_pairs(indexed, prompts)[clear], expected[clear])


def test_pairs_are_retrieved_once_per_table_version_and_prompts(run, indexed, monkeypatch):
    pipeline, searches = CoalescerPipeline.from_pretrained(run), []

    class Counted(references.ExactSearch):
        def __init__(self, *args):
            searches.append(args)
            super().__init__(*args)

    monkeypatch.setattr(references, "ExactSearch", Counted)
    first, other = (draw_prompts(pipeline, indexed, 12, seed=seed) for seed in (11, 12))
    pairs = [retrieve_pairs(indexed, prompts) for prompts in (first, first, other, other, first)]
    assert len(searches) == 2
    assert np.array_equal(pairs[0], pairs[1])
    assert np.array_equal(pairs[0], pairs[4])
    assert not np.array_equal(pairs[0], pairs[2])


def test_network_evaluations_are_counted_per_sample(run, indexed):
    pipeline, advanced = CoalescerPipeline.from_pretrained(run), []
    prompts = draw_prompts(pipeline, indexed, 300, seed=0)
    output = sample_prompts(pipeline, prompts, encode_captions(pipeline, prompts.captions), 3, advanced.append)
    assert output.network_evaluations == 3
    assert output.seconds > 0
    assert sum(advanced) == len(output.x) == len(output.confidence) == len(prompts.captions)


def refuse(error, message, run, out, **options):
    with pytest.raises(error, match=message):
        evaluate(run, EvaluationConfig(**{"num_inference_steps": [1]} | options), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": [0, 1]}, "--num-inference-steps 0,1 is out of range"),
        ({"num_inference_steps": []}, "--num-inference-steps '' is out of range"),
        ({"num_samples": 7}, "--num-samples 7 is out of range: use 8 or more"),
        ({"clip": Path("nowhere")}, r"--clip nowhere has no config\.json"),
        ({"inception": Path("nowhere.pt")}, r"--inception nowhere\.pt is not a file"),
        ({"device": "abacus"}, "--device abacus"),
    ],
)
def test_options_are_checked_before_anything_is_written(run, tmp_path, options, message):
    refuse(OptionError, message, run, tmp_path / "out", **options)


def test_files_of_other_models_are_refused(run, tmp_path, clip, text_encoder):
    (tmp_path / "text.pt").write_text("not a model")
    refuse(OptionError, "is not a TorchScript", run, tmp_path / "out", inception=tmp_path / "text.pt")
    refuse(OptionError, "holds a bert model", run, tmp_path / "out", clip=Path(text_encoder))
    incomplete = tmp_path / "clip"
    shutil.copytree(clip, incomplete)
    (incomplete / "model.safetensors").unlink()
    refuse(OptionError, "cannot be loaded", run, tmp_path / "out", clip=incomplete)


def test_evaluating_without_the_table_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = read_config(run)
    config["table"]["uri"] = str(tmp_path / "gone.lance")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    refuse(RunError, "the table of .*run cannot be opened: no table at", tmp_path / "run", tmp_path / "out")


def test_a_table_with_too_few_held_out_rows_is_refused(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance", val_fraction=0.0, limit=40).table
    table = build_index(open_table(table.uri), BuildConfig(index_type="none")).table
    fit(table, FitConfig(size="tiny", images=64, batch_size=32), tmp_path / "run")
    message = "has 0 heldout rows, an evaluation needs 8: encode it with a larger --val-fraction"
    refuse(TableError, message, tmp_path / "run", tmp_path / "out")
