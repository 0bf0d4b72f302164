"""Carry trained weights over to another model: a checkpoint becomes the start of the next architecture.

    python reparameterize.py from=outputs/stage1 model=pixart_tiny out=outputs/stage1-as-pixart
    python reparameterize.py from=outputs/stage2 model=pixart_tiny model.depth=12 objective=flow out=outputs/deeper

    from=DIR          run, checkpoint or exported pipeline
    model=NAME        a file of configs/model; model.KEY=VALUE changes it
    out=DIR           pipeline to write; must not exist
    mode=anchor       ccDiT to PixArt: exact at one time; mean: nearest over all
    anchor=0.5        that time, in [0, 1]
    weights=ema       which of the source's; or model
    seed=0            of tensors that start anew and of shares among copies
    objective=NAME    what training goes on with, instead of the source's; objective.KEY=VALUE changes it
    text=NAME         text encoders, instead of the source's; text.KEY=VALUE changes them
    vae=NAME          autoencoder, instead of the source's; vae.KEY=VALUE changes it

It prints what became of every tensor and how far the two networks are apart over time, and writes a folder that
init.from=, the sampler and the app accept. Training with init.from=outputs/stage1 does the same on its way. Positions
keep the coordinates that the source has learnt, unless model.base_size= is given. The rules are in models/surgery.py.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

GROUPS = ("model", "objective", "text", "vae")
RETARGETING = """\
objective {before} -> {after}: the tensors still say {before}, but are read as {after} from now on, to be fine-tuned;
they are wrong by the relative difference below. Only to draw from them, leave objective= away: samplers ask for x0,
which follows exactly from {before} at every t{but}"""


@dataclass(slots=True, kw_only=True)
class Options:
    """The command line; `from` is a word of Python's."""

    source: str
    model: str
    out: Path
    mode: str = "anchor"
    anchor: float = 0.5
    weights: str = "ema"
    seed: int = 0
    overrides: list[str] = field(default_factory=list)

    def given(self, key: str) -> bool:
        """Whether an override begins with this key."""
        return any(override.startswith((f"{key}=", f"{key}.")) for override in self.overrides)


KEYS: dict[str, Any] = {
    "from": str, "model": str, "out": Path, "mode": str, "anchor": float, "weights": str, "seed": int
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and carry over; a user's error ends it with one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    try:
        options = parse(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from configs.schema import explain

    try:
        reparameterize(options)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error, 'train')}")


def parse(arguments: list[str]) -> Options:
    """The options that KEY=VALUE words make; ValueError about the first word that is none."""
    values: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        group, _, inner = key.partition(".")
        if value and group in GROUPS and (inner or group != "model"):
            overrides.append(argument)
        elif value and key in KEYS:
            try:
                values[key] = KEYS[key](value)
            except ValueError:
                raise ValueError(f"{argument} is not a number; give one such as {key}=0") from None
        else:
            near = get_close_matches(group.lstrip("-"), [*KEYS, *GROUPS], n=1)
            every = " ".join(f"{name}=" for name in [*KEYS, *GROUPS[1:]])
            raise ValueError(
                f"{argument} has no part in this; "
                + (f"did you mean {near[0]}=VALUE?" if near else f"give any of {every} and model.KEY=VALUE")
            )
    if missing := [f"{key}=" for key in ("from", "model", "out") if key not in values]:
        raise ValueError(f"{' '.join(missing)} must be given: from=DIR model=NAME out=DIR; --help tells more")
    return Options(source=values.pop("from"), overrides=overrides, **values)


def reparameterize(options: Options) -> None:
    """Source folder -> surgery -> printed account and comparison -> published folder."""
    import torch

    from configs.schema import compose
    from inference.description import Description, find, plain
    from models.folder import publish
    from models.surgery import transfer
    from models.weights import load_denoiser, save_denoiser
    from training.checkpoint import changes

    if options.out.exists():
        raise ValueError(f"out={options.out} exists already and is never overwritten; choose another name")
    folder = find(options.source)
    source: Any = load_denoiser(folder / "denoiser", name=options.weights).float()
    theirs = Description.load(folder)
    cfg = compose("train", [f"model={options.model}", "name=reparameterize", *options.overrides])
    learnt = learnt_base_size(source.config, cfg.model)
    if learnt != cfg.model.base_size and not options.given("model.base_size"):
        options.overrides.append(f"model.base_size={learnt}")
        cfg.model.base_size = learnt
    description = describe(options, theirs, source.config, cfg)

    torch.manual_seed(options.seed)
    target: Any = cfg.model.build()
    account = transfer(source, target, options.mode, options.anchor)
    print(f"{folder} ({options.weights} weights)", *account.summary(), sep="\n  ")
    for line in changes(plain(theirs), plain(description)):
        print("  overridden  ", shorten(line, 100, placeholder=" ..."))
    report = {"from": str(folder), "mode": options.mode, "anchor": options.anchor, "tensors": account.table()}
    report |= compare(source, target, theirs.objective, description.objective, options.seed)

    def write(aside: Path) -> None:
        for name in ("model", "ema"):
            save_denoiser(target, aside / "denoiser", name)
        description.save(aside)
        (aside / "account.json").write_text(json.dumps(report, indent=1) + "\n")

    publish(options.out, write)
    chosen = [word for word in options.overrides if word.startswith("model.")]
    print(f"wrote {options.out}; train from it with", f"init.from={options.out} model={options.model}", *chosen)


def learnt_base_size(old: Any, new: Any) -> int:
    """The base_size with which positions keep the source's range; the model's own where there are no positions."""
    if not (hasattr(old, "positions") and hasattr(new, "positions")):
        return new.base_size
    return old.base_size // old.patch_size * new.patch_size


def describe(options: Options, theirs: Any, old: Any, cfg: Any) -> Any:
    """What the new pipeline says of itself: as the source, but for what was chosen."""
    from dataclasses import replace

    new = cfg.model
    if options.given("objective") and not any(word.startswith("objective=") for word in options.overrides):
        raise ValueError("objective.KEY=VALUE changes an objective that is chosen; give objective=NAME too")
    if old.in_channels != new.in_channels and not options.given("vae"):
        raise ValueError(
            f"model.in_channels={new.in_channels} where the source has {old.in_channels} is another autoencoder; give"
            f" vae=NAME, or model.in_channels={old.in_channels}"
        )
    own_text = theirs.text is not None and not options.given("text")
    return replace(
        theirs,
        objective=cfg.objective if options.given("objective") else theirs.objective,
        vae=cfg.vae if options.given("vae") else theirs.vae,
        text=None if new.condition == "class" else theirs.text if own_text else cfg.text,
        resolution=theirs.resolution * new.patch_size // old.patch_size,  # of as many tokens
        num_classes=getattr(new, "num_classes", None),
    )


def compare(source: Any, target: Any, trained: Any, wanted: Any, seed: int) -> dict[str, Any]:
    """Print and return how far apart the networks are, and how far the target is from what `wanted` asks of it."""
    import torch

    from models.ccdit import CCDiT
    from models.modulation import block_r2
    from models.pixart import PixArt
    from models.surgery import gap, null_condition

    old, new, rows, report = source.config, target.config, 2, {}
    times = torch.linspace(0, 1, 11)
    side = old.base_size // old.patch_size * math.gcd(old.patch_size, new.patch_size)
    shape, cond = (rows, new.in_channels, side, side), null_condition(new, rows)
    if old.in_channels == new.in_channels:
        generator = torch.Generator().manual_seed(seed)
        gaps = gap(source, target, null_condition(old, rows), cond, times, shape, generator).tolist()
        report["gap"] = {f"t={t:.1f}": value for t, value in zip(times.tolist(), gaps, strict=True)}
        show("relative difference of the outputs on noise, under the null condition", report["gap"])
    if isinstance(source, CCDiT) and isinstance(target, PixArt) and (old.hidden, old.depth) == (new.hidden, new.depth):
        report["r2"] = block_r2(source, target)
        show("R^2 of the modulation over time (1: exact)", report["r2"])
    before, after = trained.prediction, wanted.prediction
    if before is not after and old.in_channels == new.in_channels:
        inner = times[1:-1]  # eps says nothing of x0 at t = 1, x0 nothing of eps at t = 0
        but = " but 1, pure noise" if before.name == "eps" else ""
        x = torch.randn(rows, new.in_channels, *[new.base_size] * 2, generator=generator)
        gaps = retargeting(target, trained, wanted, inner, x, cond)
        report["retargeting"] = {f"t={t:.1f}": gap for t, gap in zip(inner.tolist(), gaps, strict=True)}
        show(RETARGETING.format(before=before.name, after=after.name, but=but), report["retargeting"])
    return report


def retargeting(denoiser: Any, trained: Any, wanted: Any, times: Any, x: Any, cond: Any) -> list[float]:
    """|p - q| / |q| at each time: p what the network says of the same noise, q what it means in the new objective.

    Its answer under the objective it was trained in is split into (x0, eps); of these q is the new target.
    """
    import torch

    from diffusion.objective import Objective

    old, new, gaps = Objective(trained), Objective(wanted), []
    with torch.no_grad():
        for time in times:
            t = time.expand(len(x))
            x0, eps = old.split(denoiser(x, old.network_time(t), cond), x, t)
            meant = new.target(x0, eps, t)
            said = denoiser(new.add_noise(x0, eps, t), new.network_time(t), cond)
            gaps.append(float((said - meant).norm() / meant.norm()))
    return gaps


def show(title: str, values: dict[str, float]) -> None:
    """Print numbers under their names, eleven to a line."""
    print(title)
    for start in range(0, len(values), 11):
        some = list(values.items())[start : start + 11]
        print("  " + " ".join(f"{name:>9}" for name, _ in some))
        print("  " + " ".join(f"{value:9.2g}" for _, value in some))


if __name__ == "__main__":
    main()
