"""The lock of a table: one encode run at a time.

On a local file system it is a lock file that the kernel releases when the owner's process ends, however that ends.
Object stores have no such lock. There the owner holds a lease and renews it; after a kill, the table stays locked until
the lease expires.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from index.background import repeat
from index.errors import TableError
from index.table.storage import Storage, is_local, unwritable

LEASE_SECONDS = 60.0


@contextlib.contextmanager
def hold_lock(folder: str, storage: Storage) -> Iterator[None]:
    """Hold the lock of a folder while the block runs.

    Raises TableError if another process owns the lock, or if the folder cannot be written.
    """
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with _hold_file_lock(Path(folder), owner) if is_local(folder) else _hold_lease(folder, owner, storage):
        yield


@contextlib.contextmanager
def _hold_file_lock(folder: Path, owner: dict[str, object]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    owner_file = folder / "owner.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise TableError(_locked_by(folder, owner_file.read_bytes() if owner_file.exists() else b"{}")) from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        owner_file.write_text(json.dumps(owner))
        yield
    finally:
        if folder.exists() and {path.name for path in folder.iterdir()} <= {"lock", "owner.json"}:
            shutil.rmtree(folder)
        lock.release()


@contextlib.contextmanager
def _hold_lease(folder: str, owner: dict[str, object], storage: Storage) -> Iterator[None]:
    files, path = storage.files(f"{folder}/owner.json")

    def write(mode: str) -> None:
        files.pipe_file(path, json.dumps(owner | {"until": time.time() + LEASE_SECONDS}).encode(), mode=mode)

    try:
        try:
            write("create")
        except FileExistsError:
            content = files.cat_file(path)
            left = json.loads(content)["until"] - time.time()
            if left > 0:
                raise TableError(f"{_locked_by(folder, content)}; its lease expires in {left:.0f} s") from None
            write("overwrite")
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        with repeat(LEASE_SECONDS / 4, lambda: write("overwrite")):
            yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(path)


def _locked_by(folder: Path | str, owner_json: bytes) -> str:
    owner = json.loads(owner_json or b"{}")
    by = f" by process {owner['process']} on {owner['host']} since {owner['since']}" if owner else ""
    return f"the table is being encoded{by}: wait for that run, or stop it first ({folder})"
