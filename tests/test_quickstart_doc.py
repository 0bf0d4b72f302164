"""docs/quickstart.md is followed in an empty folder: the first picture, and training on pictures of one's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = re.split(r"^## ", (ROOT / "docs/quickstart.md").read_text(), flags=re.MULTILINE)


def commands(title: str) -> list[str]:
    """The commands of a section, continued lines joined."""
    section = next(section for section in SECTIONS if section.startswith(title))
    blocks = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


@pytest.mark.slow
def test_from_a_checkout_to_a_model_of_ones_own(tmp_path: Path):
    for name in ("scripts", "assets", "train_stage3.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    first = [line for line in commands("The first picture") if "scripts/sample.py" in line]
    script = "\n".join([*first, *commands("Your own pictures")])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for made in ("outputs/pictures/00000-0.png", "datasets/mine.html", "outputs/mine/samples/000000400.png"):
        assert (tmp_path / made).stat().st_size > 1000, made
    assert "200" in (tmp_path / "datasets/mine/report.json").read_text()
    assert (tmp_path / "outputs/pictures/00001-0.png").exists()


@pytest.mark.parametrize("command", ["train_stage2.py", "scripts/plan.py"])
def test_commands_for_a_public_model_compose(command: str):
    """The weights are not here, and a GPU is wanted for what comes then."""
    line = next(line for line in commands("A public model") if command in line)
    overrides = [word.strip("'") for word in line.split() if "=" in word]
    from configs.schema import compose

    cfg = compose("stage2", ["name=photos", *overrides] if command == "scripts/plan.py" else overrides)
    assert (cfg.data.resolution, cfg.objective.prediction.name, cfg.train.batch_size) == (1024, "eps", 8)
