"""Local files and object stores behind one set of options, and files that are written whole.

Tables go through Lance's own object stores, shards and reports through fsspec. Both get the option names that LanceDB
documents (`aws_endpoint`, `aws_access_key_id`, ...); each store reads options that are not set from its usual
environment variables and credential files.
"""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.errors import OptionError, SourceError, TableError, one_line

ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Environment variables of an S3 endpoint; the last that is set wins."""
S3_NAMES = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "aws_endpoint": "endpoint_url",
    "aws_region": "region_name",
}
"""Lance's name of an option -> that of s3fs."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How to reach the object stores of URIs. Pickled to workers, never written to a report."""

    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, texts: Sequence[str] = ()) -> "Storage":
        """Parse `name=value` texts; the environment's endpoint is included, for workers on other machines.

        Raises OptionError if a text has no name or no `=`.
        """
        options: dict[str, str] = {}
        for variable in ENDPOINTS:
            if variable in os.environ:
                options["aws_endpoint"] = os.environ[variable]
        for text in texts:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise OptionError(
                    f"--storage-option {text!r} is not of the form name=value: for instance aws_region=eu-west-1"
                )
            options[_canonical(name.lower())] = value
        if options.get("aws_endpoint", "").startswith("http://"):
            options.setdefault("allow_http", "true")
        return cls(tuple(sorted(options.items())))

    @property
    def lance(self) -> dict[str, str] | None:
        """The `storage_options` of Lance and LanceDB."""
        options = dict(self.options)
        if "aws_endpoint" in options:
            # Under this name it wins over AWS_ENDPOINT_URL_S3 of the environment.
            options["aws_endpoint_url_s3"] = options["aws_endpoint"]
        return options or None

    def files(self, uri: str) -> tuple[Any, str]:
        """Return the fsspec file system of a URI, and the path in it.

        Raises SourceError if the package of its protocol is not installed.
        """
        from fsspec.core import url_to_fs

        options: Mapping[str, Any] = {}
        if uri.startswith("s3://"):
            renamed = {S3_NAMES[name]: value for name, value in self.options if name in S3_NAMES}
            region = renamed.pop("region_name", None)
            # Other processes write the files that we look for: a cached listing would hide them.
            client = {"region_name": region} if region else {}
            options = {**renamed, "use_listings_cache": False, "client_kwargs": client}
        elif not is_local(uri) and not uri.startswith(("http://", "https://")):
            # The options of S3, which the environment may set, mean nothing to other stores.
            options = {k: v for k, v in self.options if not k.startswith("aws_") and k != "allow_http"}
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
        return bool(files.exists(path))

    def names(self, folder: str) -> list[str]:
        """List the names of a folder's files, sorted; empty if there is no folder."""
        files, path = self.files(folder)
        try:
            return sorted(name.rsplit("/", 1)[-1] for name in files.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read_json(self, uri: str) -> Any:
        """Read a JSON file; None if there is none."""
        files, path = self.files(uri)
        try:
            return json.loads(files.cat_file(path))
        except FileNotFoundError:
            return None

    def write_json(self, uri: str, content: Any) -> None:
        """Write JSON atomically; raises TableError if that fails."""
        self.write_text(uri, _indented(content))

    def write_text(self, uri: str, text: str) -> None:
        """Write text atomically: readers see the old file or the new one. Raises TableError if that fails."""
        try:
            if is_local(uri):
                write_text(Path(uri), text)
            else:
                files, path = self.files(uri)
                files.pipe_file(path, text.encode())
        except Exception as error:  # every object store has errors of its own
            raise unwritable(uri, error) from error

    def remove(self, uri: str) -> None:
        """Delete a file, or a folder with its content, if it exists."""
        files, path = self.files(uri)
        if files.exists(path):
            files.rm(path, recursive=True)


def unwritable(uri: str | Path, error: Exception) -> TableError:
    """Return the error for a target that cannot be written."""
    return TableError(
        f"{uri} cannot be written ({one_line(error)}): check free space, permissions and --storage-option, or name "
        "another --table; rerun the same command to resume"
    )


def _canonical(name: str) -> str:
    """Map `endpoint_url`, `endpoint` and `aws_endpoint` to one name, as Lance does; other names are unchanged."""
    bare = name.removeprefix("aws_").removesuffix("_url")
    return f"aws_{bare}" if f"aws_{bare}" in S3_NAMES else name


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return "://" not in uri


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a local file atomically."""
    write_text(path, _indented(content))


def write_text(path: Path, text: str) -> None:
    """Write text to a local file atomically: to a temporary file in its folder, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _indented(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
