"""Names of models and runs: what the user types of a repository of the hub, or pastes from the browser."""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from index.errors import CoalescerError, EncoderError, RunError

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OTHER_KINDS = {"datasets": "dataset", "spaces": "space"}
"""First parts of addresses of what is no model."""
PAGES = ("tree", "blob", "resolve", "raw")
"""Third parts of addresses of a folder, and of a file."""


class Kind(NamedTuple):
    """What a repository is asked for."""

    noun: str
    usage: str
    error: type[CoalescerError]


ENCODER = Kind(
    "an encoder",
    "use a folder with config.json and model weights, or a hub id ORG/NAME, ORG/NAME/SUBFOLDER or ...@REVISION",
    EncoderError,
)
RUN = Kind(
    "a run", "use a folder that `trainer fit --out` has made, or a hub id ORG/NAME or ORG/NAME@REVISION", RunError
)


@dataclass(frozen=True, slots=True)
class HubName:
    """`ORG/NAME`, `ORG/NAME/SUBFOLDER`, `...@REVISION`."""

    repository: str
    """ORG/NAME."""
    subfolder: str = ""
    revision: str | None = None
    """Branch, tag or commit; None is main."""

    @property
    def path(self) -> str:
        """The name without its revision."""
        return f"{self.repository}/{self.subfolder}".rstrip("/")

    def __str__(self) -> str:
        return self.path + (f"@{self.revision}" if self.revision else "")

    def at(self, subfolder: str) -> "HubName":
        """Return the name of another folder of the repository."""
        return replace(self, subfolder=subfolder)

    @classmethod
    def parse(cls, text: str, kind: Kind) -> "HubName":
        """Read a name, or the address of a page of the hub as a browser shows it.

        Raises the error of `kind` if it is neither.
        """
        parts, revision, is_address = _split(text, kind)
        if is_address and parts[0] in OTHER_KINDS and len(parts) > 2:
            raise kind.error(is_other(text, OTHER_KINDS[parts[0]], "/".join(parts[1:3]), kind))
        if len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts[:2]):
            raise kind.error(f"no folder {text}, and it is not a hub id: {kind.usage}")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def is_other(text: str, other: str, repository: str, kind: Kind) -> str:
    """Say that what the user typed is a dataset or a space."""
    source = f"as a source of samples it is hf:{repository}; here " if other == "dataset" else ""
    return f"{text} is a {other} of the hub, not {kind.noun}: {source}{kind.usage}"


def _split(text: str, kind: Kind) -> tuple[list[str], str, bool]:
    """Return the parts of the path, the revision, and whether it was an address."""
    from huggingface_hub import constants

    # A path object, as commands make of their arguments, leaves one of two slashes.
    if not (page := re.fullmatch(r"https?:/+([^/]+)/*([^?#]*).*", text)):
        path, at, revision = re.sub("^hf:/*", "", text).strip("/").partition("@")
        if at and not revision:
            raise kind.error(f"{text} names no revision: write a branch, tag or commit after the @, or leave it out")
        return path.split("/"), revision, text.startswith("hf:")
    if page[1] not in (*HOSTS, urlsplit(constants.ENDPOINT).netloc):
        raise kind.error(f"{text} is an address outside of the hub: download it, and {kind.usage}")
    parts = page[2].strip("/").split("/")
    if parts[0] in OTHER_KINDS or len(parts) < 4 or parts[2] not in PAGES:
        return parts[:3] if parts[0] in OTHER_KINDS else parts[:2], "", True
    revision, inside = unquote(parts[3]), [unquote(part) for part in parts[4:]]
    folder = inside if parts[2] == "tree" else inside[:-1]
    return [*parts[:2], *folder], "" if revision == "main" else revision, True
