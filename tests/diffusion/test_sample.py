import functools
import inspect
import math

import pytest
import torch

from diffusion.objective import Objective, ObjectiveConfig, Prediction
from diffusion.sample import SAMPLERS, Sampler, ddim, euler
from diffusion.timesteps import uniform_grid

ORDER = {Sampler.euler: 1, Sampler.heun: 2, Sampler.ddim: 1}


def gaussian_noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def law_of_samples(kind, denoise, gaussian, times):
    """Exact (mean, std) of what a sampler makes of z ~ N at times[0], where `denoise` is affine in z.

    The sample is then affine in the first noise and in each step's: one row of the batch measures the response to one
    of them, the last row that to none.
    """
    steps, t = len(times) - 1, float(times[0])
    impulses = torch.cat([torch.eye(steps + 1, dtype=torch.float64), torch.zeros(1, steps + 1, dtype=torch.float64)])
    sample = (
        functools.partial(ddim, noise=lambda step: impulses[:, step + 1, None])
        if kind is Sampler.ddim
        else SAMPLERS[kind]
    )
    x = sample(denoise, (1 - t) * gaussian.mean + gaussian.spread(t) * impulses[:, :1], times)
    return x[-1].item(), (x[:-1] - x[-1]).norm().item()


def test_every_sampler_is_named_and_has_one_signature():
    assert set(SAMPLERS) == set(Sampler) == set(ORDER)
    for sampler in SAMPLERS.values():
        assert list(inspect.signature(sampler).parameters)[:4] == ["denoise", "z", "times", "callback"]


def test_samples_converge_to_the_data_at_the_order_of_the_sampler(objective, sampler, oracle, gaussian):
    errors = []
    for steps in (40, 80):  # on equal steps; a shifted grid reaches the same order, but with several times as many
        times = uniform_grid(steps, objective.t_max)
        mean, std = law_of_samples(sampler[0], oracle(objective), gaussian, times)
        assert mean == pytest.approx(gaussian.mean, abs=1e-9)
        errors.append(abs(std - gaussian.std))
    assert errors[-1] < 0.03
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[sampler[0]], abs=0.15), errors


def test_objectives_agree_on_the_samples_they_describe(sampler, oracle, gaussian, objective):
    sample = functools.partial(ddim, eta=0.0) if sampler[0] is Sampler.ddim else sampler[1]
    times = uniform_grid(12, objective.t_max)
    z = objective.start(gaussian_noise(4, 1, 3, 3), times)
    torch.testing.assert_close(sample(oracle(objective), z, times), sample(gaussian.x0, z, times))


def test_the_denoiser_is_shown_pure_noise_first(objective):
    """A table that stops at sigma_edm = 14.6 was trained on almost unit noise, and that is what it must be shown."""
    noise, times, seen = gaussian_noise(2, 1, 2, 2), objective.grid(5), []
    t = torch.full((2,), objective.t_max, dtype=torch.float64)
    objective.denoise(lambda x_t, t, cond: seen.append(x_t) or x_t)(objective.start(noise, times), t, None)
    torch.testing.assert_close(seen[0], noise)


def test_an_oracle_of_one_picture_is_recovered(objective, sampler, latents):
    x0, eps = latents
    times = objective.grid(9)
    torch.testing.assert_close(sampler[1](lambda z, t: x0, objective.start(eps, times), times), x0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_exactly_the_noise_each_time_should_hold(eta):
    objective = Objective(ObjectiveConfig(prediction=Prediction.v, zero_terminal=True))
    times = objective.grid(12)
    first, *fresh = gaussian_noise(1 + 12, 40_000, 1)
    stds = []
    ddim(
        lambda z, t: torch.zeros_like(z),
        first,
        times,
        lambda step, z, x0: stds.append(z.std().item()),
        eta=eta,
        noise=lambda step: fresh[step],
    )
    assert stds == pytest.approx(times[1:].tolist(), rel=0.015)


def test_ddim_variance_is_the_published_one():
    """One step on the vp path, against DDIM as printed: x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau n."""
    t, s, eta = 0.7, 0.4, 0.8
    x0, eps, noise = gaussian_noise(3, 4, 1)
    norm = lambda t: ((1 - t) ** 2 + t**2) ** 0.5  # noqa: E731
    alpha_t, sigma_t, alpha_s, sigma_s = (1 - t) / norm(t), t / norm(t), (1 - s) / norm(s), s / norm(s)
    tau = eta * (sigma_s**2 / sigma_t**2 * (1 - alpha_t**2 / alpha_s**2)) ** 0.5
    expected = alpha_s * x0 + (sigma_s**2 - tau**2) ** 0.5 * eps + tau * noise
    times = torch.tensor([t, s], dtype=torch.float64)
    z = ddim(lambda z, t: x0, (1 - t) * x0 + t * eps, times, eta=eta, noise=lambda step: noise)
    torch.testing.assert_close(z / norm(s), expected)


def test_euler_is_ddim_without_noise(objective, oracle):
    times = objective.grid(9)
    z = objective.start(gaussian_noise(4, 1, 3, 3), times)
    torch.testing.assert_close(ddim(oracle(objective), z, times, eta=0.0), euler(oracle(objective), z, times))


def test_latents_are_not_clamped(sampler):
    far = torch.full((2, 1, 2, 2), 40.0, dtype=torch.float64)
    torch.testing.assert_close(sampler[1](lambda z, t: far, torch.zeros_like(far), uniform_grid(5)), far)


def test_callback_sees_every_step(sampler, gaussian):
    seen = []
    z = sampler[1](gaussian.x0, gaussian_noise(2, 1), uniform_grid(5), lambda step, z, x0: seen.append((step, z)))
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4] and torch.equal(seen[-1][1], z)


def test_sampling_may_stop_and_continue_elsewhere(gaussian):
    z, times = gaussian_noise(3, 1), uniform_grid(8)
    handed_over = euler(gaussian.x0, euler(gaussian.x0, z, times[:5]), times[4:])
    assert torch.equal(handed_over, euler(gaussian.x0, z, times))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_reach_the_model_in_float32(sampler, dtype):
    dtypes = set()
    sampler[1](lambda z, t: dtypes.add(t.dtype) or torch.zeros_like(z), torch.zeros(2, 1, dtype=dtype), uniform_grid(3))
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("times", [[0.0, 0.5, 1.0], [1.2, 0.0], [0.5, 0.5], [1.0]])
def test_times_that_do_not_descend_are_refused(sampler, times):
    with pytest.raises(ValueError, match="do not descend strictly"):
        sampler[1](lambda z, t: z, torch.zeros(1, 1), torch.tensor(times))


def test_eta_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"sampler.eta=1.5"):
        ddim(lambda z, t: z, torch.zeros(1, 1), uniform_grid(2), eta=1.5)
