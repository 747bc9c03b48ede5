"""The members of a tar, read as a stream: every archive in the file, nothing half, and nothing larger than allowed.

`tarfile` parses the headers; this module decides what they mean. Unlike webdataset's iterator and tarfile's own, it
reads on after the end of an archive (`cat a.tar b.tar`), finds damaged headers and cuts between two members (an archive
ends with a block of zeros), follows hard links, and does not read what is too large.
"""

import contextlib
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.sample import ReadOptions

MEMBER = re.compile(r"(?P<key>(?:.*/|)[^./]+)\.(?P<extension>[^/]+)", re.DOTALL)
SPECIAL = re.compile(r"__[^/]*__($|/)")
END = tarfile.NUL * tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 2**20
"""Of a member's name and PAX records: a tar of bombs could state any length."""
SKIPPED_BYTES = 2**18
"""That are read at a time where a member is passed over."""


@dataclass(slots=True)
class Group:
    """Consecutive members of one key."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """Content by extension; empty for extensions that are not read."""
    fault: Rejected | None = None
    """Why the sample cannot be read, although the tar can."""
    size: int = 0
    """Of the content, in bytes."""


def read_groups(file: Any, extensions: set[str], links: "Links", options: ReadOptions) -> Iterator[Group]:
    """Yield consecutive members of one key; a repeated extension begins a new group.

    Only members with one of the `extensions` are read. Raises tarfile.ReadError if the tar is truncated or damaged: the
    last sample may then lack a member and is not yielded.
    """
    group: Group | None = None
    stream = Stream(file)
    try:
        for info in stream.headers():
            if info is None:  # the end of an archive: what comes then does not belong to its last sample
                if group is not None:
                    yield group
                group = None
                continue
            member = _parse_name(info)
            if member is None:
                continue
            key, extension = member
            if group is not None and (group.key != key or extension in group.members):
                yield group
                group = None
            group = group or Group(key)
            group.members[extension] = b""
            if extension in extensions and group.fault is None:
                try:
                    group.members[extension] = _content(stream, info, group, links, options)
                except Rejected as rejected:
                    group.fault = rejected
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        lost = f"; sample {group.key!r} may be incomplete and is skipped" if group else ""
        raise tarfile.ReadError(f"{error}{lost}") from error


def _parse_name(info: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return the key and the extension of a member; None for folders, hidden files and the like."""
    name = info.name.removeprefix("./")
    member = MEMBER.fullmatch(name)
    if member is None or SPECIAL.match(name) or not (info.isreg() or info.issym() or info.islnk()):
        return None
    return member["key"], member["extension"].lower()


def _content(stream: "Stream", info: tarfile.TarInfo, group: Group, links: "Links", options: ReadOptions) -> bytes:
    if info.issparse() or info.issym():
        what = "a sparse file" if info.issparse() else f"a symbolic link to {info.linkname!r}"
        raise Rejected(RejectReason.UNSUPPORTED_MEMBER, f"{info.name} is {what}: write the tar with its content")
    size = info.size
    if info.islnk():
        found = links.find(info.linkname)
        if found is None:
            detail = f"{info.name} is a hard link to {info.linkname!r}, which the tar does not hold"
            raise Rejected(RejectReason.UNSUPPORTED_MEMBER, detail)
        size = found[1]
    group.size += size
    if group.size > options.max_sample_bytes:
        raise Rejected(RejectReason.SAMPLE_TOO_LARGE, options.too_large(group.size))
    return links.read(*found) if info.islnk() and found else stream.read_member(info)


class Stream(io.RawIOBase):
    """The uncompressed bytes of a tar, read forward only."""

    def __init__(self, file: Any) -> None:
        """Read from an open file, gzipped or not."""
        self._file = _uncompressed(file)
        self._position, self._last, self._ahead = 0, b"", b""

    def headers(self) -> Iterator[tarfile.TarInfo | None]:
        """Yield the headers of all archives in the file, and None at the end of each.

        Raises tarfile.ReadError at a damaged header or a missing end.
        """
        while self._find_archive() or not self._position:  # of an empty file tarfile says what it misses
            with tarfile.open(fileobj=self, mode="r:") as archive:
                for info in archive:
                    # Or the headers of all members would stay in memory.
                    archive.members = []  # type: ignore[attr-defined]
                    if info.size < 0:
                        raise tarfile.ReadError(f"damaged at byte {info.offset:,}")
                    yield info
                if self._last != END:
                    raise tarfile.ReadError(f"truncated or damaged at byte {archive.offset:,}")
            yield None

    def read_member(self, info: tarfile.TarInfo) -> bytes:
        """Return the content of the member whose header was read last."""
        self.seek(info.offset_data)
        data = self._take(info.size)
        if len(data) < info.size:
            raise tarfile.ReadError(f"truncated at byte {self._position:,}")
        return data

    def read(self, size: int | None = -1) -> bytes:
        """Read a header; raises tarfile.ReadError if it states an absurd length."""
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes at byte {self._position:,}")
        self._last = self._take(size)
        return self._last

    def tell(self) -> int:
        """Return the position in the uncompressed bytes."""
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        """Skip to a later position; raises tarfile.ReadError for an earlier one, to which a damaged header may lead."""
        if position < self._position:
            raise tarfile.ReadError(f"damaged at byte {self._position:,}")
        can_seek = self._file.seekable() and not isinstance(self._file, gzip.GzipFile) and not self._ahead
        if can_seek and position > self._position + SKIPPED_BYTES:
            # Up to the last byte, which is read: beyond the end of a file a seek would succeed.
            self._file.seek(position - 1)
            self._position = position - 1
        while self._position < position:
            if not self._take(min(SKIPPED_BYTES, position - self._position)):
                raise tarfile.ReadError(f"truncated at byte {self._position:,}")
        return position

    def _find_archive(self) -> bool:
        """Skip zeros up to the next header, and return whether there is one."""
        while block := self._take(tarfile.BLOCKSIZE):
            if block.strip(tarfile.NUL):
                self._ahead, self._position = block, self._position - len(block)
                return True
        return False

    def _take(self, size: int) -> bytes:
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            data += self._file.read(size - len(data))
        self._position += len(data)
        return data


class Links:
    """What stands where in a tar, found by a second pass over its headers, which only unusual tars need."""

    def __init__(self, shard: str, extensions: set[str], options: ReadOptions) -> None:
        """Read nothing before it is needed."""
        self.shard, self.extensions, self.options = shard, extensions, options
        self._places: dict[str, tuple[int, int]] | None = None
        self._groups: dict[str, list[set[str]]] = {}
        self._file: Any = None

    def find(self, name: str) -> tuple[int, int] | None:
        """Return the offset and size of a regular member's content, or None."""
        return self._scan().get(name.removeprefix("./"))

    def read(self, offset: int, size: int) -> bytes:
        """Return the content at an offset of the uncompressed bytes."""
        if self._file is None:
            self._file = _uncompressed(self.options.storage.open(self.shard))
        self._file.seek(offset)
        data: bytes = self._file.read(size)
        return data

    def is_scattered(self, key: str) -> bool:
        """Return whether later members of a key add to its first group what that lacks."""
        self._scan()
        first, *others = self._groups.get(key, [set[str]()])
        return any(not other <= first for other in others)

    def close(self) -> None:
        """Close what was opened."""
        if self._file is not None:
            self._file.close()

    def _scan(self) -> dict[str, tuple[int, int]]:
        if self._places is not None:
            return self._places
        self._places, last = {}, ""
        with (
            self.options.storage.open(self.shard) as file,
            contextlib.suppress(tarfile.TarError, EOFError, zlib.error),  # the first pass comes to the same byte
        ):
            for info in Stream(file).headers():
                member = _parse_name(info) if info is not None else None
                if info is None or member is None or member[1] not in self.extensions:
                    continue
                if info.isreg() and not info.issparse():
                    self._places[info.name.removeprefix("./")] = (info.offset_data, info.size)
                key, extension = member
                groups = self._groups.setdefault(key, [])
                if last != key or not groups or extension in groups[-1]:
                    groups.append(set())
                groups[-1].add(extension)
                last = key
        return self._places


def _uncompressed(file: Any) -> Any:
    """Return a file of the uncompressed bytes; gzip is detected by its content."""
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_gzip else file
