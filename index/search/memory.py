"""What a limit of memory is spent on, and what comes on top of it.

A step of build-index may take three quarters of --max-memory-gb for what it holds (vectors, a sample, an index) and a
quarter for the rows that it reads and compares at a time. `tests/bench/memory.py` measures that peaks stay within
1.25 times the limit and these constants.
"""

import numpy as np

BYTES_PER_ROW = 40
"""Arrays of all training rows that are held whatever the limit: table positions, row ids, potentials and balance
coordinates, and copies of them."""
LANCE_BYTES = 192 * 2**20
"""What Lance holds while it reads: pages, batches ahead."""
MIN_ROWS, MAX_ROWS = 256, 65_536


def held_bytes(memory: int) -> int:
    """Return the part of a limit that is for what a step holds."""
    return memory - working_bytes(memory)


def working_bytes(memory: int) -> int:
    """Return the part of a limit that is for rows that are read and compared at a time."""
    return memory // 4


def rows_at_once(memory: int, bytes_per_row: int) -> int:
    """Return how many rows to read and compare at a time: 256 to 65,536, by what each takes and the limit allows."""
    return int(np.clip(working_bytes(memory) // bytes_per_row, MIN_ROWS, MAX_ROWS))


def available_bytes(device: str = "cpu") -> int:
    """Return the memory that is free on a device: a GPU's, or this machine's."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
