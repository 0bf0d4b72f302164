"""Carry trained weights over to another model: a checkpoint becomes the start of the next architecture.

    python reparameterize.py --from outputs/stage1 --model pixart_tiny --out outputs/stage1-as-pixart
    python reparameterize.py --from outputs/stage1 --model pixart_tiny model.text_dim=2048 text=sdxl --out ...

It prints what became of every tensor and how far the two networks are apart over time, and writes a folder that
init.from=, the sampler and the app accept. Training with init.from=outputs/stage1 does the same on its way.
The mathematics is in models/surgery.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and carry over; a user's error ends it with one sentence."""
    options = _parser().parse_intermixed_args(arguments)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from configs.schema import explain

    try:
        reparameterize(options)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error, 'train')}")


def reparameterize(options: argparse.Namespace) -> None:
    """Source folder -> surgery -> printed account and comparison -> published folder."""
    from dataclasses import replace

    import torch

    from configs.schema import compose
    from inference.pipeline import Description, find
    from models.ccdit import CCDiT
    from models.folder import publish
    from models.pixart import PixArt
    from models.surgery import block_r2, gap, null_condition, transfer
    from models.weights import load_denoiser, save_denoiser

    for override in options.overrides:
        if not override.startswith(("model.", "text=", "text.", "vae=", "vae.")):
            raise ValueError(f"{override} has no part in this; give model.KEY=VALUE, text=NAME or vae=NAME")
    folder = find(options.source)
    source: Any = load_denoiser(folder / "denoiser", name=options.weights).float()
    theirs = Description.load(folder)
    cfg = compose("train", [f"model={options.model}", "name=reparameterize", *options.overrides])
    torch.manual_seed(options.seed)
    target = cfg.model.build()
    account = transfer(source, target, options.mode, options.anchor)
    print(f"{folder} ({options.weights} weights)", *account.summary(), sep="\n  ")

    report: dict[str, Any] = {
        "from": str(folder),
        "mode": options.mode,
        "anchor": options.anchor,
        "tensors": account.table(),
    }
    same_latents = source.config.in_channels == cfg.model.in_channels
    if same_latents:
        times, rows = torch.linspace(0, 1, 11), 2
        conds = null_condition(source.config, rows), null_condition(cfg.model, rows)
        shape = rows, cfg.model.in_channels, *[cfg.model.base_size] * 2
        gaps = gap(source, target, *conds, times, shape, torch.Generator().manual_seed(options.seed)).tolist()
        report["gap"] = {f"{t:.1f}": value for t, value in zip(times.tolist(), gaps, strict=True)}
        print(
            "relative difference of the outputs on noise, under the null condition", _columns(report["gap"]), sep="\n"
        )
    if isinstance(source, CCDiT) and isinstance(target, PixArt):
        report["r2"] = block_r2(source, target)
        print("R^2 of the modulation over time (1: exact)", _columns(report["r2"]), sep="\n")

    own_text = theirs.text is not None and not any(override.startswith("text") for override in options.overrides)
    description = replace(
        theirs,
        vae=theirs.vae if same_latents else cfg.vae,
        text=None if cfg.model.condition == "class" else theirs.text if own_text else cfg.text,
        num_classes=getattr(cfg.model, "num_classes", None),
    )

    def write(aside: Path) -> None:
        for name in ("model", "ema"):
            save_denoiser(target, aside / "denoiser", name)
        description.save(aside)
        (aside / "account.json").write_text(json.dumps(report, indent=1) + "\n")

    publish(options.out, write)
    print(f"wrote {options.out}; train from it with init.from={options.out}")


def _columns(values: dict[str, float]) -> str:
    return "\n".join(f"  {name:<10} {value:12.3g}" for name, value in values.items())


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="reparameterize.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="model.KEY=VALUE", help="also text=NAME and vae=NAME")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="FOLDER", help="run, checkpoint or exported pipeline"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a file of configs/model")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="pipeline to write; must not exist")
    parser.add_argument(
        "--mode", choices=("anchor", "mean"), default="anchor", help="exact at one time, or nearest over all"
    )
    parser.add_argument("--anchor", type=float, default=0.5, metavar="T", help="that time, in [0, 1] (default: 0.5)")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which of the source's (default: ema)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tensors that start anew (default: 0)")
    return parser


if __name__ == "__main__":
    main()
