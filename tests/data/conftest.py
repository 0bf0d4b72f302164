"""A small data set of 37 records in four shards, whose numbers say which record they are."""

import numpy as np
import pytest

from data.shards import ShardWriter
from data.texts import TextLayout

COUNT, CAPTIONS, SHAPE = 37, 3, (2, 4, 4)
TEXT = TextLayout(dtype="float16", width=5, length=3, masked=True, encoder="fake", pooled=6)


def latent(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(SHAPE).astype(np.float16)


def write(folder, count=COUNT, **options):
    options = {
        "resolution": 32,
        "vae": {"id": "fake"},
        "text": TEXT,
        "extra": {"num_classes": 5},
        "shard_size": 10,
    } | options
    with ShardWriter(folder, **options) as writer:
        for row in range(count):
            captions = {f"c{i}": f"{row}, caption {i}: ü" for i in range(CAPTIONS)}
            writer.add({"captions": captions, "class_id": row % 5}, latent=latent(row).astype(np.float32))
            for i, caption in enumerate(captions.values()):
                number = row + i / 4
                writer.add_text(caption, np.full((3, 5), number), np.full(6, number), np.arange(3) <= i)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Shared: read only."""
    return write(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def own_folder(tmp_path):
    """To be damaged."""
    return write(tmp_path / "set")
