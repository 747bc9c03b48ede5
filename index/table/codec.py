"""Dataclasses <-> JSON objects, exactly: nested ones as objects, tuples as lists, arrays as base64 of their bytes.

Arrays of fields that are marked `stored` are left out of a dataclass that has the digest of the file which holds them.
A dataclass with a field `unknown` keeps there all other members of its JSON object, and writes them back, so that
fields of other versions of the software survive being read, changed and written.
"""

import base64
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import repeat
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

UNKNOWN = "unknown"
ARRAY = {"dtype", "shape", "base64"}

T = TypeVar("T")


def to_json_dict(instance: "DataclassInstance") -> dict[str, Any]:
    """Convert a dataclass to what `json.dumps` takes."""
    elsewhere = bool(getattr(instance, "digest", ""))
    names = [each.name for each in fields(instance) if not (elsewhere and each.metadata.get("stored"))]
    content = {name: _encode(getattr(instance, name)) for name in names if name != UNKNOWN}
    return getattr(instance, UNKNOWN, {}) | content


def from_json_dict(cls: type[T], content: Mapping[str, Any]) -> T:
    """Invert `to_json_dict`; fields that `content` lacks get their defaults."""
    hints = get_type_hints(cls)
    keeps_unknown = hints.pop(UNKNOWN, None) is not None
    values = {name: _decode(hint, content[name]) for name, hint in hints.items() if name in content}
    if keeps_unknown:
        values[UNKNOWN] = {name: value for name, value in content.items() if name not in hints}
    return cls(**values)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        text = base64.b64encode(array.tobytes()).decode()
        return {"dtype": array.dtype.str, "shape": list(array.shape), "base64": text}
    if isinstance(value, tuple):
        return [_encode(each) for each in value]
    return to_json_dict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _decode(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == ARRAY:
        flat = np.frombuffer(base64.b64decode(value["base64"]), dtype=value["dtype"])
        return flat.reshape(value["shape"]).astype(flat.dtype.newbyteorder("="))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (hint,) = (each for each in arguments if each is not NoneType)
        return _decode(hint, value)
    if origin is tuple:
        hints = repeat(arguments[0], len(value)) if arguments[-1] is Ellipsis else arguments
        return tuple(_decode(each, part) for each, part in zip(hints, value, strict=True))
    return from_json_dict(hint, value) if isinstance(hint, type) and is_dataclass(hint) else value
