"""Read the images that rows of a dataset name by path instead of holding their bytes, if they are in the dataset."""

import os

from index.table.storage import Storage
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.sample import ReadOptions

ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lzma", "zstd", "lz4")
"""Protocols that may stand before `::` in the path of an image."""


def read_image(root: str, path: str, max_bytes: int) -> bytes | None:
    """Read an image of the dataset at `root`, which may be in an archive; None if the path is outside the dataset.

    `root` is a folder, or a repository of the hub at its commit. Raises Rejected if it is larger than `max_bytes`.
    """
    import fsspec

    if not is_inside(root, path):
        return None
    is_chain_or_local = "::" in path or "://" not in path
    with fsspec.open(path, "rb") if is_chain_or_local else Storage().open(path) as file:
        data: bytes = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Rejected(RejectReason.SAMPLE_TOO_LARGE, ReadOptions(max_sample_bytes=max_bytes).too_large(None))
    return data


def is_inside(root: str, path: str) -> bool:
    """Return whether a path that a row holds leads to a file of the dataset, through archives only.

    fsspec opens a chain `a::b::c` from its end, but any link may name another store: `file:///secret::hf://...`.
    """
    *archives, origin = path.split("::")
    if any(link.partition("://")[0] not in ARCHIVES for link in archives):
        return False
    if "://" not in root:
        return os.path.realpath(origin).startswith(os.path.join(os.path.realpath(root), ""))
    return origin.startswith(root.partition("@")[0] + "@") and ".." not in origin.split("/")
