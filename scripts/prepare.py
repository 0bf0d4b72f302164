"""Prepare a data set for training: pictures are encoded once, here, and training reads their latents.

    python scripts/prepare.py run pipeline=web out=datasets/web 'source.paths=[table.parquet]'      # a table of URLs
    python scripts/prepare.py run pipeline=images out=datasets/mine 'source.paths=[folder]' vae=sdxl # as they are
    python scripts/prepare.py run pipeline=captioned out=... 'source.paths=[...]' caption.url=http://127.0.0.1:8000/v1
    python scripts/prepare.py report out=datasets/web 'source.paths=[table.parquet]'                # what became of all
    python scripts/prepare.py shapes --resolution 64 --images 20000                                 # the embedded set

`run` does every step of configs/pipeline/NAME.yaml; metadata, filter, download, dedup, caption and encode do one. The
same command goes on where it was stopped, and does nothing twice. docs/data.md has it all on one page.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STEPS = ("metadata", "filter", "download", "dedup", "caption", "encode")
HELP = {
    "run": "all steps of a pipeline",
    "metadata": "tables of URLs, in our columns",
    "filter": "leave out by what the tables say",
    "download": "fetch the pictures",
    "dedup": "leave out what is there twice",
    "caption": "have a vision model describe them",
    "encode": "pictures and captions to latent shards",
    "report": "what became of every row",
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and prepare what it asks for; a user's error ends it with one sentence."""
    options = _parser().parse_args(arguments)
    try:
        if options.data == "shapes":
            _shapes(options)
        elif options.data == "practice":
            _practice(options)
        else:
            _pipeline(options)
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
    sets = parser.add_subparsers(title="what to do", dest="data", required=True, metavar="COMMAND")
    for name, about in HELP.items():
        command = sets.add_parser(name, help=about, description=f"{about}; keys are those of configs/prepare.yaml")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as out=datasets/mine")
        command.add_argument("--cfg", action="store_true", help="print all keys and their values, and do nothing")
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
    practice = sets.add_parser(
        "practice",
        help="pictures with captions, and a table of their addresses, to try all this on",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    practice.add_argument("--out", default="practice", help="folder to write")
    practice.add_argument("--images", type=int, default=200, help="how many pictures")
    practice.add_argument("--address", default="http://127.0.0.1:8000", help="where the folder will be served")
    return parser


def _practice(options: argparse.Namespace) -> None:
    from prepare.shapes import draw_pictures  # slow to import, so that --help is not

    table = draw_pictures(options.out, options.images, options.address)
    print(f"{options.out} holds {options.images} pictures with captions, and {table} their addresses")


def _pipeline(options: argparse.Namespace) -> None:
    from hydra.errors import HydraException  # slow to import, so that --help is not
    from omegaconf.errors import OmegaConfBaseException

    from configs.schema import compose_preparation, explain

    try:
        config = compose_preparation(options.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, "prepare")) from error

    import yaml

    from inference.description import plain
    from prepare import pipeline

    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    if options.cfg:
        print(text, end="")
        return
    if options.data == "report":
        _show(pipeline.report(config))
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.yaml").write_text(text)
    only = None if options.data == "run" else pipeline.Step(options.data)
    about = pipeline.prepare(config, only, _watch)
    _show(about)
    made = [step["step"] for step in about["steps"] if step["step"].isdigit()]
    for resolution in made if only in (None, pipeline.Step.encode) else []:
        print(f"Train on it with data=shards data.path={config.folder / resolution} data.resolution={resolution}")


def _show(report: dict[str, Any]) -> None:
    """The account of all steps as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['out']}, of {', '.join(report['source'])}", title_justify="left")
    table.add_column("step")
    table.add_column("given", justify="right")
    table.add_column("kept", justify="right")
    table.add_column("left out, and why")
    for step in report["steps"]:
        reasons = sorted(step["dropped"].items(), key=lambda item: -item[1])
        said = [f"{reason} {count:,}" for reason, count in reasons]
        said += [f"({reason} {count:,}, kept)" for reason, count in step["noted"].items()]
        table.add_row(step["step"], f"{step['given']:,}", f"{step['kept']:,}", ", ".join(said))
    Console().print(table)


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
    with _watch("", options.images) as tick:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            tick(count - done)
            done = count

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
def _watch(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, some plain lines elsewhere; yields a function that is told how many more are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, begin, done, said = Console(), time.monotonic(), 0, 0.0
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{name:12}" if name else "", total=total, rate="")

        def tick(count: int) -> None:
            nonlocal done, said
            before, done = done, done + count
            took = max(time.monotonic() - begin, 1e-9)
            rate = done / took
            bar.update(task, completed=done, rate=f"{rate:,.0f} images/s")
            if console.is_terminal:
                return
            if total and before * 10 // total < done * 10 // total:
                left = f", {(total - done) / rate:.0f} s left"
                print(f"{name} {done:,}/{total:,} images, {rate:,.0f} images/s{left}".strip(), flush=True)
            elif not total and took > said + 10:
                said = took
                print(f"{name} {done:,} images, {rate:,.0f} images/s", flush=True)

        yield tick
        bar.update(task, total=done)


if __name__ == "__main__":
    # Python put scripts/ here, where `import prepare` would find this very file and not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
