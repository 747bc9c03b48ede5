"""Encoders between commands: found from any folder, re-pointed when they were moved, and checked by every worker."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import pipeline.cli
import trainer.cli
from index.table.table import open_table
from pipeline.encode.job import EncodeJob
from pipeline.encoders.image import DiffusersAutoencoder

MAINS = {"pipeline": pipeline.cli.main, "trainer": trainer.cli.main}


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command line in a folder and returns its exit code, output and errors."""

    def run(cwd, program, *argv):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [program, *map(str, argv)])
        monkeypatch.setenv("COLUMNS", "1000")  # paths of temporary folders are long, and tables fold them
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            MAINS[program]()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_encoders_by_relative_path_serve_every_command_from_any_folder(
    command, tmp_path, shapes, image_encoder, text_encoder, changed_encoder
):
    models, elsewhere, table = tmp_path / "m", tmp_path / "elsewhere", tmp_path / "db" / "t.lance"
    elsewhere.mkdir()
    shutil.copytree(image_encoder, models / "img")
    shutil.copytree(text_encoder, models / "txt")
    encoders = ["--image-encoder", "m/img", "--text-encoder", "./m/../m/txt"]
    encode = ["encode", shapes, "--table", table, "--image-size", 32, "--val-fraction", 0.2, *encoders]
    assert command(tmp_path, "pipeline", *encode)[0] == 0
    meta = open_table(table).meta
    assert (meta.image_encoder.name, meta.text_encoder.name) == (str(models / "img"), str(models / "txt"))
    # The same command from another folder is the same run.
    moved_argv = ["../m/img" if part == "m/img" else "../m/txt" if part == "./m/../m/txt" else part for part in encode]
    assert "nothing to do" in command(elsewhere, "pipeline", *moved_argv)[1]

    assert command(elsewhere, "pipeline", "build-index", table, "--index-type", "none")[0] == 0
    fit = ["fit", table, "--size", "tiny", "--images", 64, "--batch-size", 32]
    assert command(elsewhere, "trainer", *fit, "--out", "a")[0] == 0

    models.rename(tmp_path / "moved")
    code, out, _ = command(elsewhere, "pipeline", "inspect", table)
    assert code == 0
    assert f"{models}/img (is not there: name its new place by --image-encoder)" in " ".join(out.split())
    code, out, err = command(elsewhere, "trainer", *fit, "--out", "b")
    assert (code, out) == (2, "")
    assert f"cannot be opened at {models}/img (no folder {models}/img): if it was moved, name its folder" in err
    assert "by --image-encoder" in err
    there = ["--image-encoder", "../moved/img", "--text-encoder", tmp_path / "moved" / "txt"]
    wrong = ["--image-encoder", changed_encoder, *there[2:]]
    code, out, err = command(elsewhere, "trainer", *fit, "--out", "b", *wrong)
    assert (code, out) == (2, "")
    assert "are not those that the table is encoded with" in err
    assert not (elsewhere / "b").exists()
    assert command(elsewhere, "trainer", *fit, "--out", "b", *there)[0] == 0

    sample = ["sample", "a", "a red circle", "--out", "s.png"]  # a run of encoders that were moved
    code, _, err = command(elsewhere, "trainer", *sample)
    assert code == 2
    assert "by --image-encoder" in err
    assert command(elsewhere, "trainer", *sample, *there)[0] == 0
    assert command(elsewhere, "trainer", "sample", "b", *sample[2:])[0] == 0
    evaluate = ["--num-inference-steps", "1", "--num-samples", 16]
    assert command(elsewhere, "trainer", "evaluate", "b", *evaluate)[0] == 0
    assert command(elsewhere, "trainer", "compare", "a", "b", "--out", "ab", *evaluate, *there)[0] == 0
    assert command(elsewhere, "trainer", "export", "a", "--out", "c", *there)[0] == 0
    assert command(elsewhere, "trainer", "sample", "c", *sample[2:])[0] == 0
    assert command(elsewhere, "trainer", "evaluate", "c", *evaluate)[0] == 0
    code, _, err = command(elsewhere, "trainer", "sample", "a", "a red circle", "--out", "s.png", *wrong[:2])
    assert code == 2
    assert "are not those that the table is encoded with" in err

    code, _, err = command(elsewhere, "pipeline", "build-index", table, "--index-type", "none", *wrong)
    assert code == 2
    assert command(elsewhere, "pipeline", "build-index", table, "--index-type", "none", *there)[0] == 0
    assert open_table(table).meta.image_encoder.name == str(tmp_path / "moved" / "img")
    assert "is not there" not in command(elsewhere, "pipeline", "inspect", table)[1]


def swap_after_loading(monkeypatch, change):
    """Change files as soon as the command has loaded its encoders, as if its workers saw another disk."""
    create = EncodeJob.create

    def swapped(*arguments):
        job = create(*arguments)
        change()
        return job

    monkeypatch.setattr(EncodeJob, "create", swapped)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_worker_refuses_encoders_that_are_not_the_commands(
    command, tmp_path, shapes, image_encoder, text_encoder, monkeypatch, part
):
    for name, source in (("img", image_encoder), ("txt", text_encoder)):
        shutil.copytree(source, tmp_path / name)

    def change():
        if part == "weights":
            path = tmp_path / "img" / "diffusion_pytorch_model.safetensors"
            weights = load_file(path)
            weights["encoder.conv_in.bias"] += 1
            save_file(weights, path, {"format": "pt"})
        else:
            path = tmp_path / "txt" / "tokenizer.json"
            content = json.loads(path.read_text())
            content["normalizer"]["lowercase"] = False
            path.write_text(json.dumps(content))

    swap_after_loading(monkeypatch, change)
    encoders = ["--image-encoder", "img", "--text-encoder", "txt", "--image-size", 32]
    code, out, err = command(
        tmp_path, "pipeline", "encode", shapes, "--table", "t.lance", "--num-workers", 2, *encoders
    )
    assert (code, out) == (2, ""), err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: worker on {os.uname().nodename}: the {part} of {tmp_path}/")
    assert "are not those that the table is encoded with" in line
    assert "Traceback" not in err
    assert not (tmp_path / "t.lance" / "_versions").exists()


@pytest.mark.slow
def test_hub_encoders_are_pinned_to_their_commit(tmp_path, image_encoder, changed_encoder, monkeypatch):
    first, second = "1" * 40, "2" * 40
    repository = tmp_path / "models--org--vae"
    for commit, folder in ((first, image_encoder), (second, changed_encoder)):
        shutil.copytree(folder, repository / "snapshots" / commit / "sub")
    (repository / "refs").mkdir()
    main, tag = repository / "refs" / "main", repository / "refs" / "v1"
    main.write_text(first)
    tag.write_text(first)
    code = """
import sys
from pipeline.encoders.image import DiffusersAutoencoder
ref = DiffusersAutoencoder(*sys.argv[1:2], revision=sys.argv[2] if len(sys.argv) > 2 else None).ref
print(ref.name, ref.revision, ref.digest)
"""

    def load(*argv):
        import subprocess

        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    before = load("org/vae/sub")
    assert before == ["org/vae/sub", first, DiffusersAutoencoder(image_encoder).ref.digest]
    main.write_text(second)
    after = load("org/vae/sub")
    assert after == ["org/vae/sub", second, DiffusersAutoencoder(changed_encoder).ref.digest]
    assert load("org/vae/sub@v1") == before
    assert load(f"org/vae/sub@{first}") == before
    assert load("org/vae/sub", first) == before, "what a worker loads"


@pytest.mark.slow
def test_truncated_captions_are_counted(command, tmp_path, write_tar, image_encoder, text_encoder, shapes):
    import io

    from PIL import Image

    members = []
    for number in range(6):
        data = io.BytesIO()
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(data, "png")
        # [CLS] and [SEP] and 46 words are as long as the encoder reads.
        words = {0: 46, 1: 47, 2: 300}.get(number, 4)
        members += [(f"{number}.png", data.getvalue()), (f"{number}.txt", " ".join(["red"] * words).encode())]
    source = write_tar(tmp_path / "a.tar", members)
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--image-size", 32]
    argv = ["encode", source, "--table", "t.lance", "--val-fraction", 0, *encoders]
    code, out, _ = command(tmp_path, "pipeline", *argv)
    assert code == 0
    assert "warning: 2 of 6 captions have more than the 48 tokens that the text encoder reads" in out
    report = json.loads((tmp_path / "t.reports" / "encode.json").read_text())
    assert report["truncated_captions"] == 2
    last = json.loads((tmp_path / "t.reports" / "encode.jsonl").read_text().splitlines()[-1])
    assert last["truncated_captions"] == 2


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("my pairs.lance", "my_pairs.lance"),
        ("50%20.lance", "50_20.lance"),
        ("[x].lance", "_x_.lance"),
        ("é.lance", "_"),
    ],
)
def test_names_that_lancedb_refuses_are_refused_by_encode(command, tmp_path, name, example):
    encoders = ["--image-encoder", "none/a", "--text-encoder", "none/b"]
    code, out, err = command(tmp_path, "pipeline", "encode", "none", "--table", f"db/{name}", *encoders)
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert f"db/{name}" in line
    assert f"for instance {example}" in line


def test_a_table_may_be_named_from_home_and_with_a_slash(command, encoded, tmp_path, monkeypatch):
    folder = Path(encoded.uri).parent
    assert open_table(f"{encoded.uri}/").uri == encoded.uri
    monkeypatch.setenv("HOME", str(folder))
    assert open_table(f"~/{Path(encoded.uri).name}").uri == encoded.uri
    code, out, _ = command(folder, "pipeline", "inspect", f"{Path(encoded.uri).name}/", "--json")
    assert (code, json.loads(out)["table"]) == (0, encoded.uri)
