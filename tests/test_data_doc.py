"""docs/data.md is followed: its commands, in its order, in an empty folder, end in a picture drawn while training."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/data.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_from_a_table_to_the_first_step(tmp_path: Path):
    for name in ("scripts", "assets", "train_stage2.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = "\n".join(BLOCKS).replace("8000", str(port))
    script = script.replace("practice --out practice", f"practice --address http://127.0.0.1:{port} --out practice")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", f"trap 'kill $(jobs -p)' EXIT\n{script}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("practice", "folder"):
        report = json.loads((tmp_path / f"datasets/{name}/report.json").read_text())
        assert report["steps"][0]["given"] == 200
        assert report["steps"][-1]["kept"] == 200
    assert (tmp_path / "datasets/practice.html").stat().st_size > 10_000
    assert (tmp_path / "outputs/practice/samples/000000128.png").exists()
