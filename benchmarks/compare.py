"""Which choices pay: short trainings on the shapes that differ in one thing, with several seeds.

    python benchmarks/compare.py transitions            train what is missing, print the table, draw the plot
    python benchmarks/compare.py optimizers --table     the table of what there is
    python benchmarks/compare.py optimizers --time      what an image costs; the machine should be idle

Most begin with a stage 1 of the demo (`make demo`, or --start), and go on for some thousand images with a constant
rate; checkpoints on the way take the exam, of 252 labels or 200 held-out prompts, with the averaged weights. Each
training is a process with one thread, so that results do not depend on what else runs, and one that was killed goes on
where it was.

"Images saved" is the length at which the base would be as good as the variant, over the variant's own length, a mean
over the exams where that can be said: 2 means that the base needs twice as many images.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
OUT = ROOT / "outputs" / "compare"


@dataclass(slots=True, kw_only=True)
class Variant:
    """One thing done differently.

    `start` is where it begins: "" nowhere, START the common start, else the end of a variant, or of STUDY/VARIANT. `of`
    is the variant that it is compared with. `just_after` are words of `reparameterize.py` that make of the start what
    the training begins with, which takes the exam too. `exams` are other lengths than the study's.
    """

    name: str
    settings: list[str] = field(default_factory=list)
    start: str = "START"
    of: str = "base"
    just_after: list[str] | None = None
    distil: int = 0  # images of `benchmarks/distil.py` before, which count
    exams: list[int] | None = None


@dataclass(slots=True, kw_only=True)
class Study:
    """A command, the images after which there is an exam, and what is compared.

    `level` is the accuracy that a training is to come back to; None is what the start has under the same sampler.
    """

    title: str
    command: list[str]
    exams: list[int]
    variants: list[Variant]
    prepare: list[list[str]] = field(default_factory=list)
    level: float | None = None

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def lengths(self, name: str) -> list[int]:
        """After how many images a variant takes the exam."""
        return self.variant(name).exams or self.exams


SHAPES = ["scripts/prepare.py", "shapes", "--resolution", "64", "--images", "20000", "--two", "0"]
CAPTIONED = [
    "scripts/prepare.py", "shapes", "--resolution", "128", "--images", "12000", "--two", "0.1", "--text-states",
    "--out", "datasets/captioned-128",
]  # fmt: skip
LARGE = [
    "scripts/prepare.py", "shapes", "--resolution", "128", "--images", "6000", "--two", "0", "--out",
    "datasets/labelled-128",
]  # fmt: skip
SMALL = [
    "train_stage1.py", "sampler=euler", "sampler.steps=12", "sampler.guidance=2", "evaluate.count=0",
    "train.batch_size=32", "train.log_every=1000", "sample.every=10000000", "sample.first=10000000",
    "checkpoint.keep=1", "ema.halflife=1000", "ema.rampup=0.1", "optim.lr=1e-3", "optim.warmup=500", "optim.final=1",
]  # fmt: skip
FLOW = [*SMALL, "objective=flow"]
TEXT = "model=pixart_tiny"
SLOWLY = [*SMALL, "optim.lr=3e-4", "optim.warmup=2000", "ema.halflife=2000"]
LONG = [
    "experiment=demo/stage1", "optim.final=0.01", "optim.lr=5e-3", "optim.warmup=3000", "ema.halflife=4000",
    "sampler.name=ddim", "sampler.eta=1", "align=none", "optim=adamw",
]  # fmt: skip
WIDTHS = ["ema.sigma_rel=[0.05,0.1]", "checkpoint.every=4096", "checkpoint.snapshot_every=4096"]
FLOWING = "transitions/eps to flow"  # where that training has ended
ROUTED = ["model.route=0.5", "model.route_blocks=[1,4]"]
FINE = ["model.patch_size=1"]  # four times as many tokens


def rates(name: str, settings: list[str], *tried: str) -> list[Variant]:
    """One kind of optimizer with several learning rates."""
    return [Variant(name=f"{name} {lr}", settings=[*settings, f"optim.lr={lr}"]) for lr in tried]


def changed(name: str, *settings: str, start: str = "START", distil: int = 0) -> Variant:
    """The same network with other settings: drawn from just after the change, and trained on."""
    after = ["model=ccdit_tiny", *settings]
    return Variant(name=name, settings=[*settings], just_after=after, start=start, distil=distil, of="")


STUDIES = {
    "optimizers": Study(
        title="Optimizers, from noise prediction to flow",
        command=FLOW,
        exams=[1024, 2048, 4096],
        prepare=[SHAPES],
        variants=[
            Variant(name="base"),
            *rates("adamw", [], "5e-4", "2e-3", "4e-3"),
            *rates("adamw8bit", ["optim=adamw8bit"], "1e-3"),
            *rates("adafactor", ["optim=adafactor"], "2.5e-3", "1e-2"),
            *rates("muon", ["optim=muon"], "1e-3", "2e-3", "4e-3", "8e-3"),
            *rates("schedule_free", ["optim=schedule_free"], "1e-3", "4e-3"),
            *rates("bf16 weights", ["optim.weights=bf16", "train.precision=bf16"], "1e-3"),
        ],
    ),
    "efficiency": Study(
        title="Recipes for efficiency, from noise prediction to flow",
        command=FLOW,
        exams=[1024, 2048, 4096],
        prepare=[SHAPES],
        variants=[
            Variant(name="base"),
            Variant(name="muon", settings=["optim=muon", "optim.lr=2e-3"]),
            Variant(name="TREAD, half of the tokens", settings=ROUTED),
            Variant(name="REPA", settings=["align=shapes"]),
            Variant(name="contrastive flow matching", settings=["objective.contrast=0.05"]),
            Variant(name="uniform times", settings=["objective.times=uniform"]),
            Variant(name="v", settings=["objective=v", "objective.weighting=none"], of="v"),
            Variant(name="v, Min-SNR 5", settings=["objective=v"], of="v"),
            Variant(name="averages kept", settings=["ema.sigma_rel=[0.05,0.1]", "checkpoint.snapshot_every=1024"]),
        ],
    ),
    "scratch": Study(
        title="Recipes for efficiency, from scratch",
        command=[*FLOW, *LONG],
        exams=[16384, 32768, 65536],
        prepare=[SHAPES],
        variants=[
            Variant(name="base", start="", settings=WIDTHS),
            Variant(name="muon", start="", settings=["optim=muon"]),
            Variant(name="muon, rate 2e-3", start="", settings=["optim=muon", "optim.lr=2e-3"]),
            Variant(name="muon and REPA", start="", settings=["optim=muon", "align=shapes"]),
            Variant(name="TREAD, half of the tokens", start="", settings=ROUTED),
            Variant(name="REPA", start="", settings=["align=shapes"]),
            Variant(name="contrastive flow matching", start="", settings=["objective.contrast=0.05"]),
            Variant(name="uniform times", start="", settings=["objective.times=uniform"]),
            Variant(name="64 tokens", start="", settings=FINE, of="64 tokens"),
            Variant(name="64 tokens, TREAD", start="", settings=[*FINE, *ROUTED], of="64 tokens"),
        ],
    ),
    "transitions": Study(
        title="From one objective to another",
        command=SLOWLY,
        exams=[1024, 2048, 4096, 8192, 16384],
        prepare=[SHAPES],
        variants=[
            changed("eps to v", "objective=v"),
            changed("eps to v, told the index", "objective=v", "objective.network_time=index"),
            changed("eps to flow", "objective=flow"),
            changed("eps to flow, told the index", "objective=flow", "objective.network_time=index"),
            changed("eps to flow, distilled first", "objective=flow", distil=1024),
            changed("eps to v to flow", "objective=flow", start="eps to v"),
        ],
    ),
    "architecture": Study(
        title="From classes to text",
        command=[
            "train_stage3.py", "experiment=demo/stage3", "align=none", "optim=adamw", "sampler.steps=20",
            "evaluate.count=0", "checkpoint.keep=1", "sample.every=10000000", "sample.first=10000000",
            "data.path=datasets/captioned-128",
        ],
        exams=[8192, 16384, 32768, 65536],
        prepare=[CAPTIONED],
        level=0.5,
        variants=[
            Variant(name="anchor", settings=["init.mode=anchor"], just_after=[TEXT, "mode=anchor"], of=""),
            Variant(name="mean", settings=["init.mode=mean"], just_after=[TEXT, "mode=mean"], of=""),
            Variant(name="new trunk", start="", of=""),
        ],
    ),
    "resolution": Study(
        title="From 64 to 128 px",
        command=[*FLOW, *LONG, "objective.shift=2", "data.resolution=128", "data.path=datasets/labelled-128"],
        exams=[8192, 16384, 32768],
        prepare=[LARGE],
        level=0.5,
        variants=[
            changed("positions kept in range", "objective=flow", "objective.shift=2", start=FLOWING),
            changed("positions counted on", "objective=flow", "objective.shift=2", "model.base_size=16", start=FLOWING),
            changed(
                "patches enlarged", "objective=flow", "objective.shift=2", "model.patch_size=4", "model.base_size=16",
                start=FLOWING,
            ),
            Variant(name="from scratch", start="", of="", exams=[16384, 32768]),
        ],
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Training:
    """One process: a variant and a seed."""

    study: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"compare/{self.study}/{self.variant.replace(' ', '-').replace(',', '')}/{self.seed}"

    @property
    def folder(self) -> Path:
        return ROOT / "outputs" / self.name

    def taken(self, images: int) -> int:
        """Images in all after so many of the training itself."""
        return STUDIES[self.study].variant(self.variant).distil + images

    def accuracies(self) -> dict[int, float]:
        """By images seen; empty until the training has ended once."""
        path = self.folder / "accuracies.json"
        return {int(n): value for n, value in json.loads(path.read_text()).items()} if path.is_file() else {}


def trainings(name: str, seeds: int) -> list[Training]:
    """All of a study, those of the first seed first, so that a table has every row early."""
    return [Training(name, variant.name, seed) for seed in range(seeds) for variant in STUDIES[name].variants]


def command(training: Training, start: Path) -> list[str]:
    """What trains it."""
    study = STUDIES[training.study]
    variant = study.variant(training.variant)
    lengths = study.lengths(training.variant)
    own = [f"name={training.name}", f"seed={training.seed}", f"train.images={lengths[-1]}"]
    every = lengths[0]
    saves = [f"checkpoint.every={every}", f"checkpoint.keep_every={every}"]
    return [sys.executable, *study.command, *saves, *variant.settings, *begin(training, start), *own]


def begin(training: Training, start: Path, distilled: bool = True) -> list[str]:
    """`init.from` of a training, or of what is distilled before it."""
    variant = STUDIES[training.study].variant(training.variant)
    before, distil = variant.start, variant.distil
    if not before:
        return []
    if distil and distilled:
        return [f"init.from={training.folder / 'distilled'}"]
    if before == "START":
        return [f"init.from={start}"]
    study, name = before.split("/") if "/" in before else (training.study, before)
    return [f"init.from={Training(study, name, training.seed).folder}"]


def alone() -> dict[str, str]:
    """The environment of a process of one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def train(training: Training, start: Path) -> None:
    """Train to the end and take the exams, unless that was done."""
    lengths = STUDIES[training.study].lengths(training.variant)
    if {training.taken(images) for images in lengths} <= training.accuracies().keys():
        return
    training.folder.mkdir(parents=True, exist_ok=True)
    examine = [sys.executable, __file__, training.study, "--exam", training.variant, "--seed", str(training.seed)]
    steps = [command(training, start), [*examine, "--start", str(start)]]
    variant = STUDIES[training.study].variant(training.variant)
    if variant.distil and not (training.folder / "distilled").is_dir():
        source = begin(training, start, distilled=False)[0].removeprefix("init.from=")
        settings = [*STUDIES[training.study].command[1:], *variant.settings, f"seed={training.seed}"]
        out = ["--images", str(variant.distil), "--out", str(training.folder / "distilled")]
        steps.insert(0, [sys.executable, "benchmarks/distil.py", source, *settings, *out])
    with (training.folder / "log.txt").open("w") as log:
        for step in steps:
            code = subprocess.call(step, cwd=ROOT, env=alone(), stdout=log, stderr=subprocess.STDOUT)
            if code:
                print(f"{training.name} ended with {code}: see {training.folder / 'log.txt'}", flush=True)
                return
    print(f"{time.strftime('%H:%M')}  {training.name}  {training.accuracies()}", flush=True)


def score(path: Path, sampler: Any, size: tuple[int, int]) -> float:
    """Share of the exam that a checkpoint's averaged weights draw right: of labels, or of held-out prompts."""
    import torch

    from data import shapes
    from inference.pipeline import Pipeline
    from training.evaluate import draw

    torch.set_num_threads(1)
    pipeline = Pipeline.load(path)
    known = [shapes.PAIRS.index(pair) for pair in shapes.TRAIN_PAIRS]
    ids, scenes = [known[i % len(known)] for i in range(252)], shapes.exam(1234, 200, 1)
    if pipeline.description.num_classes is None:
        prompts = [shapes.prompt(scene) for scene in scenes]
        drawn = draw(pipeline, range(1234, 1234 + len(scenes)), prompts=prompts, sampler=sampler, size=size)
        return shapes.mark(scenes, drawn)["all"]
    drawn = draw(pipeline, range(1234, 1234 + len(ids)), class_ids=ids, sampler=sampler, size=size)
    return shapes.mark_classes(ids, drawn)


def examine(training: Training, start: Path) -> None:
    """The exam at every length, and at none if there was a start; checkpoints but the last are removed then."""
    from inference.description import Description, find

    study = STUDIES[training.study]
    variant, lengths = study.variant(training.variant), study.lengths(training.variant)
    about = Description.load(find(training.folder))
    size = (about.resolution, about.resolution)
    found = training.accuracies()  # of shorter lengths, if it has gone on since
    if variant.just_after is not None and not found:
        became = training.folder / "just-after"
        if not became.is_dir():
            source = begin(training, start, distilled=False)[0].removeprefix("init.")
            subprocess.run(
                [sys.executable, "reparameterize.py", source, *variant.just_after, f"out={became}"],
                cwd=ROOT, env=alone(), check=True,
            )  # fmt: skip
        found[0] = score(became, about.sampler, size)
    if variant.distil and variant.distil not in found:
        found[variant.distil] = score(training.folder / "distilled", about.sampler, size)
    for images in lengths:
        if training.taken(images) not in found:
            path = training.folder / "checkpoints" / str(images)
            found[training.taken(images)] = score(path, about.sampler, size)
    (training.folder / "accuracies.json").write_text(json.dumps(found) + "\n")
    for images in range(lengths[0], lengths[-1], lengths[0]):
        shutil.rmtree(training.folder / "checkpoints" / str(images), ignore_errors=True)


def level(name: str, start: Path) -> float:
    """What a training is to come back to: the study's, or what its start draws right with the same sampler."""
    from configs.schema import compose
    from inference.description import Description, find

    study, path = STUDIES[name], OUT / name / "before.json"
    if study.level is not None:
        return study.level
    if not path.is_file():
        sampler, size = compose("stage1", study.command[1:]).sampler, Description.load(find(start)).resolution
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(score(start, sampler, (size, size))) + "\n")
    return json.loads(path.read_text())


def costs(name: str, start: Path, only: list[str] | None, rounds: int = 5, images: int = 640) -> dict[str, float]:
    """Seconds an image of each variant, all in turns: the median over rounds of a short training's own clock."""
    found: dict[str, list[float]] = {v.name: [] for v in STUDIES[name].variants if not only or v.name in only}
    for turn in range(rounds):
        for variant in found:
            training = Training(name, variant, 1000 + turn)
            extra = [f"train.images={2 * images}", f"train.log_every={images}", "checkpoint.every=10000000"]
            line = [*command(training, start), *extra, "checkpoint.keep_every=null", "checkpoint.snapshot_every=null"]
            subprocess.run(line, cwd=ROOT, env=alone(), check=True, stdout=subprocess.DEVNULL)
            lines = map(json.loads, (training.folder / "metrics.jsonl").read_text().splitlines())
            rates = [line["images_per_s"] for line in lines if line["kind"] == "train"]
            found[variant].append(1 / rates[-1])  # the first has the start in it
            shutil.rmtree(training.folder)
    return {variant: statistics.median(seconds) for variant, seconds in found.items()}


def equivalent(accuracy: float, curve: dict[int, float]) -> float:
    """Images at which a base of this curve is as accurate, by lines over the logarithm; NaN beyond its ends."""
    images, values = np.log([n for n in curve if n]), np.maximum.accumulate([a for n, a in curve.items() if n])
    if not values[0] <= accuracy <= values[-1]:
        return math.nan
    return float(np.exp(np.interp(accuracy, values, images)))


def curves(name: str, seeds: int) -> dict[str, dict[int, list[float]]]:
    """Accuracies by variant and images, one for each seed that has ended."""
    found: dict[str, dict[int, list[float]]] = {}
    for training in trainings(name, seeds):
        for images, value in training.accuracies().items():
            found.setdefault(training.variant, {}).setdefault(images, []).append(value)
    return found


def table(name: str, seeds: int, start: Path) -> str:
    """Markdown: accuracy after so many images with its deviation over seeds, and what is saved or needed."""
    study, path, found = STUDIES[name], ROOT / "benchmarks" / f"{name}.json", curves(name, seeds)
    told: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    seconds = told.get("seconds_an_image", {})
    lengths = sorted({images for curve in found.values() for images in curve})
    ratios_wanted = compared(name)
    wanted = math.nan if ratios_wanted else level(name, start)
    extra = ["images saved", "time an image", "time saved"] if ratios_wanted else [f"images to {wanted:.2f}"]
    lines = [row(["", "seeds", *(f"{n:,}" for n in lengths), *extra]), row(["---"] * (2 + len(lengths) + len(extra)))]
    for variant in study.variants:
        if variant.name not in found:
            continue
        curve = found[variant.name]
        means = {n: statistics.mean(values) for n, values in sorted(curve.items())}
        if ratios_wanted:
            base = {n: statistics.mean(values) for n, values in sorted(found.get(variant.of, {}).items())}
            saved = math.nan
            if base and variant.of != variant.name:
                ratios = [equivalent(means[n], base) / n for n in means if n]
                saved = float(np.exp(np.nanmean(np.log(ratios)))) if not np.isnan(ratios).all() else math.nan
            cost = seconds.get(variant.name, math.nan) / seconds.get(variant.of, math.nan)
            last = [number(saved), number(cost), number(saved / cost)]
        else:
            last = [reached(means, wanted)]
        cells = [spread(curve[n]) if n in curve else "" for n in lengths]
        lines.append(row([variant.name, str(len(next(iter(curve.values())))), *cells, *last]))
    return "\n".join(lines)


def compared(name: str) -> bool:
    """Whether a study sets variants beside a base, rather than asking when they are back at a level."""
    return any(variant.of for variant in STUDIES[name].variants)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    """Mean and deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else ""


def reached(curve: dict[int, float], level: float) -> str:
    """After how many images a level is reached, in words."""
    last = max(curve)
    if curve.get(0, 0) >= level:
        return "0"
    images = equivalent(level, curve)
    if math.isfinite(images):
        return f"{images:,.0f}"
    return f"under {min(n for n in curve if n):,}" if curve[last] >= level else f"over {last:,}"


def plot(name: str, seeds: int, path: Path, start: Path) -> None:
    """Accuracy over images, a line a variant with every seed's points, and the level before as a dashed one, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}
    from matplotlib import pyplot

    study = STUDIES[name]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for variant, curve in curves(name, seeds).items():
        lengths = sorted(curve)
        (line,) = axes.plot(lengths, [statistics.mean(curve[n]) for n in lengths], label=variant, linewidth=2)
        for n in lengths:
            axes.plot([n] * len(curve[n]), curve[n], ".", color=line.get_color(), alpha=0.4, markersize=5)
    if not compared(name):
        wanted, kind = level(name, start), "to be reached" if study.level else "before"
        axes.axhline(wanted, color="grey", linestyle="--", linewidth=1, label=f"{wanted:.2f}, {kind}")
    axes.set_xscale("symlog", base=2, linthresh=study.exams[0])
    lengths = sorted({0, *(images for variant in study.variants for images in study.lengths(variant.name))})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    begun = any(variant.start for variant in study.variants)
    axes.set(xlabel="images after the change" if begun else "images", ylabel="accuracy", ylim=(0, 1), title=study.title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread at once")
    parser.add_argument("--only", nargs="*", help="names of variants; all by default")
    parser.add_argument("--start", type=Path, default=ROOT / "outputs/demo/stage1", help="what to begin with")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="measure what an image costs instead")
    parser.add_argument("--exam", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    study = STUDIES[args.study]
    if args.exam:
        examine(Training(args.study, args.exam, args.seed), args.start)
        return
    if args.time:
        measured = {"seconds_an_image": costs(args.study, args.start, args.only)}
        (ROOT / "benchmarks" / f"{args.study}.json").write_text(json.dumps(measured, indent=1) + "\n")
    elif not args.table:
        if not args.start.is_dir():
            parser.error(f"--start {args.start} is not there; `make demo` makes it")
        for preparation in study.prepare:
            subprocess.run([sys.executable, *preparation], cwd=ROOT, check=True)
        wanted = [t for t in trainings(args.study, args.seeds) if not args.only or t.variant in args.only]
        names = {variant.name for variant in study.variants}
        for seed in range(args.seeds):
            for later in (False, True):  # a variant may begin with the end of another of its seed
                group = [t for t in wanted if t.seed == seed and (study.variant(t.variant).start in names) == later]
                with ThreadPoolExecutor(args.jobs) as pool:
                    list(pool.map(lambda training: train(training, args.start), group))
    print(table(args.study, args.seeds, args.start))
    plot(args.study, args.seeds, OUT / f"{args.study}.svg", args.start)


if __name__ == "__main__":
    main()
