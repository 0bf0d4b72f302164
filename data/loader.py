"""From a position in the run to a batch: the only state of the data is the number of images seen.

Micro-batch j of a step covers positions `start + rank B/w + j m ...` for global batch B, w processes and
micro-batches of m. Record, caption, mirroring and later noise are functions of `(seed, position)`, so a run resumes
exactly from one integer and sees the same images on any number of processes. Batches run on across the ends of epochs.
`data/plan.py` says which record it is, with several data sets and with pictures of several sizes.

A damaged record keeps its place in the batch: it is named, marked and must count for nothing. Were another shown
instead, or the batch cut, the order of all that follows would depend on the state of a disk.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from data import draws
from data.ahead import ahead
from data.plan import Plan
from data.reader import ShardReader
from data.texts import restore

AESTHETIC = 6.0  # the score of a picture without one, from 0 to 10


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Which shards to train on, and how their captions are mixed.

    path: the folder of one data set; or else mix: of several, each with its share of the images of every batch.
    losses: what each set's mean loss counts in the loss, {class: 1, instance: 1} for prior preservation; {}: its share.
    caption_weights: by the caption's name; those that a record lacks leave their weight to the others; {}: all alike.
    chunk: images in a row that have one size, where there are several; None: a whole batch.
    """

    path: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    resolution: int  # side in pixels; of buckets, the root of their area
    caption_weights: dict[str, float] = field(default_factory=dict)
    chunk: int | None = None
    flip: bool = False  # every other picture is mirrored, from latents stored beside the others
    posterior: bool = False  # latents drawn from mean and deviation, where that is stored, and not the mean
    workers: int = 0  # threads that read ahead
    verify: bool = False  # SHA-256 of every shard when a run starts; each record's checksum is always compared
    max_damaged: int = 100  # records that may turn out damaged before the run gives up
    text_states: bool = False  # read stored text states instead of encoding the captions
    exam: str | None = None  # "shapes": pictures are scored by the reader of data/shapes.py

    def __post_init__(self):
        for key in ("caption_weights", "mix", "losses"):
            given = getattr(self, key)
            weights = np.array(list(given.values()), np.float64)
            if len(weights) and not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
                raise ValueError(
                    f"data.{key}={given} has weights that must be at least 0 and not all 0;"
                    f" {'give one for each caption to show' if key == 'caption_weights' else 'leave a set out instead'}"
                )
        if min(self.mix.values(), default=1) == 0 or bool(self.path) == bool(self.mix):
            raise ValueError(
                f"data.path={self.path} and data.mix={self.mix}: give the folder of one data set as data.path, or"
                " several and a share above 0 of each as data.mix"
            )
        if self.losses and self.losses.keys() != self.mix.keys():
            raise ValueError(
                f"data.losses={self.losses} does not weigh the sets of data.mix={self.mix}; give a weight for each of"
                " these, or {} for their shares"
            )
        if self.resolution < 1:
            raise ValueError(f"data.resolution={self.resolution} must be positive; give the picture's side in pixels")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be at least 0; 0 reads nothing ahead")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"data.chunk={self.chunk} must be positive; choose a divisor of train.batch_size")
        if self.exam not in (None, "shapes"):
            raise ValueError(f"data.exam={self.exam} is unknown; choose shapes, or null for none")

    @property
    def paths(self) -> list[str]:
        """The folders of all data sets."""
        return [self.path] if self.path else list(self.mix)


@dataclass(slots=True)
class Batch:
    """What one micro-batch shows, as it is stored; `to` makes it what is computed with."""

    latents: torch.Tensor  # (b, c, h, w) float16
    captions: list[str]
    class_id: torch.Tensor  # (b,) int64, -1 where a record has none
    positions: torch.Tensor  # (b,) int64
    sizes: torch.Tensor  # (b, 7) float32: original height, width, crop top, left, height, width, aesthetic score
    valid: torch.Tensor  # (b,) bool: False where a record is damaged, and its numbers mean nothing
    damaged: list[str] = field(default_factory=list)  # where and how, one sentence each
    std: torch.Tensor | None = None  # (b, c, h, w) float16: deviation of the autoencoder's posterior
    text: torch.Tensor | None = None  # (b, n, d) float16, or int8 with a scale
    text_scale: torch.Tensor | None = None  # (b, n, d/g) float16
    text_mask: torch.Tensor | None = None  # (b, n) bool
    pooled: torch.Tensor | None = None  # (b, p) float16
    weight: torch.Tensor = field(default_factory=lambda: torch.ones(()))  # (b,) float32: of each loss

    def to(self, device: torch.device | str) -> "Batch":
        """The same with its tensors on `device` and in float32, but for those that draws and counts are made of."""
        there = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        scale = there.pop("text_scale", None)
        if scale is not None:
            there["text"] = restore(there["text"], scale)
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in there.items()}
        return replace(self, **floats, text_scale=None)

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, which a CUDA device copies from while it computes."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("positions", "valid")}
        return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def open_shards(config: DataConfig, *, num_classes: int | None = None, verify: bool | None = None) -> list[ShardReader]:
    """The readers of `config.path` or `config.mix`, checked against each other and against what the run needs.

    `num_classes` is that of a class-conditioned model, whose labels every record must then have. `verify`
    overrides the config's, for all processes but the first.
    """
    readers = [ShardReader(path, verify=config.verify if verify is None else verify) for path in config.paths]
    for reader in readers:
        _check(config, reader, num_classes)
        for key, mine, first in (
            ("autoencoder", reader.index["vae"].get("id"), readers[0].index["vae"].get("id")),
            ("text states", reader.text, readers[0].text),
            ("classes", reader.num_classes, readers[0].num_classes),
        ):
            if mine != first and (key != "text states" or config.text_states):
                raise ValueError(
                    f"data.mix joins {readers[0].folder} and {reader.folder}, which differ in {key}:"
                    f" {first} and {mine}; prepare them alike"
                )
    known = set().union(*(reader.index["captions"] for reader in readers))
    for name in config.caption_weights.keys() - known:
        raise ValueError(
            f"data.caption_weights.{name}={config.caption_weights[name]}, but no record of {', '.join(config.paths)}"
            f" has a caption of that name; there are {', '.join(sorted(known)) or 'no captions'}"
        )
    return readers


def _check(config: DataConfig, reader: ShardReader, num_classes: int | None) -> None:
    path = reader.folder
    if reader.index["resolution"] != config.resolution:
        raise ValueError(
            f"data.resolution={config.resolution}, but {path} holds pictures of {reader.index['resolution']};"
            " change one of data.resolution and data.path"
        )
    if num_classes is not None and (reader.num_classes is None or reader.num_classes > num_classes):
        has = "records without a class" if reader.num_classes is None else f"{reader.num_classes} classes"
        raise ValueError(
            f"data.path={path} has {has}, but the model is conditioned on {num_classes} classes; "
            "prepare pictures of one thing with `python scripts/prepare.py shapes --two 0`"
        )
    if config.text_states and not reader.text:
        raise ValueError(
            f"data.text_states=true, but {path} holds no text states; "
            "set it to false, or prepare the data set with them"
        )
    for key, name in (("flip", "flip"), ("posterior", "std")):
        if getattr(config, key) and name not in reader.fields:
            raise ValueError(
                f"data.{key}=true, but {path} was prepared without; set it to false, or prepare the data set with"
                f" encode.{name}=true"
            )


class Batches:
    """Micro-batches of one process, from image `start` of the run to the end of the step that reaches `stop`.

    `batch_size` counts the images of one optimiser step over all processes; each process gets
    `batch_size / (world * micro_batch)` micro-batches a step.
    """

    def __init__(
        self,
        config: DataConfig,
        sets: Sequence[ShardReader],
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
        self._config, self._sets, self._seed = config, sets, seed
        self._start, self._batch_size, self._micro_batch = start, batch_size, micro_batch
        self._first = rank * (batch_size // world)
        self._micro_batches = batch_size // (world * micro_batch)
        self._steps = max(0, -(-(stop - start) // batch_size))
        shapes = {(b.height, b.width): b.shape for reader in sets for b in reader.buckets}
        self._shapes, places = list(shapes.items()), [[(b.height, b.width) for b in reader.buckets] for reader in sets]
        self._rows = [
            [reader.rows_of(place.index(size)) if size in place else np.empty(0, np.int64) for size in shapes]
            for reader, place in zip(sets, places, strict=True)
        ]
        chunk = config.chunk or batch_size
        if len(shapes) > 1 and (batch_size % chunk or chunk % micro_batch or start % chunk):
            raise ValueError(
                f"data.chunk={chunk} images have one size: it must divide train.batch_size={batch_size} and the"
                f" {start} images seen, and be a multiple of micro_batch={micro_batch}; choose another data.chunk"
            )
        counts = [[len(rows) for rows in mine] for mine in self._rows]
        self._plan = Plan(seed, counts, list(config.mix.values()) or None, chunk)
        wanted = [config.losses[path] for path in config.mix] if config.losses else self._plan.shares
        self._weights = np.array(wanted, np.float32) / np.array(self._plan.shares, np.float32)
        self._choices = lru_cache(maxsize=1024)(self._choose)

    def loader(self) -> Iterator[Batch]:
        """All of them in order, read ahead by `data.workers` threads.

        Not by processes: a batch that comes from one lies in new shared memory, which costs more than reading it.
        """
        read = self._pinned if torch.cuda.is_available() else self.__getitem__
        workers = self._config.workers
        if not workers:
            yield from map(read, range(len(self)))
            return
        yield from ahead(read, range(len(self)), workers, 2 * workers)

    def _pinned(self, number: int) -> Batch:
        return self[number].pin_memory()

    def __len__(self) -> int:
        return self._steps * self._micro_batches

    def __getitem__(self, number: int) -> Batch:
        if number + 1 < len(self):
            self._advise(self._positions(number + 1))
        return self.at(self._positions(number))

    def _positions(self, number: int) -> np.ndarray:
        step, micro = divmod(number, self._micro_batches)
        first = self._start + step * self._batch_size + self._first + micro * self._micro_batch
        return np.arange(first, first + self._micro_batch)

    def ledger(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data set and record, (b,) each, of positions (b,) of the run."""
        return self._find(positions)[1:]

    def _find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Size, data set and record, (b,) each."""
        sets, sizes, numbers = self._plan(positions)
        rows = np.empty_like(numbers)
        for one, size in np.unique(np.stack([sets, sizes], 1), axis=0).tolist():
            here = (sets == one) & (sizes == size)
            rows[here] = self._rows[one][size][numbers[here]]
        return sizes, sets, rows

    def _advise(self, positions: np.ndarray) -> None:
        _, sets, rows = self._find(positions)
        for one in np.unique(sets):
            self._sets[one].advise(rows[sets == one])

    def at(self, positions: np.ndarray) -> Batch:
        """The batch that shows given positions (b,) of the run, of pictures of one size."""
        sizes, sets, rows = self._find(positions)
        (height, width), shape = self._shapes[sizes[0]]
        wrong: list[str | None] = [None] * len(positions)
        records = self._records(sets, rows, wrong)
        mirrored = draws.uniform(self._seed, "flip", positions) < (0.5 if self._config.flip else 0)
        latents = np.empty((len(positions), *shape), np.float16)
        self._read({"latent": ~mirrored, "flip": mirrored}, sets, rows, latents, wrong)
        std = np.empty_like(latents) if self._config.posterior else None
        if std is not None:
            self._read({"std": np.ones_like(mirrored)}, sets, rows, std, wrong)
        captions = self._captions(positions, records)
        texts = self._texts(captions, sets, wrong) if self._config.text_states else {}
        labels = [record.get("class_id") for record in records]
        return Batch(
            latents=torch.from_numpy(latents),
            captions=captions,
            class_id=torch.tensor([-1 if label is None else label for label in labels]),
            positions=torch.from_numpy(positions),
            sizes=torch.tensor([_sizes(record, height, width) for record in records], dtype=torch.float32),
            weight=torch.from_numpy(self._weights[sets]),
            valid=torch.tensor([sentence is None for sentence in wrong]),
            damaged=[sentence for sentence in wrong if sentence],
            std=None if std is None else torch.from_numpy(std),
            **texts,
        )

    def _records(self, sets: np.ndarray, rows: np.ndarray, wrong: list[str | None]) -> list[dict[str, Any]]:
        """The JSON of each record; a damaged one has no caption, and a class that means nothing."""
        records: list[dict[str, Any]] = [{}] * len(rows)
        for one in np.unique(sets):
            here = np.flatnonzero(sets == one)
            found, damaged = self._sets[one].records(rows[here])
            for i, record, sentence in zip(here, found, damaged, strict=True):
                records[i], wrong[i] = record or {"captions": {}, "class_id": 0}, sentence
        return records

    def _read(
        self,
        fields: dict[str, np.ndarray],
        sets: np.ndarray,
        rows: np.ndarray,
        out: np.ndarray,
        wrong: list[str | None],
    ) -> None:
        """Fill `out` (b, ...) with the field that each record is to show."""
        for name, chosen in fields.items():
            for one in np.unique(sets[chosen]):
                here = np.flatnonzero(chosen & (sets == one))
                found = self._sets[one].read(name, rows[here], [out[i] for i in here])
                for i, sentence in zip(here, found, strict=True):
                    wrong[i] = wrong[i] or sentence

    def _captions(self, positions: np.ndarray, records: list[dict[str, Any]]) -> list[str]:
        """Which caption of each record is shown: the inverse of the weights' cumulative sum."""
        shown = []
        for u, record in zip(draws.uniform(self._seed, "caption", positions).tolist(), records, strict=True):
            names, edges = self._choices(tuple(record["captions"]))
            shown.append(record["captions"][names[bisect_right(edges, u)]] if names else "")
        return shown

    def _choose(self, given: tuple[str, ...]) -> tuple[list[str], list[float]]:
        """Of the captions that a record has, those to choose from, and the edges between their shares of 0 to 1."""
        weights = self._config.caption_weights
        names = [name for name in weights if name in given and weights[name] > 0]
        if not names:  # better another caption than none
            names, weights = list(given), dict.fromkeys(given, 1.0)
        edges = np.cumsum([weights[name] for name in names])
        return names, (edges / edges[-1:]).tolist()

    def _texts(self, captions: list[str], sets: np.ndarray, wrong: list[str | None]) -> dict[str, torch.Tensor]:
        """The text states of the captions shown, by their names in `Batch`; a damaged record has zeros for them."""
        whole = np.array([sentence is None for sentence in wrong])
        groups = [np.flatnonzero(whole & (sets == one)) for one in range(len(self._sets))]
        parts = [
            (here, reader.texts([captions[i] for i in here]))
            for here, reader in zip(groups, self._sets, strict=True)
            if here.size or reader is self._sets[0]
        ]
        for here, part in parts:
            for i, sentence in zip(here, part.damaged, strict=True):
                wrong[i] = wrong[i] or sentence
        longest = max(part.states.shape[1] for _, part in parts)
        texts = {}
        for name in ("states", "scale", "mask", "pooled"):
            array = getattr(parts[0][1], name)
            if array is None:
                continue
            if len(array) < len(sets):  # of several data sets, or with something damaged among them
                shape = array.shape[1:] if name == "pooled" else (longest, *array.shape[2:])
                array = np.zeros((len(sets), *shape), array.dtype)
                for here, part in parts:
                    stored = getattr(part, name)
                    array[here, : stored.shape[1]] = stored
            texts[{"states": "text", "scale": "text_scale", "mask": "text_mask"}.get(name, name)] = array
        if "text_mask" in texts:
            texts["text_mask"][:, 0] |= ~texts["text_mask"].any(1)  # to read nothing at all would give no number
        return {name: torch.from_numpy(array) for name, array in texts.items()}


def _sizes(record: dict[str, Any], height: int, width: int) -> list[float]:
    """A row of `Batch.sizes` from a record's JSON: by default the picture is whole and was never larger."""
    given = [
        record.get("original_size", [height, width]), record.get("crop", [0, 0]), record.get("aesthetic", AESTHETIC)
    ]  # fmt: skip
    try:
        (original_height, original_width), (top, left), aesthetic = given
        return [float(n) for n in (original_height, original_width, top, left, height, width, aesthetic)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a record has original_size, crop and aesthetic {given}, but they are [height, width], [top, left] and a"
            " number; prepare the data set again"
        ) from error
