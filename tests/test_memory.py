"""A limit of memory changes what is held, never a result; what cannot be held is refused before it is read."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_tables import random_table

from index.build.potentials import extend_potentials, fit_potentials
from index.build.select import most_partitions
from index.errors import OptionError
from index.report.hubness import chi_square, measure_hubness
from index.report.integrity import DistinctRows, check_vectors, row_hashes
from index.report.recall import evaluation_queries, find_ground_truth
from index.report.sweep import measure_sweep
from index.search import ann, kmeans
from index.search.ann import open_search
from index.search.blocks import VectorBlocks, vector_bytes
from index.search.exact import ExactSearch
from index.search.kmeans import k_means, partition_file, train_centroids
from index.space.queries import draw_points, draw_rows
from index.table.schema import TRAIN

TINY = 1


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return random_table(tmp_path_factory.mktemp("memory") / "pairs.lance", 3000, captions=40, heldout=100, fragments=3)


@pytest.fixture(scope="module")
def searches(table):
    """Exact search of vectors in memory, and of vectors that are read in blocks."""
    held, read = ExactSearch(table), ExactSearch(table, memory=TINY)
    assert (held.blocks.in_memory, read.blocks.in_memory) == (True, False)
    return held, read


def test_ground_truth_and_hit_counts_do_not_depend_on_the_limit(table, searches):
    truths = [find_ground_truth(search, evaluation_queries(table, 300)) for search in searches]
    assert np.array_equal(truths[0].positions, truths[1].positions)
    assert np.array_equal(truths[0].distance, truths[1].distance)
    held, read = (asdict(measure_hubness(table.meta.geometry, search, search)) for search in searches)
    assert held == read


def test_the_sweep_does_not_depend_on_the_limit(table, searches):
    held, read = (measure_sweep(search, table.meta.geometry, (1.5, 4.0), num_captions=20) for search in searches)
    assert held == read


@pytest.mark.slow
def test_balance_does_not_depend_on_the_limit(table):
    geometry, train = table.meta.geometry, table.positions(TRAIN)

    def queries(step):
        rows = train[draw_rows(len(train), 256, seed=0, step=step)]
        return geometry.queries(table.take(rows, "text"), draw_points(geometry, 256, seed=0, step=step))

    results = []
    for memory in (None, TINY):
        sample = VectorBlocks(table, memory=memory, stride=3, balance=False)
        *_, potentials = fit_potentials(sample, queries, steps=20, target=0.0)
        blocks = VectorBlocks(table, memory=memory, balance=False)
        g = extend_potentials(sample, potentials.g, blocks, queries, num_queries=2048, memory=memory)
        results.append((potentials.g, g))
    assert np.allclose(results[0][0], results[1][0], atol=1e-3)
    assert np.allclose(results[0][1], results[1][1], atol=1e-3)
    assert np.ptp(results[0][1]) > 0.1


def test_vectors_are_held_as_they_are_stored_and_compared_in_float32(table):
    blocks = VectorBlocks(table, block_rows=100)
    assert blocks.sorted.vectors.dtype == torch.float16
    assert {block.vectors.dtype for block in blocks} == {torch.float32}
    entry = 2 * table.meta.geometry.vector_dim
    assert entry * blocks.count < vector_bytes(table, blocks.count) < 3 * entry * blocks.count + 40 * blocks.count


def test_assigned_partitions_do_not_depend_on_the_limit(table):
    import lance

    centroids, assigned = train_centroids(table, 12), []
    for memory in (None, TINY):
        with partition_file(table, centroids, memory=memory) as path:
            assigned.append(lance.dataset(path).to_table())
    assert assigned[0].equals(assigned[1].combine_chunks()) or assigned[0].to_pydict() == assigned[1].to_pydict()


def test_the_sample_of_partitions_fits_the_limit_and_says_if_it_is_small(table, monkeypatch, capfd):
    sizes = []
    monkeypatch.setattr(kmeans, "k_means", lambda rows, *more: sizes.append(len(rows)) or k_means(rows, *more))
    train_centroids(table, 10)
    dim = table.meta.geometry.vector_dim
    limit = 4 * (2 * dim * 10 * 40) // 3
    train_centroids(table, 10, memory=limit)
    assert sizes == [2560, 320]
    assert "10 partitions are trained on the 320 rows" in capfd.readouterr().err
    assert most_partitions(2900, dim, 2**30) == 53
    assert 1 <= most_partitions(2900, dim, limit) < 53


def test_distinct_rows_are_exact_while_there_is_room_and_estimated_beyond():
    rng = np.random.default_rng(0)
    values = rng.integers(2**63, size=200_000, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = np.concatenate([values, values[:50_000]])
    rng.shuffle(hashes)
    for room, exact in ((200_000, True), (20_000, False)):
        counter = DistinctRows(room)
        for part in np.array_split(hashes, 40):
            counter.add(part)
        if exact:
            assert (counter.count, counter.duplicates, counter.rows) == (200_000, 50_000, 250_000)
        else:
            assert 10_000 < counter.rows < 40_000
            assert abs(counter.count / 200_000 - 1) < 0.05
            assert abs(counter.duplicates / 50_000 - 1) < 0.1


def test_few_distinct_rows_are_counted_exactly_among_any_number():
    counter = DistinctRows(100)
    for _ in range(50):
        counter.add(np.random.default_rng(1).integers(2**64, size=80, dtype=np.uint64).repeat(50))
    assert (counter.count, counter.rows, counter.duplicates) == (80, 200_000, 199_920)


def test_hashes_tell_rows_apart_that_differ_in_any_one_number_or_in_order():
    rows = np.zeros((40, 39), np.float16)
    rows[np.arange(39), np.arange(39)] = 1
    assert len(np.unique(row_hashes(rows))) == 40
    row = np.arange(39, dtype=np.float16)
    assert len(np.unique(row_hashes(np.stack([row, row[::-1], np.roll(row, 4)])))) == 3
    assert np.array_equal(row_hashes(np.float16([[0.0, 1.0]])), row_hashes(np.float16([[-0.0, 1.0]])))


def test_integrity_is_the_same_within_a_limit(table):
    assert check_vectors(table) == check_vectors(table, TINY)
    assert check_vectors(table).hashed_rows == 2900


def test_chi_square_needs_only_the_rows_that_were_retrieved():
    hits = np.array([0, 3, 0, 1, 2, 0])
    assert chi_square(hits) == chi_square(hits[hits > 0], len(hits))


def test_exact_search_that_does_not_fit_is_refused_before_it_reads(table, monkeypatch):
    monkeypatch.setattr(ann, "available_bytes", lambda device: 100_000)
    monkeypatch.setattr(VectorBlocks, "_read_all", lambda self: pytest.fail("read"))
    with pytest.raises(OptionError, match=r"holds 2,900 vectors of 24 numbers on cpu, .* GiB.*--search ann"):
        open_search(table, exact=True)


TOGETHER = """
import itertools, sys
import torch
import torch.distributed as dist
from index.search.sharded import ShardedSearch
from index.table.table import open_table
from trainer.stream import NeighborStream, StreamConfig

uri, out, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=process, world_size=3)
table = open_table(uri)
search = ShardedSearch(table, "cpu", process, 3)
config = StreamConfig(batch_size=96, seed=3, num_neighbors=3)
for first, steps in ((0, 40), (7, 5)):
    stream = NeighborStream(table, search, config, start=first, process_index=process, num_processes=3)
    batches = [(batch.r, batch.text, batch.y) for _, batch in itertools.islice(stream, steps)]
    torch.save(batches, f"{out}/{first}-{process}.pt")
search.close()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_divide_the_rows_see_the_batches_of_one(table, tmp_path):
    from itertools import islice

    from trainer.stream import NeighborStream, StreamConfig

    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TOGETHER, table.uri, str(tmp_path)]
    started = [
        subprocess.Popen([*command, str(process)], env=environment, stderr=subprocess.PIPE) for process in range(3)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    config = StreamConfig(batch_size=96, seed=3, num_neighbors=3)
    for first, steps in ((0, 40), (7, 5)):
        parts = [torch.load(tmp_path / f"{first}-{process}.pt") for process in range(3)]
        alone = islice(NeighborStream(table, ExactSearch(table), config, start=first), steps)
        for number, (_, batch) in enumerate(alone):
            for index, name in enumerate(("r", "text", "y")):
                together = torch.cat([part[number][index] for part in parts])
                assert torch.equal(together, getattr(batch, name)), (first, number, name)


def test_large_tables_are_divided_and_small_ones_are_not(table, monkeypatch):
    opened = []

    class Divided(ExactSearch):
        def __init__(self, table, device, process, num_processes):
            opened.append((process, num_processes))

    monkeypatch.setattr(ann, "ShardedSearch", Divided)
    assert not isinstance(open_search(table, exact=True, process=1, num_processes=2), Divided)
    monkeypatch.setattr(ann, "DIVIDED_BYTES", 1000)
    assert isinstance(open_search(table, exact=True, process=1, num_processes=2), Divided)
    assert opened == [(1, 2)]
