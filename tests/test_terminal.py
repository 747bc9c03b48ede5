"""What commands print: one line for an error, bars that fit, tables and JSON that survive any terminal."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from index import terminal
from index.errors import TableError
from index.terminal import Progress, print_columns, print_json, print_table

WORK = """
import time
from index.terminal import Progress
with Progress("fit image autoencoder", total={total}, unit="steps") as bar:
    bar.advance(600, mse=0.0123, kl=4.5, psnr_db=21.25)
    time.sleep({seconds})
"""
COLOR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def ended(monkeypatch):
    """A function that runs an app as a command line does, and returns its exit code."""

    def run(app, *argv) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *argv])
        with pytest.raises(SystemExit) as exit:
            terminal.run(app)
        return exit.value.code

    return run


def on_terminal(code: str, columns: int, **environment: str) -> str:
    """Return what a Python program writes to a terminal that is `columns` wide."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # its end is closed
            break
    os.close(ours)
    assert process.wait() == 0, output.decode()
    return output.decode()


def last_bar(output: str) -> str:
    """Return the bar as it was drawn last."""
    return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", output)) if line.strip()][-1]


def test_a_users_error_is_one_line(ended, capsys):
    def mistaken(argv, standalone_mode):
        raise TableError("no table at x.lance:\ntype this")

    assert ended(mistaken) == 2
    assert capsys.readouterr().err == "error: no table at x.lance: type this\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(argv, standalone_mode):
        raise KeyError("ours")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(KeyError):
        terminal.run(broken)


def test_ctrl_c_ends_quietly(ended, capsys):
    def interrupted(argv, standalone_mode):
        raise KeyboardInterrupt

    assert ended(interrupted) == 130
    assert capsys.readouterr() == ("", "")


def test_without_arguments_help_is_shown(ended):
    arguments = []
    assert ended(lambda argv, standalone_mode: arguments.extend(argv)) == 0
    assert arguments == ["--help"]


def test_a_closed_pipe_is_not_an_error():
    code = "from index.terminal import run; run(lambda *_, **__: print('many lines\\n' * 100_000))"
    command = f'{sys.executable} -c "$CODE" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "CODE": code})
    assert done.stdout.split() == ["many", "lines", "141"]
    assert done.stderr == ""


@pytest.mark.parametrize("columns", [120, 80, 40, 20])
def test_a_bar_fits_and_keeps_title_rate_and_time_left(columns):
    bar = last_bar(on_terminal(WORK.format(total=1200, seconds=0.3), columns))
    assert len(bar) < columns
    assert re.search(r"[\d,]+/s \d+:\d\d left", bar)
    assert bar.startswith("fit image autoencoder"[: 1 if columns == 20 else None])
    assert ("600/1,200 steps" in bar) == (columns >= 80)
    assert ("psnr_db 21.25" in bar) == (columns == 120)


def test_metrics_are_dropped_before_the_rest():
    bar = last_bar(on_terminal(WORK.format(total=1200, seconds=0.3), 80))
    assert "600/1,200 steps" in bar
    assert "psnr_db" not in bar


def test_ten_metrics_leave_the_bar_readable(tmp_path):
    metrics = ", ".join(f"metric_number_{i}=0.12345" for i in range(10))
    code = WORK.format(total=1200, seconds=0.3).replace("mse=0.0123, kl=4.5, psnr_db=21.25", metrics)
    bar = last_bar(on_terminal(code.replace("fit image autoencoder", "fit"), 100))
    assert re.fullmatch(
        r"fit █+░+ 600/1,200 steps [\d,]+/s \d:\d\d left \d:\d\d elapsed( metric_number_\d 0.1235)+", bar
    )


@pytest.mark.slow
def test_a_command_that_is_silent_shows_that_it_is_at_work():
    code = """
import sys, time
from index.options import Command, make_app
from index.terminal import Progress, print_status, run
app = make_app("Test.")
@app.command(cls=Command)
def wait() -> None:
    print_status("opening")
    time.sleep(2.3)
    with Progress("work", total=10, unit="rows") as bar:
        bar.advance(5)
        print_status("warning: on the way")
        time.sleep(1.5)
    print("done")
sys.argv = ["test", "wait"]
run(app)
"""
    output = on_terminal(code, 80)
    lines = [line for line in re.split(r"[\r\n]+", CONTROL.sub("", output)) if line]
    clock = [line for line in lines if re.fullmatch(r"\d:\d\d elapsed", line)]
    assert clock
    bar = lines[lines.index("warning: on the way") + 1 : lines.index("done")]
    assert lines[: -len(bar) - 2] == ["opening", *clock], "the clock stops where a bar begins"
    assert all(line.startswith("work ") for line in bar)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is shown again"
    silent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert silent.stdout == "done\n"
    assert silent.stderr.startswith("opening\nwarning: on the way\nwork ")


def test_a_bar_without_a_total_shows_the_time_elapsed():
    assert re.search(r"600 steps .*\d:\d\d elapsed", last_bar(on_terminal(WORK.format(total=None, seconds=0.3), 80)))


def test_no_color_is_respected():
    code = 'from index.terminal import print_table; print_table("title", {"name": 1})'
    assert COLOR.search(on_terminal(code, 80).replace("\x1b[0m", ""))
    plain = on_terminal(code, 80, NO_COLOR="1")
    assert not re.search(r"\x1b\[(3|4|9)\d", plain)


def test_progress_logs_a_line_per_tick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "TICK_SECONDS", 0.0)
    with Progress("work", total=10, unit="rows", log=tmp_path / "deep" / "log.jsonl", done=4) as bar:
        bar.advance(2, loss=0.5)
        bar.advance(4)
    ticks = [json.loads(line) for line in (tmp_path / "deep" / "log.jsonl").read_text().splitlines()]
    assert [tick["done"] for tick in ticks] == [6, 10, 10]
    assert all(tick["loss"] == 0.5 and tick["total"] == 10 for tick in ticks)
    assert ticks[-1]["eta"] == 0
    # Not a terminal: no bar, one line at the end.
    assert re.fullmatch(r"work +10 rows +\S+ s +\S+/s +loss 0\.5\n", capsys.readouterr().err)


def test_a_silent_bar_prints_nothing(capsys):
    with Progress("work", total=2, unit="rows", silent=True) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")


def test_names_with_brackets_are_printed_as_they_are(capsys):
    print_table("db/[red].lance", {"[bold]rows[/bold]": "[/]", "caption": "a [blue] circle"})
    print_columns("[b]", {"[run]": {"[metric]": 1}})
    out = capsys.readouterr().out
    for text in ("db/[red].lance", "[bold]rows[/bold]", "[/]", "a [blue] circle", "[b]", "[run]", "[metric]"):
        assert text in out


@pytest.mark.parametrize("columns", ["20", "40", "80", "200"])
def test_tables_lose_nothing_on_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    names = ["frechet", "sliced_wasserstein", "two_sample_accuracy"]
    rows = {name: {"1 step": 0.1234, "2 steps": 1.5, "held-out rows": 12} for name in names}
    print_columns("runs/shapes", rows)
    out = capsys.readouterr().out
    for text in (*names, "0.1234", "1.5", "12"):
        assert text in out


def test_json_has_null_for_what_is_not_finite(capsys):
    print_json({"loss": float("nan"), "rows": [1, float("inf")], "name": "é"})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [1, None], "name": "é"}
