"""Stable Diffusion's own files, tensor by tensor: what diffusers' and transformers' tensors are called in them.

    unet          down_blocks.1.attentions.0.proj_in.weight  =  input_blocks.4.1.proj_in.weight
    transformer   transformer_blocks.3.attn.to_k.weight      =  joint_blocks.3.x_block.attn.qkv.weight[1/3]

Rules, regular expressions and what they become, applied in order, turn a public name into the original one. Marks at
its end say what part of the original the tensor is: `[1/3]` the second of three parts along the first axis, `~` the
halves in the other order, `^` the transpose, `:` a 1x1 convolution for a linear.

Names and shapes also tell most of a module's config. What they do not tell (heads, groups, the latents' scale) is
known of the public sizes, and has to be given for others.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
Options = dict[str, Any]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a pipeline in a single file.

    prefix: of its tensors' names. public: its class. rules(config): see above. layout: how its original names begin.
    told(tensors): the options that original names and shapes tell. known: of public sizes, by which of those one knows
    them, and the options that are not told. implied(tensors): what files may leave out.
    """

    prefix: str
    public: str
    rules: Callable[[Any], Rules]
    layout: str
    told: Callable[[Tensors], Options]
    known: tuple[tuple[Options, Options], ...]
    implied: Callable[[Tensors], dict[str, Tensor]] = lambda _: {}


def to_original(public: Tensors, rules: Rules) -> dict[str, Tensor]:
    """Public tensors by their original names."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in public.items():
        place = _place(name, rules)
        found.setdefault(place.name, {})[place.index] = place.write(tensor)
    return {name: _joined([parts[index] for index in sorted(parts)]) for name, parts in found.items()}


def from_original(original: Tensors, like: Tensors, rules: Rules) -> dict[str, Tensor]:
    """Tensors named and shaped as the public ones in `like`; those in `original` must be all there, and fit."""
    places = {name: _place(name, rules) for name in like}
    return {name: place.read(original[place.name], like[name].shape) for name, place in places.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a public tensor stands among the original ones."""

    name: str
    index: int
    count: int
    mark: str

    def write(self, tensor: Tensor) -> Tensor:
        """The public tensor as it stands in the original."""
        if self.mark == ":":
            return tensor[..., None, None]
        return self._turned(tensor)

    def read(self, original: Tensor, shape: torch.Size) -> Tensor:
        """The public tensor, of its own memory where the original is more than that."""
        tensor = original.chunk(self.count)[self.index].clone() if self.count > 1 else original
        return self._turned(tensor).reshape(shape)

    def _turned(self, tensor: Tensor) -> Tensor:
        if self.mark == "~":
            return torch.cat(tensor.chunk(2)[::-1])
        return tensor.T.contiguous() if self.mark == "^" else tensor


def _place(public: str, rules: Rules) -> Place:
    name = public
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    found = re.fullmatch(r"(.*?)(?:\[(\d)/(\d)\])?([~^:]?)", name)
    assert found
    return Place(found[1], int(found[2] or 0), int(found[3] or 1), found[4])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _count(tensors: Tensors, pattern: str) -> int:
    """How many of the things that names number from 0: `layers.(\\d+)`."""
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def _third(match: re.Match[str]) -> str:
    """Which third of qkv."""
    return f"[{'qkv'.index(match['qkv'])}/3]"


# --- the UNet ----------------------------------------------------------------------------------------------


def _unet_rules(config: Any) -> Rules:
    each = config.layers_per_block + 1  # of a level, counting its down- or upsampling

    def sampled(up: re.Match[str]) -> str:  # the last member of a level's last block, after its attention if it has one
        level = int(up[1])
        return f"output_blocks.{level * each + each - 1}.{1 + ('CrossAttn' in config.up_block_types[level])}.conv."

    return (
        (r"(resnets\.\d+)\.norm1\.", r"\1.in_layers.0."),
        (r"(resnets\.\d+)\.conv1\.", r"\1.in_layers.2."),
        (r"(resnets\.\d+)\.time_emb_proj\.", r"\1.emb_layers.1."),
        (r"(resnets\.\d+)\.norm2\.", r"\1.out_layers.0."),
        (r"(resnets\.\d+)\.conv2\.", r"\1.out_layers.3."),
        (r"(resnets\.\d+)\.conv_shortcut\.", r"\1.skip_connection."),
        (r"\.resnets\.(\d+)\.", r".\1.0."),
        (r"\.attentions\.(\d+)\.", r".\1.1."),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.", rf"down_blocks.\1.{each - 1}.0.op."),
        (r"^down_blocks\.(\d+)\.(\d+)\.", lambda at: f"input_blocks.{1 + int(at[1]) * each + int(at[2])}."),
        (r"^mid_block\.(\d+)\.(\d)\.", lambda at: f"middle_block.{2 * int(at[1]) + int(at[2])}."),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.", sampled),
        (r"^up_blocks\.(\d+)\.(\d+)\.", lambda at: f"output_blocks.{int(at[1]) * each + int(at[2])}."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
    )


def _unet_told(tensors: Tensors) -> Options:
    samplings = [
        n for n in range(_count(tensors, r"input_blocks\.(\d+)\.")) if f"input_blocks.{n}.0.op.weight" in tensors
    ]
    each = samplings[0] if samplings else _count(tensors, r"input_blocks\.(\d+)\.")
    firsts = [1 + each * level for level in range(len(samplings) + 1)]
    depths = [_count(tensors, rf"input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\.") for n in firsts]
    middle = "middle_block.1."
    vector = tensors.get("label_emb.0.0.weight")
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": None if vector is None else vector.shape[1],
    }
    return {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "block_out_channels": [tensors[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in firsts],
        "layers_per_block": each - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [
            *(depth or 1 for depth in depths[:-1]), _count(tensors, rf"{middle}transformer_blocks\.(\d+)\.")
        ],
        "cross_attention_dim": tensors[f"{middle}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": tensors[f"{middle}proj_in.weight"].ndim == 2,
        **({} if vector is None else sizes),
    }  # fmt: skip


def _unet(sign: Options, untold: Options) -> Part:
    layout = r"(in|out)put_blocks\.\d+\.\d\.|middle_block\.\d\.|(time_embed|out)\.\d\.|label_emb\.0\.\d\."
    return Part("model.diffusion_model.", "UNet2DConditionModel", _unet_rules, layout, _unet_told, ((sign, untold),))


# --- SD3's transformer -------------------------------------------------------------------------------------


def _sd3_rules(config: Any) -> Rules:
    last = config.num_layers - 1
    return (
        (rf"^(transformer_blocks\.{last}\.norm1_context\.linear\..*)", r"\1~"),  # scale before shift in the public one
        (r"^transformer_blocks\.", "joint_blocks."),
        (r"\.attn(2?)\.to_(?P<qkv>[qkv])\.(\w+)", lambda at: f".x_block.attn{at[1]}.qkv.{at[3]}{_third(at)}"),
        (r"\.attn\.add_(?P<qkv>[qkv])_proj\.(\w+)", lambda at: f".context_block.attn.qkv.{at[2]}{_third(at)}"),
        (r"\.attn(2?)\.to_out\.0\.", r".x_block.attn\1.proj."),
        (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
        (r"\.attn(2?)\.norm_([qk])\.", r".x_block.attn\1.ln_\2."),
        (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
        (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
        (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
        (r"\.ff\.", ".x_block.mlp."),
        (r"\.ff_context\.", ".context_block.mlp."),
        (r"\.mlp\.net\.0\.proj\.", ".mlp.fc1."),
        (r"\.mlp\.net\.2\.", ".mlp.fc2."),
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        (r"^time_text_embed\.timestep_embedder\.", "t_embedder."),
        (r"^time_text_embed\.text_embedder\.", "y_embedder."),
        (r"_embedder\.linear_1\.", "_embedder.mlp.0."),
        (r"_embedder\.linear_2\.", "_embedder.mlp.2."),
        (r"^norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1~"),
        (r"^proj_out\.", "final_layer.linear."),
    )


def _sd3_told(tensors: Tensors) -> Options:
    hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    duals = {int(found[1]) for name in tensors if (found := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name))}
    return {
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "patch_size": patch,
        "num_layers": _count(tensors, r"joint_blocks\.(\d+)\."),
        "caption_projection_dim": hidden,
        "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(tensors["pos_embed"].shape[1]),
        "dual_attention_layers": sorted(duals),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in tensors else None,
    }


def _sd3() -> Part:
    layout = (
        r"joint_blocks\.\d+\.(x|context)_block\.(attn2?|mlp|adaLN_modulation)\."
        r"|([xyt]|context)_embedder\.|final_layer\.|pos_embed$"
    )
    known = tuple(
        (
            {"caption_projection_dim": 64 * heads},
            {"num_attention_heads": heads, "attention_head_dim": 64, "sample_size": 128},
        )
        for heads in (24, 38)
    )
    return Part("model.diffusion_model.", "SD3Transformer2DModel", _sd3_rules, layout, _sd3_told, known)


# --- the autoencoder ---------------------------------------------------------------------------------------


def _vae_rules(config: Any) -> Rules:
    last = len(config.up_block_types) - 1  # the original counts a decoder's levels from the pixels
    return (
        (r"\.mid_block\.resnets\.(\d)\.", lambda at: f".mid.block_{int(at[1]) + 1}."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
        (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
        (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
        (r"(\.attn_1\.(?:[qkv]|proj_out)\.weight)$", r"\1:"),
        (r"\.up_blocks\.(\d+)\.", lambda at: f".up.{last - int(at[1])}."),
        (r"\.down_blocks\.(\d+)\.", r".down.\1."),
        (r"\.(up|down)samplers\.0\.", r".\1sample."),
        (r"\.resnets\.", ".block."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )


def _vae_told(tensors: Tensors) -> Options:
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [tensors[f"encoder.down.{n}.block.0.conv1.weight"].shape[0] for n in range(levels)],
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _vae(latent_channels: int, **untold: Any) -> Part:
    layout = (
        r"(en|de)coder\.(conv_in|conv_out|norm_out|mid\.(block_[12]|attn_1)|(down|up)\.\d+\.(block\.\d+|(down|up)sample))\."
        r"|(post_)?quant_conv\."
    )
    known = ({"block_out_channels": [128, 256, 512, 512], "latent_channels": latent_channels}, untold)
    return Part("first_stage_model.", "AutoencoderKL", _vae_rules, layout, _vae_told, (known,))


# --- text encoders -----------------------------------------------------------------------------------------

_PROJECTED = "CLIPTextModelWithProjection"
_CLIP_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # of the public configs: pooled at the largest id
_KNOWN_CLIPS = (
    ({"hidden_size": 768}, {"num_attention_heads": 12, "hidden_act": "quick_gelu", **_CLIP_IDS}),
    ({"hidden_size": 1280}, {"num_attention_heads": 20, "hidden_act": "gelu", **_CLIP_IDS}),
)
_CLIP_RULES: Rules = ((r"^(?!text_model\.|text_projection\.)", "text_model."),)  # CLIPTextModel may go without
_OPEN_CLIP_RULES: Rules = (
    *_CLIP_RULES,
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.(?P<qkv>[qkv])_proj\.(\w+)", lambda at: f".attn.in_proj_{at[2]}{_third(at)}"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_projection\.weight$", "text_projection^"),
)


def _clip_told(tensors: Tensors) -> Options:
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "num_hidden_layers": _count(tensors, r"text_model\.encoder\.layers\.(\d+)\."),
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
    }


def _open_clip_told(tensors: Tensors) -> Options:
    vocabulary, width = tensors["token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "num_hidden_layers": _count(tensors, r"transformer\.resblocks\.(\d+)\."),
        "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "projection_dim": tensors["text_projection"].shape[1],
    }


def _clip(
    prefix: str, public: str = "CLIPTextModel", implied: Callable[[Tensors], dict[str, Tensor]] = lambda _: {}
) -> Part:
    layout = r"text_model\.(embeddings|encoder|final_layer_norm)\.|text_projection\."
    return Part(prefix, public, lambda _: _CLIP_RULES, layout, _clip_told, _KNOWN_CLIPS, implied)


def _no_projection(tensors: Tensors) -> dict[str, Tensor]:
    """SD3's CLIP-L is not projected: its public files have no projection, and who reads them takes the identity."""
    like = tensors.get("text_model.final_layer_norm.weight")
    if like is None:
        return {}
    return {"text_projection.weight": torch.eye(len(like), dtype=like.dtype, device=like.device)}


def _open_clip(prefix: str) -> Part:
    layout = r"transformer\.resblocks\.|(token|positional)_embedding|ln_final\.|text_projection$"
    return Part(prefix, _PROJECTED, lambda _: _OPEN_CLIP_RULES, layout, _open_clip_told, _KNOWN_CLIPS)


def _t5_told(tensors: Tensors) -> Options:
    attention, feed = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = tensors[f"{attention}relative_attention_bias.weight"].shape
    vocabulary, width = tensors["shared.weight"].shape
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_layers": _count(tensors, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "d_kv": tensors[f"{attention}q.weight"].shape[0] // heads,
        "d_ff": tensors[f"{feed}wo.weight"].shape[1],
        "relative_attention_num_buckets": buckets,
    }


def _t5_twice(tensors: Tensors) -> dict[str, Tensor]:
    """The embeddings by their second name."""
    return {"encoder.embed_tokens.weight": tensors["shared.weight"]} if "shared.weight" in tensors else {}


def _t5(prefix: str) -> Part:
    known = ({"d_model": 4096}, {"feed_forward_proj": "gated-gelu"})
    return Part(prefix, "T5EncoderModel", lambda _: (), r"shared\.|encoder\.", _t5_told, (known,), _t5_twice)


# --- files -------------------------------------------------------------------------------------------------

_XL_VAE = _vae(4, scaling_factor=0.13025, sample_size=1024)
FAMILIES: dict[str, dict[str, Part]] = {
    "sd1": {
        "unet": _unet(
            {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
            {"attention_head_dim": 8, "sample_size": 64},
        ),
        "vae": _vae(4, scaling_factor=0.18215, sample_size=512),
        "text_encoder": _clip("cond_stage_model.transformer."),
    },
    "sdxl": {
        "unet": _unet(
            {"block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048},
            {"attention_head_dim": [5, 10, 20], "sample_size": 128},
        ),
        "vae": _XL_VAE,
        "text_encoder": _clip("conditioner.embedders.0.transformer."),
        "text_encoder_2": _open_clip("conditioner.embedders.1.model."),
    },
    "sdxl-refiner": {
        "unet": _unet(
            {"block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280},
            {"attention_head_dim": [6, 12, 24, 24], "sample_size": 128},
        ),
        "vae": _XL_VAE,
        "text_encoder_2": _open_clip("conditioner.embedders.0.model."),
    },
    "sd3": {
        "transformer": _sd3(),
        "vae": _vae(16, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024),
        "text_encoder": _clip("text_encoders.clip_l.transformer.", _PROJECTED, _no_projection),
        "text_encoder_2": _clip("text_encoders.clip_g.transformer.", _PROJECTED),
        "text_encoder_3": _t5("text_encoders.t5xxl.transformer."),
    },
}
