"""The losses of fifty steps of each stage, committed as text. A change that moves them says why in its message.

To write them anew: GOLDEN=write python -m pytest tests/training/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest

from training.run import run

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_losses_are_the_committed_ones(config, stage):
    cfg = config(stage, "train.images=400", "train.log_every=40")
    run(cfg)
    lines = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    found = [(line["images"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]
    path = GOLDEN / f"{stage}.txt"
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text("images loss grad_norm\n" + "".join(f"{i} {a:.6f} {b:.6f}\n" for i, a, b in found))
    known = [line.split() for line in path.read_text().splitlines()[1:]]
    assert [i for i, *_ in found] == [int(i) for i, *_ in known]
    for (images, loss, norm), (_, known_loss, known_norm) in zip(found, known, strict=True):
        assert loss == pytest.approx(float(known_loss), rel=2e-3), images
        assert norm == pytest.approx(float(known_norm), rel=2e-2), images
