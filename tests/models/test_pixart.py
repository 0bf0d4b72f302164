"""PixArt against the public architecture, its size, its start, its handling of text and its windows of keys."""

from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import compose
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.interchange import from_diffusers, to_diffusers
from models.pixart import Block, PixArtConfig
from models.surgery import transfer

TINY = {"hidden": 32, "depth": 2, "heads": 4, "base_size": 8, "text_dim": 12}
each_window = pytest.mark.parametrize("window", [1, 2])


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, so that no gate or output hides a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def inputs():
    """Latents, times, and captions of 5, 2 and 3 tokens padded to 5."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.rand(3, generator=generator, dtype=torch.float64)
    text = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    return x, t, text, mask


def reference(config: PixArtConfig) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.hidden // config.heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        cross_attention_dim=config.hidden,
        sample_size=config.base_size,
        patch_size=config.patch_size,
        caption_channels=config.text_dim,
        use_additional_conditions=False,
    )


def test_forward_equals_diffusers():
    config = PixArtConfig(**TINY)
    ours = stirred(config.build()).double().eval()
    theirs = reference(config).double().eval()
    theirs.load_state_dict(to_diffusers(ours).state_dict(), strict=True)
    x, t, text, mask = inputs()
    expected = theirs(x, text, timestep=1000 * t.float(), encoder_attention_mask=mask).sample
    actual = ours(x, t, Cond(text=text, text_mask=mask))
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_full_size_is_pixart_xl_2():
    config = PixArtConfig()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in config.build().parameters())
        public = sum(parameter.numel() for parameter in reference(config).parameters())
    h, depth = 1152, 28
    block = 6 * h + (3 * h * h + 3 * h) + (h * h + h) + (4 * h * h + 4 * h) + (8 * h * h + 5 * h)
    ends = (16 * h + h) + (256 * h + h + h * h + h) + (6 * h * h + 6 * h) + (4096 * h + h + h * h + h)
    assert count == depth * block + ends + 2 * h + (16 * h + 16) == 610_837_648 == public
    assert count + (16 * h + 16) == 610_856_096  # the published 611M has the learnt variance's half of the head


def test_masked_text_changes_nothing():
    model = stirred(PixArtConfig(**TINY).build().double())
    x, t, text, mask = inputs()
    clean = model(x, t, Cond(text=text, text_mask=mask))
    for rubbish in (7.0, float("nan"), float("inf")):
        spoilt = text.masked_fill(~mask[..., None], rubbish)
        assert torch.equal(model(x, t, Cond(text=spoilt, text_mask=mask)), clean)
    shorter = model(x[1:2], t[1:2], Cond(text=text[1:2, :2]))
    torch.testing.assert_close(clean[1:2], shorter)
    whole = model(x, t, Cond(text=text, text_mask=torch.ones_like(mask)))
    torch.testing.assert_close(whole, model(x, t, Cond(text=text)))


def test_row_without_any_token_is_finite_in_both_directions():
    model = stirred(PixArtConfig(**TINY).build())
    x, t, text, mask = inputs()
    mask[1] = False
    text = text.float().requires_grad_()
    out = model(x.float(), t.float(), Cond(text=text, text_mask=mask))
    out.square().mean().backward()
    assert out.isfinite().all()
    assert text.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_text_contributes_nothing_at_the_start():
    """The output linear starts at zero too, so look at the tokens behind it."""
    model = PixArtConfig(**TINY).build().double()
    x, t, text, mask = inputs()
    assert model(x, t, Cond(text=text)).abs().max() == 0
    torch.nn.init.normal_(model.final.linear.weight)
    assert torch.equal(model(x, t, Cond(text=text)), model(x, t, Cond(text=-2 * text, text_mask=mask)))


def test_tables_start_as_in_the_paper():
    model = PixArtConfig(hidden=512, depth=6, heads=8).build()
    tables = torch.cat([block.table.flatten() for block in model.blocks])
    assert abs(tables.std().item() * 512**0.5 - 1) < 0.03


def test_trunk_shares_names_and_shapes_with_ccdit():
    """What surgery copies by name."""
    shared = {key: value for key, value in TINY.items() if key != "text_dim"}
    pixart = PixArtConfig(**TINY, qk_norm=True).build().state_dict()
    ccdit = CCDiTConfig(**shared, qk_norm=True).build().state_dict()
    own_to_ccdit = {key for key in ccdit if "modulation" in key or key.startswith("class_embedding")}
    own_to_pixart = {key for key in pixart if key.startswith(("modulation", "text_mlp")) or "cross_attn" in key}
    own_to_pixart |= {key for key in pixart if key.endswith("table")}
    assert ccdit.keys() - own_to_ccdit == pixart.keys() - own_to_pixart
    assert all(ccdit[key].shape == pixart[key].shape for key in ccdit.keys() - own_to_ccdit)


@each_window
def test_residual_stream_stays_float32_under_autocast(window):
    x, t, text, mask = (part.float() if part.is_floating_point() else part for part in inputs())
    model = stirred(PixArtConfig(**TINY, qk_norm=True, kv_compression=window).build())
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, Cond(text=text, text_mask=mask)).float().square().mean().backward()
    assert {part.dtype for out in seen for part in (out if isinstance(out, tuple) else [out])} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@each_window
def test_forward_waits_for_no_value(window):
    """A meta tensor has none to give: any transfer to the host would raise."""
    x, t, text, mask = (part.to("meta") for part in inputs())
    model = PixArtConfig(**TINY, kv_compression=window).build().double().to("meta")
    assert model(x, t, Cond(text=text, text_mask=mask)).shape == x.shape


@each_window
def test_compiles_in_one_graph(window):
    model = stirred(PixArtConfig(**TINY, kv_compression=window).build())
    x, t, text, mask = inputs()
    cond = Cond(text=text.float(), text_mask=mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x.float(), t.float(), cond)
    torch.testing.assert_close(compiled(x.float(), t.float(), cond), expected, rtol=1e-4, atol=1e-4)


def test_refuses_missing_and_foreign_text():
    model = PixArtConfig(**TINY).build()
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    with pytest.raises(ValueError, match="cond.text is None but this model is conditioned on text"):
        model(x, t, Cond(class_id=torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="model.text_dim=12 but the text states are 16 wide"):
        model(x, t, Cond(text=torch.zeros(1, 5, 16)))


def compressing(window: int, **options) -> Block:
    """A block whose every weight is random, also those of its windows."""
    return stirred(PixArtConfig(**TINY, **options, kv_compression=window).build().double()).blocks[0]


def by_hand(block: Block, x: Tensor, rows: int, columns: int) -> Tensor:
    """PixArt-Sigma's attention, window by window and head by head."""
    weight, bias, norm = block.compress.conv.weight[:, 0], block.compress.conv.bias, block.compress.norm
    r, heads = weight.shape[-1], block.attn.heads
    q, k, v = (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
    if block.attn.q_norm is not None:
        q, k = (
            torch.cat(
                [h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.weight for h in y.chunk(heads, -1)], -1
            )
            for y, part in ((q, block.attn.q_norm), (k, block.attn.k_norm))
        )

    def compressed(y: Tensor) -> Tensor:
        tokens = []
        for i in range(rows // r):
            for j in range(columns // r):
                cells = [(a, b, (i * r + a) * columns + j * r + b) for a in range(r) for b in range(r)]
                token = sum((weight[:, a, b] * y[:, at] for a, b, at in cells), bias)
                centred = token - token.mean(-1, keepdim=True)
                tokens.append(centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
        return torch.stack(tokens, dim=1) * norm.weight + norm.bias

    split = zip(q.chunk(heads, -1), compressed(k).chunk(heads, -1), compressed(v).chunk(heads, -1), strict=True)
    made = [(a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in split]
    return torch.cat(made, -1) @ block.attn.out.weight.T + block.attn.out.bias


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("window", "grid"), [(2, (4, 6)), (2, (5, 3)), (3, (6, 4))])
def test_windows_of_keys_and_values_are_those_of_the_public_code(window, grid, qk_norm):
    block = compressing(window, qk_norm=qk_norm)
    x = torch.randn(2, grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(block.attend(x, grid), by_hand(block, x, *grid))


def test_windows_start_as_a_mean_and_lose_nothing_of_what_is_constant_in_them():
    """Equal keys in a window share the weight that one has, so only the norm is left to tell the two apart."""
    block = PixArtConfig(**TINY, kv_compression=2).build().double().blocks[0]
    assert (block.compress.conv.weight == 1 / 4).all()
    assert (block.compress.conv.bias == 0).all()
    x = torch.randn(2, 32, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).mT  # 6 x 4 tokens
    block.compress.norm = torch.nn.Identity()
    torch.testing.assert_close(block.attend(x, (6, 4)), block.attn(x))


def test_only_the_chosen_blocks_have_windows():
    config = PixArtConfig(**TINY | {"depth": 4}, kv_compression=2, kv_blocks=[1, 2])
    assert [block.compress is not None for block in config.build().blocks] == [False, True, True, False]
    plain, unused = (
        replace(config, kv_compression=1, kv_blocks=blocks).build().state_dict().keys() for blocks in ([], [1, 2])
    )
    assert (
        plain
        == unused
        == config.build().state_dict().keys()
        - {
            f"blocks.{i}.compress.{name}"
            for i in (1, 2)
            for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
        }
    )


def test_a_network_without_windows_lends_all_it_has():
    config = PixArtConfig(**TINY)
    source, target = config.build(), replace(config, kv_compression=2).build()
    fresh = {name for name in target.state_dict() if ".compress." in name}
    start = {name: target.state_dict()[name].clone() for name in fresh}
    account = transfer(source, target)
    assert set(account.names("initialised")) == fresh
    expected = source.state_dict() | start
    assert all(torch.equal(tensor, expected[name]) for name, tensor in target.state_dict().items())


def test_every_weight_of_a_window_learns():
    model = stirred(PixArtConfig(**TINY, kv_compression=2).build().double())
    x, t, text, mask = inputs()
    model(x, t, Cond(text=text, text_mask=mask)).square().mean().backward()
    assert all((parameter.grad != 0).all() for name, parameter in model.named_parameters() if "compress" in name)


def test_windows_of_two_quarter_the_cost_of_attention():
    counts, n, hidden = [], 1024, 32
    for window in (1, 2):
        block = PixArtConfig(**TINY, kv_compression=window).build().to("meta").blocks[0]
        with FlopCounterMode(display=False) as counter:
            block.attend(torch.empty(1, n, hidden, device="meta"), (32, 32))
        counts.append(counter.get_total_flops() - 2 * n * 4 * hidden**2)  # without the linears
    assert counts == [4 * n * n * hidden, n * n * hidden + 2 * 2 * n * hidden]  # the last: two convolutions


def test_full_size_is_pixart_sigma():
    config = compose("train", ["name=meta", "model=pixart_sigma_xl2"]).model
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in config.build().parameters())
        public = PixArtTransformer2DModel(  # the options of its 1024 px in which it differs from the class's defaults
            sample_size=128, interpolation_scale=2, caption_channels=4096, use_additional_conditions=False
        )
        uncompressed = from_diffusers(public).config
    assert count == 610_837_648 + 14 * (4 * 1152 + 1152 + 2 * 1152) == 610_950_544
    assert replace(config, kv_compression=1, kv_blocks=[], variance=True) == uncompressed


def test_refuses_windows_that_cannot_be():
    with pytest.raises(ValueError, match="model.kv_compression=0 is not positive"):
        PixArtConfig(**TINY, kv_compression=0)
    for blocks in ([1], [1, 2], [1, 0], [-1, 0], [0, 1, 1]):
        with pytest.raises(ValueError, match=r"model.kv_blocks=.* the blocks 0 to 1; \[1, 1\] is, and \[\] means all"):
            PixArtConfig(**TINY, kv_compression=2, kv_blocks=blocks)
    model = PixArtConfig(**TINY, kv_compression=2).build()
    with pytest.raises(ValueError, match="model.kv_compression=2 but the picture is 1 x 4 tokens, not one window"):
        model(torch.zeros(1, 4, 2, 8), torch.zeros(1), Cond(text=torch.zeros(1, 5, 12)))
    with pytest.raises(ValueError, match="model.kv_compression=2 but PixArtTransformer2DModel attends to every token"):
        to_diffusers(model)
