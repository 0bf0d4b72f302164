"""A network with a LoRA added draws as the public one with the LoRA beside its modules, whatever the file's names."""

import copy
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from inference.lora import apply, parse_lora, read_lora
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.interchange import places, public_twin, to_diffusers
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import TextConfig
from models.unet import UNetConfig
from models.weights import load_denoiser

SMALL: dict[str, Any] = {"in_channels": 8, "base_size": 8, "hidden": 32, "depth": 3, "heads": 4, "text_dim": 12}
UNET: dict[str, Any] = {  # unet_tiny, narrower
    "in_channels": 8, "base_size": 8, "channels": [16, 32], "depths": [1, 1], "heads": [2, 4], "layers": 1,
    "text_dim": 12, "vector_dim": 6 + 6 * 256, "groups": 8, "linear_projection": True,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "unet": lambda: UNetConfig(**UNET),
    "mmdit": lambda: MMDiTConfig(**SMALL, pooled_dim=6, positions="crop", qk_norm=True, dual=1),
    "pixart": lambda: PixArtConfig(**SMALL, positions="corner"),
}
Factors = dict[str, tuple[Tensor, Tensor]]  # module: (A, B)


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name: str) -> Any:
    """A network whose gates and outputs are open, in float64, so that no difference hides."""
    torch.manual_seed(0)
    network = CONFIGS[name]().build().double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(noise(*parameter.shape, seed=i, scale=0.1))
    return network


def draw_factors(module: nn.Module, share: float = 0.6, rank: int = 3, seed: int = 0) -> Factors:
    """A and B of some of the linears and convolutions."""
    drawn, pick = {}, random.Random(seed)
    for i, (name, part) in enumerate(module.named_modules()):
        if isinstance(part, nn.Linear | nn.Conv2d) and pick.random() < share:
            out, width, *kernel = part.weight.shape
            a = noise(rank, width, *kernel, seed=2 * i + seed, scale=0.2)
            drawn[name] = a, noise(out, rank, *([1] * len(kernel)), seed=2 * i + 1 + seed, scale=0.2)
    return drawn


def beside(module: nn.Module, factors: Factors, scale: float) -> nn.Module:
    """The module with B A x added to what each of these answers, as PEFT does while it trains."""

    def hook(a: Tensor, b: Tensor) -> Any:
        def add(part: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            (x,) = args
            if isinstance(part, nn.Conv2d):
                low = F.conv2d(x, a.to(x).reshape(len(a), -1, *part.kernel_size), None, part.stride, part.padding)
                return out + scale * F.conv2d(low, b.to(x).reshape(len(b), -1, 1, 1))
            return out + scale * x @ a.to(x).flatten(1).T @ b.to(x).flatten(1).T

        return add

    for name, pair in factors.items():
        module.get_submodule(name).register_forward_hook(hook(*pair))
    return module


def question(width: int) -> tuple[Tensor, Tensor, Cond]:
    sizes = torch.tensor([[64.0, 48, 0, 16, 64, 64], [32, 32, 8, 0, 32, 40]])
    pooled = noise(2, 128 if width == 192 else 6, seed=3).double()
    cond = Cond(text=noise(2, 5, width, seed=2).double(), pooled=pooled, size_ids=sizes)
    return noise(2, 8, 8, 8, seed=1).double(), torch.tensor([0.3, 0.9], dtype=torch.float64), cond


@torch.no_grad()
def call_public(module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    match type(module).__name__:
        case "UNet2DConditionModel":
            added = {"text_embeds": cond.pooled, "time_ids": cond.size_ids}
            return module(x, 1000 * t, cond.text, added_cond_kwargs=added).sample
        case "PixArtTransformer2DModel":
            none = {"resolution": None, "aspect_ratio": None}
            return module(x, cond.text, 1000 * t, added_cond_kwargs=none).sample
        case _:
            return module(x, cond.text, cond.pooled, 1000 * t).sample


def assert_same_answers(network: Any, public: nn.Module, plain: nn.Module) -> None:
    """To 1e-5 of the answer; and the LoRA matters."""
    asked = question(network.config.text_dim)
    with torch.no_grad():
        ours = network(*asked)
    theirs, before = call_public(public, *asked), call_public(plain, *asked)
    assert (theirs - before).norm() > 0.02 * before.norm()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def write(path: Path, tensors: dict[str, Tensor], told: dict[str, Any] | None = None) -> Path:
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, path, told and {k: str(v) for k, v in told.items()}
    )
    return path


# --- names, each form with the scale that it says ----------------------------------------------------------


def peft(factors: Factors, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any] | None, float]:
    tensors = {f"{prefix}.{name}.lora_A.weight": a for name, (a, _) in factors.items()}
    return tensors | {f"{prefix}.{name}.lora_B.weight": b for name, (_, b) in factors.items()}, None, 1.0


def peft_with_alpha(factors: Factors, prefix: str) -> Any:
    settings = {f"{prefix}.r": 3, f"{prefix}.lora_alpha": 6, "text_encoder.lora_alpha": 99}
    return peft(factors, prefix)[0], {"lora_adapter_metadata": json.dumps(settings)}, 2.0


def peft_rank_stabilised(factors: Factors, prefix: str) -> Any:
    settings = {f"{prefix}.lora_alpha": 2.0, f"{prefix}.use_rslora": True}
    return peft(factors, prefix)[0], {"lora_adapter_metadata": json.dumps(settings)}, 2 / math.sqrt(3)


def peft_alone(factors: Factors, prefix: str) -> Any:
    """As PEFT saves its model, or diffusers' save_lora_adapter: no name of a network."""
    tensors = {name.replace(f"{prefix}.", "base_model.model."): x for name, x in peft(factors, prefix)[0].items()}
    named = {re.sub(r"\.weight$", ".default.weight", name): x for name, x in tensors.items()}
    return named, {"lora_adapter_metadata": json.dumps({"lora_alpha": 1.5})}, 0.5


def old(factors: Factors, prefix: str) -> Any:
    tensors = {f"{prefix}.{name}.lora.down.weight": a for name, (a, _) in factors.items()}
    tensors |= {f"{prefix}.{name}.lora.up.weight": b for name, (_, b) in factors.items()}
    return tensors | {f"{prefix}.{name}.alpha": torch.tensor(1.5) for name in factors}, None, 0.5


def kohya(factors: Factors, _: str) -> Any:
    tensors = {}
    for name, (a, b) in factors.items():
        path = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b, f"{path}.alpha": torch.tensor(6.0)}
    return tensors, {"ss_network_dim": 3}, 2.0


@pytest.mark.parametrize("form", [peft, peft_with_alpha, peft_rank_stabilised, peft_alone, old, kohya])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_network_answers_as_the_public_one_with_the_lora_beside_it(name, form, tmp_path):
    network = build(name)
    plain = to_diffusers(copy.deepcopy(network))
    factors = draw_factors(plain)
    assert len(factors) > 15
    tensors, told, scale = form(factors, "unet" if name == "unet" else "transformer")
    path = write(tmp_path / "a.safetensors", tensors, told)
    public = beside(to_diffusers(copy.deepcopy(network)), factors, 0.7 * scale)
    before = copy.deepcopy(network.state_dict())
    touched = apply(network, None, [(path, 0.7)])
    changed = {f"denoiser.{key}" for key, x in network.state_dict().items() if not torch.equal(x, before[key])}
    assert set(touched) == changed
    assert len(touched) == len(set(touched))
    assert_same_answers(network, public, plain)


def test_linears_and_1x1_convolutions_stand_for_each_other(tmp_path):
    """SD 1's proj_in is a convolution in its public file and a linear here; some files have it the other way."""
    from diffusers import UNet2DConditionModel

    from models.interchange import from_diffusers

    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=12, in_channels=8, out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).double()  # fmt: skip
    network: Any = from_diffusers(copy.deepcopy(plain))
    proj = "down_blocks.0.attentions.0.proj_in"
    linear = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {proj: (noise(2, 16, 1, 1), noise(16, 2, 1, 1, seed=1))}
    factors |= {linear: (noise(2, 32, seed=2), noise(32, 2, seed=3))}
    turned = {
        proj: tuple(x.flatten(1) for x in factors[proj]),
        linear: tuple(x[..., None, None] for x in factors[linear]),
    }
    asked = question(12)
    expected = call_public(beside(plain, factors, 1.5), *asked)  # alpha 6, rank 2, and half of it
    for case in (factors, turned):
        fused = copy.deepcopy(network)
        apply(fused, None, [(write(tmp_path / "a.safetensors", kohya(case, "")[0]), 0.5)])
        with torch.no_grad():
            assert (fused(*asked) - expected).norm() < 1e-5 * expected.norm()


def test_attention_processors_of_old_are_read(tmp_path):
    network = build("unet")
    plain = to_diffusers(copy.deepcopy(network))
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    factors = {name: x for name, x in draw_factors(plain, 1.0).items() if name.startswith(f"{block}.to_")}
    tensors = {}
    for name, (a, b) in factors.items():
        leaf = name.removeprefix(f"{block}.").removesuffix(".0")
        tensors |= {f"unet.{block}.processor.{leaf}_lora.down.weight": a}
        tensors |= {f"unet.{block}.processor.{leaf}_lora.up.weight": b}
    touched = apply(network, None, [(write(tmp_path / "a.safetensors", tensors), 5.0)])
    assert touched == [
        "denoiser.middle.attn.0.blocks.0.attn.qkv.weight",
        "denoiser.middle.attn.0.blocks.0.attn.out.weight",
    ]
    assert_same_answers(network, beside(to_diffusers(build("unet")), factors, 5.0), plain)


# Names in files of kohya's SDXL trainer, which has Stability's own modules, and of SD3's.
ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_1_transformer_blocks_0_attn2_to_k": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_0_attn1_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}  # fmt: skip


def test_stable_diffusions_own_names_are_read(tmp_path):
    network = build("unet")
    plain = to_diffusers(copy.deepcopy(network))
    drawn = draw_factors(plain, 1.0)
    tensors, _, scale = kohya({original: drawn[name] for original, name in ORIGINAL.items()}, "")
    apply(network, None, [(write(tmp_path / "a.safetensors", tensors), 1.0)])
    public = beside(to_diffusers(build("unet")), {name: drawn[name] for name in ORIGINAL.values()}, scale)
    assert_same_answers(network, public, plain)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_sd3s_own_qkv_is_three_of_diffusers(prefix, tmp_path):
    network = build("mmdit")
    plain = to_diffusers(copy.deepcopy(network))
    own = {
        "joint_blocks.1.x_block.attn.qkv": [f"transformer_blocks.1.attn.to_{i}" for i in "qkv"],
        "joint_blocks.0.x_block.attn2.qkv": [f"transformer_blocks.0.attn2.to_{i}" for i in "qkv"],
        "joint_blocks.2.context_block.attn.qkv": [f"transformer_blocks.2.attn.add_{i}_proj" for i in "qkv"],
        "joint_blocks.0.context_block.mlp.fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
    }
    factors, tensors = {}, {}
    for i, (name, parts) in enumerate(own.items()):
        rows = sum(plain.get_submodule(part).weight.shape[0] for part in parts)
        a, b = noise(2, 32, seed=i), noise(rows, 2, seed=9 + i)
        factors |= {part: (a, rows) for part, rows in zip(parts, b.chunk(len(parts)), strict=True)}
        name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    apply(network, None, [(write(tmp_path / "a.safetensors", tensors), 1.0)])
    assert_same_answers(network, beside(to_diffusers(build("mmdit")), factors, 1.0), plain)


def test_a_single_modules_alpha_is_its_own(tmp_path):
    network = build("pixart")
    plain = to_diffusers(copy.deepcopy(network))
    drawn = draw_factors(plain, 1.0)
    first, second, third = (f"transformer_blocks.{i}.ff.net.2" for i in range(3))
    settings = {
        "transformer.lora_alpha": 3,
        "transformer.alpha_pattern": {"^transformer_blocks.0.ff.net.2": 6, "1.ff.net.2": 1.5, "ff.net": 99},
    }
    told = {"lora_adapter_metadata": json.dumps(settings)}
    chosen = {name: drawn[name] for name in (first, second, third)}
    apply(network, None, [(write(tmp_path / "a.safetensors", peft(chosen, "transformer")[0], told), 1.0)])
    public = to_diffusers(build("pixart"))
    for name, scale in ((first, 2.0), (second, 0.5), (third, 1.0)):
        beside(public, {name: drawn[name]}, scale)
    asked = question(12)
    with torch.no_grad():
        assert (network(*asked) - call_public(public, *asked)).norm() < 1e-5 * call_public(public, *asked).norm()


# --- our own names, text encoders, stacking ----------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["denoiser.", "base_model.model."])
def test_a_network_without_a_public_twin_is_named_by_ours(prefix, tmp_path):
    network: Any = load_denoiser("assets/shapes/pipeline/denoiser", "ema").double().eval()
    with pytest.raises(ValueError, match="norms on queries and keys"):
        public_twin(network.config)
    factors = draw_factors(network, 1.0)
    tensors = {f"{prefix}{name}.lora_A.weight": a for name, (a, _) in factors.items()}
    tensors |= {f"{prefix}{name}.lora_B.weight": b for name, (_, b) in factors.items()}
    path, asked = write(tmp_path / "a.safetensors", tensors), question(192)
    asked = (noise(2, 8, 16, 16, seed=1).double(), *asked[1:])
    with torch.no_grad():
        plain, expected = network(*asked), beside(copy.deepcopy(network), factors, 0.05)(*asked)
        touched = apply(network, None, [(path, 0.05)])
        assert len(touched) == len(factors)
        assert (network(*asked) - expected).norm() < 1e-5 * expected.norm()
        assert (plain - expected).norm() > 0.05 * expected.norm()


def test_text_encoders_are_changed_with_the_network(tmp_path):
    text = TextConfig(path="assets/shapes").build()
    expected = TextConfig(path="assets/shapes").build()
    tensors = {}
    for index, (prefix, form) in enumerate((("text_encoder", peft), ("lora_te2", kohya))):
        encoder = expected.encoders[index]
        factors = {name: x for name, x in draw_factors(encoder, 1.0, seed=index).items() if "self_attn" in name}
        named = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in factors.items()}
        made, _, scale = form(named, prefix)
        tensors |= {name.replace("lora_unet_", "lora_te2_"): x for name, x in made.items()}
        beside(encoder, factors, 0.5 * scale)
    with torch.no_grad():
        plain = text.encode(["a red circle"])
        touched = apply(build("unet"), text, [(write(tmp_path / "a.safetensors", tensors), 0.5)])
        assert {name.partition(".")[0] for name in touched} == {"text_encoder", "text_encoder_2"}
        for ours, theirs, before in zip(
            text.encode(["a red circle"]), expected.encode(["a red circle"]), plain, strict=True
        ):
            if ours is not None and ours.is_floating_point():
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
                assert not torch.allclose(ours, before, atol=1e-2)


def test_several_add_up(tmp_path):
    once = {}
    paths = []
    for seed in (0, 1):
        network = build("mmdit")
        before = copy.deepcopy(network.state_dict())
        factors = draw_factors(to_diffusers(copy.deepcopy(network)), 0.5, rank=2 + seed, seed=100 * seed)
        paths.append(write(tmp_path / f"{seed}.safetensors", peft(factors, "transformer")[0]))
        apply(network, None, [(paths[-1], 0.3 + seed)])
        once[seed] = {name: x - before[name] for name, x in network.state_dict().items()}
    network = build("mmdit")
    apply(network, None, [(paths[0], 0.3), (paths[1], 1.3)])
    for name, x in network.state_dict().items():
        torch.testing.assert_close(x, before[name] + once[0][name] + once[1][name], atol=1e-12, rtol=0)
    apply(network, None, [(paths[0], -0.3), (paths[1], -1.3)])
    for name, x in network.state_dict().items():
        torch.testing.assert_close(x, before[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", [peft, kohya])
def test_the_rows_of_a_dora_have_its_norms(form, tmp_path):
    """m (W + s B A) / |W + s B A| by rows, of public tensors, which are parts of ours and convolutions too."""
    network = build("unet")
    public: Any = to_diffusers(copy.deepcopy(network))
    factors = draw_factors(public, 0.7)
    tensors, told, scale = form(factors, "unet")
    for i, (name, (a, b)) in enumerate(factors.items()):
        weight = public.get_submodule(name).weight.data
        norms = noise(len(weight), seed=i).abs() + 0.5
        if form is peft:
            tensors[f"unet.{name}.lora_magnitude_vector"] = norms[None, :, None, None] if weight.ndim > 2 else norms
        else:
            tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = norms.view(-1, *[1] * (weight.ndim - 1))
        sum_ = weight + scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
        whole = sum_.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        turned = norms.double().view(whole.shape) * sum_ / whole
        weight.add_(0.7 * (turned - weight))
    path = write(tmp_path / "a.safetensors", tensors, told)
    plain = to_diffusers(copy.deepcopy(network))
    apply(network, None, [(path, 0.7)])
    assert_same_answers(network, public, plain)


def test_files_are_stacked_and_taken_off_again(tmp_path):
    """Two at once are the sum of what each alone does, DoRA too; without them every bit of the base is back."""
    from inference.pipeline import Pipeline

    pipeline = Pipeline.load("assets/shapes/pipeline", device="cpu")
    network, text = pipeline.denoiser, pipeline.conditioner.text
    assert text is not None
    before = copy.deepcopy(network.state_dict() | text.state_dict())
    for seed, name in enumerate(("style", "figure")):
        tensors = {}
        for part, module in (("denoiser", network), ("text_encoder", text.encoders[0])):
            for layer, (a, b) in draw_factors(module, 0.5, seed=seed).items():
                tensors |= {f"{part}.{layer}.lora_A.weight": a, f"{part}.{layer}.lora_B.weight": b}
                if part == "denoiser" and seed:
                    tensors[f"{part}.{layer}.lora_magnitude_vector"] = noise(len(b), seed=seed).abs() + 1
        write(tmp_path / f"{name}.safetensors", tensors)
    weights = {"style": 0.7, "figure": 0.5}
    alone, null = [], pipeline.conditioner.null().text
    for name, weight in weights.items():
        pipeline.set_loras([(tmp_path / name, weight)])
        now = network.state_dict() | text.state_dict()
        alone.append({key: now[key] - x for key, x in before.items() if x.is_floating_point()})
        assert not torch.equal(pipeline.conditioner.null().text, null)
    pipeline.set_loras([(tmp_path / name, weight) for name, weight in weights.items()])
    now = network.state_dict() | text.state_dict()
    for key, delta in alone[0].items():
        torch.testing.assert_close(now[key] - before[key], delta + alone[1][key], atol=2e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="absent is not a .safetensors file"):
        pipeline.set_loras([(tmp_path / "absent", 1.0)])
    now, again = copy.deepcopy(now), network.state_dict() | text.state_dict()
    assert all(torch.equal(again[key], x) for key, x in now.items())
    pipeline.set_loras([])
    now = network.state_dict() | text.state_dict()
    assert all(torch.equal(now[key], x) for key, x in before.items())
    assert torch.equal(pipeline.conditioner.null().text, null)


def test_a_folder_that_is_no_lora_is_refused():
    with pytest.raises(ValueError, match="pipeline holds a whole network and no LoRA; give a LoRA's file, or a run of"):
        apply(build("unet"), None, [("assets/shapes/pipeline", 1.0)])


def test_a_weight_of_nothing_changes_no_bit(tmp_path):
    network = build("unet").float()
    with torch.no_grad():
        network.conv_in.weight.mul_(-0.0)  # zeros with a sign
    before = copy.deepcopy(network.state_dict())
    path = write(tmp_path / "a.safetensors", peft(draw_factors(to_diffusers(copy.deepcopy(network)), 1.0), "unet")[0])
    apply(network, None, [(path, 0.0)])
    for name, x in network.state_dict().items():
        assert torch.equal(x.view(torch.int32), before[name].view(torch.int32))


def test_in_half_precision_it_is_added_once_and_rounded_once(tmp_path):
    network = build("pixart").bfloat16()
    whole = copy.deepcopy(network).float()
    factors = draw_factors(to_diffusers(copy.deepcopy(network)), 1.0)
    path = write(tmp_path / "a.safetensors", {name: x.half() for name, x in peft(factors, "transformer")[0].items()})
    apply(network, None, [(path, 0.7)])
    apply(whole, None, [(path, 0.7)])
    for ours, exact in zip(network.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, exact.bfloat16())


@pytest.mark.parametrize("name", CONFIGS)
def test_no_name_has_two_meanings(name):
    """Names of ours, of diffusers and of Stable Diffusion are told apart by nothing but themselves."""
    from inference.lora import _key, _weights

    config = CONFIGS[name]()
    with torch.device("meta"):
        ours = _weights(config.build())
    public = public_twin(config).state_dict()
    meant: dict[str, list[str]] = {}
    for key, place in places(config, ours, public).items():
        for each in {key, *place.names}:
            meant.setdefault(_key(each.removesuffix(".weight")), []).append(key)
    assert {key: names for key, names in meant.items() if len(set(names)) > 1} == {}


# --- refusals ----------------------------------------------------------------------------------------------

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"{QUERY}.lora_A.weight": torch.ones(2, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 2)}
ALPHA, PATTERN = "unet.lora_alpha", "unet.alpha_pattern"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(31)}, "to_q has 31 norms, which must be 32 finite numbers"),
        ({f"{QUERY}.dora_scale": torch.ones(1, 32)}, "to_q has norms of columns, and only those of rows are read"),
        ({"lora_unet_mid.dora_scale": torch.ones(32)}, "lora_unet_mid lacks its factor"),
        ({"lora_unet_mid.hada_w1_a": torch.ones(2, 2)}, "is a LoHa, by its tensor lora_unet_mid.hada_w1_a"),
        ({"lora_unet_mid.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        ({"lora_unet_mid.oft_blocks": torch.ones(2, 2)}, "is an OFT"),
        ({"lora_unet_mid.lora_mid.weight": torch.ones(2, 2)}, "is a LoRA in Tucker's form"),
        ({f"{QUERY}.lora_B.bias": torch.ones(32)}, "is a LoRA with biases"),
        ({f"{QUERY}.lora_embedding_A": torch.ones(2, 2)}, "is a LoRA of embeddings"),
        ({"conv_in.weight": torch.ones(2, 2)}, "is something else than a LoRA, by its tensor conv_in.weight"),
        ({f"{QUERY}.lora_A.weight": torch.ones(0, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 0)}, "to_q has rank 0"),
        ({f"{QUERY}.lora_A.weight": torch.full((2, 32), math.nan)}, "to_q has numbers that are not finite; get the"),
        ({f"{QUERY}.lora_A.weight": torch.ones(3, 32)}, r"has factors \(32, 2\) and \(3, 32\), which have no product"),
        ({f"{QUERY}.alpha": torch.tensor(math.inf)}, "to_q has an alpha that is no finite number; get the file again"),
        ({f"{QUERY}.alpha": torch.ones(2)}, "to_q has an alpha that is no finite number"),
        ({"unet.x.lora_A.weight": torch.ones(2, 4)}, "unet.x lacks its factor up"),
        (
            {f"{QUERY}.lora_A.weight": torch.ones(2, 64), f"{QUERY}.lora_B.weight": torch.ones(64, 2)},
            r"does not fit UNet: 1 misshapen: .*to_q \(64, 64\) for \(32, 32\). Likely cause: .* in other sizes",
        ),
        (
            {"unet.blocks.0.lora_A.weight": torch.ones(2, 32), "unet.blocks.0.lora_B.weight": torch.ones(32, 2)},
            "does not fit UNet: 1 unknown: unet.blocks.0. Likely cause: it was made for another model",
        ),
        (
            {"lora_te2_a.lora_down.weight": torch.ones(2, 32), "lora_te2_a.lora_up.weight": torch.ones(32, 2)},
            "1 unknown: lora_te2_a. Likely cause: it changes text encoders which this model has not",
        ),
    ],
)  # fmt: skip
def test_what_is_not_understood_or_does_not_fit_is_refused_whole(tensors, message, tmp_path):
    network = build("unet")
    before = copy.deepcopy(network.state_dict())
    good, bad = write(tmp_path / "good.safetensors", GOOD), write(tmp_path / "bad.safetensors", GOOD | tensors)
    with pytest.raises(ValueError, match=f"bad.safetensors .*{message}"):
        apply(network, None, [(good, 1.0), (bad, 1.0)])
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({ALPHA: "high"}, "alpha that is no finite number"),
        ({ALPHA: [1]}, "alpha that is no finite number"),
        ({PATTERN: {".*to_q": 4}}, r"has an alpha by the regular expression .\*to_q, and only names are read"),
    ],
)
def test_settings_that_mean_nothing_are_refused(told, message, tmp_path):
    path = write(tmp_path / "a.safetensors", GOOD, {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(ValueError, match=message):
        read_lora(path)


def test_files_that_are_none_are_refused(tmp_path):
    network = build("unet")
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="a.safetensors is not a .safetensors file; give a LoRA in that format"):
        apply(network, None, [(path, 1.0)])
    path.write_bytes(b"\x80" * 100)
    with pytest.raises(ValueError, match=r"a.safetensors is damaged \(.*\); get the file again"):
        apply(network, None, [(path, 1.0)])
    for said in ("{", "[" * 10**5):
        write(path, GOOD, {"lora_adapter_metadata": said})
        with pytest.raises(ValueError, match="a.safetensors is damaged"):
            read_lora(path)
    write(path, {})
    with pytest.raises(ValueError, match="a.safetensors holds no LoRA; give a file with tensors such as unet"):
        read_lora(path)
    pickled = tmp_path / "a.bin"
    torch.save(GOOD, pickled)
    with pytest.raises(ValueError, match="a.bin is not a .safetensors file"):
        read_lora(pickled)


def test_public_names_for_a_network_without_a_twin_are_refused(tmp_path):
    network = CCDiTConfig(hidden=32, depth=2, heads=4, base_size=8).build()
    path = write(tmp_path / "a.safetensors", GOOD)
    with pytest.raises(ValueError, match="no public twin .*as_diffusers=false.* has names of ours, such as denoiser"):
        apply(network, None, [(path, 1.0)])


def test_a_tensor_that_is_many_in_public_is_not_changed_in_one(tmp_path):
    network = CCDiTConfig(hidden=32, depth=2, heads=4, base_size=8, as_diffusers=True).build()
    name = "transformer.transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(ValueError, match="does not fit CCDiT: 1 unknown: .*timestep_embedder.linear_2"):
        apply(network, None, [(write(tmp_path / "a.safetensors", factors), 1.0)])


def test_a_file_and_its_weight_are_one_word():
    assert parse_lora("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert parse_lora("b.safetensors:-0.5") == (Path("b.safetensors"), -0.5)
    for text in ("b.safetensors:", "b.safetensors:x", ":1", "b.safetensors:nan"):
        with pytest.raises(ValueError, match="--lora .* does not end in a weight; give FILE.safetensors:0.8"):
            parse_lora(text)
