"""Class-conditioned DiT against the public architecture, its size, its start and its conveniences."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from models.base import Cond
from models.ccdit import CCDiT, CCDiTConfig

TINY = {"hidden": 32, "depth": 2, "heads": 4, "base_size": 8, "num_classes": 7}


def stirred(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, so that no gate or output hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def inputs(batch: int = 3, channels: int = 4, height: int = 8, width: int = 8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64)


def to_diffusers(model: CCDiT) -> dict[str, torch.Tensor]:
    """Names of DiTTransformer2DModel, which keeps a copy of the embedders in every block."""
    ours = model.state_dict()
    theirs = {}

    def put(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            theirs[f"{name}.{kind}"] = ours[f"{source}.{kind}"]

    put("pos_embed.proj", "patch_embed")
    put("proj_out_1", "final.modulation")
    put("proj_out_2", "final.linear")
    for i in range(model.config.depth):
        block, b = f"transformer_blocks.{i}", f"blocks.{i}"
        put(f"{block}.norm1.linear", f"{b}.modulation")
        put(f"{block}.norm1.emb.timestep_embedder.linear_1", "time_mlp.fc1")
        put(f"{block}.norm1.emb.timestep_embedder.linear_2", "time_mlp.fc2")
        theirs[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = ours["class_embedding.weight"]
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", ours[f"{b}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}.attn1.to_{letter}.{kind}"] = part
        put(f"{block}.attn1.to_out.0", f"{b}.attn.out")
        put(f"{block}.ff.net.0.proj", f"{b}.mlp.fc1")
        put(f"{block}.ff.net.2", f"{b}.mlp.fc2")
    return theirs


def reference(config: CCDiTConfig) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.hidden // config.heads,
        in_channels=config.in_channels,
        num_layers=config.depth,
        sample_size=config.base_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    for block in model.transformer_blocks:  # DiT divides the frequencies' exponent by 128; diffusers' port by 127
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_forward_equals_diffusers():
    config = CCDiTConfig(**TINY)
    ours = stirred(config.build()).double().eval()
    theirs = reference(config).double().eval()
    theirs.load_state_dict(to_diffusers(ours), strict=True)
    x, t = inputs()
    label = torch.tensor([0, 3, 7])  # 7 is the null class
    expected = theirs(x, timestep=(1000 * t.float()), class_labels=label).sample
    actual = ours(x, t, Cond(class_id=label))
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_full_size_is_dit_xl_2():
    with torch.device("meta"):
        model = CCDiTConfig().build()
    h, depth = 1152, 28
    block = (3 * h * h + 3 * h) + (h * h + h) + (8 * h * h + 5 * h) + (6 * h * h + 6 * h)
    ends = (16 * h + h) + (256 * h + h + h * h + h) + 1001 * h + (2 * h * h + 2 * h) + (16 * h + 16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == depth * block + ends == 674_816_272
    # The published 675,129,632 also has the learnt variance's half of the head and the fixed position table.
    assert count + (16 * h + 16) + 256 * h == 675_129_632


def test_output_is_zero_at_the_start():
    x, t = inputs()
    assert CCDiTConfig(**TINY).build().double()(x, t, Cond(class_id=torch.tensor([0, 1, 2]))).abs().max() == 0


def test_no_class_is_the_null_class():
    model = stirred(CCDiTConfig(**TINY).build().double())
    x, t = inputs()
    torch.testing.assert_close(model(x, t, Cond()), model(x, t, Cond(class_id=torch.full((3,), 7))))
    assert not torch.allclose(model(x, t, Cond()), model(x, t, Cond(class_id=torch.full((3,), 6))))


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    model = stirred(CCDiTConfig(**TINY, qk_norm=True).build().double())
    x, t = inputs()
    before = model(x, t, Cond())
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] *= 3  # queries and keys
            block.attn.qkv.bias[:64] *= 3
    torch.testing.assert_close(model(x, t, Cond()), before, rtol=1e-4, atol=1e-4)


def test_wide_latents_keep_their_layout():
    """Moving a patch's content moves the change: rows and columns are not exchanged on the way out."""
    model = stirred(CCDiTConfig(**TINY).build().double())
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()  # gates shut: every token speaks for its own patch
    x, t = inputs(height=4, width=12)
    touched = x.clone()
    touched[:, :, 2:4, 8:10] += 1
    changed = (model(touched, t, Cond()) - model(x, t, Cond())).abs().sum(dim=(0, 1)) > 1e-9
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[2:4, 8:10] = True
    assert torch.equal(changed, expected)


def test_residual_stream_stays_float32_under_autocast():
    x, t = (part.float() if part.is_floating_point() else part for part in inputs())
    model = stirred(CCDiTConfig(**TINY, qk_norm=True).build())
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, Cond()).float().square().mean().backward()
    assert {part.dtype for out in seen for part in (out if isinstance(out, tuple) else [out])} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_forward_waits_for_no_value():
    """A meta tensor has none to give: any transfer to the host would raise."""
    x, t = (part.to("meta") for part in inputs(height=4))
    model = CCDiTConfig(**TINY).build().double().to("meta")
    label = torch.zeros(3, dtype=torch.int64, device="meta")
    assert model(x, t, Cond(class_id=label)).shape == x.shape


def test_compiles_in_one_graph():
    model = stirred(CCDiTConfig(**TINY).build())
    x, t = (part.float() for part in inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, Cond()), model(x, t, Cond()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_low_precision(dtype: torch.dtype):
    model = CCDiTConfig(**TINY, qk_norm=True).build().to(dtype)
    x, t = inputs()
    assert model(x.to(dtype), t.float(), Cond()).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "model.hidden=32 is not a multiple of model.heads=5; hidden=30 is"),
        ({"hidden": 30, "heads": 3}, "model.hidden=30 is not a multiple of 4"),
        ({"patch_size": 3}, "model.patch_size=3 does not divide the latent side 8; choose one of 1, 2, 4, 8"),
        ({"depth": 0}, "model.depth=0 is not positive"),
        ({"positions": "middle"}, "model.positions='middle' is not known here; choose one of centre, corner"),
        ({"positions": "crop"}, "model.positions='crop' is not known here"),
    ],
)
def test_config_refuses(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CCDiTConfig(**{**TINY, **change})


def test_forward_refuses_latents_that_do_not_fit():
    model = CCDiTConfig(**TINY).build()
    with pytest.raises(ValueError, match="model.patch_size=2 does not divide the latent side 9; choose one of 1, 3, 9"):
        model(torch.zeros(1, 4, 8, 9), torch.zeros(1), Cond())
    with pytest.raises(ValueError, match="model.in_channels=4 but the latent has 16 channels"):
        model(torch.zeros(1, 16, 8, 8), torch.zeros(1), Cond())
