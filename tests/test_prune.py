"""`pipeline prune` removes what nothing needs, says so exactly, and keeps what a run needs."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError, TableError
from index.table.commit import committed_by, update_meta
from index.table.lock import hold_lock
from index.table.prune import PruneReport, prune
from index.table.readers import needed_by, readers_of
from index.table.schema import TRAIN
from index.table.storage import Storage
from index.table.table import Table, open_table, rejects_uri
from index.table.vectors import rewrite_vectors

WEEKS_AGO = time.time() - 30 * 86_400


@pytest.fixture(scope="module")
def built(encoded, tmp_path_factory) -> Path:
    """The folder of a table whose index was built three times, and whose vectors were rewritten since."""
    folder = tmp_path_factory.mktemp("built")
    for uri in (encoded.uri, rejects_uri(encoded.uri)):
        shutil.copytree(uri, folder / Path(uri).name.replace(Path(encoded.uri).stem, "t", 1))
    table = open_table(folder / "t.lance")
    for scale in (3.0, 5.0, 6.0):
        table = build_index(table, BuildConfig(desc_scale=scale, index_type="ivf_flat")).table
    table.dataset().delete(f"id = '{table.column('id')[5]}'")
    list(rewrite_vectors(open_table(table.uri), replace(table.meta.geometry, desc_scale=7.0)))
    return folder


@pytest.fixture
def old(built, tmp_path) -> Table:
    """A copy of that table."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return open_table(tmp_path / "t.lance")


def tree(uri: str) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in Path(uri).rglob("*") if path.is_file()}


def stop(pruned: PruneReport | None) -> None:
    """Stop a training run, after what prune kept meanwhile."""
    assert pruned is None or any("needed by the training run" in each for each in pruned.kept_because.values())
    raise KeyboardInterrupt


def test_the_newest_and_the_last_indexed_version_are_kept(old, content):
    rows, before = content(old), tree(old.uri)
    indexed = open_table(old.uri, indexed=True)
    planned = prune(old, dry_run=True)
    assert tree(old.uri) == before
    done = prune(old)
    assert replace(planned, dry_run=False) == done
    assert done.kept_because == {str(indexed.version): "the last complete index", str(old.version): "the newest"}
    assert done.kept_versions == [indexed.version, old.version]
    assert done.removed_versions == [each for each in range(1, old.version) if each != indexed.version]
    assert len(done.removed_tags) == 2
    gone = {name: size for name, size in before.items() if name not in tree(old.uri) and "/_refs/" not in name}
    assert (len(gone), sum(gone.values())) == (done.removed_files, done.removed_bytes)
    # The vectors of encoding and of all builds but the last, of three fragments each.
    assert len([name for name in gone if "/data/" in name]) == 9
    assert content(open_table(old.uri)) == rows
    assert open_table(old.uri, indexed=True).version == indexed.version
    assert prune(old).removed_files == 0
    assert not Path(old.uri.replace(".lance", ".lock")).exists()


@pytest.mark.slow
def test_a_pruned_table_is_indexed_and_pruned_again(old):
    prune(old)
    built = build_index(open_table(old.uri), BuildConfig(index_type="ivf_flat", desc_scale=2.0)).table
    # Transactions of removed versions are gone; those of the others still tell what was committed.
    assert not committed_by(built.dataset(), "another run")
    again = prune(built)
    assert (again.kept_versions, built.dataset().count_rows()) == ([built.version], 359)
    assert built.lancedb().index_stats("vector_idx").num_unindexed_rows == 0


def test_versions_that_are_named_or_tagged_are_kept(old):
    old.dataset().tags.create("mine", 2)
    done = prune(old, keep=[3])
    assert {"2": "tag mine", "3": "--keep-version"}.items() <= done.kept_because.items()
    assert open_table(old.uri, version=3).dataset().count_rows() == 360
    with pytest.raises(OptionError, match=r"--keep-version 1: there is no such version, but 2, 3, "):
        prune(old, keep=[1])


def test_the_version_of_an_unfinished_training_run_is_kept(old, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first = open_table(old.uri, version=min(int(tag[7:]) for tag in old.dataset().tags.list()))
    with pytest.raises(KeyboardInterrupt), needed_by(first, run):
        stop(prune(old))
    # It was stopped, so it may be resumed.
    assert prune(old).kept_because[str(first.version)].startswith(f"needed by the training run {run} on ")
    with needed_by(first, run):
        pass
    assert not Path(readers_of(old.uri)).exists()
    assert first.version in prune(old).removed_versions
    with pytest.raises(TableError, match=rf"has no version {first.version} any more, it was pruned \(the last are "):
        open_table(old.uri, version=first.version)


def test_a_training_run_whose_folder_was_deleted_needs_nothing(old, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(KeyboardInterrupt), needed_by(old.at(2), run):
        stop(None)
    assert "2" in prune(old).kept_because
    run.rmdir()
    Path(readers_of(old.uri), "broken.json").write_text("{")
    assert 2 in prune(old).removed_versions


@pytest.mark.parametrize("checkpoint", ["shard.json", "0123456789abcdef-01234567/shard.json"])
def test_files_of_an_unfinished_encode_run_are_kept(old, checkpoint):
    import lance

    rows = old.dataset().head(7)
    (fragment,) = lance.fragment.write_fragments(rows, old.uri, schema=rows.schema, mode="overwrite")
    path = Path(old.uri, "data", fragment.to_json()["files"][0]["path"])
    folder = old.uri.replace(".lance", ".encode")
    Storage().write_json(f"{folder}/{checkpoint}", {"fragments": [fragment.to_json()]})
    prune(old)
    assert path.exists()
    os.utime(path, (WEEKS_AGO, WEEKS_AGO))
    with pytest.raises(TableError, match=r"an unfinished encode run \(.*t\.encode\) needs files.*rerun its command"):
        prune(old)
    assert path.exists()
    shutil.rmtree(folder)
    update_meta(open_table(old.uri), old.meta)
    planned, size = prune(old, dry_run=True), path.stat().st_size
    done = prune(old)
    assert replace(planned, dry_run=False) == done
    assert (path.exists(), done.removed_bytes > size) == (False, True)


def test_prune_waits_for_no_one(old):
    with hold_lock(old.uri, Storage(), "encode"), pytest.raises(TableError, match=r"locked by encode, process \d+"):
        prune(old)
    assert open_table(old.uri).version == old.version


def test_prune_by_its_command(old, capsys):
    from typer.testing import CliRunner

    from pipeline.cli import app

    shown = CliRunner().invoke(app, ["prune", old.uri, "--dry-run", "--json"], catch_exceptions=False)
    report = json.loads(shown.stdout)
    assert (report["dry_run"], report["kept_versions"][-1]) == (True, old.version)
    done = CliRunner().invoke(app, ["prune", old.uri], catch_exceptions=False)
    assert (done.exit_code, "the last complete index" in done.stdout) == (0, True)
    assert open_table(old.uri, indexed=True).dataset().count_rows(filter=f"split = '{TRAIN}'") > 0
