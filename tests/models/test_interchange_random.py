"""Networks of drawn options against their public twins in float32: outputs, gradients, and every bit both ways."""

import random
import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from models.base import Cond
from models.interchange import from_diffusers, to_diffusers

Options = dict[str, Any]


def draw_unet(pick: Any) -> Options:
    levels, groups = pick([1, 2, 3]), pick([2, 4])
    attentive = [pick([True, False]) for _ in range(levels)]
    pooled = pick([0, 5])
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": pooled + 6 * 256,
    }
    return {
        "in_channels": (latent := pick([3, 4])),
        "out_channels": latent,
        "block_out_channels": [4 * groups * pick([1, 2]) for _ in range(levels)],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attentive],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attentive)],
        "transformer_layers_per_block": [pick([1, 2]) for _ in range(levels)],
        "attention_head_dim": [pick([1, 2, 4]) for _ in range(levels)],
        "layers_per_block": pick([1, 2]),
        "norm_num_groups": groups,
        "cross_attention_dim": pick([6, 10]),
        "use_linear_projection": pick([True, False]),
        **(vector if pooled else {}),
    }


def draw_transformer(pick: Any) -> Options:
    channels = pick([3, 4])
    return {
        "num_layers": pick([1, 2, 4]),
        "num_attention_heads": pick([1, 2, 3]),
        "attention_head_dim": pick([8, 12, 20]),
        "in_channels": channels,
        "out_channels": channels * pick([1, 2]),
        "patch_size": pick([1, 2, 3]),
        "sample_size": pick([6, 12]),
    }


def draw_dit(pick: Any) -> Options:
    return draw_transformer(pick) | {"num_embeds_ada_norm": pick([3, 7]), "norm_elementwise_affine": False}


def draw_pixart(pick: Any) -> Options:
    sizes = draw_transformer(pick)
    return sizes | {
        "cross_attention_dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "caption_channels": pick([6, 10]),
        "interpolation_scale": pick([1, 2]),
        "sample_size": pick([12, 24]),
        "use_additional_conditions": False,
    }


def draw_sd3(pick: Any) -> Options:
    sizes = draw_transformer(pick)
    return sizes | {
        "joint_attention_dim": pick([6, 10]),
        "caption_projection_dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "pooled_projection_dim": pick([3, 5]),
        "pos_embed_max_size": pick([14, 17]),
        "qk_norm": pick([None, "rms_norm"]),
        "dual_attention_layers": list(range(pick(range(sizes["num_layers"] + 1)))),
    }


# how options are drawn, and which of them is the width of the text states
DRAWS = {
    "UNet2DConditionModel": (draw_unet, "cross_attention_dim"),
    "DiTTransformer2DModel": (draw_dit, None),
    "PixArtTransformer2DModel": (draw_pixart, "caption_channels"),
    "SD3Transformer2DModel": (draw_sd3, "joint_attention_dim"),
}
SEEDS = range(752, 756)  # between them they draw nearly every value above


def stir(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights of a size that keeps activations near 1, so that float32 has its seven digits everywhere."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3))
        if isinstance(module, diffusers.DiTTransformer2DModel):  # its public weights hold one embedder in every block
            first, *others = module.transformer_blocks
            for block in others:
                block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return module.eval()


def draw_inputs(name: str, options: Options, pick: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
    """Two noisy latents, mostly not square, and everything that a network could be conditioned on."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    patch = options.get("patch_size", 1)
    rows, columns = patch * pick([2, 5, 8]), patch * pick([3, 6, 7])
    if name == "DiTTransformer2DModel":
        columns = rows  # it takes no others
    text = randn(2, pick([4, 7]), options.get(DRAWS[name][1], 1))
    lengths = torch.tensor([text.shape[1], pick([1, 3])])
    cond = Cond(
        text=text.requires_grad_(),
        text_mask=torch.arange(text.shape[1]) < lengths[:, None] if pick([True, False]) else None,
        pooled=randn(2, options.get("pooled_projection_dim", 5)).requires_grad_(),
        class_id=torch.tensor([pick(range(3)), options.get("num_embeds_ada_norm", 3)]),
        size_ids=torch.tensor([[1024.0, 768, 0, 16, 1024, 1024], [512, 512, 8, 0, 512, 640]]),
    )
    x = randn(2, options["in_channels"], rows, columns).requires_grad_()
    return x, torch.rand(2, generator=generator), cond


def call_public(module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    mask = {"encoder_attention_mask": cond.text_mask}
    match type(module).__name__:
        case "UNet2DConditionModel":
            added = {"text_embeds": cond.pooled, "time_ids": cond.size_ids}
            out = module(x, 1000 * t, cond.text, **mask, added_cond_kwargs=added).sample
        case "DiTTransformer2DModel":
            out = module(x, 1000 * t, cond.class_id).sample
        case "PixArtTransformer2DModel":
            added = {"resolution": None, "aspect_ratio": None}
            out = module(x, cond.text, 1000 * t, **mask, added_cond_kwargs=added).sample
        case _ if cond.text_mask is None:
            out = module(x, cond.text, cond.pooled, 1000 * t).sample
        case _:  # it knows no mask: each row alone, with its own tokens
            rows = zip(x, cond.text, cond.text_mask, cond.pooled, 1000 * t, strict=True)
            out = torch.cat(
                [module(x[None], text[None, mask], p[None], t[None]).sample for x, text, mask, p, t in rows]
            )
    return out[:, : x.shape[1]]


def gradients(module: nn.Module, out: Tensor, leaves: dict[str, Tensor], direction: Tensor) -> dict[str, Tensor]:
    """Of <out, direction>: by the leaves, returned, and by the parameters, left where they belong."""
    for tensor in (*leaves.values(), *module.parameters()):
        tensor.grad = None
    (out * direction).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def as_public(ours: nn.Module) -> dict[str, Tensor]:
    """Gradients of ours under the public names."""
    copy = ours.config.build()
    tensors = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    copy.load_state_dict(tensors)
    return to_diffusers(copy).state_dict()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, floor: float | Tensor = 0.0) -> None:
    gap, size = (actual - expected).norm(), expected.norm()
    assert gap <= tolerance * size + floor, f"{what}: off by {gap:.1e}, its size is {size:.1e}"


def assert_twins(ours: nn.Module, theirs: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> None:
    """The same outputs to 1e-5 and the same gradients, by inputs and weights, to 1e-4."""
    actual, expected = ours(x, t, cond), call_public(theirs, x, t, cond)
    assert_close(actual, expected, 1e-5, "output")
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    leaves = {"x": x, "text": cond.text, "pooled": cond.pooled}
    by_input, expected_by_input = (gradients(*pair, leaves, direction) for pair in ((ours, actual), (theirs, expected)))
    for name in leaves:
        assert_close(by_input[name], expected_by_input[name], 1e-4, name)
    by_weight, expected_by_weight = as_public(ours), {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:  # DiT's copies of one embedder share its gradient
            name = re.sub(r"\.\d+(\.norm1\.emb)", r".0\1", name)
            expected_by_weight[name] = expected_by_weight.get(name, 0) + parameter.grad
    # a softmax does not see a bias of all its keys, whose gradient is rounding and nothing else
    floor = 1e-7 * torch.cat([gradient.flatten() for gradient in expected_by_weight.values()]).norm()
    for name, gradient in expected_by_weight.items():
        assert_close(by_weight[name], gradient, 1e-4, name, floor)


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    known = b.state_dict()
    assert a.state_dict().keys() == known.keys()
    for name, tensor in a.state_dict().items():
        if name == "pos_embed.pos_embed":  # not learnt: computed on both sides
            assert torch.allclose(tensor, known[name], atol=1e-6)
        else:
            assert torch.equal(tensor, known[name]), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_a_drawn_network_is_its_twin(name, seed):
    pick, generator = random.Random(f"{name} {seed}").choice, torch.Generator().manual_seed(seed)
    options = DRAWS[name][0](pick)
    inputs = draw_inputs(name, options, pick, generator)
    theirs = stir(getattr(diffusers, name)(**options), generator)
    ours = from_diffusers(theirs)
    assert_twins(ours, theirs, *inputs)
    assert_same_bits(theirs, to_diffusers(ours))
    ours = stir(ours.config.build(), generator)
    theirs = to_diffusers(ours)
    assert_twins(ours, theirs, *inputs)
    assert_same_bits(ours, from_diffusers(theirs))
    assert from_diffusers(theirs).config == ours.config


@pytest.mark.parametrize("name", DRAWS)
def test_norms_have_the_public_epsilon(name):
    """Next to nothing enters any norm, so that eps is much of the variance and of every gradient behind it."""
    pick, generator = random.Random(f"{name} {SEEDS[0]}").choice, torch.Generator().manual_seed(0)
    options = DRAWS[name][0](pick)
    side = options.get("patch_size", 2)
    options |= {"sample_size": side} | {key: 1 for key in options if key == "interpolation_scale"}
    x, t, cond = draw_inputs(name, options, pick, generator)
    x = x[:, :, :side, :side].detach().requires_grad_()  # one token, or four cells
    theirs = stir(getattr(diffusers, name)(**options), generator)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter *= 1 if re.search(r"norm[^.]*\.weight$", key) else 0.01
        if hasattr(theirs, "pos_embed"):  # the bias takes the position off
            theirs.pos_embed.proj.bias -= theirs.pos_embed(torch.zeros_like(x[:1]))[0, 0]
    assert_twins(from_diffusers(theirs), theirs, x, t, cond)
