"""Denoisers on disk: a folder that describes itself, never a pickle.

    folder/config.json          {"_class_name": "PixArt", ...the fields of PixArtConfig}
    folder/model.safetensors    tensors by name; other names ("ema") may stand beside it under the one config

Files appear whole or not at all: each is written beside its place, synced and renamed. Loading is strict, since a
denoiser with some tensors left at their start still draws, only badly.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.base import ModelConfig

# Why tensors do not fit: the first line whose pattern is found in any, or in all, of the names that are missing, extra
# or misshapen, the last of these written "name (2, 3) for (4, 3)".
Causes = Sequence[tuple[Callable[[Iterable[object]], bool], str, str]]
CAUSES: Causes = (
    (any, r"lora", "a LoRA, which is added to a model and is none itself; load the model that it was made for."),
    (
        any,
        r"^model\.diffusion_model\.|^(input_blocks|joint_blocks|[xyt]_embedder)\.",
        "the original layout of a single file, whose tensors have other names; bring it in with scripts/import.py.",
    ),
    (
        any,
        r"^(transformer_blocks|down_blocks|pos_embed)\.",
        "a diffusers file, whose tensors have other names; bring its pipeline in with scripts/import.py.",
    ),
    (any, r"_orig_mod\.|^module\.", "saved from inside a DDP or compile wrapper; save with save_denoiser."),
    (any, r"^(model_)?ema", "an average saved under a prefix; save it as a network, with save_denoiser(name='ema')."),
    (all, r"\.[qk]_norm\.weight$", "model.qk_norm differs."),
    (all, r"\.compress\.", "model.kv_compression or model.kv_blocks differs."),
    (all, r"\.attn2\.|\.image\.modulation\.", "model.dual differs."),
    (all, r"\.mlp\.fc.* for ", "model.mlp_ratio differs."),
    (all, r"^final\.linear\..* for ", "model.variance differs."),
    (all, r"^class_embedding\..* for ", "model.num_classes differs."),
    (
        all,
        r"^(patch_embed|final\.linear|conv_in|conv_out)\..* for ",
        "model.in_channels or model.patch_size differs; was the autoencoder changed?",
    ),
    (
        all,
        r"^(text_mlp|text_embed|pooled_mlp|vector_mlp)\.|\.cross_attn\.kv\.",
        "model.text_dim, model.pooled_dim or model.vector_dim differs; were the text encoders changed?",
    ),
    (all, r"^blocks\.\d+\.(text\.modulation|\S+$)", "model.depth differs."),
    (all, r"^(down|middle|up)\.", "model.depths, model.middle_depth or model.layers differs."),
    (all, r" for ", "the same class in other sizes; check config.json beside the file."),
    (any, "", "another class, or several options; check config.json, or carry over with reparameterize.py."),
)
ROOT = Path(__file__).resolve().parents[1]
MODULES = {"CCDiT": "models.ccdit", "PixArt": "models.pixart", "MMDiT": "models.mmdit", "UNet": "models.unet"}


def save_denoiser(denoiser: nn.Module, folder: str | Path, name: str = "model") -> None:
    """Write `folder`/config.json and `folder`/`name`.safetensors; wrappers of DDP and compile leave no trace."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inner = unwrap(denoiser)
    write_config(inner.config, folder)  # pyright: ignore[reportArgumentType]
    write_tensors({plain_name(key): tensor for key, tensor in inner.state_dict().items()}, folder, name)


def load_denoiser(folder: str | Path, name: str = "model") -> nn.Module:
    """Rebuild the denoiser saved in `folder`, on the CPU, in the file's dtype and in training mode, strictly."""
    folder = Path(locate(folder))
    tensors = read_tensors(folder, name)
    with torch.device("meta"):  # no time spent on an initialisation that is about to be replaced
        denoiser = read_config(folder).build()
    load_strict(denoiser, tensors, source=str(folder / f"{name}.safetensors"), assign=True)
    return denoiser


def load_strict(model: nn.Module, tensors: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Load tensors whose names and shapes are exactly the model's; else ValueError with names and a likely cause.

    assign: let the model take the tensors themselves, with their dtype, instead of copying into its own.
    """
    check_fit(type(model).__name__, model.state_dict(), tensors, source)
    model.load_state_dict(tensors, assign=assign)


def check_fit(name: str, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """ValueError unless the names and shapes are exactly those `wanted` of a network of class `name`."""
    problems = {
        "missing": [key for key in wanted if key not in tensors],
        "extra": [key for key in tensors if key not in wanted],
        "misshapen": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(wanted[key].shape)}"
            for key in wanted
            if key in tensors and tensors[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        raise misfit(source, name, problems, CAUSES)


def misfit(source: str, wanted: str, problems: Mapping[str, list[str]], causes: Causes) -> ValueError:
    """An error with the names of tensors that do not fit, by what is wrong with them, and the likeliest cause."""
    lists = "; ".join(f"{len(names)} {kind}: {first_names(names)}" for kind, names in problems.items() if names)
    every = [name for names in problems.values() for name in names]
    cause = next(cause for some, pattern, cause in causes if some(re.search(pattern, name) for name in every))
    return ValueError(f"{source} does not fit {wanted}: {lists}. Likely cause: {cause}")


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        inner = getattr(model, "module", None) if inner is None else inner
        if inner is None:
            return model
        model = inner


def plain_name(key: str) -> str:
    """Name of a tensor without what wrappers, also of single blocks, add to it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def write_config(config: ModelConfig, folder: Path) -> None:
    """Write config.json with the name of the network's class."""
    described = {"_class_name": type(config).__name__.removesuffix("Config"), **asdict(config)}
    del described["lora"]
    with appearing(folder / "config.json") as partial:
        partial.write_text(json.dumps(described, indent=2) + "\n")


def read_config(folder: Path) -> ModelConfig:
    """Read config.json into the Config class that it names; unknown classes and keys are refused."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a saved model, which holds config.json")
    described = json.loads(path.read_text())
    class_name = described.pop("_class_name", None)
    if class_name not in MODULES:
        raise ValueError(f"{path} has _class_name={class_name!r}; this project builds {', '.join(MODULES)}")
    config_class = getattr(import_module(MODULES[class_name]), f"{class_name}Config")
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(described.keys() - known):
        raise ValueError(
            f"{path} has keys that {class_name} lacks: {first_names(unknown)}; was it saved by a newer version?"
        )
    return config_class(**described)


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Write `folder`/`name`.safetensors at once or not at all; tensors of any device, none sharing memory."""
    with appearing(folder / f"{name}.safetensors") as partial:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial, {"format": "pt"})


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read `folder`/`name`.safetensors on the CPU."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        found = sorted(file.stem for file in folder.glob("*.safetensors"))
        raise ValueError(f"{path} does not exist; {folder} holds the weights {', '.join(found) or 'of nothing'}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again or take the checkpoint before it") from error


def locate(path: str | Path) -> str:
    """A path as given if it exists, else below the repository if it exists there, else unchanged: a hub's name."""
    below = ROOT / Path(path).expanduser()
    return str(path) if Path(path).exists() or not below.exists() else str(below)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all has gone well and vanishes otherwise."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask grants; safetensors would let the owner alone read
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def first_names(names: list[str], count: int = 10) -> str:
    """The first ten of many names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
