"""Both command lines: help at once, one line and exit code 2 for what a user can put right, nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import pipeline.cli
import trainer.cli
from index import terminal as console
from index.errors import TableError
from index.table.storage import write_json
from index.terminal import Progress

BIN = Path(sys.executable).parent
COMMANDS = {
    "pipeline": ["demo-data", "encode", "build-index", "inspect"],
    "trainer": ["fit-autoencoder", "fit", "sample", "evaluate", "compare"],
}


def call(*argv, cwd=None):
    argv = [str(BIN / argv[0]), *map(str, argv[1:])]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_names_every_command(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS[script])


@pytest.mark.parametrize("command", [(s, c) for s, commands in COMMANDS.items() for c in commands], ids="-".join)
def test_every_command_has_help_with_two_examples(command):
    done = call(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.count(f"{command[0]} {command[1]} ") >= 3  # the usage line and two examples


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs a command in a folder, expects it to fail as a user's mistake, and returns its one line."""

    def run(cwd, *argv) -> str:
        before = sorted(cwd.rglob("*"))
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            {"pipeline": pipeline.cli.main, "trainer": trainer.cli.main}[argv[0]]()
        assert ended.value.code == 2
        assert sorted(cwd.rglob("*")) == before, "something was written"
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    return run


def test_a_mistake_ends_the_real_script_alike(tmp_path):
    done = call("pipeline", "inspect", "none.lance", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no table at none.lance")
    assert done.stderr.count("\n") == 1


def test_mistakes_end_in_one_line_and_exit_code_2(refused, tmp_path, shapes, encoded, image_encoder, text_encoder):
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--image-size", "32"]
    encode = ["pipeline", "encode", shapes, "--table", "t.lance"]
    assert "no shards at 'none'" in refused(tmp_path, "pipeline", "encode", "none", "--table", "t.lance", *encoders)
    assert "--desc-scale 0.5" in refused(tmp_path, *encode, *encoders, "--desc-scale", "0.5")
    assert "DB/NAME.lance" in refused(tmp_path, "pipeline", "encode", shapes, "--table", "t", *encoders)
    wrong = ["--image-encoder", "nowhere", *encoders[2:]]
    assert "no folder nowhere" in refused(tmp_path, *encode, *wrong)
    assert "no table at none.lance" in refused(tmp_path, "pipeline", "build-index", "none.lance")
    assert "no table at none.lance" in refused(tmp_path, "pipeline", "inspect", "none.lance")
    assert "'much' is no number" in refused(tmp_path, "pipeline", "build-index", encoded.uri, "--desc-scale", "much")
    assert "build-index" in refused(tmp_path, "trainer", "fit", encoded.uri, "--out", "run")
    assert "--preset 'best'" in refused(tmp_path, "trainer", "fit", encoded.uri, "--out", "run", "--preset", "best")
    assert "no run at" in refused(tmp_path, "trainer", "sample", "nowhere", "a circle", "--out", "a.png")
    assert "ends in .png" in refused(tmp_path, "trainer", "sample", "nowhere", "a circle", "--out", "a.gif")
    assert "'sound'" in refused(tmp_path, "trainer", "fit-autoencoder", "sound", shapes, "--out", "a")
    for kind in ("image", "text"):
        assert "no shards at" in refused(tmp_path, "trainer", "fit-autoencoder", kind, "none", "--out", "a")
    assert "--image-size 33" in refused(
        tmp_path, "trainer", "fit-autoencoder", "image", shapes, "--out", "a", "--image-size", "33"
    )
    assert "'two'" in refused(tmp_path, "trainer", "evaluate", "nowhere", "--steps", "two")
    assert "--samples 3 is too few" in refused(tmp_path, "trainer", "evaluate", "nowhere", "--samples", "3")


def test_the_whole_line_by_its_commands(refused, tmp_path, shapes, image_encoder, text_encoder):
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--image-size", "32"]
    for argv in (
        ["pipeline", "encode", shapes, "--table", "db/t.lance", *encoders, "--val-fraction", "0.2", "--",
         "--job_name=shapes"],
        ["pipeline", "build-index", "db/t.lance", "--index-type", "ivf_flat"],
        ["trainer", "fit", "db/t.lance", "--out", "a", "--size", "tiny", "--images", "640", "--batch-size", "32"],
        ["trainer", "fit", "db/t.lance", "--out", "b", "--size", "tiny", "--images", "640", "--batch-size", "32",
         "--objective", "flow_matching", "--coupling", "independent"],
        ["trainer", "sample", "a", "a small red circle", "a large blue square", "--out", "pictures/s.png",
         "--num", "3"],
        ["trainer", "evaluate", "a", "--steps", "1,2"],
        ["trainer", "compare", "a", "b", "--out", "both", "--steps", "2", "--caption", "a small red circle"],
    ):  # fmt: skip
        done = call(*argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    # Three pictures in a row for each caption, with the words under them.
    with Image.open(tmp_path / "pictures" / "s.png") as sheet:
        assert sheet.width == 3 * 136 + 8
        assert sheet.height > 2 * 136
    page = (tmp_path / "both" / "index.html").read_text()
    # A sheet of held-out captions and one of those that were asked for.
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    shown = json.loads(call("pipeline", "inspect", "db/t.lance", "--json", cwd=tmp_path).stdout)
    assert (shown["rows"], shown["index_type"], shown["indexed"]) == (360, "ivf_flat", True)
    again = call(
        "pipeline", "encode", shapes, "--table", "db/t.lance", *encoders, "--val-fraction", "0.2", cwd=tmp_path
    )
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    other = tmp_path / "other"
    other.mkdir()
    assert "another val_fraction" in refused(
        other, "pipeline", "encode", shapes, "--table", tmp_path / "db" / "t.lance", *encoders
    )


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    def broken():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        console.run(broken)


def test_a_users_error_is_one_line(capsys):
    def mistaken():
        raise TableError("no table at x.lance: type this")

    with pytest.raises(SystemExit) as ended:
        console.run(mistaken)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no table at x.lance: type this\n"


def test_progress_logs_a_line_per_tick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "TICK_SECONDS", 0.0)
    with Progress("work", total=10, unit="rows", log=tmp_path / "deep" / "log.jsonl", done=4) as bar:
        bar.advance(2, loss=0.5)
        bar.advance(4)
    ticks = [json.loads(line) for line in (tmp_path / "deep" / "log.jsonl").read_text().splitlines()]
    assert [tick["done"] for tick in ticks] == [6, 10, 10]
    assert all(tick["loss"] == 0.5 and tick["total"] == 10 for tick in ticks)
    assert ticks[-1]["eta"] == 0
    assert "work" in capsys.readouterr().err


def test_json_is_written_aside_and_renamed(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": "é"})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": "é"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
