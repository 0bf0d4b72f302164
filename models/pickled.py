"""Legacy .ckpt files, of tensors by name: the one place that unpickles, and it reads data alone, never code.

    {"state_dict": {name: tensor}, "metadata": {key: text}, "global_step": 470000, ...}

Only a file that someone else made is a reason to read one, and only an old tool a reason to write one.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.weights import appearing, first_names


def read_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the texts that `write_pickled` put beside them; counters and the like are left.

    ValueError if the file holds anything but tensors, numbers, text and containers of these.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a checkpoint file, .safetensors or .ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or a hostile file raises has no common class
        held = re.search(r"GLOBAL (\S+)", str(error))
        found = f"holds {held[1]}, which is code" if held else "is no file of tensors, or a damaged one"
        raise ValueError(f"{path} {found}; only data is read here: ask for the file as .safetensors") from error
    content = content if isinstance(content, Mapping) else {"its top": content}
    tensors = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    if others := [f"{key} ({type(value).__name__})" for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} has no tensors at {first_names(others)}; give a checkpoint with a state_dict of tensors"
        )
    texts = content.get("metadata")
    texts = {key: text for key, text in texts.items() if isinstance(text, str)} if isinstance(texts, Mapping) else {}
    return dict(tensors), texts


def write_pickled(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a .ckpt at once or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with appearing(path) as partial:
        torch.save({"state_dict": tensors, "metadata": dict(metadata)}, partial)
