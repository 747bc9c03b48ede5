"""Tell a store that is out of reach from a file that is bad, and wait for it.

A bad file is a reject. A store that is away, or does not let us in, says nothing about its samples: what was asked of
it is retried with growing pauses, and in the end the run is not finished, so that nothing is published without them.
"""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from index.errors import CoalescerError, SourceError, one_line

T = TypeVar("T")

RETRY_SECONDS = 300.0
"""How long a store that is away is waited for, since it last answered."""
LISTING_SECONDS = 10.0
"""The same while a source is listed, when somebody is there to read the error."""
DENIED_SECONDS = 5.0
"""The same for one that answers that a file is not there or not ours."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two attempts; each pause is twice the one before."""
STORE_PACKAGES = frozenset(
    [
        "aiobotocore",
        "aiohttp",
        "azure",
        "botocore",
        "gcsfs",
        "google",
        "httpcore",
        "httpx",
        "huggingface_hub",
        "requests",
        "s3fs",
        "urllib3",
    ]
)
"""Packages whose own exceptions mean that a store cannot be reached or denies access."""
ERRORS = {
    getattr(errno, name)
    for name in [
        "EIO",
        "EREMOTEIO",
        "ESTALE",
        "EBUSY",
        "EAGAIN",
        "ETIMEDOUT",
        "ENOTCONN",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "ENETRESET",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
    ]
    if hasattr(errno, name)
}
"""Of operating systems, mounts and object stores: what is asked for may be sound."""

_log = logging.getLogger(__name__)


def is_out_of_reach(error: BaseException) -> bool:
    """Return whether an exception, or one that led to it, means that a store or file cannot be reached."""
    return any(_is_missing(each) or _is_away(each) for each in _chain(error))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status in an exception or in one that led to it, if any."""
    for each in _chain(error):
        response: Any = getattr(each, "response", None)
        for status in (getattr(each, "status", None), getattr(response, "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def describe(error: BaseException) -> str:
    """Return an exception on one line, without the signatures of presigned URLs that it may quote."""
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\")\]]+", r"\1?...", one_line(error, typed=True))


class Patience:
    """Decides after each failure whether to try again, and waits."""

    def __init__(self, name: str, *, is_local: bool = False, limit: float | None = None) -> None:
        """Wait for `name`, as messages say; a file that is not on a local disk is not waited for."""
        self.name, self.is_local = name, is_local
        self.limit = RETRY_SECONDS if limit is None else limit
        self.reset()

    def reset(self) -> None:
        """Begin anew, because the store has answered."""
        self.waited, self.pause = 0.0, FIRST_PAUSE

    def is_over(self, error: BaseException) -> bool:
        """Return whether another attempt is not worth the wait."""
        is_denied = _is_denied(error)
        limit = min(self.limit, DENIED_SECONDS) if is_denied else self.limit
        return self.waited + self.pause > limit or (is_denied and self.is_local)

    def wait(self, error: BaseException) -> None:
        """Wait before the next attempt; raises SourceError once the patience is at its end.

        Raises the error itself if it is one for the user already, or means anything but a store out of reach.
        """
        if isinstance(error, CoalescerError) or not is_out_of_reach(error):
            raise error
        if self.is_over(error):
            raise SourceError(
                f"not finished: {self.name} is out of reach ({describe(error)}): check that it exists, your "
                "access rights and the connection, then rerun the same command to resume"
            ) from error
        _log.warning("%s is out of reach (%s): next try in %g s", self.name, describe(error), self.pause)
        time.sleep(self.pause)
        self.waited += self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)


def retried(name: str, call: Callable[[], T]) -> T:
    """Return the result of a call, which is repeated while the store of `name` is away.

    Raises its exception if it means anything else, if the store says that there is no such thing, or if it stays away.
    """
    patience = Patience(name, limit=LISTING_SECONDS)
    while True:
        try:
            return call()
        except Exception as error:
            if _is_denied(error) or patience.is_over(error):
                raise
            patience.wait(error)


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError | PermissionError)


def _is_away(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in ERRORS):
        return True
    return any(each.__module__.partition(".")[0] in STORE_PACKAGES for each in type(error).__mro__)


def _is_denied(error: BaseException) -> bool:
    """Return whether the store has answered, and waiting for another answer makes little sense."""
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return any(_is_missing(each) for each in _chain(error)) and not any(_is_away(each) for each in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
