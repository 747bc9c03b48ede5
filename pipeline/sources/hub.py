"""Name datasets of the Hugging Face hub, pin them to a commit, and say what is wrong if that fails.

`hf:NAME` is a dataset as `datasets` understands it, with configurations and splits (streamed.py). `hf://datasets/NAME/PATH`
are files of its repository, as for fsspec. Both take `@REVISION`. Listing pins both to a commit, so that a run that is
resumed reads the same data.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from index.errors import SourceError
from index.reach import describe, retried, status_of

SCHEME = "hf:"
FILES = "hf://"
DATASETS = "hf://datasets/"
PARAMETERS = ("name", "split", "revision", "shard")
COMMIT = re.compile("[0-9a-f]{40}")
PINNED = re.compile(rf"({DATASETS}[^/@]+/[^/@]+)@({COMMIT.pattern})(?=/|#|$)")
NOT_DATA = ("README.md", ".gitattributes")
"""Files of a gated repository that anyone may read."""


def is_dataset(source: str) -> bool:
    """Return whether a source or shard is a dataset as `datasets` understands it, `hf:NAME`."""
    return source.startswith(SCHEME) and not source.startswith(FILES)


def without_commit(shard: str) -> str:
    """Return the name of a shard whatever its commit."""
    if is_dataset(shard):
        return str(replace(DatasetURI.parse(shard), revision=None))
    return PINNED.sub(r"\1", shard)


def repository_of(shard: str) -> str | None:
    """Return the repository at its commit of a file `hf://datasets/...`, None of other shards."""
    match = PINNED.match(shard)
    return match[0] if match else None


def commits_of(shards: Iterable[str]) -> dict[str, str]:
    """Return the commit of each dataset that shards belong to."""
    found: dict[str, str] = {}
    for shard in shards:
        if match := PINNED.match(shard):
            found[match[1].removeprefix(DATASETS)] = match[2]
        elif is_dataset(shard) and (uri := DatasetURI.parse(shard)).revision:
            found[uri.path] = uri.revision
    return found


@dataclass(frozen=True, slots=True)
class DatasetURI:
    """A parsed `hf:` URI; fields are named as the arguments of `datasets.load_dataset`."""

    path: str
    """Folder or hub id."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str | None = None
    revision: str | None = None
    shard: str | None = None
    """I/N: file I, counted from 0, of the N files of the split."""

    @classmethod
    def parse(cls, uri: str) -> "DatasetURI":
        """Parse a source or shard; raises SourceError if it is malformed."""
        path, mark, query = uri.removeprefix(SCHEME).rpartition("?")
        if not mark:
            path, query = query, ""
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        unknown = ", ".join(sorted(set(parameters) - set(PARAMETERS)))
        if not path or unknown or (mark and not parameters):
            reason = f"parameter {unknown} is unknown" if unknown else "the dataset's name or a parameter is missing"
            raise SourceError(
                f"'{SCHEME}{path}' is not a dataset URI ({reason}): use "
                "hf:NAME@REVISION?name=CONFIG&split=SPLIT&revision=REV, where all but NAME is optional"
            )
        if "@" in path and not _is_folder(path):
            path, _, revision = path.partition("@")
            if parameters.setdefault("revision", revision) != revision:
                raise SourceError(
                    f"'{SCHEME}{path}' has two revisions, {revision} and {parameters['revision']}: use one"
                )
        return cls(path, **parameters)

    def __str__(self) -> str:
        """Return the URI."""
        parameters = {name: value for name in PARAMETERS if (value := getattr(self, name))}
        return f"{SCHEME}{self.path}?{urlencode(parameters, safe='/')}"

    @property
    def is_folder(self) -> bool:
        """Return whether it is a folder of this machine, or written as one."""
        return _is_folder(self.path)

    @property
    def root(self) -> str:
        """Return where its files are: a folder, or its repository at its commit."""
        return self.path if self.is_folder else f"{DATASETS}{self.path}@{self.revision}"

    def pin(self) -> "DatasetURI":
        """Return the URI that means the same data everywhere and later: an absolute path or a commit.

        Raises SourceError if the hub does not have it or does not give it to us.
        """
        if self.is_folder:
            return replace(self, path=os.path.abspath(self.path))
        return replace(self, revision=commit_of(self.path, self.revision))


def pinned_uri(uri: str) -> str:
    """Return `hf://datasets/NAME/PATH` at the commit that its revision names now; other URIs are unchanged.

    Raises SourceError if it is not a dataset, or if the hub does not have it or does not give it to us.
    """
    from huggingface_hub.errors import HFValidationError

    from index.table.hub_files import hub_files

    if not uri.startswith(FILES) or uri.startswith(f"{FILES}buckets/") or PINNED.match(uri):
        return uri
    try:
        found = hub_files().resolve_path(uri)
    except (HFValidationError, ValueError, NotImplementedError) as error:
        raise SourceError(f"{uri!r} is not a file or folder of a dataset: use {DATASETS}ORG/NAME/PATH") from error
    if found.repo_type != "dataset":
        raise SourceError(
            f"{uri!r} names a {found.repo_type} repository: files of a dataset are {DATASETS}{found.repo_id}/PATH"
        )
    commit = commit_of(found.repo_id, None if found.revision == "main" else found.revision)
    return f"{DATASETS}{found.repo_id}@{commit}/{found.path_in_repo}".rstrip("/")


def from_web_address(source: str) -> str | None:
    """Return how to write an address copied from the hub's web pages as a source; None if it is something else.

    The address of a file itself, `.../resolve/REVISION/PATH`, is a source as it is.
    """
    if not source.removeprefix(SCHEME).startswith(("http://", "https://")):
        return None
    from huggingface_hub import constants

    address = urlsplit(source.removeprefix(SCHEME))
    hosts = ("huggingface.co", "www.huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc)
    parts = [part for part in address.path.split("/") if part]
    if address.netloc not in hosts or "resolve" in parts[3:4]:
        return None
    if parts[:1] != ["datasets"] or len(parts) < 3:
        return f"{SCHEME}ORG/NAME"
    name, (view, revision, *path) = "/".join(parts[1:3]), [*parts[3:], "", ""]
    path = [part for part in path if part]
    if view not in ("tree", "blob"):
        return f"{SCHEME}{name}"
    return f"{DATASETS}{name}@{revision}/{'/'.join(path)}" if path else f"{SCHEME}{name}@{revision}"


@lru_cache(maxsize=64)
def commit_of(name: str, revision: str | None) -> str:
    """Return the commit of a dataset's revision as of when it was first asked for, or since `forget`.

    Raises SourceError if the hub does not have it or does not give it to us.
    """
    from huggingface_hub import HfApi, constants

    shown = f"{SCHEME}{name}" + (f"@{revision}" if revision else "")
    if constants.HF_HUB_OFFLINE:
        raise SourceError(
            f"{shown} is on the hub, and HF_HUB_OFFLINE is set: unset it, or name a folder that you have downloaded "
            f"with `hf download {name} --repo-type dataset --local-dir DIR`"
        )

    def ask() -> str:
        info = HfApi().dataset_info(name, revision=revision)
        if info.gated:
            _check_access(name, info)
        return str(info.sha)

    try:
        return retried(shown, ask)
    except SourceError:
        raise
    except Exception as error:  # the hub client raises exceptions of any class
        raise explained(shown, name, revision, error) from error


def forget() -> None:
    """Ask the hub anew for the commits of revisions."""
    commit_of.cache_clear()


def explained(shown: str, name: str, revision: str | None, error: BaseException) -> SourceError:
    """Return what the hub's refusal of a dataset means and what to do."""
    from huggingface_hub import constants, errors, get_token

    def of(kind: type[BaseException]) -> bool:
        return any(isinstance(each, kind) for each in _causes(error))

    login = "log in with `hf auth login` or set HF_TOKEN"
    if "Invalid credentials" in str(error):
        text = f"the hub refuses your access token: {login} to a valid one"
    elif of(errors.GatedRepoError):
        then = "with the account of your token" if get_token() else f"then {login}"
        text = f"it is gated: ask for access at {constants.ENDPOINT}/datasets/{name}, {then}"
    elif of(errors.RevisionNotFoundError):
        text = f"the dataset has no revision {revision or 'main'!r}: use one of its branches, tags or commits"
    elif of(errors.RepositoryNotFoundError):
        if _is_model(name):
            text = "it is a model, and a dataset is needed: check the name"
        elif get_token():
            text = "the hub has no such dataset, or your account may not read it: check the name, and `hf auth whoami`"
        else:
            text = f"the hub has no such dataset, or it is private: check the name, or {login}"
    elif of(errors.HFValidationError):
        text = "a dataset of the hub is ORG/NAME, a folder of this machine begins with ./ or /"
    elif status_of(error) == 429:
        higher = "" if get_token() else f"; {login} for a higher limit"
        text = f"the hub has had too many requests (429): wait some minutes and try again{higher}"
    elif status_of(error) in (401, 403):
        text = f"the hub denies access ({describe(error)}): {login}"
    else:
        text = f"the hub cannot be reached ({describe(error)}): check the connection and HF_ENDPOINT, then try again"
    return SourceError(f"{shown} cannot be read: {text}")


def check_not_refused(uri: DatasetURI) -> None:
    """Raise SourceError if the hub does not give us the files of a dataset: `datasets` drops the hub's answer."""
    commit_of.cache_clear()
    commit_of(uri.path, uri.revision)


def _check_access(name: str, info: Any) -> None:
    """Raise the hub's error if we may not read the files of a gated dataset."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    data = next((file.rfilename for file in info.siblings or () if file.rfilename not in NOT_DATA), None)
    if data is not None:
        get_hf_file_metadata(hf_hub_url(name, data, repo_type="dataset", revision=info.sha))


def _is_model(name: str) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name)
    except Exception:  # the hub client raises exceptions of any class
        return False
    return True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_folder(path: str) -> bool:
    return path.startswith(("/", ".")) or os.path.isdir(path)
