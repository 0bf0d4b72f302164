"""MMDiT against the public architecture, its size, its start and its handling of text."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from models.base import Cond
from models.interchange import to_diffusers
from models.mmdit import MMDiTConfig

TINY = {"in_channels": 4, "hidden": 32, "depth": 3, "heads": 4, "base_size": 8, "text_dim": 12, "pooled_dim": 6}


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, so that no gate or output hides a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def inputs(height: int = 8, width: int = 8):
    """Latents, times, captions of 5, 2 and 3 tokens padded to 5, and pooled vectors."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, height, width, generator=generator, dtype=torch.float64)
    t = torch.rand(3, generator=generator, dtype=torch.float64)
    text = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    pooled = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    return x, t, text, mask, pooled


def reference(config: MMDiTConfig) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=config.base_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.hidden // config.heads,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_dim,
        caption_projection_dim=config.hidden,
        pooled_projection_dim=config.pooled_dim,
        out_channels=config.in_channels,
        pos_embed_max_size=config.table_size,
        qk_norm="rms_norm" if config.qk_norm else None,
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_equals_diffusers(qk_norm: bool):
    """On a wide latent, with SD3's positions cropped from a larger table."""
    config = MMDiTConfig(**TINY, qk_norm=qk_norm, positions="crop", table_size=12)
    ours = stirred(config.build()).double().eval()
    theirs = reference(config).eval()
    tensors = to_diffusers(ours).state_dict()
    del tensors["pos_embed.pos_embed"]  # theirs is what ours is compared with
    missing, extra = theirs.load_state_dict(tensors, strict=False)
    assert (missing, extra) == (["pos_embed.pos_embed"], [])
    theirs.double()
    x, t, text, _, pooled = inputs(height=8, width=12)
    expected = theirs(x, text, pooled, timestep=1000 * t.float()).sample
    actual = ours(x, t, Cond(text=text, pooled=pooled))
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_full_size_is_sd3_medium():
    config = MMDiTConfig()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in config.build().parameters())
        public = sum(parameter.numel() for parameter in reference(config).parameters())
    h, depth = 1536, 24
    stream = (6 * h * h + 6 * h) + (3 * h * h + 3 * h) + (h * h + h) + (8 * h * h + 5 * h)
    not_in_last = (4 * h * h + 4 * h) + (h * h + h) + (8 * h * h + 5 * h)
    ends = (64 * h + h) + (256 * h + h + h * h + h) + (2048 * h + h + h * h + h) + (4096 * h + h)
    ends += (2 * h * h + 2 * h) + (64 * h + 64)
    assert count == 2 * depth * stream - not_in_last + ends == 2_028_328_000 == public
    assert abs(count / 2.03e9 - 1) < 0.01  # the published figure


def test_masked_text_changes_nothing():
    model = stirred(MMDiTConfig(**TINY).build().double())
    x, t, text, mask, pooled = inputs()
    clean = model(x, t, Cond(text=text, text_mask=mask, pooled=pooled))
    for rubbish in (7.0, float("nan")):
        spoilt = text.masked_fill(~mask[..., None], rubbish)
        assert torch.equal(model(x, t, Cond(text=spoilt, text_mask=mask, pooled=pooled)), clean)
    shorter = model(x[1:2], t[1:2], Cond(text=text[1:2, :2], pooled=pooled[1:2]))
    torch.testing.assert_close(clean[1:2], shorter)


def test_row_without_any_token_equals_no_text():
    """All of the softmax then falls on the picture, and nothing becomes NaN on the way back."""
    model = stirred(MMDiTConfig(**TINY).build())
    x, t, text, mask, pooled = (part.float() if part.is_floating_point() else part for part in inputs())
    mask[1] = False
    out = model(x, t, Cond(text=text, text_mask=mask, pooled=pooled))
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    without = model(x[1:2], t[1:2], Cond(text=text[1:2, :0], pooled=pooled[1:2]))
    torch.testing.assert_close(out[1:2], without, rtol=1e-4, atol=1e-5)


def test_output_is_zero_at_the_start():
    x, t, text, mask, pooled = inputs()
    model = MMDiTConfig(**TINY).build().double()
    assert model(x, t, Cond(text=text, text_mask=mask, pooled=pooled)).abs().max() == 0


def test_residual_stream_stays_float32_under_autocast():
    x, t, text, mask, pooled = (part.float() if part.is_floating_point() else part for part in inputs())
    model = stirred(MMDiTConfig(**TINY, qk_norm=True).build())
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, Cond(text=text, text_mask=mask, pooled=pooled)).float().square().mean().backward()
    assert {part.dtype for out in seen for part in (out if isinstance(out, tuple) else [out])} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_forward_waits_for_no_value():
    """A meta tensor has none to give: any transfer to the host would raise."""
    x, t, text, mask, pooled = (part.to("meta") for part in inputs())
    model = MMDiTConfig(**TINY).build().double().to("meta")
    assert model(x, t, Cond(text=text, text_mask=mask, pooled=pooled)).shape == x.shape


def test_compiles_in_one_graph():
    model = stirred(MMDiTConfig(**TINY, qk_norm=True).build())
    x, t, text, mask, pooled = (part.float() if part.is_floating_point() else part for part in inputs())
    cond = Cond(text=text, text_mask=mask, pooled=pooled)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, cond), model(x, t, cond), rtol=1e-4, atol=1e-4)


def test_refuses_missing_conditions():
    model = MMDiTConfig(**TINY).build()
    x, t, text = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 5, 12)
    with pytest.raises(ValueError, match="cond.text is None"):
        model(x, t, Cond(pooled=torch.zeros(1, 6)))
    with pytest.raises(ValueError, match="model.pooled_dim=6 but cond.pooled is None"):
        model(x, t, Cond(text=text))
    with pytest.raises(ValueError, match="model.pooled_dim=6 but cond.pooled is 8 wide"):
        model(x, t, Cond(text=text, pooled=torch.zeros(1, 8)))
