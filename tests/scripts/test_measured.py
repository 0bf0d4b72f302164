"""Commands of the curriculum are noted with their time and memory, and added up when repeated."""

import json
import subprocess
import sys

COMMAND = [sys.executable, "scripts/measured.py"]


def test_time_adds_up_and_exit_codes_pass_through(tmp_path):
    path = tmp_path / "commands.json"
    sleep = [sys.executable, "-c", "import time; time.sleep(0.2)"]
    for _ in range(2):
        subprocess.run([*COMMAND, str(path), "nap", *sleep], check=True)
    failed = subprocess.run([*COMMAND, str(path), "fail", sys.executable, "-c", "raise SystemExit(3)"])
    assert failed.returncode == 3
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())}
    assert entries["nap"]["seconds"] >= 0.4
    assert entries["nap"]["peak_rss_mb"] > 5
    assert entries.keys() == {"nap", "fail"}
