"""The committed autoencoder, the ceiling of everything after; and small random ones, read as the public ones are."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data import shapes
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.pretrained import FrozenPrecision


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


def test_tiles_change_large_pictures_a_little_and_small_ones_not_at_all():
    vae, (_, x) = AutoencoderConfig(path="assets/shapes").build(), pictures(1, 256)
    small, large = pictures(1, 128)[1], vae.encode(x)
    whole, untiled = vae.decode(large), vae.decode(vae.encode(small))
    vae.tile(128)
    assert torch.equal(vae.decode(vae.encode(small)), untiled)
    apart = (vae.decode(large) - whole).abs()
    assert 0 < apart.mean() < 0.03


def public(folder, *, channels=4, shift=None, force_upcast=False, variant=None, gain=1.0) -> AutoencoderKL:
    """A small random autoencoder, saved in `folder`/vae."""
    torch.manual_seed(0)
    module = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.5, shift_factor=shift,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4, force_upcast=force_upcast,
    )  # fmt: skip
    for half in (module.encoder, module.decoder):
        half.conv_in.weight.data *= gain  # a norm behind it takes it back, if it fits
    module.save_pretrained(folder / "vae", variant=variant)
    return module.eval()


@pytest.mark.parametrize(("channels", "shift"), [(4, None), (16, 0.0609)])
@torch.no_grad()
def test_scale_and_shift_are_the_configs(tmp_path, channels, shift):
    theirs = public(tmp_path, channels=channels, shift=shift)
    ours, (_, x) = AutoencoderConfig(path=str(tmp_path)).build(), pictures(2, 64)
    latents = ours.encode(x)
    torch.testing.assert_close(latents, (theirs.encode(x).latent_dist.mean - (shift or 0)) * 0.5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / 0.5 + (shift or 0)).sample.clamp(-1, 1))
    info = ours.info()
    assert (info["factor"], info["channels"], info["scale"], info["shift"]) == (2, channels, 0.5, shift or 0)


@torch.no_grad()
def test_statistics_of_each_channel_are_those_of_diffusers(tmp_path):
    """Its pipelines decode latents * std / scaling_factor + mean, where the config has both."""
    theirs, (_, x) = public(tmp_path), pictures(2, 64)
    z = theirs.encode(x).latent_dist.mean
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    ours = AutoencoderConfig(path=str(tmp_path), latents_mean=mean.tolist(), latents_std=std.tolist()).build()
    latents = ours.encode(x)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    config: Any = ours.module.config
    back = latents * torch.tensor(config.latents_std).view(1, 4, 1, 1) / config.scaling_factor
    back = back + torch.tensor(config.latents_mean).view(1, 4, 1, 1)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(back).sample.clamp(-1, 1))
    torch.testing.assert_close(ours.moments(x)[1], theirs.encode(x).latent_dist.std / std.view(1, 4, 1, 1))
    plain = AutoencoderConfig(path=str(tmp_path)).build()
    assert ours.info()["id"] != plain.info()["id"]  # data made with one are refused by the other

    ours.module.save_pretrained(tmp_path / "again" / "vae")  # as an export of SDXL's holds it
    again = AutoencoderConfig(path=str(tmp_path / "again")).build()
    assert torch.equal(again.encode(x), latents)
    assert again.info() | {"path": ""} == ours.info() | {"path": ""}


def test_statistics_that_do_not_fit_are_refused(tmp_path):
    public(tmp_path)
    with pytest.raises(
        ValueError, match=r"vae.latents_mean=\[0.0\] and vae.latents_std=\[\] must be one number a channel"
    ):
        AutoencoderConfig(path=str(tmp_path), latents_mean=[0.0])
    with pytest.raises(ValueError, match=r"vae.latents_mean=\[0.0\] has 1 numbers, but .* have 4 channels; give one a"):
        AutoencoderConfig(path=str(tmp_path), latents_mean=[0.0], latents_std=[1.0]).build()


def test_the_digest_tells_autoencoders_apart_at_any_precision(vae, tmp_path):
    module = public(tmp_path)
    config = AutoencoderConfig(path=str(tmp_path))
    digests = {
        AutoencoderConfig(path=str(tmp_path), precision=precision).build().info()["id"] for precision in FrozenPrecision
    }
    assert len(digests) == 1
    module.decoder.conv_out.bias.data += 1e-3
    module.save_pretrained(tmp_path / "vae")
    assert len(digests | {config.build().info()["id"], vae.info()["id"]}) == 3


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_is_near_and_returns_float32(tmp_path, name):
    public(tmp_path)
    x = pictures(2, 64)[1]
    exact = AutoencoderConfig(path=str(tmp_path)).build()
    rough = AutoencoderConfig(path=str(tmp_path), precision=FrozenPrecision[name]).build()
    assert rough.module.dtype == FrozenPrecision[name].value
    latents = exact.encode(x)
    for a, b in ((latents, rough.encode(x)), (exact.decode(latents), rough.decode(latents))):
        assert b.dtype == torch.float32
        assert 0 < (a - b).norm() / a.norm() < 0.05


def test_one_that_asks_for_more_than_float16_gets_it_and_says_so(tmp_path):
    public(tmp_path, force_upcast=True)
    with pytest.warns(UserWarning, match=r"vae.precision=fp16, but .* \(force_upcast\); it computes in fp32"):
        vae = AutoencoderConfig(path=str(tmp_path), precision=FrozenPrecision.fp16).build()
    assert vae.module.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bf16 = AutoencoderConfig(path=str(tmp_path), precision=FrozenPrecision.bf16).build()
    assert bf16.module.dtype == torch.bfloat16


def test_what_is_not_finite_is_refused(tmp_path):
    public(tmp_path, gain=1e6)
    x, z = pictures(1, 64)[1], torch.randn(1, 4, 32, 32)
    for name in ("fp32", "bf16"):
        vae = AutoencoderConfig(path=str(tmp_path), precision=FrozenPrecision[name]).build()
        vae.encode(x), vae.decode(z)
    with pytest.raises(ValueError, match="gave pixels that are not finite: its weights or what it was given are brok"):
        vae.decode(z * float("nan"))
    vae = AutoencoderConfig(path=str(tmp_path), precision=FrozenPrecision.fp16).build()
    with pytest.raises(
        ValueError, match=r"gave latents that are not finite: float16 .* set vae.precision=bf16 or fp32"
    ):
        vae.encode(x)
    with pytest.raises(ValueError, match="gave pixels that are not finite: float16 overflows"):
        vae.decode(z)


def test_files_named_fp16_are_read_when_asked_for(tmp_path):
    theirs = public(tmp_path, variant="fp16")
    ours = AutoencoderConfig(path=str(tmp_path), variant="fp16").build()
    assert torch.equal(ours.module.decoder.conv_out.weight, theirs.decoder.conv_out.weight)
    with pytest.raises(ValueError, match="vae.path=.* has nothing readable in vae: .* give a folder or hub name"):
        AutoencoderConfig(path=str(tmp_path)).build()
