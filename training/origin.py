"""Where a run's first weights come from: its own checkpoint, then `init.from`, then scratch; and what it tells of that.

A source of another class or resolution is carried over by `models.surgery`, the code behind `reparameterize.py`. What
adapters stand on is taken as it is, at the first start and at every other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from inference.description import Base, Description, find, plain
from inference.networks import find_base, load_networks, open_base
from models.folder import numbered
from models.surgery import transfer
from training.checkpoint import changes


def inherit(denoiser: nn.Module, init: dict[str, Any], description: Description, say: Callable[[str], None]) -> None:
    """Fill `denoiser` from `init.from` in place, and say what was inherited, overridden and initialised."""
    folder: Path = find(init["from"])
    say(f"starts from {folder} ({init['weights']} weights)")
    theirs, source, _ = load_networks(folder, init["weights"])
    _note(theirs, description, say)
    account = transfer(source, denoiser, mode=init["mode"])
    for line in account.summary():
        say(f"  {line}")


def stand_on_base(
    denoiser: Any, init: dict[str, Any], checkpoints: Path, description: Description, say: Callable[[str], None]
) -> Base:
    """Fill `denoiser` in place with what its adapters stand on, and say what that is.

    It is what the run's checkpoints name, or else `init.from`. ValueError where that is no network of this config.
    """
    held = [path for path in numbered(checkpoints) if (path / "pipeline.json").is_file()]
    base = Description.load(held[0]).base if held else None
    if base is None and not init["from"]:
        raise ValueError(
            "lora.rank trains adapters on a network that has learnt, and init.from=null has none; give"
            " init.from=... a run folder, checkpoint or pipeline"
        )
    base = base or find_base(init["from"], init["weights"])
    source = open_base(base, held[0] if held else Path(base.path))
    theirs, ours = ({"class": type(one.config).__name__} | plain(one.config) for one in (source, denoiser))
    if differing := [line for line in changes(theirs, ours) if not line.startswith("lora.")]:
        raise ValueError(
            f"adapters stand on a network as it is, and {base.path} is another than model= says ({differing[0]});"
            " give the model of that, or carry it over first with reparameterize.py"
        )
    say(f"adapters on {base.path} ({base.weights} weights), which stays as it is")
    denoiser.load_state_dict(source.state_dict())
    if not held:
        _note(Description.load(find(base.path)), description, say)
    return base


def _note(theirs: Description, ours: Description, say: Callable[[str], None]) -> None:
    """Say what was inherited otherwise than it is used now."""
    if plain(theirs.vae) != plain(ours.vae):
        say(f"  note: its latents came from another autoencoder, {theirs.vae.path}")
    for line in changes(plain(theirs), plain(ours)):
        say(f"  overridden  {line}")
