"""A lease on an object store: an object that its holder rewrites, and that another takes over once it is left alone.

On S3 each write is conditional: the first creates the object, each later one replaces the version that was read. So of
two that take over an expired lease one wins, and a holder whose lease was taken over finds out. Whether a lease has
expired is judged by the store's clock alone, which gives the time of the last write and the time now; a holder gives
up by its own clock, from the moment before its last successful write. Of two clocks only the pace is compared.

fsspec offers conditional creation elsewhere, but no conditional replacement. There an abandoned lease is refused until
the user deletes it.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, runtime_checkable

from index.errors import one_line

EXPIRED = 1.25
"""A lease can be taken over after so many times its seconds; its holder gives up after once."""
CLOCK_STEP = 1.0
"""Stores tell times in whole seconds."""
CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "OperationAborted", "412", "409")
"""Error codes of S3 for a conditional write that came too late."""


class LeaseLostError(Exception):
    """The lease is not held any more; the message says why."""


class ConflictError(Exception):
    """Another writer has created or replaced the object."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it was read."""

    content: bytes
    etag: str
    age: float | None
    """Seconds since it was written, by the store's clock; None if the store does not tell."""


@runtime_checkable
class StoredObject(Protocol):
    """An object of a store. Each method raises OSError if the store cannot be reached or refuses."""

    def read(self) -> Stored | None:
        """Return the object, None if it does not exist."""

    def write(self, content: bytes, etag: str | None) -> str:
        """Create the object (etag None) or replace the version with this ETag, and return the new ETag.

        Raises ConflictError if another writer came first.
        """

    def delete(self, etag: str) -> None:
        """Delete the object, if it is the version with this ETag and the store can tell."""


class S3Object:
    """An object of S3, written with If-None-Match and If-Match."""

    def __init__(self, files: Any, path: str) -> None:
        """Take s3fs's file system and the path in it."""
        self.files, (self.bucket, self.key, _) = files, files.split_path(path)

    def read(self) -> Stored | None:
        """Return the object with its ETag and age, in one request."""
        from fsspec.asyn import sync

        async def get() -> Stored:
            answer = await self.files._call_s3("get_object", Bucket=self.bucket, Key=self.key)
            async with answer["Body"] as body:
                content = await body.read()
            now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            age = parsedate_to_datetime(now) - answer["LastModified"] if now else None
            return Stored(content, answer["ETag"], None if age is None else age.total_seconds())

        try:
            stored: Stored = sync(self.files.loop, get)
            return stored
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise OSError(one_line(error)) from error
            return None
        except Exception as error:
            raise _as_os_error(error) from error

    def write(self, content: bytes, etag: str | None) -> str:
        """Create or replace the object; the store compares the ETag."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            answer = self.files.call_s3(
                "put_object", Bucket=self.bucket, Key=self.key, Body=content, ContentLength=len(content), **condition
            )
        except Exception as error:
            gone = etag is not None and isinstance(error, FileNotFoundError)
            if gone or isinstance(error, FileExistsError) or _code(error) in CONFLICTS:
                raise ConflictError(one_line(error)) from error
            raise _as_os_error(error) from error
        return str(answer["ETag"])

    def delete(self, etag: str) -> None:
        """Delete the object; a store that knows If-Match for this compares the ETag."""
        try:
            self.files.call_s3("delete_object", Bucket=self.bucket, Key=self.key, IfMatch=etag)
        except Exception as error:
            raise _as_os_error(error) from error


class OtherObject:
    """An object of a store that creates conditionally, but replaces whatever there is."""

    def __init__(self, files: Any, path: str) -> None:
        """Take an fsspec file system and the path in it."""
        self.files, self.path = files, path

    def read(self) -> Stored | None:
        """Return the object; its content stands for an ETag, and its age is not known."""
        try:
            content: bytes = self.files.cat_file(self.path)
        except FileNotFoundError:
            return None
        return Stored(content, content.decode(errors="replace"), None)

    def write(self, content: bytes, etag: str | None) -> str:
        """Create the object, or replace it after a look at what it holds."""
        if etag is None:
            try:
                self.files.pipe_file(self.path, content, mode="create")
            except FileExistsError as error:
                raise ConflictError(one_line(error)) from error
            return content.decode()
        stored = self.read()
        if stored is None or stored.etag != etag:
            raise ConflictError("the object was replaced")
        self.files.pipe_file(self.path, content)
        return content.decode()

    def delete(self, etag: str) -> None:
        """Delete the object after a look at what it holds."""
        stored = self.read()
        if stored is not None and stored.etag == etag:
            self.files.rm_file(self.path)


class Lease:
    """A lease on an object; `record` says who holds it, and has a `token` that no other holder has."""

    def __init__(self, place: StoredObject, record: dict[str, Any], seconds: float) -> None:
        """Describe the lease; nothing is written before `acquire`."""
        self._place, self._record, self._seconds = place, record, seconds
        self._etag: str | None = None
        self._until = 0.0
        self._lost: str | None = None
        self._failure = ""
        self._writing = threading.Lock()

    def read(self) -> Stored | None:
        """Return the object as it is."""
        return self._place.read()

    def expired(self, stored: Stored) -> bool:
        """Return whether a holder has left its lease alone for so long that it has given up."""
        try:
            seconds = float(json.loads(stored.content)["lease_seconds"])
        except (ValueError, KeyError, TypeError):
            seconds = self._seconds
        return stored.age is not None and stored.age > seconds * EXPIRED + CLOCK_STEP

    def acquire(self) -> Stored | None:
        """Take the lease if it is free or has expired; return None, or the lease of another holder."""
        stored = self._place.read()
        if stored is not None and self._is_ours(stored):
            self._adopt(stored)
            return None
        if stored is not None and not self.expired(stored):
            return stored
        try:
            self._write(None if stored is None else stored.etag)
        except ConflictError:
            now = self._place.read()
            if now is None or not self._is_ours(now):
                return now or Stored(b"", "", 0.0)
            self._adopt(now)
        return None

    def _adopt(self, stored: Stored) -> None:
        """Hold a lease that was taken by a write whose answer was lost."""
        self._etag = stored.etag
        self._until = time.monotonic() + self._seconds - (stored.age or 0.0) - CLOCK_STEP

    def check(self) -> None:
        """Renew the lease now; raises LeaseLostError if it is not held, or was not renewed within its seconds."""
        self._renew()
        if self._lost is None and time.monotonic() >= self._until:
            raise LeaseLostError(f"it was not renewed for {self._seconds:.0f} s{self._failure}")
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease in a thread while the block runs, and release it afterwards.

        A renewal that fails is tried again, five times as often, until the lease is lost.
        """
        stop = threading.Event()

        def work() -> None:
            pause = self._seconds / 4
            while self._lost is None and not stop.wait(pause):
                pause = self._seconds / (4 if self._renew() else 20)

        thread = threading.Thread(target=work, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._release()

    def _release(self) -> None:
        """Delete the object if it is still ours: it was renewed a moment ago, so nobody may take it over."""
        if self._renew() and self._lost is None and self._etag is not None:
            with contextlib.suppress(OSError):
                self._place.delete(self._etag)

    def _renew(self) -> bool:
        """Renew the lease; return whether the store has answered."""
        if not self._writing.acquire(timeout=max(0.0, self._until - time.monotonic())):
            return False
        try:
            if self._lost is None:
                self._write(self._etag)
        except ConflictError:
            return self._settle()
        except OSError as error:
            self._failure = f": {one_line(error)}"
            return False
        finally:
            self._writing.release()
        return True

    def _settle(self) -> bool:
        """Find out who came first: another holder, or a renewal of ours whose answer was lost."""
        try:
            stored = self._place.read()
        except OSError as error:
            self._failure = f": {one_line(error)}"
            return False
        if stored is None or not self._is_ours(stored):
            self._lost = "another command took it over" if stored else "it was deleted"
            return True
        self._etag = stored.etag
        return False

    def _write(self, etag: str | None) -> None:
        """Write the object and move the time at which the lease ends; `renewal` makes each ETag a new one."""
        began = time.monotonic()
        self._etag = self._place.write(json.dumps(self._record | {"renewal": uuid.uuid4().hex}).encode(), etag)
        self._until, self._failure = began + self._seconds, ""

    def _is_ours(self, stored: Stored) -> bool:
        try:
            return bool(json.loads(stored.content)["token"] == self._record["token"])
        except (ValueError, KeyError, TypeError):
            return False


def lease_of(files: Any, path: str, *, record: dict[str, Any], seconds: float) -> Lease:
    """Return the lease at a path of an fsspec file system."""
    return Lease(stored_object(files, path), record, seconds)


def stored_object(files: Any, path: str) -> StoredObject:
    """Return the object at a path of an fsspec file system."""
    return S3Object(files, path) if "s3" in files.protocol else OtherObject(files, path)


def _code(error: BaseException | None) -> str | None:
    """Return the error code that S3 gave, of an exception or of what caused it."""
    while error is not None:
        response = getattr(error, "response", None) or {}  # errors of a connection have None
        if code := response.get("Error", {}).get("Code"):
            return str(code)
        error = error.__cause__
    return None


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(one_line(error, typed=True))
