import itertools
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffusion.objective import (
    NetworkTime,
    Objective,
    ObjectiveConfig,
    Prediction,
    Weighting,
    coefficients,
    split,
    target,
)
from diffusion.sample import euler
from diffusion.schedule import Path, ShiftLaw, alpha_sigma, log_snr, shift, snr, table_times
from diffusion.timesteps import Grid, TimeLaw, ramp

PATH = dict.fromkeys(Prediction, Path.vp) | {Prediction.flow: Path.linear}
BLIND_AT = {Prediction.eps: 1.0, Prediction.x0: 0.0}
GAMMA = 5.0


@pytest.mark.parametrize(("prediction", "path"), itertools.product(Prediction, Path))
def test_split_recovers_what_target_mixed_over_the_whole_range(prediction, path, latents):
    x0, eps = latents
    t = torch.tensor([0, 1e-3, 0.03, 0.2, 0.5, 0.8, 0.97, 1 - 1e-3, 1], dtype=torch.float64)
    keep = t != BLIND_AT.get(prediction, -1.0)
    x0, eps, t = x0[keep], eps[keep], t[keep]
    alpha, sigma = (k.view(-1, 1, 1, 1) for k in alpha_sigma(path, t))
    x_t = alpha * x0 + sigma * eps
    recovered = split(prediction, path, target(prediction, path, x0, eps, t), x_t, t)
    torch.testing.assert_close(recovered, (x0, eps), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", BLIND_AT)
def test_split_refuses_the_end_where_the_prediction_is_blind(prediction, latents):
    x, p = latents
    with pytest.raises(
        ValueError, match=rf"prediction={prediction.name} cannot be inverted at t={BLIND_AT[prediction]:g}"
    ):
        split(prediction, Path.vp, p, x, torch.full((len(x),), BLIND_AT[prediction], dtype=torch.float64))


def test_coefficients_are_the_published_ones():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha, sigma = alpha_sigma(Path.vp, t)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    torch.testing.assert_close(coefficients(Prediction.eps, Path.vp, t), (zero, one))
    torch.testing.assert_close(coefficients(Prediction.x0, Path.vp, t), (one, zero))
    torch.testing.assert_close(coefficients(Prediction.v, Path.vp, t), (-sigma, alpha))
    torch.testing.assert_close(coefficients(Prediction.flow, Path.linear, t), (-one, one))


def test_v_and_flow_convert_by_the_published_formula(latents):
    x0, eps = latents
    t = torch.linspace(0, 1, len(x0), dtype=torch.float64)
    s = t.view(-1, 1, 1, 1)
    norm = ((1 - s) ** 2 + s**2).sqrt()
    v, u = target(Prediction.v, Path.vp, x0, eps, t), target(Prediction.flow, Path.linear, x0, eps, t)
    z = (1 - s) * x0 + s * eps
    torch.testing.assert_close(v, (1 - 2 * s) * z / norm + norm * u)


def weight(prediction, weighting, t, path=None, **options):
    """The weight of the squared prediction error, of any prediction at any time."""
    objective = Objective(ObjectiveConfig())
    config = ObjectiveConfig(weighting=weighting, **options)
    config.prediction, config.path = prediction, path or PATH[prediction]  # past the checks: eps to t = 1 too
    objective.config = config
    return objective.weight(t)


@pytest.mark.parametrize(
    ("prediction", "closed"),
    [
        (Prediction.eps, lambda r: r.clamp(max=GAMMA) / r),
        (Prediction.x0, lambda r: r.clamp(max=GAMMA)),
        (Prediction.v, lambda r: r.clamp(max=GAMMA) / (r + 1)),
        (Prediction.flow, lambda r: r.clamp(max=GAMMA) / (1 + r.sqrt()) ** 2),
    ],
)
def test_min_snr_has_its_four_closed_forms(prediction, closed):
    t = table_times()
    torch.testing.assert_close(weight(prediction, Weighting.min_snr, t, gamma=GAMMA), closed(snr(t)))


# each weighting as a function of SNR on the squared x0 error, and options that tell its keys apart
OF_SNR = {
    Weighting.min_snr: (lambda r: r.clamp(0.5, 4.0), {"gamma": 4.0, "floor": 0.5}),
    Weighting.soft_min_snr: (lambda r: 4 * r / (r + 4), {"gamma": 4.0}),
    Weighting.snr: (lambda r: r, {}),
    Weighting.p2: (lambda r: r / (2 + r) ** 1.5, {"p2_k": 2.0, "p2_gamma": 1.5}),
    Weighting.edm: (lambda r: r + 1 / 0.5**2, {"sigma_data": 0.5}),
}


def test_p2_is_the_published_weight_of_the_eps_error():
    t = table_times()
    found = weight(Prediction.eps, Weighting.p2, t, p2_k=1.0, p2_gamma=0.5)
    torch.testing.assert_close(found, 1 / (1 + snr(t)) ** 0.5)
    _, sigma = alpha_sigma(Path.vp, t)
    torch.testing.assert_close(weight(Prediction.eps, Weighting.p2, t), sigma**2)  # k = gamma = 1


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_and_k_diffusion_weights_are_those_of_their_network(sigma_data):
    """Their F predicts x0 through D = c_skip x + c_out F, so |F error| = |x0 error| / c_out."""
    t = table_times()
    sigma = t / (1 - t)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    of_x0 = lambda weighting, **options: weight(Prediction.x0, weighting, t, **options)  # noqa: E731

    lambda_ = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    torch.testing.assert_close(of_x0(Weighting.edm, sigma_data=sigma_data), lambda_)
    torch.testing.assert_close(of_x0(Weighting.edm, sigma_data=sigma_data) * c_out**2, torch.ones_like(t))
    soft = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2  # k-diffusion's weight of the F error
    torch.testing.assert_close(of_x0(Weighting.soft_min_snr, gamma=1 / sigma_data**2) * c_out**2, soft)
    torch.testing.assert_close(of_x0(Weighting.snr) * c_out**2, sigma_data**2 / (sigma**2 + sigma_data**2))


def test_some_weights_are_the_plain_error_of_another_space():
    t = table_times()
    one, (alpha, sigma) = torch.ones_like(t), alpha_sigma(Path.vp, t)
    torch.testing.assert_close(weight(Prediction.eps, Weighting.snr, t), one)
    torch.testing.assert_close(weight(Prediction.v, Weighting.edm, t), one)  # F = -v for unit variance
    torch.testing.assert_close(weight(Prediction.v, Weighting.snr, t), alpha**2)  # eps error = alpha v error
    torch.testing.assert_close(weight(Prediction.v, Weighting.soft_min_snr, t, gamma=1.0), (alpha * sigma) ** 2)
    torch.testing.assert_close(weight(Prediction.flow, Weighting.snr, t), (1 - t) ** 2)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("weighting", Weighting)
def test_weights_are_finite_at_both_ends_and_continuous_where_they_are_bounded(prediction, weighting):
    unbounded = {(Prediction.x0, Weighting.snr), (Prediction.x0, Weighting.edm), (Prediction.eps, Weighting.edm)}
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0, 1e-6, 1 - 1e-6, 1], dtype=dtype)
        found = weight(prediction, weighting, ends)
        assert found.dtype == dtype and found.isfinite().all()
        assert weight(prediction, weighting, ends, floor=1.0, p2_gamma=2.5, sigma_data=0.1).isfinite().all()
        if (prediction, weighting) not in unbounded:
            torch.testing.assert_close(found[[0, 3]], found[[1, 2]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("weighting", OF_SNR)
def test_one_weight_means_the_same_x0_error_in_every_objective(prediction, weighting, latents):
    path, (of_snr, options) = PATH[prediction], OF_SNR[weighting]
    x_t, pred = latents
    t = torch.linspace(0.05, 0.95, len(x_t), dtype=torch.float64)
    error = 1e-3 * torch.ones_like(pred)
    x0_error = split(prediction, path, pred + error, x_t, t)[0] - split(prediction, path, pred, x_t, t)[0]
    weighted = weight(prediction, weighting, t, **options).view(-1, 1, 1, 1) * error**2
    torch.testing.assert_close(weighted, of_snr(snr(t)).view(-1, 1, 1, 1) * x0_error**2)


@pytest.mark.parametrize(("gamma", "mean"), [(5, 0.917), (3, 0.879), (2.5, 0.864), (2, 0.843), (1, 0.767)])
def test_min_snr_has_the_known_mean_on_the_sd_table(gamma, mean):
    found = weight(Prediction.eps, Weighting.min_snr, table_times(), gamma=gamma)
    assert found.mean().item() == pytest.approx(mean, abs=5e-4)


def test_floor_trains_the_terminal_step():
    terminal = torch.ones(1, dtype=torch.float64)
    assert weight(Prediction.v, Weighting.min_snr, terminal).item() == pytest.approx(0)
    assert weight(Prediction.v, Weighting.min_snr, terminal, floor=1.0) == 1


def test_huber_is_the_printed_pseudo_huber_and_keeps_small_errors():
    error = torch.linspace(-3, 3, 61, dtype=torch.float64)
    penalty = Objective(ObjectiveConfig(huber=0.3)).penalty
    torch.testing.assert_close(penalty(error**2), 2 * 0.3 * ((error**2 + 0.3**2).sqrt() - 0.3))
    small = torch.tensor([1e-4, 1e-5], dtype=torch.float32) ** 2
    torch.testing.assert_close(penalty(small), small, rtol=1e-6, atol=0)  # where the printed difference rounds to 0
    far = torch.tensor([1e4], dtype=torch.float64)
    torch.testing.assert_close(penalty(far**2), 2 * 0.3 * far, rtol=1e-4, atol=0)
    assert Objective(ObjectiveConfig()).penalty(small) is small


def test_drawn_times_are_those_of_the_law(objective, uniform):
    t = objective.draw_times(uniform)
    assert t.dtype == uniform.dtype and (t.diff() >= 0).all()
    assert t.min() > 0 and t.max() <= objective.t_max
    if objective.config.times is TimeLaw.table:
        assert t.max() == objective.t_max


def test_shift_moves_the_logit_mean_by_its_logarithm(uniform):
    law = {"prediction": Prediction.flow, "path": Path.linear, "times": TimeLaw.logit_normal, "logit_mean": -0.2}
    plain, shifted = (Objective(ObjectiveConfig(**law, shift=a)).draw_times(uniform) for a in (1.0, 3.0))
    assert plain.logit().mean().item() == pytest.approx(-0.2, abs=1e-9)
    assert shifted.logit().mean().item() == pytest.approx(-0.2 + math.log(3), abs=1e-9)
    assert shifted.logit().std().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(log_snr(shifted), log_snr(plain) - 2 * math.log(3))


def test_everything_is_finite_at_the_largest_time(objective, latents):
    x0, eps = latents
    t = torch.full((len(x0),), objective.t_max, dtype=torch.float64)
    x_t, pred = objective.add_noise(x0, eps, t), objective.target(x0, eps, t)
    for value in (x_t, pred, objective.weight(t), objective.network_time(t), *objective.split(pred, x_t, t)):
        assert value.isfinite().all()


def test_zero_terminal_training_point_holds_no_signal(latents):
    x0, eps = latents
    objective = Objective(ObjectiveConfig(prediction=Prediction.v, zero_terminal=True))
    t = objective.draw_times(torch.full((len(x0),), 0.9999, dtype=torch.float64))
    assert (t == 1).all()
    assert torch.equal(objective.add_noise(x0, eps, t), eps) and torch.equal(objective.target(x0, eps, t), -x0)


def test_a_training_step_reads_no_tensor_on_the_host(objective):
    u, x = torch.empty(4, device="meta"), torch.empty(4, 2, 3, 3, device="meta")  # .item() of a meta tensor raises
    t = objective.draw_times(u)
    assert objective.add_noise(x, x, t).shape == objective.target(x, x, t).shape == x.shape
    assert objective.weight(t).shape == objective.network_time(t).shape == t.shape


def test_half_precision_latents_are_noised_in_float32(objective, latents):
    x0, eps = (x.bfloat16() for x in latents)
    t = objective.draw_times(torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64))
    exact = objective.add_noise(x0.double(), eps.double(), t)
    torch.testing.assert_close(objective.add_noise(x0, eps, t).double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [None, *Grid])
@pytest.mark.parametrize("steps", [1, 9, 28])
def test_grids_start_at_the_largest_time_and_descend_to_zero(objective, kind, steps):
    if kind in (Grid.trailing, Grid.leading, Grid.linspace) and objective.config.times is not TimeLaw.table:
        with pytest.raises(ValueError, match=f"a {kind.name} grid walks a table, but .*; use the uniform grid"):
            objective.grid(steps, kind)
        return
    grid = objective.grid(steps, kind)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid[-1] == 0 and (grid.diff() < 0).all()
    assert grid[0] == objective.t_max if kind is not Grid.leading else grid[0] < objective.t_max


@pytest.mark.parametrize("kind", [Grid.karras, Grid.exponential])
@pytest.mark.parametrize("steps", [2, 10, 28])
def test_ramps_are_those_of_diffusers(kind, steps):
    """EulerDiscreteScheduler with linspace spacing, whose ends are the whole table's, and a last sigma of 0."""
    public = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "final_sigmas_type": "zero"}
    theirs = EulerDiscreteScheduler(**public, **{f"use_{kind.name}_sigmas": True}, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double()
    torch.testing.assert_close(ramp(kind, steps, *sigmas[[0, -2]].tolist()), sigmas[:-1], atol=0, rtol=1e-6)
    for prediction in (Prediction.eps, Prediction.v):
        grid = Objective(ObjectiveConfig(prediction=prediction)).grid(steps, kind)
        torch.testing.assert_close(grid, sigmas / (1 + sigmas), atol=2e-6, rtol=0)  # their ends are float32 products


@pytest.mark.parametrize("kind", [Grid.karras, Grid.exponential])
@pytest.mark.parametrize("config", [{"zero_terminal": True}, {"zero_terminal": True, "sigma_max": 20000.0}])
def test_from_infinity_one_step_leads_to_the_ordinary_ramp(kind, config):
    ordinary = Objective(ObjectiveConfig(prediction=Prediction.v)).grid(27, kind)
    objective = Objective(ObjectiveConfig(prediction=Prediction.v, **config))
    grid = objective.grid(28, kind)
    assert grid[0] == objective.t_max > 0.9999
    torch.testing.assert_close(grid[1:], ordinary, atol=1e-12, rtol=0)
    higher = objective.grid(28, kind, ramp_max=100.0)
    assert higher[0] == objective.t_max
    assert (higher[1] / (1 - higher[1])).item() == pytest.approx(100)
    assert objective.grid(1, kind).tolist() == [objective.t_max, 0]


def test_ramp_from_20000_would_waste_its_steps():
    """What `ramp_max=None` does not do: 21 of 28 steps above the largest sigma that SD was trained at."""
    objective = Objective(ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, sigma_max=20000.0))
    wasteful, grid = (objective.grid(28, Grid.karras, ramp_max=most) for most in (20000.0, None))
    assert [int((times / (1 - times) > 14.7).sum()) for times in (wasteful, grid)] == [21, 1]


@pytest.mark.parametrize("kind", [Grid.karras, Grid.exponential])
def test_ramps_are_shifted_as_training_is(kind):
    plain, shifted = (Objective(ObjectiveConfig(shift=a)).grid(9, kind) for a in (1.0, 2.0))
    torch.testing.assert_close(shifted, shift(plain, 2.0))


FLOW = {"prediction": Prediction.flow, "path": Path.linear, "times": TimeLaw.logit_normal}


@pytest.mark.parametrize("kind", [Grid.uniform, Grid.karras, Grid.exponential])
@pytest.mark.parametrize("size", [1.0, 3.0, "dynamic"])
def test_flow_grids_are_those_of_diffusers(kind, size):
    """Told the ends once: by itself a scheduler of fixed shift starts from a last sigma that is shifted already."""
    law, shifting = FLOW, {}
    if kind is not Grid.uniform:
        shifting = {f"use_{kind.name}_sigmas": True}
    if size == "dynamic":
        theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifting)
        law = law | {"shift_law": ShiftLaw.exponential}
    else:
        theirs = FlowMatchEulerDiscreteScheduler(shift=size, **shifting)
        law = law | {"shift": size}
    mu = calculate_shift(48 * 64) if size == "dynamic" else None
    last = 1 / 8 if kind is Grid.uniform else 1e-3
    theirs.set_timesteps(sigmas=torch.linspace(1, last, 8).tolist(), mu=mu)
    grid = Objective(ObjectiveConfig(**law)).grid(8, kind, cells=96 * 128)
    torch.testing.assert_close(grid, theirs.sigmas.double(), atol=1e-6, rtol=0)
    if size == 1.0 and kind is not Grid.uniform:
        theirs.set_timesteps(8)
        torch.testing.assert_close(grid, theirs.sigmas.double(), atol=1e-6, rtol=0)


def test_a_ramp_without_room_is_refused():
    low = Objective(ObjectiveConfig(**FLOW, shift=3.0))
    with pytest.raises(ValueError, match=r"a karras grid falls to t=0.00299, but would start at t=0.000999; choose a "):
        low.grid(5, Grid.karras, ramp_max=0.001)
    with pytest.raises(ValueError, match=r"sampler.steps=0 walks nowhere"):
        low.grid(0, Grid.exponential)


# --- infinity ---------------------------------------------------------------------------------------------------


def test_sigma_max_stands_for_infinity_alone():
    law = {"prediction": Prediction.v, "zero_terminal": True, "network_time": NetworkTime.index}
    plain, cut = (Objective(ObjectiveConfig(**law, sigma_max=most)) for most in (None, 20000.0))
    assert cut.table[-1] == cut.t_max == 20000 / 20001
    assert torch.equal(cut.table[:-1], plain.table[:-1])
    u = torch.tensor([0.0005, 0.5, 0.9985, 0.9995], dtype=torch.float64)
    ours, theirs = cut.draw_times(u), plain.draw_times(u)
    assert torch.equal(ours[:3], theirs[:3]) and (ours[3], theirs[3]) == (20000 / 20001, 1)
    assert torch.equal(cut.network_time(ours), plain.network_time(theirs))  # the last is told 999, as infinity is
    assert torch.equal(cut.grid(28)[1:], plain.grid(28)[1:])


@pytest.mark.parametrize("times", [TimeLaw.uniform, TimeLaw.logit_normal])
def test_sigma_max_cuts_continuous_times_after_the_shift(times, uniform):
    law = {"prediction": Prediction.v, "times": times, "shift": 3.0}
    plain, cut = (Objective(ObjectiveConfig(**law, sigma_max=most)).draw_times(uniform) for most in (None, 10.0))
    assert torch.equal(cut, plain.clamp(max=10 / 11)) and (cut < plain).any()
    assert Objective(ObjectiveConfig(**law, sigma_max=10.0)).t_max == 10 / 11


def test_first_euler_step_from_infinity_is_the_printed_one():
    """x_1 = sigma_1 n - F in EDM's scaling, the limit of x + (sigma_1 - sigma) (x - D)/sigma."""
    noise, pred = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma_max, close in ((None, 1e-14), (20000.0, 1e-4)):
        objective = Objective(ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, sigma_max=sigma_max))
        times = objective.grid(10)[:2]
        s = times[1]
        denoise = partial(objective.denoise(lambda x_t, t, cond: pred), cond=None)
        z = euler(denoise, objective.start(noise, times), times)
        x_1 = z / (1 - s)
        expected = s / (1 - s) * noise - pred
        assert (x_1 - expected).abs().max() < close * expected.abs().max()


# --- ranges and sizes -------------------------------------------------------------------------------------------

ALL_LAWS = [
    {},
    {"shift": 2.0},
    {"prediction": Prediction.v, "zero_terminal": True, "sigma_max": 20000.0},
    {"prediction": Prediction.v, "times": TimeLaw.uniform},
    {"prediction": Prediction.v, "times": TimeLaw.mode, "shift": 0.5},
    {"prediction": Prediction.v, "times": TimeLaw.cosmap, "sigma_max": 3.0},
    FLOW | {"shift": 3.0, "logit_std": 1.4},
]


@pytest.mark.parametrize("law", ALL_LAWS)
@pytest.mark.parametrize("within", [[0.0, 0.35], [0.3, 0.7], [0.6, 1.0]])
def test_a_range_conditions_the_law(law, within, uniform):
    whole = Objective(ObjectiveConfig(**law)).draw_times(uniform)
    objective = Objective(ObjectiveConfig(**law, range=within))
    t = objective.draw_times(uniform)
    low, high = within
    assert low <= t.min() and t.max() <= objective.t_max <= high
    kept = whole[(low <= whole) & (whole <= high)]
    counts = [(np.searchsorted(x, kept.unique(), side="right") / len(x)) for x in (kept, t)]
    assert np.abs(counts[0] - counts[1]).max() < 2 / len(kept)


def test_sdxls_refiner_sees_the_last_200_of_its_table(uniform):
    objective = Objective(ObjectiveConfig(network_time=NetworkTime.index, range=[0.0, 0.3632]))
    times, counts = objective.draw_times(uniform).unique(return_counts=True)
    assert torch.equal(times, table_times()[:200]) and (counts == 100).all()
    assert objective.t_max == table_times()[199]
    assert objective.grid(4).tolist() == [*table_times()[[199, 149, 99, 49]], 0]


def test_a_range_that_holds_no_time_is_refused():
    with pytest.raises(ValueError, match=r"objective.range=\[0.95, 1.0\] holds no time of objective.times=table with"):
        Objective(ObjectiveConfig(range=[0.95, 1.0]))
    with pytest.raises(ValueError, match=r"objective.range=\[0.8, 1.0\] holds no time of objective.times=cosmap"):
        Objective(ObjectiveConfig(prediction=Prediction.v, times=TimeLaw.cosmap, sigma_max=3.0, range=[0.8, 1.0]))


def test_the_shift_of_a_size_is_one_for_trainer_and_sampler(uniform):
    sqrt = Objective(ObjectiveConfig(**FLOW, shift=3.0, shift_law=ShiftLaw.sqrt, shift_cells=128 * 128))
    assert [sqrt.shift_at(n) for n in (128 * 128, 64 * 64)] == [3.0, 1.5]
    flux = Objective(ObjectiveConfig(**FLOW, shift_law=ShiftLaw.exponential))
    assert flux.shift_at(128 * 128) == pytest.approx(math.exp(1.15))
    assert Objective(ObjectiveConfig(**FLOW, shift=2.0)).shift_at() == 2.0
    for objective in (sqrt, flux):
        for cells in (32 * 32, 96 * 96):
            fixed = Objective(ObjectiveConfig(**FLOW, shift=objective.shift_at(cells)))
            assert torch.equal(objective.draw_times(uniform, cells), fixed.draw_times(uniform))
            assert torch.equal(objective.grid(9, cells=cells), fixed.grid(9))
        for call in (objective.shift_at, lambda o=objective: o.draw_times(uniform), lambda o=objective: o.grid(5)):
            with pytest.raises(ValueError, match=r"shifts each size differently, and none was given; give cells"):
                call()
        assert objective.t_max == 1


def test_shifted_grid_of_28_steps_spends_21_above_one_half():
    law = {"prediction": Prediction.flow, "path": Path.linear, "times": TimeLaw.logit_normal}
    plain, shifted = (Objective(ObjectiveConfig(**law, shift=a)).grid(28) for a in (1.0, 3.0))
    torch.testing.assert_close(plain, torch.linspace(1, 0, 29, dtype=torch.float64))
    assert ((plain[:-1] > 0.5).sum(), (shifted[:-1] > 0.5).sum()) == (14, 21)
    assert shifted[-2].item() == pytest.approx(0.10, abs=5e-3)


def test_denoiser_sees_its_own_path_and_time(objective, latents):
    x0, eps = latents
    t = objective.draw_times(torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64))
    seen = {}

    def denoiser(x_t, network_time, cond):
        seen.update(x_t=x_t, time=network_time, cond=cond)
        return objective.target(x0, eps, t)

    s = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(objective.denoise(denoiser)((1 - s) * x0 + s * eps, t, "cond"), x0)
    torch.testing.assert_close(seen["x_t"], objective.add_noise(x0, eps, t))
    torch.testing.assert_close(seen["time"], objective.network_time(t))
    assert seen["cond"] == "cond"


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_index_time_counts_the_table(zero_terminal):
    config = ObjectiveConfig(prediction=Prediction.v, zero_terminal=zero_terminal, network_time=NetworkTime.index)
    objective = Objective(config)
    index = 1000 * objective.network_time(objective.table)
    torch.testing.assert_close(index, torch.arange(1000, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"zero_terminal": True}, r"objective.prediction=eps says nothing of x0 at t=1, .*zero_terminal=True.*=v"),
        ({"times": TimeLaw.uniform}, r"objective.times=uniform reaches; set zero_terminal=false and times=table"),
        ({"path": Path.linear}, r"objective.prediction=eps .* set objective.path=vp"),
        ({"prediction": Prediction.v, "path": Path.linear}, r"objective.prediction=v .* set objective.path=vp"),
        ({"prediction": Prediction.flow}, r"objective.prediction=flow .* set objective.path=linear"),
        ({"shift": 0.0}, r"objective.shift=0.0 is not positive"),
        ({"logit_std": -1.0}, r"objective.logit_std=-1.0 is not positive"),
        ({"gamma": 0.0}, r"objective.gamma=0.0 is not positive"),
        ({"floor": 6.0}, r"objective.floor=6.0 is not between 0 and gamma=5.0"),
        ({"sigma_max": 0.5}, r"objective.sigma_max=0.5 is below 1, .*; choose 20000, or null"),
        ({"mode_scale": 2.0}, r"objective.mode_scale=2.0 makes times that do not rise; choose -1 to 1.75"),
        ({"shift_law": ShiftLaw.sqrt}, r"objective.shift_law=sqrt has no size .* set objective.shift_cells"),
        ({"shift_cells": 0}, r"objective.shift_cells=0 is no latent's size"),
        ({"range": [0.5, 0.5]}, r"objective.range=\[0.5, 0.5\] does not rise within 0 to 1"),
        ({"range": [0.7, 0.2]}, r"objective.range=\[0.7, 0.2\] does not rise within 0 to 1"),
        ({"range": [0.0, 1.5]}, r"objective.range=\[0.0, 1.5\] does not rise within 0 to 1"),
        ({"range": [0.5]}, r"objective.range=\[0.5\] does not rise within 0 to 1; choose two noise times"),
        ({"p2_k": 0.0}, r"objective.p2_k=0.0 is not positive"),
        ({"p2_gamma": -1.0}, r"objective.p2_gamma=-1.0 is negative; choose 0 for none"),
        ({"sigma_data": 0.0}, r"objective.sigma_data=0.0 is not positive"),
        ({"huber": 0.0}, r"objective.huber=0.0 is not positive"),
        ({"offset_noise": -0.1}, r"objective.offset_noise=-0.1 is negative"),
        ({"pairing": 0}, r"objective.pairing=0 counts images; choose 1 for none"),
    ],
)
def test_configurations_that_cannot_train_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**wrong)


def test_eps_may_have_any_law_that_stops_short_of_pure_noise():
    for law in ({"sigma_max": 80.0}, {"range": [0.0, 0.9]}):
        objective = Objective(ObjectiveConfig(times=TimeLaw.uniform, **law))
        assert objective.t_max < 1
    with pytest.raises(ValueError, match="says nothing of x0 at t=1"):
        ObjectiveConfig(times=TimeLaw.uniform, range=[0.5, 1.0])


@pytest.mark.parametrize("weighting", [Weighting.soft_min_snr, Weighting.snr, Weighting.p2])
def test_weights_that_vanish_warn_at_zero_terminal(weighting):
    with pytest.warns(UserWarning, match=rf"weighting={weighting.name} .* set objective.weighting=min_snr and .*=1"):
        ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, weighting=weighting)


def test_min_snr_without_a_floor_warns_at_zero_terminal():
    law = {"prediction": Prediction.v, "zero_terminal": True, "weighting": Weighting.min_snr}
    with pytest.warns(UserWarning, match=r"set objective.floor=1"):
        ObjectiveConfig(**law)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ObjectiveConfig(**law, floor=1.0)


def test_config_survives_omegaconf():
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.structured(ObjectiveConfig)
    node = omegaconf.OmegaConf.merge(node, {"prediction": "flow", "path": "linear", "times": "logit_normal"})
    config = omegaconf.OmegaConf.to_object(node)
    assert isinstance(config, ObjectiveConfig) and config.prediction is Prediction.flow
    with pytest.raises(omegaconf.errors.ConfigKeyError):
        omegaconf.OmegaConf.merge(node, {"gama": 1.0})
