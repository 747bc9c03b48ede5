"""WriteLance: any PCollection of record batches becomes a Lance table in one commit."""

import contextlib
from pathlib import Path

import apache_beam as beam
import lance
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from index.errors import TableError
from pipeline.beam import write_lance
from pipeline.beam.write_lance import WriteLance

SCHEMA = pa.schema([("number", pa.int64()), ("word", pa.string())])


def batch_of(start: int) -> pa.RecordBatch:
    numbers = list(range(start, start + 10))
    return pa.RecordBatch.from_pydict({"number": numbers, "word": [f"w{n}" for n in numbers]}, schema=SCHEMA)


def fail_at_30(batch: pa.RecordBatch) -> pa.RecordBatch:
    if batch["number"][0].as_py() == 30:
        raise KeyError("worker failure")
    return batch


@contextlib.contextmanager
def pipeline_of(starts, options=()):
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *options])) as pipeline:
        yield pipeline | beam.Create(starts) | beam.Reshuffle() | beam.Map(batch_of)


def write(uri, starts, *, step=None, options=(), **arguments):
    with pipeline_of(starts, options) as batches:
        if step is not None:
            batches = batches | beam.Map(step)
        batches | WriteLance(str(uri), SCHEMA, **arguments)


def numbers(uri) -> list[int]:
    return sorted(lance.dataset(str(uri)).to_table()["number"].to_pylist())


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let worker processes import this file for its functions."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]])
def test_all_rows_arrive_in_one_version(tmp_path, options):
    write(tmp_path / "t.lance", range(0, 100, 10), options=options)
    assert numbers(tmp_path / "t.lance") == list(range(100))
    assert [version["version"] for version in lance.dataset(str(tmp_path / "t.lance")).versions()] == [1]


def test_large_bundles_become_several_files(tmp_path):
    write(tmp_path / "t.lance", range(0, 100, 10), bytes_per_file=1)
    assert len(lance.dataset(str(tmp_path / "t.lance")).get_fragments()) == 10
    assert numbers(tmp_path / "t.lance") == list(range(100))


def test_append_and_overwrite(tmp_path):
    uri = tmp_path / "t.lance"
    write(uri, [0])
    write(uri, [10], mode="append")
    assert numbers(uri) == list(range(20))
    write(uri, [50], mode="overwrite")
    assert numbers(uri) == list(range(50, 60))
    assert sorted(lance.dataset(str(uri), version=2).to_table()["number"].to_pylist()) == list(range(20))


def test_the_same_run_twice_is_committed_once(tmp_path):
    uri = tmp_path / "t.lance"
    write(uri, [0])
    for _ in range(2):
        write(uri, [10], mode="append", run_id="monday")
    assert numbers(uri) == list(range(20))


def test_a_failed_run_leaves_the_table_as_it_was(tmp_path):
    uri = tmp_path / "t.lance"
    write(uri, [0])
    with pytest.raises(Exception, match="worker failure"):
        write(uri, range(0, 60, 10), step=fail_at_30, mode="append")
    assert numbers(uri) == list(range(10))


def test_an_existing_table_is_only_overwritten_on_demand(tmp_path):
    write(tmp_path / "t.lance", [0])
    with pytest.raises(TableError, match="exists: use mode overwrite or append"):
        WriteLance(str(tmp_path / "t.lance"), SCHEMA)
    with pytest.raises(TableError, match="mode 'upsert' is unknown: use one of create"):
        WriteLance(str(tmp_path / "u.lance"), SCHEMA, mode="upsert")


def test_a_table_that_comes_meanwhile_is_not_overwritten(tmp_path):
    uri = tmp_path / "t.lance"
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    pipeline | beam.Create([0]) | beam.Map(batch_of) | WriteLance(str(uri), SCHEMA)
    write(uri, [50])
    with pytest.raises(Exception, match="exists: use mode overwrite or append"):
        pipeline.run()
    assert numbers(uri) == list(range(50, 60))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([("number", pa.int64())], "word: string there, missing here"),
        ([("number", pa.int32()), ("word", pa.string())], "number: int64 there, int32 here"),
        ([("word", pa.string()), ("number", pa.int64())], "number, word there, word, number here"),
        ([("number", pa.int64()), ("word", pa.string()), ("more", pa.bool_())], "more: missing there, bool here"),
    ],
)
def test_append_compares_columns_before_the_work(tmp_path, columns, message):
    write(tmp_path / "t.lance", [0])
    with pytest.raises(TableError, match=rf"has other columns \({message}\): append rows with the table's columns"):
        WriteLance(str(tmp_path / "t.lance"), pa.schema(columns), mode="append")


def test_append_refuses_a_table_whose_columns_have_other_numbers(tmp_path):
    write(tmp_path / "t.lance", [0])
    dataset = lance.dataset(str(tmp_path / "t.lance"))
    dataset.drop_columns(["number"])
    dataset.add_columns({"number": "cast(1 as bigint)"})
    with pytest.raises(TableError, match=r"columns of .* were added or dropped"):
        WriteLance(str(tmp_path / "t.lance"), lance.dataset(dataset.uri).schema, mode="append")


@pytest.mark.parametrize("kept", [0, 3, 25])
def test_other_numbers_of_rows_than_entered_are_not_committed(tmp_path, monkeypatch, kept):
    def lossy(uri, schema, batches, storage, *, write_fragments=write_lance.write_fragments):
        table = pa.Table.from_batches(list(batches), schema)
        table = pa.concat_tables([table, table]).slice(0, kept)
        return write_fragments(uri, schema, iter(table.to_batches()), storage)

    monkeypatch.setattr(write_lance, "write_fragments", lossy)
    message = f"20 rows entered, but of 20 in one bundle {kept} are in its files: nothing was committed"
    with pytest.raises(Exception, match=message), pipeline_of([0]) as batches:
        batches | beam.FlatMap(lambda batch: [batch, batch]) | WriteLance(str(tmp_path / "t.lance"), SCHEMA)
    assert not (tmp_path / "t.lance" / "_versions").exists()


def test_no_rows_become_an_empty_table(tmp_path):
    write(tmp_path / "t.lance", [])
    assert numbers(tmp_path / "t.lance") == []


def test_nothing_but_the_table_is_left(tmp_path):
    write(tmp_path / "t.lance", range(0, 100, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["t.lance"]


def test_a_commit_that_is_retried_after_its_end_returns_its_version(tmp_path):
    target = WriteLance(str(tmp_path / "t.lance"), SCHEMA)
    step = write_lance._WriteFragments(target)
    step.start_bundle()
    counts = list(step.process(batch_of(0)))
    step.finish_bundle()
    assert [target._commit(counts), target._commit(counts)] == [1, 1]
    assert numbers(tmp_path / "t.lance") == list(range(10))


def test_an_unwritable_target_is_named():
    with pytest.raises(
        Exception, match=r"/proc/nowhere/t.lance cannot be written \(.*\): check free space, permissions"
    ):
        write("/proc/nowhere/t.lance", [0])
