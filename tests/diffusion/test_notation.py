"""The numbers printed in docs/notation.md are those of the code."""

import re
from pathlib import Path

import pytest

from diffusion.schedule import log_snr, table_times

PAGE = Path(__file__).parents[2] / "docs" / "notation.md"


def test_the_table_of_times_is_fresh():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = table_times(), table_times(zero_terminal=True)
    assert len(rows) >= 6
    for index, cells in rows:
        times = [table[int(index)] for table in tables]
        numbers = [x.item() for t in times for x in (t, t / (1 - t), log_snr(t))]
        assert [float(cell) for cell in cells.split(" | ")] == pytest.approx(numbers, abs=6e-4)
