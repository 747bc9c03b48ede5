"""Where encoders compute: the device, its data type, batches that fit into its memory."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from index.errors import EncoderError, OptionError, one_line
from index.table.schema import EncoderRef
from pipeline.encoders.files import quiet_libraries

if TYPE_CHECKING:
    import torch


def resolve_device(device: str = "auto") -> str:
    """Return `device`, or for auto the first of cuda, mps and cpu that is available.

    Raises OptionError if the device does not exist on this machine.
    """
    import torch

    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(
                f"--device {device} cannot be used ({reason}): use auto, cpu, cuda, cuda:N or mps"
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def worker_device(device: str, worker: int) -> str:
    """Return the device of a worker: with auto or cuda, worker i of a machine with n GPUs takes GPU i mod n.

    Raises OptionError if the device does not exist on this machine.
    """
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available() and (count := torch.cuda.device_count()) > 1:
        device = f"cuda:{worker % count}"
    return resolve_device(device)


def worker_number() -> int:
    """Return which of an engine's workers on its machine this process is, counted from 0; 0 if no engine started it."""
    found = re.search(r"\d+$", os.environ.get("WORKER_ID", ""))
    return int(found[0]) if found else _number_on_dask()


def _number_on_dask() -> int:
    """Return which of the workers of its machine the Dask worker of this task is, in the order of their names."""
    if "distributed" not in sys.modules:
        return 0
    from distributed import get_client, get_worker

    try:
        worker = get_worker()
    except ValueError:  # not in a task
        return 0
    workers = get_client().scheduler_info(n_workers=-1)["workers"]
    host = workers[worker.address]["host"]
    names = [str(each["name"]) for each in workers.values() if each["host"] == host]
    return sorted(names, key=lambda name: (len(name), name)).index(str(worker.name))


def default_dtype(device: str) -> str:
    """Return the data type of --dtype auto."""
    return "bfloat16" if device.startswith("cuda") else "float32"


@contextlib.contextmanager
def encoding(ref: EncoderRef, task: str = "encode") -> Iterator[None]:
    """Turn the exceptions of a first encoding into an EncoderError: models raise those of any class."""
    try:
        yield
    except Exception as error:
        raise EncoderError(
            f"{ref.class_name} {ref.name} cannot {task} ({one_line(error, typed=True)}): use another encoder"
        ) from error


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch's number of threads back as it was before the block."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(model: "torch.nn.Module", device: str, dtype: str) -> "torch.dtype":
    """Move a model to a device for inference, and return its torch dtype."""
    import torch

    torch_dtype: torch.dtype = getattr(torch, dtype)
    with quiet_libraries():  # diffusers warns of any change of the data type, also of none
        model.to(device, torch_dtype)
    model.eval().requires_grad_(False)
    return torch_dtype


def split_if_out_of_memory(
    forward: Callable[["torch.Tensor"], "torch.Tensor"], batch: "torch.Tensor"
) -> "torch.Tensor":
    """Return `forward(batch)`, computed in halves if the device runs out of memory."""
    import torch

    try:
        return forward(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([split_if_out_of_memory(forward, half) for half in batch.chunk(2)])
