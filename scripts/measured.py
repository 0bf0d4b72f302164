"""Run one command and append what it took to a JSON list: `measured.py LIST NAME COMMAND...`.

An entry of the same name and command is added to, so a run in instalments is counted whole.
"""

import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path


def main(path: Path, name: str, command: list[str]) -> int:
    """Run, note seconds and peak memory, return the command's exit code."""
    start = time.time()
    code = subprocess.call(command)
    entry = {
        "name": name,
        "command": shlex.join(command),
        "seconds": time.time() - start,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
    }
    entries = json.loads(path.read_text()) if path.exists() else []
    for old in entries:
        if (old["name"], old["command"]) == (name, entry["command"]):
            entry["seconds"] += old["seconds"]
            entry["peak_rss_mb"] = max(entry["peak_rss_mb"], old["peak_rss_mb"])
    entries = [old for old in entries if old["name"] != name] + [entry]
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(entries, indent=1) + "\n")
    aside.rename(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
