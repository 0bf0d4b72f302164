"""Buckets: the published sizes, the aspect that is truly the nearest, and pictures cropped where it says."""

import math

import numpy as np
import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from PIL import Image

from data.buckets import bucket_sizes, fit, nearest, scale_of

# Podell et al. 2023, appendix I, those at least as tall as wide; the others are the same with the sides exchanged
SDXL = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip


def test_the_sizes_are_those_of_sdxl():
    assert set(bucket_sizes(1024)) == {*SDXL, *(size[::-1] for size in SDXL)}


@pytest.mark.parametrize(
    ("resolution", "step", "public"), [(1024, 64, ASPECT_RATIO_1024_BIN), (512, 32, ASPECT_RATIO_512_BIN)]
)
def test_the_sizes_of_diffusers_are_among_them(resolution, step, public):
    assert {tuple(map(int, size)) for size in public.values()} <= set(bucket_sizes(resolution, step))


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (64, 16), (256, 32), (512, 64), (768, 64)])
def test_every_set_of_sizes_has_the_square_and_is_symmetric(resolution, step):
    sizes = bucket_sizes(resolution, step, 3.0)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    assert sizes == [size[::-1] for size in sizes[::-1]]
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.9 <= height * width / resolution**2 <= 1
        assert 1 / 3 <= height / width <= 3


def test_a_step_without_sizes_is_refused():
    with pytest.raises(ValueError, match="step=64 has no multiples of about 100 x 100 pixels; choose one that divides"):
        bucket_sizes(100, 64, 1.0)


def test_nearest_minimises_the_difference_of_log_aspects():
    sizes, draw = bucket_sizes(1024), np.random.default_rng(0)
    for height, width in draw.integers(100, 5000, (500, 2)).tolist():
        best = min(abs(math.log(height / width) - math.log(h / w)) for h, w in sizes)
        h, w = nearest(height, width, sizes)
        assert abs(math.log(height / width) - math.log(h / w)) == pytest.approx(best, abs=1e-12)


def test_ties_go_to_the_larger_then_to_the_taller():
    assert nearest(100, 100, [(64, 64), (128, 128), (96, 96)]) == (128, 128)
    for sizes in ([(70, 90), (90, 70)], [(90, 70), (70, 90)]):
        assert nearest(123, 123, sizes) == (90, 70)


@pytest.mark.parametrize("bucket", [(64, 64), (48, 80), (80, 48)])
@pytest.mark.parametrize("size", [(64, 64), (100, 300), (301, 99), (640, 641), (81, 81), (1000, 37)])
def test_fit_shows_the_centre_at_the_right_scale(size, bucket):
    """Pictures whose red says where a pixel lies from top to bottom, and green from left to right."""
    height, width = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height).round()[:, None]
    ramp[..., 1] = np.linspace(0, 255, width).round()
    pixels, (top, left) = fit(Image.fromarray(ramp), bucket)
    scale = scale_of(height, width, bucket)
    assert pixels.shape == (*bucket, 3)
    assert pixels.dtype == np.uint8
    assert min(top, left) == 0  # one side is covered exactly
    for axis, (offset, whole) in enumerate(zip((top, left), size, strict=True)):
        rest = whole * scale - bucket[axis]
        assert abs(offset - rest / 2) <= 1
        middle = np.arange(bucket[axis]) + offset + 0.5  # of resized pixels, whose place in the picture is / scale
        expected = np.clip((middle / scale - 0.5) / (whole - 1) * 255, 0, 255)
        seen = pixels[..., axis].mean(1 - axis)
        inner = slice(2, -2)
        assert np.abs(seen - expected)[inner].max() < 2 + 255 / whole


def test_fit_does_not_alias():
    """Stripes of one pixel become even grey, not coarser stripes."""
    stripes = np.zeros((601, 601, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = fit(Image.fromarray(stripes), (64, 64))
    assert np.abs(pixels[:, 2:-2].astype(int) - 128).max() <= 6


def test_a_picture_of_the_bucket_s_size_is_not_touched():
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    pixels, crop = fit(Image.fromarray(noise), (48, 80))
    assert np.array_equal(pixels, noise)
    assert crop == (0, 0)


def test_scale_says_when_a_picture_would_be_enlarged():
    assert scale_of(64, 64, (64, 64)) == 1
    assert scale_of(63, 640, (64, 64)) > 1
    assert scale_of(128, 640, (64, 64)) == 0.5
