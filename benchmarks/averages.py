"""Which length of average draws best: the exam with averages of many widths, made after training of what a run kept.

    python benchmarks/averages.py "outputs/compare/scratch/base/0" --widths 0.02 0.05 0.1 0.15 0.2

The run had ema.sigma_rel=[0.05,0.1] and checkpoint.snapshot_every=N; beside them its last weights and its own average.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.compare import score
from inference.description import Description, find
from models.weights import read_tensors, write_tensors
from scripts.average import average


def accuracies(run: Path, widths: list[float]) -> dict[str, float]:
    """Share of the exam that is right, by what was averaged."""
    newest = find(run)
    about = Description.load(newest)
    size = (about.resolution, about.resolution)
    found = {"its own average": score(newest, about.sampler, size)}
    with tempfile.TemporaryDirectory() as temporary:
        last = Path(temporary) / "last"
        shutil.copytree(newest, last, ignore=shutil.ignore_patterns("manifest.json", "ema*", "optim*", "training*"))
        write_tensors(read_tensors(newest / "denoiser", "model"), last / "denoiser", "ema")
        found["the last weights"] = score(last, about.sampler, size)
        for width in widths:
            out = Path(temporary) / f"{width:g}"
            average(run, width, None, out)
            found[f"width {width:g}"] = score(out, about.sampler, size)
    return found


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--widths", nargs="+", type=float, default=[0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.28])
    options = parser.parse_args()
    each = [accuracies(run, options.widths) for run in options.runs]
    for name in each[0]:
        values = [accuracy[name] for accuracy in each]
        print(f"{name:20} {sum(values) / len(values):.3f}   {' '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
