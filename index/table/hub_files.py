"""Dataset repositories of the Hugging Face hub as a read-only file system, each at one commit, with few requests.

The hub allows 500 API calls in five minutes, and HfFileSystem makes some in every thread and process, for every file.
What a commit holds never changes: a folder is listed once per process, and a file that no listing has told of is asked
for by a HEAD request of its own, which is no API call.
"""

import contextlib
import re
import threading
from functools import lru_cache
from typing import Any

from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError

from index.background import look_up

PROTOCOL = "hf://"
DATASETS = "hf://datasets/"
COMMIT = re.compile("[0-9a-f]{40}")
_PINNED = re.compile(rf"{DATASETS}[^/@]+/[^/@]+@{COMMIT.pattern}(/|$)")
BLOCK_BYTES = 16 * 2**20
"""That one request reads of a file that is read from its begin to its end."""


def is_pinned(uri: str) -> bool:
    """Return whether a URI names a dataset repository at a commit."""
    return _PINNED.match(uri) is not None


@lru_cache(maxsize=1)
def hub_files() -> "HubFiles":
    """Return the file system of this process, for all of its threads."""
    return HubFiles(block_size=BLOCK_BYTES, skip_instance_cache=True)


class HubFiles(HfFileSystem):  # type: ignore[misc]
    """HfFileSystem for URIs that name a commit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._listing = threading.RLock()
        self._by_name: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._asked: dict[str, dict[str, Any] | None] = {}

    def _repo_and_revision_exist(self, *args: Any) -> tuple[bool, None]:
        """Return that there is such a commit: listing or opening its files tells if there is none."""
        return True, None

    def _ls_tree(self, path: str, *args: Any, **kwargs: Any) -> Any:
        with self._listing:  # the threads of a process would all list the same folder
            return super()._ls_tree(path, *args, **kwargs)

    def info(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return an entry of a listing; raises FileNotFoundError if there is no such file.

        A folder that no listing has told of counts as none: see `isdir`.
        """
        resolved = self.resolve_path(path)
        path = resolved.unresolve()
        if not resolved.path or path in self.dircache:
            return {"name": path, "size": 0, "type": "directory"}
        known = self._known(self._parent(path))
        if known is not None:
            if path not in known:
                raise FileNotFoundError(path)
            entry: dict[str, Any] = known[path]
            return entry
        if path not in self._asked:
            self._asked[path] = self._ask(path)
        if (answer := self._asked[path]) is None:
            raise FileNotFoundError(path)
        return answer

    def _known(self, folder: str) -> dict[str, Any] | None:
        """Return the entries of a folder that was listed, by name."""
        entries = self.dircache.get(folder)
        if entries is None:
            return None
        if folder not in self._by_name or self._by_name[folder][0] is not entries:
            self._by_name[folder] = entries, {entry["name"]: entry for entry in entries}
        return self._by_name[folder][1]

    def _ask(self, path: str) -> dict[str, Any] | None:
        try:
            found = get_hf_file_metadata(self.url(path), token=self.token, endpoint=self.endpoint)
        except EntryNotFoundError:
            return None
        return {"name": path, "size": found.size, "type": "file", "ETag": found.etag}

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Return whether there is a file or folder, by listing its folder; raises the hub's error if it fails."""
        return self._entry(path) is not None

    def isdir(self, path: str) -> bool:
        """Return whether there is a folder, by listing the one it is in; raises the hub's error if it fails."""
        entry = self._entry(path)
        return entry is not None and entry["type"] == "directory"

    def isfile(self, path: str) -> bool:
        """Return whether there is a file, without listing; raises the hub's error if it fails."""
        try:
            return bool(self.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def _entry(self, path: str) -> dict[str, Any] | None:
        path = self.resolve_path(path).unresolve()
        parent = self._parent(path)
        with contextlib.suppress(FileNotFoundError, EntryNotFoundError):
            if path not in self.dircache and "/" in path.partition("@")[2] and self._known(parent) is None:
                self._ls_tree(parent)
            return self.info(path)
        return None

    def url(self, path: str) -> str:
        """Return the URL of a file."""
        resolved = self.resolve_path(path)
        url: str = hf_hub_url(
            resolved.repo_id,
            resolved.path_in_repo,
            repo_type=resolved.repo_type,
            revision=resolved.revision,
            endpoint=self.endpoint,
        )
        return url

    def cat_ranges(
        self, paths: list[str], starts: Any, ends: Any, max_gap: Any = None, on_error: str = "return", **kwargs: Any
    ) -> list[Any]:
        """Read files or parts of them together; with `on_error="return"`, the content of one may be its exception."""

        def read(position: int) -> Any:
            start, end = (each[position] if isinstance(each, list) else each for each in (starts, ends))
            try:
                return self.cat_file(paths[position], start, end)
            except Exception as error:  # the hub client raises exceptions of any class
                if on_error == "return":
                    return error
                raise

        return list(look_up(read, range(len(paths))))
