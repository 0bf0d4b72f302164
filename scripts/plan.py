"""What a run will take, before it is paid for: memory, options that fit, time, price and disk. No GPU is needed.

    python scripts/plan.py train_stage3 model=mmdit_2b text=sd3 vae=sd3 data.resolution=1024 --gpus 64 --price 2.5
    python scripts/plan.py train_stage1 model=ccdit_xl2 vae=sdxl data.resolution=256 --gpu 4090 --json plan.json

The first word is a training script, the next are its overrides; the data need not be there. A step is rehearsed on
tensors without numbers, so the memory is that of the operators that will run (training/plan.py says what is left out).
How fast a GPU will be is not foretold but asked for: --mfu, the share of its data sheet's peak that the run reaches.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from training.plan import Plan, Question, Way

ROOT = Path(__file__).parents[1]
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "ema": "EMA",
    "activations": "activations",
    "gathered": "gathered units",
    "text": "text encoders",
    "vae": "autoencoder",
}


def main(arguments: list[str] | None = None) -> None:
    """Compose, plan, and print one screen; a user's error ends it with one sentence."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        found = _plan(options)
    except (ValueError, OSError) as error:
        sys.exit(f"plan.py: {error}")
    if options.json:
        from inference.description import plain

        options.json.write_text(json.dumps(plain(found), indent=1) + "\n")
    from rich.console import Console

    show(found, Console())


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="plan.py", description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", help="train_stage1, train_stage2 or train_stage3")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as the training script takes them")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--gpu", default="h100", help="which, such as h100, a100, 4090 (default h100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak that the run reaches (default 0.4)")
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU for an hour (default 2.5)")
    parser.add_argument("--images", type=int, help="pictures in the data set (default: counted, or a million)")
    parser.add_argument("--ranks", default="8,64,1024", help="over how many to simulate sharding (default 8,64,1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, in bytes and seconds")
    return parser


def _plan(options: argparse.Namespace) -> "Plan":
    name = options.script.removesuffix(".py").removeprefix("train_")
    known = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
    if name not in known:
        raise ValueError(
            f"{options.script} is no training script; choose one of {', '.join(f'train_{n}' for n in known)}"
        )
    from hydra.errors import HydraException  # slow to import, so that --help is not
    from omegaconf.errors import OmegaConfBaseException

    from configs.schema import compose, explain
    from training.plan import Question, plan

    try:
        ranks = [int(number) for number in options.ranks.split(",")]
    except ValueError:
        raise ValueError(
            f"--ranks={options.ranks} must be whole numbers with commas between; choose 8,64,1024"
        ) from None
    question = Question(
        gpus=options.gpus, gpu=options.gpu, mfu=options.mfu, price=options.price, ranks=ranks,
        images=options.images,
    )  # fmt: skip
    try:
        cfg = compose(name, options.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, name)) from error
    return plan(cfg, question)


# --- the screen -------------------------------------------------------------------------------------------


def show(found: "Plan", console: "Console") -> None:
    """One screen."""
    from rich.padding import Padding

    for line in _heading(found):
        console.print(line, highlight=False)
    for note in found.notes:
        console.print(f"[bold yellow]![/] {note}", highlight=False, soft_wrap=False)
    for table in (_memory(found), _fits(found), _sharding(found), _run(found)):
        console.print(Padding(table, (1, 0, 0, 0)))


def _heading(found: "Plan") -> list[str]:
    trained = "" if found.trained == found.parameters else f", {count(found.trained)} of them trained"
    return [
        f"[bold]{found.name}[/]: {found.model}, {count(found.parameters)} parameters{trained};"
        f" {found.resolution} px, {found.tokens:,} tokens; {found.precision}",
        f"batch of {found.batch_size} on {gpus(found.question)}, {count(found.images)} images",
    ]


def _memory(found: "Plan") -> "Table":
    from training.plan import usable

    table = _table(f"A GPU at the peak of a step, {way(found.way)}", "", "GiB", "")
    largest = max(getattr(found.memory, kind) for kind in KINDS)
    for kind, name in KINDS.items():
        if value := getattr(found.memory, kind):
            table.add_row(name, gib(value), f"[cyan]{'█' * round(30 * value / largest)}[/]")
    room = usable(found.card)
    verdict = "[green]fits[/]" if found.total <= room else "[red]does not fit[/]"
    table.add_section()
    table.add_row(
        "[bold]all[/]", f"[bold]{gib(found.total)}[/]", f"{verdict} the {gib(room)} that are usable of {found.card}"
    )
    return table


def _fits(found: "Plan") -> "Table":
    table = _table("The first options that fit, from the fastest", "card", "GiB", "options", "speed by FLOPs")
    for fit in found.fits:
        if fit.way is None:
            table.add_row(
                f"{fit.card} GB", "", "[red]none: choose a smaller model, or more GPUs to share the weights[/]", ""
            )
        else:
            table.add_row(f"{fit.card} GB", gib(fit.total), way(fit.way), f"{fit.speed:.2f}")
    return table


def _sharding(found: "Plan") -> "Table":
    kinds = ("weights", "gradients", "optimizer", "ema", "gathered")
    table = _table("GiB of one rank, sharded, without activations", "ranks", *(KINDS[kind] for kind in kinds), "all")
    for shards, memory in zip(found.shards, found.sharded, strict=True):
        table.add_row(f"{shards.ranks:,}", *(gib(getattr(memory, kind)) for kind in kinds), gib(memory.total))
    return table


def _run(found: "Plan") -> "Table":
    work, disk, question = found.work, found.disk, found.question
    table = _table("The run", "", "")
    text = f", and {flops(work.text)} of text encoders" if work.text else ""
    table.add_row("work of an image", f"{flops(work.denoiser)}{text}")
    table.add_row(
        "speed", f"{work.images_per_s:,.3g} images/s at {question.mfu:.0%} of {work.peak_tflops:,.0f} TFLOP/s a GPU"
    )
    table.add_row("time", f"{duration(work.days)}, {work.gpu_hours:,.4g} GPU hours")
    table.add_row("cost", f"{work.cost:,.{0 if work.cost >= 100 else 2}f} at {question.price:g} a GPU hour")
    pictures = f"{count(disk.images)} pictures" + ("" if disk.counted else ", or as many as --images says")
    stored = f"a latent {size(disk.latents)}"
    if disk.text_float16:
        stored += f", a caption's states at most {size(disk.text_float16)}, {size(disk.text_int8)} in 8 bits"
    table.add_row("data", f"{size(disk.total)} for {pictures}")
    table.add_row("", stored)
    table.add_row("a checkpoint", size(disk.checkpoint))
    return table


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 3, 0, 0), header_style="dim"
    )
    table.show_header = any(columns)
    for column in columns:
        wordy = column in ("", "options", "card")
        table.add_column(column, justify="left" if wordy else "right", no_wrap=not wordy)
    return table


def way(found: "Way") -> str:
    """The options of a way, as they are typed."""
    parallel = "fsdp" if found.shards == found.ranks else "hsdp"
    options = [
        f"train.micro_batch={found.micro_batch}",
        f"train.checkpointing={found.checkpointing.value}" * (found.checkpointing.value != "none"),
        f"train.parallel={parallel}" * (found.shards > 1),
        "optim.kind=adamw8bit" * found.eight_bit,
    ]
    return " ".join(filter(None, options))


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / 2**30:.{2 if value < 10 * 2**30 else 1}f}"


def size(number: float) -> str:
    """Bytes on a disk."""
    for unit, letters in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:,.3g} {letters}"
    return f"{number / 1e3:,.3g} kB"


def flops(number: float) -> str:
    """FLOPs of an image."""
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e11 else f"{number / 1e9:.3g} GFLOP"


def count(number: int) -> str:
    """A number in thousands, millions or billions."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return str(number)


def gpus(question: "Question") -> str:
    """How many GPUs, and which."""
    return f"{question.gpus} {question.gpu.upper()}" + ("" if question.gpus == 1 else "s")


def duration(days: float) -> str:
    """Days in the unit that is read most easily."""
    for size, unit in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= 2 * size:
            return f"{days / size:,.3g} {unit}"
    return f"{days * 86400:,.3g} seconds"


if __name__ == "__main__":
    main()
