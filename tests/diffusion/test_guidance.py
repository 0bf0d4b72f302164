from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion.guidance import guided


@dataclass
class Prompt:
    """The least a condition must be: rows that `cat` can stack."""

    rows: Tensor

    @staticmethod
    def cat(prompts):
        return Prompt(torch.cat([prompt.rows for prompt in prompts]))


@pytest.fixture
def setting(latents):
    """(denoise, cond, null, z, t, calls); the condition's value is added to z, and calls collects batch sizes."""
    z, pattern = latents
    calls = []

    def denoise(z, t, cond):
        calls.append(len(z))
        tiles = pattern.repeat(len(z) // len(pattern), 1, 1, 1)
        return z + cond.rows.view(-1, 1, 1, 1) * tiles

    b = len(z)
    cond = Prompt(torch.linspace(1, 2, b, dtype=torch.float64))
    null = Prompt(torch.full((b,), -0.5, dtype=torch.float64))
    return denoise, cond, null, z, torch.full((b,), 0.5, dtype=torch.float64), calls


def test_scale_one_is_the_condition_and_zero_the_null_with_one_branch(setting):
    denoise, cond, null, z, t, calls = setting
    assert torch.equal(guided(denoise, cond, null, 1.0)(z, t), denoise(z, t, cond))
    assert torch.equal(guided(denoise, cond, null, 0.0)(z, t), denoise(z, t, null))
    assert set(calls) == {len(z)}


@pytest.mark.parametrize("scale", [0.5, 4.0, -1.0])
def test_scale_extrapolates_from_null_to_condition_in_one_batch(setting, scale):
    denoise, cond, null, z, t, calls = setting
    actual = guided(denoise, cond, null, scale)(z, t)
    assert calls == [2 * len(z)]
    pos, neg = denoise(z, t, cond), denoise(z, t, null)
    torch.testing.assert_close(actual, neg + scale * (pos - neg))


def test_a_negative_prompt_pushes_away(setting):
    denoise, cond, null, z, t, _ = setting
    stronger = Prompt(null.rows - 1)
    difference = guided(denoise, cond, stronger, 3.0)(z, t) - guided(denoise, cond, null, 3.0)(z, t)
    torch.testing.assert_close(difference, 2 * (denoise(z, t, cond) - denoise(z, t, Prompt(cond.rows - 1))))


def test_full_rescale_restores_the_contrast_of_each_sample(setting):
    denoise, cond, null, z, t, _ = setting
    contrast = lambda x: x.flatten(1).std(1)  # noqa: E731
    pos, plain = denoise(z, t, cond), guided(denoise, cond, null, 6.0)(z, t)
    full, partial = (guided(denoise, cond, null, 6.0, rescale=phi)(z, t) for phi in (1.0, 0.7))
    torch.testing.assert_close(contrast(full), contrast(pos))
    torch.testing.assert_close(partial, 0.7 * full + 0.3 * plain)


def test_rescale_leaves_a_flat_sample_finite(setting):
    _, cond, null, z, t, _ = setting
    flat = guided(lambda z, t, cond: cond.rows.view(-1, 1, 1, 1).expand_as(z), cond, null, 3.0, rescale=0.7)(z, t)
    assert flat.isfinite().all()


def test_guidance_is_off_outside_its_interval(setting):
    denoise, cond, null, z, t, calls = setting
    confined = guided(denoise, cond, null, 4.0, interval=(0.2, 0.8))
    inside, outside = guided(denoise, cond, null, 4.0)(z, t), denoise(z, t, cond)
    calls.clear()
    assert torch.equal(confined(z, t), inside)
    assert torch.equal(confined(z, 0.3 + t + 0.1), outside)
    assert calls == [2 * len(z), len(z)]
    mixed = torch.where(torch.arange(len(z)) % 2 == 0, t, 0.9)
    torch.testing.assert_close(confined(z, mixed)[::2], inside[::2])
    torch.testing.assert_close(confined(z, mixed)[1::2], outside[1::2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rescale": 1.5}, "sampler.rescale=1.5"), ({"interval": (0.8, 0.2)}, r"sampler.interval=\[0.8, 0.2\]")],
)
def test_impossible_settings_are_refused(setting, wrong, message):
    denoise, cond, null, *_ = setting
    with pytest.raises(ValueError, match=message):
        guided(denoise, cond, null, 4.0, **wrong)
