"""One micro-batch, from latents to losses.

    t ~ law,  eps ~ N(0, 1),  x_t = alpha x0 + sigma eps,  loss = w(t) |denoiser(x_t, t, cond) - target|^2

where eps may have an offset a channel, or be dealt to the images it lies near, and |.|^2 may be pseudo-Huber. The error
to a neighbour's target may be taken off (`objective.contrast`), tokens may skip blocks (`model.route`), and the loss of
`training.alignment` may be added.

Every random choice is a function of (seed, position of the image in the run), so it is the same on any number of
ranks and after any resume.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.draws import noise, uniform
from data.loader import Batch
from diffusion.objective import Objective
from diffusion.timesteps import stratified
from models.base import Cond
from models.text import Conditioner
from models.weights import unwrap
from training.alignment import Alignment
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


def kept_tokens(config: Any, latent: Sequence[int], positions: Tensor, seed: int, device: Any) -> Tensor | None:
    """Indices (b, k), ascending, of the tokens of latents (c, h, w) that see `model.route_blocks`; None: all do."""
    if not getattr(config, "route", 0):
        return None
    tokens = latent[-2] * latent[-1] // config.patch_size**2
    chance = noise(seed, positions.numpy(), (tokens,), device, "route")
    return chance.argsort(1)[:, int(tokens * config.route) :].sort(1).values


def check_contrast(images: int, contrast: float) -> None:
    """Refuse micro-batches of so many images where one would have no neighbour."""
    if contrast and images % 2:
        raise ValueError(
            f"objective.contrast={contrast} sets images two by two, but a micro-batch has {images};"
            " choose an even train.micro_batch"
        )


def neighbours(x: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ... of x (b, ...): the order of images is random, so a neighbour is any other.

    Pairs lie within every even micro-batch, so neither the ranks nor the micro-batch change who is another's.
    """
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def times_and_noise(
    objective: Objective, x0: Tensor, positions: Tensor, seed: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """t (b,) and eps (b, c, h, w) of each image, by its position; `batch_size` is the global one."""
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
    return t, eps


def losses(
    denoiser: nn.Module,
    objective: Objective,
    x0: Tensor,
    cond: Cond,
    positions: Tensor,
    seed: int,
    batch_size: int,
    alignment: Alignment | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted loss, unweighted loss, time) of each image, (b,) each; `batch_size` is the global one.

    The unweighted loss is the plain squared error whatever is weighted, added or taken off, so that runs compare.
    """
    config = objective.config
    t, eps = times_and_noise(objective, x0, positions, seed, batch_size)
    kept = kept_tokens(getattr(unwrap(denoiser), "config", None), x0.shape, positions, seed, x0.device)
    seen = objective.add_noise(x0, eps, t), objective.network_time(t), cond
    if alignment is None:
        pred, added = (denoiser(*seen) if kept is None else denoiser(*seen, kept)), 0.0
    else:
        pred, projected = denoiser(*seen, kept, True)
        added = alignment.loss(projected, x0, kept)
    target = objective.target(x0, eps, t)
    squared = (pred.float() - target).square()
    cost = objective.penalty(squared)
    if config.contrast:
        check_contrast(len(x0), config.contrast)
        cost = cost - config.contrast * objective.penalty((pred.float() - neighbours(target)).square())
    loss = objective.weight(t) * cost.mean((1, 2, 3)) + added
    return loss, squared.detach().mean((1, 2, 3)), t
