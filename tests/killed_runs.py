"""Training runs as a kill would leave them."""

import shutil
from pathlib import Path

from trainer.checkpoints import checkpoints


def killed(run: Path, out: Path, *, after: int) -> Path:
    """Copy a run with a checkpoint of every step, as a kill after the checkpoint of one of them would leave it."""
    shutil.copytree(run, out)
    for path in checkpoints(out)[after:]:
        shutil.rmtree(path)
    shutil.rmtree(out / "network")
    for name in ("result.json", "samples.png"):
        (out / name).unlink()
    return out
