"""What every test shares: no network, two threads, and a run folder that goes away."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports transformers or diffusers, which read it once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin cost a busy machine minutes

from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)  # sums are ordered by thread: a fixed count keeps golden losses the same on any machine


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty outputs/ in a temporary working directory; relative run folders land there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"
