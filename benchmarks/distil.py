"""A network learns to answer another objective from its own former answers, said in the new terms, not from data.

    python benchmarks/distil.py outputs/demo/stage1 --out outputs/distilled --images 1024 objective=flow

    x_t, t  ->  teacher: (x0, eps) that its prediction implies      exact wherever its objective says what x0 is
            ->  student's target: c x0 + d eps

The student begins with the teacher's weights. Where the teacher says nothing of x0 (eps, beyond its last time) the
target is that of the data. The same data order, times, noise and optimizer as a run of `train_stage1.py` with these
overrides has; the averaged weights are written. benchmarks/compare.py measures whether it pays.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import compose
from data.loader import Batch, Batches, open_shards
from diffusion.objective import Objective
from diffusion.schedule import per_sample
from inference.description import Description, find
from models.folder import publish
from models.text import Conditioner
from models.weights import load_denoiser, save_denoiser
from training.config import RunConfig
from training.ema import EMA
from training.optim import build_optimizer, guarded_step, learning_rate
from training.step import clean, condition, times_and_noise


def converted(teacher: Any, old: Objective, new: Objective, x0: Tensor, eps: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The new target (b, ...) by what the teacher thinks x0 and eps are; the data's where it cannot say."""
    time = per_sample(t, x0)
    z = (1 - time) * x0 + time * eps
    with torch.no_grad():
        guess = old.denoise(teacher)(z, t.clamp(max=old.t_max), cond)
    guess = torch.where(time <= old.t_max, guess, x0)
    return new.target(guess, (z - (1 - time) * guess) / time.clamp(min=1e-4), t)


def batches(cfg: RunConfig, images: int) -> Iterator[Batch]:
    """Those of the run's first images."""
    sets = open_shards(cfg.data, num_classes=getattr(cfg.model, "num_classes", None))
    size = cfg.train.batch_size
    made = Batches(
        cfg.data, sets, cfg.seed, start=0, stop=images, batch_size=size, micro_batch=size, rank=0, world=1
    )  # fmt: skip
    yield from made.loader()


def distil(cfg: RunConfig, source: Path, images: int, out: Path) -> None:
    """Train the student and publish it as a pipeline of the new objective."""
    theirs = Description.load(source)
    old, new = Objective(theirs.objective), Objective(cfg.objective)
    teacher = load_denoiser(source / "denoiser", name="ema").eval().requires_grad_(False)
    student = load_denoiser(source / "denoiser", name="ema")
    optimizer, ema = build_optimizer(student, cfg.optim), EMA(student, cfg.ema)
    conditioner = Conditioner(None, theirs.num_classes)
    free, seen, size = list(student.parameters()), 0, cfg.train.batch_size
    for batch in batches(cfg, images):
        seen += size
        x0 = clean(batch, cfg.seed)
        cond = condition(batch, conditioner, cfg.train.text_dropout, cfg.seed, x0.device)
        t, eps = times_and_noise(new, x0, batch.positions, cfg.seed, size)
        pred = student(new.add_noise(x0, eps, t), new.network_time(t), cond)
        error = (pred - converted(teacher, old, new, x0, eps, t, cond)).square().mean((1, 2, 3))
        (new.weight(t) * error).mean().backward()
        guarded_step(optimizer, free, learning_rate(cfg.optim, seen, images), cfg.optim.clip)
        ema.update(student, seen, size)

    def write(aside: Path) -> None:
        save_denoiser(ema.module, aside / "denoiser", "ema")
        replace(theirs, objective=cfg.objective, sampler=cfg.sampler).save(aside)

    publish(out, write)


def main() -> None:
    """Distil."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="a run, checkpoint or pipeline, conditioned on classes")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of train_stage1")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()
    distil(compose("stage1", args.overrides), find(args.source), args.images, args.out)


if __name__ == "__main__":
    main()
