"""Choose how long the weights are averaged after training: a pipeline with another average, out of what a run kept.

python scripts/average.py --run outputs/NAME --width 0.15 --out outputs/NAME-0.15
python scripts/average.py --run outputs/NAME --width 0.05 0.1 0.2 --images 200000 --out outputs/NAME-averages

The run was trained with ema.sigma_rel=[0.05,0.1] and checkpoint.snapshot_every=N. A width is the deviation of the
averaged times over the length of the training, 0.001 to 0.28: 0.1 looks back a tenth (Karras et al., arXiv:2312.02696).
Each pipeline is drawn from, exported and trained on like any other; several widths become folders of --out.
"""

import argparse
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Parse, average; a user's error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--width", required=True, type=float, nargs="+", help="one or several")
    parser.add_argument("--images", type=int, help="as they were after so many (default: the latest kept)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    options = parser.parse_args()
    try:
        for width in options.width:
            out = options.out if len(options.width) == 1 else options.out / f"{width:g}"
            average(options.run, width, options.images, out)
            print(f"wrote {out}, an average of width {width:g}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def average(run: Path, width: float, images: int | None, out: Path) -> None:
    """Combine the snapshots and checkpoints of a run, and publish a pipeline."""
    if out.exists():
        raise ValueError(f"{out} exists already and is never overwritten; move it away or choose another --out")

    from models.folder import numbered, publish
    from models.weights import write_tensors
    from training.ema import combine

    kept = {path.name: path for kind in ("checkpoints", "snapshots") for path in numbered(run / kind)}
    if not kept:
        raise ValueError(f"{run} holds neither snapshots nor checkpoints; give the folder of a run")
    tensors = combine(list(kept.values()), width, images)
    latest = kept[max(kept, key=int)]

    def write(aside: Path) -> None:
        (aside / "denoiser").mkdir()
        write_tensors(tensors, aside / "denoiser", "ema")
        for name in ("pipeline.json", "denoiser/config.json"):
            shutil.copy(latest / name, aside / name)

    publish(out, write)


if __name__ == "__main__":
    main()
