"""One file for a whole model, with the tensors' original names: how ComfyUI and A1111 take models, and pass them on.

    file.safetensors   model.diffusion_model.*, first_stage_model.*, the text encoders;  metadata: ModelSpec, configs
    file.ckpt          {"state_dict": the same}: for old tools; only ever read as data

What is written here can be read back at any size, since the configs are in the metadata. Of other files the public
sizes are recognised, and others need the configs of a folder in diffusers' layout. Every tensor is accounted for.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inference.export.original import FAMILIES, Part, from_original, to_original
from models.pickled import read_pickled, write_pickled
from models.weights import Causes, appearing, first_names, misfit, unwrap

DENOISER = "model.diffusion_model."
EMA = "model_ema."
CONFIG = "triptych.config"  # {"family": ..., "components": {name: options}}
ZERO_TERMINAL_SNR = "triptych.zero_terminal_snr"
HASH, NO_HASH = "modelspec.hash_sha256", "0x" + 64 * "0"
# Empty tensors by which UIs tell an SDXL that predicts v, and down to no signal, and the metadata that says the same.
MARKERS = {"v_pred": ("modelspec.prediction_type", "v"), "ztsnr": (ZERO_TERMINAL_SNR, "true")}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
# What public files hold besides the weights: tables of noise schedules, averages, ids that count, CLIP's temperature.
NO_WEIGHTS = re.compile(
    r"model_ema\..*|\w*alphas_cumprod\w*|betas|logvar|lvlb_weights|scale_factor|posterior_\w+"
    r"|denoiser\.sigmas|v_pred|ztsnr|.*\.(position_ids|logit_scale)|first_stage_model\.(loss|model_ema)\..*"
)
# Why tensors do not fit: the first line whose pattern is found in any, or in all, of the names in question.
CAUSES: Causes = (
    (any, r"_orig_mod\.", "a compile prefix, `_orig_mod.`; save the module inside torch.compile's."),
    (any, r"lora", "a LoRA, which is added to a model and is none itself."),
    (any, r"^(down_blocks|transformer_blocks)\.", "a file of diffusers; give its folder to what reads folders."),
    (any, r"^cond_stage_model\.model\.", "Stable Diffusion 2, which has no place here."),
    (any, r"^(model_)?ema[._]", "an EMA prefix: averaged weights alone, or under other names than the model's."),
    (all, r"^first_stage_model\.", "another VAE; give config=, the folder of a pipeline that has it."),
    (all, r"^(cond_stage_model|conditioner|text_encoders)\.", "other text encoders; give config=, a folder with them."),
    (any, "", "another architecture or size; SD 1.x, SDXL, its refiner and SD3 are read, config= says which size."),
)


@dataclass(slots=True)
class SingleFile:
    """The public modules of a single file by their names in a pipeline, and what else it says.

    family: a key of FAMILIES. left_out: names of tensors that are no module's weights, such as tables and averages.
    """

    modules: dict[str, nn.Module]
    metadata: dict[str, str]
    family: str
    left_out: list[str]

    @property
    def has_ema(self) -> bool:
        """Whether the file holds averaged weights besides the model's."""
        return any(name.startswith(f"{EMA}diffusion_model") for name in self.left_out)


def write_single_file(
    path: str | Path, modules: Mapping[str, nn.Module | None], metadata: Mapping[str, str], *, pickled: bool = False
) -> None:
    """Write public modules, by their names in a diffusers pipeline, to one file with the original names.

    metadata: what `modelspec` says, and more; its hash is filled in. pickled: write a .ckpt, which old tools need.
    """
    path, suffix = Path(path), ".ckpt" if pickled else ".safetensors"
    if path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix}, since pickled={pickled}; rename it, or turn pickled round")
    if others := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f"metadata {first_names(others)} must be text, as the format asks; make it str or JSON")
    present = {name: unwrap(module) for name, module in modules.items() if module is not None}
    family = family_of(present)
    tensors = to_tensors(present, family) | _markers(family, metadata)
    described = {"family": family, "components": {name: _options(module) for name, module in present.items()}}
    written = {"format": "pt", **metadata, CONFIG: json.dumps(described)}
    written.pop(HASH, None)  # of the file that the metadata may be from
    path.parent.mkdir(parents=True, exist_ok=True)
    if pickled:
        write_pickled(tensors, written, path)
        return
    with appearing(path) as partial:
        if "modelspec.sai_model_spec" in written:
            save_file(tensors, partial, written | {HASH: NO_HASH})
            _fill_in_hash(partial)
        else:
            save_file(tensors, partial, written)


def read_single_file(path: str | Path, config: str | Path | None = None, *, ema: bool = False) -> SingleFile:
    """Read the modules of a .safetensors or .ckpt file with the original names, in its dtypes, strictly.

    config: a folder in diffusers' layout that says what shapes do not, for files of unusual size from elsewhere.
    ema: take the averaged weights that some .ckpt files hold besides the model's.
    """
    path = Path(path)
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    if ema:
        tensors |= _averages(tensors, path)
    described = _described(metadata, path)
    configs = described["components"] | (_folder_configs(Path(config)) if config else {})
    weights = {name: tensor for name, tensor in tensors.items() if not NO_WEIGHTS.fullmatch(name)}
    family = _family_in(tensors, described["family"], path)
    modules = from_tensors(weights, family, configs, source=str(path))
    for marker, (key, value) in MARKERS.items():
        if marker in tensors:
            metadata.setdefault(key, value)
    return SingleFile(modules, metadata, family, sorted(tensors.keys() - weights.keys()))


def modelspec(
    modules: Mapping[str, nn.Module | None],
    *,
    title: str,
    date: str,
    resolution: tuple[int, int],
    prediction_type: str,
    zero_terminal_snr: bool = False,
) -> dict[str, str]:
    """Metadata by ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec); `write_single_file` adds the hash.

    date: ISO 8601. resolution: (width, height) in pixels. prediction_type: `epsilon` or `v`, or SD3's own.
    zero_terminal_snr: whether v was trained down to no signal at all, which UIs must know as well.
    """
    present = {name: unwrap(module) for name, module in modules.items() if module is not None}
    family = family_of(present)
    repository = "sd3.5" if family == "sd3" else "generative-models"
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": ARCHITECTURES.get(family) or _sd3_architecture(present["transformer"].config),
        "implementation": f"https://github.com/Stability-AI/{repository}",
        "title": title,
        "date": date,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "prediction_type": prediction_type,
    }
    terminal = {ZERO_TERMINAL_SNR: "true"} if zero_terminal_snr else {}
    return {f"modelspec.{key}": value for key, value in spec.items()} | terminal


def family_of(modules: Mapping[str, Any]) -> str:
    """The key in FAMILIES of public modules."""
    if "transformer" in modules:
        return "sd3"
    if "unet" not in modules:
        raise ValueError(f"modules {', '.join(modules) or 'of no name'} lack a unet or a transformer; give either")
    config, second = modules["unet"].config, modules.get("text_encoder_2")
    if not config.projection_class_embeddings_input_dim:
        return "sd1"
    alone = second is not None and second.config.hidden_size == config.cross_attention_dim
    return "sdxl-refiner" if alone or config.projection_class_embeddings_input_dim == 2560 else "sdxl"


def to_tensors(modules: Mapping[str, Any], family: str) -> dict[str, Tensor]:
    """The tensors of public modules by their names in a file, none sharing memory with another."""
    tensors, seen = {}, set()
    for component, module in modules.items():
        part = _part(component, module, family)
        named = to_original(module.state_dict(), part.rules(module.config))
        _check_readers_understand(component, named, part)
        for name, tensor in named.items():
            shared = not tensor.is_meta and tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            tensors[part.prefix + name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    return tensors


def _part(component: str, module: Any, family: str) -> Part:
    parts, found = FAMILIES[family], type(module).__name__
    if component not in parts:
        raise ValueError(f"{component} has no place in a file of {family}, only {', '.join(parts)}; leave it out")
    if found != parts[component].public:
        raise ValueError(
            f"{component} is a {found}, but a file of {family} holds a {parts[component].public}; export a folder in"
            " diffusers' layout instead"
        )
    return parts[component]


def _check_readers_understand(component: str, named: Mapping[str, Tensor], part: Part) -> None:
    if strange := sorted(name for name in named if not re.match(part.layout, name)):
        raise ValueError(
            f"{component} has {len(strange)} tensors without an original name: {first_names(strange)};"
            " only what Stable Diffusion's own networks have can be written"
        )
    for name, tensor in part.implied(named).items():
        if not tensor.is_meta and not torch.equal(named.get(name, tensor), tensor):
            raise ValueError(
                f"{component} has a {name} that readers of such files would not use (SD3's CLIP-L goes unprojected, and"
                " T5 has one embedding); export a folder in diffusers' layout instead"
            )


def from_tensors(
    tensors: Mapping[str, Tensor], family: str, configs: Mapping[str, dict[str, Any]], source: str
) -> dict[str, nn.Module]:
    """The public modules, in evaluation mode, of tensors by their names in a file. Configs are by component."""
    built: dict[str, tuple[Any, dict[str, Tensor], Part]] = {}
    missing, misshapen, taken = [], [], set()
    for component, part in FAMILIES[family].items():
        found = {name.removeprefix(part.prefix): tensors[name] for name in tensors if name.startswith(part.prefix)}
        if not found:
            continue
        found = part.implied(found) | found
        module = _build(part.public, configs.get(component) or _recognised(part, found, source))
        for name, like in to_original(module.state_dict(), part.rules(module.config)).items():
            taken.add(part.prefix + name)
            if name not in found:
                missing.append(part.prefix + name)
            elif found[name].shape != like.shape:
                misshapen.append(f"{part.prefix}{name} {tuple(found[name].shape)} for {tuple(like.shape)}")
        built[component] = module, found, part
    extra = [name for name in tensors if name not in taken]
    if missing or extra or misshapen:
        raise misfit(source, family, {"missing": missing, "extra": extra, "misshapen": misshapen}, CAUSES)
    return {component: _loaded(*parts) for component, parts in built.items()}


def _build(public: str, options: dict[str, Any]) -> Any:
    """A module without memory."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if public in ("UNet2DConditionModel", "SD3Transformer2DModel", "AutoencoderKL"):
            return getattr(diffusers, public).from_config(options)
        kind = getattr(transformers, public)
        return kind(kind.config_class.from_dict(options))


def _loaded(module: Any, found: Mapping[str, Tensor], part: Part) -> nn.Module:
    """The module with its tensors, all of which are there."""
    tensors = from_original(found, module.state_dict(), part.rules(module.config))
    module.load_state_dict(tensors, assign=True)
    for name, buffer in module.named_buffers():
        if name not in tensors:  # not saved, so made anew: the positions that CLIP's embeddings are looked up by
            owner, _, leaf = name.rpartition(".")
            counted = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(leaf, counted, persistent=False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # T5's two names for its embeddings are one parameter again
    return module.eval()


def _recognised(part: Part, found: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The config of a public size, by names and shapes."""
    try:
        told = part.told(found)
    except KeyError as absent:
        raise misfit(source, part.public, {"missing": [part.prefix + absent.args[0]]}, CAUSES) from absent
    for sign, untold in part.known:
        if all(told[key] == value for key, value in sign.items()):
            return told | untold
    sign, untold = part.known[0]
    size = ", ".join(f"{key}={told[key]}" for key in sign)
    raise ValueError(
        f"{source} has a {part.public} of no public size ({size}), whose shapes do not tell {', '.join(untold)}; give"
        " config=, a folder in diffusers' layout with its config.json, or a file that was written here"
    )


def _family_in(tensors: Mapping[str, Tensor], described: str | None, path: Path) -> str:
    """The family of a file, by its names."""
    if f"{DENOISER}joint_blocks.0.x_block.attn.qkv.weight" in tensors:
        return "sd3"
    if f"{DENOISER}input_blocks.0.0.weight" not in tensors:
        wanted = [f"{DENOISER}input_blocks.0.0.weight or {DENOISER}joint_blocks.0.x_block.attn.qkv.weight"]
        raise misfit(str(path), "Stable Diffusion", {"missing": wanted, "extra": list(tensors)}, CAUSES)
    vector = tensors.get(f"{DENOISER}label_emb.0.0.weight")
    if vector is None:
        return "sd1"
    if any(name.startswith("conditioner.") for name in tensors):
        alone = any(name.startswith("conditioner.embedders.0.model.") for name in tensors)
        return "sdxl-refiner" if alone else "sdxl"
    if described in ("sdxl", "sdxl-refiner"):
        return described
    return "sdxl-refiner" if vector.shape[1] == 2560 else "sdxl"


def _averages(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The averaged weights by the model's names; their own are those without dots."""
    own = {name: EMA + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(DENOISER)}
    if absent := [average for average in own.values() if average not in tensors]:
        raise ValueError(f"{path} lacks {len(absent)} averaged tensors: {first_names(absent)}; take the model's own")
    return {name: tensors[average] for name, average in own.items()}


# --- configs, metadata and bytes ---------------------------------------------------------------------------


def _options(module: Any) -> dict[str, Any]:
    """A public module's config without the notes of its library, such as the folder it came from."""
    text = module.to_json_string() if hasattr(module, "to_json_string") else module.config.to_json_string()
    return {key: value for key, value in json.loads(text).items() if not key.startswith("_")}


def _described(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a writer here said of the modules."""
    try:
        described = json.loads(metadata.get(CONFIG, "{}"))
        return {"family": described.get("family"), "components": dict(described.get("components", {}))}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} has damaged metadata {CONFIG} ({error}); take another copy of it") from error


def _folder_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The options of each component in a folder of diffusers' layout."""
    components = {component for parts in FAMILIES.values() for component in parts}
    files = {name: folder / name / "config.json" for name in sorted(components)}
    configs = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    if not configs:
        raise ValueError(f"config={folder} holds no {', no '.join(files)} with config.json; give a diffusers pipeline")
    return configs


def _markers(family: str, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Those of the markers that the metadata asks for; UIs look for them in SDXL alone."""
    names = [name for name, (key, value) in MARKERS.items() if metadata.get(key) == value] if family == "sdxl" else []
    return {name: torch.empty(0) for name in names}


def _sd3_architecture(config: Any) -> str:
    if config.num_layers == 38:
        return "stable-diffusion-v3.5-large"
    if config.num_layers == 24:
        return "stable-diffusion-v3.5-medium" if config.dual_attention_layers else "stable-diffusion-v3-medium"
    return "stable-diffusion-v3"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a checkpoint file, .safetensors or .ckpt")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); take another copy of it") from error


def _fill_in_hash(path: Path) -> None:
    """Write the SHA-256 of all that follows the header of a .safetensors file in the place kept for it."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(8)
        file.write(header.replace(NO_HASH.encode(), b"0x" + digest.encode()))
