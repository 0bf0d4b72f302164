"""The command line that draws."""

import subprocess
import sys

from PIL import Image

COMMAND = [sys.executable, "scripts/sample.py", "--checkpoint", "assets/shapes/pipeline"]


def test_it_draws_one_file_a_picture(tmp_path):
    out = tmp_path / "pictures"
    arguments = ["--prompt", "a red circle", "--num-images", "2", "--steps", "2", "--size", "64x96", "--out", str(out)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=True)
    assert [path.name for path in sorted(out.iterdir())] == ["000000.png", "000001.png"]
    assert Image.open(out / "000000.png").size == (96, 64)
    assert "a red circle" in done.stdout


def test_errors_are_one_sentence():
    for arguments, message in (
        (["--prompt", "a", "--sampler", "magic"], "--sampler magic is unknown; choose one of euler, heun, ddim"),
        (["--prompt", "a", "--size", "big"], "--size big is not HEIGHTxWIDTH"),
        ([], "give --prompt or --class-id"),
    ):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.strip().startswith(f"error: {message}")
