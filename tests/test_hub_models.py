"""Encoders by hub id: what is fetched, of which commit, at what cost, and what is said if the hub does not give it."""

import re
import shutil

import numpy as np
import pytest
from loopback_hub import OTHER_TOKEN, TOKEN, serve

from index import reach
from index.build.build_index import BuildConfig, build_index
from index.errors import EncoderError, RunError
from index.table.table import open_table
from pipeline.encoders.files import find_encoder, locate
from pipeline.encoders.hub_names import ENCODER, HubName
from trainer.config import FitConfig
from trainer.evaluation.protocol import EvaluationConfig, evaluate
from trainer.fit import fit
from trainer.run_folder import find_run
from trainer.sampler import CoalescerPipeline, export_run

VAE = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"weights"}
TEXT = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(reach, "FIRST_PAUSE", 0.01)
    with serve(monkeypatch, tmp_path / "home") as hub:
        yield hub


def under(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


def written(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fetched(hub):
    return sorted(each.split("/resolve/")[1][41:] for each in hub.take_requests() if each.startswith("HEAD /org"))


def test_a_command_costs_one_request_and_its_workers_none(hub):
    first = hub.commit("org/vae", VAE)
    assert find_encoder("org/vae", "image")[:3:2] == ("org/vae", first)
    assert len(hub.take_requests()) == 1 + 2 * len(VAE)
    place = locate("org/vae", first)
    assert hub.take_requests() == []
    assert (place.name, place.revision, place.folder.name) == ("org/vae", first, first)
    second = hub.commit("org/vae", VAE | {"config.json": b"{ }"})
    assert locate("org/vae", first) == place
    assert hub.take_requests() == []
    assert locate("org/vae").revision == second
    assert hub.take_requests() == [
        "GET /api/models/org/vae",
        *(f"{method} /org/vae/resolve/{second}/config.json" for method in ("HEAD", "GET")),
        f"HEAD /org/vae/resolve/{second}/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.slow
def test_only_what_an_encoder_reads_is_fetched(hub):
    other = ["model.onnx", "pytorch_model.bin", "model.fp16.safetensors", "v1-5.ckpt", "a.png", "README.md", "run.py"]
    other += ["onnx/model.onnx", "unet/config.json", "unet/model.safetensors", "checkpoint-5/model.safetensors"]
    hub.commit("org/text", TEXT | {"1_Pooling/config.json": b"{}"} | dict.fromkeys(other, b"x"))
    locate("org/text")
    assert fetched(hub) == sorted(TEXT)
    modules = {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": b"w"}
    hub.commit("org/st", TEXT | modules | dict.fromkeys([*other, "2_Dense/pytorch_model.bin"], b"x"))
    locate("org/st")
    assert fetched(hub) == sorted(TEXT | modules)
    shards = {f"model-0000{n}-of-00002.safetensors": b"w" for n in (1, 2)} | {"model.safetensors.index.json": b"{}"}
    half = {"model.fp16-00001-of-00001.safetensors": b"w", "model.safetensors.index.fp16.json": b"{}"}
    small = {"config.json": b"{}", "spiece.model": b"x", "vocab.txt": b"x", "tokenizer_config.json": b"{}"}
    hub.commit("org/shards", small | shards | half)
    assert locate("org/shards").variant is None
    assert fetched(hub) == sorted(small | shards)
    hub.commit("org/half", small | half)
    assert locate("org/half").variant == "fp16"
    assert fetched(hub) == sorted(small | half)


PIPE = (
    under("vae", VAE)
    | under("text_encoder", {"config.json": b"{}", "model.safetensors": b"w"})
    | under("tokenizer", {"vocab.json": b"{}", "merges.txt": b""})
    | {"model_index.json": b"{}", "pipe.safetensors": b"x"}
)


def test_a_pipelines_root_finds_its_parts(hub, tmp_path):
    commit = hub.commit("org/pipe", PIPE)
    assert find_encoder("org/pipe", "image")[:3:2] == ("org/pipe/vae", commit)
    assert fetched(hub) == sorted(under("vae", VAE))
    place = locate("org/pipe", role="text")
    assert place.name == "org/pipe/text_encoder"
    assert fetched(hub) == [
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/merges.txt", "tokenizer/vocab.json"),
    ]
    assert locate("org/pipe/text_encoder", commit, "text") == place
    assert fetched(hub) == []
    folder = written(tmp_path / "pipe", PIPE)
    assert find_encoder(str(folder), "image")[:3:2] == (str(folder / "vae"), None)
    assert locate(str(folder), role="text").folder == folder / "text_encoder"


@pytest.mark.parametrize("is_local", [False, True], ids=["hub", "folder"])
def test_a_part_that_is_not_sure_is_asked_for(hub, tmp_path, is_local):
    files = PIPE | under("text_encoder_2", TEXT)
    hub.commit("org/pipe", files)
    root = str(written(tmp_path / "pipe", files)) if is_local else "org/pipe"
    with pytest.raises(EncoderError, match="is a pipeline with 2 text encoders: name one of ") as raised:
        locate(root, role="text")
    assert str(raised.value).endswith(f"{root}/text_encoder, {root}/text_encoder_2")
    assert locate(f"{root}/text_encoder_2", role="text").folder.name == "text_encoder_2"
    shutil.rmtree(tmp_path / "pipe", ignore_errors=True)
    files = under("unet", VAE)
    hub.commit("org/pipe", files)
    if is_local:
        written(tmp_path / "pipe", files)
    with pytest.raises(EncoderError, match=re.escape(f"{root} is not an image encoder: name one of {root}/unet")):
        locate(root, role="image")


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("org/vae", ("org/vae", "", None)),
        ("org/pipe/vae@v1.0", ("org/pipe", "vae", "v1.0")),
        ("org/pipe@refs/pr/1", ("org/pipe", "", "refs/pr/1")),
        ("https://huggingface.co/org/pipe", ("org/pipe", "", None)),
        ("https://huggingface.co/org/pipe/tree/main/vae?x=1", ("org/pipe", "vae", None)),
        ("https://huggingface.co/org/pipe/tree/refs%2Fpr%2F1", ("org/pipe", "", "refs/pr/1")),
        ("https://hf.co/org/pipe/blob/v1/vae/config.json", ("org/pipe", "vae", "v1")),
        ("https:/huggingface.co/org/run/discussions/4", ("org/run", "", None)),
        ("hf://org/pipe/vae", ("org/pipe", "vae", None)),
    ],
)
def test_names_and_addresses_are_read(typed, read):
    assert HubName.parse(typed, ENCODER) == HubName(*read)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("none", "no folder none: use a folder with config.json and model weights, or a hub id ORG/NAME"),
        ("./no/where", "no folder ./no/where: use a folder"),
        ("org/a b", "no folder org/a b, and it is not a hub id: use a folder"),
        ("org/vae@", "org/vae@ names no revision: write a branch, tag or commit after the @"),
        ("org/none", "no folder org/none, and no model org/none on the hub: check the name; if it is private, log in"),
        ("org/vae@nope", "org/vae has no revision nope: use a commit, or one of main"),
        ("org/vae@v1/vae", "a subfolder stands before the revision, as org/vae/SUBFOLDER@REVISION"),
        ("org/vae/none", "there is no org/vae/none: use one of org/vae"),
        ("org/data", "org/data is a dataset of the hub, not an encoder: as a source of samples it is hf:org/data"),
        ("https://huggingface.co/datasets/org/data/tree/main", "is a dataset of the hub, not an encoder: as a source"),
        ("https://huggingface.co/spaces/org/demo", "is a space of the hub, not an encoder: use a folder"),
        ("https://example.com/org/vae", "is an address outside of the hub: download it"),
        (
            "org/private",
            "no model org/private on the hub: check the name; if it is private, log in with `hf auth login`",
        ),
        ("org/gated", "org/gated is gated: accept its terms on http://127.0.0.1:"),
        ("org/bin", "org/bin has its weights as pytorch_model.bin alone, and only safetensors are read"),
        ("org/ema", "the weights of org/ema have the variant non_ema alone"),
        ("org/single", "org/single has no weights under the names that diffusers and transformers read"),
        ("org/readme", "org/readme holds no model: it has no config.json"),
    ],
)
def test_what_is_wrong_and_what_to_type_is_said_uncut(hub, typed, said):
    hub.commit("org/vae", VAE)
    hub.commit("org/private", VAE, is_private=True)
    hub.commit("org/gated", VAE, is_gated=True)
    hub.commit("org/bin", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.commit("org/ema", {"config.json": b"{}", "diffusion_pytorch_model.non_ema.safetensors": b"x"})
    hub.commit("org/single", {"config.json": b"{}", "sd15.safetensors": b"x"})
    hub.commit("org/readme", {"README.md": b"x"})
    hub.commit_data("org/data", {})
    with pytest.raises(EncoderError, match=re.escape(said)) as raised:
        find_encoder(typed, "image")
    assert "\n" not in str(raised.value)
    assert "Client Error" not in str(raised.value)


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        ("hf_wrong", "org/vae", "the hub does not accept your token, so org/vae cannot be read: log in again"),
        (OTHER_TOKEN, "org/private", "your token may not read it if it is private"),
        (OTHER_TOKEN, "org/gated", "wait until its owners grant access to the account of your token"),
        (TOKEN, "org/private", None),
        (TOKEN, "org/gated", None),
    ],
)
def test_access_depends_on_the_token(hub, monkeypatch, token, name, said):
    hub.commit("org/vae", VAE)
    hub.commit("org/private", VAE, is_private=True)
    hub.commit("org/gated", VAE, is_gated=True)
    monkeypatch.setenv("HF_TOKEN", token)
    if said is None:
        assert locate(name).name == name
        return
    with pytest.raises(EncoderError, match=re.escape(said)) as raised:
        locate(name)
    assert token not in str(raised.value)


@pytest.mark.parametrize("status", [429, 503, 500])
def test_one_refusal_of_the_hub_is_waited_for(hub, status):
    hub.commit("org/vae", VAE)
    hub.faults += [("/api/models", status), ("config.json", status)]
    assert locate("org/vae").name == "org/vae"
    assert hub.faults == []


def test_a_hub_that_is_away_leaves_the_cache(hub, monkeypatch, capsys):
    from huggingface_hub import constants

    commit = hub.commit("org/vae", VAE)
    hub.commit("org/pipe", PIPE)
    place = locate("org/vae")
    monkeypatch.setattr(reach, "LISTING_SECONDS", 0.01)
    hub.faults += [("/api/models", 503)] * 9
    assert locate("org/vae") == place
    assert f"the hub is out of reach: org/vae is taken from the cache, at commit {commit}" in capsys.readouterr().err
    with pytest.raises(EncoderError, match=r"the hub at http://127.* does not give org/other \(.*503.*HF_ENDPOINT"):
        locate("org/other")
    hub.faults.clear()
    locate("org/pipe/vae")
    hub.take_requests()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("org/vae") == place
    with pytest.raises(
        EncoderError, match=r"org/other is not in the cache .* HF_HUB_OFFLINE is set: unset it, or fetch"
    ):
        locate("org/other")
    with pytest.raises(EncoderError, match=r"text_encoder/config.json of org/pipe@.* is not in the cache"):
        locate("org/pipe/text_encoder")
    assert hub.take_requests() == []


@pytest.mark.parametrize("times", [1, 9])
def test_one_wrong_byte_of_the_weights_is_noticed(hub, times, capsys):
    hub.commit("org/vae", VAE)
    hub.damaged += ["safetensors"] * times
    if times > 1:
        with pytest.raises(EncoderError, match="safetensors of org/vae arrives damaged: its SHA-256 is not the one"):
            locate("org/vae")
        return
    place = locate("org/vae")
    assert "is damaged: fetching it again" in capsys.readouterr().err
    weights = place.folder / "diffusion_pytorch_model.safetensors"
    assert weights.read_bytes() == b"weights"
    hub.take_requests()
    weights.resolve().write_bytes(b"wEights")
    assert locate("org/vae", place.revision).folder == place.folder
    assert weights.read_bytes() == b"weights"
    assert len(hub.take_requests()) == 2


def test_a_cache_that_is_filled_by_others_is_completed(hub):
    from huggingface_hub import hf_hub_download

    commit = hub.commit("org/text", TEXT)
    for file in ("config.json", "model.safetensors"):
        hf_hub_download("org/text", file)
    hub.take_requests()
    assert (locate("org/text", commit).folder / "tokenizer.json").is_file()
    assert len(hub.take_requests()) == 2  # the list, and a file whose content the cache has


def test_a_commit_is_no_folder_of_the_same_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(written(tmp_path / "here", under("org/vae", VAE)).parent / "here")
    commit = hub.commit("org/vae", VAE)
    assert locate("org/vae").revision is None
    assert locate("org/vae", commit).revision == commit


def test_exceptions_of_tokenizers_are_one_line(text_encoder, tmp_path):
    from pipeline.encoders.text import TransformersTextEncoder

    folder = shutil.copytree(text_encoder, tmp_path / "text")
    (folder / "tokenizer.json").write_text('{"model": {"type": "?"}}')
    with pytest.raises(EncoderError, match="cannot be loaded as a text encoder"):
        TransformersTextEncoder(str(folder))


RUN = {
    "config.json": b"{}",
    "result.json": b"{}",
    "log.jsonl": b"x",
    "samples.png": b"x",
    "report/index.html": b"x",
    "checkpoints/step-5/state.safetensors": b"x" * 1000,
    "network/config.json": b"{}",
    "network/diffusion_pytorch_model.safetensors": b"w",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"w",
    "text_encoder/tokenizer.json": b"{}",
    "text_encoder/1_Pooling/config.json": b"{}",
    "text_encoder/2_Dense/model.safetensors": b"w",
}


def test_of_a_run_what_is_sampled_with_is_fetched(hub):
    first = hub.commit("org/run", RUN)
    hub.repositories["org/run"].refs["v1"] = first
    folder = find_run("org/run")
    unread = ("log.jsonl", "samples.png", "report/index.html", "checkpoints/step-5/state.safetensors")
    assert fetched(hub) == sorted(set(RUN) - set(unread))
    second = hub.commit("org/run", RUN | {"config.json": b"{ }"})
    assert find_run("org/run").name == second
    hub.take_requests()
    assert find_run("org/run@v1") == folder
    assert len(hub.take_requests()) == 1
    assert find_run(f"org/run@{first}") == folder
    assert hub.take_requests() == []
    hub.commit("org/runs", under("a", RUN))
    assert find_run("https://huggingface.co/org/runs/tree/main/a").name == "a"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("nowhere", "nowhere is not a run: use a folder that `trainer fit --out` has made, or a hub id ORG/NAME"),
        ("org/none", "no folder org/none, and no model org/none on the hub"),
        ("org/vae", "org/vae is not a run: it has no config.json with network/ beside it; use a repository"),
        ("org/run@nope", "org/run has no revision nope: use a commit, or one of main"),
        ("org/data", "org/data is a dataset of the hub, not a run"),
        ("org/gated", "org/gated is gated: accept its terms"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(hub, typed, said):
    hub.commit("org/vae", VAE)
    hub.commit("org/run", RUN)
    hub.commit("org/gated", RUN, is_gated=True)
    hub.commit_data("org/data", {})
    with pytest.raises(RunError, match=re.escape(said)):
        find_run(typed)


@pytest.mark.slow
def test_a_table_and_its_runs_keep_to_their_commits(
    hub, tmp_path, shapes, image_encoder, text_encoder, changed_encoder, encode_shapes
):
    """Of encoders by hub id two workers and later commands make no request, whatever main holds by then."""
    commits = {"image": hub.commit("org/vae", image_encoder), "text": hub.commit("org/text", text_encoder)}
    table = encode_shapes(
        shapes, tmp_path / "t.lance", num_workers=2, image_encoder="org/vae", text_encoder="org/text"
    ).table
    api = [each for each in hub.take_requests() if "/api/" in each]
    assert api == ["GET /api/models/org/vae", "GET /api/models/org/text"]
    assert (table.meta.image_encoder.revision, table.meta.text_encoder.revision) == tuple(commits.values())
    hub.commit("org/vae", changed_encoder)
    hub.commit("org/text", {"README.md": b"gone"})
    opened = build_index(open_table(table.uri), BuildConfig(index_type="none")).table
    fit(opened, FitConfig(size="tiny", images=64, batch_size=32), tmp_path / "run")
    pipe = CoalescerPipeline.from_pretrained(tmp_path / "run", device="cpu")
    assert pipe.image_encoder.ref == table.meta.image_encoder
    images = pipe("a small red circle").latents
    evaluate(tmp_path / "run", EvaluationConfig(num_inference_steps=[1], num_samples=16, device="cpu"), tmp_path / "e")
    assert hub.take_requests() == []
    run = hub.commit("org/run", tmp_path / "run")
    hub.take_requests()
    uploaded = CoalescerPipeline.from_pretrained(f"org/run@{run}", device="cpu")
    assert np.array_equal(uploaded("a small red circle").latents, images)
    assert not [each for each in hub.take_requests() if "checkpoints" in each or "org/vae" in each]
    export_run(tmp_path / "run", tmp_path / "exported")
    hub.commit("org/exported", tmp_path / "exported")
    hub.take_requests()
    exported = CoalescerPipeline.from_pretrained("org/exported", device="cpu")
    assert np.array_equal(exported("a small red circle").latents, images)
    assert not [each for each in hub.take_requests() if "org/exported" not in each]
    report = evaluate(
        "org/run", EvaluationConfig(num_inference_steps=[1], num_samples=16, device="cpu"), tmp_path / "f"
    )
    assert report["run"] == "org/run"


@pytest.mark.slow
def test_a_runs_own_copy_of_an_encoder_is_compared(indexed, tmp_path, changed_encoder):
    fit(indexed, FitConfig(size="tiny", images=64, batch_size=32), tmp_path / "run")
    shutil.copytree(changed_encoder, tmp_path / "run" / "image_encoder")
    config = EvaluationConfig(num_inference_steps=[1], num_samples=16, device="cpu")
    for use in (CoalescerPipeline.from_pretrained, lambda run: evaluate(run, config, tmp_path / "report")):
        with pytest.raises(EncoderError, match=r"the weights of .* are not those that the table is encoded with"):
            use(tmp_path / "run")
