"""Measurements that an evaluation keeps in OUT/measurements, so that it goes on where it was stopped.

A measurement is a file KEY.safetensors: numbers as JSON in its metadata, and the points that the page shows. KEY is a
hash of everything that the numbers depend on, so a measurement of another table, network or option is never taken up.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from index.table.storage import write_bytes
from index.terminal import print_status

FORMAT = 2
"""Raised whenever a metric is computed in another way."""


class Measurement(NamedTuple):
    """What was measured, and points to show."""

    content: dict[str, Any]
    shown: Float32[np.ndarray, "P L"]


class Measurements:
    """The measurements in a folder that depend on the same table, prompts and feature extractors."""

    def __init__(self, folder: Path, **shared: Any) -> None:
        """Name the folder, and what all measurements depend on."""
        self._folder, self._shared = folder, {"format": FORMAT, **shared}

    def load(self, **depends_on: Any) -> Measurement | None:
        """Return the measurement that depends on this, or None if there is none that can be read."""
        path = self._path(depends_on)
        if not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                return Measurement(json.loads(file.metadata()["content"]), file.get_tensor("shown"))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            print_status(f"warning: {path} cannot be read ({error}): measuring again")
            return None

    def save(
        self, content: dict[str, Any], shown: Float32[np.ndarray, "P L"] | None = None, **depends_on: Any
    ) -> Measurement:
        """Write a measurement, whole or not at all, and return it."""
        points = np.zeros((0, 0), np.float32) if shown is None else np.ascontiguousarray(shown, np.float32)
        write_bytes(self._path(depends_on), save({"shown": points}, {"content": json.dumps(content)}))
        return Measurement(content, points)

    def _path(self, depends_on: dict[str, Any]) -> Path:
        key = json.dumps(self._shared | depends_on, sort_keys=True, default=str)
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
