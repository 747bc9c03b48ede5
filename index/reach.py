"""Tell a store that is out of reach from a file that is bad, and wait for it.

A bad file is a reject. A store that is away, or does not let us in, says nothing about its samples: what was asked of
it is retried with growing pauses, and in the end the run is not finished, so that nothing is published without them.
"""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from index.errors import CoalescerError, OutOfReachError, one_line

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
        "httpcore2",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "requests",
        "s3fs",
        "urllib3",
    ]
)
"""Packages whose own exceptions mean that a store cannot be reached or denies access."""
LANCE_ERROR = re.compile(
    r"Generic (S3|GCS|MicrosoftAzure) error|Error performing \w+ .{0,500}retries|lacked (the necessary|valid) ",
    re.DOTALL,
)
"""In the text of what Lance raises, in classes of Python's own, if an object store has failed it."""
LANCE_STATUS = re.compile(r"status (?:code )?(\d{3})\b")
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

OnWait = Callable[[str | None], None]
"""Is told what is waited for and until when, and None once that is over."""

WAITS = "index.reach"
"""The logger of all waits."""
_log = logging.getLogger(WAITS)


def is_out_of_reach(error: BaseException) -> bool:
    """Return whether an exception, or one that led to it, means that a store or file cannot be reached."""
    return any(_is_missing(each) or _is_away(each) for each in _chain(error))


def is_store_failure(error: BaseException) -> bool:
    """Return whether an exception, or one that led to it, comes from an object store or the way to it."""
    return any(_is_away(each) for each in _chain(error))


def is_denied(error: BaseException) -> bool:
    """Return whether the store has answered, and waiting for another answer makes little sense."""
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return any(_is_missing(each) for each in _chain(error)) and not is_store_failure(error)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status in an exception or in one that led to it, if any."""
    for each in _chain(error):
        response: Any = getattr(each, "response", None)
        if isinstance(response, Mapping):  # botocore's
            response = response.get("ResponseMetadata", {})
            statuses = [response.get("HTTPStatusCode")]
        else:
            statuses = [getattr(each, "status", None), getattr(response, "status_code", None)]
        statuses += [int(found[1]) for found in [LANCE_STATUS.search(str(each))] if found and _is_lance(each)]
        for status in statuses:
            if isinstance(status, int):
                return status
    return None


def describe(error: BaseException) -> str:
    """Return an exception on one line, without the signatures of presigned URLs that it may quote."""
    # fsspec raises FileNotFoundError for whatever a web server answers, or does not answer.
    causes = (each for each in _chain(error) if _is_away(each)) if isinstance(error, FileNotFoundError) else iter(())
    text = one_line(next(causes, error), typed=True)
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\")\]]+", r"\1?...", text)


class Patience:
    """Decides after each failure whether to try again, and waits."""

    def __init__(
        self, name: str, *, is_local: bool = False, limit: float | None = None, on_wait: OnWait | None = None
    ) -> None:
        """Wait for `name`, as messages say, up to `limit` seconds.

        Without a limit, a store that is away is waited for much longer than one that denies access. A file that is
        not on a local disk is not waited for.
        """
        self.name, self.is_local, self.limit, self._on_wait = name, is_local, limit, on_wait
        self._since: float | None = None
        self._began, self.pause = time.time(), FIRST_PAUSE

    def reset(self) -> None:
        """Begin anew, because the store has answered."""
        if self._since is not None and self._on_wait is not None:
            self._on_wait(None)
        self._since, self.pause = None, FIRST_PAUSE

    def seconds_left(self, error: BaseException) -> float:
        """Return how much longer it is worth to wait after this error; 0 if not at all."""
        now = time.monotonic()
        if self._since is None:
            self._since, self._began = now, time.time()
        return max(0.0, self._since + self._limit(error) - now)

    def _limit(self, error: BaseException) -> float:
        denied = is_denied(error)
        if denied and self.is_local:
            return 0.0
        return self.limit if self.limit is not None else DENIED_SECONDS if denied else RETRY_SECONDS

    def wait(self, error: BaseException) -> None:
        """Wait before the next attempt; raises OutOfReachError once the patience is at its end.

        Raises the error itself if it is one for the user already, or means anything but a store out of reach.
        """
        if isinstance(error, CoalescerError) or not is_out_of_reach(error):
            raise error
        left = self.seconds_left(error)
        if left <= 0:
            self.reset()
            raise OutOfReachError(
                f"not finished: {self.name} is out of reach ({describe(error)}): check that it exists, your "
                "access rights and the connection, then rerun the same command to resume"
            ) from error
        pause = min(left, max(self.pause, _retry_after(error)))
        until = time.strftime("%H:%M:%S", time.localtime(self._began + self._limit(error)))
        text = f"{self.name} is out of reach ({describe(error)}): waiting for it until {until}"
        log_wait(text)
        if self._on_wait is not None:
            self._on_wait(text)
        time.sleep(pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)


def log_wait(text: str) -> None:
    """Log what is waited for, here or in a worker, and until when; commands show each wait once."""
    _log.warning("%s", text)


def retried(name: str, call: Callable[[], T]) -> T:
    """Return the result of a call, which is repeated while the store of `name` is away.

    Raises its exception if it means anything else, if the store says that there is no such thing, or if it stays away.
    """
    patience = Patience(name, limit=LISTING_SECONDS)
    while True:
        try:
            return call()
        except Exception as error:
            if is_denied(error) or patience.seconds_left(error) <= 0:
                raise
            patience.wait(error)


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError | PermissionError)


def _is_away(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in ERRORS):
        return True
    return _is_lance(error) or any(each.__module__.partition(".")[0] in STORE_PACKAGES for each in type(error).__mro__)


def _is_lance(error: BaseException) -> bool:
    return isinstance(error, OSError | ValueError | RuntimeError) and bool(LANCE_ERROR.search(str(error)))


def _retry_after(error: BaseException) -> float:
    """Return the seconds that a server asks to wait, 0 if it does not."""
    for each in _chain(error):
        response: Any = getattr(each, "response", None)
        if isinstance(response, Mapping):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(each, "headers", None) or getattr(response, "headers", None)
        text = {str(name).lower(): value for name, value in dict(headers or {}).items()}.get("retry-after", "")
        if re.fullmatch(r"\d+(\.\d+)?", str(text).strip()):
            return float(text)
    return 0.0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
