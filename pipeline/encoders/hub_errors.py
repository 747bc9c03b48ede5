"""Say why the hub does not give a repository, and what to type."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeVar

from index.errors import CoalescerError
from index.reach import describe, is_out_of_reach, status_of
from pipeline.encoders.hub_names import HubName, Kind, is_other

E = TypeVar("E", bound=BaseException)


def is_away(error: BaseException) -> bool:
    """Return whether the hub did not answer, or asked to come back later."""
    status = status_of(error)
    return is_out_of_reach(error) and (status is None or status == 429 or status >= 500)


def explain(error: BaseException, hub: HubName, kind: Kind, file: str = "") -> CoalescerError:
    """Return the error for what the hub client raised while it was asked for a repository, or for a file of it."""
    from huggingface_hub import constants, errors, get_token

    page, has_token = f"{constants.ENDPOINT}/{hub.repository}", get_token() is not None
    what = f"{file} of {hub}" if file else str(hub)
    if constants.HF_HUB_OFFLINE or _first(error, errors.OfflineModeIsEnabled):
        text = (
            f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: unset it, or fetch it "
            f"where there is a connection, by `{_download_command(hub)}`"
        )
    elif _first(error, errors.GatedRepoError):
        text = f"{hub.repository} is gated: accept its terms on {page}"
        text += (
            ", or wait until its owners grant access to the account of your token (`hf auth whoami`)"
            if has_token
            else ", then log in with `hf auth login` or set HF_TOKEN"
        )
    elif _first(error, errors.RevisionNotFoundError):
        text = f"{hub.repository} has no revision {hub.revision or 'main'}: {_revisions(hub)}"
    elif _first(error, errors.RepositoryNotFoundError):
        text = _not_found(hub, kind, has_token=has_token)
    elif status_of(error) == 401:
        text = (
            f"the hub does not accept your token, so {what} cannot be read: log in again with `hf auth login`, or "
            "correct or unset HF_TOKEN"
        )
    elif status_of(error) == 403 and has_token:
        text = (
            f"your token may not read {what}: give it read access to {hub.repository} on "
            f"{constants.ENDPOINT}/settings/tokens, or set HF_TOKEN to another one"
        )
    elif status_of(error) == 403:
        text = (
            f"{what} is forbidden (403): log in with `hf auth login` or set HF_TOKEN, and check whether a proxy "
            "between here and the hub forbids it"
        )
    elif _first(error, errors.EntryNotFoundError) and status_of(error) == 404:
        text = f"{hub.repository} has no file {file} any more: rerun the command, or name another revision"
    elif _first(error, errors.HFValidationError):
        text = f"no folder {hub}, and it is not a hub id: {kind.usage}"
    elif status_of(error) == 429:
        text = f"the hub has had too many requests and does not give {what}: wait some minutes and rerun the command"
        text += "" if has_token else "; log in with `hf auth login` for a higher limit"
    elif is_away(error):
        text = (
            f"the hub at {constants.ENDPOINT} does not give {what} ({_cause(error)}): check the connection and "
            "HF_ENDPOINT, then rerun the command; what is in the cache is used with HF_HUB_OFFLINE=1"
        )
    else:
        text = f"{what} cannot be fetched into {constants.HF_HUB_CACHE} ({describe(error)}): check disk and rights"
    return kind.error(text)


def _not_found(hub: HubName, kind: Kind, *, has_token: bool) -> str:
    """Say that there is no such model: of a dataset or a space that it is one."""
    from huggingface_hub import HfApi

    for other, ask in {"dataset": HfApi().dataset_info, "space": HfApi().space_info}.items():
        with suppress(Exception):
            ask(hub.repository, timeout=10)
            return is_other(hub.repository, other, hub.repository, kind)
    private = (
        "your token may not read it if it is private (`hf auth whoami`)"
        if has_token
        else "if it is private, log in with `hf auth login` or set HF_TOKEN"
    )
    return f"no folder {hub}, and no model {hub.repository} on the hub: check the name; {private}"


def _revisions(hub: HubName) -> str:
    """Say which revisions a repository has."""
    from huggingface_hub import HfApi

    names: list[str] = []
    with suppress(Exception):
        refs: Any = HfApi().list_repo_refs(hub.repository)
        names = [each.name for each in (*refs.branches, *refs.tags)]
    inside = f"; a subfolder stands before the revision, as {hub.repository}/SUBFOLDER@REVISION"
    listed = f"use a commit, or one of {', '.join(names)}" if names else "use a branch, tag or commit of it"
    return listed + (inside if "/" in (hub.revision or "") else "")


def _download_command(hub: HubName) -> str:
    return f"hf download {hub.repository}" + (f" --revision {hub.revision}" if hub.revision else "")


def _cause(error: BaseException) -> str:
    """Return the status of an answer, or the error that others came from, which tells most."""
    status = status_of(error)
    return describe(list(_chain(error))[-1]) if status is None else f"status {status}"


def _first(error: BaseException, kind: type[E]) -> E | None:
    return next((each for each in _chain(error) if isinstance(each, kind)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
