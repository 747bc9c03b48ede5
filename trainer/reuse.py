"""How many steps each drawn target serves, so that training does not wait for searches.

On a CPU it is planned from counts alone, so that the same seed gives the same result on every machine; on an
accelerator, whose speed we cannot know, it is measured at the start and stored with the run.
"""

import time
from collections.abc import Callable

import numpy as np

from index.table.schema import TRAIN
from index.table.table import Table
from trainer.stream import Batch, NeighborStream

MOST_REUSE = 16
# What a search costs, in operations of training that take as long on the same core; fitted to
# tests/bench/search_speed.py on tables of 10,000 to a million rows, and doubled, because it competes for caches.
OPERATIONS_PER_QUERY, OPERATIONS_PER_NUMBER = 13e6, 14


def plan_reuse(table: Table, flops: int, *, exact: bool) -> int:
    """The reuse on a CPU of a network that takes `flops` operations to evaluate once."""
    index, rows = table.meta.index, len(table.positions(TRAIN))
    training = 3 * flops
    if exact or index is None or index.num_partitions is None:
        searching = 2.0 * rows * table.meta.geometry.vector_dim
    else:
        scanned = rows * (index.nprobes or 1) / index.num_partitions
        searching = OPERATIONS_PER_QUERY + OPERATIONS_PER_NUMBER * scanned * table.meta.geometry.vector_dim
    return _allowed(searching / training)


def measure_reuse(stream: NeighborStream, train: Callable[[Batch], None], *, steps: int = 16) -> int:
    """The reuse by a few searches and steps of each alone."""
    draws = iter(stream)
    first = next(draws)[1]
    began = time.perf_counter()
    for _ in range(steps):
        next(draws)
    searched = time.perf_counter() - began
    train(first)
    began = time.perf_counter()
    for _ in range(steps):
        train(first)
    trained = time.perf_counter() - began
    return _allowed(1.1 * searched / trained)


def _allowed(wanted: float) -> int:
    return int(np.clip(np.ceil(wanted), 1, MOST_REUSE))
