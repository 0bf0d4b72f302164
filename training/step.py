"""One micro-batch, from latents to losses.

    t ~ law,  eps ~ N(0, 1),  x_t = alpha x0 + sigma eps,  loss = w(t) |denoiser(x_t, t, cond) - target|^2

where eps may have an offset a channel, or be dealt to the images it lies near, and |.|^2 may be pseudo-Huber.

Every random choice is a function of (seed, position of the image in the run), so it is the same on any number of
ranks and after any resume.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data.draws import noise, uniform
from data.loader import Batch
from diffusion.objective import Objective
from diffusion.timesteps import stratified
from models.base import Cond
from models.text import Conditioner
from training.pairing import paired


def condition(
    batch: Batch,
    conditioner: Conditioner,
    dropout: float,
    seed: int,
    device: torch.device,
    encoder_dropout: Sequence[float] = (),
) -> Cond:
    """The batch's condition, with a share `dropout` of its rows replaced by the null; a picture keeps its size.

    Of each text encoder's part a share `encoder_dropout` is replaced by its part of the null, independently of the
    others, as SD3 was trained (arXiv:2403.03206); the model then draws with some of the encoders left out.
    """
    null = conditioner.null(device)
    if batch.text is not None and conditioner.text is not None:
        cond = Cond(text=batch.text, text_mask=batch.text_mask, pooled=batch.pooled).to(device)
        null = null.cut(batch.text.shape[1])
    else:
        cond = conditioner(batch.captions, batch.class_id.to(device))
    drop = uniform(seed, "drop", batch.positions.numpy()) < dropout
    cond = cond.where(torch.from_numpy(drop).to(device), null)
    if encoder_dropout:
        assert conditioner.text is not None  # `check_text` has asked for one share each
        streams = enumerate(encoder_dropout)
        drops = [uniform(seed, f"drop/{i}", batch.positions.numpy()) < share for i, share in streams]
        drops = torch.from_numpy(np.stack(drops, 1)).to(device)
        cond = cond.where_regions(drops, null, conditioner.text.regions)
    cond.size_ids = conditioner.size_ids(batch.sizes.to(device))
    return cond


def clean(batch: Batch, seed: int) -> Tensor:
    """The latents x0 (b, c, h, w) to learn: the autoencoder's means, or draws from its posterior where it is there."""
    if batch.std is None:
        return batch.latents
    z = noise(seed, batch.positions.numpy(), tuple(batch.std.shape[1:]), batch.std.device, "posterior")
    return batch.latents + batch.std * z


def losses(
    denoiser: nn.Module, objective: Objective, x0: Tensor, cond: Cond, positions: Tensor, seed: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted loss, unweighted loss, time) of each image, (b,) each; `batch_size` is the global one.

    The unweighted loss is the plain squared error whatever the weighting and the penalty, so that runs compare.
    """
    config, rows = objective.config, positions.numpy()
    u = torch.from_numpy(uniform(seed, "time", rows))
    if config.stratified:
        u = stratified(u, positions, batch_size)
    t = objective.draw_times(u, cells=x0.shape[-2] * x0.shape[-1]).to(x0.device, torch.float32)
    eps = noise(seed, rows, tuple(x0.shape[1:]), x0.device)
    if config.offset_noise:
        eps = eps + config.offset_noise * noise(seed, rows, (x0.shape[1], 1, 1), x0.device, "offset")
    if config.pairing > 1:
        eps = paired(x0, eps, config.pairing)
    pred = denoiser(objective.add_noise(x0, eps, t), objective.network_time(t), cond)
    squared = (pred.float() - objective.target(x0, eps, t)).square()
    loss = objective.weight(t) * objective.penalty(squared).mean((1, 2, 3))
    return loss, squared.detach().mean((1, 2, 3)), t
