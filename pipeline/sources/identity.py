"""What a listing tells of a file's content, without reading it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.sources.sample import ReadOptions, path_of

HASHES = ("ETag", "etag", "Content-MD5", "content_md5", "md5Hash")
TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")


class FileInfo(NamedTuple):
    """What a file system tells of a file."""

    size: int | None
    hash: str
    """That the store gives; empty if it gives none."""
    time: str
    """Of the last change; empty if it is not known."""
    is_link: bool

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "FileInfo":
        """Parse an entry of an fsspec listing."""
        content = (info.get("lfs") or {}).get("sha256") or info.get("blob_id")  # of the hub, the same as its ETag
        digest = content or next((str(info[name]).strip('"') for name in HASHES if info.get(name)), "")
        time = next((info[name] for name in TIMES if info.get(name)), "")
        # Local files: seconds as a float, which holds microseconds.
        text = str(round(time * 1e6)) if isinstance(time, float) else str(time)
        return cls(info.get("size"), digest, text, bool(info.get("islink")))

    @property
    def state(self) -> str:
        """A text that differs if the content does."""
        return f"{self.size}:{self.hash or self.time}"


def file_identity(uri: str, options: ReadOptions) -> str:
    """Return a text that tells a file's content, wherever the file is: its size and the hash that its store gives.

    Without a hash, it is told by its name, size and time of change.
    """
    files, path = options.storage.files(uri)
    info = FileInfo.of(files.info(path))
    return info.state if info.hash else f"{path_of(uri).rsplit('/', 1)[-1]}:{info.state}"
