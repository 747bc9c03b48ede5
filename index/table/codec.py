"""Arrays inside JSON, exactly: base64 of their little-endian bytes."""

import base64
from typing import Any

import numpy as np


def pack(value: Any) -> Any:
    """An array as {dtype, shape, base64}; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if not isinstance(value, dict):
        return value
    flat = np.frombuffer(base64.b64decode(value["base64"]), dtype=value["dtype"])
    return flat.reshape(value["shape"]).astype(flat.dtype.newbyteorder("="))
