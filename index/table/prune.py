"""Remove what nothing needs any more: old versions of a table, files that only they refer to, and their tags.

Kept are the newest version, the last one with a complete index, versions that unfinished training runs began with and
those that targets were drawn from, versions that the user tagged or named, and the files of an unfinished encode run.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from index.background import look_up
from index.errors import OptionError, TableError
from index.table.ledger import ledger_uri
from index.table.lock import hold_lock
from index.table.readers import needed_versions
from index.table.storage import Storage
from index.table.table import INDEXED, Table, open_newest, rejects_uri, runs_folder
from index.table.targets import versions_with_targets
from index.table.weights import unneeded_weights

if TYPE_CHECKING:
    import lance

MAX_LISTED_FILES = 2**31
NO_VERSION = timedelta(days=36_500)
"""No version is older."""


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What was removed, or would be."""

    table: str
    dry_run: bool
    kept_versions: list[int]
    kept_because: dict[str, str]
    """Version -> why it is kept."""
    removed_versions: list[int]
    removed_tags: list[str]
    removed_files: int
    removed_bytes: int


def prune(table: Table, *, keep: Iterable[int] = (), dry_run: bool = False) -> PruneReport:
    """Remove old versions of a table and of its rejects and ledger, under the table's lock; report what is freed.

    `keep` names further versions to keep. Raises OptionError if one of them does not exist, TableError if the table
    is locked, or if an unfinished encode run needs files that are too old to be told from remains.
    """
    import lance

    with hold_lock(table.uri, table.storage, "prune") as lock:
        dataset = lance.dataset(table.uri, storage_options=table.storage.lance)
        versions = sorted(int(each["version"]) for each in dataset.versions())
        if unknown := sorted(set(keep) - set(versions)):
            raise OptionError(
                f"--keep-version {unknown[0]}: there is no such version, but {', '.join(map(str, versions))}"
            )
        _check_unfinished(table, [dataset, *_companions(table)])
        lock.check()
        reasons = _reasons(table, dataset, keep)
        tags = {name: tag["version"] for name, tag in dataset.tags.list().items() if name.startswith(INDEXED)}
        dropped = {name: version for name, version in tags.items() if version not in reasons}
        if not dry_run:
            for name in dropped:
                dataset.tags.delete(name)
            # A training run that has begun in the meantime has left its note by now.
            reasons = _reasons(table, dataset, keep)
            for name in [name for name, version in dropped.items() if version in reasons]:
                dataset.tags.create(name, dropped.pop(name))
        removed = [version for version in versions if version not in reasons]
        free = _preview if dry_run else _remove
        files, size = free(dataset, table.storage, removed)
        for place, weight_bytes in unneeded_weights(dataset, table.uri, table.storage, sorted(reasons)):
            if not dry_run:
                table.storage.remove(place)
            files, size = files + 1, size + weight_bytes
        for companion in _companions(table):
            newest = int(companion.version)
            older = [int(each["version"]) for each in companion.versions() if each["version"] != newest]
            more, more_bytes = free(companion, table.storage, older)
            files, size = files + more, size + more_bytes
    return PruneReport(
        table=table.uri,
        dry_run=dry_run,
        kept_versions=sorted(reasons),
        kept_because={str(version): reasons[version] for version in sorted(reasons)},
        removed_versions=removed,
        removed_tags=sorted(dropped),
        removed_files=files,
        removed_bytes=size,
    )


def _reasons(table: Table, dataset: "lance.LanceDataset", keep: Iterable[int]) -> dict[int, str]:
    """Return the versions to keep, and why."""
    versions = {int(each["version"]) for each in dataset.versions()}
    tags = dataset.tags.list()
    indexed = [tag["version"] for name, tag in tags.items() if name.startswith(INDEXED)]
    runs = needed_versions(table.uri, table.storage)
    reasons = {version: f"needed by the training run {run}" for version, run in runs.items()}
    drawn = versions_with_targets(table.uri, table.storage)
    reasons |= {
        version: f"needed by the targets {place}: delete them to release it" for version, place in drawn.items()
    }
    reasons |= {tag["version"]: f"tag {name}" for name, tag in tags.items() if not name.startswith(INDEXED)}
    reasons |= dict.fromkeys(keep, "--keep-version")
    if indexed:
        reasons[max(indexed)] = "the last complete index"
    reasons[int(dataset.version)] = "the newest"
    return {version: reason for version, reason in reasons.items() if version in versions}


def _companions(table: Table) -> Iterator["lance.LanceDataset"]:
    """Open the rejects and the ledger of a table, as far as they exist."""
    for uri in (rejects_uri(table.uri), ledger_uri(table.uri)):
        if (dataset := open_newest(uri, table.storage)) is not None:
            yield dataset


def _remove(dataset: "lance.LanceDataset", storage: Storage, removed: list[int]) -> tuple[int, int]:
    """Remove versions and what only they refer to; return the number of files and their bytes."""
    if not removed:
        return 0, 0
    done = dataset.cleanup_old_versions(versions=removed, error_if_tagged_old_versions=False)
    parts = ("data", "transaction", "index", "deletion")
    files = sum(int(getattr(done, f"{part}_files_removed")) for part in parts)
    return files + int(done.old_versions), int(done.bytes_removed)


def _preview(dataset: "lance.LanceDataset", storage: Storage, removed: list[int]) -> tuple[int, int]:
    """Return what `_remove` would; Lance's own preview passes over versions that still have their tags."""
    if not removed:
        return 0, 0
    kept = [int(each["version"]) for each in dataset.versions() if each["version"] not in removed]
    alone = _files_of(dataset, storage, removed) - _files_of(dataset, storage, kept) | _remains(dataset)
    files, root = storage.files(dataset.uri)
    sizes = {name.removeprefix(root).lstrip("/"): size for name, size in files.du(root, total=False).items()}
    found = {name: size for name, size in sizes.items() if name in alone or _folder(name) in alone}
    return len(found), sum(found.values())


def _files_of(dataset: "lance.LanceDataset", storage: Storage, versions: list[int]) -> set[str]:
    """Return the files that some versions refer to, and the folders of their indexes."""
    import lance

    paths = set[str]()
    for version in versions:
        opened = lance.dataset(dataset.uri, version=version, storage_options=storage.lance)
        paths.add(f"_versions/{2**64 - 1 - version}.manifest")
        if transaction := opened.read_transaction(version):
            paths.add(f"_transactions/{transaction.read_version}-{transaction.uuid}.txn")
        for index in opened.describe_indices():
            paths.update(f"_indices/{segment.uuid}" for segment in index.segments)
        for fragment in opened.get_fragments():
            content = fragment.metadata.to_json()
            paths.update(f"data/{file['path']}" for file in content["files"])
            if rows := content["deletion_file"]:
                ending = "arrow" if rows["file_type"] == "array" else "bin"
                paths.add(f"_deletions/{content['id']}-{rows['read_version']}-{rows['id']}.{ending}")
    return paths


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _check_unfinished(table: Table, datasets: Iterable["lance.LanceDataset"]) -> None:
    """Raise TableError if Lance would take files of an unfinished encode run for remains, as it does after a week."""
    folder = runs_folder(table.uri)
    files, root = table.storage.files(folder)
    needed = set[str]()
    # At any depth: each run has a folder of its own.
    names = [folder + name.removeprefix(root) for name in files.find(root) if name.endswith(".json")]
    for content in look_up(table.storage.read_json, names):
        needed.update(_paths(content))
    if needed and any(needed & {path.rpartition("/")[2] for path in _remains(each)} for each in datasets):
        raise TableError(
            f"an unfinished encode run ({folder}) needs files that are more than a week old, and they cannot be told "
            "from remains: rerun its command to finish it, or delete that folder to give it up"
        )


def _remains(dataset: "lance.LanceDataset") -> set[str]:
    """Return the files that no version refers to and that Lance removes, because they are more than a week old."""
    plan = dataset.explain_cleanup_old_versions(NO_VERSION, include_files=True, max_files=MAX_LISTED_FILES)
    return {"/".join(file.path.split("/")[-2:]) for file in plan.candidate_files if file.unverified}


def _paths(content: Any) -> Iterator[str]:
    """Return the names of data files in the JSON of a checkpoint."""
    if isinstance(content, dict):
        if isinstance(path := content.get("path"), str):
            yield path
        content = list(content.values())
    if isinstance(content, list):
        yield from itertools.chain.from_iterable(map(_paths, content))
