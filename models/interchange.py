"""Networks to and from their public twins in diffusers, tensor by tensor.

    blocks.3.attn.qkv.weight  =  transformer_blocks.3.attn1.to_{q,k,v}.weight

Rules, regular expressions and what they become, applied in order, turn a name of ours into the public one, in which
`{a,b}` stands for tensors that follow each other along the first axis of ours, `*` for the same tensor in every block,
and a `~` at the end for halves in the other order. 1x1 convolutions are read as linears. Every tensor of either side is
accounted for, and every option of the public config must be one that our network has.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from models.base import ModelConfig
from models.ccdit import CCDiTConfig
from models.embed import position_table
from models.layers import TransformerConfig
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.unet import SIZE_DIM, UNetConfig
from models.weights import first_names, load_strict, unwrap

Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Twin:
    """A class of ours and a public one.

    rules(config): see above. to_public(config): options of the public class. to_ours(options): our config; it may
    rewrite the options, all of which it is given, the way `to_public` writes them. constants(config): public buffers
    that ours computes.
    """

    config: type[ModelConfig]
    public: str
    rules: Callable[[Any], Rules]
    to_public: Callable[[Any], dict[str, Any]]
    to_ours: Callable[[dict[str, Any]], ModelConfig]
    constants: Callable[[Any], dict[str, Tensor]] = lambda _: {}


def from_diffusers(module: nn.Module) -> nn.Module:
    """Our network of the same function: at time t it is `module` at timestep 1000 t. They may share memory."""
    name = type(module).__name__
    twin = next((twin for twin in TWINS if twin.public == name), None)
    if twin is None:
        raise ValueError(f"{name} has no twin here; give one of {', '.join(twin.public for twin in TWINS)}")
    config = _read_config(module, twin)
    with torch.device("meta"):
        denoiser = config.build()
    public, rules, taken, tensors = module.state_dict(), twin.rules(config), set(), {}
    for ours, like in denoiser.state_dict().items():
        place = _place(ours, rules, public)
        taken.update(place.names)
        if all(part in public for part in place.names):
            tensors[ours] = place.read(public, like.shape)
    for constant, tensor in twin.constants(config).items():
        taken.add(constant)
        if constant in public and not torch.allclose(public[constant].float(), tensor, atol=2e-3):  # half precision
            raise ValueError(f"{name}.{constant} is not the sines and cosines it was made from; nothing here learns it")
    if extra := sorted(public.keys() - taken):
        raise ValueError(f"{name} has {len(extra)} tensors with no place in ours: {first_names(extra)}")
    load_strict(denoiser, tensors, source=name, assign=True)
    return denoiser.train(module.training)


def to_diffusers(denoiser: nn.Module) -> nn.Module:
    """The public module of the same function. They may share memory."""
    inner: Any = unwrap(denoiser)
    twin, module, tensors = _twin(inner.config), public_twin(inner.config), {}
    public = module.state_dict()
    weights = {name: tensor for name, tensor in inner.state_dict().items() if not name.startswith("projector.")}
    for ours, place in places(inner.config, weights, public).items():
        tensor = weights[ours]
        if missing := [part for part in place.names if part not in public]:
            raise ValueError(f"{twin.public} has no {first_names(missing)} for our {ours}")
        tensors |= place.write(tensor, {part: public[part].shape for part in place.names})
    for name, constant in twin.constants(inner.config).items():
        owner, _, leaf = name.rpartition(".")
        constant = constant.to(next(inner.parameters()))
        module.get_submodule(owner).register_buffer(leaf, constant, persistent=name in public)
        tensors |= {name: constant} if name in public else {}
    module.load_state_dict(tensors, assign=True)
    return module.train(inner.training)


def public_twin(config: ModelConfig) -> Any:
    """The public module of a network of ours, of its class and sizes, without memory; ValueError if there is none."""
    import diffusers

    twin = _twin(config)
    with torch.device("meta"):
        return getattr(diffusers, twin.public)(**twin.to_public(config))


def places(config: ModelConfig, ours: Iterable[str], public: dict[str, Tensor]) -> dict[str, "Place"]:
    """Where tensors of ours stand among the public ones: `Place.read` is linear, so it carries sums over too."""
    rules = _twin(config).rules(config)
    return {name: _place(name, rules, public) for name in ours}


def _twin(config: ModelConfig) -> Twin:
    twin = next((twin for twin in TWINS if twin.config is type(config)), None)
    if twin is None:
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{name} has no public twin; reparameterize it to one that has")
    return twin


@dataclass(slots=True)
class Place:
    """Where a tensor of ours stands among the public ones."""

    names: list[str]
    tied: bool
    swapped: bool

    def read(self, public: dict[str, Tensor], shape: torch.Size) -> Tensor:
        """Our tensor, or one of another shape where the numbers do not fit: a strict loader will say so."""
        parts = [public[name] for name in self.names]
        if self.tied:
            for name, part in zip(self.names, parts, strict=True):
                if not torch.equal(part, parts[0]):
                    raise ValueError(f"{name} differs from {self.names[0]}; a network here has one for all blocks")
            parts = parts[:1]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor
        return _halves_swapped(tensor) if self.swapped else tensor

    def write(self, tensor: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """The public tensors that ours is made of."""
        tensor = _halves_swapped(tensor) if self.swapped else tensor
        rows = [shape[0] for shape in shapes.values()]
        parts = [tensor.clone() for _ in rows] if self.tied else tensor.split(rows)  # files refuse shared memory
        return {name: part.reshape(shapes[name]) for name, part in zip(self.names, parts, strict=True)}


def _place(ours: str, rules: Rules, public: dict[str, Tensor]) -> Place:
    name = ours
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    name, swapped = name.removesuffix("~"), name.endswith("~")
    if "*" in name:
        pattern = re.escape(name).replace(r"\*", r"\d+")
        return Place([other for other in public if re.fullmatch(pattern, other)] or [name], True, swapped)
    if braces := re.search(r"\{(.*)\}", name):
        names = [name[: braces.start()] + part + name[braces.end() :] for part in braces[1].split(",")]
        return Place(names, False, swapped)
    return Place([name], False, swapped)


def _halves_swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _read_config(module: Any, twin: Twin) -> ModelConfig:
    """Our config for a public module, every option of which must be as our network would be built."""
    defaults = {key: parameter.default for key, parameter in signature(type(module).__init__).parameters.items()}
    del defaults["self"]
    options = {key: module.config.get(key, default) for key, default in defaults.items()}
    config = twin.to_ours(options)
    for key, wanted in (defaults | twin.to_public(config)).items():
        if _plain(options[key]) != _plain(wanted):
            raise ValueError(f"{twin.public} has {key}={options[key]}, which no network here has; {wanted} it could be")
    return config


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


_COMMON_RULES = (
    (r"^patch_embed\.", "pos_embed.proj."),
    (r"(^|\.)blocks\.", r"\1transformer_blocks."),
    (r"\.qkv\.", ".to_{q,k,v}."),
    (r"\.kv\.", ".to_{k,v}."),
    (r"\.q\.", ".to_q."),
    (r"\.out\.", ".to_out.0."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
)
_ATTN_RULES = (*_COMMON_RULES, (r"\.attn\.", ".attn1."), (r"\.cross_attn\.", ".attn2."))


# --- the UNet of Stable Diffusion --------------------------------------------------------------------------


def _unet_rules(_: UNetConfig) -> Rules:
    return (
        (r"^down\.", "down_blocks."),
        (r"^middle\.", "mid_block."),
        (r"^up\.", "up_blocks."),
        (r"^(down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0.conv."),
        (r"^(up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0.conv."),
        (r"\.res\.", ".resnets."),
        (r"\.time\.", ".time_emb_proj."),
        (r"\.skip\.", ".conv_shortcut."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        *_ATTN_RULES,
        (r"^time_mlp\.fc", "time_embedding.linear_"),
        (r"^vector_mlp\.fc", "add_embedding.linear_"),
        (r"^norm_out\.", "conv_norm_out."),
    )


def _unet_to_public(config: UNetConfig) -> dict[str, Any]:
    if config.depths[-1] not in (0, config.middle_depth):
        raise ValueError(
            f"model.middle_depth={config.middle_depth} but model.depths={config.depths} ends in another depth, which "
            "the public class cannot say; make them equal"
        )
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_DIM,
        "projection_class_embeddings_input_dim": config.vector_dim,
    }
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "sample_size": config.base_size,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
        "transformer_layers_per_block": [
            *(depth or 1 for depth in config.depths[:-1]), config.middle_depth
        ],
        "attention_head_dim": config.heads,  # the public key is a misnomer: it counts heads
        "cross_attention_dim": config.text_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.groups,
        **(vector if config.vector_dim else {}),
    }  # fmt: skip


def _unet_to_ours(options: dict[str, Any]) -> UNetConfig:
    levels = len(options["block_out_channels"])
    for key in ("attention_head_dim", "transformer_layers_per_block"):
        if isinstance(options[key], int):
            options[key] = [options[key]] * levels
    options["upcast_attention"] = False  # a matter of precision
    options["dropout"] = 0.0
    options["sample_size"] = options["sample_size"] or 64
    attentive = [kind == "CrossAttnDownBlock2D" for kind in options["down_block_types"]]
    depths = options["transformer_layers_per_block"] = list(options["transformer_layers_per_block"])
    depths[:-1] = [depth if has else 1 for depth, has in zip(depths[:-1], attentive[:-1], strict=True)]
    return UNetConfig(
        in_channels=options["in_channels"],
        base_size=options["sample_size"],
        channels=list(options["block_out_channels"]),
        depths=[depth if has else 0 for depth, has in zip(depths, attentive, strict=True)],
        middle_depth=depths[-1],
        heads=list(options["attention_head_dim"]),
        layers=options["layers_per_block"],
        text_dim=options["cross_attention_dim"],
        vector_dim=options["projection_class_embeddings_input_dim"] or 0,
        linear_projection=options["use_linear_projection"],
        groups=options["norm_num_groups"],
    )


# --- transformers ------------------------------------------------------------------------------------------


def _sizes(config: TransformerConfig) -> dict[str, Any]:
    """Options that the three public classes share."""
    if config.mlp_ratio != 4:
        raise ValueError(f"model.mlp_ratio={config.mlp_ratio} but the public classes have 4")
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.hidden // config.heads,
        "num_layers": config.depth,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.variance else 1),
        "patch_size": config.patch_size,
        "sample_size": config.base_size,
    }


def _our_sizes(options: dict[str, Any]) -> dict[str, Any]:
    options["out_channels"] = options["out_channels"] or options["in_channels"]
    return {
        "hidden": options["num_attention_heads"] * options["attention_head_dim"],
        "heads": options["num_attention_heads"],
        "depth": options["num_layers"],
        "in_channels": options["in_channels"],
        "variance": options["out_channels"] == 2 * options["in_channels"],
        "patch_size": options["patch_size"],
        "base_size": options["sample_size"],
    }


def _no_qk_norm(config: TransformerConfig, public: str) -> None:
    if config.qk_norm:
        raise ValueError(f"model.qk_norm=true but {public} has no norms on queries and keys; it cannot be exported")


def _dit_rules(_: CCDiTConfig) -> Rules:
    embedder = "transformer_blocks.*.norm1.emb"
    return (
        *_ATTN_RULES,
        (r"^time_mlp\.fc", f"{embedder}.timestep_embedder.linear_"),
        (r"^class_embedding\.", f"{embedder}.class_embedder.embedding_table."),
        (r"^final\.modulation\.", "proj_out_1."),
        (r"^final\.linear\.", "proj_out_2."),
        (r"\.modulation\.", ".norm1.linear."),
    )


def _dit_to_public(config: CCDiTConfig) -> dict[str, Any]:
    _no_qk_norm(config, "DiTTransformer2DModel")
    if not config.as_diffusers:
        raise ValueError(
            "model.as_diffusers=false, but DiTTransformer2DModel embeds the time otherwise than DiT; only a network "
            "trained with as_diffusers=true can be exported"
        )
    return _sizes(config) | {"num_embeds_ada_norm": config.num_classes}


def _dit_to_ours(options: dict[str, Any]) -> CCDiTConfig:
    options["dropout"] = 0.0
    options["upcast_attention"] = False
    return CCDiTConfig(
        **_our_sizes(options), num_classes=options["num_embeds_ada_norm"], positions="corner", as_diffusers=True
    )


def _pixart_rules(_: PixArtConfig) -> Rules:
    return (
        *_ATTN_RULES,
        (r"^time_mlp\.fc", "adaln_single.emb.timestep_embedder.linear_"),
        (r"^modulation\.", "adaln_single.linear."),
        (r"^text_mlp\.fc", "caption_projection.linear_"),
        (r"^final\.table$", "scale_shift_table"),
        (r"^final\.linear\.", "proj_out."),
        (r"\.table$", ".scale_shift_table"),
    )


def _pixart_to_public(config: PixArtConfig) -> dict[str, Any]:
    _no_qk_norm(config, "PixArtTransformer2DModel")
    if config.kv_compression > 1:
        raise ValueError(
            f"model.kv_compression={config.kv_compression} but PixArtTransformer2DModel attends to every token; it "
            "cannot be exported"
        )
    return _sizes(config) | {
        "cross_attention_dim": config.hidden,
        "caption_channels": config.text_dim,
        "interpolation_scale": 1,
        "use_additional_conditions": False,
    }


def _pixart_to_ours(options: dict[str, Any]) -> PixArtConfig:
    if options["interpolation_scale"] is None:
        options["interpolation_scale"] = max(options["sample_size"] // 64, 1)
    if options["use_additional_conditions"] is None:
        options["use_additional_conditions"] = options["sample_size"] == 128
    # a picture of the sample size has the positions of one `scale` times smaller
    options["sample_size"] = int(options["sample_size"] / options["interpolation_scale"])
    options["interpolation_scale"] = 1
    options["dropout"], options["upcast_attention"] = 0.0, False
    options["num_embeds_ada_norm"] = 1000  # read by nothing
    return PixArtConfig(**_our_sizes(options), text_dim=options["caption_channels"], positions="corner")


def _mmdit_rules(config: MMDiTConfig) -> Rules:
    return (
        (r"\.text\.attn\.qkv\.", ".attn.add_{q,k,v}_proj."),
        (r"\.text\.attn\.out\.", ".attn.to_add_out."),
        (r"\.text\.attn\.(.)_norm\.", r".attn.norm_added_\1."),
        (rf"\.{config.depth - 1}\.text\.modulation\.(\w+)", rf".{config.depth - 1}.norm1_context.linear.\1~"),
        (r"\.text\.modulation\.", ".norm1_context.linear."),
        (r"\.text\.mlp\.fc1\.", ".ff_context.net.0.proj."),
        (r"\.text\.mlp\.fc2\.", ".ff_context.net.2."),
        (r"\.image\.modulation\.", ".norm1.linear."),
        (r"\.image\.", "."),
        (r"\.(.)_norm\.", r".norm_\1."),
        *_COMMON_RULES,
        (r"^time_mlp\.fc", "time_text_embed.timestep_embedder.linear_"),
        (r"^pooled_mlp\.fc", "time_text_embed.text_embedder.linear_"),
        (r"^text_embed\.", "context_embedder."),
        (r"^final\.modulation\.(\w+)", r"norm_out.linear.\1~"),
        (r"^final\.linear\.", "proj_out."),
    )


def _mmdit_to_public(config: MMDiTConfig) -> dict[str, Any]:
    return _sizes(config) | {
        "joint_attention_dim": config.text_dim,
        "caption_projection_dim": config.hidden,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": _table_side(config),
        "dual_attention_layers": tuple(range(config.dual)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _mmdit_to_ours(options: dict[str, Any]) -> MMDiTConfig:
    return MMDiTConfig(
        **_our_sizes(options),
        text_dim=options["joint_attention_dim"],
        pooled_dim=options["pooled_projection_dim"],
        table_size=options["pos_embed_max_size"],
        dual=len(options["dual_attention_layers"]),
        qk_norm=options["qk_norm"] is not None,
        positions="crop",
    )


def _table_side(config: TransformerConfig) -> int:
    """Cells of the public table of positions: `table_size` where pictures are cut from its middle, else the base grid.

    Positions anchored by their centre are the public ones at the base size alone.
    """
    base = config.base_size // config.patch_size
    return getattr(config, "table_size", base) if config.positions == "crop" else base


def _positions(config: TransformerConfig) -> dict[str, Tensor]:
    """The public table, as ours counts cells."""
    base, side = config.base_size // config.patch_size, _table_side(config)
    return {"pos_embed.pos_embed": position_table((side, side), base, config.hidden, "corner")[None]}


TWINS = (
    Twin(UNetConfig, "UNet2DConditionModel", _unet_rules, _unet_to_public, _unet_to_ours),
    Twin(CCDiTConfig, "DiTTransformer2DModel", _dit_rules, _dit_to_public, _dit_to_ours, _positions),
    Twin(PixArtConfig, "PixArtTransformer2DModel", _pixart_rules, _pixart_to_public, _pixart_to_ours, _positions),
    Twin(MMDiTConfig, "SD3Transformer2DModel", _mmdit_rules, _mmdit_to_public, _mmdit_to_ours, _positions),
)
