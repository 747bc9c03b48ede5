"""Search vectors are written on Beam as they are in one process: the same bits, once, in one commit."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import lance
import lancedb
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from commits import KILLED
from synthetic_tables import random_table

from index.build.build_index import BuildConfig, build_index
from index.build.layout import lay_out, write_vectors
from index.errors import TableError
from index.search.blocks import VectorBlocks
from index.space.centering import fit_centering
from index.space.geometry import Geometry
from index.table.commit import publish, update_meta
from index.table.schema import TRAIN, TableMeta
from index.table.table import open_table
from index.table.vectors import (
    add_vectors,
    encoded_columns,
    in_geometry,
    is_balanced,
    neutral_balance,
    vectors_folder,
)
from pipeline.beam import layout as beam_layout
from pipeline.beam.gather import Barrier
from pipeline.beam.layout import Layout, LayOutVectors
from pipeline.beam.rewrite_vectors import TableFragments, beam_vector_writer
from pipeline.beam.write_lance import fragment_from_dict
from pipeline.config import RuntimeConfig

ROWS, FRAGMENTS = 1000, 5


@pytest.fixture
def table(tmp_path):
    """A table of five fragments, some of whose rows are deleted: a whole fragment, single rows, and the last one."""
    random_table(tmp_path / "pairs.lance", ROWS, heldout=100, fragments=FRAGMENTS)
    lancedb.connect(str(tmp_path)).open_table("pairs").delete(
        "cast(key as int) between 200 and 399 or cast(key as int) % 7 = 3 or cast(key as int) = 999"
    )
    return open_table(tmp_path / "pairs.lance")


def copy_of(table, folder):
    return open_table(shutil.copytree(table.uri, folder / Path(table.uri).name))


def centered(table) -> Geometry:
    rows = [table.column(name) for name in ("text", "latent")]
    plain = Geometry.fit(table.meta.moments, name="standard", desc_scale=2.5)
    return replace(plain, centering=fit_centering([(rows[0], plain.to_coordinates(rows[1]))]))


def unbalanced(table) -> Geometry:
    """A geometry in which few rows win most queries."""
    return Geometry.fit(table.meta.moments, name="raw", desc_scale=1.5)


def vector_commits(table) -> int:
    """Count the commits that replaced fragments."""
    kinds = [each and type(each.operation) for each in table.dataset().get_transactions(100)]
    return kinds.count(lance.LanceOperation.Merge)


def files_of(table) -> int:
    return len(list(Path(table.uri, "data").iterdir()))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("balanced", [True, False])
def test_workers_write_the_vectors_that_one_process_writes(table, tmp_path, workers, balanced):
    geometry, count = centered(table), table.dataset().count_rows()
    balance = np.linspace(0, 3, count, dtype=np.float32) if balanced else None
    serial = write_vectors(copy_of(table, tmp_path / "serial"), geometry, balance, None)
    files = files_of(table)
    written = beam_vector_writer(RuntimeConfig(num_workers=workers))(table, geometry, balance, None)
    assert written.dataset().to_table().equals(serial.dataset().to_table())
    assert json.loads(written.meta.to_json()) == json.loads(serial.meta.to_json())
    assert open_table(table.uri).meta.balanced is balanced
    assert vector_commits(written) == vector_commits(serial) == 1
    assert files_of(written) - files == len(table.dataset().get_fragments())
    assert not Path(vectors_folder(table.uri)).exists()
    stored = written.column("vector", None)
    expected = geometry.vectors(written.column("text", None), written.column("latent", None), balance)
    assert np.array_equal(stored, expected.astype(np.float16))


@pytest.mark.parametrize("memory", [2**28, 60_000])
def test_vectors_of_a_geometry_that_is_not_written_are_those_that_will_be(table, memory):
    geometry = centered(table)
    before = in_geometry(table, geometry)
    assert before.meta.balanced is False
    computed = {split: before.column("vector", split) for split in (TRAIN, None)}
    positions = before.positions(TRAIN)[::-3]
    taken, names = before.take(positions, "vector"), before.take(positions, "key")
    blocks = VectorBlocks(before, memory=memory)
    queries = geometry.queries(table.column("text")[:50], np.random.default_rng(0).normal(size=(50, 15)))
    cost, nearest = blocks.nearest(queries, 3)
    batches = list(before.scan(["key", "vector"], TRAIN, batch_size=64))
    after = write_vectors(table, geometry, None, None)
    for split, vectors in computed.items():
        assert vectors.dtype == np.float16
        assert np.array_equal(vectors, after.column("vector", split))
    assert np.array_equal(taken, after.take(positions, "vector"))
    assert np.array_equal(names, after.take(positions, "key"))
    assert all(batch.schema.names == ["key", "vector"] for batch in batches)
    stored = VectorBlocks(after, memory=memory)
    assert stored.in_memory == blocks.in_memory == (memory == 2**28)
    for ours, theirs in zip((cost, nearest), stored.nearest(queries, 3), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_a_new_geometry_with_balance_is_written_once_with_the_balance_of_two_steps(table, tmp_path):
    geometry = unbalanced(table)
    options = {"memory": 2**28, "time_limit": 1e9, "seed": 0, "log": None}
    twice = copy_of(table, tmp_path / "twice")
    twice, _ = lay_out(twice, geometry, balance=None, **options)
    twice, expected = lay_out(twice, geometry, balance=True, **options)
    once, report = lay_out(table, geometry, balance=True, **options)
    assert (vector_commits(once), vector_commits(twice)) == (1, 2)
    assert replace(report, seconds=0.0) == replace(expected, seconds=0.0)
    assert report.steps > 0
    assert once.dataset().to_table().equals(twice.dataset().to_table())
    assert geometry.balance_of(once.column("vector")).any()


def count_reads(monkeypatch) -> list[str]:
    """Note each scan of the vector column."""
    from index.table.table import Table

    reads, scan = [], Table.scan

    def noted(self, columns, *given, **options):
        reads.extend(name for name in columns if name == "vector")
        return scan(self, columns, *given, **options)

    monkeypatch.setattr(Table, "scan", noted)
    return reads


def test_the_vectors_are_not_read_to_learn_whether_they_are_balanced(table, monkeypatch):
    options = {"memory": 2**28, "time_limit": 5.0, "seed": 0, "log": None}
    geometry = unbalanced(table)
    table = write_vectors(table, geometry, None, None)
    table = update_meta(table, replace(table.meta, balanced=None))
    assert table.meta.balanced is None  # as in metadata of earlier versions
    reads = count_reads(monkeypatch)
    known, _ = lay_out(table, geometry, balance=False, **options)
    assert (reads, known.meta.balanced, known.version) == (["vector"], False, table.version)
    known = update_meta(known, replace(known.meta, image_size=9))
    reads.clear()
    for wanted in (None, False):
        same, _ = lay_out(open_table(known.uri), geometry, balance=wanted, **options)
        assert same.version == known.version
    assert (neutral_balance(known), reads) == (0.0, [])
    balanced, _ = lay_out(known, geometry, balance=True, **options)
    assert open_table(balanced.uri).meta.balanced is True
    assert neutral_balance(balanced) > 0
    reads.clear()
    assert is_balanced(balanced)
    kept, _ = lay_out(balanced, geometry, balance=None, **options)
    assert (kept.version, reads) == (balanced.version, [])
    plain, _ = lay_out(kept, geometry, balance=False, **options)
    assert (reads, plain.meta.balanced) == ([], False)
    assert not geometry.balance_of(plain.column("vector", None)).any()


def test_metadata_that_does_not_say_whether_rows_are_balanced_is_opened(table):
    content = json.loads(table.meta.to_json())
    del content["balanced"]
    assert TableMeta.from_json(json.dumps(content)).balanced is None


def test_a_balance_of_other_rows_is_refused(table):
    few = np.zeros(3, np.float32)
    for write in (write_vectors, beam_vector_writer(RuntimeConfig())):
        with pytest.raises(TableError, match=r"changed meanwhile \(3 rows -> \d+\): rerun the same command"):
            write(table, table.meta.geometry, few, None)


def test_fragments_that_the_engine_leaves_out_are_noticed_and_the_others_are_kept(table, monkeypatch):
    geometry = replace(table.meta.geometry, desc_scale=3.0)
    write, version = beam_vector_writer(RuntimeConfig()), table.version
    expand = LayOutVectors.expand
    with monkeypatch.context() as patch:
        patch.setattr(
            LayOutVectors, "expand", lambda self, names: expand(self, names | beam.Filter(lambda n: n[0] != 2))
        )
        with pytest.raises(TableError, match=r"not finished \(3 of 4 fragments written\): rerun the same command"):
            write(table, geometry, None, None)
    assert open_table(table.uri).version == version
    before = files_of(table)
    written = write(open_table(table.uri), geometry, None, None)
    assert files_of(written) == before + 1
    assert vector_commits(written) == 1


def die_after(uri: str, records: int) -> None:
    """Build an index on Beam in this process, and end it once so many fragments have new vectors."""
    done = []
    write_record = beam_layout.Fragments.write_record

    def counted(self, *given):
        write_record(self, *given)
        done.append(given)
        if len(done) == records:
            os._exit(KILLED)

    beam_layout.Fragments.write_record = counted
    config = BuildConfig(desc_scale=2.5, index_type="none")
    build_index(open_table(uri), config, write=beam_vector_writer(RuntimeConfig()))


@pytest.mark.slow
def test_a_killed_build_leaves_the_complete_version_and_goes_on_with_the_fragments_left(table, tmp_path):
    before = build_index(table, BuildConfig(index_type="none")).table
    expected = build_index(copy_of(before, tmp_path / "serial"), BuildConfig(desc_scale=2.5, index_type="none"))
    process = multiprocessing.get_context("spawn").Process(target=die_after, args=(before.uri, 2))
    process.start()
    process.join()
    assert process.exitcode == KILLED
    serving = open_table(before.uri, indexed=True)
    assert (serving.version, serving.meta.to_json()) == (before.version, before.meta.to_json())
    assert len(list(Path(vectors_folder(before.uri)).glob("*/[0-9].json"))) == 2
    files = files_of(before)
    config = BuildConfig(desc_scale=2.5, index_type="none")
    built = build_index(open_table(before.uri), config, write=beam_vector_writer(RuntimeConfig()))
    assert files_of(before) - files == len(before.dataset().get_fragments()) - 2
    assert built.table.dataset().to_table().equals(expected.table.dataset().to_table())
    timed = {"table", "build_seconds", "p50_ms", "queries_per_second"}
    ours, theirs = (
        {name: value for name, value in vars(each.report).items() if name not in timed} for each in (built, expected)
    )
    assert ours == theirs


def test_records_of_other_vectors_or_lost_files_are_not_believed(table, tmp_path):
    geometry = replace(table.meta.geometry, desc_scale=3.0)
    fragments = TableFragments(table, str(tmp_path / "records"))
    name, layout = (int(table.dataset().get_fragments()[0].fragment_id), 0), Layout(geometry)
    pending = fragments.load(name)
    written = [fragments.add_vectors(name, each, layout) for each in pending]
    fragments.write_record(name, layout.digest, written)
    assert fragments.has_vectors(pending, fragments.read_record(name, layout.digest))
    assert fragments.read_record(name, Layout(geometry, 0.5).digest) is None
    assert fragments.read_record(name, Layout(geometry, balance_digest="x").digest) is None
    assert fragments.read_record((99, 0), layout.digest) is None
    assert not fragments.has_vectors([{**pending[0], "deletion_file": None}], written)
    moved = [{**pending[0], "files": [{**file, "path": "other.lance"} for file in pending[0]["files"]]}]
    assert not fragments.has_vectors(moved, written)
    Path(table.uri, "data", written[0]["files"][-1]["path"]).unlink()
    assert not fragments.has_vectors(pending, written)
    Path(fragments.record_uri(name)).write_text("{")
    assert fragments.read_record(name, layout.digest) is None


def test_layouts_are_read_as_they_were_written(table, tmp_path):
    layout = Layout(centered(table), 0.25, "digest")
    layout.write(str(tmp_path / "layout.json"), table.storage)
    read = Layout.read(str(tmp_path / "layout.json"), table.storage, table.uri)
    assert read.geometry.same_as(layout.geometry)
    assert (read.balance, read.balance_digest, read.digest) == (0.25, "digest", layout.digest)
    assert (
        len({each.digest for each in (layout, replace(layout, balance=0.5), replace(layout, balance_digest=""))}) == 3
    )


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_barrier_counts_all_elements(tmp_path, count):
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        (
            pipeline
            | beam.Create(range(count))
            | Barrier()
            | beam.io.WriteToText(str(tmp_path / "count"), shard_name_template="")
        )
    assert (tmp_path / "count").read_text() == f"{count}\n"


class NewFragments(TableFragments):
    """Fragments whose vectors are written as an encode run does, as if no commit referred to them."""

    def add_vectors(self, name, fragment, layout):
        source, encoded = fragment_from_dict(fragment), encoded_columns(self.table)
        return add_vectors(self.uri, source, encoded, layout.geometry, layout.balance, self.storage).to_json()


def test_vectors_of_new_fragments_are_those_of_the_layout(encoded, tmp_path):
    table = copy_of(encoded, tmp_path)
    meta = table.meta.with_geometry(replace(table.meta.geometry, desc_scale=2.0), balanced=True)
    fragments = NewFragments(table, str(tmp_path / "records"))
    layout = Layout(meta.geometry, balance=0.5)
    layout.write(fragments.layout_uri, table.storage)
    names = [(int(each.fragment_id), 0) for each in table.dataset().get_fragments()]
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        pipeline | beam.Create(names) | LayOutVectors(fragments)
    laid_out = [fragment_from_dict(each) for name in names for each in fragments.read_record(name, layout.digest)]
    after = publish(table.uri, encoded_columns(table), meta, laid_out, "run", table.storage, mode="overwrite")
    text, latent, vector = (after.column(name, split=None) for name in ("text", "latent", "vector"))
    expected = meta.geometry.vectors(text, latent, np.full(len(text), 0.5, np.float32))
    assert np.array_equal(vector, expected.astype(np.float16))
    assert np.array_equal(text, encoded.column("text", split=None))
