import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffusion.schedule import (
    Betas,
    Path,
    alpha_sigma,
    alpha_sigma_slope,
    beta_table,
    exponential_factor,
    log_snr,
    per_sample,
    shift,
    snr,
    sqrt_factor,
    table_times,
    time_of_log_snr,
    unshift,
)

T = torch.linspace(0, 1, 101, dtype=torch.float64)
INSIDE = T[1:-1]
PUBLIC = {
    Betas.scaled_linear: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    Betas.linear: {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    Betas.cosine: {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("path", Path)
def test_every_path_has_the_same_time_and_exact_ends(path):
    alpha, sigma = alpha_sigma(path, T)
    torch.testing.assert_close(sigma / (alpha + sigma), T)
    torch.testing.assert_close((alpha / sigma)[1:-1] ** 2, snr(INSIDE))
    assert (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)


def test_vp_preserves_variance_and_linear_preserves_the_sum():
    torch.testing.assert_close(sum(k**2 for k in alpha_sigma(Path.vp, T)), torch.ones_like(T))
    torch.testing.assert_close(sum(alpha_sigma(Path.linear, T)), torch.ones_like(T))


@pytest.mark.parametrize("path", Path)
def test_slopes_are_the_derivatives(path):
    t = T.clone().requires_grad_()
    for value, slope in zip(alpha_sigma(path, t), alpha_sigma_slope(path, T), strict=True):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope, expected)


def test_log_snr_inverts_at_the_ends_too():
    torch.testing.assert_close(time_of_log_snr(log_snr(T)), T)
    torch.testing.assert_close(log_snr(INSIDE), snr(INSIDE).log())


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("betas", Betas)
def test_table_is_that_of_diffusers(betas, zero_terminal):
    theirs = DDPMScheduler(**PUBLIC[betas], rescale_betas_zero_snr=zero_terminal)
    alpha, _ = alpha_sigma(Path.vp, table_times(betas, zero_terminal))
    # theirs is accumulated in float32
    torch.testing.assert_close(alpha**2, theirs.alphas_cumprod.double(), atol=1e-6, rtol=1e-4)
    if not zero_terminal:
        torch.testing.assert_close(beta_table(betas), theirs.betas.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("betas", Betas)
def test_zero_terminal_table_ends_at_one_and_keeps_its_first_time(betas):
    plain, terminal = table_times(betas), table_times(betas, zero_terminal=True)
    assert terminal[-1] == 1 and alpha_sigma(Path.vp, terminal[-1]) == (0, 1)
    assert (terminal.diff() > 0).all() and (plain.diff() > 0).all()
    torch.testing.assert_close(terminal[0], plain[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("betas", "ends", "before_the_last"),
    [(Betas.scaled_linear, (0.0292, 14.615), (1125, 2254)), (Betas.linear, (0.0100, 157.4), (7668, 15406))],
)
def test_table_has_the_published_noise_levels(betas, ends, before_the_last):
    sigma = lambda t: (t / (1 - t)).tolist()  # noqa: E731
    plain, terminal = sigma(table_times(betas)), sigma(table_times(betas, zero_terminal=True))
    assert (plain[0], plain[-1]) == (pytest.approx(ends[0], abs=5e-5), pytest.approx(ends[1], rel=4e-4))
    assert terminal[-3:-1] == pytest.approx(before_the_last, abs=1)


@pytest.mark.parametrize("factor", [0.1, 1.0, 1 / 3, 3.0, 7.3])
def test_shift_multiplies_sigma_and_keeps_the_ends(factor):
    shifted = shift(T, factor)
    assert shifted[0] == 0 and shifted[-1] == 1
    torch.testing.assert_close(shifted[1:-1] / (1 - shifted[1:-1]), factor * INSIDE / (1 - INSIDE))
    torch.testing.assert_close(log_snr(shifted)[1:-1], log_snr(INSIDE) - 2 * math.log(factor))
    torch.testing.assert_close(unshift(shifted, factor), T)


def test_shift_by_one_is_nothing():
    torch.testing.assert_close(shift(T, 1.0), T, atol=1e-16, rtol=0)


def test_shift_is_that_of_diffusers():
    theirs = torch.as_tensor(FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas).flip(0)
    torch.testing.assert_close(shift(torch.arange(1, 1001) / 1000, 3.0), theirs)


def test_shift_of_a_size_is_that_of_sd3_and_flux():
    assert sqrt_factor(128 * 128, 32 * 32) == 4  # 256 to 1024 pixels: sqrt(16)
    for side in (16, 32, 64, 96, 128):  # of the latent; patches of 2 x 2
        mu = calculate_shift((side // 2) ** 2)
        theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, INSIDE)
        torch.testing.assert_close(shift(INSIDE, exponential_factor(side * side)), theirs, atol=1e-6, rtol=0)
    assert exponential_factor(4 * 256) == pytest.approx(math.exp(0.5))
    assert exponential_factor(4 * 4096) == pytest.approx(math.exp(1.15))


def test_coefficients_meet_half_precision_latents_in_float32():
    like = torch.zeros(2, 4, 1, 1, dtype=torch.bfloat16)
    value = per_sample(torch.tensor([0.1, 0.9], dtype=torch.float64), like)
    assert value.shape == (2, 1, 1, 1) and value.dtype == torch.float32
    assert per_sample(torch.ones(2), like.double()).dtype == torch.float64
