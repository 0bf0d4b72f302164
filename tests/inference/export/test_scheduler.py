"""Public schedulers walk from the same noise to the same sample as ours, and tell what they were made for."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor

from diffusion.objective import NetworkTime, Objective, ObjectiveConfig, Prediction
from diffusion.sample import euler
from diffusion.schedule import Betas, Path, ShiftLaw
from diffusion.timesteps import TimeLaw
from inference.export.scheduler import objective_of, scheduler_for, walked

LINEAR = {"path": Path.linear, "prediction": Prediction.flow, "times": TimeLaw.logit_normal}
OBJECTIVES = {
    "sd": {"network_time": NetworkTime.index},
    "dit": {"network_time": NetworkTime.index, "betas": Betas.linear},
    "cosine": {"network_time": NetworkTime.index, "prediction": Prediction.v, "betas": Betas.cosine},
    "v": {"network_time": NetworkTime.index, "prediction": Prediction.v},
    "zero terminal": {"network_time": NetworkTime.index, "prediction": Prediction.v, "zero_terminal": True},
    "x0": {"network_time": NetworkTime.index, "prediction": Prediction.x0},
    "eps told t": {},
    "v told t, to pure noise": {"prediction": Prediction.v, "times": TimeLaw.uniform},
    "flow": LINEAR,
    "flow, shifted": LINEAR | {"shift": 3.0},
    "flow told whole": LINEAR | {"shift": 2.0, "network_time": NetworkTime.whole},
}


def network(x: Tensor, t: Tensor, _=None) -> Tensor:
    """Something smooth that depends on every number and on the time as networks see it."""
    k = 1000 * t.reshape(-1, 1, 1, 1).float()
    return (x.roll(1, -1) * (1 + k / 700)).tanh() + 0.3 * x + (k / 300).sin()


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize("steps", [7, 25])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_public_loop_is_ours(name, steps, fractions):
    objective = Objective(ObjectiveConfig(**OBJECTIVES[name]))
    scheduler = scheduler_for(objective, fractions)
    times = walked(scheduler, steps)
    noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    theirs = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t.expand(2) / 1000), t, theirs, return_dict=False)[0]

    approximate = "flow" in name and not fractions and "whole" not in name  # told a time up to a thousandth smaller
    ours = euler(lambda z, t: objective.denoise(network)(z, t, None), objective.start(noise, times), times)
    assert (ours - theirs).abs().max() < (5e-3 if approximate else 2e-4) * theirs.abs().max()
    gap = (1000 * objective.network_time(times[:-1]) - scheduler.timesteps.double()).abs().max()
    assert gap < (1 if approximate else 2e-3)
    if "told t" not in name and not approximate:
        torch.testing.assert_close(times, objective.grid(steps), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_scheduler_tells_its_objective(name, fractions):
    config = ObjectiveConfig(**OBJECTIVES[name])
    told = objective_of(scheduler_for(Objective(config), fractions))
    whole = replace(config, network_time=NetworkTime.whole)
    assert told == (whole if config.path is Path.linear and not fractions else config)


def test_public_schedulers_are_read():
    sdxl = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    read = objective_of(diffusers.EulerDiscreteScheduler(**sdxl, timestep_spacing="leading", steps_offset=1))
    assert read == ObjectiveConfig(network_time=NetworkTime.index)
    terminal = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    read = objective_of(diffusers.DDIMScheduler(**sdxl, **terminal))
    assert read == ObjectiveConfig(prediction=Prediction.v, zero_terminal=True, network_time=NetworkTime.index)
    assert objective_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).shift == 3.0
    assert objective_of(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")).betas is Betas.cosine
    assert objective_of(diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02)).betas is Betas.linear


def test_what_no_scheduler_or_no_table_can_say_is_refused():
    for wrong in (
        {"prediction": Prediction.x0, "path": Path.linear, "times": TimeLaw.uniform},
        LINEAR | {"network_time": NetworkTime.index},
    ):
        with pytest.raises(ValueError, match="has no public scheduler; there is one for flow with network_time=whole"):
            scheduler_for(Objective(ObjectiveConfig(**wrong)), True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=true, a shift for every size"):
        objective_of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match=r"beta_schedule=sigmoid .* give one of scaled_linear 0.00085 .*, squaredcos"):
        objective_of(diffusers.DDPMScheduler(beta_schedule="sigmoid"))
    with pytest.raises(ValueError, match="objective.shift_law=exponential shifts each size differently"):
        scheduler_for(Objective(ObjectiveConfig(**LINEAR, shift_law=ShiftLaw.exponential)), True)
    with pytest.raises(ValueError, match="trained_betas of its own"):
        objective_of(diffusers.DDIMScheduler(trained_betas=[0.01] * 1000))


def test_what_stands_for_infinity_is_exported_as_infinity():
    law = {"network_time": NetworkTime.index, "prediction": Prediction.v, "zero_terminal": True}
    objective = Objective(ObjectiveConfig(**law, sigma_max=20000.0))
    scheduler = scheduler_for(objective, False)
    assert objective_of(scheduler) == ObjectiveConfig(**law)
    torch.testing.assert_close(walked(scheduler, 9), objective.grid(9), atol=1e-4, rtol=0)
