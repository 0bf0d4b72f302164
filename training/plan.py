"""What a run will take, before it is paid for: memory of a GPU by kind, work, time, cost and disk; no GPU is needed.

    memory = weights + gradients + optimizer state + EMA + activations + frozen parts
    images/s = GPUs * peak * utilisation / FLOPs of an image        cost = images / (images/s) * GPUs * price

A step is rehearsed on fake tensors: every operator runs, makes storages of the right size, and no number is computed.
A ledger follows each storage from its birth to its end, so checkpointing, autocast and the order of the backward pass
are in the figures as they are in a run. Sharding is rehearsed with a process group that has no one in it.

On how gradients, `g`, meet activations, `a(t)`, and weights cast to bfloat16, `c(t)`, over a step:

    one rank                    max (a + c + g)          gradients come as activations go
    DDP, or several passes      max (a + c) + max g      buckets, and sums of the passes before, stay
    FSDP over n ranks           max a + max g / n, and what is gathered: the root, and two units with their buffers

What is in no figure: the CUDA context and what the allocator's blocks leave unused, for which `usable` keeps room, and
temporary memory inside of kernels.
"""

import json
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.texts import GROUP
from inference.device import Precision
from models import embed
from models.autoencoder import factor_of
from models.base import Cond
from models.layers import Checkpointing
from models.lora import adapt
from models.pretrained import FrozenConfig
from models.text import TextConfig
from models.unet import SIZE_DIM
from models.weights import locate
from training.config import RunConfig
from training.flops import PEAKS, flops_per_image
from training.optim import Kind, OptimConfig, Ruled, Weights, alike, build_optimizer

GIB = 2**30
CARDS = (24, 48, 80, 141)  # GiB, as they are sold
TOKENS = 4096  # in a pass; with fewer, kernels are too small to fill a GPU
NODE = 8  # GPUs that are close to each other


@dataclass(slots=True, frozen=True)
class Gpu:
    """A card: its name in `training.flops.PEAKS`, and its GiB."""

    name: str
    memory: int


GPUS = {
    "h100": Gpu("H100", 80),
    "h100-pcie": Gpu("H100 PCIe", 80),
    "h100-nvl": Gpu("H100 NVL", 94),
    "h200": Gpu("H200", 141),
    "b200": Gpu("B200", 180),
    "gb200": Gpu("GB200", 186),
    "a100": Gpu("A100", 80),
    "l40s": Gpu("L40S", 48),
    "4090": Gpu("RTX 4090", 24),
}


@dataclass(slots=True, frozen=True)
class Frozen:
    """A frozen network: parameters, those that look up tokens, width of its states, and of its pooled vector."""

    parameters: int
    table: int = 0
    width: int = 0
    pooled: int = 0
    clip: int = 0  # tokens that a CLIP reads
    channels: int = 0  # of an autoencoder
    factor: int = 8


CLIP_L = Frozen(123_060_480, 77 * 768 + 49_408 * 768, 768, 0, 77)
CLIP_L_PROJECTED = Frozen(123_650_304, CLIP_L.table, 768, 768, 77)
BIG_G = Frozen(694_659_840, 77 * 1280 + 49_408 * 1280, 1280, 1280, 77)
T5_XXL = Frozen(4_762_310_656, 32_128 * 4096, 4096)
T5GEMMA_XL = Frozen(1_682_114_560, 256_000 * 2048, 2048)  # T5 XL's sizes; with its decoder 3.77 B, as published
SD_VAE, SD3_VAE = Frozen(83_653_863, channels=4), Frozen(83_819_683, channels=16)
SD1, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
REFINER, SD3 = "stabilityai/stable-diffusion-xl-refiner-1.0", "stabilityai/stable-diffusion-3-medium-diffusers"
PUBLIC = {
    (SD1, "text_encoder"): CLIP_L,
    (SDXL, "text_encoder"): CLIP_L,
    (SDXL, "text_encoder_2"): BIG_G,
    (REFINER, "text_encoder_2"): BIG_G,
    (SD3, "text_encoder"): CLIP_L_PROJECTED,
    (SD3, "text_encoder_2"): BIG_G,
    (SD3, "text_encoder_3"): T5_XXL,
    ("PixArt-alpha/PixArt-XL-2-1024-MS", "text_encoder"): T5_XXL,
    ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "text_encoder"): T5_XXL,
    ("google/t5gemma-xl-xl-ul2", ""): T5GEMMA_XL,
    (SD1, "vae"): SD_VAE,
    (SDXL, "vae"): SD_VAE,
    (SD3, "vae"): SD3_VAE,
}


# --- a step on fake tensors -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Step:
    """Bytes that a step holds at most beyond weights, EMA and optimizer state; see the module's text."""

    alone: float = 0  # a + c + g
    replicated: float = 0  # a + c
    sharded: float = 0  # a


class Ledger(TorchDispatchMode):
    """Storages that operators make while it is entered: `live` bytes by kind, and the `peak`s of their sums."""

    def __init__(self, parameters: Iterable[nn.Parameter] = ()):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak = Step()
        self._kinds: dict[int, str] = {}
        self._weights = {parameter.untyped_storage()._cdata for parameter in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), "cast" if cast else "activation")
        return made

    def _add(self, storage: Any, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds or key in self._weights:
            return
        self._kinds[key] = kind
        self.live[kind] += size
        live, peak = self.live, self.peak
        peak.sharded = max(peak.sharded, live["activation"])
        peak.replicated = max(peak.replicated, live["activation"] + live["cast"])
        peak.alone = max(peak.alone, live.total())
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size

    def gradient(self, parameter: Tensor) -> None:
        """A hook: this parameter has its gradient."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self.live[self._kinds[storage._cdata]] -= storage.nbytes()
        self._kinds[storage._cdata] = "gradient"
        self.live["gradient"] += storage.nbytes()


@contextmanager
def cuda_norms() -> Iterator[None]:
    """CUDA's autocast computes these norms in float32, the CPU's does not, and fake tensors lie on the CPU.

    A fake CUDA tensor would need a torch that was built for CUDA. Not a TorchFunctionMode: one is off in the backward
    pass, where blocks are computed again.
    """
    plain = {name: getattr(F, name) for name in ("layer_norm", "group_norm")}

    def in_float32(norm: Any) -> Any:
        return lambda x, *args, **options: norm(x.float(), *args, **options)

    try:
        for name, norm in plain.items():
            setattr(F, name, in_float32(norm))
        yield
    finally:
        for name, norm in plain.items():
            setattr(F, name, norm)


class Rehearsal:
    """A run's denoiser on fake tensors, on one rank; `cuda`: with what is special to CUDA."""

    def __init__(self, cfg: RunConfig, frozen: "Parts", cuda: bool = True):
        self.cfg, self.cuda = cfg, cuda
        self.half = cfg.train.precision is not Precision.fp32 and (cuda or cfg.train.precision is Precision.bf16)
        self.latent = latent_of(cfg, frozen)
        self.cond = condition_of(cfg, frozen)
        self._fake, self._steps = FakeTensorMode(), {}
        self.denoiser = self._as_trained()
        self.optimizer, self.spare = self.optimizer_bytes(cfg.optim)
        self.eight_bit, _ = self.optimizer_bytes(replace(cfg.optim, kind=Kind.adamw8bit))
        averaged = self.free if cfg.adapts else list(self.denoiser.parameters())
        self.ema = (1 + len(cfg.ema.sigma_rel)) * 4 * sum(p.numel() for p in averaged)  # float32
        self.weights = sum(p.nbytes for p in self.denoiser.parameters())
        sizes = [p.nbytes for p in self.free]
        self.gradients = max(sizes) if cfg.optim.in_backward else sum(sizes)
        self.flops = flops_per_image(self.denoiser, self.latent, self.cond)
        self._ledger = Ledger(self.denoiser.parameters())
        for parameter in self.free:
            parameter.register_post_accumulate_grad_hook(self._ledger.gradient)

    def _as_trained(self) -> Any:
        """The network as it is on the meta device, in fake tensors on the CPU, which cannot change type in place."""
        denoiser = on_meta(self.cfg)
        with self._fake:
            for part in denoiser.modules():
                for name, like in part.named_parameters(recurse=False):
                    weight = torch.empty(like.shape, dtype=like.dtype)
                    setattr(part, name, nn.Parameter(weight, requires_grad=like.requires_grad))
                for name, like in part.named_buffers(recurse=False):
                    setattr(part, name, torch.empty(like.shape, dtype=like.dtype))
        return denoiser

    @property
    def free(self) -> list[nn.Parameter]:
        """Parameters that are trained."""
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def optimizer_bytes(self, config: OptimConfig) -> tuple[float, float]:
        """Bytes of the optimizer's state, and the most that a step of it holds for a moment."""
        config = replace(config, in_backward=False)
        if config.kind is not Kind.adamw or config.weights is not Weights.fp32:
            with torch.device("meta"):
                denoiser = built(self.cfg)
            optimizer: Any = build_optimizer(denoiser, config)
            return _ruled_bytes(optimizer, denoiser)
        with self._fake, Ledger(self.free) as ledger:
            optimizer = build_optimizer(self.denoiser, config)
            for parameter in self.free:
                parameter.grad = torch.empty_like(parameter)
            gradients = ledger.live.total()
            optimizer.step()
            state, ledger.peak = ledger.live.total() - gradients, Step()
            optimizer.step()
            for parameter in self.free:
                parameter.grad = None
        return state, max(0, ledger.peak.alone - gradients - state)

    def step(self, micro_batch: int, checkpointing: Checkpointing) -> Step:
        """Peaks of a forward and backward pass over so many images."""
        key = micro_batch, checkpointing
        if key not in self._steps:
            self._steps[key] = self._pass(micro_batch, checkpointing)
        return self._steps[key]

    def _pass(self, rows: int, checkpointing: Checkpointing) -> Step:
        ledger, denoiser = self._ledger, self.denoiser
        ledger.peak = Step()
        denoiser.checkpoint(checkpointing, self.cfg.train.checkpoint_every)
        with ExitStack() as stack:
            stack.enter_context(forgotten())
            stack.enter_context(self._fake)
            stack.enter_context(ledger)
            if self.cuda and self.half:
                stack.enter_context(cuda_norms())
            x, target, t = torch.empty(rows, *self.latent), torch.empty(rows, *self.latent), torch.empty(rows)
            cond = self.cond._map(lambda one: torch.empty(rows, *one.shape[1:], dtype=one.dtype))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                pred = denoiser(x, t, cond)
                loss = (pred.float() - target).square().mean((1, 2, 3))
            loss.sum().backward()
            for parameter in self.free:
                parameter.grad = None
        return ledger.peak

    def estimate(self, micro_batch: int, checkpointing: Checkpointing) -> Step:
        """`step` on the line through two sizes: what a batch holds grows with it."""
        low, high = self.step(4, checkpointing), self.step(8, checkpointing)

        def line(name: str) -> float:
            a, b = getattr(low, name), getattr(high, name)
            return a + (b - a) * (micro_batch - 4) / 4

        return Step(alone=line("alone"), replicated=line("replicated"), sharded=line("sharded"))


@contextmanager
def forgotten() -> Iterator[None]:
    """No fake table of positions is left for a real network, and no real one meets a fake."""
    embed._remembered.cache_clear()
    try:
        yield
    finally:
        embed._remembered.cache_clear()


def _ruled_bytes(optimizer: Ruled, denoiser: nn.Module) -> tuple[float, float]:
    """The same of one that goes by few parameters at a time; chance, which needs numbers, is left out of its steps."""
    spare, chance = 0.0, torch.Generator()
    with Ledger(denoiser.parameters()) as ledger, torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = group["rule"].start(parameter)
        state = ledger.live.total()
        for group in optimizer.param_groups:
            largest = max(alike(group["params"]), key=lambda members: sum(p.numel() for p in members))
            weights, gradients = [p.float() for p in largest], [torch.empty_like(p).float() for p in largest]
            states, chances = [optimizer.state[p] for p in largest], [chance] * len(largest)
            ledger.peak = Step()
            group["rule"].update(weights, gradients, states, group, chances)
            spare = max(spare, ledger.peak.alone - state)
    return state, spare


def latent_of(cfg: RunConfig, frozen: "Parts") -> tuple[int, int, int]:
    """Channels, height and width of a picture's latent."""
    side = cfg.data.resolution // frozen.factor
    if cfg.data.resolution % (frozen.factor * cfg.model.patch_size):
        unit = frozen.factor * cfg.model.patch_size
        raise ValueError(
            f"data.resolution={cfg.data.resolution} must be a multiple of {unit}, the autoencoder's factor"
            f" {frozen.factor} times model.patch_size={cfg.model.patch_size};"
            f" choose {max(unit, cfg.data.resolution // unit * unit)}"
        )
    return cfg.model.in_channels, side, side


def condition_of(cfg: RunConfig, frozen: "Parts") -> Cond:
    """One row of what the denoiser reads, on the meta device."""
    model: Any = cfg.model
    with torch.device("meta"):
        if model.condition == "class" or cfg.text is None:
            return Cond(class_id=torch.empty(1, dtype=torch.int64))
        cond = Cond(text=torch.empty(1, frozen.tokens, model.text_dim))
        if cfg.text.masked:
            cond.text_mask = torch.empty(1, frozen.tokens, dtype=torch.bool)
        if vector := getattr(model, "vector_dim", 0):
            numbers = 5 if (vector - frozen.pooled) // SIZE_DIM == 5 else 6
            cond.size_ids, cond.pooled = torch.empty(1, numbers), torch.empty(1, vector - numbers * SIZE_DIM)
        elif pooled := getattr(model, "pooled_dim", 0):
            cond.pooled = torch.empty(1, pooled)
    return cond


# --- frozen parts -----------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Parts:
    """Text encoders and autoencoder: bytes, and the shapes that they give; `notes`: what is not counted, or refused."""

    text: float = 0
    vae: float = 0
    encoding: float = 0  # FLOPs of the text of an image, where captions are encoded while training
    tokens: int = 0
    pooled: int = 0
    factor: int = 8
    notes: list[str] = field(default_factory=list)


def frozen_parts(cfg: RunConfig) -> Parts:
    """The frozen parts of a run, known by name or read from config.json and the headers beside it on this machine."""
    parts = Parts()
    vae = find(cfg.vae, cfg.vae.subfolder)
    if vae is None:
        parts.notes.append(f"vae.path={cfg.vae.path} is not on this machine: its memory is not counted, factor 8 taken")
    else:
        parts.vae, parts.factor = vae.parameters * cfg.vae.precision.value.itemsize, vae.factor
        if vae.channels != cfg.model.in_channels:
            parts.notes.append(
                f"a run would be refused: model.in_channels={cfg.model.in_channels}, but vae.path={cfg.vae.path} gives"
                f" {vae.channels} channels; choose vae=... of the model, or set it"
            )
    if cfg.text is not None and cfg.model.condition == "text":
        _add_text(parts, cfg, cfg.text)
    if cfg.align.weight:
        parts.notes.append(f"align.path={cfg.align.path} is not counted, nor pictures decoded for it to look at")
    if cfg.train.precision is Precision.fp8:
        parts.notes.append("train.precision=fp8 is counted as bf16: what it saves depends on the card")
    if route := getattr(cfg.model, "route", 0):
        parts.notes.append(f"model.route={route} is not counted: tokens are taken through all blocks")
    return parts


def _add_text(parts: Parts, cfg: RunConfig, text: TextConfig) -> None:
    model: Any = cfg.model
    found = [one for folder in text.encoders if (one := find(text, folder))]
    clip, rest = [one for one in found if one.clip], [one for one in found if not one.clip]
    first = min((one.clip for one in clip), default=0)
    parts.tokens = first + len(rest) * (text.length or 0) + text.empty
    parts.pooled = sum(one.pooled for one in clip)
    parts.text = sum(one.parameters for one in found) * text.precision.value.itemsize
    if not cfg.data.text_states:
        reads = [(one, one.clip or text.length or 0) for one in found]
        parts.encoding = sum(2 * (one.parameters - one.table) * tokens for one, tokens in reads)
    if len(found) < len(text.encoders):
        parts.tokens = parts.tokens or text.length or 77
        parts.notes.append(
            f"text.path={text.path} is not on this machine: its memory is not counted, {parts.tokens} tokens are taken"
        )
        return
    width = max(sum(one.width for one in clip), *(one.width for one in rest), text.width)
    wanted = {"text_dim": width, "pooled_dim": parts.pooled}
    for key, value in wanted.items():
        if getattr(model, key, value) != value:
            parts.notes.append(
                f"a run would be refused: model.{key}={getattr(model, key)}, but text.path={text.path} gives {value};"
                " choose text=... of the model, or set it"
            )


def find(config: FrozenConfig, subfolder: str) -> Frozen | None:
    """What is known of a frozen network, or None."""
    if (config.path, subfolder) in PUBLIC:
        return PUBLIC[config.path, subfolder]
    folder = Path(locate(config.path)) / subfolder
    if not (folder / "config.json").is_file():
        return None
    described = json.loads((folder / "config.json").read_text())
    shapes = _shapes(folder, config.variant)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    if "block_out_channels" in described:
        return Frozen(parameters, channels=described["latent_channels"], factor=factor_of(described))
    table = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "embed" in name or "shared" in name)
    if described.get("model_type") != "clip_text_model":
        return Frozen(parameters, table, described.get("d_model") or described.get("hidden_size") or 0)
    projection = described["projection_dim"] if "text_projection.weight" in shapes else 0
    return Frozen(parameters, table, described["hidden_size"], projection, described.get("max_position_embeddings", 77))


def _shapes(folder: Path, variant: str | None) -> dict[str, list[int]]:
    """Shapes of all tensors by name, from the headers of a folder's files."""
    shapes = {}
    for path in sorted(folder.glob(f"*{'.' + variant if variant else ''}.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
    return shapes


# --- ranks ------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Shards:
    """The parameters of rank 0 among `ranks`, and what it gathers, in numbers."""

    ranks: int
    own: int  # of the whole denoiser; rank 0 has the most where rows do not divide
    trained: int  # of those that have gradients
    root: int  # parameters of no unit, gathered all through a step
    unit: int  # parameters of the largest unit


def on_meta(cfg: RunConfig) -> Any:
    """The denoiser as the run trains it: what is frozen is, and its weights have their type."""
    with torch.device("meta"):
        denoiser = built(cfg)
    build_optimizer(denoiser, replace(cfg.optim, in_backward=False))
    return denoiser


def built(cfg: RunConfig) -> Any:
    """The denoiser, with adapters if it gets some; those of text encoders are left out."""
    denoiser: Any = cfg.model.build()
    adapt(denoiser, None)
    return denoiser


@contextmanager
def nobody(ranks: int) -> Iterator[Any]:
    """A mesh of so many ranks, of which only this process is there; its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield dist.init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def shard(cfg: RunConfig, ranks: int) -> Shards:
    """FSDP2 of the run's denoiser over so many ranks, on the meta device: each unit by itself, then the root."""
    from torch.distributed.fsdp import fully_shard

    denoiser = on_meta(cfg)
    whole, units = numbers(denoiser.parameters()), [numbers(unit.parameters()) for unit in denoiser.units()]
    if ranks == 1:
        return Shards(ranks=1, own=whole, trained=numbers(denoiser.parameters(), True), root=0, unit=0)
    with nobody(ranks) as mesh:
        for unit in denoiser.units():
            fully_shard(unit, mesh=mesh)
        fully_shard(denoiser, mesh=mesh)
        own, trained = numbers(denoiser.parameters()), numbers(denoiser.parameters(), True)
    return Shards(ranks=ranks, own=own, trained=trained, root=whole - sum(units), unit=max(units))


def numbers(parameters: Iterable[Any], trained: bool = False) -> int:
    """How many numbers this rank holds of them."""
    kept = [p for p in parameters if p.requires_grad or not trained]
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in kept)


# --- memory -----------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Way:
    """How the memory of a step is had: `shards` over which weights lie (1: each rank has all), and the options."""

    ranks: int
    shards: int
    micro_batch: int
    checkpointing: Checkpointing
    eight_bit: bool = False


@dataclass(slots=True, kw_only=True)
class Memory:
    """Bytes of a GPU at the peak of a step, by kind."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    gathered: float
    text: float
    vae: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, name) for name in Memory.__slots__)  # pyright: ignore[reportAttributeAccessIssue]


def memory(rehearsal: Rehearsal, parts: Parts, way: Way, shards: Shards, step: Step) -> Memory:
    """The memory of one of the ranks; `shards` are of `way.shards` ranks."""
    share = shards.own / numbers(rehearsal.denoiser.parameters())
    trained = shards.trained / numbers(rehearsal.free)
    optimizer = rehearsal.eight_bit if way.eight_bit else rehearsal.optimizer
    weights, ema = rehearsal.weights * share, rehearsal.ema * share
    gradients = rehearsal.gradients * trained
    passes = rehearsal.cfg.train.batch_size // way.ranks // way.micro_batch
    gathered = 0.0
    if way.shards > 1:
        size = 2 if rehearsal.half else 4
        # the unit in use, the next, the buffer that it comes in; its gradients, and in float32 the buffer they leave in
        gathered = size * (shards.root + 3 * shards.unit) + (size + 4) * shards.unit
        activations = step.sharded
    elif way.ranks == 1 and passes == 1 and not rehearsal.cfg.optim.in_backward:
        activations = step.alone - gradients
    else:
        activations = step.replicated
    activations = max(activations, rehearsal.spare * share)
    return Memory(
        weights=weights,
        gradients=gradients,
        ema=ema,
        optimizer=optimizer * trained,
        activations=activations,
        gathered=gathered,
        text=parts.text,
        vae=parts.vae,
    )


def usable(card: int) -> float:
    """Bytes of a card's GiB that tensors can have: 1 GiB is the context's, a twentieth lies between blocks."""
    return 0.95 * card * GIB - GIB


def ways(cfg: RunConfig, gpus: int, tokens: int) -> Iterator[Way]:
    """Options from the fastest to the smallest: shorter passes, then recomputing, sharding, an optimizer in 8 bits.

    The last are passes of fewer than `TOKENS` tokens; `tokens` is of one image.
    """
    share = cfg.train.batch_size // gpus
    sizes = [n for n in range(cfg.train.micro_batch or share, 0, -1) if share % n == 0]
    large = [n for n in sizes if n * tokens >= TOKENS] or sizes[:1]
    over = [1, *([NODE] if gpus > NODE and gpus % NODE == 0 else []), *([gpus] if gpus > 1 else [])]
    kinds = list(Checkpointing)
    options = [(shards, kind) for shards in over for kind in kinds[:2]] + [(shards, kinds[2]) for shards in over]
    options = [one for one in options if kinds.index(one[1]) >= kinds.index(cfg.train.checkpointing)]
    bits = (False, True) if cfg.optim.kind is Kind.adamw else (False,)
    for some, eight_bit in product((large, sizes), bits):
        for (shards, kind), size in product(options, some):
            yield Way(ranks=gpus, shards=shards, micro_batch=size, checkpointing=kind, eight_bit=eight_bit)


def asked(cfg: RunConfig, gpus: int) -> Way:
    """The way that the config names."""
    parallel = getattr(getattr(cfg.train, "parallel", None), "value", "ddp")
    shards = {"fsdp": gpus, "hsdp": min(NODE, gpus)}.get(parallel, 1)
    micro_batch = cfg.train.micro_batch_of(gpus)
    return Way(ranks=gpus, shards=shards, micro_batch=micro_batch, checkpointing=cfg.train.checkpointing)


# --- the plan ---------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Question:
    """What is known of the machine and its price.

    mfu: share of the card's peak that all FLOPs of a step reach, recomputed ones too. price: of a GPU for an hour.
    images: in the data set; None: counted where it is on this machine, else a million.
    """

    gpus: int = 1
    gpu: str = "h100"
    mfu: float = 0.4
    price: float = 2.5
    ranks: list[int] = field(default_factory=lambda: [8, 64, 1024])
    images: int | None = None

    def __post_init__(self):
        if self.gpus < 1:
            raise ValueError(f"--gpus={self.gpus} must be at least 1; choose a divisor of train.batch_size")
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu={self.gpu} is not known; choose one of {', '.join(GPUS)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu={self.mfu} is a share of the peak, above 0 and at most 1; 0.4 is usual")
        if self.price < 0:
            raise ValueError(f"--price={self.price} must be at least 0; give what a GPU costs an hour")
        if min(self.ranks, default=2) < 2:
            raise ValueError(f"--ranks={self.ranks} must each be at least 2, to share the weights; 8,64,1024 is usual")
        if self.images is not None and self.images < 1:
            raise ValueError(f"--images={self.images} must be positive; give how many pictures the data has")


@dataclass(slots=True, kw_only=True)
class Fit:
    """The first way that fits a card; None where none does. `speed`: images/s beside those of the config's way."""

    card: int
    way: Way | None = None
    memory: Memory | None = None
    total: float = 0
    speed: float = 0


@dataclass(slots=True, kw_only=True)
class Work:
    """FLOPs of an image, and what follows for a whole run."""

    denoiser: float
    text: float
    peak_tflops: float
    images_per_s: float
    days: float
    gpu_hours: float
    cost: float


@dataclass(slots=True, kw_only=True)
class Disk:
    """Bytes: of a picture's latents, of a caption's text states at most, of all, and of a checkpoint."""

    images: int
    counted: bool  # or a round number
    latents: float
    text_float16: float
    text_int8: float
    total: float  # as the config reads them: states where data.text_states is true, in float16
    checkpoint: float


@dataclass(slots=True, kw_only=True)
class Plan:
    """All that is foretold of a run; bytes, seconds and FLOPs, without prefixes."""

    name: str
    model: str
    parameters: int
    trained: int
    resolution: int
    tokens: int
    precision: str
    batch_size: int
    images: int
    question: Question
    way: Way
    memory: Memory
    total: float
    card: int
    fits: list[Fit]
    shards: list[Shards]
    sharded: list[Memory]  # of each of `shards`: what weights are the cause of; no activations
    work: Work
    disk: Disk
    notes: list[str]


def plan(cfg: RunConfig, question: Question) -> Plan:
    """What the run takes; ValueError, as the run itself would raise it, where it cannot be."""
    way, parts = asked(cfg, question.gpus), frozen_parts(cfg)
    rehearsal = Rehearsal(cfg, parts)
    cards = _Cards(rehearsal, parts, question.gpus)
    held = cards.memory(way)
    return Plan(
        name=cfg.name,
        model=type(cfg.model).__name__.removesuffix("Config"),
        parameters=numbers(rehearsal.denoiser.parameters()),
        trained=numbers(rehearsal.free),
        resolution=cfg.data.resolution,
        tokens=cards.tokens,
        precision="bf16" if rehearsal.half else "fp32",
        batch_size=cfg.train.batch_size,
        images=cfg.train.images,
        question=question,
        way=way,
        memory=held,
        total=held.total,
        card=GPUS[question.gpu].memory,
        fits=[cards.fit(card) for card in CARDS],
        shards=[cards.shard(ranks) for ranks in question.ranks],
        sharded=[cards.rank(ranks) for ranks in question.ranks],
        work=work(cfg, question, rehearsal, parts.encoding),
        disk=disk(cfg, question, rehearsal, parts),
        notes=parts.notes,
    )


class _Cards:
    """What ways take, and which is the first that fits a card."""

    def __init__(self, rehearsal: Rehearsal, parts: Parts, gpus: int):
        self.rehearsal, self.parts, self.gpus = rehearsal, parts, gpus
        _, height, width = rehearsal.latent
        self.tokens = height * width // rehearsal.cfg.model.patch_size**2
        self._shards: dict[int, Shards] = {}

    def shard(self, ranks: int) -> Shards:
        if ranks not in self._shards:
            self._shards[ranks] = shard(self.rehearsal.cfg, ranks)
        return self._shards[ranks]

    def memory(self, way: Way, exact: bool = True) -> Memory:
        rehearse = self.rehearsal.step if exact else self.rehearsal.estimate
        step = rehearse(way.micro_batch, way.checkpointing)
        return memory(self.rehearsal, self.parts, way, self.shard(way.shards), step)

    def rank(self, ranks: int) -> Memory:
        """One of so many ranks that share the weights, with nothing that grows with a batch."""
        way = Way(ranks=ranks, shards=ranks, micro_batch=1, checkpointing=Checkpointing.none)
        return replace(self.without_activations(way), text=0, vae=0)

    def without_activations(self, way: Way) -> Memory:
        held = memory(self.rehearsal, self.parts, way, self.shard(way.shards), Step())
        return replace(held, activations=0)

    def fit(self, card: int) -> Fit:
        cfg, room = self.rehearsal.cfg, usable(card)
        for way in ways(cfg, self.gpus, self.tokens):
            if self.without_activations(way).total > room:
                continue  # rehearsing takes seconds
            # the estimate is for any batch, and on small ones a little low
            if self.memory(way, exact=False).total <= room and (held := self.memory(way)).total <= room:
                speed = recomputing(cfg, cfg.train.checkpointing) / recomputing(cfg, way.checkpointing)
                return Fit(card=card, way=way, memory=held, total=held.total, speed=speed)
        return Fit(card=card)


def recomputing(cfg: RunConfig, checkpointing: Checkpointing) -> float:
    """FLOPs of a step beside those of one that keeps everything: a forward pass is a third of it."""
    return 1 + (1 / 3 / cfg.train.checkpoint_every if checkpointing is Checkpointing.full else 0)


def work(cfg: RunConfig, question: Question, rehearsal: Rehearsal, encoding: float) -> Work:
    """FLOPs, time and price of the whole run, at the utilisation that was stated."""
    peak = PEAKS[GPUS[question.gpu].name][0 if rehearsal.half else 1]
    taken = rehearsal.flops * recomputing(cfg, cfg.train.checkpointing) + encoding
    images_per_s = question.gpus * peak * 1e12 * question.mfu / taken
    hours = cfg.train.images / images_per_s / 3600
    return Work(
        denoiser=rehearsal.flops,
        text=encoding,
        peak_tflops=peak,
        images_per_s=images_per_s,
        days=hours / 24,
        gpu_hours=hours * question.gpus,
        cost=hours * question.gpus * question.price,
    )


def disk(cfg: RunConfig, question: Question, rehearsal: Rehearsal, parts: Parts) -> Disk:
    """Bytes of the data set, as `prepare.encode` writes it, and of a checkpoint."""
    found = [_count(path) for path in cfg.data.paths]
    counted = question.images is None and bool(found) and all(found)
    images = question.images or (sum(found) if counted else 1_000_000)
    latents = 2 * torch.Size(rehearsal.latent).numel() * (1 + cfg.data.flip) * (1 + cfg.data.posterior)
    text16 = text8 = 0.0
    if rehearsal.cond.text is not None:
        tokens, width = rehearsal.cond.text.shape[1:]
        pooled = 2 * parts.pooled + (tokens if rehearsal.cond.text_mask is not None else 0)
        text16, text8 = 2 * tokens * width + pooled, tokens * (width + 2 * width / gcd(width, GROUP)) + pooled
    captions = text16 * max(1, len(cfg.data.caption_weights)) if cfg.data.text_states else 0
    kept = sum(p.nbytes for p in rehearsal.free) if cfg.adapts else rehearsal.weights  # adapters stand on a base
    return Disk(
        images=images,
        counted=counted,
        latents=latents,
        text_float16=text16,
        text_int8=text8,
        total=images * (latents + captions),
        checkpoint=kept + rehearsal.ema + rehearsal.optimizer,
    )


def _count(path: str) -> int:
    index = Path(path) / "index.json"
    return json.loads(index.read_text())["count"] if index.is_file() else 0
