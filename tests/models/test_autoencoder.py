"""The committed autoencoder: the ceiling of everything after, and the owner of scale, shift and range."""

import numpy as np
import pytest
import torch

from data import shapes
from models.autoencoder import Autoencoder, AutoencoderConfig


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return AutoencoderConfig(path="assets/shapes").build()


def pictures(count: int, resolution: int) -> tuple[list[shapes.Scene], torch.Tensor]:
    scenes = [shapes.scene(7, i, held_out=bool(i % 2)) for i in range(count)]
    stack = np.stack([shapes.render(scene, resolution) for scene in scenes])
    return scenes, torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize(("resolution", "least"), [(64, 0.97), (128, 0.99)])
def test_reconstructions_are_readable(vae, resolution, least):
    scenes, x = pictures(100, resolution)
    decoded = (vae.decode(vae.encode(x)).permute(0, 2, 3, 1).numpy() + 1) / 2
    assert shapes.mark(scenes, decoded)["all"] >= least


def test_latents_have_about_unit_variance_and_are_not_clamped(vae):
    latents = vae.encode(pictures(64, 64)[1])
    assert latents.shape == (64, vae.channels, 64 // vae.factor, 64 // vae.factor)
    assert latents.mean().abs() < 0.1
    assert 0.9 < latents.std() < 1.1
    assert latents.abs().max() > 2


def test_scale_and_shift_are_the_configs(vae):
    _, x = pictures(2, 64)
    raw = vae.module.encode(x).latent_dist.mean
    config = vae.module.config
    torch.testing.assert_close(vae.encode(x), (raw - config.shift_factor) * config.scaling_factor)
    info = vae.info()
    assert (info["factor"], info["channels"], info["scale"]) == (8, 8, config.scaling_factor)


def test_the_digest_tells_autoencoders_apart(vae):
    other = AutoencoderConfig(path="assets/shapes").build()
    assert other.info()["id"] == vae.info()["id"]
    other.module.decoder.conv_out.bias.data += 1e-3
    assert other.info()["id"] != vae.info()["id"]
