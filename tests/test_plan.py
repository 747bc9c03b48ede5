"""`pipeline plan` foretells what real tables and indexes take on disk, and docs/clusters.md shows what it prints."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lance.file import LanceFileReader
from synthetic_tables import random_table

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError
from index.search.lance_index import IndexPlan, build_whole
from index.table.table import open_table
from pipeline.estimate import Rates, TableShape, column_bytes, estimate, index_bytes, worker_hours

ROOT = Path(__file__).parent.parent


def files_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stored_columns(table) -> dict[str, float]:
    """The bytes per row of each column, as Lance's files tell them."""
    dataset, sizes = table.dataset(), {}
    names = {field.id(): field.name() for field in dataset.lance_schema.fields()}
    for fragment in dataset.get_fragments():
        for file in fragment.metadata.files:
            columns = LanceFileReader(f"{table.uri}/data/{file.path}").file_statistics().columns
            for field, column in zip(file.fields, file.column_indices, strict=True):
                if field in names and column >= 0:
                    sizes[names[field]] = sizes.get(names[field], 0) + columns[column].size_bytes
    return {name: size / dataset.count_rows() for name, size in sizes.items()}


def test_a_real_table_has_the_bytes_that_were_foretold(indexed):
    meta = indexed.meta
    rows = indexed.dataset().count_rows()
    lengths = {name: np.mean([len(each) for each in indexed.column(name, None)]) for name in ("caption", "meta")}
    shape = TableShape(
        rows=rows,
        latent_shape=meta.latent_shape,
        text_dim=meta.text_dim,
        val_fraction=meta.val_fraction,
        rows_per_shard=120,
        caption_length=lengths["caption"],
        sidecar_length=lengths["meta"],
    )
    foretold, stored = column_bytes(shape), stored_columns(indexed)
    assert shape.vector_dim == meta.geometry.vector_dim
    for name in ("text", "latent", "vector"):
        assert foretold[name] == pytest.approx(stored[name], rel=0.05)
    # Sidecars of drawn shapes are more alike than others, and headers of small files are smaller.
    foretold |= {"sidecar": stored["meta"], "file headers": 0.0}
    assert sum(foretold.values()) == pytest.approx(sum(stored.values()), rel=0.03)


@pytest.mark.slow
def test_a_table_of_many_rows_has_the_bytes_that_were_foretold(tmp_path):
    random_table(tmp_path / "t.lance", 20_000, text_dim=64, latent_dim=240, fragments=2)
    sizes = {"caption_length": 5.0, "sidecar_length": 2.0}
    shape = TableShape(rows=20_000, latent_shape=(15, 4, 4), text_dim=64, rows_per_shard=10_000, **sizes)
    foretold = sum(column_bytes(shape).values())
    assert foretold == pytest.approx(files_below(tmp_path / "t.lance" / "data") / 20_000, rel=0.03)


@pytest.mark.parametrize(("index_type", "bits"), [("ivf_rq", 8), ("ivf_rq", 5), ("ivf_flat", None)])
@pytest.mark.parametrize(("text_dim", "latent_dim"), [(6, 15), (40, 63), (100, 300)])
def test_an_index_has_the_bytes_that_were_foretold(tmp_path, index_type, bits, text_dim, latent_dim):
    table = random_table(tmp_path / "t.lance", 3000, text_dim=text_dim, latent_dim=latent_dim)
    shape = TableShape(
        rows=3000,
        latent_shape=(1, 1, latent_dim),
        text_dim=text_dim,
        val_fraction=0.0,
        index_type=index_type,
        max_memory=2**30 if bits != 5 else 3000 * table.meta.geometry.vector_dim - 1,
    )
    assert shape.index() == (index_type, bits)
    build_whole(table, IndexPlan.train(table, index_type, shape.num_partitions, num_bits=bits, seed=0), None)
    # Row ids of a small table take less than their eight bytes.
    written = files_below(tmp_path / "t.lance" / "_indices") + 6 * 3000
    assert index_bytes(shape) == pytest.approx(written, rel=0.08)


@pytest.mark.slow
def test_the_index_that_is_foretold_is_the_one_that_build_index_selects(indexed):
    assert indexed.meta.index.index_type == "ivf_rq"
    rows = indexed.dataset().count_rows()
    shape = TableShape(
        rows=rows, text_dim=16, latent_shape=(2, 4, 4), val_fraction=1 - len(indexed.positions("train")) / rows
    )
    assert shape.index() == ("none", None)
    built = build_index(open_table(indexed.uri), BuildConfig(index_type="ivf_rq")).table.meta.index
    assert shape.num_partitions == built.num_partitions


def test_hours_follow_from_the_rates():
    shape = TableShape(rows=1_000_000, num_workers=10)
    hours = worker_hours(shape)
    assert hours["encode"] == pytest.approx(1_000_000 / 215 / 3600)
    faster = TableShape(rows=1_000_000, rates=Rates.parse(["images=430", "gflops=50"]))
    assert worker_hours(faster)["encode"] == pytest.approx(hours["encode"] / 2)
    assert worker_hours(faster)["index: partitions"] == pytest.approx(hours["index: partitions"] / 2)
    assert estimate(shape)["hours"]["encode"] == pytest.approx(hours["encode"] / 10)
    narrow = worker_hours(TableShape(rows=1_000_000, search_dim=480))
    assert narrow["index: quantize"] < hours["index: quantize"] / 4  # 8 bits take longer than 5
    assert narrow["draw targets"] < hours["draw targets"] / 9


@pytest.mark.parametrize("text", ["speed=3", "gflops", "gflops=fast", "gflops=0"])
def test_a_rate_that_is_not_valid_is_refused(text):
    with pytest.raises(OptionError, match="--rate"):
        Rates.parse([text])


def plan(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    code = "from pipeline.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, "plan", *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_dimensions_are_read_from_encoders(image_encoder, text_encoder):
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder]
    done = plan(["1000", "--image-size", "32", *encoders, "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["settings"]["latent_shape"] == [2, 4, 4]
    assert (result["settings"]["text_dim"], result["vector_dim"]) == (16, 56)


def test_a_latent_shape_of_two_numbers_is_refused():
    done = plan(["1000", "--latent-shape", "4,32"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --latent-shape 4,32 is not three numbers: type C,H,W"


def test_the_documents_show_what_the_command_prints():
    text = (ROOT / "docs/clusters.md").read_text()
    blocks = re.findall(
        r"^```\n\$ pipeline plan (.*?)\n(.*?)^```", text.replace(" \\\n", " "), flags=re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 2
    for arguments, expected in blocks:
        done = plan(shlex.split(arguments))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n") == expected.split("\n"), arguments
