"""A bounded campaign of faults; `make faults` is the whole one."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import Fault, describe, table


@pytest.mark.slow
def test_nothing_is_lost():
    root = Path(__file__).parents[1]
    command = [sys.executable, "benchmarks/faults.py", "--tries", "5", "--out", ""]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert {row[0].strip() for row in rows} >= {"SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "disk full at a save"}
    for _, tries, _, same, repeated in rows:
        assert int(same) == int(tries)
        assert int(repeated) < 120


def test_every_outcome_has_a_name():
    assert describe(-9) == "killed by SIGKILL"
    assert describe(85) == "left at a step, asks to be started again"
    assert describe(70) == "error 70"
    assert "| x | 2 | error 1: 2 | 1 | 8 |" in table({"x": Fault(tries=2, same=1, lost=[0, 8], ended={"error 1": 2})})
