"""A run encoded in parts, by commands that any scheduler starts, gives the table of one command."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from index.errors import LockedError, OptionError, OutOfReachError, TableError
from index.table.lock import hold_lock
from index.table.once import write_once
from index.table.storage import Storage
from index.table.table import open_table, runs_folder
from pipeline.config import Part
from pipeline.demo.shapes import write_demo_data
from pipeline.encode import graph
from pipeline.encode.parts import PLAN_NAME, read_plans
from pipeline.sources.listing import list_shards

COMMAND = "from pipeline.cli import main; main()"
PARTS = 4


def table_content(uri: Path) -> list[dict]:
    """All columns of all rows, in the order of the table."""
    return open_table(uri).dataset().to_table().to_pylist()


@pytest.fixture
def encode_part(encode_shapes, tmp_path):
    """A function that encodes one part of three, or publishes, in this process."""

    def run(source, part=None, name="t.lance", **options):
        return encode_shapes(source, tmp_path / name, part=part and Part.parse(part), **options)

    return run


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "a/4", "-1/4", "1/4/4", ""])
def test_a_part_is_one_of_n(text):
    with pytest.raises(OptionError, match=r"is not I/N with I from 1 to N: type for instance --part 1/8"):
        Part.parse(text)


def test_the_first_content_of_a_file_is_the_one_that_counts(tmp_path):
    uri = str(tmp_path / "new" / "a.json")
    assert write_once(uri, {"run": 1}, Storage()) == {"run": 1}
    assert write_once(uri, {"run": 2}, Storage()) == {"run": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"limit": 200}], ids=["all", "limit"])
def test_parts_make_the_table_of_one_command(shapes, encode_part, tmp_path, options):
    one = encode_part(shapes, name="one.lance", keep_images=True, **options)
    for part in ("2/3", "3/3", "1/3"):
        encoded = encode_part(shapes, part, keep_images=True, **options)
        assert (encoded.table, encoded.report["part"], encoded.report["num_parts"]) == (None, part, 3)
        assert not (tmp_path / "t.lance" / "_versions").exists()
    published = encode_part(shapes, keep_images=True, **options)
    assert published.report["num_parts"] == 3
    assert published.report["rows"] == one.report["rows"]
    assert table_content(tmp_path / "t.lance") == table_content(tmp_path / "one.lance")
    assert not (tmp_path / "t.encode").exists()
    again = encode_part(shapes, "1/3", keep_images=True, **options)
    assert again.already_complete
    assert not (tmp_path / "t.encode").exists()


@pytest.mark.slow
def test_parts_append(shapes, encode_part, tmp_path):
    first, rest = list_shards([str(shapes)])[:1], shapes
    for name in ("one.lance", "t.lance"):
        encode_part(first, name=name)
    encode_part(rest, name="one.lance", append=True)
    for part in ("1/2", "2/2"):
        encode_part(rest, part, append=True)
    assert open_table(tmp_path / "t.lance").dataset().count_rows() == 120
    encode_part(rest, append=True)
    assert table_content(tmp_path / "t.lance") == table_content(tmp_path / "one.lance")
    assert encode_part(rest, "1/2", append=True).already_complete


@pytest.mark.slow
def test_publishing_is_refused_with_the_list_of_what_is_missing(shapes, encode_part, tmp_path, monkeypatch):
    encode_part(shapes, "2/3")
    encoded = []
    monkeypatch.setattr(graph, "write_shard", lambda *_: encoded.append(1))
    missing = r"is encoded in 3 parts, and these are not finished: 1 \(1 of 1 shards left\), 3 \(1 of 1 shards left\)"
    with pytest.raises(TableError, match=missing + ".*type the others again with --part I/3, and then this command$"):
        encode_part(shapes)
    with hold_lock(f"{runs_folder(str(tmp_path / 't.lance'))}/part-2-of-3", Storage(), "encode --part 2/3"):
        with pytest.raises(TableError, match=r"1 \(1 of 1 shards left\), 2 \(running: encode --part 2/3, process \d+"):
            encode_part(shapes)
        with pytest.raises(LockedError, match=r"part-2-of-3 is locked by encode --part 2/3, process"):
            encode_part(shapes, "2/3")
    assert not encoded


def test_a_part_with_other_options_is_refused(shapes, encode_part, tmp_path):
    encode_part(shapes, "1/2")
    for options, message in [
        ({"val_fraction": 0.5}, r"holds an unfinished run with other options \(--val-fraction: 0.2, now 0.5\)"),
        ({"limit": 9}, "holds an unfinished run with other options"),
    ]:
        with pytest.raises(TableError, match=message):
            encode_part(shapes, "2/2", **options)
    with pytest.raises(TableError, match=r"--part 2/3: this run has 2 parts, not 3: use --part I/2"):
        encode_part(shapes, "2/3")
    with pytest.raises(OptionError, match=r"--dedup image compares all samples of a run"):
        encode_part(shapes, "2/2", dedup="image")
    with hold_lock(runs_folder(str(tmp_path / "t.lance")), Storage()), pytest.raises(LockedError, match="without"):
        encode_part(shapes, "2/2")


def test_a_run_without_parts_is_not_resumed_in_parts(shapes, encode_part, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(graph, "write_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode_part(shapes)
    with pytest.raises(TableError, match="holds an unfinished run without parts: rerun without --part"):
        encode_part(shapes, "1/2")


@pytest.mark.slow
def test_a_part_that_cannot_read_its_shards_says_so(shapes, encode_part, monkeypatch):
    def unreadable(*_):
        raise OutOfReachError("it is out of reach (away): check it")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "write_shard", unreadable)
        with pytest.raises(OutOfReachError, match="these shards could not be read"):
            encode_part(shapes, "1/3")
    for part in ("2/3", "3/3"):
        encode_part(shapes, part)
    with pytest.raises(TableError, match=r"not finished: 1 \(1 of 1 shards could not be read\)"):
        encode_part(shapes)
    encode_part(shapes, "1/3")
    assert encode_part(shapes).report["rows"] == 360


@pytest.mark.slow
def test_a_shard_that_changed_after_its_part_is_not_encoded_by_the_publisher(encode_part, tmp_path):
    write_demo_data(tmp_path / "source", num_samples=20, image_size=32, seed=0, samples_per_shard=10)
    for part in ("1/2", "2/2"):
        encode_part(tmp_path / "source", part)
    shard = Path(list_shards([str(tmp_path / "source")])[1])
    os.utime(shard, (1, 1))
    with pytest.raises(TableError, match=r"has changed since part 2/2 encoded it.*: rerun with --part 2/2"):
        encode_part(tmp_path / "source")
    encode_part(tmp_path / "source", "2/2")
    assert encode_part(tmp_path / "source").report["rows"] == 20


def start(source: Path, table: Path, image_encoder: str, text_encoder: str, *options: str) -> subprocess.Popen:
    argv = ["encode", source, "--table", table, "--image-size", 32, "--batch-size", 8, "--device", "cpu"]
    argv += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, *options]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_processes_one_of_which_is_killed_make_the_table_of_one_command(tmp_path, image_encoder, text_encoder):
    source = tmp_path / "source"
    write_demo_data(source, num_samples=1200, image_size=32, seed=0, samples_per_shard=50)

    def begin(*options: str, name: str = "parts.lance") -> subprocess.Popen:
        return start(source, tmp_path / name, image_encoder, text_encoder, *options)

    def end(process: subprocess.Popen) -> str:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out

    end(begin("--num-workers", "2", name="one.lance"))
    processes = [begin("--part", f"{number}/{PARTS}") for number in range(1, PARTS + 1)]
    while not list((tmp_path / "parts.encode").glob("part-2-of-4/lock")) or not read_plans(
        str(tmp_path / "parts.lance"), Storage()
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    for process in (processes[0], *processes[2:]):
        assert "when all are, rerun without --part" in end(process)
    assert len([path for path in (tmp_path / "parts.encode").iterdir() if PLAN_NAME.fullmatch(path.name)]) == 1
    refused = begin()
    _, err = refused.communicate()
    assert refused.returncode == 2
    assert re.search(r"error: .* these are not finished: 2 \(\d of 6 shards left\): .*--part I/4, and then this", err)
    assert "Traceback" not in err
    end(begin("--part", "2/4", "--num-workers", "2"))
    assert '"num_parts": 4' in end(begin("--json"))
    assert table_content(tmp_path / "parts.lance") == table_content(tmp_path / "one.lance")
    assert not (tmp_path / "parts.encode").exists()
