"""A run may be stopped anywhere: the same command goes on, and the table is what it would have been."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from index.errors import SourceError, TableError
from index.table.lock import claim
from index.table.storage import Storage
from index.table.table import is_table, open_table, shards_of
from pipeline.encode import job as job_module
from pipeline.encode import monitor as watch
from pipeline.encode import run as encode_module
from pipeline.encode.checkpoints import Checkpoints
from pipeline.sources.listing import list_shards

KILLS, SHARDS = 5, 30


def test_the_same_command_again_does_nothing(shapes, encode_shapes, tmp_path):
    first = encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert again.done_before
    assert again.table.version == first.table.version
    assert again.report == first.report
    assert not list(tmp_path.glob("t.encode*"))


def test_a_run_stopped_between_commit_and_report_is_finished(shapes, encode_shapes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert (again.done_before, again.report["rows"], again.table.version) == (True, 360, 1)
    assert not list(tmp_path.glob("t.encode*"))


def test_changed_options_are_refused_and_named(shapes, encode_shapes, tmp_path):
    encode_shapes(shapes, tmp_path / "t.lance")
    with pytest.raises(TableError, match="another val_fraction, min_image_size: name another --table, add --append"):
        encode_shapes(shapes, tmp_path / "t.lance", val_fraction=0.3, min_image_size=8)


@pytest.fixture
def unplugged(shapes, monkeypatch):
    """Opening the last shard fails for as long as the returned list is empty; it receives the shards opened after."""
    last = list_shards([str(shapes)])[-1]
    whole, opened = job_module.EncodeJob.open, []
    plugged = []

    def open_or_fail(self, shard, **options):
        if not plugged and shard == last:
            raise KeyError("pulled the plug")
        opened.append(shard)
        return whole(self, shard, **options)

    monkeypatch.setattr(job_module.EncodeJob, "open", open_or_fail)
    return opened, plugged, last


def test_a_stopped_run_goes_on_where_it_was(encoded, shapes, encode_shapes, content, tmp_path, unplugged):
    opened, plugged, last = unplugged
    with pytest.raises(Exception, match="pulled the plug"):
        encode_shapes(shapes, tmp_path / "t.lance", keep_images=True)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
    finished, checkpoints = list(opened), Checkpoints(str(tmp_path / "t.encode"))
    assert all(checkpoints.finished(shard).rows == 120 for shard in finished)
    assert checkpoints.finished(last) is None
    plugged.append(True)
    opened.clear()
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert set(opened) == set(list_shards([str(shapes)])) - set(finished)
    assert content(table) == content(encoded)


def test_an_unfinished_run_is_not_thrown_away_by_a_slip(shapes, encode_shapes, tmp_path, unplugged):
    with pytest.raises(Exception, match="pulled the plug"):
        encode_shapes(shapes, tmp_path / "t.lance")
    with pytest.raises(TableError, match=r"unfinished run in .*t\.encode has another image_size: type its options"):
        encode_shapes(shapes, tmp_path / "t.lance", image_size=64)
    unplugged[1].append(True)
    assert encode_shapes(shapes, tmp_path / "t.lance").report["rows"] == 360


COMMAND = "from pipeline.cli import main; main()"


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _holds(checkpoints, process: int) -> bool:
    """Whether a process has begun to work: it has claimed the table."""
    owner = checkpoints / "owner.json"
    return owner.exists() and owner.read_text().find(f'"process": {process},') >= 0


def _finished(checkpoints) -> int:
    """How many shards are marked as finished."""
    return len(list(checkpoints.glob("????????????????????????.json")))


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_random_moments_changes_nothing(
    encode_shapes, content, image_encoder, text_encoder, tmp_path, workers
):
    """Each life is killed after a random number of further shards; the last one reaches the end."""
    from pipeline.demo.shapes import write_demo_data

    write_demo_data(tmp_path / "source", samples=200 * SHARDS, size=32, seed=3, per_shard=200)
    undisturbed = encode_shapes(tmp_path / "source", tmp_path / "undisturbed.lance").table
    checkpoints, table = tmp_path / "killed.encode", tmp_path / "killed.lance"
    arguments = ["encode", str(tmp_path / "source"), "--table", str(table), "--image-size", "32", "--device", "cpu"]
    arguments += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--val-fraction", "0.2"]
    arguments += ["--batch-size", "32", "--num-workers", str(workers)]
    uniforms, finished = random.Random(workers), [0]
    while len(finished) <= KILLS:
        life, wanted = start(arguments), finished[-1] + uniforms.randrange(SHARDS // KILLS)
        while life.poll() is None and not (_holds(checkpoints, life.pid) and _finished(checkpoints) >= wanted):
            time.sleep(0.01)
        with life.stderr, contextlib.suppress(subprocess.TimeoutExpired):
            life.wait(uniforms.uniform(0.0, 0.3))
        life.kill()
        life.wait()
        if is_table(str(table), Storage()):
            break
        finished.append(_finished(checkpoints))
    life = start(arguments)
    _, told = life.communicate(timeout=300)
    assert life.returncode == 0, told.decode()
    assert len(finished) > 2
    assert finished == sorted(finished)  # a mark that was there stays
    killed = open_table(table)
    assert content(killed) == content(undisturbed)
    assert killed.meta.geometry.same_as(undisturbed.meta.geometry)
    named = {file["path"] for f in killed.dataset().get_fragments() for file in f.metadata.to_json()["files"]}
    assert {path.name for path in (table / "data").iterdir()} == named
    print(json.dumps({"workers": workers, "kills": len(finished) - 1, "finished_shards_at_each": finished}))


def test_a_worker_that_is_killed_ends_the_run_with_one_line(shapes, image_encoder, text_encoder, tmp_path):
    """Beam would wait for it for ever."""
    arguments = [
        "encode",
        str(shapes),
        "--table",
        str(tmp_path / "t.lance"),
        "--image-size",
        "32",
        "--num-workers",
        "2",
    ]
    arguments += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--device", "cpu"]
    life = start(arguments)
    workers: list[psutil.Process] = []
    while life.poll() is None and len(workers) < 2:
        family = psutil.Process(life.pid).children(recursive=True)
        workers = [process for process in family if "python" in process.name()]
    workers[0].kill()
    _, told = life.communicate(timeout=60)
    assert life.returncode == 2, told.decode()
    (line,) = told.decode().splitlines()[-1:]
    assert line.startswith(f"error: {tmp_path / 't.lance'} is not finished: a worker process died")
    assert "Traceback" not in told.decode()
    _, told = start(arguments).communicate(timeout=60)
    assert open_table(tmp_path / "t.lance").dataset().count_rows() == 360


def test_a_reader_sees_the_old_table_or_the_new_one(shapes, encode_shapes, tmp_path, unplugged):
    parts = list_shards([str(shapes)])
    before = encode_shapes(parts[0], tmp_path / "t.lance").table
    with pytest.raises(Exception, match="pulled the plug"):
        encode_shapes(shapes, tmp_path / "t.lance", append=True)
    seen = open_table(tmp_path / "t.lance")
    assert (seen.version, seen.dataset().count_rows()) == (before.version, 120)


def test_append_adds_new_shards_and_skips_those_present(encoded, shapes, encode_shapes, content, tmp_path, unplugged):
    opened, plugged, _ = unplugged
    plugged.append(True)
    parts = list_shards([str(shapes)])
    first = encode_shapes(parts[:1], tmp_path / "t.lance", keep_images=True).table
    opened.clear()
    added = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    assert set(opened) == set(parts[1:])
    assert added.report["rows"] == 240
    assert shards_of(added.table) == set(parts)
    # The geometry that rows are compared in stays; rows are those of one run over everything.
    assert added.table.meta.geometry.same_as(first.meta.geometry)

    def without(table):
        return [{name: row[name] for name in row if name != "vector"} for row in content(table)]

    assert without(added.table) == without(encoded)
    assert {row["id"]: row["vector"] for row in content(added.table)}.items() >= {
        row["id"]: row["vector"] for row in content(first)
    }.items()
    whole, merged = encoded.meta.moments.to_dict(), added.table.meta.moments
    assert merged.count == encoded.meta.moments.count
    assert merged.latent_std == pytest.approx(encoded.meta.moments.latent_std, rel=1e-12)
    assert whole.keys() == merged.to_dict().keys()
    again = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    assert (again.done_before, again.table.version) == (True, added.table.version)


def test_an_append_stopped_between_rows_and_metadata_is_finished(
    encoded, shapes, encode_shapes, content, tmp_path, monkeypatch
):
    from index.table import table as table_module

    first = encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance", keep_images=True).table
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "update_meta", lambda *_: (_ for _ in ()).throw(KeyError("pulled the plug")))
        with pytest.raises(Exception, match="pulled the plug"):
            encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    between = open_table(first.uri)
    assert (between.dataset().count_rows(), between.meta.moments.count) == (360, first.meta.moments.count)
    after = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    assert (len(content(after.table)), after.report["rows"]) == (360, 240)
    assert after.table.meta.moments.count == encoded.meta.moments.count
    assert len(after.table.meta.run_ids) == 2


def test_an_index_serves_its_rows_after_an_append(shapes, encode_shapes, tmp_path):
    from index.build.build_index import BuildConfig, build_index

    parts = list_shards([str(shapes)])
    first = encode_shapes(parts[:2], tmp_path / "t.lance").table
    built = build_index(first, BuildConfig(index_type="ivf_flat", balance=True)).table
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True).table
    assert added.meta.index == built.meta.index
    assert added.lancedb().index_stats("vector_idx").num_unindexed_rows == 120
    new = added.dataset().to_table(columns=["vector"], filter=f"shard = '{parts[2]}'").num_rows
    assert new == 120
    again = build_index(added, BuildConfig(index_type="ivf_flat"))
    assert again.report["num_unindexed_rows"] == 0
    assert "ivf_flat is kept, 120 rows were added to it" in again.report["index_choice"]
    assert again.report["index_num_partitions"] == built.meta.index.num_partitions
    assert again.table.meta.geometry.same_as(built.meta.geometry)


def test_an_index_that_no_longer_serves_is_built_anew(shapes, encode_shapes, tmp_path, monkeypatch):
    from index.build import select as choose
    from index.build.build_index import BuildConfig, build_index

    monkeypatch.setattr(choose, "RERANKED", 1)
    first = encode_shapes(list_shards([str(shapes)])[:2], tmp_path / "t.lance").table
    build_index(first, BuildConfig(index_type="ivf_rq", target_recall=0.1))
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True).table
    again = build_index(added, BuildConfig(index_type="ivf_rq", target_recall=0.99))
    assert again.report["recall_at_1"] >= 0.99
    assert again.report["num_unindexed_rows"] == 0
    assert "is kept" not in again.report["index_choice"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_fraction": 0.5}, "--val-fraction"),
        ({"image_size": 64}, "--image-size"),
        ({"keep_images": True}, "--keep-images"),
        ({"desc_scale": 7.0}, "--desc-scale"),
    ],
)
def test_append_refuses_rows_that_would_not_fit(shapes, encode_shapes, tmp_path, options, said):
    parts = list_shards([str(shapes)])
    encode_shapes(parts[:1], tmp_path / "t.lance")
    with pytest.raises(TableError, match=f"another {said}: append with the same"):
        encode_shapes(shapes, tmp_path / "t.lance", append=True, **options)


def test_append_refuses_another_encoder(shapes, encode_shapes, changed_encoder, tmp_path):
    parts = list_shards([str(shapes)])
    encode_shapes(parts[:1], tmp_path / "t.lance")
    with pytest.raises(TableError, match="another --image-encoder"):
        encode_shapes(shapes, tmp_path / "t.lance", append=True, image_encoder=changed_encoder)


def test_two_encodes_into_one_table_at_once(shapes, encode_shapes, tmp_path):
    taken = pytest.raises(TableError, match=rf"is being encoded by process {os.getpid()} on .* stop it first")
    with claim(str(tmp_path / "t.encode"), Storage()), taken:
        encode_shapes(shapes, tmp_path / "t.lance", limit=10)
    assert encode_shapes(shapes, tmp_path / "t.lance", limit=10).report["rows"] == 10


def test_a_dead_process_holds_nothing(tmp_path):
    code = f"""
import os, signal
from index.table.lock import claim
from index.table.storage import Storage
with claim({str(tmp_path / "x")!r}, Storage()):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "x" / "lock").exists()
    with claim(str(tmp_path / "x"), Storage()):
        pass


def test_a_target_that_cannot_be_written_is_said_before_the_work(shapes, encode_shapes, tmp_path):
    with pytest.raises(TableError, match=r"/proc/nowhere/t.lance cannot be written: /proc: .*name another --table"):
        encode_shapes(shapes, "/proc/nowhere/t.lance")
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot be written"):
        encode_shapes(shapes, tmp_path / "file" / "t.lance")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB that can be filled; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    small_disk, encoded, shapes, encode_shapes, content, workers
):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 300 * 1024))
    with pytest.raises(TableError, match=r"cannot be written .*No space left.*the same command goes on"):
        encode_shapes(shapes, small_disk / "t.lance", keep_images=True, num_workers=workers)
    (small_disk / "ballast").unlink()
    assert content(encode_shapes(shapes, small_disk / "t.lance", keep_images=True).table) == content(encoded)


def test_a_run_that_would_not_fit_is_refused_before_it_starts(small_disk, shapes, encode_shapes):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 100 * 1024))
    with pytest.raises(TableError, match=r"needs about .* GiB for 360 samples"):
        encode_shapes(shapes, small_disk / "t.lance", keep_images=True, dry_run=True)


def test_a_run_that_goes_wrong_is_stopped_on_the_way(write_tar, encode_shapes, tmp_path, monkeypatch):
    """Once so much is rejected that no good sample to come could mend it."""
    for shard in range(10):
        write_tar(tmp_path / "source" / f"{shard}.tar", [(f"{n}.{e}", b"?") for n in range(5) for e in ("png", "txt")])
        (tmp_path / "source" / f"{shard}_stats.json").write_text('{"successes": 5}')
    whole, opened = job_module.EncodeJob.open, []

    def open_slowly(self, shard, **options):
        opened.append(shard)
        time.sleep(0.3)
        return whole(self, shard, **options)

    monkeypatch.setattr(job_module.EncodeJob, "open", open_slowly)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(watch, "STOPPING_REJECTS", 5)
    with pytest.raises(
        SourceError, match=r"^\d+ of 50 samples are rejected already, after \d of 10 shards: nothing was pub"
    ):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.2)
    assert 3 <= len(opened) < 10
    # Allowing more takes the stop back.
    with pytest.raises(SourceError, match="50 of 50 samples were rejected"):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.9)
