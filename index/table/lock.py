"""One writer at a time per table: DB/NAME.lock, which says who holds it. Readers never wait.

On a file system the kernel locks the file and frees it when the holder's process ends, however that ends; a process
that is slow keeps it. The file's time is the holder's heartbeat. It also guards mounts whose locks do not reach other
hosts: a lock that the kernel grants is refused as long as the file has the fresh heartbeat of another host. On object
stores the lock is a lease (`index.table.lease`).

A holder calls `Lock.check` right before it publishes: a lock can be lost, to a deleted file or to a lease that could
not be renewed.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index.background import repeat
from index.errors import LockedError, TableError, one_line
from index.table.lease import EXPIRED, LeaseLostError, lease_of
from index.table.storage import Storage, is_local, unwritable

LEASE_SECONDS = 60.0
"""Without a renewal for so long a holder gives up its lease; a heartbeat older than this is of a host that is gone."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that is held. Copies that are pickled to other processes can check it, but not renew it."""

    uri: str
    """DB/NAME.lock."""
    token: str
    """Tells this holder from all others."""
    storage: Storage
    _check: Callable[[], str | None] | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without what renews the lock."""
        return Lock, (self.uri, self.token, self.storage)

    def check(self) -> None:
        """Raise TableError if the lock was lost, so that the caller publishes nothing."""
        if reason := self._check() if self._check is not None else _lost_elsewhere(self):
            raise TableError(f"the lock {self.uri} was lost ({reason}): nothing is published; rerun the same command")


@contextlib.contextmanager
def hold_lock(uri: str, storage: Storage, purpose: str = "encode") -> Iterator[Lock]:
    """Hold the lock of a table (DB/NAME.lance) or of a folder while the block runs; `purpose` names the command.

    Raises LockedError if another process holds it, which names that process, TableError if it cannot be written.
    """
    record = {
        "token": uuid.uuid4().hex,
        "purpose": purpose,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "lease_seconds": LEASE_SECONDS,
    }
    with _hold_file(uri, record, storage) if is_local(uri) else _hold_lease(uri, record, storage) as lock:
        yield lock


def lock_holder(uri: str, storage: Storage) -> str | None:
    """Return who holds the lock of a table or folder, for a message; None if nobody does, though its file may be left.

    Raises TableError if an object store cannot be reached.
    """
    place = lock_uri(uri)
    if is_local(uri):
        return _file_holder(Path(place))
    lease = lease_of(*storage.files(place), record={}, seconds=LEASE_SECONDS)
    try:
        stored = lease.read()
    except OSError as error:
        raise unwritable(place, error) from error
    return None if stored is None or lease.expired(stored) else _holder(_parsed(stored.content))


def _file_holder(path: Path) -> str | None:
    import fcntl

    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    record = _read(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = not _beats_elsewhere(path, socket.gethostname())
    except BlockingIOError:
        is_free = False
    finally:
        os.close(file)
    return None if is_free else _holder(record)


def lock_uri(uri: str) -> str:
    """Return DB/NAME.lock of a table DB/NAME.lance, FOLDER/lock of any other folder."""
    return f"{uri.removesuffix('.lance')}.lock" if uri.endswith(".lance") else f"{uri}/lock"


@contextlib.contextmanager
def _hold_file(uri: str, record: dict[str, Any], storage: Storage) -> Iterator[Lock]:
    path = Path(lock_uri(uri))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock_file(path)
        if file is None:
            raise LockedError(_locked_by(uri, _read(path), _heartbeat(path)))
        if _beats_elsewhere(path, record["host"]):
            os.close(file)
            age = _heartbeat(path)
            raise LockedError(_locked_by(uri, _read(path), age), LEASE_SECONDS * EXPIRED - age)
        try:
            os.truncate(file, 0)
            os.pwrite(file, json.dumps(record).encode(), 0)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        raise unwritable(path, error) from error

    def beat() -> None:
        with contextlib.suppress(OSError):
            os.utime(file)

    def check() -> str | None:
        return None if _is_at(file, path) else f"{path} was deleted or replaced"

    try:
        with repeat(LEASE_SECONDS / 4, beat):
            yield Lock(str(path), record["token"], storage, check)
    finally:
        # While it is locked: who opened it before finds afterwards that it is gone, and opens the next one.
        if _is_at(file, path):
            path.unlink()
        os.close(file)
        if not uri.endswith(".lance"):
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _lock_file(path: Path) -> int | None:
    """Lock the file at `path` and return its descriptor; None if another process holds it."""
    import fcntl

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            os.close(file)
            raise
        if _is_at(file, path):
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _beats_elsewhere(path: Path, host: str) -> bool:
    """Return whether a lock that the kernel grants has the fresh heartbeat of another host."""
    record = _read(path)
    return bool(record) and record.get("host") != host and _heartbeat(path) < LEASE_SECONDS * EXPIRED


def _heartbeat(path: Path) -> float:
    """Return the seconds since the last heartbeat by the clock of the file system, not by those of two hosts."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as now:
        now.write(b"\0")
        now.flush()
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    return 0.0


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        return _parsed(path.read_bytes())
    return {}


@contextlib.contextmanager
def _hold_lease(uri: str, record: dict[str, Any], storage: Storage) -> Iterator[Lock]:
    place = lock_uri(uri)
    lease = lease_of(*storage.files(place), record=record, seconds=LEASE_SECONDS)
    try:
        holder = storage.reached(place, lease.acquire)
    except OSError as error:
        raise unwritable(place, error) from error
    if holder is not None:
        record = _parsed(holder.content)
        seconds = 0.0 if holder.age is None else _lease_seconds(record) - holder.age
        raise LockedError(_locked_by(uri, record, holder.age, expires=True), max(0.0, seconds))

    def check() -> str | None:
        try:
            lease.check()
        except LeaseLostError as error:
            return str(error)
        return None

    with lease.renewed():
        yield Lock(place, record["token"], storage, check)


def _lost_elsewhere(lock: Lock) -> str | None:
    """Return why a lock that another process holds is lost; None if it is held."""
    if is_local(lock.uri):
        path = Path(lock.uri)
        if _read(path).get("token") != lock.token:
            return "another command holds it, or none"
        file = _lock_file(path)
        if file is None:
            return None
        os.close(file)
        return "its holder has ended"
    lease = lease_of(*lock.storage.files(lock.uri), record={}, seconds=LEASE_SECONDS)
    try:
        stored = lease.read()
    except OSError as error:
        return one_line(error)
    if stored is None or _parsed(stored.content).get("token") != lock.token:
        return "another command holds it, or none"
    return "its lease has expired" if lease.expired(stored) else None


def _locked_by(uri: str, record: dict[str, Any], age: float | None, *, expires: bool = False) -> str:
    """Return the message for a lock that is taken: who holds it, since when, and when it may become free."""
    who = _holder(record)
    if not expires:
        heard = f"; last heartbeat {max(age or 0.0, 0.0):.0f} s ago"
    elif age is None:
        heard = f"; if that command is gone, delete {lock_uri(uri)}"
    else:
        heard = f"; unless it is renewed, its lease expires in {max(_lease_seconds(record) - age, 0):.0f} s"
    return f"{uri} is locked by {who}: wait for that command, or stop it first (lock: {lock_uri(uri)}{heard})"


def _holder(record: dict[str, Any]) -> str:
    if not record:
        return "another command"
    purpose, process, host = (record.get(name, "?") for name in ("purpose", "process", "host"))
    return f"{purpose}, process {process} on {host} since {record.get('since', '?')}"


def _lease_seconds(record: dict[str, Any]) -> float:
    """Return the age at which a lease can be taken over."""
    return float(record.get("lease_seconds", LEASE_SECONDS)) * EXPIRED


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the record of a lock; empty if it is half written."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
