"""What the data may be: pictures of several sizes, mixed sets, latents drawn anew, records that are damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.schema import compose
from data.reader import ShardReader
from data.shards import ShardWriter
from models.autoencoder import AutoencoderConfig
from training.run import run

SIZES = [(128, 128), (96, 160), (160, 96)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sets of noise in three sizes, with captions, mirror images and deviations."""
    root = tmp_path_factory.mktemp("several")
    info = AutoencoderConfig(path="assets/shapes").build().info()
    rng, folders = np.random.default_rng(0), []
    for name, count in (("a", 40), ("b", 9)):
        with ShardWriter(root / name, resolution=128, vae=info, extra={"num_classes": 48}, shard_size=16) as writer:
            for row in range(count):
                size = SIZES[row % 3]
                latent = rng.standard_normal((info["channels"], size[0] // 8, size[1] // 8))
                record = {"captions": {"alt": f"a red circle {row}"}, "class_id": row}
                writer.add(record, size=size, latent=latent, flip=latent[..., ::-1], std=np.full_like(latent, 0.1))
        folders.append(str(root / name))
    return folders


def lines(folder: Path, kind: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


DIT = ["model.hidden=32", "model.depth=2", "model.heads=2"]
UNET = ["model.channels=[32,64]", "model.depths=[0,1]", "model.heads=[1,2]", "model.layers=1"]
MODELS = {
    "pixart_tiny": ("stage3", DIT),
    "mmdit_tiny": ("stage3", DIT),
    "unet_tiny": ("stage2", UNET),
    "ccdit_tiny": ("stage1", DIT),
}


@pytest.mark.parametrize("model", list(MODELS))
def test_every_model_trains_on_pictures_of_several_sizes(several, tmp_path, model):
    stage, size = MODELS[model]
    where = [f"name={model}", f"outputs={tmp_path}", f"model={model}", "data=shards", "data.resolution=128"]
    mix = f"data.mix={{{several[0]}: 0.7, {several[1]}: 0.3}}"
    options = [mix, "data.chunk=8", "data.workers=0", "data.flip=true", "data.posterior=true"]
    clocks = ["train.images=96", "train.batch_size=8", "train.log_every=8", "sample.every=1000000", "sampler.steps=2"]
    cfg = compose(stage, [*where, *options, *clocks, *size])
    run(cfg)
    found = lines(tmp_path / model)
    assert len(found) == 12
    assert all(0.1 < line["loss"] < 10 for line in found)
    assert all(line["damaged"] == 0 for line in found)


def damage(folder: Path, rows: range) -> None:
    reader = ShardReader(folder)
    for row in rows:
        at = reader._records[row]
        path = folder / f"{at['shard']:05d}.tar"
        content = bytearray(path.read_bytes())
        content[at["latent"] + 3] ^= 16
        path.write_bytes(content)


def test_damaged_records_are_counted_named_and_capped(config, shards, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(shards / "shapes-64", copy)
    damage(copy, range(3))
    cfg = config("stage1", f"data.path={copy}", "train.images=40", name="whole")
    run(cfg)
    assert sum(line["damaged"] for line in lines(tmp_path / "whole")) == 3  # one epoch of 40 records
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "whole"))
    said = capfd.readouterr().err
    assert all(f"00000.tar, record {row}: its latent differs from its checksum" in said for row in range(3))
    saved = sorted((tmp_path / "whole/checkpoints").iterdir())[-1]
    assert json.loads((saved / "state.json").read_text())["damaged"] == 3
    cfg = config("stage1", f"data.path={copy}", "train.images=80", "data.max_damaged=2", name="capped")
    with pytest.raises(ValueError, match=r"3 records were damaged, over data.max_damaged=2; the lines"):
        run(cfg)


def test_damage_on_one_rank_alone_changes_no_other_image(config, shards, tmp_path):
    """The first steps, before a damaged record comes, and the ledger after it are those of the whole set."""
    copy = tmp_path / "copy"
    shutil.copytree(shards / "shapes-64", copy)
    cfg = config("stage1", f"data.path={copy}", "train.images=40", name="before")
    run(cfg)
    damage(copy, range(1))
    cfg = config("stage1", f"data.path={copy}", "train.images=40", name="after")
    run(cfg)
    before, after = lines(tmp_path / "before"), lines(tmp_path / "after")
    first = next(i for i, line in enumerate(after) if line["damaged"])
    assert [line["loss"] for line in before[:first]] == [line["loss"] for line in after[:first]]
    assert before[first]["loss"] != after[first]["loss"]


def test_sizes_must_be_whole_patches(several):
    where = ["name=x", "data=shards", "data.resolution=128", f"data.path={several[0]}"]
    with pytest.raises(ValueError, match=r"holds pictures of 96x160, but sides must be multiples of 64, .*encode.step"):
        run(compose("stage1", [*where, "model.patch_size=8"]))
