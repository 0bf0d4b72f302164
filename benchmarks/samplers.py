"""Every sampler on the committed pipeline: how often pictures show what was asked, and what a picture costs.

    python benchmarks/samplers.py [--count 100] [--out benchmarks/samplers.md]

The prompts name one object of a pair that was held out of training, and the reader of data/shapes.py marks what is
drawn. Two small tables say what a negative prompt and the weight of a word do.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data import shapes
from diffusion.sample import ETA, Sampler
from inference.pipeline import Pipeline

PIPELINE = "assets/shapes/pipeline"
STEPS = (2, 4, 8, 16, 28)
SHOWN = 16  # steps that cost and the small tables are given for
BATCH = 50
SEED = 7  # of the scenes; the checkpoint's evaluation and the tests have others
ALONE = 0.25  # the share of the prompts for dopri5
PICTURES = 64  # for each row of the small tables
ORDER = {
    Sampler.heun: 2,
    Sampler.heun_edm: 2,
    Sampler.dpmpp_2m: 2,
    Sampler.dpmpp_2m_sde: 2,
    Sampler.unipc: 3,
    Sampler.dopri5: 5,
}  # the others have 1


@dataclass(slots=True, kw_only=True)
class Result:
    """Share of pictures all right, evaluations of the network and seconds of one picture."""

    right: float
    evaluations: float
    seconds: float


def measured(pipeline: Pipeline, name: Sampler, steps: int, count: int) -> Result:
    """Draw and mark so many prompts; fewer, and each alone, with dopri5, which chooses its steps for a batch."""
    alone = name is Sampler.dopri5
    count, batch = (few(count), 1) if alone else (count, BATCH)
    scenes = shapes.exam(SEED, count, 1)
    sampler = replace(pipeline.description.sampler, name=name, steps=steps, eta=None)
    pictures, evaluations, start = [], [], time.perf_counter()
    for i in range(0, count, batch):
        prompts = [shapes.prompt(scene) for scene in scenes[i : i + batch]]
        pictures.append(pipeline.generate(prompts, seeds=range(i, i + len(prompts)), sampler=sampler))
        evaluations.append(pipeline.evaluations)
    took = time.perf_counter() - start
    right = shapes.mark(scenes, np.concatenate(pictures))["all"]
    return Result(right=right, evaluations=float(np.mean(evaluations)), seconds=took / count)


def samplers(pipeline: Pipeline, count: int) -> Iterator[str]:
    """Rows of the table."""
    steps = " | ".join(f"{n} steps" for n in STEPS)
    yield f"| sampler | order | fresh noise | {steps} | evaluations at {SHOWN} | seconds a picture at {SHOWN} |"
    yield "|---" * (5 + len(STEPS)) + "|"
    for name in Sampler:
        adaptive = name is Sampler.dopri5
        results = {n: measured(pipeline, name, n, count) for n in ((SHOWN,) if adaptive else STEPS)}
        shares = [f"{results[n].right:.2f}" if n in results else "" for n in STEPS]
        fresh = "yes" if ETA.get(name, 0) else "no"
        shown, label = results[SHOWN], f"{name.name} *" if adaptive else name.name
        cost = f"{shown.evaluations:.0f} | {shown.seconds:.3f}"
        yield f"| {label} | {ORDER.get(name, 1)} | {fresh} | {' | '.join(shares)} | {cost} |"


def negative(pipeline: Pipeline) -> Iterator[str]:
    """What a negative prompt does to the colour that the model likes best."""
    prompt = "a large circle on a white background"
    yield f'| "{prompt}" | pictures with pink |'
    yield "|---|---|"
    for label, said, scale in (
        ("no negative prompt", "", None),
        ('negative "pink", in place of the empty prompt', "pink", None),
        ('negative "pink", a branch of its own, scale 1', "pink", 1.0),
    ):
        yield f"| {label} | {share(pipeline, prompt, 'pink', said, scale):.2f} |"


def weights(pipeline: Pipeline) -> Iterator[str]:
    """What the weight of one of two colours does."""
    prompt = "a large green (red:{}) star on a white background"
    yield f'| "{prompt.format("w")}" | pictures with red |'
    yield "|---|---|"
    for weight in (0.5, 1, 1.5, 2):
        yield f"| w = {weight} | {share(pipeline, prompt.format(weight), 'red'):.2f} |"


def share(pipeline: Pipeline, prompt: str, colour: str, said: str = "", scale: float | None = None) -> float:
    """Of the pictures of a prompt, those in which the reader finds something of a colour."""
    sampler = replace(pipeline.description.sampler, steps=SHOWN, negative_scale=scale)
    seen = []
    for i in range(0, PICTURES, BATCH):
        seeds = range(i, min(i + BATCH, PICTURES))
        pictures = pipeline.generate([prompt] * len(seeds), negative=said, seeds=seeds, sampler=sampler)
        seen += [colour in {thing.colour for thing in shapes.read(picture).things} for picture in pictures]
    return float(np.mean(seen))


def head(pipeline: Pipeline, count: int, out: Path) -> str:
    """What the tables are of, and how sure they are."""
    sampler = pipeline.description.sampler
    device = torch.cuda.get_device_name() if pipeline.device.type == "cuda" else pipeline.device.type.upper()
    low, high = sampler.interval
    return f"""# Samplers

`python benchmarks/samplers.py --count {count} --out {out}`

{device}, {torch.get_num_threads()} threads, torch {torch.__version__}. `{PIPELINE}`: guidance {sampler.guidance:g}
at noise times {low:g} to {high:g}, the objective's grid, each sampler's own eta. Share of {count} one-object prompts
with held-out pairs whose picture is right in everything; standard error {error(0.95, count):.3f} at 0.95 and
{error(0.5, count):.3f} at 0.5. An evaluation is one call of the network, for all branches of guidance; seconds are of
batches of up to {BATCH}, with text and autoencoder.

\\* dopri5 chooses its own steps, to a tolerance of {sampler.tolerance:g}, for a batch as a whole. So it is drawn once,
one picture at a time, for the first {few(count)} prompts: standard error {error(0.95, few(count)):.3f} at 0.95.
"""


def few(count: int) -> int:
    """How many of so many prompts are drawn one at a time."""
    return max(1, round(ALONE * count))


def error(share: float, count: int) -> float:
    """Standard error of a share."""
    return (share * (1 - share) / count) ** 0.5


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="prompts for each sampler and number of steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/samplers.md"))
    args = parser.parse_args()
    pipeline = Pipeline.load(PIPELINE)
    own = pipeline.description.sampler
    below = f"{own.name.name} with eta {own.eta}, {SHOWN} steps, {PICTURES} pictures a row: standard error at most"
    below += f" {error(0.5, PICTURES):.2f}."
    lines = [head(pipeline, args.count, args.out)]
    print(lines[0])
    for part in (samplers(pipeline, args.count), ["", below, ""], negative(pipeline), [""], weights(pipeline)):
        for line in part:
            print(line, flush=True)
            lines.append(line)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
