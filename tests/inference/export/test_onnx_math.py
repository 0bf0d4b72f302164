"""Sampling in numpy is sampling in torch: noise, grids, predictions, guidance and samplers of every objective."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import CONFIGS, compose
from diffusion import guidance
from diffusion.objective import NetworkTime, Objective, ObjectiveConfig, Prediction
from diffusion.sample import Sampler, sample
from diffusion.schedule import Betas, ShiftLaw, table_times
from diffusion.schedule import Path as NoisePath
from diffusion.timesteps import Grid, TimeLaw
from inference.description import plain
from inference.export import onnx_math
from inference.export.onnx_math import SAMPLERS, Noise

NAMES = sorted(path.stem for path in CONFIGS.glob("objective/*.yaml"))
FLOW = ObjectiveConfig(prediction=Prediction.flow, path=NoisePath.linear, times=TimeLaw.logit_normal, shift=3.0)
OTHERS = {
    "x0": ObjectiveConfig(prediction=Prediction.x0, network_time=NetworkTime.index),
    "whole": replace(FLOW, network_time=NetworkTime.whole),
    "sqrt": replace(FLOW, shift_law=ShiftLaw.sqrt, shift_cells=1024),
    "exponential": replace(FLOW, shift_law=ShiftLaw.exponential),
    "shifted table": ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, shift=2.0),
    "linear x0": ObjectiveConfig(prediction=Prediction.x0, path=NoisePath.linear, times=TimeLaw.uniform),
}


def config_of(name: str) -> ObjectiveConfig:
    return OTHERS[name] if name in OTHERS else compose("train", ["name=x", f"objective={name}"]).objective


def both(config: ObjectiveConfig) -> tuple[Objective, onnx_math.Objective]:
    """An objective in torch, and in numpy as an export makes it."""
    ours = Objective(config)
    return ours, onnx_math.Objective(plain(config), ours.table.tolist(), table_times(config.betas)[[0, -1]].tolist())


def network(x: Any, t: Any, cond: Any) -> Any:
    """A prediction that depends on all that it is given, alike in torch and in numpy."""
    return 0.6 * x + 0.2 * x**2 / (1 + x**2) + cond * (0.3 + t)


@pytest.mark.parametrize("shape", [(16,), (4, 3, 5), (8, 16, 16), (31,)])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3])
def test_noise_is_torchs_for_the_same_seed(shape, seed):
    generator, mine = torch.Generator().manual_seed(seed), Noise(seed)
    for _ in range(3):  # one call after the other, as the stochastic samplers ask
        assert np.allclose(mine.normal(shape), torch.randn(shape, generator=generator).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_grids_are_the_same_times(name):
    ours, mine = both(config_of(name))
    for kind, steps, cells in product([None, *Grid], [1, 2, 7, 28], [256, 4096]):
        try:
            want = ours.grid(steps, kind, cells=cells).numpy()
        except ValueError:
            with pytest.raises(ValueError, match="sampler|grid"):
                mine.grid(steps, kind and kind.name, cells)
        else:
            assert np.allclose(mine.grid(steps, kind and kind.name, cells), want, rtol=1e-12, atol=1e-14), (kind, steps)
    if ours.t_max > 0.9:
        ramp = ours.grid(9, Grid.karras, cells=256, rho=3.0, ramp_max=5.0).numpy()
        assert np.allclose(mine.grid(9, "karras", 256, 3.0, 5.0), ramp, rtol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_the_network_is_asked_and_understood_alike(name):
    ours, mine = both(config_of(name))
    z = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
    for t in ours.grid(11, cells=256)[:-1].tolist():
        want = ours.denoise(lambda x, t, cond: network(x, t[0], cond))(torch.from_numpy(z), torch.full((2,), t), 0.5)
        got = mine.denoise(network)(z, np.float32(t), 0.5)
        assert got.dtype == np.float32
        assert np.allclose(got, want.numpy(), rtol=1e-4, atol=1e-4 * float(want.abs().max())), t
        told = float(ours.network_time(torch.tensor([t], dtype=torch.float32)))
        assert abs(float(mine.network_time(np.float32(t))) - told) < 2e-6
        started = ours.start(torch.from_numpy(z), torch.tensor([t], dtype=torch.float64))
        assert np.allclose(mine.start(z, np.array([t])), started.numpy(), rtol=1e-6)


@pytest.mark.parametrize("betas", Betas)
def test_a_table_from_the_file_is_the_table(betas):
    ours, mine = both(ObjectiveConfig(prediction=Prediction.v, betas=betas, zero_terminal=True, sigma_max=20000.0))
    assert np.array_equal(mine.table, ours.table.numpy())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", ["v", "flow"])
def test_samplers_take_the_same_steps(name, objective):
    """In float32, on a network that bends, with fresh noise from the same seed; to the order of its rounding."""
    ours, mine = both(config_of(objective))
    times = ours.grid(9, cells=256)
    shape = (8, 6, 6)
    for eta in (None, *([] if SAMPLERS[name] is None else [0.0, 0.7])):
        one, other = torch.Generator().manual_seed(3), Noise(3)
        z = ours.start(torch.randn(shape, generator=one)[None], times)
        x0_of, mine_of = ours.denoise(network), mine.denoise(network)
        want = sample(
            Sampler[name], lambda z, t, x0_of=x0_of: x0_of(z, t, 0.4), z, times, eta=eta,
            noise=lambda _, one=one: torch.randn(shape, generator=one)[None],
        )  # fmt: skip
        got = onnx_math.sample(
            name, lambda z, t, mine_of=mine_of: mine_of(z, np.float32(t), 0.4),
            mine.start(other.normal(shape)[None], times.numpy()), times.numpy(), eta=eta,
            noise=lambda other=other: other.normal(shape)[None],
        )  # fmt: skip
        assert np.allclose(got, want.numpy(), rtol=0, atol=2e-5 * float(want.abs().max()))


class Row(torch.Tensor):
    """A condition of one number a sample."""

    @staticmethod
    def cat(rows):
        return torch.cat([row.as_subclass(torch.Tensor) for row in rows]).as_subclass(Row)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("n", [None, 0.8])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_the_same_combination(scale, n, rescale):
    z = np.random.default_rng(1).standard_normal((2, 4, 3, 3)).astype(np.float32)
    conds = np.random.default_rng(2).standard_normal((4, 2, 1, 1, 1)).astype(np.float32)
    weights = np.float32([1.0, 0.4]), np.float32([0.5, 0.0])
    options: dict[str, Any] = {"rescale": rescale, "interval": (0.2, 0.8)}
    rows = [torch.from_numpy(cond).as_subclass(Row) for cond in conds]
    ours = guidance.guided(
        lambda z, t, cond: network(z, t[0], cond.as_subclass(torch.Tensor)),
        [(row, torch.from_numpy(weight)) for row, weight in zip(rows, weights, strict=False)], rows[2], scale,
        negative=None if n is None else (rows[3], n), **options,
    )  # fmt: skip
    mine = onnx_math.guided(
        network, np.concatenate, list(zip(conds, weights, strict=False)), conds[2], scale,
        negative=None if n is None else (conds[3], n), **options,
    )  # fmt: skip
    for t in (0.1, 0.2, 0.5, 0.8, 0.9):  # outside, at the closed ends, inside
        want = ours(torch.from_numpy(z), torch.full((2,), t)).numpy()
        assert np.allclose(mine(z, np.float32(t)), want, rtol=0, atol=5e-6), t


REFUSED = {
    "sampler.name=unipc is not among those that run without torch: euler, heun, ddim": {"name": "unipc"},
    "sampler.eta=0.5 adds noise, but sampler.name=euler takes none; choose one of ddim": {"eta": 0.5},
    "sampler.eta=1.5 is outside 0 to 1": {"name": "ddim", "eta": 1.5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_sampler_is_refused(message):
    options = {"name": "euler", "eta": None} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        onnx_math.sample(
            options["name"], lambda z, t: z, np.zeros(1), np.array([1.0, 0.0]), eta=options["eta"],
            noise=lambda: np.zeros(1),
        )  # fmt: skip


def test_a_grid_a_prediction_and_a_guidance_are_refused():
    _, flow = both(FLOW)
    for kind, steps, message in (
        (
            "trailing",
            4,
            "sampler.grid=trailing is none of this objective's, with times=logit_normal; choose one of uni",
        ),
        (None, 0, "sampler.steps=0 walks nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.grid(steps, kind, 256)
    _, eps = both(ObjectiveConfig())
    with pytest.raises(ValueError, match="sampler.steps=2000 does not fit a table of 1000 times; choose 1 to 1000"):
        eps.grid(2000, None, 256)
    with pytest.raises(ValueError, match="a karras grid falls to t=0.0283, but would start at t=0.0099"):
        eps.grid(5, "karras", 256, 7.0, 0.01)
    with pytest.raises(ValueError, match="prediction=eps cannot be inverted at t=1"):
        eps.denoise(network)(np.ones((1, 1, 1, 1), np.float32), np.float32(1), 0.0)
    for options, message in (
        ({"rescale": 2.0}, "sampler.rescale=2.0 is outside 0 to 1"),
        ({"interval": (0.8, 0.2)}, "sampler.interval=\\[0.8, 0.2\\] is not an ordered pair"),
    ):
        with pytest.raises(ValueError, match=message):
            onnx_math.guided(network, np.concatenate, [], None, 1.0, **options)
