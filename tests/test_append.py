"""`--append` adds exactly the samples that the table does not have, whatever became of the source since."""

import io
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.errors import TableError
from index.table.table import Table, open_table


def png(number: int) -> bytes:
    """A small image that depends on the number."""
    data, rng = io.BytesIO(), np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(data, "png")
    return data.getvalue()


def members(numbers) -> list[tuple[str, bytes]]:
    """Images with captions as members of a tar."""
    return [
        pair
        for number in numbers
        for pair in ((f"{number:04}.png", png(number)), (f"{number:04}.txt", f"image {number}".encode()))
    ]


def add_images(folder: Path, names) -> None:
    """Write images with captions, whose content depends on their name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(png(sum(map(ord, name)) + 1000 * len(name)))
        (folder / f"{name}.txt").write_text(f"image {name}")


def captions(table: Table) -> Counter:
    """The captions of a table's rows, counted."""
    return Counter(table.dataset().to_table(columns=["caption"])["caption"].to_pylist())


@pytest.fixture
def encode(encode_shapes, tmp_path):
    """A function that encodes sources into one table, by default with --append and no held-out rows."""

    def run(*sources, append=True, table=tmp_path / "t.lance", **options):
        options = {"val_fraction": 0.0, "append": append} | options
        return encode_shapes(list(sources), table, **options)

    return run


def test_a_folder_that_grew_before_its_first_image(encode, tmp_path):
    add_images(tmp_path / "photos", [f"m{n:02}" for n in range(10)])
    encode(tmp_path / "photos", append=False)
    add_images(tmp_path / "photos", [f"a{n:02}" for n in range(5)])
    added = encode(tmp_path / "photos")
    names = [f"m{n:02}" for n in range(10)] + [f"a{n:02}" for n in range(5)]
    assert captions(added.table) == Counter(f"image {name}" for name in names)
    report = added.report
    assert (report["samples"], report["rows"], report["already_present"]) == (15, 5, 10)
    again = encode(tmp_path / "photos")
    assert (again.report["rows"], again.report["shards_already_present"]) == (0, 1)
    assert (again.already_complete, again.table.version) == (True, added.table.version)


@pytest.mark.slow
def test_an_image_of_a_folder_that_is_replaced_again_and_again(encode, tmp_path):
    add_images(tmp_path / "photos", ["a", "b"])
    encode(tmp_path / "photos", append=False)
    for number in range(2):
        (tmp_path / "photos/a.png").write_bytes(png(number))
        assert encode(tmp_path / "photos").report["rows"] == 1
    assert captions(open_table(tmp_path / "t.lance")) == {"image a": 3, "image b": 1}


@pytest.mark.parametrize("kind", ["saved", "parquet", "hub"])
def test_rows_without_keys_that_were_added_before_the_others(encode, tmp_path, kind):
    """Their keys are positions, which all change."""
    import datasets

    def write(numbers) -> None:
        rows = [{"image": {"bytes": png(n), "path": None}, "text": f"image {n}"} for n in numbers]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        (tmp_path / "source").mkdir()
        if kind == "saved":
            table.save_to_disk(tmp_path / "source")
        else:
            table.to_parquet(tmp_path / "source/train-00000-of-00001.parquet")

    source = f"hf:{tmp_path / 'source'}" if kind == "hub" else tmp_path / "source"
    write(range(10))
    encode(source, append=False)
    write([*range(20, 25), *range(10)])
    added = encode(source)
    assert captions(added.table) == Counter(f"image {n}" for n in [*range(10), *range(20, 25)])
    assert (added.report["rows"], added.report["already_present"]) == (5, 10)


def test_a_new_file_of_a_hub_dataset_renames_its_others(encode, tmp_path):
    import datasets

    def write(name: str, numbers) -> None:
        rows = [{"image": {"bytes": png(n), "path": None}, "text": f"image {n}"} for n in numbers]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
        table.to_parquet(tmp_path / "source" / name)

    (tmp_path / "source").mkdir()
    write("train-00000-of-00001.parquet", range(10))
    encode(f"hf:{tmp_path / 'source'}", append=False)
    (tmp_path / "source/train-00000-of-00001.parquet").rename(tmp_path / "source/train-00000-of-00002.parquet")
    write("train-00001-of-00002.parquet", range(10, 14))
    added = encode(f"hf:{tmp_path / 'source'}")
    assert captions(added.table) == Counter(f"image {n}" for n in range(14))
    assert (added.report["shards_already_present"], added.report["rows"]) == (1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("keeps_times", [True, False])
def test_the_same_shards_in_another_folder(encode, write_tar, tmp_path, keeps_times):
    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", members(range(10 * shard, 10 * shard + 10)))
    first = encode(tmp_path / "data", append=False)
    copy = shutil.copy2 if keeps_times else shutil.copyfile
    shutil.copytree(tmp_path / "data", tmp_path / "mount", copy_function=copy)
    again = encode(tmp_path / "mount")
    assert captions(again.table) == captions(first.table)
    skipped = again.report["shards_already_present"], again.report["already_present"]
    assert skipped == ((2, 0) if keeps_times else (0, 20))


def test_files_of_one_size_and_time_are_not_taken_for_each_other(encode, write_tar, tmp_path):
    """As `tar -x` and many file systems leave them."""
    for shard in range(2):
        os.utime(write_tar(tmp_path / "data" / f"{shard}.tar", members([shard])), (1e9, 1e9))
    encode(tmp_path / "data/0.tar", append=False)
    assert captions(encode(tmp_path / "data").table) == {"image 0": 1, "image 1": 1}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [5, 12])
def test_a_shard_that_a_limit_cut_short_is_completed(encode, write_tar, tmp_path, limit):
    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", members(range(10 * shard, 10 * shard + 10)))
    assert encode(tmp_path / "data", append=False, limit=limit).report["rows"] == limit
    added = encode(tmp_path / "data")
    assert captions(added.table) == Counter(f"image {n}" for n in range(20))
    assert (added.report["rows"], added.report["already_present"]) == (20 - limit, limit % 10)
    assert encode(tmp_path / "data").already_complete


def test_a_limit_that_ends_with_a_shard_leaves_it_complete(encode, write_tar, tmp_path):
    source = write_tar(tmp_path / "0.tar", members(range(10)))
    encode(source, append=False, limit=10)
    assert encode(source).report["shards_already_present"] == 1


@pytest.mark.slow
def test_a_shard_that_was_repaired_is_completed(encode, write_tar, tmp_path):
    source = write_tar(tmp_path / "0.tar", members(range(10)))
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    first = encode(source, append=False)
    assert (first.report["rejects_by_reason"], first.report["rows"] < 10) == ({"unreadable_shard": 1}, True)
    # Nothing has changed: the damage is not reported twice.
    same = encode(source)
    assert (same.report["rows"], same.report["rejected"]) == (0, 0)
    source.write_bytes(whole)
    added = encode(source)
    assert captions(added.table) == Counter(f"image {n}" for n in range(10))
    assert added.report["already_present"] == first.report["rows"]


@pytest.mark.slow
def test_rejects_of_a_folder_that_grew_are_not_added_again(encode, rejects, tmp_path):
    add_images(tmp_path / "photos", ["a", "b", "c"])
    (tmp_path / "photos/b.png").write_bytes(b"no image")
    encode(tmp_path / "photos", append=False)
    add_images(tmp_path / "photos", ["d"])
    added = encode(tmp_path / "photos")
    assert (added.report["rows"], added.report["rejected"], added.report["already_present"]) == (1, 0, 3)
    assert [row["key"] for row in rejects(added.table)] == ["b.png"]


@pytest.mark.slow
def test_a_shard_that_the_filters_empty_is_nothing_to_add(encode, write_tar, tmp_path):
    first = encode(write_tar(tmp_path / "0.tar", members(range(5))), append=False, min_caption_length=3)
    write_tar(tmp_path / "1.tar", [("a.png", png(100)), ("a.txt", b"x")])
    added = encode(tmp_path / "1.tar", min_caption_length=3)
    assert (added.report["rows"], added.report["filtered_by_reason"]) == (0, {"short_caption": 1})
    assert captions(added.table) == captions(first.table)
    again = encode(tmp_path / "1.tar", min_caption_length=3)
    assert (again.already_complete, again.report["shards_already_present"]) == (True, 1)
    # Other filters may let its samples pass.
    assert encode(tmp_path / "1.tar").report["rows"] == 1


def test_an_empty_shard_is_nothing_to_add(encode, write_tar, tmp_path):
    encode(write_tar(tmp_path / "0.tar", members(range(5))), append=False)
    assert encode(write_tar(tmp_path / "1.tar", [])).report["rows"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dedup", "added"), [("image", {"new": 1}), ("pair", {"new": 1, "another caption": 1}), (None, None)]
)
def test_dedup_sees_the_rows_of_the_table(encode, write_tar, tmp_path, dedup, added):
    encode(write_tar(tmp_path / "0.tar", members(range(3))), append=False)
    more = [("x", 0, "image 0"), ("y", 1, "another caption"), ("z", 9, "new")]
    copies = [pair for key, n, text in more for pair in ((f"{key}.png", png(n)), (f"{key}.txt", text.encode()))]
    result = encode(write_tar(tmp_path / "1.tar", copies), dedup=dedup)
    expected = Counter(added or (text for _, _, text in more))
    assert captions(result.table) == Counter(f"image {n}" for n in range(3)) + expected
    assert result.report["filtered_by_reason"] == ({"duplicate": 3 - sum(added.values())} if added else {})


@pytest.mark.slow
def test_a_renamed_table_without_its_other_files(encode, write_tar, tmp_path):
    """The ledger and the rejects stay behind; what the table holds is found in its rows."""
    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", members(range(10 * shard, 10 * shard + 10)))
    encode(tmp_path / "data/0.tar", append=False)
    (tmp_path / "t.lance").rename(tmp_path / "u.lance")
    added = encode(tmp_path / "data", table=tmp_path / "u.lance")
    assert captions(added.table) == Counter(f"image {n}" for n in range(20))
    assert (added.report["rows"], added.report["already_present"]) == (10, 10)
    assert encode(tmp_path / "data", table=tmp_path / "u.lance").report["shards_already_present"] == 2


@pytest.mark.slow
def test_a_table_without_image_hashes_keeps_its_columns(encode, encode_shapes, write_tar, tmp_path, as_version_1):
    source = write_tar(tmp_path / "data/0.tar", members(range(40)))
    old = as_version_1(encode(source, append=False, val_fraction=0.3).table)
    before = old.dataset().to_table(columns=["id", "split"]).to_pylist()
    write_tar(tmp_path / "data/1.tar", members(range(40, 60)))
    added = encode(tmp_path / "data", val_fraction=0.3)
    assert "image_hash" not in added.table.dataset().schema.names
    assert (added.report["rows"], added.report["already_present"]) == (20, 40)
    rows = added.table.dataset().to_table(columns=["id", "split"]).to_pylist()
    assert rows[:40] == before
    assert len({row["id"] for row in rows}) == 60
    assert encode(tmp_path / "data", val_fraction=0.3).report["shards_already_present"] == 2
    with pytest.raises(TableError, match=r"--dedup image cannot compare with the rows of .*append without --dedup"):
        encode(write_tar(tmp_path / "2.tar", members([70])), val_fraction=0.3, dedup="image")


@pytest.fixture
def as_version_1():
    """A function that rewrites a table as version 1 wrote it: no image hashes, ids of key and image, no ledger."""
    import lance

    from index.table.schema import sample_id, split_of

    def rewrite(table: Table) -> Table:
        rows = table.dataset().to_table()
        ids = [sample_id(key, png(int(key))) for key in rows["key"].to_pylist()]
        splits = [split_of(bytes.fromhex(each), table.meta.val_fraction) for each in ids]
        rows = rows.drop_columns(["image_hash"]).set_column(0, "id", [ids])
        rows = rows.set_column(rows.schema.get_field_index("split"), "split", [splits])
        shutil.rmtree(table.uri)
        shutil.rmtree(table.uri.removesuffix(".lance") + "_shards.lance")
        lance.write_dataset(rows.replace_schema_metadata(table.dataset().schema.metadata), table.uri)
        return open_table(table.uri)

    return rewrite


# --- what the ledger holds


def test_the_ledger_has_one_row_per_shard_and_run(encode, write_tar, tmp_path):
    import lance

    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", [*members(range(10 * shard, 10 * shard + 10)), ("x.png", b"?")])
    first = encode(tmp_path / "data", append=False, limit=13, min_caption_length=8).table
    second = encode(tmp_path / "data", min_caption_length=8).table
    rows = lance.dataset(tmp_path / "t_shards.lance").to_table().to_pylist()
    counts = [
        tuple(row[name] for name in ("samples", "rows", "rejected", "filtered", "already_present", "complete"))
        for row in rows
    ]
    assert counts == [(11, 0, 1, 10, 0, True), (2, 2, 0, 0, 0, False), (11, 8, 1, 0, 2, True)]
    assert [Path(row["shard"]).name for row in rows] == ["0.tar", "1.tar", "1.tar"]
    assert [row["run_id"] for row in rows] == [*2 * first.meta.run_ids, second.meta.run_ids[1]]
    assert all(row["identity"] for row in rows)


@pytest.mark.slow
def test_a_ledger_of_another_table_of_that_name_hides_nothing(encode, write_tar, tmp_path):
    source = write_tar(tmp_path / "0.tar", members(range(5)))
    for name in ("first", "second"):
        encode(source, append=False, table=tmp_path / f"{name}.lance")
    encode(write_tar(tmp_path / "1.tar", members(range(5, 9))), table=tmp_path / "first.lance")
    shutil.rmtree(tmp_path / "second_shards.lance")
    shutil.copytree(tmp_path / "first_shards.lance", tmp_path / "second_shards.lance")
    added = encode(source, tmp_path / "1.tar", table=tmp_path / "second.lance")
    assert captions(added.table) == Counter(f"image {n}" for n in range(9))


@pytest.mark.slow
def test_inspect_tells_the_shards_and_those_cut_short(encode, write_tar, tmp_path):
    from index.report.report import describe

    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", members(range(10 * shard, 10 * shard + 10)))
    encode(tmp_path / "data", append=False, limit=15)
    described = describe(open_table(tmp_path / "t.lance"))
    assert (described["rows"], described["shards"]) == (15, 2)
    assert described["incomplete_shards"] == [str(tmp_path / "data/1.tar")]
    described = describe(encode(tmp_path / "data").table)
    assert (described["rows"], described["shards"], described["incomplete_shards"]) == (20, 2, [])


# --- the command


@pytest.mark.slow
def test_the_command_says_that_there_is_nothing_to_add(
    encode, write_tar, image_encoder, text_encoder, tmp_path, monkeypatch
):
    from typer.testing import CliRunner

    from pipeline import cli
    from pipeline.encode import run

    def invoke(*sources: Path):
        options = ["--image-size", "32", "--device", "cpu", "--val-fraction", "0", "--append"]
        options += ["--image-encoder", image_encoder, "--text-encoder", text_encoder]
        return CliRunner().invoke(
            cli.app, ["encode", *map(str, sources), "--table", str(tmp_path / "t.lance"), *options]
        )

    encode(write_tar(tmp_path / "0.tar", members(range(5))), append=False)
    same = invoke(tmp_path / "0.tar")
    assert (same.exit_code, same.output.count("t.lance: nothing to add")) == (0, 1)
    monkeypatch.setattr(run, "_run_graph", lambda job: None)
    more = write_tar(tmp_path / "1.tar", members(range(5, 9)))
    assert isinstance(invoke(more).exception, TableError)  # which `main` turns into one line and exit code 2
    monkeypatch.undo()
    assert "already_present" in invoke(more).output


# --- splits


def test_no_image_is_in_both_splits(encode, write_tar, tmp_path):
    """Copies of an image under other keys and captions."""
    copies = [
        pair
        for copy in range(4)
        for n in range(40)
        for pair in ((f"{copy}-{n}.png", png(n)), (f"{copy}-{n}.txt", f"{copy} of {n}".encode()))
    ]
    table = encode(write_tar(tmp_path / "0.tar", copies), append=False, val_fraction=0.3).table
    rows = table.dataset().to_table(columns=["id", "image_hash", "split"]).to_pylist()
    splits = {row["image_hash"]: set() for row in rows}
    for row in rows:
        splits[row["image_hash"]].add(row["split"])
    assert len({row["id"] for row in rows}) == 160
    assert len(splits) == 40
    assert {len(each) for each in splits.values()} == {1}
    assert {split for each in splits.values() for split in each} == {"train", "heldout"}
