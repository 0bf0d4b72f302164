import itertools
import math
import warnings

import pytest
import torch

from diffusion.objective import (
    NetworkTime,
    Objective,
    ObjectiveConfig,
    Prediction,
    Weighting,
    coefficients,
    min_snr_weight,
    split,
    target,
)
from diffusion.schedule import Path, alpha_sigma, log_snr, snr, table_times
from diffusion.timesteps import Grid, TimeLaw

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


@pytest.mark.parametrize(
    ("prediction", "path", "closed"),
    [
        (Prediction.eps, Path.vp, lambda r: r.clamp(max=GAMMA) / r),
        (Prediction.x0, Path.vp, lambda r: r.clamp(max=GAMMA)),
        (Prediction.v, Path.vp, lambda r: r.clamp(max=GAMMA) / (r + 1)),
        (Prediction.flow, Path.linear, lambda r: r.clamp(max=GAMMA) / (1 + r.sqrt()) ** 2),
    ],
)
def test_min_snr_has_its_four_closed_forms(prediction, path, closed):
    t = table_times()
    torch.testing.assert_close(min_snr_weight(prediction, path, t, GAMMA), closed(snr(t)))


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_min_snr_is_finite_and_continuous_at_both_ends(prediction, dtype):
    path = Path.linear if prediction is Prediction.flow else Path.vp
    ends = torch.tensor([0, 1e-6, 1 - 1e-6, 1], dtype=dtype)
    weight = min_snr_weight(prediction, path, ends, GAMMA)
    torch.testing.assert_close(weight[[0, 3]], weight[[1, 2]], atol=1e-4, rtol=0)
    assert min_snr_weight(prediction, path, ends, GAMMA, floor=1.0).isfinite().all()


@pytest.mark.parametrize("prediction", Prediction)
def test_one_weight_means_the_same_x0_error_in_every_objective(prediction, latents):
    path = Path.linear if prediction is Prediction.flow else Path.vp
    x_t, pred = latents
    t = torch.linspace(0.05, 0.95, len(x_t), dtype=torch.float64)
    error = 1e-3 * torch.ones_like(pred)
    x0_error = split(prediction, path, pred + error, x_t, t)[0] - split(prediction, path, pred, x_t, t)[0]
    for floor in (0.0, 1.0):
        weighted = min_snr_weight(prediction, path, t, GAMMA, floor).view(-1, 1, 1, 1) * error**2
        expected = snr(t).clamp(floor, GAMMA).view(-1, 1, 1, 1) * x0_error**2
        torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize(("gamma", "mean"), [(5, 0.917), (3, 0.879), (2.5, 0.864), (2, 0.843), (1, 0.767)])
def test_min_snr_has_the_known_mean_on_the_sd_table(gamma, mean):
    weight = min_snr_weight(Prediction.eps, Path.vp, table_times(), gamma)
    assert weight.mean().item() == pytest.approx(mean, abs=5e-4)


def test_floor_trains_the_terminal_step():
    terminal = torch.ones(1, dtype=torch.float64)
    assert min_snr_weight(Prediction.v, Path.vp, terminal, GAMMA).item() == pytest.approx(0)
    assert min_snr_weight(Prediction.v, Path.vp, terminal, GAMMA, floor=1.0) == 1


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
    if kind is Grid.trailing and objective.config.times is not TimeLaw.table:
        with pytest.raises(ValueError, match="a trailing grid walks a table"):
            objective.grid(steps, kind)
        return
    grid = objective.grid(steps, kind)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid[0] == objective.t_max and grid[-1] == 0 and (grid.diff() < 0).all()


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
    ],
)
def test_configurations_that_cannot_train_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**wrong)


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
