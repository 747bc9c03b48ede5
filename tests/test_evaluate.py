"""Evaluation end to end: what a run and its floors come to, on pictures whose truth is known."""

import json
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
from trainer.evaluation.adherence import Classifier
from trainer.evaluation.answers import FAN, Told, make_questions, retrieve, sample
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.exam import ExamConfig
from trainer.evaluation.floors import like_captions
from trainer.evaluation.metrics import frechet
from trainer.evaluation.pretrained import Clip, Inception
from trainer.evaluation.referee import labels_of, open_referee
from trainer.evaluation.report import columns_of, lines_of
from trainer.fit import fit
from trainer.run_folder import read_config
from trainer.sampler import CoalescerPipeline

SHORT = FitConfig(size="tiny", images=300 * 64, batch_size=64)
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
COST = {"confidence", "evaluations", "ms_per_latent", "ms_per_decoding"}


@pytest.fixture(scope="module")
def run(indexed, tmp_path_factory):
    """A short run on the shapes, whose captions are as good as unique and whose pictures are not kept."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(indexed, SHORT, out)
    return out


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """Its evaluation."""
    return evaluate(run, ExamConfig(steps=[1, 2]), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def flow(colored, tmp_path_factory):
    """A short run of a rival on the colors."""
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
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": 3}
    config = CLIPConfig(text_config=shape | words, vision_config=shape | {"image_size": 24, "patch_size": 8})
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class MeanColor(torch.nn.Module):
    """What stands for Inception: three features that are easily computed otherwise."""

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return pictures.float().mean((2, 3))


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
    """Its evaluation with all there is."""
    return evaluate(flow, ExamConfig(steps=[2], clip=clip, inception=inception), tmp_path_factory.mktemp("report"))


def test_a_run_stands_beside_floors_of_the_same_figures(report):
    assert report["steps"].keys() == {"1", "2"}
    floors = report["floors"]
    assert floors.keys() == {"train rows", "retrieved pairs", "gaussian"}
    for figures in report["steps"].values():
        assert figures.keys() - COST == floors["retrieved pairs"].keys() == floors["gaussian"].keys()
        assert figures.keys() >= COST
    assert all(isinstance(value, float) for row in columns_of(report).values() for value in row.values())
    # The autoencoder has fresh weights, so that pictures tell little; coordinates do.
    for name in ("frechet", "energy_distance", "two_sample_accuracy"):
        assert floors["train rows"][name] < floors["gaussian"][name]
    assert floors["retrieved pairs"]["frechet"] < floors["gaussian"]["frechet"]
    assert report["steps"]["2"]["frechet"] < floors["gaussian"]["frechet"]
    assert floors["gaussian"]["coverage"] < floors["train rows"]["coverage"]


def test_only_what_is_copied_is_called_copied(report):
    assert report["floors"]["retrieved pairs"]["copied_rate"] == 1
    assert report["floors"]["retrieved pairs"]["nearest_ratio"] < 1e-3
    assert report["floors"]["train rows"]["copied_rate"] == 1
    assert report["heldout"]["copied_rate"] < 0.05
    assert report["floors"]["gaussian"]["copied_rate"] == 0


def test_the_true_caption_is_found_among_others_better_than_by_chance(report, indexed):
    assert report["referee"]["kind"] == "matcher"
    among = report["referee"]["among"]
    assert among == len(set(indexed.column("caption", HELDOUT))) < 100
    chance = (among + 1) / 2
    assert report["heldout"]["caption_rank"] < 0.8 * chance
    assert report["floors"]["gaussian"]["caption_rank"] > 0.7 * chance
    assert report["floors"]["train rows"]["caption_rank"] <= report["heldout"]["caption_rank"]


def test_what_is_left_out_has_a_reason(report, colored_report):
    assert report["left_out"] == {"reconstructions": "the table keeps no pictures: encode it with --keep-images"}
    assert report["heldout_pictures"] == "decoded latents"
    assert colored_report["left_out"] == {"reliability": "flow_matching teaches no confidence"}
    assert colored_report["heldout_pictures"] == "originals"
    assert "confidence" not in colored_report["steps"]["2"]


def test_both_confidences_are_held_against_what_came(report, run):
    assert report["reliability"].keys() == {"confidence", "direction_length"}
    for content in report["reliability"].values():
        assert sum(bin["count"] for bin in content["bins"]) == report["samples"]
        assert 0 <= content["calibration_error"] <= 1
        assert -1 <= content["rank_correlation"] <= 1
        assert [bin["said"] for bin in content["bins"]] == sorted(bin["said"] for bin in content["bins"])
    # Both heads saw the same cosines.
    came = [np.mean([bin["came"] for bin in content["bins"]]) for content in report["reliability"].values()]
    assert came[0] == pytest.approx(came[1], abs=0.02)


def test_classes_are_told_by_a_classifier_and_reconstructions_stand_beside(colored_report):
    assert colored_report["referee"]["kind"] == "classifier"
    assert colored_report["referee"]["labels"] == ["blue", "green", "red"]
    floors = colored_report["floors"]
    assert floors.keys() == {"train rows", "retrieved pairs", "gaussian", "reconstructions"}
    assert floors["reconstructions"].keys() == floors["train rows"].keys()
    assert colored_report["heldout"].keys() >= {"class_accuracy", "diversity", "copied_rate"}
    # The autoencoder has fresh weights: what it paints says what it was told, and nothing that looks like an original.
    assert floors["retrieved pairs"]["class_accuracy"] > 0.9
    assert floors["gaussian"]["class_accuracy"] < 0.7
    assert floors["train rows"]["feature_frechet"] < floors["reconstructions"]["feature_frechet"]


def test_training_rows_have_the_captions_that_are_asked_for(flow, colored, indexed, run):
    for folder, table, few in ((flow, colored, True), (run, indexed, False)):
        questions = make_questions(CoalescerPipeline.from_pretrained(folder), table, 40, seed=0)
        rows = like_captions(table, questions)
        assert len(set(rows.tolist())) == len(rows) == 40
        assert set(rows.tolist()) <= set(table.positions(TRAIN).tolist())
        same = table.take(rows, "caption") == np.array(questions.captions[:40])
        assert same.all() if few else not same.all()


def test_inception_and_clip_are_added_by_path(colored_report, colored, clip, inception):
    floors, heldout = colored_report["floors"], colored.positions(HELDOUT)
    everyone = floors["train rows"].keys()
    assert {"inception_frechet", "inception_kernel", "clip_score"} <= everyone

    def mean_colors(rows):
        pictures = [decode_image(image, 32).pixels for image in colored.take(rows, "image")]
        return np.stack([picture.mean((0, 1)) for picture in pictures])

    # Mean colors of originals need no network.
    assert len(heldout) == colored_report["heldout_rows"]
    train = colored.positions(TRAIN)
    expected = frechet(mean_colors(train), mean_colors(heldout))
    if colored_report["samples"] >= len(train):
        assert floors["train rows"]["inception_frechet"] == pytest.approx(expected, rel=1e-2)
    assert floors["gaussian"]["inception_frechet"] > floors["train rows"]["inception_frechet"]


def test_features_of_inception_and_scores_of_clip_are_the_models_own(clip, inception):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    pictures = np.random.default_rng(0).integers(0, 256, size=(3, 32, 32, 3), dtype=np.uint8)
    captions = ["a small red circle", "a large blue square left of a small green triangle and much more", "red"]
    seen = Inception(inception, "cpu").look(pictures, captions)
    assert np.allclose(seen, pictures.mean((1, 2)), atol=1e-3)
    scores = Clip(clip, "cpu").look(pictures, captions)
    model, words = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    shown = CLIPImageProcessorPil.from_pretrained(clip)(images=list(pictures), return_tensors="pt")["pixel_values"]
    for i, caption in enumerate(captions):  # one by one, without padding
        given = words(caption, truncation=True, max_length=8, return_tensors="pt")
        with torch.inference_mode():
            picture = model.get_image_features(pixel_values=shown[i : i + 1]).pooler_output[0]
            text = model.get_text_features(given["input_ids"], given["attention_mask"]).pooler_output[0]
        assert scores[i, 0] == pytest.approx(float(100 * torch.cosine_similarity(picture, text, dim=0)), abs=1e-2)


def test_the_same_seed_gives_the_same_report_but_for_times(run, report, tmp_path, monkeypatch):
    def trained_again(*_):
        raise AssertionError("the referee is there")

    monkeypatch.setattr(referee_module, "_train", trained_again)
    again = evaluate(run, ExamConfig(steps=[1, 2]), tmp_path)
    assert timeless(again) == timeless(report)
    assert again == json.loads((tmp_path / "report.json").read_text())


def timeless(report):
    content = json.loads(json.dumps(report))
    del content["seconds"]
    for figures in content["steps"].values():
        del figures["ms_per_latent"], figures["ms_per_decoding"]
    return content


def test_the_page_stands_on_its_own(flow, colored_report, run, tmp_path):
    evaluate(run, ExamConfig(steps=[1], samples=16), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 15 + 2
    assert page.count("data:image/png;base64,") == 1
    assert 'src="http' not in page
    assert "Left out: reconstructions, because the table keeps no pictures" in page
    for name in ("train rows", "retrieved pairs", "gaussian", "held-out rows"):
        assert f"<th>{name}</th>" in page
    lines = lines_of(colored_report)
    assert lines["frechet"].keys() == {"2 steps", "train rows", "retrieved pairs", "gaussian", "reconstructions"}
    assert lines["evaluations"] == {"2 steps": 2.0}


def test_all_runs_of_a_table_share_a_referee(report, indexed, run):
    folder = Path(report["referee"]["folder"])
    assert folder.parent == Path(reports_of(indexed.uri))
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "referee.json"]
    assert [path.name for path in folder.parent.glob("referee-*")] == [folder.name]


def test_a_referee_stands_in_the_report_where_nothing_can_be_written_beside(flow, colored, tmp_path, monkeypatch):
    monkeypatch.setattr(referee_module.os, "access", lambda *_: False)
    monkeypatch.setitem(referee_module.BUDGET, "steps", 2)
    encoder = CoalescerPipeline.from_pretrained(flow).image_encoder

    def opened():
        decode = lambda latents: encoder.decode(latents.reshape(-1, 2, 4, 4))  # noqa: E731
        return open_referee(colored, decode, lambda _: None, among=3, out=tmp_path, device="cpu")[1]

    place = Path(opened()["folder"])
    assert place.parent == tmp_path
    before = (place / "model.safetensors").read_bytes()
    shutil.rmtree(place)
    opened()
    assert (place / "model.safetensors").read_bytes() == before
    (place / "model.safetensors").write_bytes(b"?")
    with pytest.raises(RunError, match=r"holds no referee .*: remove it, and it is trained again"):
        opened()


def test_larger_pictures_are_seen_as_their_means():
    torch.manual_seed(0)
    network = Classifier(["a", "b"]).eval()
    small = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.inference_mode():
        assert torch.equal(network.features(large), network.features(small))
        assert not torch.allclose(network.features(large), network.features(small.flip(0)))


def test_captions_are_classes_where_they_are_few_and_come_often(colored, indexed, monkeypatch):
    assert labels_of(colored) == ["blue", "green", "red"]
    assert labels_of(indexed) is None
    monkeypatch.setattr(referee_module, "MOST_LABELS", 2)
    assert labels_of(colored) is None


def test_more_questions_than_held_out_rows_start_from_other_points(run, indexed):
    coalescer, rows = CoalescerPipeline.from_pretrained(run), indexed.positions(HELDOUT)
    questions = make_questions(coalescer, indexed, 2 * len(rows), seed=3)
    asked = questions.rows[: questions.count]
    assert (np.unique(asked, return_counts=True)[1] == 2).all()
    assert set(asked.tolist()) == set(rows.tolist())
    assert questions.captions == indexed.take(questions.rows, "caption").tolist()
    assert len(np.unique(questions.r[: questions.count], axis=0)) == questions.count
    assert len(questions.fan) <= FAN
    # The points of a fan are the same for every caption, those of its questions are not.
    fan = questions.r[questions.count :].reshape(questions.fan.max() + 1, -1, questions.r.shape[1])
    assert (fan == fan[:1]).all()
    # A run starts from these very points.
    told = Told(coalescer, questions.captions)(questions.captions[-3:])
    x, _ = coalescer.sample_latents(told, questions.numbers[-3:], num_inference_steps=1, seed=3)
    guess = coalescer.network(
        torch.from_numpy(questions.r[-3:]), torch.from_numpy(coalescer.encode_prompt(questions.captions[-3:]))
    )
    way = (guess.distance[:, None] * guess.direction).numpy() / questions.r.shape[1] ** 0.5
    assert np.allclose(x, questions.r[-3:] + way, atol=1e-4)


def test_retrieved_pairs_are_those_of_brute_force(run, indexed):
    questions = make_questions(CoalescerPipeline.from_pretrained(run), indexed, 12, seed=0)
    geometry, vectors = indexed.meta.geometry, indexed.column("vector", TRAIN).astype(np.float32)
    queries = geometry.queries(indexed.take(questions.rows, "text").astype(np.float32), questions.r)
    squares = np.square(queries[:, None] - vectors[None]).sum(2)
    expected = geometry.to_coordinates(indexed.column("latent", TRAIN)[squares.argmin(1)])
    first, second = np.sort(squares, axis=1)[:, :2].T
    clear = second - first > 1e-2  # nearer ones are a matter of rounding
    assert clear.mean() > 0.95
    assert np.allclose(retrieve(indexed, questions)[clear], expected[clear])


def test_evaluations_are_counted_and_every_picture_is_timed(run, indexed):
    coalescer, counted = CoalescerPipeline.from_pretrained(run), []
    questions = make_questions(coalescer, indexed, 300, seed=0)
    found = sample(coalescer, questions, Told(coalescer, questions.captions), 3, counted.append)
    assert found.evaluations == 3
    assert found.seconds > 0
    assert sum(counted) == len(found.x) == len(questions.captions)


def refuse(kind, said, run, out, **options):
    with pytest.raises(kind, match=said):
        evaluate(run, ExamConfig(**{"steps": [1]} | options), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": [0, 1]}, "--steps 0,1"),
        ({"steps": []}, "--steps"),
        ({"samples": 7}, "--samples 7 is too few"),
        ({"clip": Path("nowhere")}, r"--clip nowhere holds no config\.json"),
        ({"inception": Path("nowhere.pt")}, r"--inception nowhere\.pt is no file"),
        ({"device": "abacus"}, "--device abacus"),
    ],
)
def test_options_are_checked_before_anything_is_done(run, tmp_path, options, said):
    refuse(OptionError, said, run, tmp_path / "out", **options)


def test_files_that_are_no_such_models_are_refused(run, tmp_path, clip, text_encoder):
    (tmp_path / "text.pt").write_text("not a model")
    refuse(OptionError, "is no TorchScript", run, tmp_path / "out", inception=tmp_path / "text.pt")
    refuse(OptionError, "holds a bert model", run, tmp_path / "out", clip=Path(text_encoder))
    broken = tmp_path / "clip"
    shutil.copytree(clip, broken)
    (broken / "model.safetensors").unlink()
    refuse(OptionError, "cannot be opened", run, tmp_path / "out", clip=broken)


def test_evaluating_without_the_table_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = read_config(run)
    config["table"]["uri"] = str(tmp_path / "gone.lance")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    refuse(RunError, "cannot be compared with its table", tmp_path / "run", tmp_path / "out")


def test_a_table_with_next_to_nothing_held_out_is_refused(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance", val_fraction=0.0, limit=40).table
    table = build_index(open_table(table.uri), BuildConfig(index_type="none")).table
    fit(table, FitConfig(size="tiny", images=64, batch_size=32), tmp_path / "run")
    refuse(TableError, "holds 0 heldout rows: encode it with a larger", tmp_path / "run", tmp_path / "out")
