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


def contrast(x):
    return x.flatten(1).std(1)


def test_scale_one_is_the_condition_and_zero_the_null_with_one_branch(setting):
    denoise, cond, null, z, t, calls = setting
    assert torch.equal(guided(denoise, [(cond, 1.0)], null, 1.0)(z, t), denoise(z, t, cond))
    assert torch.equal(guided(denoise, [(cond, 1.0)], null, 0.0)(z, t), denoise(z, t, null))
    assert set(calls) == {len(z)}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("scale", [0.5, 4.0, -1.0])
def test_scale_extrapolates_from_null_to_condition(setting, scale, together):
    denoise, cond, null, z, t, calls = setting
    actual = guided(denoise, [(cond, 1.0)], null, scale, together=together)(z, t)
    assert calls == ([2 * len(z)] if together else [len(z)] * 2)
    pos, neg = denoise(z, t, cond), denoise(z, t, null)
    torch.testing.assert_close(actual, neg + scale * (pos - neg))


def test_a_negative_prompt_in_place_of_the_null_pushes_away(setting):
    denoise, cond, null, z, t, _ = setting
    stronger = Prompt(null.rows - 1)
    difference = guided(denoise, [(cond, 1.0)], stronger, 3.0)(z, t) - guided(denoise, [(cond, 1.0)], null, 3.0)(z, t)
    torch.testing.assert_close(difference, 2 * (denoise(z, t, cond) - denoise(z, t, Prompt(cond.rows - 1))))


@pytest.mark.parametrize(("scale", "branches"), [(4.0, 3), (1.0, 3), (0.0, 2)])
def test_a_negative_prompt_with_a_scale_is_a_branch_of_its_own(setting, scale, branches):
    denoise, cond, null, z, t, calls = setting
    negative = Prompt(null.rows - 3)
    actual = guided(denoise, [(cond, 1.0)], null, scale, negative=(negative, 1.5))(z, t)
    assert calls == [branches * len(z)]
    u, c, n = (denoise(z, t, each) for each in (null, cond, negative))
    torch.testing.assert_close(actual, u + scale * (c - u) - 1.5 * (n - u))


def test_a_negative_scale_of_zero_is_no_negative_prompt(setting):
    denoise, cond, null, z, t, calls = setting
    with_one = guided(denoise, [(cond, 1.0)], null, 4.0, negative=(Prompt(null.rows - 3), 0.0))(z, t)
    assert torch.equal(with_one, guided(denoise, [(cond, 1.0)], null, 4.0)(z, t))
    assert set(calls) == {2 * len(z)}


def test_composed_prompts_add_their_directions_sample_by_sample(setting):
    denoise, cond, null, z, t, _ = setting
    other = Prompt(cond.rows + 2)
    weights = torch.linspace(0, 1, len(z), dtype=torch.float64)  # the first sample has no second prompt
    actual = guided(denoise, [(cond, 1.0), (other, weights)], null, 3.0)(z, t)
    u, c, d = (denoise(z, t, each) for each in (null, cond, other))
    torch.testing.assert_close(actual, u + 3 * ((c - u) + weights.view(-1, 1, 1, 1) * (d - u)))
    torch.testing.assert_close(actual[:1], guided(denoise, [(cond, 1.0)], null, 3.0)(z, t)[:1])


def test_full_rescale_restores_the_contrast_of_each_sample(setting):
    denoise, cond, null, z, t, _ = setting
    pos, plain = denoise(z, t, cond), guided(denoise, [(cond, 1.0)], null, 6.0)(z, t)
    full, partial = (guided(denoise, [(cond, 1.0)], null, 6.0, rescale=phi)(z, t) for phi in (1.0, 0.7))
    torch.testing.assert_close(contrast(full), contrast(pos))
    torch.testing.assert_close(partial, 0.7 * full + 0.3 * plain)


def test_the_unconditional_model_is_neither_confined_nor_rescaled(setting):
    denoise, cond, null, z, t, calls = setting
    actual = guided(denoise, [(cond, 1.0)], null, 0.0, rescale=1.0, interval=(0.0, 0.1))(z, t)
    assert calls == [len(z)]
    torch.testing.assert_close(actual, denoise(z, t, null))


def test_rescale_leaves_a_flat_sample_finite(setting):
    _, cond, null, z, t, _ = setting
    flat = lambda z, t, cond: cond.rows.view(-1, 1, 1, 1).expand_as(z)  # noqa: E731
    assert guided(flat, [(cond, 1.0)], null, 3.0, rescale=0.7)(z, t).isfinite().all()


def test_guidance_is_off_outside_its_interval(setting):
    denoise, cond, null, z, t, calls = setting
    negative = (Prompt(null.rows - 2), 0.7)
    confined = guided(denoise, [(cond, 1.0)], null, 4.0, interval=(0.2, 0.8), negative=negative)
    inside = guided(denoise, [(cond, 1.0)], null, 4.0, negative=negative)(z, t)
    outside = denoise(z, t, cond)
    calls.clear()
    assert torch.equal(confined(z, t), inside)
    assert torch.equal(confined(z, 0.3 + t + 0.1), outside)
    assert calls == [3 * len(z), len(z)]
    mixed = torch.where(torch.arange(len(z)) % 2 == 0, t, 0.9)
    torch.testing.assert_close(confined(z, mixed)[::2], inside[::2])
    torch.testing.assert_close(confined(z, mixed)[1::2], outside[1::2])


def test_branches_that_do_not_fit_together_run_one_by_one_from_then_on(setting):
    denoise, cond, null, z, t, calls = setting

    def small(x, t, cond):
        calls.append(len(x))
        if len(x) > len(z):
            raise torch.OutOfMemoryError("of a device this small")
        return denoise(x, t, cond)

    expected = guided(denoise, [(cond, 1.0)], null, 4.0)(z, t)
    frugal = guided(small, [(cond, 1.0)], null, 4.0)
    calls.clear()
    torch.testing.assert_close(frugal(z, t), expected)
    torch.testing.assert_close(frugal(z, t), expected)
    assert calls.count(2 * len(z)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rescale": 1.5}, "sampler.rescale=1.5"), ({"interval": (0.8, 0.2)}, r"sampler.interval=\[0.8, 0.2\]")],
)
def test_impossible_settings_are_refused(setting, wrong, message):
    denoise, cond, null, *_ = setting
    with pytest.raises(ValueError, match=message):
        guided(denoise, [(cond, 1.0)], null, 4.0, **wrong)
