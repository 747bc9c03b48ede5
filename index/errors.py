"""Everything that a user can put right, as exceptions.

CoalescerError          shown as one line; exit code 2
├── OptionError         an option's value is not allowed
├── SourceError         pictures or captions cannot be found or read
├── EncoderError        an encoder cannot be loaded, or is not the one that the table was made with
├── TableError          a table is missing, is not ours, or does not fit
└── RunError            a training run is missing, is not ours, or does not fit

A message says what was given, what is allowed and what to type. Our own mistakes are asserts and stay tracebacks.
"""


class CoalescerError(Exception):
    """A mistake that the user can put right."""


class OptionError(CoalescerError):
    """An option's value is not allowed."""


class SourceError(CoalescerError):
    """Pictures or captions cannot be found or read."""


class EncoderError(CoalescerError):
    """An encoder cannot be loaded, or is not the one that the table was made with."""


class TableError(CoalescerError):
    """A table is missing, is not ours, or does not fit."""


class RunError(CoalescerError):
    """A training run is missing, is not ours, or does not fit."""


def one_line(error: BaseException, *, typed: bool = False) -> str:
    """Return an exception's text on one line of at most 300 characters, after its class name if `typed`."""
    text, name = " ".join(str(error).split())[:300], type(error).__name__
    return f"{name}: {text}" if typed and text else text or name
