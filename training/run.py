"""A training run, top to bottom. Runs differ in the values of the config, never in this file.

batch -> losses -> backward (once per optimizer step over all ranks) -> clip, step -> EMA -> log, draw, save
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from itertools import islice
from typing import Any

import torch
import yaml

from data.loader import Batch, Batches, open_shards
from data.reader import ShardReader
from diffusion.objective import Objective
from inference.description import Description, plain
from inference.device import Precision, precision
from inference.pipeline import Pipeline
from models.folder import hold, numbered
from models.lora import adapt, parts
from models.text import Conditioner, TextEncoders
from models.weights import appearing
from training.checkpoint import Saver, TrainState, read_guard, resume
from training.config import RunConfig
from training.distributed import Ranks, session, sharded, synchronised
from training.ema import EMA
from training.evaluate import draw_grid, subjects, take_exam
from training.flops import Work, peak_tflops
from training.guard import Guard
from training.metrics import Journal, LossSums, peak_rss_mb
from training.optim import (
    averaged,
    build_optimizer,
    check_state,
    gradient_norm,
    guarded_step,
    learning_rate,
    set_rate,
)
from training.origin import inherit, stand_on_base
from training.pairing import check_pairing
from training.precision import MainGrads, Recipe, convert, recipe
from training.refiner import Refined, told_scores
from training.restart import check_progress, note_exit, note_start
from training.speed import (
    Compile,
    attention_by,
    channels_last,
    check_attention,
    check_compiler,
    compile_denoiser,
    compile_seconds,
)
from training.step import check_contrast, clean, condition, losses


def run(cfg: RunConfig) -> dict[str, Any]:
    """Train as `cfg` says, or go on from where the same command stopped; returns the exam's result.

    May be called repeatedly in one process. Raises ValueError before anything is built if the config cannot work, and
    SystemExit with `training.restart.AGAIN` if it was asked to leave and wants to be started again.
    """
    with session(cfg.train.timeout, cfg.folder) as ranks, ExitStack() as held:
        result = _run(cfg, ranks, held)
        code = 0 if result is not None else ranks.exit_code()
    note_exit(cfg.folder if ranks.main else None, code)
    if code:
        raise SystemExit(code)
    return result or {}


def _run(cfg: RunConfig, ranks: Ranks, held: ExitStack) -> dict[str, Any] | None:
    """The exam's result, or None if the run was left before its end; `held` lets go of folder and files after it."""
    say = print if ranks.main else lambda _: None
    micro_batch = cfg.train.micro_batch_of(ranks.world)
    check_pairing(micro_batch, cfg.objective.pairing)
    check_contrast(micro_batch, cfg.objective.contrast)
    sets = open_data(cfg, ranks)
    objective, factor = Objective(cfg.objective), sets[0].index["vae"]["factor"]
    cfg.sampler.times(objective, (cfg.data.resolution // factor) ** 2)  # refuses a grid that the objective has not
    dtype = precision(cfg.train.precision, ranks.device)
    masked = cfg.model.condition == "text" and cfg.text is not None and cfg.text.masked
    check_attention(cfg.train.attention, ranks.device, dtype, masked)
    check_compiler(cfg.train.compile)
    fp8 = recipe(cfg.fp8, ranks.device, say) if cfg.train.precision is Precision.fp8 else Recipe.bf16
    mesh = ranks.mesh(cfg.train.parallel)
    replicas = ranks.world if mesh is None else mesh.size(0) if mesh.ndim == 2 else 1
    cfg.optim.check_steps(cfg.train.batch_size // ranks.world // micro_batch, replicas)
    plain_config = described(cfg)

    torch.manual_seed(cfg.seed)
    text = cfg.text.build().to(ranks.device) if cfg.text and cfg.model.condition == "text" else None
    check_text(cfg, text, sets)
    numbers = getattr(cfg.model, "num_classes", None), getattr(cfg.model, "vector_dim", 0)
    conditioner = Conditioner(text, *numbers)
    autoencoder = cfg.vae.build().to(ranks.device)
    check_autoencoder(cfg, sets, autoencoder.info()["id"])
    denoiser: Any = cfg.model.build().to(ranks.device)
    denoiser.checkpoint(cfg.train.checkpointing, cfg.train.checkpoint_every)
    if cfg.train.channels_last:
        channels_last(denoiser)
    alignment = cfg.align.build(cfg.model, autoencoder).to(ranks.device) if cfg.align.weight else None
    description = Description(
        objective=cfg.objective,
        sampler=cfg.sampler,
        vae=cfg.vae,
        text=cfg.text if text else None,
        resolution=cfg.data.resolution,
        num_classes=conditioner.num_classes,
    )

    checkpoints = cfg.folder / "checkpoints"
    if ranks.main:
        held.enter_context(hold(cfg.folder, say))
    if cfg.adapts:
        description.base = stand_on_base(denoiser, cfg.init, checkpoints, description, say)
    elif cfg.init["from"] and not numbered(checkpoints):
        inherit(denoiser, cfg.init, description, say)
    trained = adapt(denoiser, text)
    converted = convert(denoiser, fp8, cfg.fp8) if mesh else []
    ranks.shard(denoiser, cfg.train.parallel, dtype)
    optimizer, ema, guard = build_optimizer(trained, cfg.optim), EMA(trained, cfg.ema), Guard(cfg.guard, ranks.device)
    saver = held.enter_context(Saver(checkpoints, cfg.checkpoint, say))
    saver.check(trained, ema.profiles, optimizer)
    state = resume(checkpoints, trained, ema.profiles, optimizer, plain_config, say)
    check_state(optimizer)
    if state:
        say(f"{cfg.name} continues from {state.images_seen:,} images")
        if remembered := read_guard(checkpoints / str(state.images_seen)):  # an older checkpoint has none
            guard.load(remembered)
    else:
        state = TrainState()
        if not cfg.init["from"]:
            say(f"{cfg.name} starts from scratch")
    converted = converted or convert(denoiser, fp8, cfg.fp8)  # after averages were copied: these are drawn in bf16
    main_grads = MainGrads(denoiser, converted if cfg.fp8.main_grad else [])
    if converted:
        say(f"fp8 in {len(converted)} linear layers: {fp8.value}")
    records = sum(map(len, sets))
    free = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in trained.parameters())
    say(f"{total:,} parameters, {sum(map(torch.numel, free)):,} of them trained")
    say(f"{records:,} records, {ranks.world} ranks")

    stop = min(cfg.train.images, cfg.train.stop_at or cfg.train.images)
    if state.images_seen < stop:
        starts = ranks.largest(note_start(cfg.folder, state.images_seen) if ranks.main else 0)
        check_progress(cfg.folder, state.images_seen, starts, cfg.train.max_restarts, ranks.main)
    if ranks.main:
        with appearing(cfg.folder / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(plain_config, sort_keys=False))
    journal = Journal(cfg.folder, cfg.logger, ranks, cfg.name, cfg.train.images, state.images_seen)
    average, words = parts(ema.module)
    pipeline = Pipeline(average, Conditioner(words or text, *numbers), autoencoder, description, ranks.device, dtype)
    together = sharded(denoiser)  # then all ranks draw, and one of them writes
    artist = Refined(cfg.sample.base, pipeline) if cfg.sample.base and (ranks.main or together) else pipeline
    draws = cfg.objective.range[1] == 1 or cfg.sample.base is not None
    if not draws:
        say("trained at low noise alone, it draws nothing by itself: no grids of pictures, and no exam; for these give"
            " sample.base=..., a model that begins them")  # fmt: skip
    if conditioner.reads_score:
        say(told_scores(sets))
    shown = subjects(
        cfg, [caption for row in range(min(len(sets[0]), cfg.sample.count)) for caption in captions_of(sets[0], row)]
    )

    def save() -> None:
        guard.check(checkpoints)
        with ranks.alone():  # the one before may still be on its way to the disk
            saver.save(state, trained, ema.profiles, optimizer, guard.tensors(), description, plain_config)

    def draw() -> None:
        with ranks.alone():
            if draws and (ranks.main or together):
                path = f"samples/{state.images_seen:09d}.png"
                drawn = draw_grid(artist, shown, cfg.sample.seed, cfg.folder / path if ranks.main else None)
                journal.write("sample", state.images_seen, {"path": path} | drawn)
            ranks.barrier()

    compile_denoiser(denoiser, cfg.train.compile)
    compiling = compile_seconds() if cfg.train.compile is not Compile.none else None
    wrapped = ranks.wrap(trained, cfg.train.parallel, dtype)
    autocast = torch.autocast(ranks.device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
    work, (peak, source) = Work(denoiser), peak_tflops(ranks.device, dtype)
    journal.write("device", state.images_seen, {"peak_tflops": peak, "source": source, "dtype": str(dtype)})
    share = cfg.train.batch_size // ranks.world
    sums, clock, logged_at = LossSums(ranks.device), time.perf_counter(), state.images_seen
    batches = iter(
        Batches(
            cfg.data, sets, cfg.seed, start=state.images_seen, stop=stop,
            batch_size=cfg.train.batch_size, micro_batch=micro_batch, rank=ranks.rank, world=ranks.world,
        ).loader()
    )  # fmt: skip

    ranks.advance(state.step)
    while state.images_seen < stop:
        before, state.images_seen = state.images_seen, state.images_seen + cfg.train.batch_size
        lr = learning_rate(cfg.optim, state.images_seen, cfg.train.images)
        set_rate(optimizer, lr)  # some update in the backward pass
        main_grads.start()
        for batch, last in with_last(islice(batches, share // micro_batch)):
            batch = batch.to(ranks.device)
            with synchronised(wrapped, last), attention_by(cfg.train.attention):
                with autocast:
                    cond = condition(
                        batch, conditioner, cfg.train.text_dropout, cfg.seed, ranks.device, cfg.train.encoder_dropout
                    )
                    x0 = clean(batch, cfg.seed)
                    loss, *found = losses(
                        wrapped, objective, x0, cond, batch.positions, cfg.seed, cfg.train.batch_size, alignment
                    )
                    weighted, unweighted, t = readable(batch, batch.weight * loss, *found)
                loss = weighted.sum() / share
                guard.watch(loss, last)
                loss.backward()
            sums.add_losses(weighted.detach(), unweighted, t)
            if batch.damaged:
                sums.add_damaged(len(batch.damaged))
                print("\n".join(batch.damaged), file=sys.stderr)
            work.add(x0, cond)
        main_grads.finish(ranks)
        norm = None if cfg.optim.in_backward else gradient_norm(free)
        veto = None if norm is None else guard.veto(norm)
        norm, skipped = guarded_step(optimizer, free, lr, cfg.optim.clip, veto, norm)
        if veto is None:
            guard.veto(norm)  # to remember and count: each parameter has judged for itself
        sums.add_step(norm, skipped)
        with averaged(optimizer):
            ema.update(trained, state.images_seen, cfg.train.batch_size)
        state.step += 1
        ranks.advance(state.step)
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
                "save_stall": saver.stall,
                "saves_missed": saver.missed,
            }
            about |= guard.check(checkpoints)
            journal.write("train", state.images_seen, values | about)
            if compiling is not None:
                journal.write("compile", state.images_seen, {"seconds": compile_seconds() - compiling})
                compiling = None
            clock, logged_at = now, state.images_seen
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
    with ranks.alone():
        saver.wait()
        whole = state.images_seen >= cfg.train.images
        if whole and draws and cfg.evaluate.count and cfg.data.exam and (ranks.main or together):
            result = take_exam(artist, cfg)
            journal.write("eval", state.images_seen, result)
            if ranks.main:
                with appearing(cfg.folder / "evaluation.json") as partial:
                    partial.write_text(json.dumps(result, indent=2) + "\n")
        journal.close()
        ranks.barrier()
    return result if state.images_seen >= stop else None


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


def with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    batch = next(batches)
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True
