"""A short form of the campaign of tests/bench/chaos.py: killed commands lose, double and change nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "bench" / "chaos.py"


@pytest.mark.slow
def test_killed_commands_leave_what_undisturbed_ones_leave(tmp_path):
    argv = [sys.executable, CAMPAIGN, "--work", tmp_path, "--kills", "4", "--seed", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=CAMPAIGN.parent)
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["disturbances"] >= 4
    faults = ("rows_lost", "rows_doubled", "rows_changed", "false_reports", "wrong_states", "never_ended")
    assert {name: report[name] for name in faults if report[name]} == {}
