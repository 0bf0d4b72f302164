"""What a LoRA learns and what it forgets: a new word for a thing that the committed pipeline has never drawn.

    OMP_NUM_THREADS=1 python benchmarks/lora.py [--out benchmarks/lora.md] [--data]

300 pictures of purple stars, a pair that no training of the pipeline has shown, are called "a zorb" and nothing else.
What is learnt is that word; what is forgotten shows in the exam of held-out prompts. Prior preservation adds pictures
that the base itself draws of other prompts. `--data` makes datasets/zorb and datasets/zorb-prior and trains nothing.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import compose
from data import shapes
from data.shards import ShardWriter
from inference.description import Description, find
from inference.export.lora import export_lora
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.weights import read_tensors
from training.evaluate import draw
from training.run import run

BASE, SIDE, COUNT = "assets/shapes/pipeline", 128, 300
ZORB, PRIOR = Path("datasets/zorb"), Path("datasets/zorb-prior")
QUIET = ["sample.every=1000000", "sample.first=1000000"]
WHOLE = ["experiment=demo/lora", "model.lora.rank=null"]
RUNS = {
    "LoRA of rank 8": ["experiment=demo/lora"],
    "the same, prior preservation": ["experiment=demo/dreambooth"],
    "DoRA of rank 8": ["experiment=demo/lora", "model.lora.dora=true"],
    "all weights, rate 2e-4": [*WHOLE, "optim.lr=2e-4"],
    "all weights, rate 1e-3": [*WHOLE, "optim.lr=1e-3"],
}
HEAD = f"""# LoRA

`OMP_NUM_THREADS=1 python benchmarks/lora.py --out benchmarks/lora.md`: {COUNT} pictures of purple stars, a pair that no
training of the committed pipeline has shown, called "a zorb" and nothing else; 2,400 images in batches of 16 (with
prior preservation 2,400 more that the base drew itself, of other prompts). Averaged weights, drawn by the base's
sampler in 20 steps: DDIM, eta 0.5, guidance 2. A zorb is right if a purple star is there (48 pictures); the others are
200 held-out prompts of one object and 200 of pairs that were trained on. One run of each.

| | weights learnt | file | "a zorb" | held-out prompts | trained pairs |
|---|---|---|---|---|---|
"""


def write(folder: Path, pictures: np.ndarray, captions: list[str]) -> None:
    """A data set of pictures (n, h, w, 3) uint8, each with one caption."""
    vae = AutoencoderConfig(path="assets/shapes").build()
    with ShardWriter(folder, resolution=SIDE, vae=vae.info()) as writer, torch.inference_mode():
        for picture, caption in zip(pictures, captions, strict=True):
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
            writer.add({"captions": {"short": caption}}, latent=vae.encode(pixels)[0].numpy())


def prepare(base: Pipeline) -> None:
    """Both data sets, unless they are there."""
    if not ZORB.exists():
        scenes = [shapes.scene(5, i, two=0, held_out=True) for i in range(4 * 8 * COUNT)]
        stars = [scene for scene in scenes if found(scene.things)][:COUNT]
        write(ZORB, np.stack([shapes.render(scene, SIDE) for scene in stars]), ["a zorb"] * COUNT)
    if not PRIOR.exists():
        prompts = [shapes.prompt(shapes.scene(6, i, two=0)) for i in range(COUNT)]
        write(PRIOR, drawn(base, prompts), prompts)


def found(things: Any) -> bool:
    """Whether a purple star is among them."""
    return any((thing.colour, thing.shape) == ("purple", "star") for thing in things)


def drawn(pipeline: Pipeline, prompts: list[str]) -> np.ndarray:
    """A picture for each prompt."""
    sampler = replace(Description.load(Path(BASE)).sampler, steps=20)
    return draw(pipeline, range(len(prompts)), prompts=prompts, sampler=sampler)


def marks(pipeline: Pipeline) -> list[float]:
    """Shares that are right: of zorbs, held-out prompts, trained pairs."""
    zorbs = [found(shapes.read(picture).things) for picture in drawn(pipeline, ["a zorb"] * 48)]
    exams = [shapes.exam(1234, 200, 1), [shapes.scene(4321, i, two=0) for i in range(200)]]
    others = [shapes.mark(scenes, drawn(pipeline, [shapes.prompt(s) for s in scenes]))["all"] for scenes in exams]
    return [float(np.mean(zorbs)), *others]


def row(name: str, learnt: str, size: str, pipeline: Pipeline) -> str:
    """A line of the table."""
    line = f"| {name} | {learnt} | {size} | {' | '.join(f'{mark:.2f}' for mark in marks(pipeline))} |"
    print(line, flush=True)
    return line


def main() -> None:
    """Prepare, train, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("outputs/lora"))
    parser.add_argument("--data", action="store_true", help="make the data sets, and stop")
    options = parser.parse_args()
    base = Pipeline.load(BASE)
    prepare(base)
    if options.data:
        return
    lines = [row("the base", "", "", base)]
    for name, settings in RUNS.items():
        folder = options.work / name.replace(" ", "-").replace(",", "")
        run(compose("stage3", [*QUIET, f"name={folder.name}", f"outputs={options.work}", *settings]))
        tensors, size = read_tensors(find(folder) / "denoiser", "ema"), ""
        learnt = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))
        if "model.lora.rank=null" not in settings:
            file = folder / "zorb.safetensors"
            if not file.exists():
                export_lora(folder, file, "triptych")
            size = f"{file.stat().st_size / 1e6:.1f} MB"
        lines.append(row(name, f"{learnt:,}", size, Pipeline.load(folder)))
        if name == "LoRA of rank 8":
            for weight in (0.7, 0.4):
                half = Pipeline.load(BASE, loras=[(folder / "zorb.safetensors", weight)])
                lines.append(row(f"the same with weight {weight}", "", "", half))
    if options.out:
        options.out.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
