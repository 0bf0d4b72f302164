"""A small data set of 37 records in four shards, whose numbers say which record they are."""

import numpy as np
import pytest

from data.shards import ShardWriter

COUNT, CAPTIONS, SHAPE = 37, 3, (2, 4, 4)


def latent(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(SHAPE).astype(np.float16)


def write(folder, count=COUNT, **options):
    options = {"resolution": 32, "vae": {"id": "fake"}, "extra": {"num_classes": 5}, "shard_size": 10} | options
    with ShardWriter(folder, **options) as writer:
        for row in range(count):
            record = {"captions": [f"{row}, caption {i}: ü" for i in range(CAPTIONS)], "class_id": row % 5}
            text = row + np.arange(CAPTIONS)[:, None, None] / 4 + np.zeros((1, 3, 5))
            mask = np.arange(3) <= np.arange(CAPTIONS)[:, None]
            pooled = row + np.arange(CAPTIONS)[:, None] / 4 + np.zeros((1, 6))
            writer.add(record, latent=latent(row).astype(np.float32), text=text, mask=mask, pooled=pooled)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Shared: read only."""
    return write(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def own_folder(tmp_path):
    """To be damaged."""
    return write(tmp_path / "set")
