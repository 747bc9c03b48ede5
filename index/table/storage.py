"""Local files and object stores behind one set of options, and files that are written whole.

Tables go through Lance's own object stores, shards and reports through fsspec. Both get the same options, and both wait
for a store that is away.
"""

import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from index.errors import CoalescerError, OptionError, OutOfReachError, SourceError, TableError, one_line
from index.reach import LISTING_SECONDS, RETRY_SECONDS, Patience, describe, is_denied, is_store_failure, status_of
from index.table.store_options import SECRETS, fsspec_options, lance_options, parse_options

T = TypeVar("T")

SECRET_VARIABLE = "COALESCER_SECRET_"
LANCE_RETRIES = 100
"""Lance pauses between its attempts as we do; the seconds end them, not this number."""
HTTP = ("http://", "https://")
READ_SECONDS = 60.0
"""A web server that sends nothing for so long counts as away."""

NO_SUCH_RANGE = 416
"""HTTP status."""

_answered: set[str] = set()
"""Stores that have answered in this process: a mistake in their address is not what keeps them away."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How to reach the object stores of URIs. Its options are never written or shown.

    Pickled to workers without its secrets, so that no job graph holds them: a worker finds those in its environment,
    which local workers inherit, or under their usual names such as AWS_SECRET_ACCESS_KEY.
    """

    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    patience: float | None = field(default=None, compare=False)
    """Seconds that a store which is away is waited for; None: as long as index.reach says."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle names and values, but of secrets the environment variable that holds the value."""
        options = tuple((name, *_hidden(name, value)) for name, value in self.options)
        return _unpickled, (options, self.patience, tuple(_answered))

    @classmethod
    def of(cls, texts: Sequence[str] = (), patience: float | None = None) -> "Storage":
        """Parse `name=value` texts; the environment's endpoint is included, for workers on other machines.

        Raises OptionError if a text has no name or no `=`, or if its name is unknown. `patience` is in seconds.
        """
        return cls(tuple(sorted(parse_options(texts).items())), patience)

    @property
    def lance(self) -> dict[str, str]:
        """The `storage_options` of Lance and LanceDB."""
        seconds = RETRY_SECONDS if self.patience is None else self.patience
        # Lance's own patience is half a second.
        retries = {"client_max_retries": str(LANCE_RETRIES), "client_retry_timeout": f"{max(1, round(seconds))}"}
        return retries | lance_options(dict(self.options))

    def files(self, uri: str) -> tuple[Any, str]:
        """Return the fsspec file system of a URI, and the path in it.

        Raises SourceError if the package of its protocol is not installed.
        """
        from fsspec.core import url_to_fs

        if uri.startswith("hf://"):
            from index.table.hub_files import hub_files, is_pinned

            if is_pinned(uri):
                return hub_files(), uri.removeprefix("hf://")
        options = fsspec_options(uri, dict(self.options))
        if uri.startswith(HTTP):
            from aiohttp import ClientTimeout

            # By default a shard that takes more than five minutes in all counts as away, however large it is.
            options = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=READ_SECONDS, sock_read=READ_SECONDS)}}
        try:
            files, path = url_to_fs(uri, **options)
        except (ImportError, ValueError) as error:
            raise SourceError(f"{uri} cannot be reached: {error}") from error
        return files, path

    def open(self, uri: str) -> Any:
        """Open a file for reading bytes, as a context manager."""
        files, path = self.files(uri)
        return files.open(path, "rb")

    def exists(self, uri: str) -> bool:
        """Return whether there is a file or folder."""
        files, path = self.files(uri)
        if not uri.startswith(HTTP):
            return bool(self.reached(uri, lambda: files.exists(path)))
        try:
            # `exists` of fsspec says no for any failure.
            self.reached(uri, lambda: files.info(path))
        except FileNotFoundError as error:
            if is_denied(error):
                return False
            raise
        return True

    def names(self, folder: str) -> list[str]:
        """List the names of a folder's files, sorted; empty if there is no folder.

        Raises SourceError if there is no such bucket.
        """
        files, path = self.files(folder)
        try:
            listed = self.reached(folder, lambda: files.ls(path, detail=False))
        except FileNotFoundError as error:
            self.check_bucket(folder, error)
            return []
        return sorted(name.rsplit("/", 1)[-1] for name in listed)

    def check_bucket(self, uri: str, error: BaseException | None = None) -> None:
        """Raise SourceError if there is no such bucket or container; `error` is what said that a folder is missing."""
        if is_local(uri) or uri.startswith(HTTP):
            return
        files, path = self.files(uri)
        exists = "NoSuchBucket" not in f"{error} {error and error.__cause__!r}"
        if exists:
            with contextlib.suppress(Exception):  # a key may be allowed to list a folder, but not its bucket
                exists = bool(files.exists(path.lstrip("/").partition("/")[0]))
        if not exists:
            bucket = "/".join(uri.split("/")[:3])
            raise SourceError(f"{bucket} does not exist (NoSuchBucket): create it, or correct the name") from error

    def read_json(self, uri: str) -> Any:
        """Read a JSON file; None if there is none."""
        content = self.read_bytes(uri)
        return None if content is None else json.loads(content)

    def read_bytes(self, uri: str) -> bytes | None:
        """Read a file; None if there is none."""
        files, path = self.files(uri)
        # Without a start, s3fs asks for the size first. By keyword: its second argument is the version of an object.
        start = 0 if uri.startswith("s3://") else None
        try:
            return bytes(self.reached(uri, lambda: files.cat_file(path, start=start)))
        except FileNotFoundError as error:
            if is_denied(error):
                return None
            raise
        except OSError as error:
            if status_of(error) == NO_SUCH_RANGE:  # of an empty file
                return b""
            raise

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """Read the bytes of a file from `start` up to `stop`."""
        files, path = self.files(uri)
        # Some stores refuse a range of nothing.
        return bytes(self.reached(uri, lambda: files.cat_file(path, start=start, end=stop))) if stop > start else b""

    def write_json(self, uri: str, content: Any) -> None:
        """Write JSON atomically; raises TableError if that fails."""
        self.write_text(uri, _indented(content))

    def write_text(self, uri: str, text: str) -> None:
        """Write text atomically: readers see the old file or the new one. Raises TableError if that fails."""
        self.write_bytes(uri, text.encode())

    def write_bytes(self, uri: str, content: bytes) -> None:
        """Write a file atomically: readers see the old file or the new one. Raises TableError if that fails."""
        try:
            if is_local(uri):
                write_bytes(Path(uri), content)
            else:
                files, path = self.files(uri)
                self.reached(uri, lambda: files.pipe_file(path, content))
        except CoalescerError:
            raise
        except Exception as error:  # every object store has errors of its own
            raise unwritable(uri, error) from error

    def remove(self, uri: str) -> None:
        """Delete a file, or a folder with its content, if it exists."""
        files, path = self.files(uri)
        if self.exists(uri):
            try:
                self.reached(uri, lambda: files.rm(path, recursive=True))
            except FileNotFoundError:
                if self.exists(uri):  # the answer to an attempt that has deleted it may be lost
                    raise

    def remove_file(self, uri: str) -> None:
        """Delete one file if it exists, without asking whether it does."""
        files, path = self.files(uri)
        with contextlib.suppress(FileNotFoundError):
            self.reached(uri, lambda: files.rm_file(path))

    def reached(self, uri: str, call: Callable[[], T]) -> T:
        """Return the result of a call, which is repeated while the store is away.

        Raises OutOfReachError if it stays away, earlier if it has never answered: its address may be wrong. Any other
        answer raises what the file system makes of it.
        """
        if is_local(uri):
            return call()
        store = "/".join(uri.split("/")[:3])
        patience = Patience(uri, limit=self._limit(store))
        while True:
            try:
                result = call()
            except Exception as error:
                if not is_store_failure(error) or is_denied(error) or isinstance(error, FileExistsError):
                    raise
                if patience.seconds_left(error) <= 0:
                    raise OutOfReachError(
                        f"{uri} cannot be reached ({describe(error)}): check the address, the credentials and "
                        "--storage-option, then rerun the same command"
                    ) from error
                patience.wait(error)
            else:
                _answered.add(store)
                return result

    def _limit(self, store: str) -> float | None:
        if self.patience is not None:
            return self.patience
        return RETRY_SECONDS if store in _answered else LISTING_SECONDS


def unwritable(uri: str | Path, error: Exception) -> TableError:
    """Return the error for a target that cannot be written."""
    if not is_local(str(uri)):
        return TableError(
            f"{uri} cannot be written ({describe(error)}): check that the bucket exists, the credentials, the region "
            "and the endpoint (--storage-option), and that the key may write; rerun the same command to resume"
        )
    return TableError(
        f"{uri} cannot be written ({one_line(error)}): check free space, permissions and --storage-option, or name "
        "another --table; rerun the same command to resume"
    )


def _hidden(name: str, value: str) -> tuple[str, bool]:
    """Return an option's value and False, or for a secret the environment variable that now holds it and True."""
    if not any(part in name for part in SECRETS):
        return value, False
    variable = SECRET_VARIABLE + hashlib.sha256(f"{name}={value}".encode()).hexdigest()[:16]
    os.environ[variable] = value
    return variable, True


def _unpickled(
    options: tuple[tuple[str, str, bool], ...], patience: float | None, answered: tuple[str, ...]
) -> Storage:
    _answered.update(answered)
    profile = next((value for name, value, _ in options if name == "aws_profile"), None)
    if profile is not None:
        os.environ["AWS_PROFILE"] = profile
    revealed = tuple((name, _revealed(name, value) if hidden else value) for name, value, hidden in options)
    return Storage(revealed, patience)


def _revealed(name: str, variable: str) -> str:
    value = os.environ.get(variable, os.environ.get(name.upper()))
    if value is None:
        raise OptionError(
            f"a worker on {socket.gethostname()} lacks the secret --storage-option {name}, which no job graph holds: "
            f"set {name.upper()} in the environment of the workers"
        )
    return value


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return "://" not in uri


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a local file atomically."""
    write_text(path, _indented(content))


def write_text(path: Path, text: str) -> None:
    """Write text to a local file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a local file atomically: to a temporary file in its folder, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _indented(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
