"""A run may be stopped at any moment: the same command resumes it, and the table is that of an undisturbed run."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from index.errors import SourceError, TableError
from index.table import commit
from index.table.ledger import read_ledger
from index.table.lock import hold_lock
from index.table.storage import Storage
from index.table.table import Table, is_table, open_table
from pipeline.demo.shapes import write_demo_data
from pipeline.encode import graph, monitor, publish
from pipeline.encode import run as encode_run
from pipeline.encode.checkpoints import (
    LAYOUT,
    META,
    PLAN,
    VECTORS,
    Checkpoints,
    ShardCheckpoint,
    Watch,
    file_name,
    moments_name,
)
from pipeline.sources.listing import list_shards

KILLS, SHARDS = 5, 30
COMMAND = "from pipeline.cli import main; main()"


class Failure:
    """Fails at the last shard until `repaired`; records the shards that are encoded."""

    def __init__(self, shards: list[str]) -> None:
        self.last, self.encoded, self.repaired = shards[-1], [], False

    def write_shard(self, job, shard, duplicates, *, write_shard=graph.write_shard):
        if shard == self.last and not self.repaired:
            raise KeyError("worker failure")
        self.encoded.append(shard)
        return write_shard(job, shard, duplicates)


@pytest.fixture
def failure(shapes, monkeypatch):
    failure = Failure(list_shards([str(shapes)]))
    monkeypatch.setattr(graph, "write_shard", failure.write_shard)
    return failure


def fail(*_):
    raise KeyError("worker failure")


def run_folder(table: Path) -> Path:
    """The folder of a table's unfinished run; one that does not exist if there is no such run."""
    folders = list(table.with_suffix(".encode").glob("*-*"))
    assert len(folders) < 2
    return folders[0] if folders else table.with_suffix(".encode") / "none"


@pytest.fixture
def unfinished(encode_shapes, shapes, failure):
    """A function that encodes until the last shard, which fails, and returns the run's folder."""

    def run(table: Path, **options) -> Path:
        with pytest.raises(Exception, match="worker failure"):
            encode_shapes(shapes, table, keep_images=True, **options)
        failure.repaired, failure.encoded = True, []
        return run_folder(table)

    return run


@pytest.mark.slow
def test_the_same_command_again_does_nothing(shapes, encode_shapes, tmp_path):
    first = encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert again.already_complete
    assert again.table.version == first.table.version
    assert again.report == first.report
    assert not list(tmp_path.glob("t.encode*"))


@pytest.mark.slow
def test_a_run_stopped_between_commit_and_report_is_finished(shapes, encode_shapes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Table, "write_report", fail)
        with pytest.raises(KeyError, match="worker failure"):
            encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert (again.already_complete, again.report["rows"], again.table.version) == (True, 360, 1)
    assert not list(tmp_path.glob("t.encode*"))


@pytest.mark.slow
@pytest.mark.parametrize("stopped_before", ["ledger", "report"])
def test_a_published_run_whose_checkpoints_are_gone_is_finished(
    shapes, encode_shapes, tmp_path, monkeypatch, stopped_before
):
    with monkeypatch.context() as patch:
        place, name = {"ledger": (publish, "add_entries"), "report": (Table, "write_report")}[stopped_before]
        patch.setattr(place, name, fail)
        with pytest.raises(KeyError, match="worker failure"):
            encode_shapes(shapes, tmp_path / "t.lance")
    lost = list_shards([str(shapes)])[1]
    (run_folder(tmp_path / "t.lance") / file_name(lost)).unlink()
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert (again.already_complete, again.table.version, again.table.dataset().count_rows()) == (True, 1, 360)
    assert (again.report["rows"], again.report["shards"]) == (240, 2)
    assert "checkpoints of 1 shards are gone" in again.report["warnings"][0]
    assert not list(tmp_path.glob("t.encode*"))
    assert [entry.rows for entry in read_ledger(again.table)] == [120] * 3
    assert [entry.shard for entry in read_ledger(again.table) if not entry.complete] == (
        [lost] if stopped_before == "ledger" else []
    )
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True)
    assert added.report["rows"] == 0


@pytest.mark.slow
def test_changed_options_are_refused_with_both_values(shapes, encode_shapes, tmp_path):
    encode_shapes(shapes, tmp_path / "t.lance")
    changes = r"\(--val-fraction: 0.2, now 0.3; --min-image-size: not set, now 8\)"
    with pytest.raises(TableError, match=rf"other options {changes}: name another --table, add --append"):
        encode_shapes(shapes, tmp_path / "t.lance", val_fraction=0.3, min_image_size=8)


def test_a_dry_run_of_a_finished_table_has_nothing_to_do(encoded, shapes, encode_shapes):
    planned = encode_shapes(shapes, encoded.uri, keep_images=True, dry_run=True)
    assert (planned.already_complete, planned.report) == (True, {"already_complete": True})


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_unfinished_shards(encoded, shapes, encode_shapes, content, tmp_path, failure):
    with pytest.raises(Exception, match="worker failure"):
        encode_shapes(shapes, tmp_path / "t.lance", keep_images=True)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
    finished, checkpoints = list(failure.encoded), Checkpoints(str(run_folder(tmp_path / "t.lance")))
    assert all(checkpoints.load(shard).rows == 120 for shard in finished)
    assert checkpoints.load(failure.last) is None
    failure.repaired, failure.encoded = True, []
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert set(failure.encoded) == set(list_shards([str(shapes)])) - set(finished)
    assert content(table) == content(encoded)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text(path.read_text()[:50])])
def test_a_shard_whose_moments_are_lost_is_encoded_again(
    encoded, shapes, encode_shapes, content, tmp_path, failure, damage
):
    with pytest.raises(Exception, match="worker failure"):
        encode_shapes(shapes, tmp_path / "t.lance", keep_images=True)
    lost = failure.encoded[0]
    damage(run_folder(tmp_path / "t.lance") / moments_name(lost))
    failure.repaired, failure.encoded = True, []
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert lost in failure.encoded
    assert (content(table), table.meta.moments.count) == (content(encoded), encoded.meta.moments.count)


def test_watching_reads_each_checkpoint_once(tmp_path, monkeypatch):
    shards, read = [f"s{number}" for number in range(4)], []
    checkpoints, watch = Checkpoints(str(tmp_path)), Watch(shards)
    read_json = Storage.read_json
    monkeypatch.setattr(Storage, "read_json", lambda storage, uri: read.append(uri) or read_json(storage, uri))
    checkpoints.write("plan.json", {})
    checkpoints.save_progress("s0", 3)
    for shard in ("s1", "s2"):
        checkpoints.save(ShardCheckpoint(shard, samples=5, rows=5, moments={"count": 5}))
    for _ in range(2):
        watch.look(checkpoints)
        assert (watch.samples, watch.counts.shards, watch.counts.rows) == (13, 2, 10)
    checkpoints.save(ShardCheckpoint("s0", samples=7, rows=7))
    checkpoints.save_unread("s3", "gone")
    checkpoints.save_wait("s2", "the store")
    watch.look(checkpoints)
    assert (watch.samples, watch.counts.shards, list(watch.counts.unread)) == (17, 4, ["s3"])
    assert watch.waits == ["the store"]
    finished = [uri for uri in read if uri.endswith(".json")]
    assert sorted(finished) == sorted(checkpoints.uri(file_name(shard)) for shard in ("s0", "s1", "s2"))


@pytest.mark.slow
def test_an_unfinished_run_is_not_resumed_with_other_options(shapes, encode_shapes, tmp_path, failure):
    with pytest.raises(Exception, match="worker failure"):
        encode_shapes(shapes, tmp_path / "t.lance")
    changes = r"\(--image-size: 32, now 64\)"
    with pytest.raises(
        TableError, match=rf"t\.encode holds an unfinished run with other options {changes}: rerun with"
    ):
        encode_shapes(shapes, tmp_path / "t.lance", image_size=64)
    failure.repaired = True
    assert encode_shapes(shapes, tmp_path / "t.lance").report["rows"] == 360


def start_encode(source: Path, table: Path, image_encoder: str, text_encoder: str, *options: str) -> subprocess.Popen:
    """Run `pipeline encode` in a process group of its own."""
    arguments = ["encode", str(source), "--table", str(table), "--image-size", "32", "--device", "cpu"]
    arguments += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, *options]
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def holds_lock(folder: Path, process: int) -> bool:
    """Return whether a process holds the lock of a run, that is, has started to work."""
    owner = folder / "lock"
    return owner.exists() and owner.read_text().find(f'"process": {process},') >= 0


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_kill_9_at_random_moments_changes_nothing(
    encode_shapes, content, image_encoder, text_encoder, tmp_path, num_workers
):
    """Each process is killed after a random number of further shards; the last one reaches the end."""
    source, table = tmp_path / "source", tmp_path / "killed.lance"
    write_demo_data(source, num_samples=200 * SHARDS, image_size=32, seed=3, samples_per_shard=200)
    undisturbed = encode_shapes(source, tmp_path / "undisturbed.lance").table
    shards = list_shards([str(source)])
    options = ("--val-fraction", "0.2", "--batch-size", "32", "--num-workers", str(num_workers))

    def start() -> subprocess.Popen:
        return start_encode(source, table, image_encoder, text_encoder, *options)

    def count_finished() -> int:
        checkpoints = Checkpoints(str(run_folder(table)))
        return sum(checkpoints.load(shard) is not None for shard in shards)

    uniforms, finished = random.Random(num_workers), [0]
    while len(finished) <= KILLS:
        process, target = start(), finished[-1] + uniforms.randrange(SHARDS // KILLS)
        folder = table.with_suffix(".encode")
        while process.poll() is None and not (holds_lock(folder, process.pid) and count_finished() >= target):
            time.sleep(0.01)
        with process.stderr, contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(uniforms.uniform(0.0, 0.3))
        process.kill()
        process.wait()
        if is_table(str(table), Storage()):
            break
        finished.append(count_finished())
    process = start()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()
    assert len(finished) > 2
    assert finished == sorted(finished)  # no checkpoint is ever lost
    killed = open_table(table)
    assert content(killed) == content(undisturbed)
    assert killed.meta.geometry.same_as(undisturbed.meta.geometry)
    committed = {file["path"] for f in killed.dataset().get_fragments() for file in f.metadata.to_json()["files"]}
    assert {path.name for path in (table / "data").iterdir()} == committed
    print(json.dumps({"num_workers": num_workers, "kills": len(finished) - 1, "finished_shards_at_each": finished}))


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line(shapes, image_encoder, text_encoder, tmp_path):
    """Beam would wait for it forever."""

    def start() -> subprocess.Popen:
        return start_encode(shapes, tmp_path / "t.lance", image_encoder, text_encoder, "--num-workers", "2")

    process, workers = start(), list[psutil.Process]()
    while process.poll() is None and len(workers) < 2:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "python" in child.name()]
    workers[0].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr.decode()
    (line,) = stderr.decode().splitlines()[-1:]
    assert line.startswith(f"error: {tmp_path / 't.lance'} is not finished: a worker process died")
    assert "rerun the same command to resume, with fewer --num-workers" in line
    assert "Traceback" not in stderr.decode()
    start().communicate(timeout=60)
    assert open_table(tmp_path / "t.lance").dataset().count_rows() == 360


@pytest.mark.slow
def test_readers_see_the_old_table_until_an_append_is_published(shapes, encode_shapes, tmp_path, failure):
    first = encode_shapes(list_shards([str(shapes)])[0], tmp_path / "t.lance").table
    with pytest.raises(Exception, match="worker failure"):
        encode_shapes(shapes, tmp_path / "t.lance", append=True)
    visible = open_table(tmp_path / "t.lance")
    assert (visible.version, visible.dataset().count_rows()) == (first.version, 120)


@pytest.mark.slow
def test_append_adds_new_shards_and_skips_those_present(encoded, shapes, encode_shapes, content, tmp_path, failure):
    failure.repaired = True
    shards = list_shards([str(shapes)])
    first = encode_shapes(shards[:1], tmp_path / "t.lance", keep_images=True).table
    failure.encoded = []
    added = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    assert set(failure.encoded) == set(shards[1:])
    assert added.report["rows"] == 240
    assert {entry.shard for entry in read_ledger(added.table) if entry.complete} == set(shards)
    # The geometry stays that of the first shard; all other columns are those of one run over all shards.
    assert added.table.meta.geometry.same_as(first.meta.geometry)

    def without_vectors(table):
        return [{name: row[name] for name in row if name != "vector"} for row in content(table)]

    assert without_vectors(added.table) == without_vectors(encoded)
    assert {row["id"]: row["vector"] for row in content(added.table)}.items() >= {
        row["id"]: row["vector"] for row in content(first)
    }.items()
    merged = added.table.meta.moments
    assert merged.count == encoded.meta.moments.count
    assert merged.latent_std == pytest.approx(encoded.meta.moments.latent_std, rel=1e-12)
    again = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    assert (again.already_complete, again.table.version) == (True, added.table.version)


@pytest.mark.slow
def test_an_append_stopped_between_rows_and_metadata_is_finished(
    encoded, shapes, encode_shapes, content, tmp_path, monkeypatch
):
    first = encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance", keep_images=True).table
    with monkeypatch.context() as patch:
        # As with columns that the user added: rows and metadata are two commits.
        patch.setattr(commit, "has_own_columns", lambda table: False)
        patch.setattr(commit, "update_meta", fail)
        with pytest.raises(Exception, match="worker failure"):
            encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    between = open_table(first.uri)
    assert (between.dataset().count_rows(), between.meta.moments.count) == (360, first.meta.moments.count)
    after = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True)
    assert (len(content(after.table)), after.report["rows"]) == (360, 240)
    assert after.table.meta.moments.count == encoded.meta.moments.count
    assert len(after.table.meta.run_ids) == 2


# --- done means read back


def without_engine(monkeypatch, after=lambda job: None, *, runs: bool = False):
    """Let the engine end without an error; `after` changes what it has left, if it runs at all."""
    run_graph = encode_run._run_graph

    def ends(job) -> None:
        if runs:
            run_graph(job)
        after(job)

    monkeypatch.setattr(encode_run, "_run_graph", ends)


def drop_vectors(job) -> None:
    job.runtime.storage.remove(job.checkpoints.uri(file_name(job.config.shards[-1], VECTORS)))


def other_vectors(job) -> None:
    """As an earlier attempt has left them that had another geometry."""
    name = file_name(job.config.shards[0], VECTORS)
    job.checkpoints.write(name, job.checkpoints.read(name) | {"layout": "other"})


def not_of_its_rows(job) -> None:
    """As an earlier attempt has left them, before the shard was encoded again to as many rows."""
    checkpoint = job.checkpoints.load(job.config.shards[0])
    checkpoint.fragments[0]["files"][0]["path"] = "other.lance"
    job.checkpoints.save(checkpoint)


def lose_plan_of_layout(job) -> None:
    job.runtime.storage.remove(job.checkpoints.uri(META))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "after", "finished"),
    [
        (False, lambda job: None, 0),
        (True, drop_vectors, 3),
        (True, other_vectors, 3),
        (True, not_of_its_rows, 3),
        (True, lose_plan_of_layout, 3),
    ],
    ids=["nothing ran", "a shard was dropped", "other geometry", "other rows", "ended before the last steps"],
)
def test_an_engine_that_ends_without_an_error_is_not_believed(
    shapes, encode_shapes, tmp_path, monkeypatch, runs, after, finished
):
    message = rf"t\.lance is not finished \({finished} of 3 shards encoded\): rerun the same command to resume"
    with monkeypatch.context() as patch:
        without_engine(patch, after, runs=runs)
        with pytest.raises(TableError, match=message):
            encode_shapes(shapes, tmp_path / "t.lance")
    assert not is_table(str(tmp_path / "t.lance"), Storage())
    assert (run_folder(tmp_path / "t.lance") / PLAN).exists()
    assert encode_shapes(shapes, tmp_path / "t.lance").report["rows"] == 360


@pytest.mark.slow
def test_an_append_whose_engine_dies_keeps_the_table_and_the_work(shapes, encode_shapes, tmp_path, monkeypatch):
    first = encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance").table
    with monkeypatch.context() as patch:
        without_engine(patch, lose_plan_of_layout, runs=True)
        with pytest.raises(TableError, match=r"not finished \(2 of 2 shards encoded\)"):
            encode_shapes(shapes, tmp_path / "t.lance", append=True)
    assert open_table(first.uri).version == first.version
    assert len(list(run_folder(tmp_path / "t.lance").glob("*.json"))) >= 3
    assert encode_shapes(shapes, tmp_path / "t.lance", append=True).table.dataset().count_rows() == 360


@pytest.mark.slow
def test_an_engine_that_drops_a_shard_is_noticed_before_anything_is_published(
    shapes, encode_shapes, tmp_path, monkeypatch
):
    """As Beam's Dask runner drops elements."""
    last, process = list_shards([str(shapes)])[-1], graph._WriteShard.process

    def drop_last(self, element):
        for shard in process(self, element):
            if shard != last:
                yield shard

    with monkeypatch.context() as patch:
        patch.setattr(graph._WriteShard, "process", drop_last)
        with pytest.raises(TableError, match=r"not finished \(2 of 3 shards encoded\)"):
            encode_shapes(shapes, tmp_path / "t.lance")
    assert encode_shapes(shapes, tmp_path / "t.lance").report["rows"] == 360


@pytest.mark.slow
def test_a_commit_without_all_rows_is_not_reported_as_done(shapes, encode_shapes, tmp_path, monkeypatch):
    def publish_less(uri, schema, meta, fragments, *arguments, publish=publish.publish):
        return publish(uri, schema, meta, fragments[:-1], *arguments)

    monkeypatch.setattr(publish, "publish", publish_less)
    with pytest.raises(TableError, match="holds 240 rows of this run and 360 were encoded"):
        encode_shapes(shapes, tmp_path / "t.lance")
    assert (run_folder(tmp_path / "t.lance") / PLAN).exists()


# --- checkpoints


@pytest.mark.slow
def test_an_unreadable_checkpoint_counts_as_none(
    encoded, unfinished, failure, shapes, encode_shapes, content, tmp_path
):
    folder, shards = unfinished(tmp_path / "t.lance"), list_shards([str(shapes)])
    (folder / file_name(shards[0])).write_bytes(b"")  # as after a power cut
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert set(failure.encoded) == {shards[0], shards[2]}
    assert content(table) == content(encoded)


@pytest.mark.slow
def test_a_table_deleted_under_an_unfinished_run_is_encoded_anew(
    encoded, unfinished, failure, shapes, encode_shapes, content, tmp_path
):
    unfinished(tmp_path / "t.lance")
    shutil.rmtree(tmp_path / "t.lance")
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert len(failure.encoded) == 3
    assert content(table) == content(encoded)


@pytest.mark.slow
def test_a_table_deleted_under_an_unfinished_append_is_encoded_anew(
    encoded, unfinished, shapes, encode_shapes, content, tmp_path
):
    encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance", keep_images=True)
    unfinished(tmp_path / "t.lance", append=True)
    shutil.rmtree(tmp_path / "t.lance")
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True, append=True).table
    assert content(table) == content(encoded)
    assert not list(tmp_path.glob("t.encode*"))


@pytest.mark.slow
def test_a_shard_that_changed_since_its_checkpoint_is_read_again(
    unfinished, failure, shapes, encode_shapes, content, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    shutil.copytree(shapes, source)
    shards = list_shards([str(source)])
    failure.last = shards[-1]
    with pytest.raises(Exception, match="worker failure"):
        encode_shapes(source, tmp_path / "t.lance")
    failure.repaired, failure.encoded = True, []
    shutil.copyfile(shards[2], shards[0])
    table = encode_shapes(source, tmp_path / "t.lance").table
    assert set(failure.encoded) == {shards[0], shards[2]}
    keys = [row["key"] for row in content(table)]
    assert len(keys) == 360
    assert len(set(keys)) == 240


@pytest.mark.slow
def test_a_run_stopped_while_it_deletes_its_checkpoints_keeps_its_report(shapes, encode_shapes, tmp_path, monkeypatch):
    def remove_some(self) -> None:
        (Path(self.folder) / PLAN).unlink()
        next(path for path in Path(self.folder).glob("*.json") if len(path.stem) == 24).unlink()
        fail()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", remove_some)
        with pytest.raises(KeyError, match="worker failure"):
            encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert (
        again.already_complete,
        again.report["rows"],
        open_table(tmp_path / "t.lance").report("encode")["rows"],
    ) == (
        True,
        360,
        360,
    )
    # The next run deletes what is left.
    encode_shapes(write_more(tmp_path), tmp_path / "t.lance", append=True)
    assert not list(tmp_path.glob("t.encode*"))


def write_more(folder: Path) -> Path:
    """Write a shard of other samples."""
    write_demo_data(folder / "more", num_samples=10, image_size=32, seed=9)
    return folder / "more"


@pytest.mark.slow
def test_rejects_of_a_deleted_table_do_not_come_back(write_tar, encode_shapes, rejects, tmp_path):
    """The same command, the same options, another life."""
    write_demo_data(tmp_path / "source", num_samples=10, image_size=32, seed=0)
    bad = write_tar(tmp_path / "source/bad.tar", [("a.png", b"?"), ("a.txt", b"words")])
    table = encode_shapes(tmp_path / "source", tmp_path / "t.lance").table
    assert len(rejects(table)) == 1
    shutil.rmtree(table.uri)
    write_tar(bad, [])
    again = encode_shapes(tmp_path / "source", tmp_path / "t.lance")
    assert (again.report["rejected"], rejects(again.table)) == (0, [])
    assert again.table.meta.run_ids != table.meta.run_ids


@pytest.mark.slow
@pytest.mark.parametrize("stopped_before", ["rows", "ledger"])
def test_an_append_stopped_between_its_commits_is_finished(
    shapes, encode_shapes, write_tar, rejects, tmp_path, monkeypatch, stopped_before
):
    bad = write_tar(tmp_path / "bad.tar", [("a.png", b"?"), ("a.txt", b"words")])
    first = encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance").table
    sources = [shapes, bad]
    with monkeypatch.context() as patch:
        patch.setattr(publish, {"rows": "append_rows", "ledger": "add_entries"}[stopped_before], fail)
        with pytest.raises(KeyError, match="worker failure"):
            encode_shapes(sources, tmp_path / "t.lance", append=True)
    assert len(read_ledger(open_table(first.uri))) == 1
    added = encode_shapes(sources, tmp_path / "t.lance", append=True)
    assert (added.report["rows"], added.report["rejected"]) == (240, 1)
    assert (added.table.dataset().count_rows(), len(rejects(added.table))) == (360, 1)
    assert len(read_ledger(added.table)) == 4
    assert encode_shapes(sources, tmp_path / "t.lance", append=True).report["shards_already_present"] == 4


@pytest.mark.slow
def test_an_unfinished_append_whose_source_has_grown_resumes_with_its_own_shards(
    unfinished, shapes, encode_shapes, failure, tmp_path
):
    shards = list_shards([str(shapes)])
    encode_shapes(shards[:1], tmp_path / "t.lance", keep_images=True)
    unfinished(tmp_path / "t.lance", append=True)
    grown = [*shards, write_more(tmp_path)]
    resumed = encode_shapes(grown, tmp_path / "t.lance", keep_images=True, append=True)
    assert failure.encoded == [shards[2]]
    assert resumed.report["rows"] == 240
    (warning,) = resumed.report["warnings"]
    assert "resumed an unfinished run with the 3 shards of its start" in warning
    assert encode_shapes(grown, tmp_path / "t.lance", keep_images=True, append=True).report["rows"] == 10


@pytest.mark.slow
def test_a_geometry_that_changed_during_an_append_is_noticed(shapes, encode_shapes, tmp_path, monkeypatch):
    from index.build.build_index import BuildConfig, build_index

    first = encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance").table

    def rebuild(job) -> None:
        build_index(open_table(first.uri), BuildConfig(index_type="none", desc_scale=7.0))

    with monkeypatch.context() as patch:
        without_engine(patch, rebuild, runs=True)
        with pytest.raises(TableError, match="changed while it was appended to: rerun the same command"):
            encode_shapes(shapes, tmp_path / "t.lance", append=True)
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True).table
    assert added.dataset().count_rows() == 360
    vectors = added.meta.geometry.vectors(added.column("text", None), added.column("latent", None))
    assert (added.column("vector", None) == vectors.astype("float16")).all()


@pytest.mark.slow
def test_a_balance_that_comes_during_an_append_is_noticed(shapes, encode_shapes, tmp_path, monkeypatch):
    """Rows to append get a neutral balance coordinate, or none if there is no balance."""
    from index.build.build_index import BuildConfig, build_index

    first = encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance").table
    build_index(first, BuildConfig(index_type="none", geometry="raw", desc_scale=1.5))

    def balance(job) -> None:
        build_index(open_table(first.uri), BuildConfig(index_type="none", balance=True, balance_time_limit=1.0))

    with monkeypatch.context() as patch:
        without_engine(patch, balance, runs=True)
        with pytest.raises(TableError, match="changed while it was appended to: rerun the same command"):
            encode_shapes(shapes, tmp_path / "t.lance", append=True)
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True).table
    coordinate = added.meta.geometry.balance_of(added.column("vector", None))
    assert (len(coordinate), added.meta.balanced) == (360, True)
    assert (coordinate[-240:] > 0).all()
    assert len(set(coordinate[-240:])) == 1


@pytest.mark.slow
def test_vectors_that_were_laid_out_before_a_stop_are_not_written_again(
    encoded, shapes, encode_shapes, content, tmp_path, monkeypatch
):
    add, written = graph.add_vectors, []

    def fails_at_the_third(*given):
        if len(written) == 2:
            raise KeyError("worker failure")
        written.append(add(*given))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(graph, "add_vectors", fails_at_the_third)
        with pytest.raises(Exception, match="worker failure"):
            encode_shapes(shapes, tmp_path / "t.lance", keep_images=True)
    assert len(list(run_folder(tmp_path / "t.lance").glob(f"*.{VECTORS}"))) == 2
    layout = json.loads((run_folder(tmp_path / "t.lance") / LAYOUT).read_text())
    assert set(layout) == {"geometry", "balance", "balance_digest"}  # nothing that grows with the shards
    again: list[object] = []
    monkeypatch.setattr(graph, "add_vectors", lambda *given: again.append(add(*given)) or again[-1])
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert len(again) == 1
    assert content(table) == content(encoded)
    assert table.meta.balanced is False


@pytest.mark.slow
def test_a_finished_table_whose_shards_have_changed_says_so(shapes, encode_shapes, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shapes, source)
    encode_shapes(source, tmp_path / "t.lance")
    shards = list_shards([str(source)])
    shutil.copyfile(shards[2], shards[0])
    (warning,) = encode_shapes(source, tmp_path / "t.lance").report["warnings"]
    assert warning.startswith(f"1 of 3 shards have changed since they were encoded, such as {shards[0]}")


@pytest.mark.slow
def test_an_index_still_serves_its_rows_after_an_append(shapes, encode_shapes, tmp_path):
    from index.build.build_index import BuildConfig, build_index

    shards = list_shards([str(shapes)])
    first = encode_shapes(shards[:2], tmp_path / "t.lance").table
    built = build_index(first, BuildConfig(index_type="ivf_flat", balance=True)).table
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True).table
    assert added.meta.index == built.meta.index
    assert added.lancedb().index_stats("vector_idx").num_unindexed_rows == 120
    new = added.dataset().to_table(columns=["vector"], filter=f"shard = '{shards[2]}'").num_rows
    assert new == 120
    again = build_index(added, BuildConfig(index_type="ivf_flat"))
    assert again.report.num_unindexed_rows == 0
    assert again.report.index_choice.startswith("kept, with 120 rows added; IVF_FLAT: recall@1 ")
    assert again.report.num_partitions == built.meta.index.num_partitions
    assert again.table.meta.geometry.same_as(built.meta.geometry)


@pytest.mark.slow
def test_an_index_that_no_longer_serves_is_built_anew(shapes, encode_shapes, tmp_path):
    from index.build.build_index import BuildConfig, build_index
    from index.build.select import select_index
    from index.report.recall import evaluation_queries, find_ground_truth
    from index.search.exact import ExactSearch

    first = encode_shapes(list_shards([str(shapes)])[:2], tmp_path / "t.lance").table
    build_index(first, BuildConfig(index_type="ivf_rq", target_recall=0.1))
    added = encode_shapes(shapes, tmp_path / "t.lance", append=True).table
    truth = find_ground_truth(ExactSearch(added), evaluation_queries(added, 1024))
    options = {"index_type": "ivf_rq", "target_recall": 0.999, "memory": 2**30, "seed": 0, "refine_factors": (1,)}
    again = select_index(added, truth, truth, **options)
    assert again.recall.recall_at_1 >= 0.999
    assert again.table.lancedb().index_stats("vector_idx").num_unindexed_rows == 0
    assert "kept" not in again.reason


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"val_fraction": 0.5}, "--val-fraction: 0.2, now 0.5"),
        ({"image_size": 64}, "--image-size: 32, now 64"),
        ({"keep_images": True}, "--keep-images: False, now True"),
        ({"desc_scale": 7.0, "geometry": "raw"}, "--desc-scale: 4.0, now 7.0; --geometry: sphere, now raw"),
    ],
)
def test_append_refuses_other_options_than_the_table_has(shapes, encode_shapes, tmp_path, options, changes):
    encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance")
    with pytest.raises(TableError, match=rf"encoded with other options \({changes}\): append with the same"):
        encode_shapes(shapes, tmp_path / "t.lance", append=True, **options)


def test_append_refuses_another_encoder(shapes, encode_shapes, changed_encoder, tmp_path):
    encode_shapes(list_shards([str(shapes)])[:1], tmp_path / "t.lance")
    with pytest.raises(TableError, match=r"other options \(weights of --image-encoder: [0-9a-f]+, now [0-9a-f]+\)"):
        encode_shapes(shapes, tmp_path / "t.lance", append=True, image_encoder=changed_encoder)


def test_only_one_run_at_a_time_encodes_into_a_table(shapes, encode_shapes, tmp_path):
    taken = pytest.raises(TableError, match=rf"is locked by encode, process {os.getpid()} on .* stop it first")
    with hold_lock(str(tmp_path / "t.encode"), Storage()), taken:
        encode_shapes(shapes, tmp_path / "t.lance", limit=10)
    assert encode_shapes(shapes, tmp_path / "t.lance", limit=10).report["rows"] == 10


def test_a_killed_process_releases_its_lock(tmp_path):
    code = f"""
import os, signal
from index.table import commit
from index.table.lock import hold_lock
from index.table.storage import Storage
with hold_lock({str(tmp_path / "x")!r}, Storage()):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "x" / "lock").exists()
    with hold_lock(str(tmp_path / "x"), Storage()):
        pass


def test_an_unwritable_target_is_named_before_the_work_starts(shapes, encode_shapes, tmp_path):
    with pytest.raises(TableError, match=r"/proc/nowhere/t.lance cannot be written .*name another --table"):
        encode_shapes(shapes, "/proc/nowhere/t.lance")
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot be written"):
        encode_shapes(shapes, tmp_path / "file" / "t.lance")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB that can be filled; skips if none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_stopped_by_a_full_disk_resumes_once_there_is_room(
    small_disk, encoded, shapes, encode_shapes, content, num_workers
):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 300 * 1024))
    with pytest.raises(TableError, match=r"cannot be written .*No space left.*rerun the same command to resume"):
        encode_shapes(shapes, small_disk / "t.lance", keep_images=True, num_workers=num_workers)
    (small_disk / "ballast").unlink()
    assert content(encode_shapes(shapes, small_disk / "t.lance", keep_images=True).table) == content(encoded)


def test_a_run_that_would_not_fit_is_refused_before_it_starts(small_disk, shapes, encode_shapes):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 100 * 1024))
    with pytest.raises(TableError, match=r"needs about .* GiB for 360 samples"):
        encode_shapes(shapes, small_disk / "t.lance", keep_images=True, dry_run=True)


@pytest.mark.slow
def test_a_run_with_too_many_rejects_is_stopped_early(write_tar, encode_shapes, tmp_path, monkeypatch):
    for shard in range(10):
        write_tar(tmp_path / "source" / f"{shard}.tar", [(f"{n}.{e}", b"?") for n in range(5) for e in ("png", "txt")])
        (tmp_path / "source" / f"{shard}_stats.json").write_text('{"successes": 5}')
    encoded = []

    def write_slowly(job, shard, duplicates, *, write_shard=graph.write_shard):
        encoded.append(shard)
        time.sleep(0.3)
        return write_shard(job, shard, duplicates)

    monkeypatch.setattr(graph, "write_shard", write_slowly)
    monkeypatch.setattr(monitor, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(monitor, "MIN_REJECTS_TO_STOP", 5)
    message = r"^\d+ of 50 samples are already rejected after \d of 10 shards, above --max-reject-rate 0.2: nothing was"
    with pytest.raises(SourceError, match=message):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.2)
    assert 3 <= len(encoded) < 10
    # A higher limit lifts the stop.
    with pytest.raises(SourceError, match=r"^no sample became a row: 50 of 50 samples were rejected"):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.9)
