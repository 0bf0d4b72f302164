"""What cannot work is refused with one sentence before a model is built, and nothing is overwritten."""

import shutil

import pytest

from training.config import TrainConfig
from training.run import run


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    monkeypatch.setattr("models.ccdit.CCDiTConfig.build", lambda self: pytest.fail("built a denoiser"))
    monkeypatch.setattr("models.pixart.PixArtConfig.build", lambda self: pytest.fail("built a denoiser"))


def test_resolution_must_be_whole_patches(config):
    with pytest.raises(ValueError, match=r"data.resolution=64 must be a multiple of 24, .* choose 48"):
        run(config("stage1", "model.patch_size=3", "model.base_size=9"))


def test_resolution_must_be_the_shards(config):
    with pytest.raises(ValueError, match="data.resolution=128, but .* holds pictures of 64"):
        run(config("stage1", "data.resolution=128"))


def test_channels_must_be_the_autoencoders(config):
    with pytest.raises(ValueError, match=r"model.in_channels=4, .* have 8 channels; give model.in_channels=8"):
        run(config("stage1", "model.in_channels=4"))


def test_labels_are_needed_for_classes(config, shards):
    with pytest.raises(ValueError, match="records without a class"):
        run(config("stage1", f"data.path={shards / 'shapes-128'}", "data.resolution=128"))


def test_text_width_must_be_the_encoders(config):
    with pytest.raises(ValueError, match=r"model.text_dim=100, but .* give 192; give model.text_dim=192"):
        run(config("stage2", "model.text_dim=100"))


def test_a_shard_with_a_wrong_hash_is_named(config, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards / "shapes-64", copy)
    tar = copy / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000.tar is damaged: its SHA-256"):
        run(config("stage1", f"data.path={copy}", "data.verify=true"))
    assert not (tmp_path / "run").exists()


def test_a_sampler_that_cannot_draw_is_refused_before_training(config):
    with pytest.raises(ValueError, match="sampler.eta=0.5 adds noise, but sampler.name=euler takes none; give sampler"):
        config("stage1", "sampler=euler", "sampler.eta=0.5")
    with pytest.raises(ValueError, match="a trailing grid walks a table, but objective.times=uniform; use the uniform"):
        run(config("stage1", "objective=flow", "objective.times=uniform", "sampler.grid=trailing"))


def test_the_batch_must_divide(config):
    with pytest.raises(ValueError, match="train.micro_batch=3 must divide a rank's share of 8 images; choose one of"):
        run(config("stage1", "train.micro_batch=3"))
    with pytest.raises(ValueError, match=r"divisible by the 3 ranks;\s*choose 6 or 9"):
        TrainConfig(batch_size=8).micro_batch_of(3)


def test_init_from_nowhere(config, tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no whole checkpoint; give a run folder"):
        run(config("stage1", f"init.from={tmp_path / 'nowhere'}"))


def test_groups_of_noise_fill_a_micro_batch(config):
    with pytest.raises(ValueError, match=r"objective.pairing=3 does not divide a micro-batch of 8 images"):
        run(config("stage3", "objective.pairing=3"))


def test_each_encoder_has_a_share_of_dropout(config):
    for stage, encoders in (("stage1", 0), ("stage2", 2)):
        with pytest.raises(ValueError, match=rf"encoder_dropout=\[0.5\] has 1 shares, but there are {encoders} text"):
            run(config(stage, "train.encoder_dropout=[0.5]"))
