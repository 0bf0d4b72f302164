"""Everything that can be chosen, listed once, so that a new objective or sampler joins every test that asks for one."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from diffusion.objective import NetworkTime, Objective, ObjectiveConfig, Prediction, Weighting
from diffusion.sample import Sampler, sample
from diffusion.schedule import Betas, Path
from diffusion.timesteps import TimeLaw

OBJECTIVES = {
    "eps": ObjectiveConfig(weighting=Weighting.min_snr, network_time=NetworkTime.index),
    "eps_shifted": ObjectiveConfig(shift=2.0),
    "x0": ObjectiveConfig(prediction=Prediction.x0, weighting=Weighting.min_snr),
    "x0_linear": ObjectiveConfig(prediction=Prediction.x0, path=Path.linear, times=TimeLaw.uniform),
    "v": ObjectiveConfig(prediction=Prediction.v, weighting=Weighting.min_snr),
    "v_terminal": ObjectiveConfig(
        prediction=Prediction.v,
        zero_terminal=True,
        weighting=Weighting.min_snr,
        floor=1.0,
        network_time=NetworkTime.index,
    ),
    "v_uniform": ObjectiveConfig(prediction=Prediction.v, times=TimeLaw.uniform),
    "flow": ObjectiveConfig(
        prediction=Prediction.flow, path=Path.linear, times=TimeLaw.logit_normal, logit_mean=0.0, shift=3.0
    ),
    "flow_whole": ObjectiveConfig(
        prediction=Prediction.flow, path=Path.linear, times=TimeLaw.logit_normal, network_time=NetworkTime.whole
    ),
    "flow_from_unet": ObjectiveConfig(
        prediction=Prediction.flow,
        path=Path.linear,
        times=TimeLaw.uniform,
        zero_terminal=True,
        weighting=Weighting.min_snr,
        network_time=NetworkTime.index,
    ),
    "novelai_v3": ObjectiveConfig(
        prediction=Prediction.v,
        zero_terminal=True,
        sigma_max=20000.0,
        weighting=Weighting.min_snr,
        floor=1.0,
        network_time=NetworkTime.index,
    ),
    "eps_cosine": ObjectiveConfig(betas=Betas.cosine, weighting=Weighting.p2),
    "v_edm": ObjectiveConfig(
        prediction=Prediction.v, times=TimeLaw.logit_normal, logit_std=1.2, sigma_max=160.0, weighting=Weighting.edm
    ),
    "flow_low_noise": ObjectiveConfig(
        prediction=Prediction.flow,
        path=Path.linear,
        times=TimeLaw.cosmap,
        range=[0.0, 0.6],
        weighting=Weighting.soft_min_snr,
    ),
}


@dataclass
class Gaussian:
    """Data N(mean, std^2) in each dimension, for which the best denoiser is known exactly."""

    mean: float = 0.7
    std: float = 0.4

    def spread(self, t):
        """Standard deviation of z = (1-t) x0 + t eps."""
        return ((1 - t) ** 2 * self.std**2 + t**2) ** 0.5

    def split(self, z, t):
        """E[x0 | z] and E[eps | z]."""
        t = t.reshape(-1, *[1] * (z.ndim - 1))
        residual = (z - (1 - t) * self.mean) / self.spread(t) ** 2
        return self.mean + (1 - t) * self.std**2 * residual, t * residual

    def x0(self, z, t):
        """The exact denoise function."""
        return self.split(z, t)[0]


@pytest.fixture
def gaussian():
    return Gaussian()


@pytest.fixture(params=OBJECTIVES.values(), ids=list(OBJECTIVES))
def objective(request):
    return Objective(request.param)


@pytest.fixture(params=Sampler, ids=lambda kind: kind.name)
def sampler(request):
    """(kind, function) of each sampler."""
    return request.param, partial(sample, request.param)


@pytest.fixture
def oracle(gaussian):
    """Make an objective's denoise function, through its own prediction, from the network exact on `gaussian`."""

    def build(objective):
        def denoise(z, t):
            def network(x_t, network_time, cond):
                x0, eps = gaussian.split(z, t)
                return objective.target(x0, eps, t)

            return objective.denoise(network)(z, t, None)

        return denoise

    return build


@pytest.fixture
def latents():
    """(x0, eps), each (b, c, h, w) float64."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(9, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.fixture
def uniform():
    """Evenly spread numbers in (0, 1), float64: a quadrature rule rather than a draw."""
    n = 20_000
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n
