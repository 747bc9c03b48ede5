"""Targets drawn ahead: the batches of the online stream, from reads alone, and what is refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic_tables import random_table
from test_storage import endpoint, s3  # noqa: F401  fixtures

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError, TableError
from index.search.ann import open_search
from index.table.commit import update_meta
from index.table.prune import prune
from index.table.rows import RowReader
from index.table.storage import Storage
from index.table.table import open_table
from index.table.targets import draw_folder, open_targets, targets_folder, targets_uri
from pipeline.config import RuntimeConfig
from pipeline.encoders.text import TransformersTextEncoder
from pipeline.targets import draw as drawing
from pipeline.targets.draw import DrawConfig, draw_targets, plan_ranges
from pipeline.targets.job import DrawJob
from trainer.checkpoints import checkpoints
from trainer.config import FitConfig
from trainer.config import RuntimeConfig as FitRuntimeConfig
from trainer.fit import fit
from trainer.stream import TENSORS, NeighborStream, StreamConfig, searched_steps
from trainer.targets import check_targets

ROOT = Path(__file__).parent.parent
CPU = RuntimeConfig(device="cpu")
WEIGHTS = "network/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def table(indexed, tmp_path_factory):
    """A copy of the indexed shapes, next to which targets may be drawn."""
    uri = tmp_path_factory.mktemp("targets") / "shapes.lance"
    shutil.copytree(indexed.uri, uri)
    return open_table(uri, indexed=True)


def draw(table, *, runtime=CPU, per_range=64, **options):
    config = DrawConfig(**{"images": 96 * 16, "batch_size": 16, "seed": 3, **options})
    report = draw_targets(table.uri, config, runtime, targets_per_range=per_range)
    return open_targets(report["targets"], table.storage), report


@pytest.fixture(scope="module")
def drawn(table):
    """96 steps of 16 slots, in ranges of 4 steps."""
    targets, report = draw(table)
    assert (report["steps"], report["drawn"], targets.steps) == (96, 1536, 96)
    return targets


def stream(table, source=None, *, start=0, process=0, processes=1, encode_tokens=None, **options):
    config = StreamConfig(**{"batch_size": 16, "seed": 3, **options})
    source = source or open_search(table)
    place = {"start": start, "process_index": process, "num_processes": processes}
    return NeighborStream(table, source, config, **place, encode_tokens=encode_tokens)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def equal_streams(online, ahead, count: int) -> bool:
    pairs = list(zip(islice(online, count), islice(ahead, count), strict=True))
    return len(pairs) == count and all(s == t and same(a, b) for (s, a), (t, b) in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 8},
        {"start": 61},
        {"reuse": 3, "start": 37},
        {"process": 1, "processes": 2},
        {"condition": "query"},
    ],
    ids=["whole", "smaller batch", "resumed", "reused", "a process", "query"],
)
def test_batches_are_those_of_the_online_stream(table, drawn, options):
    online, ahead = stream(table, **options), stream(table, drawn, **options)
    assert equal_streams(online, ahead, 96 - options.get("start", 0))


def test_a_stream_ends_with_its_targets_however_far_it_reads_ahead(table, drawn, monkeypatch):
    assert [step for step, _ in stream(table, drawn, start=90)] == list(range(90, 96))
    assert [step for step, _ in stream(table, drawn, reuse=2, start=180)] == list(range(180, 192))
    first = [batch for _, batch in stream(table, drawn)]
    for size in (1, 300_000):
        monkeypatch.setattr("trainer.stream.WINDOW_BYTES", size)
        monkeypatch.setattr("trainer.stream.QUERIES_PER_SEARCH", 1 + size % 100)
        again = [batch for _, batch in stream(table, drawn)]
        assert len(again) == 96
        assert all(same(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
def test_sampled_and_jittered_pairs_and_token_embeddings_are_the_same(table, text_encoder):
    options = {"num_neighbors": 4, "temperature": 2.0, "jitter": 0.3}
    targets, _ = draw(table, images=256, name="sampled", **options)
    encode_tokens = partial(TransformersTextEncoder(text_encoder).encode_tokens, num_tokens=6)
    for more in ({}, {"condition": "query"}):
        online, ahead = (
            stream(table, source, encode_tokens=encode_tokens, **options, **more) for source in (None, targets)
        )
        assert equal_streams(online, ahead, 16)


def test_exact_search_of_a_table_without_an_index(encoded, tmp_path):
    shutil.copytree(encoded.uri, tmp_path / "t.lance")
    table = open_table(tmp_path / "t.lance")
    with pytest.raises(TableError, match="has no index: run `pipeline build-index"):
        draw(table)
    targets, report = draw(table, search="exact")
    assert (report["index_type"], report["search"]) == (None, "exact")
    assert equal_streams(stream(table, open_search(table, exact=True)), stream(table, targets), 96)


@pytest.mark.slow
def test_two_workers_draw_the_same(table, drawn):
    targets, _ = draw(table, name="workers", runtime=replace(CPU, num_workers=2))
    assert np.array_equal(targets.read(0, 96), drawn.read(0, 96))


def test_more_images_add_steps_to_those_that_are_there(table, drawn):
    draw(table, name="grown", images=30 * 16)
    targets, report = draw(table, name="grown")
    assert (report["steps"], report["drawn"]) == (96, 66 * 16)
    assert np.array_equal(targets.read(0, 96), drawn.read(0, 96))
    before = targets.dataset.version
    again, report = draw(table, name="grown", images=16)
    assert (report["steps"], report["drawn"], again.dataset.version) == (96, 0, before)


def test_a_draw_that_fails_goes_on_where_it_was_and_on_its_own_version(table, drawn, monkeypatch):
    whole, ranges = DrawJob.draw, []

    def failing(job, steps):
        ranges.append(steps)
        if len(ranges) > 9:
            raise TableError("the disk is full")
        whole(job, steps)

    monkeypatch.setattr(DrawJob, "draw", failing)
    with pytest.raises(TableError, match="the disk is full"):
        draw(table, name="resumed")
    uri = targets_uri(table.uri, "resumed")
    checkpoints = set(os.listdir(draw_folder(uri))) - {"settings.json"}
    assert len(checkpoints) == 9
    with pytest.raises(TableError, match="rerun the `pipeline draw-targets` that has not finished them"):
        open_targets(uri, Storage())
    # Of one range the file is gone, and the table changes meanwhile.
    lost = min(checkpoints)
    (part,) = Storage().read_json(f"{draw_folder(uri)}/{lost}")
    Path(uri, "data", part["files"][0]["path"]).unlink()
    newer = update_meta(table, table.meta)
    assert newer.version > table.version
    monkeypatch.setattr(DrawJob, "draw", lambda job, steps: (ranges.append(steps), whole(job, steps))[1])
    ranges.clear()
    targets, _ = draw(table, name="resumed")
    assert len(ranges) == 24 - 8
    assert lost in {each.checkpoint for each in ranges}
    assert targets.settings.version == table.version
    assert np.array_equal(targets.read(0, 96), drawn.read(0, 96))
    assert not Path(draw_folder(uri)).exists()


def test_a_range_that_the_engine_lost_is_not_passed_over(table, monkeypatch):
    def lossy(graph, runtime, uri, *, monitor, memory_advice):
        pass

    monkeypatch.setattr(drawing, "run_beam", lossy)
    with pytest.raises(TableError, match="is not finished: 24 of 24 ranges of steps were not drawn: rerun the same"):
        draw(table, name="lossy")
    assert not Path(targets_uri(table.uri, "lossy")).exists()


@pytest.mark.slow
def test_a_draw_that_was_killed_is_finished_by_the_same_command(tmp_path):
    table = random_table(tmp_path / "t.lance", 4000, captions=50)
    table = build_index(table, BuildConfig(index_type="ivf_flat")).table
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "draw-targets", table.uri]
    command += ["--images", "200000", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = Path(draw_folder(targets_uri(table.uri, "seed0")))
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(folder.glob("*-*.json")):
        time.sleep(0.05)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}
    assert 0 < len(kept) < 7
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    assert '"steps": 781' in done.stdout
    ahead = open_targets(targets_uri(table.uri, "seed0"), Storage())
    config = StreamConfig(batch_size=256)
    online = NeighborStream(table, open_search(table), config)
    assert ahead.steps == 781
    for step in (0, 377, 780):
        (expected,), (found,) = (s.batches(step, 1) for s in (online, NeighborStream(table, ahead, config)))
        assert same(expected, found)


def test_ranges_cover_the_steps_and_are_few():
    ranges = plan_ranges(5, 1003, 256, 2048)
    assert [step for each in ranges for step in range(each.first, each.stop)] == list(range(5, 1003))
    assert {each.stop - each.first for each in ranges[:-1]} == {8}
    assert len(plan_ranges(0, 10**9 // 256, 256)) < 4200
    assert len(plan_ranges(0, 3, 10**6)) == 3


# --- training ----------------------------------------------------------------------------------------------------

CONFIG = FitConfig(size="tiny", images=40 * 16, batch_size=16, seed=3, reuse=1)


@pytest.fixture(scope="module")
def moved(table, drawn, tmp_path_factory):
    """The table and its targets on another machine, without the files of its index."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(table.uri, folder / "shapes.lance")
    shutil.copytree(targets_folder(table.uri), folder / "shapes.targets")
    shutil.rmtree(folder / "shapes.lance" / "_indices")
    return open_table(folder / "shapes.lance", version=table.version)


def weights(run):
    return load_file(run / WEIGHTS)


@pytest.mark.slow
def test_a_network_is_the_same_with_targets_drawn_ahead_and_needs_no_index(table, moved, tmp_path):
    every_step = FitRuntimeConfig(checkpoint_seconds=0.0, keep_checkpoints=100, targets="seed3")
    fit(table, CONFIG, tmp_path / "online")
    fit(moved, replace(CONFIG, reuse=None), tmp_path / "ahead", runtime=every_step)
    online = weights(tmp_path / "online")
    ahead = weights(tmp_path / "ahead")
    assert all(torch.equal(online[name], ahead[name]) for name in online)
    # Resumed in the middle, once on targets and once by searching.
    for path in checkpoints(tmp_path / "ahead")[17:]:
        shutil.rmtree(path)
    (tmp_path / "ahead" / "result.json").unlink()
    shutil.copytree(tmp_path / "ahead", tmp_path / "searching")
    fit(moved, CONFIG, tmp_path / "ahead", resume=True, runtime=every_step)
    fit(table, CONFIG, tmp_path / "searching", resume=True)
    for run in ("ahead", "searching"):
        again = weights(tmp_path / run)
        assert all(torch.equal(online[name], again[name]) for name in online)


@pytest.mark.slow
def test_the_command_line_draws_and_trains(table, moved, tmp_path, capsys, monkeypatch):
    import pipeline.cli
    import trainer.cli

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    options = ("--images", 640, "--batch-size", 16)
    code, out = run(pipeline.cli.main, "draw-targets", table.uri, *options, "--name", "cli", "--device", "cpu")
    assert code == 0, out.err
    assert "targets_per_second" in out.out
    fitted = ("--size", "tiny", "--device", "cpu", *options)
    path = targets_uri(table.uri, "cli")
    code, out = run(trainer.cli.main, "fit", moved.uri, "--out", tmp_path / "run", *fitted, "--targets", path)
    assert code == 0, out.err
    more = ("--images", 1280)
    code, out = run(trainer.cli.main, "fit", "--resume", "--out", tmp_path / "run", *more)
    assert code == 2
    assert re.search(r"has 40 steps, but --images 1280 at --batch-size 16 and --reuse 1 needs 80: train on ", out.err)
    command = re.search(r"`pipeline (draw-targets .*)`", out.err)[1].split()
    assert run(pipeline.cli.main, *command)[0] == 0
    code, out = run(trainer.cli.main, "fit", "--resume", "--out", tmp_path / "run", *more)
    assert code == 0, out.err
    code, out = run(trainer.cli.main, "fit", moved.uri, "--out", tmp_path / "none", "--targets", "nothing")
    assert code == 2
    assert "nothing.lance (others are " in out.err
    assert out.err.count("\n") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, r"was drawn with --seed 3, not 4: add --seed 3, or draw others with `pipeline draw-targets "),
        ({"search": "exact"}, r"was drawn with --search ann, not exact: add --search ann, or draw others with .*exact"),
        ({"jitter": 0.5}, r"was drawn with --jitter 0.0, not 0.5: add --jitter 0.0, or draw others"),
        ({"batch_size": 32}, r"has 16 targets a step, fewer than --batch-size 32: use at most 16, or draw others with"),
        ({"images": 97 * 16}, r"has 96 steps, but --images 1552 at --batch-size 16 and --reuse 1 needs 97: train on"),
        ({"images": 97 * 16 * 2, "reuse": 2}, r"and --reuse 2 needs 98: train on fewer --images, or add steps with"),
        ({"coupling": "independent"}, r"--coupling independent retrieves no pairs: leave out --targets"),
    ],
)
def test_targets_that_do_not_fit_a_run_are_refused(table, drawn, options, message):
    with pytest.raises(OptionError, match=message) as error:
        check_targets(drawn, table, replace(CONFIG, **options))
    assert "\n" not in str(error.value)


def test_targets_of_another_table_or_version_are_refused(table, drawn, indexed, tmp_path):
    other = random_table(tmp_path / "other.lance", 300)
    with pytest.raises(OptionError, match=rf"drawn from {table.uri} with version {table.version}, but {other.uri} has"):
        check_targets(drawn, other, CONFIG)
    changed = replace(table.meta, geometry=replace(table.meta.geometry, kappa=1.5))
    with pytest.raises(OptionError, match=r"with kappa .*: pass the table that it was drawn from, or draw targets of "):
        check_targets(drawn, table.at(table.version, changed), CONFIG)


def test_targets_drawn_with_other_options_are_not_added_to(table, drawn):
    with pytest.raises(OptionError, match=r"seed3.lance has --jitter 0.0, not 0.2: type that, or another --name"):
        draw(table, jitter=0.2)
    with pytest.raises(OptionError, match="--name a/b is a path: use a name"):
        draw(table, name="a/b")
    with pytest.raises(OptionError, match=r"'a b' is not a name of targets: use letters, .* for instance a_b"):
        draw(table, name="a b")


def test_searched_steps_are_what_a_stream_needs(table, drawn):
    for steps, reuse in ((96, 1), (100, 3), (49, 3), (48, 3), (5, 4)):
        needed = searched_steps(steps, reuse)
        short = replace(drawn, steps=needed)
        assert len(list(islice(stream(table, short, reuse=reuse), steps))) == steps
        assert len(list(islice(stream(table, replace(drawn, steps=needed - 1), reuse=reuse), steps))) < steps


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prune_keeps_the_version_of_targets_until_they_are_deleted(indexed, tmp_path):
    shutil.copytree(indexed.uri, tmp_path / "t.lance")
    table = open_table(tmp_path / "t.lance", indexed=True)
    targets, _ = draw(table)
    newer = build_index(table, BuildConfig(index_type="ivf_flat", desc_scale=2.0)).table
    why = prune(newer).kept_because[str(table.version)]
    assert why == f"needed by the targets {targets.uri}: delete them to release it"
    check_targets(targets, open_table(table.uri, version=table.version), CONFIG)
    shutil.rmtree(targets_folder(table.uri))
    assert table.version in prune(newer).removed_versions


def test_rows_are_read_by_row_id_after_deletes(tmp_path):
    table = random_table(tmp_path / "t.lance", 500, fragments=3)
    table.dataset().delete("id LIKE '%7' OR id LIKE '%a3'")
    table = open_table(table.uri)
    rows = table.dataset().to_table(columns=["id", "latent"], with_row_id=True)
    ids, row_ids = rows["id"].to_numpy(), rows["_rowid"].to_numpy().astype(np.int64)
    reader, chosen = RowReader(table), np.random.default_rng(0).integers(len(ids), size=700)
    assert np.array_equal(reader.positions(row_ids), np.arange(len(ids)))
    found, latent = reader.take(row_ids[chosen], ["id", "latent"])
    assert np.array_equal(found, ids[chosen])
    assert np.array_equal(latent, table.column("latent", None)[chosen])


def test_targets_whose_rows_are_out_of_order_are_not_trained_on(table, tmp_path):
    import lance

    targets, _ = draw(table, name="swapped", images=64)
    rows = targets.dataset.to_table()
    lance.write_dataset(rows.take([1, 0, *range(2, 64)]), targets.uri, mode="overwrite", schema=rows.schema)
    with pytest.raises(TableError, match="does not hold the slots 0 to 15 of the steps 0 to 3 in order: delete it"):
        list(stream(table, open_targets(targets.uri, Storage())))


@pytest.mark.slow
def test_targets_in_a_bucket_are_drawn_and_streamed(indexed, s3):  # noqa: F811
    files, path = s3.files("s3://bucket/drawn/shapes.lance")
    files.put(indexed.uri, path, recursive=True)
    table = open_table("s3://bucket/drawn/shapes.lance", indexed=True, storage=s3)
    targets, report = draw(table, images=512, runtime=replace(CPU, storage=s3))
    assert report["targets"] == "s3://bucket/drawn/shapes.targets/seed3.lance"
    assert s3.names(targets_folder(table.uri)) == ["seed3.lance"]
    assert equal_streams(stream(indexed), stream(table, targets), 32)
