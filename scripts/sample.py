"""Draw pictures from a checkpoint.

python scripts/sample.py --checkpoint assets/shapes/pipeline --prompt "a small red circle above a large blue star"
python scripts/sample.py --checkpoint outputs/stage1 --class-id 7 --num-images 4
python scripts/sample.py --checkpoint outputs/stage3 --prompt "a blue star" --init-image star.png --mask mask.png
python scripts/sample.py --checkpoint outputs/stage3 --batch-file prompts.txt --sampler dpmpp_2m --steps 16
python scripts/sample.py --checkpoint outputs/stage3 --settings outputs/pictures/00000-0.png

Every picture is a PNG that carries its settings. What is not given is as the checkpoint says. A batch file has a
prompt in each line or, named .jsonl, an object: prompt or class_id, and negative, seed, num_images, size, steps, ...
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time inside functions: --help need not wait for torch
    from inference.picture import Settings

SAMPLER_KEYS = (
    "steps", "guidance", "negative_scale", "rescale", "interval", "eta", "rho", "ramp_max", "tolerance", "aesthetic",
    "negative_aesthetic",
)  # fmt: skip


def main() -> None:
    """Parse, draw, save PNGs; a user's error ends it with one sentence."""
    options = parser().parse_args()
    gc.disable()  # until all is loaded: of what imports make, nothing is garbage
    try:
        failed = draw(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit("error: " + "\n       ".join([f"{len(failed)} not drawn", *failed]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--checkpoint", required=True, help="run folder, checkpoint, or pipeline, also in diffusers' layout")
    add("--out", type=Path, default=Path("outputs/pictures"), help="folder (default: outputs/pictures)")

    add = made.add_argument_group("what").add_argument
    add("--prompt", action="append", help="with weights (red:1.5), [a:b:0.5], [a|b], AND, BREAK; may be repeated")
    add("--class-id", action="append", type=int, help="for models conditioned on classes; may be repeated")
    add("--batch-file", type=Path, help="prompts, one a line, or .jsonl")
    add("--settings", type=Path, metavar="PNG", help="as this picture says of itself; other options change that")
    add("--negative", help="what to keep away from")
    add("--negative-scale", type=float, help="how far, beside --guidance (default: in place of the empty prompt)")
    add("--num-images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, help="of the first picture; the next ones count up (default: 0)")
    add("--size", metavar="HxW", help="in pixels")

    add = made.add_argument_group("how").add_argument
    add("--sampler", help="euler heun heun_edm ddim ddpm euler_ancestral dpmpp_2m dpmpp_2m_sde unipc ode_euler dopri5")
    add("--grid", help="uniform trailing leading linspace karras exponential")
    add("--steps", type=int)
    add("--guidance", type=float, help="1: none")
    add("--rescale", type=float, help="of the contrast under guidance, 0 to 1")
    add(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise times at which guidance acts, in 0 to 1"
    )
    add("--eta", type=float, help="fresh noise of the stochastic samplers, 0 to 1")
    add("--tolerance", type=float, help="of dopri5")
    add("--aesthetic", type=float, help="score that a refiner is told, 0 to 10 (default: 6)")

    add = made.add_argument_group("from a picture").add_argument
    add("--init-image", type=Path, help="draw over this one")
    add("--strength", type=float, help="how much of it to draw anew, 0 to 1 (default: 0.6; with --mask 1)")
    add("--mask", type=Path, help="white where to paint; the rest stays")

    add = made.add_argument_group("with other weights").add_argument
    add("--weights", default="ema", choices=("ema", "model"))
    add("--refiner", help="checkpoint that draws the last steps")
    add("--handover", type=float, help="share of the steps before it (default: where its training ends, or 0.8)")
    add("--lora", action="append", default=[], metavar="FILE:WEIGHT", help="may be repeated")

    add = made.add_argument_group("machine").add_argument
    add("--batch-size", type=int, default=8, help="pictures at once (default: 8)")
    add("--device", help="cuda, xpu, mps, cpu (default: the best there is)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    add("--offload", default="none", choices=("none", "component", "sequential", "disk"), help="less memory, slower")
    add("--attention-slices", type=int, metavar="QUERIES", help="attend for so many at once: less memory on MPS")
    add("--vae-tiling", action="store_true", help="decode in tiles: less memory, faint seams")
    add("--one-branch-at-a-time", action="store_true", help="of guidance: less memory, slower")
    return made


def draw(options: argparse.Namespace) -> list[str]:
    """Load once, draw everything, say what was written; returns what could not be drawn and why."""
    sampler, image, mask = chosen_sampler(options), None, None
    lines = jobs(options)
    if options.init_image:
        from inference.picture import open_mask, open_picture

        image = open_picture(options.init_image)
        mask = open_mask(options.mask) if options.mask else None
        if options.mask and options.strength is None:
            options.strength = 1.0
    elif options.mask or options.strength is not None:
        raise ValueError("--mask and --strength are about a picture to draw over; give --init-image too")

    from inference.batch import draw_all
    from inference.device import Offload, Precision
    from inference.lora import parse_lora
    from inference.picture import Settings, read_settings, save_picture
    from inference.pipeline import Pipeline

    machine: dict[str, Any] = {"device": options.device, "compute": Precision[options.precision]}
    machine |= {"weights": options.weights, "offload": Offload[options.offload]}
    loras = [parse_lora(text) for text in options.lora]
    pipeline = Pipeline.load(options.checkpoint, loras=loras, **machine)
    refiner = Pipeline.load(options.refiner, **machine) if options.refiner else None
    gc.enable()
    pipeline.attention_slices, pipeline.together = options.attention_slices, not options.one_branch_at_a_time
    if options.vae_tiling:
        pipeline.autoencoder.tile()

    base = Settings(sampler=pipeline.description.sampler)
    if options.settings:
        base = read_settings(options.settings)
    base = replace(
        base,
        sampler=replace(base.sampler, **sampler),
        size=size_of(options.size) or base.size,
        seed=base.seed if options.seed is None else options.seed,
        negative=base.negative if options.negative is None else options.negative,
        strength=(0.6 if options.strength is None else options.strength) if image is not None else 1.0,
        handover=options.handover if refiner else None,
        loras={path.name: weight for path, weight in loras},
        weights=options.weights,
    )
    wanted, failed = asked(base, lines, options.num_images)
    options.out.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[:5]) for path in options.out.glob("[0-9]" * 5 + "-*.png")), default=-1)
    start, drawn = time.perf_counter(), 0
    with Bar(sum(each.sampler.steps for each in wanted)) as bar:
        for settings, picture in draw_all(
            pipeline, wanted, batch_size=options.batch_size, image=image, mask=mask, refiner=refiner, progress=bar.step
        ):
            subject = settings.prompt or f"class {settings.class_id}"
            if isinstance(picture, ValueError):
                failed.append(f"{subject}: {picture}")
                continue
            path = options.out / f"{number + drawn:05d}-{settings.seed}.png"
            save_picture(path, picture, settings)
            bar.say(f"{path}  {subject}")
            drawn += 1
    took = time.perf_counter() - start
    print(f"{drawn} pictures in {took:.1f} s, {pipeline.evaluations} evaluations of the network for the last")
    return failed


def jobs(options: argparse.Namespace) -> list[dict[str, Any] | str]:
    """What each prompt, class or line of the batch file says of itself; a line that cannot be read is a sentence."""
    given = [name for name in ("prompt", "class_id", "batch_file", "settings") if getattr(options, name)]
    if not given or len(set(given) - {"settings"}) > 1:
        raise ValueError("give --prompt, --class-id, --batch-file or --settings, one of them")
    if options.num_images < 1 or options.batch_size < 1:
        raise ValueError("--num-images and --batch-size count pictures; choose 1 or more")
    if options.batch_file:
        return batch_lines(options.batch_file)
    found: list[dict[str, Any] | str] = [{"prompt": prompt} for prompt in options.prompt or []]
    return found + [{"class_id": label} for label in options.class_id or []] or [{}]


def batch_lines(path: Path) -> list[dict[str, Any] | str]:
    """The lines of a batch file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--batch-file {path} cannot be read ({error}); give a text file, a prompt a line") from error
    found: list[dict[str, Any] | str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            found.append(f"{path}:{number} is empty; write a prompt there, or delete the line")
        elif path.suffix != ".jsonl":
            found.append({"prompt": line.strip()})
        else:
            try:
                said = json.loads(line)
            except ValueError as error:
                said = error
            if not isinstance(said, dict):
                said = f'{path}:{number} is no JSON object; write {{"prompt": "..."}}'
            found.append(said)
    return found or [f"{path} has no line; write a prompt in it"]


def asked(base: "Settings", lines: list[dict[str, Any] | str], num_images: int) -> tuple[list["Settings"], list[str]]:
    """Settings of each picture, and what is wrong with the lines that have none. Seeds count up over all pictures."""
    wanted, failed = [], []
    for line in lines:
        if isinstance(line, str):
            failed.append(line)
            continue
        said = dict(line)
        try:
            count, seed = said.pop("num_images", num_images), said.pop("seed", base.seed + len(wanted))
            if not (isinstance(count, int) and isinstance(seed, int)):
                raise ValueError("num_images and seed are whole numbers")
            wanted += [replace(changed(base, said), seed=seed + i) for i in range(count)]
        except ValueError as error:
            failed.append(f"{json.dumps(line)}: {error}")
    return wanted, failed


def changed(base: "Settings", said: dict[str, Any]) -> "Settings":
    """Settings with what a line says in the words of the command line."""
    plain: dict[str, Any] = {}
    how: dict[str, Any] = {}
    for key, value in said.items():
        if isinstance(value, {"prompt": str, "negative": str, "class_id": int}.get(key, ())):
            plain[key] = value
        elif key == "size" and isinstance(value, str):
            plain[key] = size_of(value)
        elif key in ("sampler", "grid", *SAMPLER_KEYS):
            how |= sampler_keys({key: value}, prefix="")
        else:
            known = ", ".join(("prompt", "class_id", "negative", "seed", "num_images", "size", "sampler", "grid"))
            raise ValueError(f"{key}={value} says nothing here; give {known}, {', '.join(SAMPLER_KEYS)}")
    if "class_id" in plain:
        plain.setdefault("prompt", "")
    return replace(base, **plain, sampler=replace(base.sampler, **how))


def chosen_sampler(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplerConfig` that the command line gives."""
    keys = {key: getattr(options, key, None) for key in ("sampler", "grid", *SAMPLER_KEYS)}
    return sampler_keys({key: value for key, value in keys.items() if value is not None}, prefix="--")


def sampler_keys(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Words of the command line as fields of `SamplerConfig`, checked; another sampler has an eta of its own."""
    from diffusion.sample import Sampler
    from diffusion.timesteps import Grid
    from inference.description import SamplerConfig

    fields_of: dict[str, Any] = {"eta": None} if "sampler" in given else {}
    for key, value in given.items():
        choices: Any = {"sampler": Sampler, "grid": Grid}.get(key)
        if choices is not None:
            if value not in choices.__members__:
                raise ValueError(f"{prefix}{key} {value} is unknown; choose one of {', '.join(choices.__members__)}")
            value = choices[value]
        fields_of["name" if key == "sampler" else key] = value
    kinds = {f.name: f.type for f in fields(SamplerConfig)}
    for key, value in fields_of.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        optional = key in ("eta", "negative_scale", "ramp_max") and value is None
        if (
            key not in ("name", "grid", "interval")
            and not optional
            and not (isinstance(value, int) if kinds[key] is int else number)
        ):
            raise ValueError(f"{prefix}{key} {value} is not a number")
    SamplerConfig(**fields_of)
    return fields_of


def size_of(text: str | None) -> list[int] | None:
    """`128x96` as [height, width]."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--size {text} is not HEIGHTxWIDTH in pixels, such as 128x128")
    return [int(height), int(width)]


class Bar:
    """Steps over all pictures, with the rate and the time left, in a terminal; elsewhere nothing."""

    def __init__(self, steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeftColumn

        console = Console(highlight=False, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(), TextColumn("left"))
        self._progress = Progress(
            *columns, TimeLeftColumn(), TextColumn("{task.fields[rate]}"),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=steps, rate="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, pictures: int, _step: int, _x0: object) -> None:
        """One step of so many pictures."""
        self._progress.advance(self._task, pictures)
        speed = self._progress.tasks[0].speed
        self._progress.update(self._task, rate=f"{speed:.1f} steps/s" if speed else "")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, markup=False)


if __name__ == "__main__":
    main()
