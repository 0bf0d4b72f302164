"""Where a token is and what time it is, as sines and cosines.

    time      e(t) = [cos(1000 t w_k), sin(1000 t w_k)],   w_k = 10000^(-k/128),  k = 0..127
    position  [sin(x w_k), cos(x w_k), sin(y w_k), cos(y w_k)],   w_k = 10000^(-4k/hidden),  k = 0..hidden/4-1

Both are the conventions of DiT (Peebles and Xie 2023): cosines first for time, sines and the column first for
position. The factor 1000 matters: over t in [0, 1] without it, nearly all the dimensions stand still.

Positions are computed from the grid at hand instead of being stored, in the coordinates of the base grid of g cells
(a row or column of n tokens, i = 0..n-1):

    centre   (i + 1/2) g/n - 1/2     a token stands where the base tokens it replaces have their centre
    corner   i g/n                   DiT's and PixArt's public weights; half a cell off at other sizes
    crop     (i + (m - n) // 2) g/m  SD3's public weights: the middle of a fixed table of m cells

At n = g, centre and corner agree. A larger picture thus keeps the range of coordinates the network has learnt.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

TIME_DIM = 256
POSITIONS = ("centre", "corner", "crop")


def time_embedding(t: Tensor, dim: int = TIME_DIM, steps: int = 0) -> Tensor:
    """Sinusoids of 1000 t, in float32 whatever the dtype of `t`: (b,) -> (b, dim)."""
    return number_embedding(1000.0 * t.float(), dim, steps)


def number_embedding(x: Tensor, dim: int, steps: int = 0) -> Tensor:
    """Sinusoids of numbers as they are, in float32: (...) -> (..., dim). `steps`: frequencies to 1/10000, or dim/2."""
    half = dim // 2
    k = torch.arange(half, device=x.device, dtype=torch.float32)
    frequency = torch.exp(k * -math.log(1e4) / (steps or half))
    angle = x.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def coordinates(n: int, base: int, kind: str, table: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Coordinates of n tokens along one side, in units of the base grid's cells: (n,) float64 (float32 on MPS)."""
    mps = device is not None and torch.device(device).type == "mps"
    i = torch.arange(n, device=device, dtype=torch.float32 if mps else torch.float64)
    if kind == "crop":
        if n > table:
            raise ValueError(
                f"model.table_size={table} is smaller than {n}, the picture's side in tokens; "
                'enlarge it or set model.positions="centre"'
            )
        return (i + (table - n) // 2) * (base / table)
    return (i + 0.5) * (base / n) - 0.5 if kind == "centre" else i * (base / n)


def position_table(
    grid: tuple[int, int],
    base: int,
    hidden: int,
    kind: str = "centre",
    table: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sinusoidal positions of a (rows, columns) grid of tokens in reading order: (rows * columns, hidden)."""
    rows, columns = grid

    def waves(n: int) -> Tensor:
        x = coordinates(n, base, kind, table, device)
        frequency = torch.exp(torch.arange(hidden // 4, device=device, dtype=x.dtype) * (-math.log(1e4) * 4 / hidden))
        angle = x[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype)

    across = waves(columns)[None].expand(rows, -1, -1)
    down = waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def positions(
    grid: tuple[int, int], base: int, hidden: int, kind: str, table: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`position_table`, remembered between calls; while compiling or exporting it is traced instead.

    A cache filled during tracing would hand the tracer's fake tensors to a later eager call.
    """
    remember = position_table if torch.compiler.is_compiling() else _remembered
    return remember(grid, base, hidden, kind, table, device, dtype)


@lru_cache(maxsize=64)
def _remembered(
    grid: tuple[int, int], base: int, hidden: int, kind: str, table: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):  # a table first met while sampling must also serve training
        return position_table(grid, base, hidden, kind, table, device, dtype)
