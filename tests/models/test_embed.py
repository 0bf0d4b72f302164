"""Time and position embeddings: separation, the public tables, and the anchoring of other sizes."""

import math

import numpy as np
import pytest
import torch

from models.embed import coordinates, position_table, positions, time_embedding


def test_time_embedding_is_cosines_then_sines_of_1000_t():
    t = torch.tensor([0.0, 0.25, 1.0])
    k = np.arange(128)
    angle = 1000 * t.numpy().astype(np.float64)[:, None] * 10000.0 ** (-k / 128)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(time_embedding(t).numpy(), expected, atol=2e-4)  # float32 angles up to 1000


def test_time_embedding_separates_a_thousandth():
    t = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 0.999
    gap = (time_embedding(t) - time_embedding(t + 0.001)).norm(dim=1)
    assert gap.min() > 1.0  # beside a norm of sqrt(128) = 11.3; without the factor 1000 it is 0.003
    assert (time_embedding(torch.linspace(0, 1, 1001)).var(dim=0) > 1e-3).sum() > 220  # dimensions that move


def test_time_embedding_is_float32_for_low_precision_times():
    assert time_embedding(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


def test_base_grid_counts_whichever_the_anchor():
    for kind in ("centre", "corner"):
        torch.testing.assert_close(coordinates(16, 16, kind), torch.arange(16, dtype=torch.float64))


@pytest.mark.parametrize("factor", [2, 4])
def test_centre_anchor_keeps_the_middle_of_every_base_cell(factor: int):
    fine = coordinates(16 * factor, 16, "centre")
    torch.testing.assert_close(fine.view(16, factor).mean(1), coordinates(16, 16, "centre"))
    assert fine[0] > -0.5
    assert fine[-1] < 15.5
    torch.testing.assert_close(fine, -fine.flip(0) + 15)  # symmetric about the picture's middle


def test_corner_anchor_drifts_by_almost_half_a_cell():
    shift = coordinates(64, 16, "centre") - coordinates(64, 16, "corner")
    torch.testing.assert_close(shift, torch.full_like(shift, -0.375))


def test_doubled_grid_interpolates_the_base_table():
    """Slow waves at the doubled grid, averaged over 2 x 2, are the base table's."""
    base, hidden = 8, 64
    fine = position_table((16, 16), base, hidden, "centre", dtype=torch.float64).view(8, 2, 8, 2, hidden)
    coarse = position_table((8, 8), base, hidden, "centre", dtype=torch.float64).view(8, 8, hidden)
    frequency = 1e4 ** (-torch.arange(hidden // 4, dtype=torch.float64) * 4 / hidden)
    shrink = torch.cos(frequency / 4).repeat(4)  # mean of sin(w(x-1/4)) and sin(w(x+1/4)) is cos(w/4) sin(wx)
    torch.testing.assert_close(fine.mean(dim=(1, 3)), coarse * shrink)


def test_table_has_the_column_first_and_reads_row_by_row():
    table = position_table((3, 5), 4, 8, "corner", dtype=torch.float64).view(3, 5, 8)
    x, y = 2 * 4 / 5, 1 * 4 / 3
    expected = [f(z * w) for z in (x, y) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(table[1, 2], torch.tensor(expected, dtype=torch.float64))


def test_crop_is_the_middle_of_one_large_table():
    whole = position_table((12, 12), 4, 8, "crop", table=12).view(12, 12, 8)
    middle = position_table((4, 6), 4, 8, "crop", table=12).view(4, 6, 8)
    torch.testing.assert_close(middle, whole[4:8, 3:9])
    with pytest.raises(ValueError, match="model.table_size=12 is smaller than 13"):
        coordinates(13, 4, "crop", table=12)


def test_positions_are_remembered_and_usable_in_training():
    arguments = ((2, 3), 4, 8, "centre", 0, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        first = positions(*arguments)
    assert positions(*arguments) is first
    assert not first.is_inference()
