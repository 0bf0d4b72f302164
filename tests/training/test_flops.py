"""FLOPs of an image are the public classes'; what is frozen is not counted; the text's length enters exactly."""

import pytest
import torch

from configs.schema import compose
from models.base import Cond
from training.flops import PEAKS, Work, flops_per_image, measured_tflops, peak_tflops

SIZES = ("ccdit_xl2", "pixart_xl2", "mmdit_2b", "unet_sd15", "unet_sdxl")


def full_size(name):
    stage = "stage1" if name == "ccdit_xl2" else "stage2"
    model = compose(stage, [f"model={name}"]).model
    with torch.device("meta"):
        return model.build()


def condition(config, tokens, device="meta"):
    pooled = getattr(config, "pooled_dim", None) or max(0, getattr(config, "vector_dim", 0) - 6 * 256)
    return Cond(
        text=torch.zeros(1, tokens, config.text_dim, device=device) if tokens else None,
        pooled=torch.zeros(1, pooled, device=device) if pooled else None,
        size_ids=torch.zeros(1, 6, device=device),
    )


@pytest.mark.parametrize(
    ("name", "side", "tokens", "tflops"),
    [
        ("unet_sd15", 64, 77, 2.41),
        ("unet_sd15", 32, 77, 0.537),
        ("unet_sdxl", 128, 77, 20.2),
        ("unet_sdxl", 64, 77, 4.71),
        ("ccdit_xl2", 32, 0, 0.712),
        ("pixart_xl2", 128, 300, 19.9),
        ("mmdit_2b", 32, 154, 1.73),
        ("mmdit_2b", 64, 154, 5.41),
        ("mmdit_2b", 128, 154, 25.3),
    ],
)
def test_full_sizes_cost_what_the_public_classes_do(name, side, tokens, tflops):
    """TFLOP of a trained image, counted on diffusers' classes in the same way."""
    denoiser = full_size(name)
    latent = (denoiser.config.in_channels, side, side)
    counted = flops_per_image(denoiser, latent, condition(denoiser.config, tokens))
    assert counted / 1e12 == pytest.approx(tflops, rel=0.01)


def small(*overrides):
    sizes = ["model.hidden=32", "model.depth=2", "model.heads=2", *overrides]
    return compose("stage3", ["model=mmdit_tiny", *sizes]).model.build()


def test_every_length_of_text_is_exact_from_three_counts():
    denoiser = small()
    latent, work = (denoiser.config.in_channels, 16, 16), Work(denoiser)
    for tokens in (1, 19, 77):
        cond = condition(denoiser.config, tokens)
        assert work.per_image(latent, cond) == flops_per_image(denoiser, latent, cond)
    work.add(torch.zeros(5, *latent), cond)
    assert work.read() == 5 * flops_per_image(denoiser, latent, cond)
    assert work.read() == 0


def test_a_frozen_linear_saves_its_weight_gradient_alone():
    denoiser = small()
    cond = condition(denoiser.config, 7)
    latent = (denoiser.config.in_channels, 16, 16)
    before = flops_per_image(denoiser, latent, cond)
    linear = denoiser.blocks[1].image.mlp.fc1
    linear.requires_grad_(False)
    tokens = (16 // denoiser.config.patch_size) ** 2
    assert before - flops_per_image(denoiser, latent, cond) == 2 * tokens * linear.in_features * linear.out_features
    denoiser.requires_grad_(False)
    denoiser.final.linear.requires_grad_(True)
    last = 2 * tokens * denoiser.final.linear.weight.numel()
    forward = flops_per_image(denoiser, latent, cond) - last
    assert before / 3.2 < forward < before / 2.8  # all that is left of the backward pass is one product


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [("NVIDIA H100 80GB HBM3", 989, 67), ("NVIDIA GB200", 2500, 80), ("NVIDIA A100-SXM4-80GB", 312, 19.5)],
)
def test_peaks_of_known_devices_are_the_data_sheets(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak_tflops.cache_clear()
    device = torch.device("cuda", 0)
    assert peak_tflops(device, torch.bfloat16) == (bf16, "data sheet")
    assert peak_tflops(device, torch.float32) == (fp32, "data sheet")
    peak_tflops.cache_clear()
    assert all(bf16 > fp32 for bf16, fp32 in PEAKS.values())


def test_the_peak_of_another_device_is_measured():
    peak, source = peak_tflops(torch.device("cpu"), torch.float32)
    assert source == "measured"
    a = torch.rand(512, 512)
    from benchmarks.measure import seconds

    rate = 2 * 512**3 / min(seconds(lambda: a @ a) for _ in range(20)) / 1e12
    assert rate / 4 < peak < rate * 4  # the machine may be busy
    assert measured_tflops(torch.device("cpu"), torch.float32, budget=0.01) > 0


def test_routed_blocks_are_counted_with_the_tokens_that_they_see():
    """Exactly: two blocks of six with all tokens, four with half of them, as in a latent of half the height."""

    def counted(depth, height, *route):
        sizes = [f"model.depth={depth}", "model.hidden=32", "model.heads=2", *route]
        denoiser = compose("stage1", sizes).model.build()
        return flops_per_image(denoiser, (denoiser.config.in_channels, height, 8), Cond())

    half_block, two_blocks = counted(6, 4) - counted(5, 4), counted(2, 8)
    # the linear that modulates, which every block has once, sees no tokens
    assert counted(6, 8, "model.route=0.5", "model.route_blocks=[1,4]") == two_blocks + 4 * half_block
    assert counted(6, 8, "model.route_blocks=[1,4]") > two_blocks + 4 * half_block
