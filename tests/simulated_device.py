"""An accelerator that is simulated on the CPU, to find without a GPU what would fail or wait on one.

`simulated:0` is a device of its own to torch, and its tensors hold their numbers in memory of the CPU. An operation on
them and on tensors of the CPU raises, as on a GPU. Whatever makes the CPU wait for a device is recorded: copies to the
CPU, numbers read, shapes that depend on values, copies to the device that are not `non_blocking`.

FakeTensorMode, which has no numbers, has neither the branches that depend on them nor losses to compare; and in a torch
without CUDA, fake CUDA tensors have no backward pass. The device is installed for a whole process, once and before any
other backward pass in it, hence `run_simulated`.
"""

import contextlib
import os
import threading
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "simulated:0"
COPIES = ("aten::_to_copy", "aten::copy_")
READS_NUMBERS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
SHAPE_DEPENDS_ON_VALUES = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")
RESIZES = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "randperm.generator")
"""Make an empty tensor and resize it, of which a tensor subclass learns nothing: they are computed as a whole."""
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

_recorded: list[str] | None = None
_libraries: list[torch.library.Library] = []


@contextlib.contextmanager
def recorded_waits() -> Iterator[list[str]]:
    """Yield a list of what makes the CPU wait for the device in the block; threads that search ahead may wait."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def run_simulated(function, *args):
    """Call a function of a module of tests in the process with the device, and return its result."""
    return _process().submit(function, *args).result()


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=install)


def install() -> None:
    """Make the device, and the default of accelerate."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE
    _setup_privateuseone_for_python_backend("simulated", _Backend())
    # Tensors of the device are made by these; all else comes to Simulated.__torch_dispatch__.
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[-1].fallback(_compute, "PrivateUse1")
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[-1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # A zero of forward-mode derivatives that has no memory does not go with a tensor subclass.
    _libraries.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings(action="ignore"):
        _libraries[-1].impl("_efficientzerotensor", _zeros, "CPU", allow_override=True)
        for name in RESIZES:
            overload = getattr(torch.ops.aten, name.partition(".")[0])
            _libraries[-1].impl(
                name, partial(_compute, getattr(overload, name.partition(".")[2] or "default")), "PrivateUse1"
            )
    # A tensor subclass cannot be a view of a normal tensor in inference mode.
    torch.inference_mode = torch.no_grad


class _Backend(_DummyBackendModule):
    """What torch asks of the module of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.zeros(1)

    def set_rng_state(self, state, device=None):
        pass

    def manual_seed_all(self, seed):
        _record("global generator seeded")


class Simulated(torch.Tensor):
    """A tensor of the device, with its numbers in `held`."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self, **_):
        return f"Simulated({self.held})"

    def tolist(self):
        _record("tolist")
        return self.held.tolist()

    # Which tensors share memory is asked when they are saved.

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        copied = Simulated(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, *args, **(kwargs or {}))


def _compute(operation, *args, **kwargs):
    """Compute an operation on the CPU; its result is on the device if an argument or `device` is."""
    name = operation._schema.name
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    here = [each for each in tensors if isinstance(each, Simulated)]
    elsewhere = [each for each in tensors if not isinstance(each, Simulated)]
    if here and name not in COPIES and any(each.dim() for each in elsewhere):
        shapes = [(str(each.device), tuple(each.shape)) for each in tensors]
        raise RuntimeError(f"expected all tensors of {operation} to be on one device, but found {shapes}")
    to_device = _ends_on_device(name, args, kwargs, here)
    if here:
        _record_wait(name, here, to_device)
    from_cpu = name in COPIES and to_device and not isinstance(tensors[-1], Simulated)
    if from_cpu and not (kwargs.get("non_blocking") or True in args[2:]):
        _record(f"{name} to the device, of {tuple(tensors[-1].shape)}")
    if name == "aten::_fused_sdp_choice":
        return 0  # of attention kernels, that which every device has
    if name == "aten::_efficientzerotensor":
        return Simulated(_zeros(*args, **kwargs))
    given, options = tree_map(_on_cpu, (args, kwargs))
    if options.get("pin_memory"):
        options["pin_memory"] = False
    result = operation(*given, **options)
    if name == "aten::_to_copy" and result is given[0]:
        result = result.clone()
    if not to_device:
        return args[0] if name == "aten::copy_" else result
    assert all(each.shape == each.held.shape for each in here), operation
    same = {id(each.held): each for each in here}
    return tree_map(lambda each: _wrapped(each, same), result)


def _ends_on_device(name, args, kwargs, here) -> bool:
    if name == "aten::copy_":
        return isinstance(args[0], Simulated)
    device = kwargs.get("device")
    return bool(here) if device is None else torch.device(device).type == "simulated"


def _record_wait(name, here, to_device) -> None:
    shape = tuple(here[0].shape)
    if name in (*READS_NUMBERS, *SHAPE_DEPENDS_ON_VALUES):
        _record(f"{name} of {shape}")
    elif name in INDEXING and any(each.dtype == torch.bool for each in here[1:]):
        _record(f"{name} of {shape} by a mask")
    elif not to_device:
        _record(f"{name} to the CPU, of {shape}")


def _record(what: str) -> None:
    if _recorded is not None and not threading.current_thread().name.startswith("search"):
        (frame,) = [each for each in traceback.extract_stack() if "/trainer/" in each.filename][-1:] or [None]
        place = "" if frame is None else f" at {os.path.basename(frame.filename)}:{frame.lineno}"
        _recorded.append(what + place)


def _wrapped(each, same):
    """Return a result as a tensor of the device; that of an operation in place is its argument."""
    if not isinstance(each, torch.Tensor):
        return each
    return same[id(each)] if id(each) in same else Simulated(each)


def _on_cpu(each):
    if isinstance(each, torch.device):
        return torch.device("cpu")
    return each.held if isinstance(each, Simulated) else each


def _zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return torch.zeros(size, dtype=dtype)
