"""Networks against their public twins: the same outputs and gradients, every tensor accounted for, both ways."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from configs.schema import compose
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.interchange import from_diffusers, to_diffusers
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.unet import UNetConfig

UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 12}
SMALL = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}
DIT = SMALL | {"num_layers": 2, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False}
PIXART = SMALL | {
    "num_layers": 2,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "use_additional_conditions": False,
}
SD3 = SMALL | {
    "num_layers": 3,
    "out_channels": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 12,
}
CASES = {
    "sd15": ("UNet2DConditionModel", UNET | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    }),
    "sdxl": ("UNet2DConditionModel", UNET | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "layers_per_block": 3,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 + 6 * 256,
    }),
    "dit": ("DiTTransformer2DModel", DIT),
    "dit with variance": ("DiTTransformer2DModel", DIT | {"out_channels": 8}),
    "pixart": ("PixArtTransformer2DModel", PIXART | {"out_channels": 4}),
    "pixart 512": ("PixArtTransformer2DModel", PIXART | {"out_channels": 8, "interpolation_scale": 2}),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5": ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
}  # fmt: skip


def public(case: str) -> nn.Module:
    """A public network with loud random weights, so that no gate or output hides a difference."""
    name, options = CASES[case]
    module = getattr(diffusers, name)(**options).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if name == "DiTTransformer2DModel":  # its public weights hold the same embedder in every block
            first, *others = module.transformer_blocks
            for block in others:
                block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return module


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cond = Cond(
        text=randn(2, 5, 12),
        text_mask=torch.tensor([[True] * 5, [True] * 2 + [False] * 3]),
        pooled=randn(2, 6),
        class_id=torch.tensor([3, 10]),
        size_ids=torch.tensor([[1024.0, 768, 0, 16, 1024, 1024], [512, 512, 8, 0, 512, 640]]),
    )
    return randn(2, 4, height, width), torch.tensor([0.3, 0.937], dtype=torch.float64), cond


def call_public(module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    match type(module).__name__:
        case "UNet2DConditionModel":
            added = {"text_embeds": cond.pooled, "time_ids": cond.size_ids}
            mask = cond.text_mask
            out = module(x, 1000 * t, cond.text, encoder_attention_mask=mask, added_cond_kwargs=added)
        case "DiTTransformer2DModel":
            out = module(x, 1000 * t, cond.class_id)
        case "PixArtTransformer2DModel":
            added = {"resolution": None, "aspect_ratio": None}
            mask = cond.text_mask
            out = module(x, cond.text, 1000 * t, encoder_attention_mask=mask, added_cond_kwargs=added)
        case _:
            out = module(x, cond.text, cond.pooled, 1000 * t)
    return out.sample[:, : x.shape[1]]


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (case, size)
        for case in CASES
        for size in ((8, 8), (12, 20), (6, 10))
        if size == (8, 8) or not case.startswith("dit")  # the public DiT takes squares only
    ],
)
def test_outputs_and_gradients_are_the_twins(case, size):
    theirs = public(case)
    ours = from_diffusers(theirs)
    x, t, cond = inputs(*size)
    if "sd3" in case:
        cond.text_mask = None  # the public class has none
    a, b = call_public(theirs, x, t, cond), ours(x, t, cond)
    assert b.shape == x.shape
    assert (a - b).norm() < 1e-6 * a.norm()  # float64, but for the sinusoids
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(2), dtype=a.dtype)
    for module, out in ((theirs, a), (ours, b)):
        module.zero_grad()
        (out * direction).sum().backward()
    gradients = to_diffusers(with_gradients_as_weights(ours)).state_dict()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and "emb." not in name:  # copies of one embedder share its gradient
            gap = (parameter.grad - gradients[name]).norm()
            assert gap <= 1e-5 * parameter.grad.norm() + 1e-12, name


def with_gradients_as_weights(model: nn.Module) -> nn.Module:
    copy = model.config.build().double()
    tensors = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    copy.load_state_dict(tensors)
    return copy


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_keeps_every_bit(case, tmp_path):
    theirs: Any = public(case)
    made: Any = to_diffusers(from_diffusers(theirs))
    made.save_pretrained(tmp_path)
    back = type(theirs).from_pretrained(tmp_path, torch_dtype=torch.float64, low_cpu_mem_usage=False).eval()
    question = inputs(8, 8)
    for module in (made, back):
        gap = call_public(module, *question) - call_public(theirs, *question)
        assert gap.norm() < 1e-6 * call_public(theirs, *question).norm()
    known = back.state_dict()
    assert known.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        if name == "pos_embed.pos_embed":  # not learnt: computed on both sides
            assert torch.allclose(known[name].double(), tensor, atol=1e-6)
        else:
            assert torch.equal(known[name], tensor), name
    again = from_diffusers(back)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), from_diffusers(theirs).parameters(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        CCDiTConfig(as_diffusers=True, variance=True),
        PixArtConfig(variance=True),
        MMDiTConfig(positions="crop"),
        MMDiTConfig(positions="crop", hidden=2432, depth=38, heads=38, qk_norm=True),  # SD3.5-large
        MMDiTConfig(positions="crop", qk_norm=True, dual=13, table_size=384),  # SD3.5-medium
    ],
    ids=lambda config: type(config).__name__,
)
def test_full_sizes_have_exactly_the_public_tensors(config):
    with torch.device("meta"):
        to_diffusers(config.build())  # strict in names and shapes, both ways


# the options in the public files that differ from the class's defaults
PUBLIC_UNETS = {
    "unet_sd15": (859_520_964, {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}),
    "unet_sdxl": (
        2_567_463_684,
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "upcast_attention": None,
            "use_linear_projection": True,
        },
    ),
    "unet_sdxl_refiner": (
        2_259_526_660,
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [6, 12, 24, 24],
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "projection_class_embeddings_input_dim": 2560,
            "sample_size": 128,
            "transformer_layers_per_block": 4,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "upcast_attention": None,
            "use_linear_projection": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLIC_UNETS)
def test_our_configs_are_the_public_unets(name):
    count, options = PUBLIC_UNETS[name]
    with torch.device("meta"):
        ours: Any = from_diffusers(diffusers.UNet2DConditionModel(**options))
        to_diffusers(ours)
    assert ours.config == compose("train", ["name=meta", f"model={name}"]).model
    assert sum(parameter.numel() for parameter in ours.parameters()) == count


def test_what_no_network_here_has_is_refused_by_name():
    sizes = CASES["sd15"][1]
    with pytest.raises(ValueError, match="has class_embed_type=timestep, which no network here has"):
        from_diffusers(diffusers.UNet2DConditionModel(**sizes, class_embed_type="timestep"))
    with pytest.raises(ValueError, match="has use_additional_conditions=True"):
        from_diffusers(diffusers.PixArtTransformer2DModel(**(PIXART | {"use_additional_conditions": True})))
    with pytest.raises(ValueError, match="AutoencoderKL has no twin here; give one of UNet2DConditionModel"):
        from_diffusers(diffusers.AutoencoderKL())
    uneven = diffusers.DiTTransformer2DModel(**DIT)
    with pytest.raises(ValueError, match="differs from transformer_blocks.0.*one for all blocks"):
        from_diffusers(uneven)
    moved = diffusers.SD3Transformer2DModel(**SD3)
    moved.pos_embed.pos_embed += 0.1
    with pytest.raises(ValueError, match="pos_embed is not the sines and cosines"):
        from_diffusers(moved)


def test_what_no_public_class_has_is_refused_by_name():
    small = {"hidden": 32, "depth": 2, "heads": 4, "base_size": 8}
    with pytest.raises(ValueError, match="as_diffusers=false"):
        to_diffusers(CCDiTConfig(**small).build())
    with pytest.raises(ValueError, match="no norms on queries and keys"):
        to_diffusers(PixArtConfig(**small, qk_norm=True).build())
    with pytest.raises(ValueError, match="mlp_ratio=2 but the public classes have 4"):
        to_diffusers(MMDiTConfig(**small, mlp_ratio=2).build())
    unet = UNetConfig(channels=[16, 32], depths=[1, 2], heads=[2, 2], groups=8, text_dim=12)
    with pytest.raises(ValueError, match="ends in another depth"):
        to_diffusers(unet.build())
    to_diffusers(replace(unet, middle_depth=2).build())
