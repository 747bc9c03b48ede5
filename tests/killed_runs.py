"""Kill training runs at a given write, or make copies of them as a kill would leave them."""

import os
import shutil
import sys
from pathlib import Path

from trainer.checkpoints import checkpoints

WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""Audit events of a process that writes to a folder."""


class Killed(BaseException):
    """Ends a run as a kill does: nothing that handles errors handles it."""


class KillSwitch:
    """Counts the writes below some folders, and kills the run at one of them."""

    def __init__(self) -> None:
        self.folders, self.at, self.writes = (), None, []
        sys.addaudithook(self.on_event)  # it cannot be removed: without folders it does nothing

    def on_event(self, event, arguments) -> None:
        if not self.folders or event not in WRITES:
            return
        name = str(arguments[0])
        if not name.startswith(self.folders) or (event == "open" and not writes(arguments)):
            return
        self.writes.append(f"{event} {name}")
        if len(self.writes) - 1 == self.at:
            raise Killed(self.writes[-1])

    def watch(self, *folders: str, at: int | None = None) -> None:
        self.folders, self.at, self.writes = folders, at, []

    def rest(self) -> None:
        self.folders = ()


def writes(arguments) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or any(letter in (mode or "") for letter in "wax+")


KILL_9 = """
import os, signal, sys
place = sys.argv.pop()
def kill(event, arguments):
    if event == "os.rename" and str(arguments[0]).endswith(place):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
from trainer.cli import main
main()
"""


def killed(run: Path, out: Path, *, after: int) -> Path:
    """Copy a run with a checkpoint of every step, as a kill after the checkpoint of one of them would leave it."""
    shutil.copytree(run, out)
    for path in checkpoints(out)[after:]:
        shutil.rmtree(path)
    shutil.rmtree(out / "network")
    for name in ("result.json", "samples.png"):
        (out / name).unlink()
    return out
