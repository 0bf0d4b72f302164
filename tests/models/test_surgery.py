"""Surgery: what is carried over is the same function where it claims to be, and every tensor is accounted for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.base import Cond
from models.ccdit import CCDiT, CCDiTConfig
from models.mmdit import MMDiTConfig
from models.modulation import GRID, MODES, block_r2, modulations
from models.pixart import PixArt, PixArtConfig
from models.surgery import gap, null_condition, transfer
from models.unet import UNetConfig

SIZE = {"hidden": 32, "depth": 3, "heads": 4, "base_size": 8, "qk_norm": True}
CCDIT = CCDiTConfig(**SIZE, num_classes=5)
PIXART = PixArtConfig(**SIZE, text_dim=12)
MMDIT = MMDiTConfig(**{"in_channels": 4, **SIZE, "text_dim": 12, "pooled_dim": 6})
UNET = UNetConfig(channels=[16, 32], depths=[0, 1], heads=[2, 4], text_dim=12, vector_dim=262, groups=8)
TIMES = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random float64 weights everywhere, so that no gate or output hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def carried(mode: str = "anchor", anchor: float = 0.5) -> tuple[CCDiT, PixArt]:
    source, target = stirred(CCDIT.build()), PIXART.build().double()
    transfer(source, target, mode, anchor)
    return source, target


def differences(source: nn.Module, target: nn.Module, side: int = 8, times: torch.Tensor = TIMES) -> torch.Tensor:
    """The gap over time: nothing said to the source, something to the target."""
    text = Cond(text=torch.randn(2, 3, 12, dtype=torch.float64), pooled=torch.randn(2, 6, dtype=torch.float64))
    cond = Cond() if isinstance(target, CCDiT) else text
    return gap(source, target, Cond(), cond, times, (2, 4, side, side), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [CCDIT, PIXART, MMDIT, UNET], ids=lambda config: type(config).__name__)
def test_same_class_is_bit_equal(config):
    source, target = stirred(config.build()), config.build().double()
    account = transfer(source, target)
    assert {entry.kind for entry in account.entries} == {"copied"}
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name])
        assert tensor.data_ptr() != target.state_dict()[name].data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_trunk_is_bit_equal(mode: str):
    source, target = carried(mode)
    ours, theirs = target.state_dict(), source.state_dict()
    trunk = [name for name in theirs if name in ours and name != "time_mlp.fc2.bias"]
    assert {name.split(".")[0] for name in trunk} == {"patch_embed", "time_mlp", "blocks", "final"}
    assert len(trunk) == 2 + 3 + SIZE["depth"] * (2 + 2 + 2 + 4) + 2  # qkv, out, two norms and the MLP a block
    assert all(torch.equal(ours[name], theirs[name]) for name in trunk)


def test_null_class_is_folded_into_the_time():
    source, target = carried()
    expected = source.embed_time(TIMES) + source.class_embedding.weight[CCDIT.num_classes]
    torch.testing.assert_close(target.embed_time(TIMES), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("anchor", [0.0, 0.5, 0.93])
def test_anchor_is_exact_in_block_0_always_and_everywhere_at_the_anchor(anchor: float):
    source, target = carried("anchor", anchor)
    at = torch.tensor([anchor])
    for times, names in ((GRID[::50], ["blocks.0"]), (at, [*(f"blocks.{i}" for i in range(SIZE["depth"])), "final"])):
        expected, actual = modulations(source, times), modulations(target, times)
        for name in names:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(target.blocks[0].table, torch.zeros_like(target.blocks[0].table))


@pytest.mark.parametrize("anchor", [0.25, 0.5])
def test_anchor_gives_the_whole_network_at_the_anchor_whatever_the_text(anchor: float):
    at = anchor == TIMES
    for side in (8, 16):  # positions follow at twice the resolution
        gaps = differences(*carried("anchor", anchor), side)
        assert gaps[at] < 1e-12
        assert (gaps[~at] > 1e-3).all()


def test_modulations_are_those_of_the_forward_pass():
    """The closed form is checked against what the blocks really receive."""
    source, target = carried()
    seen: dict[str, torch.Tensor] = {}
    source.blocks[2].modulation.register_forward_hook(lambda _, __, y: seen.update(ccdit=y))
    target.blocks[2].register_forward_pre_hook(
        lambda block, args: seen.update(pixart=(args[1] + block.table).flatten(1))
    )
    differences(source, target, times=torch.tensor([0.3]))
    for net, name in ((source, "ccdit"), (target, "pixart")):
        expected = modulations(net, torch.tensor([0.3]))["blocks.2"].expand(2, -1)
        torch.testing.assert_close(seen[name].expand(2, -1), expected, rtol=1e-12, atol=1e-12)


def test_mean_is_the_least_squares_optimum_over_time():
    """Against the two-way analysis of variance computed from the values, and better on average than any anchor."""
    source, target = carried("mean")
    expected, actual = modulations(source, GRID), modulations(target, GRID)
    s = torch.stack([expected[f"blocks.{i}"] for i in range(SIZE["depth"])])  # block, time, modulation
    optimum = s.mean(0) + (s.mean(1) - s.mean((0, 1)))[:, None]
    m = torch.stack([actual[f"blocks.{i}"] for i in range(SIZE["depth"])])
    torch.testing.assert_close(m, optimum, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual["final"].mean(0), expected["final"].mean(0), rtol=1e-10, atol=1e-10)
    for anchor in (0.25, 0.5, 0.75):
        anchored = modulations(carried("anchor", anchor)[1], GRID)
        error = sum((anchored[f"blocks.{i}"] - s[i]).square().mean() for i in range(SIZE["depth"]))
        assert (m - s).square().mean() * SIZE["depth"] < 0.9 * error


def test_r2_is_one_where_the_decomposition_is_exact():
    r2 = block_r2(*carried("anchor"))
    assert list(r2) == ["blocks.0", "blocks.1", "blocks.2", "final"]
    assert abs(r2["blocks.0"] - 1) < 1e-12
    assert all(r2[f"blocks.{i}"] < 0.99 for i in (1, 2))
    mean = block_r2(*carried("mean"))
    assert sum(list(mean.values())[:3]) > sum(list(r2.values())[:3])
    source = stirred(CCDIT.build())
    with torch.no_grad():  # one linear and constants: what PixArt can be
        for block in source.blocks:
            block.modulation.weight.copy_(source.blocks[0].modulation.weight)
    for mode in MODES:
        target = PIXART.build().double()
        transfer(source, target, mode)
        assert all(abs(value - 1) < 1e-12 for name, value in block_r2(source, target).items() if name != "final")


@pytest.mark.parametrize(
    "target",
    [
        CCDIT,
        PIXART,
        MMDIT,
        replace(PIXART, patch_size=4),
        replace(PIXART, in_channels=16),
        replace(CCDIT, num_classes=9),
        replace(CCDIT, depth=5),
        replace(CCDIT, depth=2),
        replace(PIXART, hidden=64, heads=8, depth=4),
        replace(MMDIT, hidden=64, heads=8, depth=4, dual=2),
    ],
    ids=["CCDiT", "PixArt", "MMDiT", "patch", "channels", "classes", "deeper", "shallower", "wider", "all"],
)
@pytest.mark.parametrize("mode", MODES)
def test_every_tensor_is_accounted_for(target, mode: str):
    source, model = stirred(CCDIT.build()), target.build().double()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    account = transfer(source, model, mode)
    ours = [entry for entry in account.entries if entry.kind != "dropped"]
    assert [(entry.name, entry.parameters) for entry in ours] == [(k, v.numel()) for k, v in model.state_dict().items()]
    assert account.names("initialised") == [entry.name for entry in ours if not entry.source and entry.kind != "zeroed"]
    for name in account.names("initialised"):
        assert torch.equal(model.state_dict()[name], fresh[name])
    for name in account.names("copied"):
        assert account_source(account, name)[0] in source.state_dict()
    used = {name for entry in ours for name in entry.source}
    assert used.isdisjoint(account.names("dropped"))
    assert used | set(account.names("dropped")) == source.state_dict().keys()
    listed = sum(int(line.split()[1]) for line in account.summary()[1:] if " tensors " in line)
    assert listed == len(account.table()) == len(account.entries)


def account_source(account, name: str) -> list[str]:
    return next(entry.source for entry in account.entries if entry.name == name and entry.kind != "dropped")


def test_cross_attention_starts_silent_and_can_learn():
    _, target = carried()
    assert all(not block.cross_attn.out.weight.any() and block.cross_attn.q.weight.any() for block in target.blocks)
    text = torch.randn(2, 3, 12, dtype=torch.float64)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    target(x, TIMES[:2], Cond(text=text)).square().mean().backward()
    assert all(block.cross_attn.out.weight.grad.any() for block in target.blocks)


@pytest.mark.parametrize("side", [8, 16])
def test_positions_anchor_themselves_at_other_resolutions(side: int):
    """With no picture in them, tokens are positions: centred on the coordinates that the source has learnt."""
    _, target = carried()
    with torch.no_grad():
        for parameter in target.patch_embed.parameters():
            parameter.zero_()
    place = target.tokens(torch.zeros(1, 4, side, side, dtype=torch.float64))[0].view(side // 2, side // 2, -1)
    angle = torch.atan2(place[0, :, 0], place[0, :, 8])  # of the lowest k, whose frequency is 1
    expected = (torch.arange(side // 2, dtype=torch.float64) + 0.5) * (8 / side) - 0.5
    torch.testing.assert_close(angle, torch.remainder(expected + torch.pi, 2 * torch.pi) - torch.pi)


def test_larger_patches_see_a_larger_picture_as_before():
    """Patches of 4 on a picture enlarged twofold by repetition: the same tokens, the same output enlarged."""
    source, target = stirred(CCDIT.build()), replace(PIXART, patch_size=4, base_size=16).build().double()
    account = transfer(source, target)
    assert account.names("interpolated") == ["patch_embed.weight", "final.linear.weight", "final.linear.bias"]

    def enlarged(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.full((2,), 0.5)
    with torch.no_grad():
        torch.testing.assert_close(target.tokens(enlarged(x)), source.tokens(x), rtol=1e-10, atol=1e-10)
        actual = target(enlarged(x), t, Cond(text=torch.randn(2, 3, 12, dtype=torch.float64)))
        torch.testing.assert_close(actual, enlarged(source(x, t, Cond())), rtol=1e-10, atol=1e-10)
    assert differences(source, target)[2] < 1e-12  # so does the gap
    back = replace(CCDIT, patch_size=2).build().double()
    middle = replace(CCDIT, patch_size=4, base_size=16).build().double()
    transfer(source, middle)
    transfer(middle, back)
    assert differences(source, back).max() < 1e-12  # and smaller again: nothing was lost


def test_image_stream_of_mmdit_is_the_ccdit_but_for_the_share_of_the_text():
    """Joint attention dilutes: with the text's keys pushed out of the softmax the networks are equal at all times."""
    source, target = stirred(CCDIT.build()), MMDIT.build().double()
    account = transfer(source, target)
    assert any("dilute" in line for line in account.summary())
    assert (differences(source, target) > 1e-4).all()
    text = Cond(
        text=torch.randn(2, 3, 12, dtype=torch.float64),
        text_mask=torch.zeros(2, 3, dtype=torch.bool),
        pooled=torch.randn(2, 6, dtype=torch.float64),
    )
    assert gap(source, target, Cond(), text, TIMES, (2, 4, 8, 8)).max() < 1e-12


def test_summary_names_parts_by_what_became_of_them():
    lines = transfer(CCDIT.build(), PIXART.build()).summary()
    kinds = {line.split()[0]: line.split("parameters  ")[1].split(", ") for line in lines if " tensors " in line}
    assert kinds["zeroed"] == ["blocks.*.cross_attn.out"]
    assert kinds["folded"] == ["time_mlp.fc2.bias", "blocks.*.table", "final.table"]
    assert kinds["initialised"] == ["text_mlp.fc1", "text_mlp.fc2", "blocks.*.cross_attn.q", "blocks.*.cross_attn.kv"]
    assert {"patch_embed", "time_mlp.fc2.weight", "blocks.*.attn", "blocks.*.mlp"} <= set(kinds["copied"])
    deeper = transfer(CCDIT.build(), replace(CCDIT, depth=5).build()).summary()
    assert any(line.endswith("parameters  blocks.{1,3}.attn.out, blocks.{1,3}.mlp.fc2") for line in deeper)


def test_low_precision_and_float_sources_fit_any_target():
    source, target = stirred(CCDIT.build()).bfloat16(), PIXART.build()
    transfer(source, target)
    assert all(tensor.dtype is torch.float32 for tensor in target.state_dict().values())
    conds = null_condition(CCDIT, 2), null_condition(PIXART, 2)
    assert gap(source.float(), target, *conds, torch.tensor([0.5]), (2, 4, 8, 8)) < 0.05  # the time MLP ran in bf16


def test_notes_name_what_counts_do_not_say():
    notes = " ".join(transfer(CCDIT.build(), replace(PIXART, base_size=16, positions="corner").build()).notes)
    assert "positions will count 0..7, not the 0..3 learnt; model.base_size=8 keeps them" in notes
    assert "positions centre -> corner" in notes
    assert "null row" in notes


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (CCDIT, replace(CCDIT, hidden=48), {}, "model.hidden=48 where the source CCDiT has hidden=32.*model.heads=4"),
        (CCDIT, replace(PIXART, hidden=64), {}, "multiplied by one whole number.*model.hidden=64 model.heads=8"),
        (CCDIT, replace(PIXART, heads=2), {}, "model.heads=2 .* heads=4"),  # all shapes fit, but for the norms
        (CCDIT, replace(CCDIT, hidden=16), {}, "model.hidden=16 where .* give model.hidden=32 model.heads=4"),
        (PIXART, replace(PIXART, qk_norm=False, mlp_ratio=2), {}, "mlp_ratio=2, model.qk_norm=False.*no rule carries"),
        (UNET, replace(UNET, channels=[32, 32]), {}, r"model.channels=\[32,64\] model.heads=\[4,8\]"),
        (
            UNET,
            replace(UNET, groups=4),
            {},
            "model.groups=4 where the source UNet has groups=8; no rule.*model.groups=8",
        ),
        (
            UNET,
            UNetConfig(channels=[16], depths=[0], heads=[2], text_dim=12, vector_dim=262, groups=8),
            {},
            r"model.channels=\[16\], model.heads=\[2\] where the source UNet has channels=\[16, 32\]",
        ),
        (replace(MMDIT, dual=2), replace(MMDIT, depth=5, dual=2), {}, "model.dual=2 where .* becomes number 2.*dual=3"),
        (UNET, PIXART, {}, "no transfer exists from UNet to PixArt"),
        (PIXART, CCDIT, {}, "no transfer exists from PixArt to CCDiT.*init.from=null"),
        (PIXART, MMDIT, {}, "no transfer exists from PixArt to MMDiT"),
        (CCDIT, PIXART, {"mode": "median"}, "mode='median'.*anchor, mean"),
        (CCDIT, PIXART, {"anchor": 500}, "anchor=500 is not a noise time.*0.5"),
    ],
)
def test_errors_name_both_sides_and_leave_the_target_alone(source, target, options, message: str):
    model = target.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        transfer(source.build(), model, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_networks_of_other_latents_cannot_be_compared():
    with pytest.raises(ValueError, match="in_channels differ.*4, 16"):
        differences(CCDIT.build(), replace(CCDIT, in_channels=16).build())
