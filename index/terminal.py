"""Everything that a command prints: progress bars, tables, JSON and errors. The only file of `index` that prints.

`run` wraps both command lines: an error that the user can fix becomes one line and exit code 2. `Progress` draws a bar
with rate and time left on a terminal, prints one summary line elsewhere, and appends a JSON line to a log file at most
every `TICK_SECONDS`, so that a long step can be followed by reading a file. Results go to standard output, everything
else to standard error.
"""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from index.errors import CoalescerError
from index.reach import WAITS, describe, is_store_failure

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

TICK_SECONDS = 1.0
BAR_WIDTH = 12
"""Characters."""
PIPE_WIDTH = 140
"""Characters of a line where standard output is not a terminal and COLUMNS is not set."""
MIN_COLUMN_WIDTH = 9
"""Narrower columns are not readable: the table is printed as a list instead."""
GRACE_SECONDS = 4.0
"""After a signal a command ends at the latest after so long."""
BROKEN_PIPE = 141
"""Exit code of a shell for commands that SIGPIPE ended."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command; its exit code is 128 and their number, as in a shell."""


class _Clock:
    """The seconds since a command has printed something: on a terminal a line that moves until it prints again.

    Models and libraries take many seconds to load, and nothing else tells that the command is at work.
    """

    def __init__(self) -> None:
        self.is_on, self.bars = False, 0
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._live: Live | None = None

    def start(self) -> None:
        """Show the clock from now on, in a command whose standard error is a terminal, unless it draws a bar."""
        self.stop()
        if self.is_on and not self.bars and sys.stderr.isatty():
            self._timer = threading.Timer(TICK_SECONDS, self._show, [time.monotonic()])
            self._timer.daemon = True
            self._timer.start()

    def _show(self, started: float) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        def line() -> Text:
            return Text(f"{_clock(time.monotonic() - started)} elapsed")

        console = Console(stderr=True)
        with self._lock:
            if threading.current_thread() is self._timer and not console.is_dumb_terminal:
                redirect = sys.stdout.isatty()
                self._live = Live(get_renderable=line, console=console, transient=True, redirect_stdout=redirect)
                self._live.start()

    def stop(self) -> None:
        """Remove the line."""
        with self._lock:
            timer, live = self._timer, self._live
            self._timer = self._live = None
        if timer is not None:
            timer.cancel()
        if live is not None:
            live.stop()


_silence = _Clock()


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that ends the command."""


def run(app: Callable[..., Any]) -> NoReturn:
    """Run a typer app on the command line's arguments and exit; without arguments, show its help.

    The exit code is 0 for success, 2 after a line `error: ...` for what the user can fix, 130 after Ctrl-C and 143
    after SIGTERM. Any other exception keeps its traceback and ends the process with exit code 1.
    """
    caller = sys._getframe(1)
    is_program = any(frame and frame.f_globals.get("__name__") == "__main__" for frame in (caller, caller.f_back))
    logging.getLogger().setLevel(logging.ERROR)
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):  # before they are imported, and in worker processes
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    stops = _raise_on_signals()
    try:
        _silence.is_on = True
        try:
            with _shown_waits():
                code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        finally:
            _silence.is_on = False
            _silence.stop()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        # After a signal, an error is only what became of it on its way.
        code = 1 if stops else _report(error, is_program)
    if stops:
        code = 128 + stops[0]
    if code and is_program:
        _end(code, kill=bool(stops))
    sys.exit(code or 0)


def _report(error: BaseException, is_program: bool) -> int:
    """Print an error as the user needs it and return the exit code; raise a bug's error in a program that goes on."""
    from typer import TyperException

    if isinstance(error, CoalescerError):
        return _fail(str(error))
    if isinstance(error, TyperException):
        return _fail(_usage(error))
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        # The reader has closed the pipe: without this Python complains when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if is_store_failure(error):
        return _fail(
            f"a store could not be reached ({describe(error)}): check the connection, the access rights and "
            "--storage-option, then rerun the same command"
        )
    if not is_program:
        raise error
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


class _WaitHandler(logging.Handler):
    """Prints each wait for a store once, though it is logged at every attempt, and by several processes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown = set[tuple[str, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        key = text.partition(" is out of reach ")[0], text.rpartition("until ")[2]
        if key not in self._shown:
            self._shown.add(key)
            print_status(text)


@contextlib.contextmanager
def _shown_waits() -> Iterator[None]:
    """Print waits for stores while the block runs."""
    log = logging.getLogger(WAITS)
    before = log.level, log.propagate, log.handlers
    log.setLevel(logging.WARNING)
    log.propagate, log.handlers = False, [_WaitHandler()]
    try:
        yield
    finally:
        log.setLevel(before[0])
        _, log.propagate, log.handlers = before


def _raise_on_signals() -> list[int]:
    """Let the first signal that ends the command raise Stopped; return the list to which its number is added."""
    stops: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        stops.append(number)
        if len(stops) == 1:
            _end_after(GRACE_SECONDS, 128 + number)
            raise Stopped

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where it is ignored
                signal.signal(number, on_signal)
    return stops


def _end_after(seconds: float, code: int) -> None:
    """End the process after some seconds, if what it has to clean up waits for a store that is away."""
    timer = threading.Timer(seconds, lambda: _end(code, kill=True))
    timer.daemon = True
    timer.start()


def _end(code: int, *, kill: bool) -> NoReturn:
    """End the process at once, after a failure: with `kill`, its child processes too.

    Threads that are still at work in Torch, Lance or Beam abort a process (exit code 134) that waits for Python's own
    end, and print what no one can use.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if kill:
        import psutil

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    os._exit(code)


def _usage(error: Any) -> str:
    """Return what is wrong with the command line, and which help to read."""
    message, context = error.format_message().replace("Value error, ", "").rstrip("."), getattr(error, "ctx", None)
    return f"{message} (see `{context.command_path} --help`)" if context else message


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def print_status(text: str) -> None:
    """Say on standard error what a command is about to do; of several processes only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        _silence.stop()
        print(text, file=sys.stderr, flush=True)
        _silence.start()


class Progress:
    """A long step: `with Progress("encode", total=n, unit="images", log=path) as bar: bar.advance(32, loss=0.1)`."""

    def __init__(
        self,
        title: str,
        *,
        total: int | None,
        unit: str,
        log: Path | None = None,
        done: int = 0,
        silent: bool = False,
    ) -> None:
        """Describe the step.

        Args:
            title: its name, in the bar and in the log.
            total: units of work, None if unknown.
            unit: plural noun of what is counted.
            log: file to append a JSON line to at every tick.
            done: units that an earlier run has done.
            silent: count but draw nothing, for all but one of several processes.
        """
        self.title, self.total, self.unit, self.log, self._silent = title, total, unit, log, silent
        self.done = self._done_before = done
        self.metrics: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        """Start the clock and draw the bar."""
        from rich.console import Console
        from rich.live import Live

        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        self._started = self._ticked = time.monotonic()
        self._console = Console(stderr=True)
        self._drawn = self._console.is_terminal and not self._console.is_dumb_terminal and not self._silent
        self._live = Live(get_renderable=self._line, console=self._console)
        if self._drawn:
            _silence.bars += 1
            _silence.stop()
            self._live.start()
        return self

    @property
    def seconds(self) -> float:
        """Seconds since the step started."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units per second since the step started."""
        return (self.done - self._done_before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the seconds left; None if the total or the rate is unknown."""
        return None if self.total is None or self.rate == 0 else max(0.0, self.total - self.done) / self.rate

    def expect(self, total: int) -> None:
        """Set or correct the total."""
        self.total = total

    def advance(self, count: int = 1, **metrics: Any) -> bool:
        """Count `count` more units as done and update the step's metrics; return whether a tick was logged."""
        self.done += count
        self.metrics = {**self.metrics, **metrics}  # never changed in place: the bar's thread reads it
        due = time.monotonic() - self._ticked >= TICK_SECONDS
        if due:
            self._tick()
        return due

    def _tick(self) -> None:
        self._ticked = time.monotonic()
        if self.log is None:
            return
        left = self.seconds_left
        line = {
            "time": round(time.time(), 3),
            "step": self.title,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds": round(self.seconds, 3),
            "rate": round(self.rate, 3),
            "eta": None if left is None else round(left, 1),
            **self.metrics,
        }
        # If the disk is full, the step itself fails with a better message.
        with contextlib.suppress(OSError), self.log.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _line(self) -> "Text":
        """Return the bar as one line: title, rate and time left always, the rest as far as it fits, metrics last."""
        from rich.text import Text

        width, left = self._console.width - 1, self.seconds_left
        clock = f"{_clock(self.seconds)} elapsed" if left is None else f"{_clock(left)} left"
        required = f"{_rate(self.rate)} {clock}"
        title = _cropped(self.title, width - len(required) - 1)
        before = [title, f"{self.done:,}/{self.total:,} {self.unit}" if self.total else f"{self.done:,} {self.unit}"]
        after = [] if left is None else [f"{_clock(self.seconds)} elapsed"]
        after += [f"{name} {_short(value)}" for name, value in self.metrics.items()]
        if self.total:
            before.insert(1, _bar(self.done / self.total, ascii_only=self._console.options.ascii_only))
        used = len(title) + 1 + len(required)
        kept = {title}
        for part in (before[-1], *before[1:-1], *after):
            if used + 1 + len(part) > width:
                break
            used += 1 + len(part)
            kept.add(part)
        line = [*(part for part in before if part in kept), required, *(part for part in after if part in kept)]
        return Text(" ".join(line), no_wrap=True, overflow="crop")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Log the last tick and, if no bar was drawn, print one line about the step."""
        self._tick()
        self._live.stop()
        if self._drawn:
            _silence.bars -= 1
            _silence.start()
        if not (self._silent or self._drawn) and kind is None:
            metrics = "  ".join(f"{name} {_short(value)}" for name, value in self.metrics.items())
            done, rate = f"{self.done:>10,} {self.unit}", f"{self.rate:10,.1f}/s"
            print(f"{self.title:<22}{done}  {self.seconds:7.1f} s  {rate}  {metrics}".rstrip(), file=sys.stderr)


def _bar(fraction: float, *, ascii_only: bool) -> str:
    done = min(BAR_WIDTH, int(fraction * BAR_WIDTH))
    full, empty = ("#", "-") if ascii_only else ("█", "░")
    return full * done + empty * (BAR_WIDTH - done)


def _cropped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width)]


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def print_json(content: Any) -> None:
    """Print JSON on standard output; numbers that are not finite become null, which every JSON parser reads."""
    _silence.stop()
    print(json.dumps(_finite(content), indent=2, default=str))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """Print names and values in two aligned columns on standard output."""
    print_columns(title, {name: {"": value} for name, value in rows.items()})


def print_columns(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one line per name with a column for every key of its values; as a list if the terminal is too narrow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    _silence.stop()
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if wide else PIPE_WIDTH, highlight=False)
    names_width = max(map(len, rows), default=0)
    if console.width < names_width + (1 + MIN_COLUMN_WIDTH) * len(columns):
        return _print_list(title, rows)
    # Text objects are printed as they are; strings with [brackets] would be read as markup.
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    table.add_column("", style="bold", no_wrap=True)
    for column in columns:
        header = Text(column.replace("_", " "))
        table.add_column(header, justify="right" if column else "left", overflow="fold")
    for name, row in rows.items():
        table.add_row(Text(name), *(Text(_short(row[column]) if column in row else "") for column in columns))
    with console.capture() as lines:
        console.print(table)
    print("\n".join((title, *(line.rstrip() for line in lines.get().splitlines()))))
    return None


def _print_list(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    print(title)
    for name, row in rows.items():
        if set(row) == {""}:
            print(f"{name}: {_short(row[''])}")
            continue
        print(name)
        for column, value in row.items():
            print(f"  {column.replace('_', ' ')}: {_short(value)}")
