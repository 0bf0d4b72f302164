"""Which update is skipped, decided on the device: the host never waits, and all ranks decide alike.

An update is skipped if its loss or its gradient's norm is not finite, or if either lies far above the last ones:

    log v > mean + deviations * max(deviation, FLOOR)        v = loss, norm

over the accepted ones of the last `window` updates, once they are half of the window. Logarithms, because losses and
norms are products of many factors: they spread by ratios, and six deviations of the values themselves would refuse one
update in a thousand where the values are lognormal with a deviation of 0.5. Skipped updates do not enter the mean, so
a spike cannot widen the limit for the next one.

The loss is the mean over all ranks: its sum over ranks is under way while the backward pass runs. The norm is that of
gradients which ranks have summed already. So a bad number on one rank is seen by all, and no rank needs to ask.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from models.folder import newest

FLOOR = 0.01  # least deviation of a logarithm, 1 %: values that hardly move are not spikes
HUGE = 1e30  # above every finite logarithm
TINY = 1e-30  # a loss of 0, of a batch without one readable image, has a logarithm too


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    """How far from the last updates is too far, and how many may be skipped."""

    window: int = 128  # updates that are remembered
    deviations: float | None = 6.0  # null: only what is not finite is skipped
    max_skipped: int = 50  # of the window's updates, before the run gives up

    def __post_init__(self):
        if self.window < 2:
            raise ValueError(f"guard.window={self.window} is too short for a deviation; choose 2 or more, such as 128")
        if self.deviations is not None and self.deviations <= 0:
            raise ValueError(
                f"guard.deviations={self.deviations} must be positive; choose 6, or null to skip no finite update"
            )
        if not 0 <= self.max_skipped < self.window:
            raise ValueError(
                f"guard.max_skipped={self.max_skipped} is counted over guard.window={self.window} updates;"
                f" choose one from 0 to {self.window - 1}"
            )


class Guard:
    """Remembers the last updates. `watch` every micro-batch's loss, then ask for the `veto` once an update."""

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        # (4, window), newest last: log loss and log norm, whether accepted, whether skipped; all 0 before the first
        self._history = torch.zeros(4, config.window, device=device)
        self._counts = torch.zeros(2, device=device, dtype=torch.int64)  # skipped, not finite
        self._accepted, self._skipped = torch.eye(4, device=device)[2:]  # columns of the history
        self._loss: Tensor | None = None
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._reduction: dist.Work | None = None

    def watch(self, loss: Tensor, last: bool) -> None:
        """Add one micro-batch's share of this rank's mean loss; call it before the backward pass of that micro-batch.

        `last` marks the update's last micro-batch: the sum over ranks then starts, and runs beside the backward pass.
        """
        share = loss.detach().float() / self._world
        self._loss = share if self._loss is None else self._loss + share
        if last and self._world > 1:
            self._reduction = dist.all_reduce(self._loss, async_op=True)

    def veto(self, norm: Tensor) -> Tensor:
        """1.0 if the update must be skipped, else 0.0: a scalar on the device, the same on every rank.

        `norm` is the gradient's before clipping, reduced over ranks. Also remembers the update, and forgets the oldest.
        """
        assert self._loss is not None  # every update has a loss, which was watched
        if self._reduction is not None:
            self._reduction.wait()  # the accelerator's stream waits, not the host
        values = torch.stack((self._loss, norm)).clamp_(min=TINY).log_()
        self._loss = self._reduction = None

        accepted = (values <= self._limit()).all()  # what is NaN is not below anything
        update = torch.cat((values, self._accepted[2:])).where(accepted, self._skipped)
        self._history = torch.cat((self._history[:, 1:], update[:, None]), 1)
        self._counts += torch.stack((accepted, (values < HUGE).all())).logical_not_()
        return update[3]

    def _limit(self) -> Tensor | float:
        """The largest logarithms (2,) to accept; HUGE, which leaves out infinity alone, while too few are known."""
        if self.config.deviations is None:
            return HUGE
        logs, accepted = self._history[:2], self._history[2]  # logs are 0 where not accepted
        count = accepted.sum()
        mean = logs.sum(1) / count
        variance = ((logs - mean[:, None]).square_() * accepted).sum(1) / count
        limit = mean + self.config.deviations * variance.clamp_(min=FLOOR**2).sqrt_()
        return limit.where(count >= self.config.window / 2, HUGE)

    def check(self, checkpoints: Path) -> dict[str, int]:
        """Updates skipped since the run began, {"not_finite", "spikes"}; to be asked before a log line and a save.

        Raises FloatingPointError, which names the newest whole one of `checkpoints`, if too many of the window's were.
        """
        recent, skipped, not_finite = torch.cat((self._history[3].sum()[None].long(), self._counts)).tolist()
        if recent > self.config.max_skipped:
            good = newest(checkpoints) if checkpoints.is_dir() else None
            way = f"the same command continues from {good}" if good else "there is no checkpoint yet to continue from"
            raise FloatingPointError(
                f"{recent} of the last {self.config.window} updates were skipped, more than"
                f" guard.max_skipped={self.config.max_skipped} ({not_finite} not finite and {skipped - not_finite}"
                f" spikes since the run began); lower optim.lr: {way}"
            )
        return {"not_finite": not_finite, "spikes": skipped - not_finite}

    def tensors(self) -> dict[str, Tensor]:
        """All that decides, by name."""
        return {"history": self._history, "counts": self._counts}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`; if the window's length was changed since, with the newest of them."""
        history = tensors["history"].to(self._history.device)[:, -self.config.window :]
        missing = self.config.window - history.shape[1]
        self._history = torch.nn.functional.pad(history, (missing, 0))
        self._counts = tensors["counts"].to(self._counts.device, copy=True)
