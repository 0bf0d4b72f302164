"""What a run is made of. Every key of every YAML is a field of one of these dataclasses, or an error.

Clocks (`every`, `images`, `warmup`) count images, not steps: they survive a change of batch or world size.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.loader import DataConfig
from diffusion.objective import ObjectiveConfig
from inference.description import SamplerConfig
from inference.device import Precision
from models.autoencoder import AutoencoderConfig
from models.base import ModelConfig
from models.layers import Checkpointing
from models.text import TextConfig
from training.alignment import AlignConfig, check_alignment
from training.checkpoint import CheckpointConfig
from training.distributed import Parallel
from training.ema import EMAConfig
from training.guard import GuardConfig
from training.metrics import LoggerConfig
from training.optim import OptimConfig, Weights
from training.precision import FP8Config, check_main_grad
from training.speed import Attention, Compile


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Length, batch and the make of a step."""

    images: int = 1_000_000  # length of the run
    stop_at: int | None = None  # leave after a save once this many images were seen: a run in instalments
    batch_size: int = 256  # global: over all ranks and micro-batches
    micro_batch: int | None = None  # images a rank passes at once; None: its whole share
    log_every: int = 10_000  # images between two lines of the log
    text_dropout: float = 0.1  # share of images whose condition is replaced by the null
    encoder_dropout: list[float] = field(default_factory=list)  # of each encoder's part by itself; [] is none
    precision: Precision = Precision.auto
    checkpointing: Checkpointing = Checkpointing.none
    checkpoint_every: int = 1  # of so many blocks one is recomputed
    channels_last: bool = False  # for convolutions
    compile: Compile = Compile.none
    attention: Attention = Attention.auto
    parallel: Parallel = Parallel.ddp  # what several ranks share
    timeout: float = 600  # seconds in which every rank must finish a step
    max_restarts: int = 3  # starts without progress before the run asks not to be started again

    def __post_init__(self):
        if self.images <= 0 or self.batch_size <= 0:
            raise ValueError(
                f"train.images={self.images} and train.batch_size={self.batch_size} must be positive;"
                " choose larger ones"
            )
        if self.checkpoint_every < 1:
            raise ValueError(
                f"train.checkpoint_every={self.checkpoint_every} counts blocks from 1, which recomputes each;"
                " for none choose train.checkpointing=none"
            )
        if self.channels_last and self.parallel is not Parallel.ddp:
            raise ValueError(
                f"train.channels_last=true cannot be had with train.parallel={self.parallel.value}: torch shards only"
                " tensors in the usual order; choose train.parallel=ddp, or train.channels_last=false"
            )
        if self.timeout <= 0 or self.max_restarts < 0:
            raise ValueError(
                f"train.timeout={self.timeout} must be positive and train.max_restarts={self.max_restarts} at least 0;"
                " choose 600 and 3"
            )
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"train.text_dropout={self.text_dropout} is a share; choose one between 0 and 1")
        if not all(0 <= share <= 1 for share in self.encoder_dropout):
            raise ValueError(
                f"train.encoder_dropout={self.encoder_dropout} has a share outside 0 to 1;"
                " SD3 was trained with 0.464 for each of its three"
            )

    def micro_batch_of(self, world: int) -> int:
        """Images a rank passes at once, after checking that everything divides."""
        share, rest = divmod(self.batch_size, world)
        if rest:
            raise ValueError(
                f"train.batch_size={self.batch_size} is the global batch and must be divisible by the {world} ranks;"
                f" choose {share * world or world} or {(share + 1) * world}"
            )
        micro = self.micro_batch or share
        if share % micro:
            fits = [n for n in range(1, share + 1) if share % n == 0]
            raise ValueError(
                f"train.micro_batch={micro} must divide a rank's share of {share} images; choose one of {fits}"
            )
        return micro


@dataclass(slots=True, kw_only=True)
class SampleConfig:
    """The grid of pictures made at fixed seeds while training."""

    every: int = 100_000  # images between two grids
    first: int = 10_000  # the first grid comes early, to show that all is well
    prompts: list[str] = field(default_factory=list)  # empty: taken from the data
    count: int = 8  # pictures of a grid
    seed: int = 1  # of their noise, and of the prompts if the data gives them
    base: str | None = None  # a run folder, checkpoint or pipeline that draws until objective.range begins


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """The exam at the end of a run, where the data has one."""

    count: int = 0  # prompts of each kind; 0: none
    batch: int = 50  # pictures drawn together
    seed: int = 1234  # of prompts and noise


INIT_KEYS = {
    "from": "a run folder, checkpoint or pipeline whose weights to start from",
    "mode": "anchor or mean: how per-block modulation becomes shared modulation",
    "weights": "ema or model: which of its weights",
}


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """A whole run. `name` names its folder, outputs/<name>, and the same command continues it."""

    name: str
    seed: int = 0  # of all that is drawn: weights, order, captions, noise, times
    outputs: str = "outputs"  # the folder of all runs
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    sampler: SamplerConfig
    optim: OptimConfig
    vae: AutoencoderConfig
    text: TextConfig | None = None
    logger: LoggerConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    align: AlignConfig = field(default_factory=AlignConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # a dict, because `from` cannot be the name of a field; its keys are checked below
    init: dict[str, Any] = field(default_factory=lambda: {"from": None, "mode": "anchor", "weights": "ema"})

    def __post_init__(self):
        for key in self.init.keys() - INIT_KEYS.keys():
            raise ValueError(f"init.{key} is not a key; choose one of {', '.join(f'init.{k}' for k in INIT_KEYS)}")
        for key, choices in (("mode", ("anchor", "mean")), ("weights", ("ema", "model"))):
            if self.init[key] not in choices:
                raise ValueError(f"init.{key}={self.init[key]} is not a choice; choose one of {', '.join(choices)}")
        if self.optim.weights is Weights.bf16 and self.train.precision is Precision.fp32:
            raise ValueError(
                "optim.weights=bf16 is less than train.precision=fp32 computes with; choose train.precision=bf16, or"
                " optim.weights=fp32"
            )
        check_main_grad(self.fp8, self.train.parallel, self.optim.in_backward)
        if self.optim.in_backward and self.guard.deviations is not None:
            raise ValueError(
                "optim.in_backward=true updates before a spike can be judged;"
                " give guard.deviations=null or optim.in_backward=false"
            )
        if self.model.condition == "text" and self.text is None:
            raise ValueError(
                f"model={type(self.model).__name__} reads text, but there are no encoders;"
                " choose text=shapes or text=sdxl"
            )
        if self.model.condition != "text" and self.text is not None and self.text.lora.rank is not None:
            raise ValueError(
                f"text.lora.rank={self.text.lora.rank} trains text encoders, which a model of classes does not read;"
                " give text.lora.rank=null, or model.lora.rank"
            )
        check_alignment(self.align, self.model, self.adapts)
        if self.sample.base and self.objective.range[1] == 1:
            raise ValueError(
                f"sample.base={self.sample.base} draws for a refiner, but objective.range={self.objective.range} is of"
                " a model that draws from noise itself; give sample.base=null, or a range that ends below 1"
            )
        if self.adapts:
            self._check_adapters()

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and nothing else."""
        return self.model.lora.rank is not None or (self.text is not None and self.text.lora.rank is not None)

    def _check_adapters(self) -> None:
        for wrong, told, right in (
            (self.train.parallel is not Parallel.ddp, "train.parallel shards a whole network", "train.parallel=ddp"),
            (self.train.precision is Precision.fp8, "train.precision=fp8 multiplies by weights in training", "bf16"),
            (
                self.optim.weights is Weights.bf16,
                "optim.weights=bf16 would round what stays as it is",
                "optim.weights=fp32",
            ),
        ):
            if wrong:
                raise ValueError(f"{told}, but lora.rank trains adapters on one that is frozen; choose {right}")
        if self.text is not None and self.text.lora.rank is not None and self.data.text_states:
            raise ValueError(
                f"text.lora.rank={self.text.lora.rank} trains the text encoders, but data.text_states=true reads what"
                " they once encoded; give data.text_states=false"
            )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.outputs) / self.name
