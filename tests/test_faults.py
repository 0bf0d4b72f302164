"""A bounded campaign of faults; `make faults` is the whole one."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import BATCH, EVERY, SIGNALS, Fault, describe, sentences, table


@pytest.mark.slow
def test_nothing_is_lost():
    root = Path(__file__).parents[1]
    command = [sys.executable, "benchmarks/faults.py", "--tries", "5", "--out", ""]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    kinds = {row[0].strip() for row in rows}
    assert kinds >= {*(f"SIG{name} at a random moment" for name in SIGNALS), "disk full at a save"}
    for kind, tries, _, same, repeated in rows:
        assert int(same) == int(tries), kind
        assert int(repeated) <= 3 * EVERY // BATCH or "to the end" in kind


def test_every_outcome_has_a_name():
    assert describe([-9]) == "killed by SIGKILL"
    assert describe([85, 85]) == "asks to be started again"
    assert describe([85, -9]) == "rank 0 asks to be started again; rank 1 killed by SIGKILL"
    assert describe([3]) == "error 3"
    faults = {
        "x": Fault(tries=2, same=1, lost=[0, 16], ended={"error 3": 2}, said="no"),
        "y": Fault(absent="no room"),
    }
    assert "| x | 2 | error 3: 2 | 1 | 2 |" in table(faults)
    assert "| y | 0 | skipped: no room | 0 | 0 |" in table(faults)
    assert sentences(faults) == "* x: no"
