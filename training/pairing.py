"""Optimal-transport pairing: each image takes, among the noises of its group, the one that suits all best.

For a group of g images the permutation p that makes the paths from noise to image shortest,

    min over p of sum_i |x0_i - eps_p(i)|^2 = const - 2 max over p of sum_i <x0_i, eps_p(i)>,

straightens what a flow has to learn (Tong et al., arXiv:2302.00482; Pooladian et al., arXiv:2304.14772). The noises
stay Gaussian as a set, but are no longer independent of the images, nor of their captions. Groups are runs of
consecutive positions inside a micro-batch, so neither the ranks nor the micro-batch change who is paired.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def check_pairing(images: int, group: int) -> None:
    """Refuse groups that do not fill a micro-batch of so many images."""
    if images % group:
        raise ValueError(
            f"objective.pairing={group} does not divide a micro-batch of {images} images, and a group lies within one;"
            " choose a divisor, or another train.micro_batch"
        )


def paired(x0: Tensor, eps: Tensor, group: int) -> Tensor:
    """`eps` (b, ...) with its rows permuted within each `group` consecutive rows, nearest to `x0` (b, ...) in sum.

    The assignment is solved on the host: one wait for the device a call.
    """
    check_pairing(len(x0), group)
    with torch.autocast(x0.device.type, enabled=False):
        images, noises = (k.detach().float().reshape(-1, group, k[0].numel()) for k in (x0, eps))
        likeness = images @ noises.mT  # (b/g, g, g)
    dealt = [linear_sum_assignment(one, maximize=True)[1] for one in likeness.cpu().numpy()]
    rows = torch.from_numpy(np.stack(dealt)) + torch.arange(0, len(x0), group)[:, None]
    return eps[rows.flatten().to(eps.device)]
