"""What a command shows while it works: a progress bar for people, one JSON line per tick for machines.

`run` is the skin of both command lines: a user's mistake becomes one line and exit code 2. `Progress` draws a bar
with rate and time left on a terminal, prints its last line elsewhere, and appends a tick to a log at most every
`TICK_SECONDS`, so that a long run can be watched from outside by reading a file.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from index.errors import CoalescerError

if TYPE_CHECKING:
    from rich.progress import TaskID

TICK_SECONDS = 1.0


def run(app: Callable[[], Any]) -> None:
    """Run a command line; a CoalescerError is printed as one line and ends it with exit code 2."""
    logging.getLogger().setLevel(logging.ERROR)
    try:
        app()
    except CoalescerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


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
        """Name the step; `log` receives the JSON lines, `done` is what an earlier run has already done.

        A silent one counts and draws nothing, for all but one of several processes.
        """
        self.title, self.total, self.unit, self.log, self._silent = title, total, unit, log, silent
        self.done = self._done_before = done
        self.figures: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        """Start the clock and draw the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.fields[of]} {task.fields[unit]} {task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._silent or not self._console.is_terminal,
        )
        of = f"{self.total:,}" if self.total is not None else "?"
        self._task: TaskID = self._bar.add_task(self.title, total=self.total, of=of, unit=self.unit, figures="")
        self._begun = self._ticked = time.monotonic()
        self._bar.start()
        return self

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._begun

    @property
    def rate(self) -> float:
        """Units per second since the step began."""
        return (self.done - self._done_before) / max(self.seconds, 1e-9)

    def expect(self, total: int) -> None:
        """Set or correct how much there is to do, where that is only learnt on the way."""
        self.total = total
        self._bar.update(self._task, total=total, of=f"{total:,}")

    def advance(self, count: int = 1, **figures: Any) -> bool:
        """Count `count` units done, note figures of the step so far; true where this was logged as a tick."""
        self.done += count
        self.figures.update(figures)
        shown = " ".join(f"{k} {_short(v)}" for k, v in {"rate": f"{self.rate:.3g}/s", **self.figures}.items())
        self._bar.update(self._task, completed=self.done, figures=shown)
        due = time.monotonic() - self._ticked >= TICK_SECONDS
        if due:
            self._tick()
        return due

    def _tick(self) -> None:
        self._ticked = time.monotonic()
        if self.log is None:
            return
        left = None if self.total is None or self.rate == 0 else (self.total - self.done) / self.rate
        line = {
            "time": round(time.time(), 3),
            "step": self.title,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds": round(self.seconds, 3),
            "rate": round(self.rate, 3),
            "eta": None if left is None else round(left, 1),
            **self.figures,
        }
        # A full disk ends the step with its own words, not here.
        with contextlib.suppress(OSError), self.log.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Log the last tick and, where no bar was drawn, print the step's last line."""
        self._tick()
        self._bar.stop()
        if not (self._silent or self._console.is_terminal) and kind is None:
            figures = "  ".join(f"{k} {_short(v)}" for k, v in self.figures.items())
            print(
                f"{self.title:<22}{self.done:>10,} {self.unit}  {self.seconds:7.1f} s  {self.rate:10,.1f}/s  {figures}",
                file=sys.stderr,
            )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """Print names and values in two aligned columns on standard output."""
    print_columns(title, {name: {"": value} for name, value in rows.items()})


def print_columns(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one line per name, with a column for every figure that any of them has."""
    from rich.console import Console
    from rich.table import Table

    figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(figures))
    table.add_column("", style="bold", no_wrap=True)
    for figure in figures:
        table.add_column(figure.replace("_", " "), justify="right" if figure else "left", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *(_short(row[figure]) if figure in row else "" for figure in figures))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
