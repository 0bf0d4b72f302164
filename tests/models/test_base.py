"""Conditions move, join and drop row by row; configs refuse what cannot be built."""

import pytest
import torch

from models.base import Cond, ModelConfig, Region, indivisible
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig


def cond(rows: int, seed: int = 0) -> Cond:
    generator = torch.Generator().manual_seed(seed)
    return Cond(
        text=torch.randn(rows, 4, 3, generator=generator),
        text_mask=torch.rand(rows, 4, generator=generator) > 0.5,
        pooled=torch.randn(rows, 2, generator=generator),
        class_id=torch.randint(0, 9, (rows,), generator=generator),
    )


def test_to_changes_the_dtype_of_floats_only():
    moved = cond(2).to(dtype=torch.float64)
    assert (moved.text.dtype, moved.pooled.dtype) == (torch.float64, torch.float64)
    assert (moved.text_mask.dtype, moved.class_id.dtype) == (torch.bool, torch.int64)
    assert cond(2).to("meta").text.device.type == "meta"
    assert moved.size_ids is None


def test_sizes_stay_whole_in_low_precision():
    sized = Cond(size_ids=torch.tensor([[1023.0, 1023, 0, 0, 1023, 1023]]))
    assert torch.equal(sized.to(dtype=torch.bfloat16).size_ids, sized.size_ids)
    assert sized.to("meta").size_ids.device.type == "meta"


def test_select_by_mask_index_and_slice():
    batch = cond(4)
    keep = torch.tensor([True, False, True, False])
    for rows in (keep, torch.tensor([0, 2]), slice(0, 4, 2)):
        chosen = batch.select(rows)
        assert torch.equal(chosen.text, batch.text[[0, 2]])
        assert torch.equal(chosen.class_id, batch.class_id[[0, 2]])
    assert cond(1).select(torch.zeros(3, dtype=torch.int64)).text.shape[0] == 3  # one row, repeated


def test_cut_keeps_the_first_tokens_and_all_else():
    batch = cond(3)
    cut = batch.cut(2)
    assert torch.equal(cut.text, batch.text[:, :2])
    assert torch.equal(cut.text_mask, batch.text_mask[:, :2])
    assert cut.pooled is batch.pooled


def test_cat_then_select_gives_back_the_parts():
    a, b = cond(2, seed=1), cond(3, seed=2)
    joined = Cond.cat([a, b])
    assert torch.equal(joined.select(slice(0, 2)).text, a.text)
    assert torch.equal(joined.select(slice(2, 5)).text_mask, b.text_mask)


def test_cat_takes_a_missing_mask_for_all_tokens():
    a, b = cond(2), cond(1)
    b.text_mask = None
    assert Cond.cat([a, b]).text_mask[2].all()
    assert Cond.cat([b, b]).text_mask is None


def test_cat_refuses_a_field_that_only_some_have():
    with pytest.raises(ValueError, match="cond.pooled is given in some conditions and None in others"):
        Cond.cat([cond(1), Cond(text=torch.zeros(1, 4, 3), class_id=torch.zeros(1, dtype=torch.int64))])


def test_where_takes_the_null_row():
    batch, null = cond(3, seed=1), cond(1, seed=2)
    drop = torch.tensor([False, True, False])
    mixed = batch.where(drop, null)
    for name in ("text", "text_mask", "pooled", "class_id"):
        rows, other, result = (getattr(c, name) for c in (batch, null, mixed))
        assert torch.equal(result[1], other[0])
        assert torch.equal(result[[0, 2]], rows[[0, 2]])


def test_where_keeps_the_dtype_of_the_batch():
    batch, null = cond(2).to(dtype=torch.bfloat16), cond(1)
    assert batch.where(torch.tensor([True, False]), null).text.dtype == torch.bfloat16


def test_where_refuses_a_null_of_another_length():
    null = cond(1)
    null.text = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match="null.text has shape"):
        cond(2).where(torch.tensor([True, False]), null)


# two encoders on the first two tokens, side by side, and one behind them; the last feature there is padding
REGIONS = [
    Region(slice(0, 2), slice(0, 1), slice(0, 1)),
    Region(slice(0, 2), slice(1, 2), slice(1, 2)),
    Region(slice(2, 4), slice(0, 3), slice(0, 0)),
]


def test_regions_drop_by_themselves_and_leave_the_rest_to_the_bit():
    batch, null = cond(8, seed=1), cond(1, seed=2)
    batch.text_mask, null.text_mask = torch.tensor([[1, 1, 1, 0]] * 8).bool(), torch.tensor([[1, 0, 0, 0]]).bool()
    before = batch.text.clone()
    drops = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]).bool()  # every combination
    mixed = batch.where_regions(drops, null, REGIONS)
    assert torch.equal(batch.text, before)
    for i, row in enumerate(drops.tolist()):
        taken = torch.zeros(4, 3, dtype=torch.bool)
        for drop, region in zip(row, REGIONS, strict=True):
            taken[region.tokens, region.features] = drop
        assert torch.equal(mixed.text[i], torch.where(taken, null.text[0], batch.text[i]))
        assert torch.equal(mixed.pooled[i], torch.where(torch.tensor(row[:2]), null.pooled[0], batch.pooled[i]))
        hidden = row[0] and row[1]  # the mask is the null's where no encoder that reads the tokens is left
        assert mixed.text_mask[i].tolist() == [True, not hidden, not row[2], False]
    assert torch.equal(mixed.class_id, batch.class_id)


def test_regions_end_where_the_text_is_cut():
    batch, null = cond(2, seed=1), cond(1, seed=2)
    drops = torch.ones(2, 3, dtype=torch.bool)
    whole = batch.where_regions(drops, null, REGIONS)
    for tokens in (1, 2, 3):
        cut = batch.cut(tokens).where_regions(drops, null.cut(tokens), REGIONS)
        assert torch.equal(cut.text, whole.text[:, :tokens])
        assert torch.equal(cut.text_mask, whole.text_mask[:, :tokens])


def test_regions_need_text_but_neither_mask_nor_pooled():
    text = torch.ones(2, 4, 3)
    bare = Cond(text=text).where_regions(torch.tensor([[True, False, True]] * 2), Cond(text=0 * text[:1]), REGIONS)
    assert bare.text[0].tolist() == [[0, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert bare.text_mask is bare.pooled is None
    with pytest.raises(ValueError, match="cond.text is None: regions are those of text encoders"):
        Cond().where_regions(torch.ones(2, 3), Cond(), REGIONS)


def test_fields_are_closed():
    with pytest.raises(AttributeError):
        Cond().texts = None
    with pytest.raises(TypeError):
        ModelConfig(in_chanels=3)


def test_config_refuses_what_cannot_be_built():
    with pytest.raises(ValueError, match="model.in_channels=0 is not positive"):
        ModelConfig(in_channels=0)
    with pytest.raises(ValueError, match="model.patch_size=3 does not divide the latent side 32"):
        ModelConfig(patch_size=3)
    with pytest.raises(ValueError, match="model.text_dim=0 is not positive"):
        PixArtConfig(text_dim=0)
    with pytest.raises(ValueError, match="model.hidden=1536 is not a multiple of model.heads=7"):
        MMDiTConfig(heads=7)


def test_indivisible_lists_the_divisors():
    assert indivisible(3, 8).endswith("does not divide the latent side 8; choose one of 1, 2, 4, 8")


def test_configs_pass_through_omegaconf():
    omegaconf = pytest.importorskip("omegaconf")
    given = omegaconf.OmegaConf.structured(PixArtConfig)
    given.hidden, given.heads = 192, 6
    config = omegaconf.OmegaConf.to_object(given)
    assert config == PixArtConfig(hidden=192, heads=6)
    with pytest.raises(omegaconf.errors.ConfigAttributeError):
        given.hiden = 5
