"""One encode run at a time per table.

On this machine's file systems a lock that the kernel gives back when its process dies, however it dies. An object
store has none: there the run renews a lease, and a run that was killed holds its table until the lease has run out.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from index.errors import TableError
from index.table.storage import Storage, is_local, unwritable

LEASE_SECONDS = 60.0


@contextlib.contextmanager
def claim(folder: str, storage: Storage) -> Iterator[None]:
    """Hold a folder for as long as the block runs; TableError where another run holds it, or it cannot be written."""
    mine = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with _locked(Path(folder), mine) if is_local(folder) else _leased(folder, mine, storage):
        yield


@contextlib.contextmanager
def _locked(folder: Path, mine: dict[str, object]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    owner = folder / "owner.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise TableError(_taken(folder, owner.read_bytes() if owner.exists() else b"{}")) from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        owner.write_text(json.dumps(mine))
        yield
    finally:
        if folder.exists() and {path.name for path in folder.iterdir()} <= {"lock", "owner.json"}:
            shutil.rmtree(folder)
        lock.release()


@contextlib.contextmanager
def _leased(folder: str, mine: dict[str, object], storage: Storage) -> Iterator[None]:
    files, path = storage.files(f"{folder}/owner.json")

    def write(mode: str) -> None:
        files.pipe_file(path, json.dumps(mine | {"until": time.time() + LEASE_SECONDS}).encode(), mode=mode)

    try:
        try:
            write("create")
        except FileExistsError:
            content = files.cat_file(path)
            left = json.loads(content)["until"] - time.time()
            if left > 0:
                raise TableError(f"{_taken(folder, content)}; its lease ends in {left:.0f} s") from None
            write("overwrite")
    except OSError as error:
        raise unwritable(folder, error) from error
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_SECONDS / 4):
            write("overwrite")

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(path)


def _taken(folder: Path | str, owner: bytes) -> str:
    who = json.loads(owner or b"{}")
    by = f" by process {who['process']} on {who['host']} since {who['since']}" if who else ""
    return f"the table is being encoded{by}: wait for it, or stop it first ({folder})"
