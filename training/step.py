"""One micro-batch, from latents to losses.

    t ~ law,  eps ~ N(0, 1),  x_t = alpha x0 + sigma eps,  loss = w(t) |denoiser(x_t, t, cond) - target|^2

Every random choice is a function of (seed, position of the image in the run), so it is the same on any number of
ranks and after any resume.
"""

import torch
from torch import Tensor, nn

from data.draws import noise, uniform
from data.loader import Batch
from diffusion.objective import Objective
from models.base import Cond
from models.text import Conditioner


def condition(batch: Batch, conditioner: Conditioner, dropout: float, seed: int, device: torch.device) -> Cond:
    """The batch's condition, with a share `dropout` of its rows replaced by the null; a picture keeps its size."""
    null = conditioner.null(device)
    if batch.text is not None and conditioner.text is not None:
        cond = Cond(text=batch.text, text_mask=batch.text_mask, pooled=batch.pooled).to(device)
        null = null.cut(batch.text.shape[1])
    else:
        cond = conditioner(batch.captions, batch.class_id.to(device))
    drop = uniform(seed, "drop", batch.positions.numpy()) < dropout
    cond = cond.where(torch.from_numpy(drop).to(device), null)
    cond.size_ids = conditioner.size_ids(batch.sizes.to(device))
    return cond


def losses(
    denoiser: nn.Module, objective: Objective, x0: Tensor, cond: Cond, positions: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted loss, unweighted loss, time) of each image, (b,) each."""
    u = torch.from_numpy(uniform(seed, "time", positions.numpy()))
    t = objective.draw_times(u).to(x0.device, torch.float32)
    eps = noise(seed, positions.numpy(), tuple(x0.shape[1:]), x0.device)
    pred = denoiser(objective.add_noise(x0, eps, t), objective.network_time(t), cond)
    error = (pred.float() - objective.target(x0, eps, t)).square().mean((1, 2, 3))
    return objective.weight(t) * error, error.detach(), t
