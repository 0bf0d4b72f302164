"""A training run, top to bottom. Runs differ in the values of the config, never in this file.

batch -> losses -> backward (once per optimizer step over all ranks) -> clip, step -> EMA -> log, draw, save
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
import yaml
from torch import nn

from data.loader import Batch, Batches, open_shards
from data.reader import ShardReader
from diffusion.objective import Objective
from inference.description import Description, plain
from inference.device import precision
from inference.pipeline import Pipeline
from models.text import Conditioner, TextEncoders
from training.checkpoint import TrainState, resume, save_checkpoint
from training.config import RunConfig
from training.distributed import Ranks, session
from training.ema import EMA
from training.evaluate import draw_grid, subjects, take_exam
from training.flops import Work, peak_tflops
from training.metrics import Journal, LossSums, peak_rss_mb
from training.optim import build_optimizer, guarded_step, learning_rate
from training.origin import inherit
from training.pairing import check_pairing
from training.speed import (
    Compile,
    attention_by,
    channels_last,
    check_attention,
    check_compiler,
    compile_denoiser,
    compile_seconds,
)
from training.step import clean, condition, losses


def run(cfg: RunConfig) -> dict[str, Any]:
    """Train as `cfg` says, or go on from where the same command stopped; returns the exam's result.

    May be called repeatedly in one process. Raises ValueError before anything is built if the config cannot work.
    """
    with session() as ranks:
        return _run(cfg, ranks)


def _run(cfg: RunConfig, ranks: Ranks) -> dict[str, Any]:
    micro_batch = cfg.train.micro_batch_of(ranks.world)
    check_pairing(micro_batch, cfg.objective.pairing)
    sets = open_data(cfg, ranks)
    dtype = precision(cfg.train.precision, ranks.device)
    masked = cfg.model.condition == "text" and cfg.text is not None and cfg.text.masked
    check_attention(cfg.train.attention, ranks.device, dtype, masked)
    check_compiler(cfg.train.compile)
    plain_config = described(cfg)

    torch.manual_seed(cfg.seed)
    text = cfg.text.build().to(ranks.device) if cfg.text and cfg.model.condition == "text" else None
    check_text(cfg, text, sets)
    conditioner = Conditioner(text, getattr(cfg.model, "num_classes", None), getattr(cfg.model, "vector_dim", 0))
    autoencoder = cfg.vae.build().to(ranks.device)
    check_autoencoder(cfg, sets, autoencoder.info()["id"])
    denoiser: Any = cfg.model.build().to(ranks.device)
    denoiser.checkpoint(cfg.train.checkpointing, cfg.train.checkpoint_every)
    if cfg.train.channels_last:
        channels_last(denoiser)
    objective = Objective(cfg.objective)
    description = Description(
        objective=cfg.objective,
        sampler=cfg.sampler,
        vae=cfg.vae,
        text=cfg.text if text else None,
        resolution=cfg.data.resolution,
        num_classes=conditioner.num_classes,
    )

    checkpoints = cfg.folder / "checkpoints"
    say = print if ranks.main else lambda _: None
    optimizer, ema = build_optimizer(denoiser, cfg.optim), EMA(denoiser, cfg.ema)
    state = resume(checkpoints, denoiser, ema.module, optimizer, plain_config, say)
    if state:
        say(f"{cfg.name} continues from {state.images_seen:,} images")
    else:
        state = TrainState()
        if cfg.init["from"]:
            inherit(denoiser, cfg.init, description, say)
            ema = EMA(denoiser, cfg.ema)
        else:
            say(f"{cfg.name} starts from scratch")
    records = sum(map(len, sets))
    say(f"{sum(p.numel() for p in denoiser.parameters()):,} parameters, {records:,} records, {ranks.world} ranks")

    if ranks.main:
        cfg.folder.mkdir(parents=True, exist_ok=True)
        (cfg.folder / "config.yaml").write_text(yaml.safe_dump(plain_config, sort_keys=False))
    journal = Journal(cfg.folder, cfg.logger, ranks, cfg.name, cfg.train.images, state.images_seen)
    pipeline = Pipeline(ema.module, conditioner, autoencoder, description, ranks.device, dtype)
    draws = cfg.objective.range[1] == 1
    if not draws:
        say("trained at low noise alone, it draws nothing by itself: no grids of pictures, and no exam")
    shown = subjects(
        cfg, [caption for row in range(min(len(sets[0]), cfg.sample.count)) for caption in captions_of(sets[0], row)]
    )

    def save() -> None:
        if ranks.main:
            save_checkpoint(
                checkpoints, state, denoiser, ema.module, optimizer, description, plain_config, cfg.checkpoint.keep
            )
        ranks.barrier()

    def draw() -> None:
        if ranks.main and draws:
            path = f"samples/{state.images_seen:09d}.png"
            journal.write(
                "sample",
                state.images_seen,
                {"path": path} | draw_grid(pipeline, shown, cfg.sample.seed, cfg.folder / path),
            )
        ranks.barrier()

    compile_denoiser(denoiser, cfg.train.compile)
    compiling = compile_seconds() if cfg.train.compile is not Compile.none else None
    wrapped = ranks.wrap(denoiser)
    free = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    autocast = torch.autocast(ranks.device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
    work, (peak, source) = Work(denoiser), peak_tflops(ranks.device, dtype)
    journal.write("device", state.images_seen, {"peak_tflops": peak, "source": source, "dtype": str(dtype)})
    share = cfg.train.batch_size // ranks.world
    sums, clock, logged_at = LossSums(ranks.device), time.perf_counter(), state.images_seen
    stop = min(cfg.train.images, cfg.train.stop_at or cfg.train.images)
    batches = iter(
        Batches(
            cfg.data, sets, cfg.seed, start=state.images_seen, stop=stop,
            batch_size=cfg.train.batch_size, micro_batch=micro_batch, rank=ranks.rank, world=ranks.world,
        ).loader()
    )  # fmt: skip

    while state.images_seen < stop:
        before, state.images_seen = state.images_seen, state.images_seen + cfg.train.batch_size
        for batch, last in with_last(islice(batches, share // micro_batch)):
            batch = batch.to(ranks.device)
            with synchronised(wrapped, last), attention_by(cfg.train.attention):
                with autocast:
                    cond = condition(
                        batch, conditioner, cfg.train.text_dropout, cfg.seed, ranks.device, cfg.train.encoder_dropout
                    )
                    x0 = clean(batch, cfg.seed)
                    found = losses(wrapped, objective, x0, cond, batch.positions, cfg.seed, cfg.train.batch_size)
                    weighted, unweighted, t = readable(batch, *found)
                (weighted.sum() / share).backward()
            sums.add_losses(weighted.detach(), unweighted, t)
            if batch.damaged:
                sums.add_damaged(len(batch.damaged))
                print("\n".join(batch.damaged), file=sys.stderr)
            work.add(x0, cond)
        lr = learning_rate(cfg.optim, state.images_seen, cfg.train.images)
        sums.add_step(*guarded_step(optimizer, free, lr, cfg.optim.clip))
        ema.update(denoiser, state.images_seen, cfg.train.batch_size)
        state.step += 1
        journal.advance(cfg.train.batch_size)

        def due(every: int, first: int | None = None, before: int = before) -> bool:
            passed = before // every < state.images_seen // every
            return passed or (first is not None and before < first <= state.images_seen)

        finished, leaving = state.images_seen >= stop, ranks.leaving()
        if due(cfg.train.log_every) or finished or leaving:
            now = time.perf_counter()
            values = sums.read(ranks)
            state.seconds += now - clock
            state.skipped += values["skipped"]
            state.damaged += values["damaged"]
            elapsed = max(now - clock, 1e-9)
            tflops = work.read() / elapsed / 1e12
            about = {
                "step": state.step,
                "lr": lr,
                "images_per_s": (state.images_seen - logged_at) / elapsed,
                "tflops": tflops,  # of this device
                "peak_share": tflops / peak,
                "seconds": state.seconds,
                "rss_mb": peak_rss_mb(),
            }
            journal.write("train", state.images_seen, values | about)
            if compiling is not None:
                journal.write("compile", state.images_seen, {"seconds": compile_seconds() - compiling})
                compiling = None
            clock, logged_at = now, state.images_seen
            if state.skipped > cfg.train.max_skipped:
                raise FloatingPointError(
                    f"{state.skipped} updates had a gradient that is not finite, more than"
                    f" train.max_skipped={cfg.train.max_skipped}; lower optim.lr and start the same command again:"
                    f" it continues from the newest checkpoint in {checkpoints}"
                )
            if state.damaged > cfg.data.max_damaged:
                raise ValueError(
                    f"{state.damaged} records were damaged, over data.max_damaged={cfg.data.max_damaged}; the lines"
                    " above name them: copy those shards again, and start the same command again"
                )
        if due(cfg.sample.every, cfg.sample.first) or finished:
            draw()
        if due(cfg.checkpoint.every) or finished or leaving:
            save()
        if leaving:
            journal.say(f"{cfg.name} was asked to stop; the same command continues from {state.images_seen:,} images")
            break

    result: dict[str, Any] = {}
    if state.images_seen >= cfg.train.images and ranks.main and draws and cfg.evaluate.count and cfg.data.exam:
        path = cfg.folder / "evaluation.json"
        result = take_exam(pipeline, cfg)
        journal.write("eval", state.images_seen, result)
        path.write_text(json.dumps(result, indent=2) + "\n")
    journal.close()
    ranks.barrier()
    return result


def open_data(cfg: RunConfig, ranks: Ranks) -> list[ShardReader]:
    """The data sets, after checking that this model can read them; nothing has been built yet."""
    num_classes = getattr(cfg.model, "num_classes", None)
    sets = open_shards(cfg.data, num_classes=num_classes, verify=cfg.data.verify and ranks.main)
    vae = sets[0].index["vae"]
    unit = vae["factor"] * cfg.model.patch_size
    if cfg.data.resolution % unit:
        raise ValueError(
            f"data.resolution={cfg.data.resolution} must be a multiple of {unit}, the autoencoder's factor"
            f" {vae['factor']} times model.patch_size={cfg.model.patch_size};"
            f" choose {max(unit, cfg.data.resolution // unit * unit)}"
        )
    for reader in sets:
        for bucket in reader.buckets:
            if bucket.height % unit or bucket.width % unit:
                raise ValueError(
                    f"{reader.folder} holds pictures of {bucket.height}x{bucket.width}, but sides must be multiples of"
                    f" {unit}, the autoencoder's factor {vae['factor']} times model.patch_size={cfg.model.patch_size};"
                    f" prepare it with encode.step={unit} or a multiple of it"
                )
    if cfg.model.in_channels != vae["channels"]:
        raise ValueError(
            f"model.in_channels={cfg.model.in_channels}, but the latents of {sets[0].folder} have"
            f" {vae['channels']} channels; give model.in_channels={vae['channels']}"
        )
    return sets


def check_autoencoder(cfg: RunConfig, sets: list[ShardReader], digest: str) -> None:
    """Refuse to decode with another autoencoder than the one that encoded."""
    vae = sets[0].index["vae"]
    if digest != vae["id"]:
        raise ValueError(
            f"vae.path={cfg.vae.path} has the digest {digest}, but the latents of {sets[0].folder} were made with"
            f" {vae['path']}, digest {vae['id']}; give that one or prepare the data again"
        )


def check_text(cfg: RunConfig, text: TextEncoders | None, sets: list[ShardReader]) -> None:
    """Refuse encoders whose states are not what the denoiser reads, or not what the shards hold."""
    shares, encoders = cfg.train.encoder_dropout, len(text.encoders) if text else 0
    if shares and len(shares) != encoders:
        raise ValueError(
            f"train.encoder_dropout={shares} has {len(shares)} shares, but there are {encoders} text encoders; give one"
            " share for each, or [] for none"
        )
    if text is None or cfg.text is None:
        return
    for key, width in (("text_dim", text.width), ("pooled_dim", text.pooled_width)):
        wanted = getattr(cfg.model, key, width)
        if wanted != width:
            way = f"give model.{key}={width}" if width else "choose encoders that have a projection, such as text=sd3"
            raise ValueError(
                f"model.{key}={wanted}, but the encoders of text.path={cfg.text.path} give {width or 'none'}; {way}"
            )
    stored = sets[0].text
    if not cfg.data.text_states or stored is None:
        return
    given = (text.length, text.width, text.pooled_width or 0, cfg.text.masked)
    held = (stored.length, stored.width, stored.pooled, stored.masked)
    if held != given:
        names = "tokens, width, pooled width, masked"
        raise ValueError(
            f"data.text_states=true, but {sets[0].folder} holds states of {held} ({names}), and the encoders of"
            f" text.path={cfg.text.path} give {given}; set it to false, or prepare the data with these encoders"
        )


def readable(batch: Batch, *values: torch.Tensor) -> list[torch.Tensor]:
    """Values (b,) of the images whose record is whole; a damaged one counts for nothing."""
    if not batch.damaged:
        return list(values)
    return [value[batch.valid.to(value.device)] for value in values]


def captions_of(reader: ShardReader, row: int) -> list[str]:
    """The longest caption of a record, as a list of one or none."""
    return sorted(reader.record(row)["captions"].values(), key=len)[-1:]


def described(cfg: RunConfig) -> dict[str, Any]:
    """The whole config as what YAML and JSON know, with the class of the model named."""
    return plain(cfg) | {"model": {"_class_name": type(cfg.model).__name__.removesuffix("Config"), **plain(cfg.model)}}


def synchronised(module: nn.Module, last: bool) -> AbstractContextManager:
    """Keep DDP from reducing gradients before the last micro-batch of a step; around the forward pass too."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    batch = next(batches)
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True
