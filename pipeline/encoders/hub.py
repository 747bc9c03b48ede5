"""Repositories of the Hugging Face hub: find the commit, fetch some of its files, check them.

Next to a repository in the hub cache stands what is known of it: the list of files of each commit, so that later
commands and workers make no request, and which files were compared with the SHA-256 that the hub gives.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from index.errors import CoalescerError
from index.reach import retried
from index.terminal import print_status
from pipeline.encoders.hub_errors import explain, is_away
from pipeline.encoders.hub_names import HubName, Kind

COMMIT, SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
NOTES = ".coalescer"
"""The folder of what is known of a repository, in its folder of the hub cache."""


class Snapshot(NamedTuple):
    """A repository at one commit, in the hub cache."""

    hub: HubName
    commit: str
    files: list[str]
    """All files of the commit, or of it those in the cache if the hub was not asked."""
    is_whole: bool
    """Whether `files` are all."""
    cache: Path
    """The folder of the repository in the hub cache."""

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.cache / "snapshots" / self.commit

    def doubt(self, error: CoalescerError) -> CoalescerError:
        """Return an error about what the commit lacks, with the doubt that is due if the hub was not asked."""
        if self.is_whole:
            return error
        return type(error)(
            f"{error} (of {self.hub} only the cache was read, which may hold it in part: unset HF_HUB_OFFLINE, or "
            "check the connection)"
        )


def open_snapshot(hub: HubName, kind: Kind) -> Snapshot:
    """Find the commit of a revision and its list of files, without a request if a command has asked for it before.

    Raises the error of `kind`, with what to type, if the repository cannot be read.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=hub.repository, repo_type="model")
    known = _in_cache(hub, cache)
    if known and (constants.HF_HUB_OFFLINE or (known.is_whole and known.commit == hub.revision)):
        return known
    if constants.HF_HUB_OFFLINE:
        raise explain(OfflineModeIsEnabled(), hub, kind)
    try:
        info = retried(str(hub), lambda: HfApi().model_info(hub.repository, revision=hub.revision, timeout=30))
    except Exception as error:  # the hub client raises exceptions of many classes
        if known and is_away(error):
            print_status(f"the hub is out of reach: {hub} is taken from the cache, at commit {known.commit}")
            return known
        raise explain(error, hub, kind) from error
    files = [each.rfilename for each in info.siblings or ()]
    _write(cache / NOTES / f"{info.sha}.json", json.dumps(files))
    return Snapshot(hub, str(info.sha), files, True, cache)


def fetch(snapshot: Snapshot, files: Sequence[str], kind: Kind) -> None:
    """Make sure that files of a snapshot are in the cache and are what the hub has.

    Raises the error of `kind`, with what to type, if one cannot be fetched or is damaged.
    """
    for file in files:
        if not (snapshot.folder / file).exists():
            _download(snapshot, file, kind)
        if _is_damaged(snapshot, file):
            print_status(f"{file} of {snapshot.hub.at('')} is damaged: fetching it again")
            _download(snapshot, file, kind, force_download=True)
            if _is_damaged(snapshot, file):
                raise kind.error(
                    f"{file} of {snapshot.hub.at('')} arrives damaged: its SHA-256 is not the one that the hub names; "
                    f"check the disk of {snapshot.cache} and the connection, then rerun the command"
                )
    revision = snapshot.hub.revision or "main"
    ref = snapshot.cache / "refs" / revision
    if revision != snapshot.commit and (not ref.is_file() or ref.read_text() != snapshot.commit):
        _write(ref, snapshot.commit)


def _in_cache(hub: HubName, cache: Path) -> Snapshot | None:
    """Return what the cache holds of a revision, with all files of its commit if a command has asked for them."""
    commit = hub.revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (cache / "refs" / commit).read_text().strip()
        except OSError:
            return None
    with contextlib.suppress(OSError, ValueError):
        return Snapshot(hub, commit, json.loads((cache / NOTES / f"{commit}.json").read_text()), True, cache)
    folder = cache / "snapshots" / commit
    if not folder.is_dir():
        return None
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return Snapshot(hub, commit, files, False, cache)


def _download(snapshot: Snapshot, file: str, kind: Kind, **options: Any) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    whole = HubName(snapshot.hub.repository, revision=snapshot.commit)
    if constants.HF_HUB_OFFLINE:
        raise explain(OfflineModeIsEnabled(), whole, kind, file)
    try:
        retried(
            f"{file} of {whole}",
            lambda: hf_hub_download(whole.repository, file, revision=snapshot.commit, **options),
        )
    except Exception as error:  # of the hub client, of HTTP libraries, of the disk
        raise explain(error, whole, kind, file) from error


def _is_damaged(snapshot: Snapshot, file: str) -> bool:
    """Return whether a large file differs from its SHA-256; computed once per file as it is on the disk.

    The cache names a large file by the SHA-256 that the hub gives for it; the hub client compares the size alone.
    """
    path = snapshot.folder / file
    if not path.is_symlink():
        return False
    blob = Path(os.path.abspath(path.parent / os.readlink(path)))
    if not (SHA256.fullmatch(blob.name) and blob.parent.name == "blobs"):
        return False
    stat, note = blob.stat(), snapshot.cache / NOTES / blob.name
    state = f"{stat.st_size} {stat.st_mtime_ns}"
    with contextlib.suppress(OSError):
        if note.read_text() == state:
            return False
    with blob.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != blob.name:
            return True
    _write(note, state)
    return False


def _write(path: Path, text: str) -> None:
    """Write a small file at once for all readers; not in a cache that cannot be written, where it is missed only."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
