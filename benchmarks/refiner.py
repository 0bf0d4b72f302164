"""What a refiner is worth on shapes of 128 px: a specialist of low noise, and one that is told aesthetic scores.

    OMP_NUM_THREADS=1 python benchmarks/refiner.py [--out benchmarks/refiner.md] [--work outputs/refiner]

First a PixArt trained further from the committed pipeline at noise times up to 0.36 alone. Then a small UNet that reads
a score, on pictures half of which are stained and scored 4 where the others have 7; the base that it goes on from was
trained on the same pictures without their scores, so it draws both kinds. Sharpness is the PSNR of a drawn picture to
the render of what the reader of data/shapes.py finds on it: edges, flat colours and nothing besides.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from configs.schema import compose
from data import shapes
from data.draws import noise
from data.shards import ShardWriter
from diffusion.sample import Sampler
from inference.description import SamplerConfig
from inference.pipeline import Pipeline
from models.autoencoder import Autoencoder, AutoencoderConfig
from training.run import run

BASE = "assets/shapes/pipeline"
SIDE, TOP = 128, 0.36  # pixels; the noise time up to which refiners are trained
TRAINED, HELD = 1000, 100  # pictures to train on, and to measure with
STAIN = 25  # of 255: deviation of a stain, on the worse half
SCORES = 7.0, 4.0  # of a picture as it is, and of a stained one
FAR = 60  # in RGB: from where on a colour is another one
DRAWN = 120  # pictures for each row
TRAIN = [
    "train.batch_size=32", "train.log_every=1600", "train.images=4800", "optim.warmup=480", "ema.halflife=1000",
    "ema.rampup=0.1", "sample.every=1000000", "sample.first=1000000", "checkpoint.every=1000000", "evaluate.count=0",
]  # fmt: skip
UNET = [
    "model=unet_tiny", "model.base_size=16", "model.channels=[32,64]", f"model.vector_dim={128 + 5 * 256}",
    "train.batch_size=8", "train.images=6400", "optim.lr=1e-3",
]  # fmt: skip

HEAD = """# Refiner

`OMP_NUM_THREADS=1 python benchmarks/refiner.py --out benchmarks/refiner.md`: shapes of 128 px, a PixArt of 2.8 M as
base, Euler. +- is a standard error over pictures.
"""
SPECIALIST = f"""## A specialist of low noise

4,800 pictures more for the committed pipeline, at noise times up to {TOP} alone ("refiner"), or at all. Loss and
restoration are of {HELD} held-out pictures, with the same times and noise for each network. Restored: noised to {TOP}
and walked back in 4 steps without guidance. Right: of {DRAWN} held-out prompts. Sharpness: the median PSNR of pictures
to the render of what the reader sees on them. One run of each.
"""
SCORED = f"""## Aesthetic scores

Half of {TRAINED:,} pictures are stained (deviation {STAIN} of 255) and have the score {SCORES[1]:g}, the others
{SCORES[0]:g}. The base saw 4,800 of them at all times, without scores; the refiner is a UNet of 1.4 M, from scratch,
which saw 6,400 with their scores, at times up to {TOP}. Foreign pixels are of neither of the two colours asked for, nor
between them. Guidance 2, 16 steps, one run of each.

Stains were the second choice: in a first, shorter trial with a blur of 4 px in their place both scores drew alike. A
score can only say what the noised picture does not show, and it may show a blur at these times already.
"""


def stained(picture: np.ndarray, seed: int) -> np.ndarray:
    """A picture (h, w, 3) uint8 under soft stains of all colours, a latent's cell wide."""
    draw = np.random.default_rng(seed).normal(128, STAIN, (SIDE // 8, SIDE // 8, 3))
    stains = Image.fromarray(draw.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.clip(picture.astype(int) + np.asarray(stains) - 128, 0, 255).astype(np.uint8)


def pictures(seed: int, count: int, worse: bool) -> tuple[list[shapes.Scene], np.ndarray]:
    """Scenes and their pictures (n, h, w, 3), every other one stained if `worse`."""
    scenes = [shapes.scene(seed, i, two=0) for i in range(count)]
    drawn = [shapes.render(scene, SIDE) for scene in scenes]
    return scenes, np.stack([stained(one, i) if worse and i % 2 else one for i, one in enumerate(drawn)])


def encoded(vae: Autoencoder, drawn: np.ndarray) -> torch.Tensor:
    """Their latents (n, c, h, w)."""
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
    return torch.cat([vae.encode(part) for part in pixels.split(32)])


def prepare(folder: Path, vae: Autoencoder, *, worse: bool) -> Path:
    """A data set; with `worse` its records have the score of their picture."""
    if (folder / "index.json").exists():
        return folder
    scenes, drawn = pictures(0, TRAINED, worse)
    with ShardWriter(folder, resolution=SIDE, vae=vae.info(), overwrite=True) as writer:
        for i, (scene, latent) in enumerate(zip(scenes, encoded(vae, drawn).numpy(), strict=True)):
            score = {"aesthetic": SCORES[i % 2]} if worse else {}
            writer.add({"captions": shapes.captions(scene, 0, i)} | score, latent=latent)
    return folder


def trained(work: Path, name: str, data: Path, *options: str) -> Pipeline:
    """The average of a run of that name, trained unless it is there."""
    start = time.perf_counter()
    run(compose("train", [*TRAIN, f"name={name}", f"outputs={work}", f"data.path={data}", *options]))
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return Pipeline.load(work / name)


# --- what is measured ---------------------------------------------------------------------------------------


@torch.no_grad()
def errors(pipeline: Pipeline, x0: torch.Tensor, prompts: Sequence[str], tops: Sequence[float]) -> np.ndarray:
    """Squared error of the prediction (times, n) at given times, the same noise for every network."""
    cond, found = pipeline.conditioner(list(prompts)), []
    for k, top in enumerate(tops):
        eps, t = noise(k, np.arange(len(x0)), tuple(x0.shape[1:]), x0.device), torch.full((len(x0),), top)
        objective = pipeline.objective
        pred = pipeline.denoiser(objective.add_noise(x0, eps, t), objective.network_time(t), cond)
        found.append((pred - objective.target(x0, eps, t)).square().mean((1, 2, 3)).numpy())
    return np.stack(found)


@torch.no_grad()
def restored(pipeline: Pipeline, x0: torch.Tensor, prompts: Sequence[str], steps: int) -> torch.Tensor:
    """Latents noised to TOP and walked back."""
    eps = noise(99, np.arange(len(x0)), tuple(x0.shape[1:]), x0.device)
    times = torch.linspace(TOP, 0, steps + 1, dtype=torch.float64)
    how = SamplerConfig(name=Sampler.euler, guidance=1.0)
    return pipeline.draw(prompts, sampler=how, times=times, z=(1 - TOP) * x0 + TOP * eps)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of pictures (n, h, w, 3) with others, in dB: (n,)."""
    return -10 * np.log10(np.square((a.astype(float) - b) / 255).mean((1, 2, 3)) + 1e-10)


def sharpness(drawn: np.ndarray) -> float:
    """Median PSNR of pictures with the render of what the reader sees on them."""
    seen = []
    for picture in drawn:
        reading = shapes.read(picture)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        red, green, blue = np.median(border, 0).tolist()
        seen.append(shapes.render(shapes.Scene(reading.background, (red, green, blue), reading.things), SIDE))
    return float(np.median(psnr(drawn, np.stack(seen))))


def foreign(scenes: Sequence[shapes.Scene], drawn: np.ndarray) -> np.ndarray:
    """Of each picture, the share of pixels that are neither of the two colours asked for nor between them: (n,)."""
    shares = []
    for scene, picture in zip(scenes, drawn, strict=True):
        ground = np.array(shapes.BACKGROUNDS[scene.background], float)
        axis = np.array(shapes.COLOURS[scene.things[0].colour]) - ground
        offset = picture - ground
        along = np.clip(offset @ axis / (axis @ axis), 0, 1)[..., None]
        shares.append((np.linalg.norm(offset - along * axis, axis=-1) > FAR).mean())
    return np.array(shares)


def drawn_by(
    base: Pipeline, sampler: SamplerConfig, refiner: Pipeline | None = None
) -> tuple[list[shapes.Scene], np.ndarray]:
    """The exam's scenes, and what was drawn for their prompts."""
    scenes, parts = shapes.exam(7, DRAWN, 1), []
    for i in range(0, DRAWN, 30):
        seeds, prompts = range(i, i + 30), [shapes.prompt(scene) for scene in scenes[i : i + 30]]
        parts.append(base.generate(prompts, seeds=seeds, sampler=sampler, refiner=refiner))
    return scenes, np.concatenate(parts)


# --- the two questions --------------------------------------------------------------------------------------


def specialist(work: Path, vae: Autoencoder) -> list[str]:
    """Rows on a refiner that is the base, trained further at low noise alone."""
    base, data = Pipeline.load(BASE), prepare(work / "clean", vae, worse=False)
    own = [f"init.from={BASE}", f"objective.range=[0.0,{TOP}]", f"sample.base={BASE}", "objective.shift=2.0"]
    refiner = trained(work, "specialist", data, *own, "optim.lr=2e-4")
    same = trained(work, "further", data, f"init.from={BASE}", "objective.shift=2.0", "optim.lr=2e-4")
    scenes, given = pictures(1, HELD, worse=False)
    x0, prompts = encoded(vae, given), [shapes.prompt(scene) for scene in scenes]
    tops = np.linspace(0.03, TOP, 12).tolist()
    lines = [
        "| | loss below 0.36 | to the base's | latents restored, 4 steps: error | pictures |",
        "|---|---|---|---|---|",
    ]
    before = errors(base, x0, prompts, tops).mean(0)
    for label, one in (("base", base), ("base, trained on", same), ("refiner", refiner)):
        now = errors(one, x0, prompts, tops).mean(0)
        ratio = (now / before).mean()
        error = (now / before).std() / HELD**0.5
        back = restored(one, x0, prompts, 4)
        apart, clear = (back - x0).square().mean().sqrt(), psnr(one.decode(back), given).mean()
        lines.append(f"| {label} | {now.mean():.4f} | {ratio:.3f} +- {error:.3f} | {apart:.4f} | {clear:.2f} dB |")
    lines += ["", "| steps | base: right, sharpness | handed over at 0.36 |", "|---|---|---|"]
    for steps in (8, 16):
        how = replace(base.description.sampler, name=Sampler.euler, eta=None, steps=steps)
        cells = []
        for one in (None, refiner):
            asked, drawn = drawn_by(base, how, one)
            cells.append(f"{shapes.mark(asked, drawn)['all']:.2f}, {sharpness(drawn):.2f} dB")
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return lines


def scored(work: Path, vae: Autoencoder) -> list[str]:
    """Rows on a refiner that is told scores, after a base that is not."""
    data = prepare(work / "mixed", vae, worse=True)
    base = trained(work, "mixed_base", data, f"init.from={BASE}", "objective.shift=2.0", "optim.lr=5e-4")
    own = [f"objective.range=[0.0,{TOP}]", f"sample.base={work / 'mixed_base'}"]
    refiner = trained(work, "scored", data, *UNET, *own)
    how = replace(base.description.sampler, name=Sampler.euler, eta=None, steps=16, guidance=2.0, interval=[0.0, 1.0])
    lines = ["| | right | foreign pixels, % | less the base's, by picture | sharpness |", "|---|---|---|---|---|"]
    rows: list[tuple[str, Pipeline | None, dict[str, Any]]] = [
        ("base alone", None, {}),
        ("refiner, score 4", refiner, {"aesthetic": 4.0, "negative_aesthetic": 4.0}),
        ("refiner, score 7", refiner, {"aesthetic": 7.0, "negative_aesthetic": 7.0}),
        ("refiner, score 7, led away from 4", refiner, {"aesthetic": 7.0, "negative_aesthetic": 4.0}),
    ]
    alone: np.ndarray | None = None
    for label, one, scores in rows:
        scenes, drawn = drawn_by(base, replace(how, **scores), one)
        lines.append(row(label, scenes, drawn, alone))
        alone = drawn if alone is None else alone
    scenes, given = pictures(2, DRAWN, worse=False)
    for label, shown in (("renders", given), ("renders, stained", np.stack(list(map(stained, given, range(DRAWN)))))):
        seen = ((vae.decode(encoded(vae, shown)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        lines.append(row(f"{label}, through the autoencoder", scenes, seen))
    return lines


def row(label: str, scenes: list[shapes.Scene], drawn: np.ndarray, base: np.ndarray | None = None) -> str:
    """What there is to say of some pictures, beside those of the base."""
    share = 100 * foreign(scenes, drawn)
    against = "" if base is None else sure(share - 100 * foreign(scenes, base))
    right = shapes.mark(scenes, drawn)["all"]
    return f"| {label} | {right:.2f} | {sure(share)} | {against} | {sharpness(drawn):.2f} dB |"


def sure(values: np.ndarray) -> str:
    """A mean and its standard error."""
    return f"{values.mean():.2f} +- {values.std() / len(values) ** 0.5:.2f}"


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("outputs/refiner"))
    parser.add_argument("--only", choices=("specialist", "scored"))
    args = parser.parse_args()
    vae = AutoencoderConfig(path="assets/shapes").build()
    lines = [HEAD]
    for title, part, said in (("specialist", specialist, SPECIALIST), ("scored", scored, SCORED)):
        if args.only in (None, title):
            lines += [said, *part(args.work, vae), ""]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
