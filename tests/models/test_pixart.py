"""PixArt against the public architecture, its size, its start and its handling of text."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from models.base import Cond
from models.ccdit import CCDiTConfig
from models.interchange import to_diffusers
from models.pixart import PixArtConfig

TINY = {"hidden": 32, "depth": 2, "heads": 4, "base_size": 8, "text_dim": 12}


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


def test_checkpointing_changes_no_gradient():
    x, t, text, mask = inputs()
    model = stirred(PixArtConfig(**TINY).build().double())
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x, t, Cond(text=text, text_mask=mask)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_residual_stream_stays_float32_under_autocast():
    x, t, text, mask = (part.float() if part.is_floating_point() else part for part in inputs())
    model = stirred(PixArtConfig(**TINY, qk_norm=True).build())
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, Cond(text=text, text_mask=mask)).float().square().mean().backward()
    assert {part.dtype for out in seen for part in (out if isinstance(out, tuple) else [out])} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_forward_waits_for_no_value():
    """A meta tensor has none to give: any transfer to the host would raise."""
    x, t, text, mask = (part.to("meta") for part in inputs())
    model = PixArtConfig(**TINY).build().double().to("meta")
    assert model(x, t, Cond(text=text, text_mask=mask)).shape == x.shape


def test_compiles_in_one_graph():
    model = stirred(PixArtConfig(**TINY).build())
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
