"""The machine that a bench ran on, for its output."""

import os
import platform


def machine(*more: str) -> str:
    """Return the processor, the number of cores, `more`, and the Python version."""
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *more, f"Python {platform.python_version()}"])
