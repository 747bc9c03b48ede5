"""Exceptions for mistakes that the user can fix.

CoalescerError          printed as one line; exit code 2
├── OptionError         an option's value is not allowed
├── SourceError         images or captions cannot be found or read
│   └── OutOfReachError a store did not answer, or did not let us in, for as long as it was waited for
├── EncoderError        an encoder cannot be loaded, or is not the one that the table was made with
├── TableError          a table is missing, is not ours, or does not fit
│   └── LockedError     another command holds its lock
└── RunError            a training run is missing, is not ours, or does not fit

A message says what is wrong, what is allowed and what to type. Bugs of ours are asserts and keep their traceback.
"""

import html
import re


class CoalescerError(Exception):
    """A mistake that the user can fix."""


class OptionError(CoalescerError):
    """An option's value is not allowed."""


class SourceError(CoalescerError):
    """Images or captions cannot be found or read."""


class OutOfReachError(SourceError):
    """A store did not answer, or did not let us in, for as long as it was waited for."""


class EncoderError(CoalescerError):
    """An encoder cannot be loaded, or is not the one that the table was made with."""


class TableError(CoalescerError):
    """A table is missing, is not ours, or does not fit."""


class LockedError(TableError):
    """Another command holds the lock, or has died so recently that its lock is not free yet."""

    def __init__(self, text: str, seconds: float = 0.0) -> None:
        """`seconds` from now the lock is free, unless its holder lives; 0 if it is known to live, or never told."""
        super().__init__(text)
        self.seconds = seconds


class RunError(CoalescerError):
    """A training run is missing, is not ours, or does not fit."""


def one_line(error: BaseException, *, typed: bool = False) -> str:
    """Return an exception's message on one line of at most 300 characters, after its class name if `typed`.

    Of an answer of an object store, what the server itself says comes first, so that it is never cut.
    """
    text, name = " ".join(str(error).split()), type(error).__name__
    found = [re.search(rf"<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message")]
    answer = [html.unescape(each[1]) for each in found if each]
    text = ": ".join(answer) or text[:300]
    return f"{name}: {text}" if typed and text else text or name
