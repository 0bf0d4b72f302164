"""The seed's decisions: which record, which caption, which noise, as pure functions of a position.

A position is the number of images a run has seen before this one. Every random choice about an image is a hash
of `(seed, what is drawn, position)`, so nothing has to be saved to resume, and neither the number of processes
nor the size of a micro-batch can change what is drawn.

The hash is a counter run twice through the 64-bit finaliser of splitmix64 (Steele, Lea and Flood 2014),

    h(x) = f(f(a + g x) + b),    (a, b) = BLAKE2b(seed, stream),    g = 2^64 / golden ratio,

in wrapping 64-bit integers, which numpy and torch compute alike on every device. No library's random stream is
involved, so no upgrade changes a run.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def rows(seed: int, positions: np.ndarray, n: int, name: str = "") -> np.ndarray:
    """Records (b,) of a list of `n` that the positions (b,) show: position p is slot p % n of epoch p // n.

    Lists of other names are shuffled independently.
    """
    epochs, slots = np.divmod(np.asarray(positions, np.int64), n)
    found = np.empty_like(slots)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = order(seed, int(epoch), n, name)[slots[here]]
    return found


@lru_cache(maxsize=256)  # of each list two: a batch may lie across two epochs
def order(seed: int, epoch: int, n: int, name: str = "") -> np.ndarray:
    """The permutation (n,) in which an epoch shows `n` records; read-only, the last ones are kept."""
    keys = _bits(seed, f"order/{name}/{epoch}" if name else f"order/{epoch}", np.arange(n))
    permutation = np.argsort(keys, kind="stable").astype(np.int32 if n < 2**31 else np.int64)
    permutation.flags.writeable = False
    return permutation


def uniform(seed: int, stream: str, positions: np.ndarray) -> np.ndarray:
    """Uniform float64 (b,), strictly inside (0, 1), for each position (b,); streams of other names are independent."""
    # 52 bits and a half: with 53 the half would round away, and the largest value would be 1
    return ((_bits(seed, stream, positions) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def noise(
    seed: int, positions: np.ndarray, shape: Sequence[int], device: torch.device | str = "cpu", stream: str = "noise"
) -> torch.Tensor:
    """Unit Gaussian float32 (b, *shape) on `device`, where row i depends only on `(seed, stream, positions[i])`.

    Drawn where it is used. The integers agree on all devices, so the values do up to the rounding of log and cos.
    """
    count = int(np.prod(shape))
    keys = torch.from_numpy(_bits(seed, stream, positions).view(np.int64)).to(device)
    # the counter is hashed before the row's key is added: rows with nearby keys then share no run of values
    counter = _mix(torch.arange(1, (count + 1) // 2 + 1, device=device) * _signed(_GOLDEN))
    bits = _mix(keys[:, None] + counter)
    # Box and Muller: 40 bits for the radius (out to 7.5 sigma), 24 for the angle
    radius = (((bits >> 24) & (2**40 - 1)).float().add_(0.5) * 2.0**-40).log_().mul_(-2).sqrt_()
    angle = (bits & (2**24 - 1)).float() * (2 * torch.pi * 2.0**-24)
    pairs = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)
    return pairs[:, :count].reshape(len(keys), *shape)


def _bits(seed: int, stream: str, positions: np.ndarray) -> np.ndarray:
    """64 hashed bits (b,) uint64 for each position (b,)."""
    digest = blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    a, b = np.frombuffer(digest, "<u8").astype(np.uint64)
    x = np.asarray(positions, np.int64).astype(np.uint64)
    return _mix_numpy(_mix_numpy(x * np.uint64(_GOLDEN) + a) + b)


def _mix_numpy(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX[1])
    return x ^ (x >> np.uint64(31))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The same in torch, whose 64-bit integers are signed: a shift is made logical by its mask."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MIX[0])
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MIX[1])
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
