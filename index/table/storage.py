"""Where bytes live: this machine or an object store, under one set of options.

Tables go through Lance's own object stores, shards and reports through fsspec. Both are given the option names that
LanceDB documents (`aws_endpoint`, `aws_access_key_id`, ...); what is not given comes from each store's usual
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
"""Where the environment names an S3 endpoint; the last counts."""
# What s3fs calls the options that Lance calls otherwise.
S3_NAMES = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "aws_endpoint": "endpoint_url",
    "aws_region": "region_name",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """How to reach the object stores that URIs name. Pickled to workers, never written to a report."""

    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, given: Sequence[str] = ()) -> "Storage":
        """From `name=value` texts; the endpoint of the environment is noted, so that workers elsewhere know it."""
        options: dict[str, str] = {}
        for variable in ENDPOINTS:
            if variable in os.environ:
                options["aws_endpoint"] = os.environ[variable]
        for text in given:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise OptionError(f"--storage-option {text!r}: give name=value, for instance aws_region=eu-west-1")
            options[_canonical(name.lower())] = value
        if options.get("aws_endpoint", "").startswith("http://"):
            options.setdefault("allow_http", "true")
        return cls(tuple(sorted(options.items())))

    @property
    def lance(self) -> dict[str, str] | None:
        """As `storage_options` of Lance and LanceDB."""
        options = dict(self.options)
        if "aws_endpoint" in options:
            # Under this name it is heard before AWS_ENDPOINT_URL_S3 of the environment.
            options["aws_endpoint_url_s3"] = options["aws_endpoint"]
        return options or None

    def files(self, uri: str) -> tuple[Any, str]:
        """The fsspec file system of a URI, and the path in it; SourceError where its package is missing."""
        from fsspec.core import url_to_fs

        options: Mapping[str, Any] = {}
        if uri.startswith("s3://"):
            known = {theirs: value for ours, value in self.options if (theirs := S3_NAMES.get(ours))}
            region = known.pop("region_name", None)
            # Other processes write what we look for: a cached listing would hide it.
            options = {**known, "use_listings_cache": False, "client_kwargs": {"region_name": region} if region else {}}
        elif not is_local(uri):
            options = dict(self.options)
        try:
            files, path = url_to_fs(uri, **options)
        except (ImportError, ValueError) as error:
            raise SourceError(f"{uri} cannot be reached: {error}") from error
        return files, path

    def open(self, uri: str) -> Any:
        """An open binary file, to be used with `with`."""
        files, path = self.files(uri)
        return files.open(path, "rb")

    def exists(self, uri: str) -> bool:
        """Whether there is a file or folder."""
        files, path = self.files(uri)
        return bool(files.exists(path))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none where there is no folder."""
        files, path = self.files(folder)
        try:
            return sorted(name.rsplit("/", 1)[-1] for name in files.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read_json(self, uri: str) -> Any:
        """The content of a JSON file; None where there is none."""
        files, path = self.files(uri)
        try:
            return json.loads(files.cat_file(path))
        except FileNotFoundError:
            return None

    def write_json(self, uri: str, content: Any) -> None:
        """Write JSON so that a reader sees the old file or the new one, never a part; TableError where it cannot be."""
        self.write_text(uri, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, uri: str, text: str) -> None:
        """The same for any text."""
        try:
            if is_local(uri):
                write_text(Path(uri), text)
            else:
                files, path = self.files(uri)
                files.pipe_file(path, text.encode())
        except Exception as error:  # every object store has errors of its own
            raise unwritable(uri, error) from error

    def remove(self, uri: str) -> None:
        """Delete a file or folder with all that is in it, if it is there."""
        files, path = self.files(uri)
        if files.exists(path):
            files.rm(path, recursive=True)


def _canonical(name: str) -> str:
    """`endpoint_url`, `endpoint` and `aws_endpoint` are one option, as in Lance; other names stay as they are."""
    bare = name.removeprefix("aws_").removesuffix("_url")
    return f"aws_{bare}" if f"aws_{bare}" in S3_NAMES else name


def is_local(uri: str) -> bool:
    """Whether a URI is a path on this machine."""
    return "://" not in uri


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.write_text(text)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def unwritable(uri: str | Path, error: Exception) -> TableError:
    """Return the error for a target that cannot be written, whatever the reason."""
    return TableError(
        f"{uri} cannot be written ({one_line(error)}): check free space, permissions and --storage-option, or name "
        "another --table; rerun the same command to resume"
    )
