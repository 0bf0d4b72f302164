"""From a position in the run to a batch: the only state of the data is the number of images seen.

Micro-batch j of a step covers positions `start + rank B/w + j m ...` for global batch B, w processes and
micro-batches of m. Record, caption and later noise are functions of `(seed, position)`, so a run resumes exactly
from one integer and sees the same images on any number of processes. Batches run on across the ends of epochs.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import draws
from data.shards import ShardReader

AESTHETIC = 6.0  # the score of a picture without one, from 0 to 10


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Which shards to train on, and how their captions are mixed."""

    path: str
    resolution: int
    caption_weights: list[float] = field(default_factory=list)  # one a caption of each record; none: all alike
    workers: int = 0
    verify: bool = True  # SHA-256 of every shard when a run starts
    text_states: bool = False  # read stored text states instead of encoding the captions
    exam: str | None = None  # "shapes": pictures are scored by the reader of data/shapes.py

    def __post_init__(self):
        weights = np.asarray(self.caption_weights, np.float64)
        if len(weights) and not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(
                f"data.caption_weights={self.caption_weights} must be at least 0 and not all 0; "
                "give one weight for each caption of a record"
            )
        if self.resolution < 1:
            raise ValueError(f"data.resolution={self.resolution} must be positive; give the picture's side in pixels")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be at least 0; 0 reads in the main process")
        if self.exam not in (None, "shapes"):
            raise ValueError(f"data.exam={self.exam} is unknown; choose shapes, or null for none")


@dataclass(slots=True)
class Batch:
    """What one micro-batch shows: captions and, where stored, the encodings of just those captions."""

    latents: torch.Tensor  # (b, c, h, w) float32
    captions: list[str]
    class_id: torch.Tensor  # (b,) int64, -1 where a record has none
    positions: torch.Tensor  # (b,) int64
    sizes: torch.Tensor  # (b, 7) float32: original height, width, crop top, left, height, width, aesthetic score
    text: torch.Tensor | None = None  # (b, n, d) float32
    text_mask: torch.Tensor | None = None  # (b, n) bool
    pooled: torch.Tensor | None = None  # (b, p) float32

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`; positions stay, because draws are made from them."""
        moving = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "positions"}
        tensors = {name: value for name, value in moving.items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def open_shards(config: DataConfig, *, num_classes: int | None = None, verify: bool | None = None) -> ShardReader:
    """The reader of `config.path`, checked against what the run needs of it.

    `num_classes` is that of a class-conditioned model, whose labels every record must then have. `verify`
    overrides the config's, for all processes but the first.
    """
    reader = ShardReader(config.path, verify=config.verify if verify is None else verify)
    if reader.index["resolution"] != config.resolution:
        raise ValueError(
            f"data.resolution={config.resolution}, but {config.path} holds pictures of {reader.index['resolution']}; "
            "change one of data.resolution and data.path"
        )
    if num_classes is not None and (reader.num_classes is None or reader.num_classes > num_classes):
        has = "records without a class" if reader.num_classes is None else f"{reader.num_classes} classes"
        raise ValueError(
            f"data.path={config.path} has {has}, but the model is conditioned on {num_classes} classes; "
            "prepare pictures of one thing with `python scripts/prepare.py shapes --two 0`"
        )
    if config.text_states and "text" not in reader.fields:
        raise ValueError(
            f"data.text_states=true, but {config.path} holds no text states; "
            "set it to false or prepare the data set with --text-states"
        )
    captions, weights = len(reader.record(0)["captions"]), len(config.caption_weights)
    if weights not in (0, captions):
        raise ValueError(
            f"data.caption_weights has {weights} values, but records of {config.path} have {captions} captions; "
            "give one weight for each, or none for all alike"
        )
    return reader


class Batches(Dataset):
    """Micro-batches of one process, from image `start` of the run to the end of the step that reaches `stop`.

    `batch_size` counts the images of one optimiser step over all processes; each process gets
    `batch_size / (world * micro_batch)` micro-batches a step.
    """

    def __init__(
        self,
        config: DataConfig,
        reader: ShardReader,
        seed: int,
        *,
        start: int,
        stop: int,
        batch_size: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size % (world * micro_batch):
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of {world} processes x micro_batch={micro_batch}; "
                "change one of them, so that every process gets whole micro-batches"
            )
        self._config, self._reader, self._seed = config, reader, seed
        self._start, self._batch_size, self._micro_batch = start, batch_size, micro_batch
        self._first = rank * (batch_size // world)
        self._micro_batches = batch_size // (world * micro_batch)
        self._steps = max(0, -(-(stop - start) // batch_size))

    def loader(self) -> DataLoader:
        """All of them in order, read by `data.workers` processes."""
        # a generator of its own: otherwise every iterator takes a number from torch's global one
        return DataLoader(self, batch_size=None, num_workers=self._config.workers, generator=torch.Generator())

    def __len__(self) -> int:
        return self._steps * self._micro_batches

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self._micro_batches)
        first = self._start + step * self._batch_size + self._first + micro * self._micro_batch
        return self.at(np.arange(first, first + self._micro_batch))

    def at(self, positions: np.ndarray) -> Batch:
        """The batch that shows given positions (b,) of the run."""
        reader = self._reader
        rows = draws.rows(self._seed, positions, len(reader))
        records = [reader.record(row) for row in rows]
        picks = self._picks(positions, records)
        batch = Batch(
            latents=torch.from_numpy(reader.array("latent", rows, np.float32)),
            captions=[record["captions"][pick] for record, pick in zip(records, picks, strict=True)],
            class_id=torch.tensor([-1 if (label := record.get("class_id")) is None else label for record in records]),
            positions=torch.from_numpy(positions),
            sizes=torch.tensor([_sizes(record, self._config.resolution) for record in records], dtype=torch.float32),
        )
        if self._config.text_states:
            batch.text = torch.from_numpy(reader.array("text", rows, np.float32, picks))
            if "mask" in reader.fields:
                mask = reader.array("mask", rows, picks=picks)
                longest = 1 + int(np.flatnonzero(mask.any(axis=0)).max(initial=0))  # after that, padding in all of them
                batch.text, batch.text_mask = batch.text[:, :longest], torch.from_numpy(mask[:, :longest])
            if "pooled" in reader.fields:
                batch.pooled = torch.from_numpy(reader.array("pooled", rows, np.float32, picks))
        return batch

    def _picks(self, positions: np.ndarray, records: list[dict]) -> np.ndarray:
        """Which caption (b,) of each record is shown: the inverse of the weights' cumulative sum."""
        u = draws.uniform(self._seed, "caption", positions)
        counts = np.array([len(record["captions"]) for record in records])
        weights = np.asarray(self._config.caption_weights, np.float64)
        if not len(weights):
            return (u * counts).astype(np.int64)
        if (counts != len(weights)).any():
            raise ValueError(
                f"data.caption_weights has {len(weights)} values, but a record has {counts[counts != len(weights)][0]} "
                "captions; give one weight for each, or none for all alike"
            )
        edges = weights.cumsum()
        return np.searchsorted(edges / edges[-1], u, side="right")


def _sizes(record: dict, side: int) -> list[float]:
    """A row of `Batch.sizes` from a record's JSON: by default the picture is whole and was never larger."""
    given = [record.get("original_size", [side, side]), record.get("crop", [0, 0]), record.get("aesthetic", AESTHETIC)]
    try:
        (height, width), (top, left), aesthetic = given
        return [float(number) for number in (height, width, top, left, side, side, aesthetic)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a record has original_size, crop and aesthetic {given}, but they are [height, width], [top, left] and a"
            " number; prepare the data set again"
        ) from error
