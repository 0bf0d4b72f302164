"""Small runs on the real parts: the committed autoencoder and encoders, and shapes encoded by them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import compose
from models.autoencoder import AutoencoderConfig
from prepare.shapes import prepare_shapes
from training.config import RunConfig

SMALL = [
    "model.hidden=32",
    "model.depth=2",
    "model.heads=2",
    "train.batch_size=8",
    "train.log_every=8",
    "optim.warmup=16",
    "optim.lr=1e-3",
    "sample.every=1000000",
    "sample.first=1000000",
    "checkpoint.every=1000000",
    "checkpoint.keep=100",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shapes-64 (one thing each, with labels) and shapes-128: 40 records each."""
    root = tmp_path_factory.mktemp("datasets")
    vae = AutoencoderConfig(path="assets/shapes").build()
    for resolution, two in ((64, 0), (128, 0.5)):
        out = root / f"shapes-{resolution}"
        prepare_shapes(out, resolution=resolution, num_images=40, seed=0, vae=vae, two=two)
    return root


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`config("stage1", "train.images=64", ...)`: that stage, small, in a folder of its own."""

    def make(stage: str, *overrides: str, name: str = "run", outputs: Path = tmp_path) -> RunConfig:
        resolution = 64 if stage == "stage1" else 128
        where = [f"name={name}", f"outputs={outputs}", f"data.path={shards / f'shapes-{resolution}'}"]
        return compose(stage, [*SMALL, *where, *overrides])

    return make
