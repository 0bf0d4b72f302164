"""Objectives and diffusers' schedulers: which one walks the same noise, and tells the network the same times.

    objective                      scheduler                       its timesteps
    eps, x0, v   index             DPM-Solver++, the same betas    0..999, the table's index, trailing
                 noise             DPM-Solver++, betas of k/1000   k = 1000 t, to the largest t trained at, trailing
    flow         noise, in MMDiT   FlowMatchEuler, the same shift  1000 t
                 whole             DPM-Solver++, flow sigmas       1000 t, rounded down; the first is 999

DPM-Solver++ of first order is Euler's method on z = (1-t) x0 + t eps, as ours is and as DDIM is meant to be; the DDIM
of diffusers steps by 1000 // steps, so that it misses its own timesteps where that leaves a rest. A terminal time
without signal has alpha = 2^-12 there, whatever sigma_max stands for it here. Only FlowMatchEuler tells times between
the thousandths, and only SD3's pipeline can call it: the others ask their scheduler for `scale_model_input`, which it
lacks. Networks of flow that were told the time itself are given `whole` times there, which is not quite the same.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion.objective import NetworkTime, Objective, ObjectiveConfig, Prediction
from diffusion.schedule import Betas, Path, ShiftLaw, alpha_sigma
from diffusion.timesteps import TimeLaw

PREDICTIONS: dict[Prediction, Any] = {
    Prediction.eps: "epsilon",
    Prediction.x0: "sample",
    Prediction.v: "v_prediction",
    Prediction.flow: "flow_prediction",
}
TERMINAL = 2.0**-24  # of alpha_bar where there is no signal, as the schedulers have it
BETAS: dict[Betas, dict[str, Any]] = {
    Betas.scaled_linear: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    Betas.linear: {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    Betas.cosine: {"beta_schedule": "squaredcos_cap_v2"},  # it reads no ends
}


def scheduler_for(objective: Objective, fractions: bool) -> Any:
    """The scheduler of an objective; `fractions`: the pipeline hands on times between the thousandths (SD3's)."""
    import diffusers

    config = objective.config
    if config.shift_law is not ShiftLaw.fixed:
        raise ValueError(
            f"objective.shift_law={config.shift_law.name} shifts each size differently, and a public pipeline is told"
            " one shift; set shift_law=fixed and shift to that of your size in the checkpoint's pipeline.json"
        )
    if config.path is Path.linear:
        if config.prediction is not Prediction.flow or config.network_time is NetworkTime.index:
            raise ValueError(
                f"objective.prediction={config.prediction.name} with network_time={config.network_time.name} on"
                " objective.path=linear has no public scheduler; there is one for flow with network_time=whole"
            )
        if fractions and config.network_time is NetworkTime.noise:
            return diffusers.FlowMatchEulerDiscreteScheduler(shift=config.shift)
        table: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": config.shift}
    elif config.network_time is NetworkTime.index:
        table = BETAS[config.betas] | {"rescale_betas_zero_snr": config.zero_terminal}
    else:
        betas = thousandths(objective.t_max)
        table = {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
    return diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=1,
        prediction_type=PREDICTIONS[config.prediction],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        **table,
    )


def thousandths(t_max: float) -> Tensor:
    """Betas of the times 0, 1/1000, ... up to `t_max`, float64: beta_k = 1 - (alpha_k / alpha_{k-1})^2."""
    times = torch.arange(int(1000 * t_max + 1e-6) + 1, dtype=torch.float64) / 1000
    alpha_bar = (alpha_sigma(Path.vp, times)[0] ** 2).clamp(TERMINAL, 1 - 1e-7)  # the ends have no finite logarithm
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def walked(scheduler: Any, steps: int) -> Tensor:
    """The noise times, from the first to 0, that a scheduler walks in so many steps: (steps + 1,) float64."""
    if hasattr(scheduler, "shift"):  # FlowMatchEuler: its own grid spends a step on the last thousandth
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        return scheduler.sigmas.double()
    scheduler.set_timesteps(steps)
    if scheduler.config.get("use_flow_sigmas"):
        return scheduler.sigmas.double()
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    signal = (alpha_bar / TERMINAL - 1).abs() > 0.5  # a table may end lower than what stands for none: cosine's does
    alpha, sigma = torch.where(signal, alpha_bar, 0).sqrt(), (1 - alpha_bar).sqrt()
    return torch.cat([sigma / (alpha + sigma), alpha.new_zeros(1)])


def objective_of(scheduler: Any) -> ObjectiveConfig:
    """What a public pipeline's network was trained to predict, as its scheduler tells."""
    config, name = scheduler.config, type(scheduler).__name__
    words = {word: prediction for prediction, word in PREDICTIONS.items()}
    prediction = words[config.get("prediction_type", "flow_prediction")]
    if prediction is Prediction.flow:
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name} has use_dynamic_shifting=true, a shift for every size; an objective here has one: set"
                " use_dynamic_shifting to false and shift to that of your size in the scheduler's config"
            )
        return ObjectiveConfig(
            prediction=prediction,
            path=Path.linear,
            times=TimeLaw.logit_normal,
            shift=config.get("shift", config.get("flow_shift", 1.0)),
            network_time=NetworkTime.noise if "FlowMatch" in name else NetworkTime.whole,
        )
    if (betas := config.get("trained_betas")) is not None:
        if not torch.allclose(torch.tensor(betas, dtype=torch.float64), thousandths((len(betas) - 1) / 1000)):
            raise ValueError(f"{name} has trained_betas of its own, which no table here is; give one of {_tables()}")
        reaches_noise = len(betas) == 1001
        return ObjectiveConfig(prediction=prediction, times=TimeLaw.uniform if reaches_noise else TimeLaw.table)
    for table, known in BETAS.items():
        if all(config[key] == value for key, value in known.items()):
            return ObjectiveConfig(
                prediction=prediction,
                betas=table,
                zero_terminal=bool(config.get("rescale_betas_zero_snr")),
                network_time=NetworkTime.index,
            )
    raise ValueError(
        f"{name} has beta_schedule={config.beta_schedule} from {config.beta_start} to {config.beta_end}, which no table"
        f" here is; give one of {_tables()}"
    )


def _tables() -> str:
    return ", ".join(" ".join(map(str, known.values())) for known in BETAS.values())
