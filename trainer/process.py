"""What training needs of its process, and gives back: Accelerate's state, torch's threads and precision.

Whoever calls `fit` as a function, several times or next to other work, finds them as they were.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from index.errors import OptionError
from pipeline.encoders.devices import resolve_device
from trainer.tracking import TRACKER

if TYPE_CHECKING:
    from accelerate import Accelerator

MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}
"""accelerate's name of each dtype."""


@contextlib.contextmanager
def open_accelerator(device: str, dtype: str, folder: Path, *, searches: bool = True) -> Iterator["Accelerator"]:
    """Make an Accelerator of its own for a block; on a CPU, leave half of the threads to `searches` ahead.

    On CUDA float32 matrices are multiplied in TF32.

    Raises OptionError if the device does not exist, or the launcher asks for another precision than `dtype`.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    device = resolve_device(device)
    _check_launcher(dtype)
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    saved, threads = [dict(state) for state in states], torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    for state in states:
        state.clear()
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        if device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # TF32
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISION[dtype], cpu=device == "cpu", log_with=TRACKER, project_dir=folder
        )
        if searches and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _num_cores() // 2))
        yield accelerator
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        for state, content in zip(states, saved, strict=True):
            state.clear()
            state.update(content)


def _check_launcher(dtype: str) -> None:
    """Raise OptionError if `accelerate launch --mixed_precision` contradicts `--dtype`."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", MIXED_PRECISION[dtype]):
        raise OptionError(
            f"--dtype {dtype} is not what `accelerate launch --mixed_precision {launched}` asks for: add --dtype "
            "bfloat16, or launch with --mixed_precision no"
        )


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
