"""What the figures of a bench were measured on."""

import os
import platform


def machine(*more: str) -> str:
    """Processor, cores, whatever else matters, and Python."""
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *more, f"Python {platform.python_version()}"])
