"""Where a run's first weights come from: its own checkpoint, then `init.from`, then scratch; and what it tells of that.

A source of another class or resolution is carried over by `models.surgery`, the code behind `reparameterize.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from inference.description import Description, find, plain
from models.surgery import transfer
from models.weights import load_denoiser
from training.checkpoint import changes


def inherit(denoiser: nn.Module, init: dict[str, Any], description: Description, say: Callable[[str], None]) -> None:
    """Fill `denoiser` from `init.from` in place, and say what was inherited, overridden and initialised."""
    folder: Path = find(init["from"])
    say(f"starts from {folder} ({init['weights']} weights)")
    source, theirs = load_denoiser(folder / "denoiser", name=init["weights"]), Description.load(folder)
    if plain(theirs.vae) != plain(description.vae):
        say(f"  note: its latents came from another autoencoder, {theirs.vae.path}")
    for line in changes(plain(theirs), plain(description)):
        say(f"  overridden  {line}")
    account = transfer(source, denoiser, mode=init["mode"])
    for line in account.summary():
        say(f"  {line}")
