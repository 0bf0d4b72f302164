"""Prepare a data set for training: pictures are encoded once, here, and training reads their latents.

    python scripts/prepare.py shapes --resolution 64 --images 20000
    python scripts/prepare.py shapes --resolution 64 --two 0 --out datasets/shapes-64-one

Running the same command again does nothing; an interrupted one starts afresh.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and prepare what it asks for; a user's error ends it with one sentence."""
    options = _parser().parse_args(arguments)
    try:
        _shapes(options)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sets = parser.add_subparsers(title="data sets", dest="data", required=True)
    shapes = sets.add_parser(
        "shapes",
        help="captioned coloured shapes, drawn on the spot",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shapes.add_argument(
        "--out", help="folder to write (default: datasets/shapes-RESOLUTION)", default=argparse.SUPPRESS
    )
    shapes.add_argument("--resolution", type=int, default=64, help="side of the pictures in pixels")
    shapes.add_argument("--images", type=int, default=20_000, help="how many pictures")
    shapes.add_argument(
        "--two", type=float, default=0.5, metavar="SHARE", help="share of pictures with two things; 0 for classes"
    )
    shapes.add_argument("--seed", type=int, default=0, help="names the endless list of scenes")
    shapes.add_argument("--vae", default="assets/shapes", metavar="PATH", help="folder or hub name with a vae/ in it")
    shapes.add_argument("--text", default="assets/shapes", metavar="PATH", help="the same for the text encoders")
    shapes.add_argument("--text-states", action="store_true", help="store the text states of all captions too")
    shapes.add_argument("--overwrite", action="store_true", help="replace another data set in the folder")
    return parser


def _shapes(options: argparse.Namespace) -> None:
    out = getattr(options, "out", f"datasets/shapes-{options.resolution}")

    # slow to import, so that --help is not
    import torch

    from models.autoencoder import AutoencoderConfig
    from models.text import TextConfig
    from prepare.shapes import prepare_shapes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderConfig(path=options.vae).build().to(device)
    text = TextConfig(path=options.text).build().to(device) if options.text_states else None
    with _progress(options.images) as progress:
        written = prepare_shapes(
            out,
            resolution=options.resolution,
            num_images=options.images,
            seed=options.seed,
            vae=vae,
            text=text,
            two=options.two,
            device=device,
            overwrite=options.overwrite,
            progress=progress,
        )
    if written:
        print(f"{out} holds {options.images} pictures. Train on it with data.path={out}")
    else:
        print(f"{out} is already prepared, with the same settings. Nothing to do")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, ten plain lines elsewhere; yields a function that is told how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, begin, told = Console(), time.monotonic(), 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, rate="")

        def progress(done: int) -> None:
            nonlocal told
            rate = done / (time.monotonic() - begin)
            bar.update(task, completed=done, rate=f"{rate:.0f} images/s")
            if not console.is_terminal and done * 10 // total > told:
                told = done * 10 // total
                print(f"{done}/{total} images, {rate:.0f} images/s, {(total - done) / rate:.0f} s left", flush=True)

        yield progress


if __name__ == "__main__":
    # Python put scripts/ here, where `import prepare` would find this very file and not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
