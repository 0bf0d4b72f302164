import math
from itertools import pairwise

import diffusers
import pytest
import torch

from diffusion.objective import NetworkTime, Objective, ObjectiveConfig, Prediction
from diffusion.sample import ETA, Sampler, ddim, dopri5, dpmpp_2m, euler, heun, heun_edm, ode_euler, sample
from diffusion.schedule import Path
from diffusion.timesteps import TimeLaw, uniform_grid

SECOND = (Sampler.heun, Sampler.heun_edm, Sampler.dpmpp_2m, Sampler.dpmpp_2m_sde)
ORDER = dict.fromkeys(Sampler, 1) | dict.fromkeys(SECOND, 2) | {Sampler.unipc: 3}  # corrected, so one above its name
FIXED = [kind for kind in Sampler if kind is not Sampler.dopri5]  # whose error follows the grid, not a tolerance


def gaussian_noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def law_of_samples(kind, denoise, gaussian, times, **options):
    """Exact (mean, std) of what a sampler makes of z ~ N at times[0], where `denoise` is affine in z.

    The sample is then affine in the first noise and in each step's: one row of the batch measures the response to one
    of them, the last row that to none.
    """
    steps, t = len(times) - 1, float(times[0])
    impulses = torch.cat([torch.eye(steps + 1, dtype=torch.float64), torch.zeros(1, steps + 1, dtype=torch.float64)])
    start = (1 - t) * gaussian.mean + gaussian.spread(t) * impulses[:, :1]
    x = sample(kind, denoise, start, times, noise=lambda step: impulses[:, step + 1, None], **options)
    return x[-1].item(), (x[:-1] - x[-1]).norm().item()


@pytest.mark.parametrize("kind", FIXED, ids=lambda kind: kind.name)
def test_samplers_have_the_order_of_their_names(objective, kind, oracle, gaussian):
    """Between times that are singular in no sampler's variable; of the stochastic ones it is the variance's error."""
    errors = []
    for steps in (40, 80):
        times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        mean, std = law_of_samples(kind, oracle(objective), gaussian, times)
        assert mean == pytest.approx(0.9 * gaussian.mean, abs=1e-9)
        errors.append(abs(std - gaussian.spread(0.1)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[kind], abs=0.15), errors


@pytest.mark.parametrize("kind", FIXED, ids=lambda kind: kind.name)
def test_samples_are_of_the_data(objective, kind, oracle, gaussian):
    errors = []
    for steps in (40, 80):
        mean, std = law_of_samples(kind, oracle(objective), gaussian, uniform_grid(steps, objective.t_max))
        assert mean == pytest.approx(gaussian.mean, abs=1e-9)
        errors.append(abs(std - gaussian.std))
    assert errors[1] < errors[0] + 1e-5 and errors[1] < 0.03


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind", ETA)
def test_stochastic_samplers_converge_for_every_eta(kind, eta, gaussian):
    times = uniform_grid(400, 1.0)
    mean, std = law_of_samples(kind, gaussian.x0, gaussian, times, eta=eta)
    assert mean == pytest.approx(gaussian.mean, abs=1e-9) and std == pytest.approx(gaussian.std, rel=0.01)


def test_the_adaptive_solver_is_as_exact_as_it_is_told(objective, oracle, gaussian):
    """And asks the network oftener for it."""
    errors, calls = [], []
    for tolerance in (1e-3, 1e-6):
        count = [0]

        def counted(z, t, count=count):
            count[0] += 1
            return oracle(objective)(z, t)

        times = uniform_grid(3, objective.t_max)
        z = objective.start(gaussian_noise(50, 1), times)
        t = float(times[0])
        exact = gaussian.mean + (z - (1 - t) * gaussian.mean) / gaussian.spread(t) * gaussian.std
        x = dopri5(counted, z, times, tolerance=tolerance)
        errors.append((x - exact).abs().max().item())
        calls.append(count[0])
    assert errors[0] < 0.1 and errors[1] < 5e-5 and calls[0] < calls[1] < 400


def test_a_tolerance_below_the_precision_is_refused():
    rough = lambda z, t: torch.randn_like(z)  # noqa: E731
    with pytest.raises(ValueError, match="sampler.tolerance=1e-12 is finer than the network is smooth .*; choose 1e-3"):
        dopri5(rough, torch.randn(4, 8), uniform_grid(2), tolerance=1e-12)


def test_objectives_agree_on_the_samples_they_describe(sampler, oracle, gaussian, objective):
    times = uniform_grid(12, objective.t_max)
    z = objective.start(gaussian_noise(4, 1, 3, 3), times)
    noises = gaussian_noise(12, 4, 1, 3, 3)
    ours, direct = (
        sampler[1](denoise, z, times, noise=noises.__getitem__) for denoise in (oracle(objective), gaussian.x0)
    )
    torch.testing.assert_close(ours, direct)


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


# --- noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ETA)
def test_every_step_leaves_exactly_the_noise_its_time_should_hold(kind, eta):
    objective = Objective(ObjectiveConfig(prediction=Prediction.v, zero_terminal=True))
    times = objective.grid(12)
    first, *fresh = gaussian_noise(1 + 12, 40_000, 1)
    stds = []
    sample(
        kind, lambda z, t: torch.zeros_like(z), first, times, lambda step, z, x0: stds.append(z.std().item()),
        eta=eta, noise=fresh.__getitem__,
    )  # fmt: skip
    assert stds == pytest.approx(times[1:].tolist(), rel=0.01)


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


def test_samplers_without_noise_are_those_they_become(objective, oracle):
    times = objective.grid(9)
    z = objective.start(gaussian_noise(4, 1, 3, 3), times)
    plain = euler(oracle(objective), z, times)
    torch.testing.assert_close(ddim(oracle(objective), z, times, eta=0.0), plain)
    torch.testing.assert_close(ode_euler(oracle(objective), z, times), plain)
    both = [sample(kind, oracle(objective), z, times, eta=0.0) for kind in (Sampler.dpmpp_2m, Sampler.dpmpp_2m_sde)]
    assert torch.equal(*both)


# --- the public samplers ----------------------------------------------------------------------------------

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
WORDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "v_terminal": "v_prediction"}
KINDS = {
    "eps": ObjectiveConfig(network_time=NetworkTime.index),
    "x0": ObjectiveConfig(prediction=Prediction.x0, network_time=NetworkTime.index),
    "v": ObjectiveConfig(prediction=Prediction.v, network_time=NetworkTime.index),
    "v_terminal": ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, network_time=NetworkTime.index),
    "flow": ObjectiveConfig(prediction=Prediction.flow, path=Path.linear, times=TimeLaw.uniform, shift=2.0),
}
# Public classes, whether they walk sigma_edm (z/(1-t)) or the path itself, and what they are told.
PUBLIC = {
    "euler": (diffusers.EulerDiscreteScheduler, Sampler.euler, {"final_sigmas_type": "zero"}),
    "euler, ddim": (diffusers.DDIMScheduler, Sampler.euler, {"set_alpha_to_one": True, "clip_sample": False}),
    "heun": (diffusers.HeunDiscreteScheduler, Sampler.heun_edm, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, Sampler.dpmpp_2m, {"final_sigmas_type": "zero"}),
    "unipc": (diffusers.UniPCMultistepScheduler, Sampler.unipc, {"final_sigmas_type": "zero"}),
}
STEPS = 10  # divides 1000: the public DDIM and DDPM step by 1000 // steps


def network(x, t, _=None):
    """Something smooth that depends on every number and on the time as networks see it."""
    k = 1000 * t.reshape(-1, 1, 1, 1).double()
    return (x.roll(1, -1) * (1 + k / 700)).tanh() + 0.3 * x + (k / 300).sin()


def ours(kind, config, times=None, **options):
    """Each z along the way, moved to the path, and the last sample."""
    objective, walked = Objective(config), []
    times = objective.grid(STEPS) if times is None else times
    z = objective.start(gaussian_noise(2, 4, 6, 5), times)
    denoise = lambda z, t: objective.denoise(network)(z, t, None)  # noqa: E731
    sample(kind, denoise, z, times, lambda step, z, x0: walked.append(z), **options)
    return walked, times


def on_path(z, s):
    """z moved to the vp path at time s."""
    return z / ((1 - s) ** 2 + s**2) ** 0.5


@pytest.mark.parametrize(
    ("public", "prediction"),
    # the public Heun has no rescale_betas_zero_snr
    [(public, name) for public in PUBLIC for name in WORDS if (public, name) != ("heun", "v_terminal")],
)
def test_deterministic_samplers_are_the_public_ones_step_by_step(public, prediction):
    kind, (public_class, name, options) = KINDS[prediction], PUBLIC[public]
    terminal = kind.zero_terminal
    rescale = {"rescale_betas_zero_snr": True} if terminal else {}
    scheduler = public_class(**SD, prediction_type=WORDS[prediction], **options, **rescale)
    scheduler.set_timesteps(STEPS)
    walked, times = ours(name, kind)
    edm = hasattr(scheduler, "scale_model_input") and public_class in (
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
    )
    x, theirs = gaussian_noise(2, 4, 6, 5), []
    first = float(times[0])
    if edm:  # from the same pure noise, in their scale
        x = x * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(shown, t.expand(2) / 1000), t, x, return_dict=False)[0]
        theirs.append(x)
    if public_class is diffusers.HeunDiscreteScheduler:
        theirs = theirs[1::2] + theirs[-1:]  # two calls a step, one in the last
    # a terminal alpha of theirs is 2^-12, not 0; their tables are float32
    tolerance = 2e-3 if terminal else 2e-5
    for z, x, s in zip(walked, theirs, times[1:].tolist(), strict=True):
        mine = z / (1 - s) if edm else on_path(z, s)
        assert (mine - x).abs().max() < tolerance * (1 + x.abs().max()), (s, first)


@pytest.mark.parametrize(
    ("public_class", "kind", "options"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, Sampler.euler, {}),
        (diffusers.FlowMatchHeunDiscreteScheduler, Sampler.heun, {}),
        (diffusers.DPMSolverMultistepScheduler, Sampler.dpmpp_2m, {"use_flow_sigmas": True}),
        (diffusers.UniPCMultistepScheduler, Sampler.unipc, {"use_flow_sigmas": True}),
    ],
)
def test_deterministic_samplers_of_flow_are_the_public_ones_step_by_step(public_class, kind, options):
    if options:
        options |= {"prediction_type": "flow_prediction", "flow_shift": 2.0, "final_sigmas_type": "zero"}
    scheduler = public_class(**(options or {"shift": 2.0}))
    if options:
        scheduler.set_timesteps(STEPS)
    elif kind is Sampler.euler:
        scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    else:
        scheduler.set_timesteps(STEPS)
    # the times that they walk, and what they tell the network of them
    sigmas = scheduler.sigmas.double()
    times = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]]) if kind is Sampler.heun else sigmas
    told = NetworkTime.whole if options else NetworkTime.noise
    config = ObjectiveConfig(
        prediction=Prediction.flow, path=Path.linear, times=TimeLaw.uniform, shift=2.0, network_time=told
    )
    walked, _ = ours(kind, config, times)
    x, theirs = Objective(config).start(gaussian_noise(2, 4, 6, 5), times), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2) / 1000), t, x, return_dict=False)[0]
        theirs.append(x)
    theirs = theirs[1::2] + theirs[-1:] if kind is Sampler.heun else theirs
    for z, x in zip(walked, theirs, strict=True):
        assert (z - x).abs().max() < 2e-5 * (1 + x.abs().max())


class _Given:
    """diffusers' randn_tensor, handing out given noise."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def __call__(self, *args, **kwargs):
        return next(self.noises)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    ("public_class", "kind", "options"),
    [
        (diffusers.DDPMScheduler, Sampler.ddpm, {"clip_sample": False, "variance_type": "fixed_small"}),
        (diffusers.EulerAncestralDiscreteScheduler, Sampler.euler_ancestral, {}),
        (
            diffusers.DPMSolverMultistepScheduler,
            Sampler.dpmpp_2m_sde,
            {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
        ),
    ],
)
def test_stochastic_samplers_are_the_public_ones_on_the_same_noise(
    public_class, kind, options, prediction, monkeypatch
):
    scheduler = public_class(**SD, prediction_type=WORDS[prediction], **options)
    scheduler.set_timesteps(STEPS)
    noises = gaussian_noise(STEPS, 2, 4, 6, 5)
    walked, times = ours(kind, KINDS[prediction], noise=noises.__getitem__)
    module = __import__(public_class.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", _Given(noises))
    edm = public_class is diffusers.EulerAncestralDiscreteScheduler
    x = gaussian_noise(2, 4, 6, 5)
    if edm:
        x = x * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
    for z, t, s in zip(walked, scheduler.timesteps, times[1:].tolist(), strict=True):
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(2) / 1000), t, x, return_dict=False)[0]
        mine = z / (1 - s) if edm else on_path(z, s)
        assert (mine - x).abs().max() < 3e-5 * (1 + x.abs().max()), s


# --- what all have in common ------------------------------------------------------------------------------


def test_latents_are_not_clamped(sampler):
    far = torch.full((2, 1, 2, 2), 40.0, dtype=torch.float64)
    torch.testing.assert_close(sampler[1](lambda z, t: far, torch.zeros_like(far), uniform_grid(5)), far)


def test_callback_sees_every_step(sampler, gaussian):
    seen = []
    z = sampler[1](gaussian.x0, gaussian_noise(2, 1), uniform_grid(5), lambda step, z, x0: seen.append((step, z)))
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4] and torch.equal(seen[-1][1], z)


@pytest.mark.parametrize("kind", [Sampler.euler, Sampler.heun, Sampler.heun_edm, Sampler.ode_euler])
def test_sampling_may_stop_and_continue_elsewhere(gaussian, kind):
    z, times = gaussian_noise(3, 1), uniform_grid(8)
    handed_over = sample(kind, gaussian.x0, sample(kind, gaussian.x0, z, times[:5]), times[4:])
    assert torch.equal(handed_over, sample(kind, gaussian.x0, z, times))


def test_the_adaptive_solver_may_stop_anywhere(gaussian):
    z, times = gaussian_noise(3, 1), uniform_grid(8)
    half = dopri5(gaussian.x0, z, times[:5], tolerance=1e-8)
    whole = dopri5(gaussian.x0, half, times[4:], tolerance=1e-8)
    torch.testing.assert_close(whole, dopri5(gaussian.x0, z, times, tolerance=1e-8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_reach_the_model_in_float32(sampler, dtype):
    dtypes = set()
    sampler[1](lambda z, t: dtypes.add(t.dtype) or torch.zeros_like(z), torch.zeros(2, 1, dtype=dtype), uniform_grid(3))
    assert dtypes == {torch.float32}


def test_evaluations_are_as_few_as_promised(gaussian):
    for run, expected in ((euler, 8), (heun, 15), (heun_edm, 14), (dpmpp_2m, 8), (ode_euler, 8)):
        calls = []
        run(lambda z, t, calls=calls: calls.append(t) or gaussian.x0(z, t), gaussian_noise(2, 1), uniform_grid(8))
        assert len(calls) == expected, run.__name__


@pytest.mark.parametrize("times", [[0.0, 0.5, 1.0], [1.2, 0.0], [0.5, 0.5], [1.0]])
def test_times_that_do_not_descend_are_refused(sampler, times):
    with pytest.raises(ValueError, match="do not descend strictly"):
        sampler[1](lambda z, t: z, torch.zeros(1, 1), torch.tensor(times))


def test_eta_outside_its_range_is_refused():
    for kind in ETA:
        with pytest.raises(ValueError, match=r"sampler.eta=1.5 is outside 0 to 1"):
            sample(kind, lambda z, t: z, torch.zeros(1, 1), uniform_grid(2), eta=1.5)
    with pytest.raises(
        ValueError, match="sampler.name=heun takes none; give sampler.eta=null, or choose one of ddim, ddpm"
    ):
        sample(Sampler.heun, lambda z, t: z, torch.zeros(1, 1), uniform_grid(2), eta=0.5)


def test_the_step_after_infinity_is_of_first_order():
    """From t = 1 the step in the log-SNR is infinite, so the estimate before says nothing of the slope after it."""
    times, estimates = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64), gaussian_noise(3, 2, 1)
    answers = {float(t): x for t, x in zip(times, estimates, strict=False)}
    denoise = lambda z, t: answers[float(t[0])]  # noqa: E731
    seen = {}
    for run in (euler, dpmpp_2m):
        run(denoise, gaussian_noise(2, 1), times, lambda step, z, x0, run=run: seen.setdefault(run, []).append(z))
    for step, _ in enumerate(pairwise(times[:3])):
        torch.testing.assert_close(seen[euler][step], seen[dpmpp_2m][step])
