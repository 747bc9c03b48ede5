"""Pairs of commands that change one table at the same time, as real processes: both results are there, or one command
was refused in one line; no row is lost or doubled."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from index.build.build_index import BuildConfig, build_index
from index.table.lock import hold_lock
from index.table.prune import prune
from index.table.readers import needed_versions
from index.table.storage import Storage
from index.table.table import Table, open_table
from pipeline.sources.listing import list_shards

ROOT = Path(__file__).parent.parent
REFUSED = ("is locked by", "changed meanwhile", "changed while rows were encoded")

pytestmark = pytest.mark.slow


def start(program: str, *arguments: object) -> subprocess.Popen:
    code = f"from {program}.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> bool:
    """Return whether a command succeeded; if it did not, it was refused in one line."""
    _, errors = process.communicate()
    if process.returncode == 0:
        return True
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert any(reason in errors.splitlines()[-1] for reason in REFUSED), errors
    return False


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def inspect(uri: str) -> dict:
    process = start("pipeline", "inspect", uri, "--json")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.fixture
def table(shapes, encode_shapes, tmp_path) -> Table:
    """A table of two of three shards, without an index."""
    return encode_shapes(list_shards([str(shapes)])[:2], tmp_path / "t.lance").table


def encode(shapes, uri: object, image_encoder: str, text_encoder: str, *more: str) -> subprocess.Popen:
    encoders = ("--image-encoder", image_encoder, "--text-encoder", text_encoder)
    options = ("--image-size", 32, "--val-fraction", 0.2, "--device", "cpu")
    return start("pipeline", "encode", shapes, "--table", uri, *encoders, *options, *more)


def append(shapes, table: Table) -> subprocess.Popen:
    return encode(shapes, table.uri, table.meta.image_encoder.name, table.meta.text_encoder.name, "--append")


@pytest.mark.parametrize("more", [(), ("--limit", "200")], ids=["same", "other"])
def test_of_two_encodes_of_one_table_one_is_refused_or_finds_it_done(
    shapes, image_encoder, text_encoder, tmp_path, more
):
    uri = tmp_path / "t.lance"
    runs = [encode(shapes, uri, image_encoder, text_encoder, *options) for options in ((), more)]
    codes = []
    for run in runs:
        _, errors = run.communicate()
        assert "Traceback" not in errors
        codes.append(run.returncode)
    assert 0 in codes
    assert set(codes) <= {0, 2}
    ids = open_table(uri).column("id", None).tolist()
    assert len(ids) == len(set(ids)) == (360 if codes[0] == 0 or not more else 200)
    assert inspect(str(uri))["rows"] == len(ids)


def test_of_two_appends_both_rows_are_there_or_one_is_refused(table, shapes):
    done = [finish(each) for each in [append(shapes, table), append(shapes, table)]]
    assert any(done)
    ids = open_table(table.uri).column("id", None).tolist()
    assert len(ids) == len(set(ids)) == 360
    assert inspect(table.uri)["rows"] == 360


def test_an_append_during_build_index_is_not_lost(table, shapes):
    build = start("pipeline", "build-index", table.uri, "--balance", "--balance-time-limit", 20)
    wait_for(Path(table.uri.replace(".lance", ".lock")).exists, build)
    appended = finish(append(shapes, table))
    built = finish(build)
    assert appended or built
    ids = open_table(table.uri).column("id", None).tolist()
    assert len(ids) == len(set(ids)) == (360 if appended else 240)
    shown = inspect(table.uri)
    assert (shown["rows"], shown["indexed"]) == (len(ids), built)
    # What was refused is done by the same command.
    assert finish(append(shapes, table))
    assert finish(start("pipeline", "build-index", table.uri))
    shown = inspect(table.uri)
    assert (shown["rows"], shown["indexed"]) == (360, True)


def test_of_two_builds_one_is_refused_or_both_succeed(table):
    builds = [start("pipeline", "build-index", table.uri, "--desc-scale", scale) for scale in (3, 6)]
    done = [finish(each) for each in builds]
    assert any(done)
    shown = inspect(table.uri)
    assert (shown["rows"], shown["indexed"]) == (240, True)
    assert shown["desc_scale"] in [scale for scale, each in zip((3.0, 6.0), done, strict=True) if each]
    after = open_table(table.uri)
    geometry = after.meta.geometry
    vectors = geometry.vectors(after.column("text", None), after.column("latent", None))
    assert abs(vectors - after.column("vector", None)).max() < 0.05


def test_build_index_and_prune_wait_for_no_one(table):
    with hold_lock(table.uri, Storage(), "encode"):
        assert not finish(start("pipeline", "build-index", table.uri))
        assert not finish(start("pipeline", "prune", table.uri))
    assert open_table(table.uri).version == table.version


def test_a_training_run_survives_a_new_index_and_prune(table, tmp_path):
    first = build_index(table, BuildConfig(index_type="ivf_flat", desc_scale=3.0)).table
    run = tmp_path / "run"
    fit = start("trainer", "fit", table.uri, "--out", run, "--images", 200_000, "--batch-size", 64, "--device", "cpu")
    wait_for(lambda: needed_versions(table.uri, Storage()), fit)
    newer = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat", desc_scale=5.0)).table
    pruned = prune(newer)
    assert pruned.kept_versions == [first.version, newer.version]
    seen = (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
    wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size > seen, fit)
    fit.kill()
    fit.communicate()
    # It may be resumed, so its version is still needed.
    assert prune(newer).kept_versions == [first.version, newer.version]
