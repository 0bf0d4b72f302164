"""Pictures to latents: decode, choose a bucket, resize and crop, encode, and write shards that training reads.

    source -> filtered, captioned -> decoded, upright, RGB -> (h, w) of its bucket -> latent (c, h/f, w/f)

A part of the source becomes a shard. Pictures are decoded by threads ahead of the autoencoder, which takes batches of
one bucket. Batches are filled as pictures come, whatever bucket theirs is, and records are written in the order of the
source; at most WINDOW of them wait, then the batch of the oldest goes as it is. So which pictures are encoded together
follows from the source and the recipe alone, and the bytes are the same with one process or many. They do depend on
the device: its arithmetic differs in the last bits.

A record says `original_size`, the picture's before resizing, and `crop`, which SDXL is conditioned on.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.ahead import ahead
from prepare.parts import Part, Tally, dropped, finished, run_step

if TYPE_CHECKING:
    from data.buckets import Size
    from data.shards import Table
    from data.texts import TextLayout
    from models.autoencoder import Autoencoder, AutoencoderConfig
    from models.text import TextConfig
    from prepare.filter import FilterConfig
    from prepare.sources import Sample, Source


WINDOW = 512  # records that wait for one before them
TEXT_BATCH = 64  # captions encoded together
PILLOW_LIMIT = 89_478_485  # pixels at which Pillow itself begins to refuse


class TextStates(Enum):
    """How the states of the text encoders are stored, if they are."""

    none = "none"  # training encodes the captions itself
    float16 = "float16"
    int8 = "int8"  # half the bytes, at 8 bits a number


@dataclass(slots=True, kw_only=True)
class EncodeConfig:
    """What becomes of a picture on its way to a latent.

    resolutions: one data set each, of about its square of pixels. step: sides of buckets are multiples of it; None is
    64, SDXL's, from 512 px on, and below an eighth of the resolution, at least two latent cells so that patches of
    2 x 2 fit: larger patches, and UNets that halve three times (SD 1.x: 64), need it given. flip, std: also store the
    mirrored picture's latent, the posterior's deviation.
    """

    resolutions: list[int] = field(default_factory=lambda: [256])
    buckets: bool = True  # else squares, cut from the centre
    step: int | None = None
    max_aspect: float = 4.0  # longer side / shorter side; what is beyond is dropped, for a crop would lose too much
    upscale: bool = False  # whether pictures smaller than their bucket are enlarged, or dropped
    max_pixels: int = 2**26  # of a picture as it comes: 8192 x 8192, which takes 0.3 GB to decode
    batch: int = 8  # pictures encoded together
    flip: bool = False
    std: bool = False
    text_states: TextStates = TextStates.none
    uncaptioned: bool = False  # whether pictures without a caption are kept, to train on classes or on nothing
    max_faults: float = 0.1  # share of pictures that may be broken

    def __post_init__(self):
        if not self.resolutions or min(self.resolutions) < 1 or len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(
                f"encode.resolutions={self.resolutions} must be one or several different sides in pixels;"
                " choose for instance [256] or [256, 1024]"
            )
        if self.step is not None and self.step < 1:
            raise ValueError(f"encode.step={self.step} must be at least 1; 64 is usual, null chooses")
        if self.max_aspect < 1:
            raise ValueError(f"encode.max_aspect={self.max_aspect} is below 1, a square's; 4 is SDXL's")
        if not 1 <= self.max_pixels <= PILLOW_LIMIT:
            raise ValueError(
                f"encode.max_pixels={self.max_pixels} must be within 1 to {PILLOW_LIMIT}, beyond which Pillow refuses;"
                f" {2**26} is 8192 x 8192"
            )
        if self.batch < 1:
            raise ValueError(f"encode.batch={self.batch} must be at least 1; 8 fits most")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"encode.max_faults={self.max_faults} is a share of the pictures; choose from 0 to 1")


def encode(
    config: EncodeConfig,
    source: "Source",
    folder: Path,
    *,
    resolution: int,
    vae: "AutoencoderConfig",
    text: "TextConfig | None" = None,
    filters: "FilterConfig | None" = None,
    left_out: Path | None = None,
    captions: Path | None = None,
    processes: int = 1,
    tick: Callable[[int], None] | None = None,
) -> Tally:
    """Make `folder` the set of latents of one resolution from all parts of `source`, with its index.

    `left_out` is a finished step whose dropped keys are skipped, `captions` one whose NAME.jsonl add captions.
    `filters` drops pictures by what the source says of them. Under torchrun each process encodes on its own
    accelerator. A set that is complete is left alone. Raises ValueError for settings that do not fit each other, and
    if nothing at all is kept.
    """
    import torch

    from prepare.texts import text_layout

    wanted = config.text_states is not TextStates.none
    if wanted and text is None:
        raise ValueError(
            f"encode.text_states={config.text_states.value} needs text encoders; choose some with text=,"
            " or encode.text_states=none"
        )
    info = json.loads(json.dumps(_built(vae).info()))  # as it will be read back
    layout = text_layout(_built(text), config.text_states.value) if wanted and text else None
    job = _Job(
        config=config,
        source=source,
        sizes=sizes(config, resolution, info["factor"]),
        vae=vae,
        text=text,
        layout=layout,
        filters=filters,
        skipped=[step for step in (left_out, captions) if step],
        captions=captions,
        threads=torch.get_num_threads(),
        decoders=max(1, len(os.sched_getaffinity(0)) // max(processes, 1)),
    )
    recipe = {
        **{key: getattr(config, key) for key in ("max_aspect", "upscale", "max_pixels", "batch", "flip", "std")},
        "buckets": job.sizes,
        "uncaptioned": config.uncaptioned,
        "resolution": resolution,
        "vae": {"id": info["id"], "precision": vae.precision.name},
        "text_states": asdict(layout) | _reading(text) if layout and text else None,
        "filters": _plain(asdict(filters)) if filters else None,
        "left_out": finished(left_out)["digest"] if left_out else None,
        "captions": finished(captions)["digest"] if captions else None,
        "input": source.digest,
    }
    if processes > 1:
        _BUILT.clear()  # the workers build their own
    work = partial(_encode_part, job)
    tally = run_step(
        folder,
        source.names,
        work,
        recipe=recipe,
        title="encode",
        max_faults=config.max_faults,
        processes=processes,
        tick=tick,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        _index(folder, resolution, info, recipe)
    return tally


def sizes(config: EncodeConfig, resolution: int, factor: int) -> "list[Size]":
    """The buckets (height, width) of a resolution for an autoencoder of `factor` pixels a cell.

    Raises ValueError where they would not be whole cells, or the square is not among them.
    """
    from data.buckets import bucket_sizes

    step = config.step or _default_step(resolution, factor)
    if config.buckets and step % factor:
        raise ValueError(
            f"encode.step={step} is not a multiple of {factor}, the autoencoder's factor; choose for instance"
            f" {_default_step(resolution, factor)}"
        )
    unit, what = (step, "encode.step") if config.buckets else (factor, "the autoencoder's factor")
    if resolution % unit:
        raise ValueError(
            f"encode.resolutions has {resolution}, which is not a multiple of {unit}, {what};"
            f" choose for instance {max(1, round(resolution / unit)) * unit}"
        )
    return bucket_sizes(resolution, step, config.max_aspect) if config.buckets else [(resolution, resolution)]


def _default_step(resolution: int, factor: int) -> int:
    """Up to 64 and an eighth of the resolution, the largest multiple of two cells that divides the resolution."""
    cells = 2 * factor
    largest = max(cells, min(64, resolution // 8))
    return max((step for step in range(cells, largest + 1, cells) if resolution % step == 0), default=cells)


# --- a part -------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Job:
    """All that a process must know to encode a part."""

    config: EncodeConfig
    source: "Source"
    sizes: "list[Size]"
    vae: "AutoencoderConfig"
    text: "TextConfig | None"
    layout: "TextLayout | None"
    filters: "FilterConfig | None"
    skipped: list[Path]
    captions: Path | None
    threads: int  # of torch: sums are ordered by thread, so all processes have as many
    decoders: int


@dataclass(slots=True, kw_only=True)
class _Picture:
    """A row on its way: dropped if it has a reason, encoded once it has arrays. `amiss` does not end it."""

    key: str
    reason: str = ""
    detail: str = ""
    fault: bool = False
    amiss: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    size: "Size" = (0, 0)
    pixels: np.ndarray | None = None  # (h, w, 3) uint8
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        return not self.reason and not self.arrays


def _encode_part(job: _Job, part: Part) -> None:
    import torch

    from data.shards import Shard
    from prepare.texts import add_texts

    torch.set_num_threads(job.threads)
    config, layout, vae = job.config, job.layout, _built(job.vae)
    texts = part.path(".text.tar") if layout else None
    fresh = [""] if layout and config.uncaptioned else []  # captions to be encoded
    known: set[str] = set()
    with ExitStack() as stack:
        shard = stack.enter_context(Shard(part.path(".tar"), texts, number=int(part.name), text=layout))
        depth = config.batch + 2 * job.decoders
        pictures = ahead(partial(_look, job), _samples(job, part.name), job.decoders, depth)
        stack.callback(pictures.close)
        for picture in _batched(pictures, partial(_add_latents, config, vae), config.batch):
            if picture.reason:
                part.drop(picture.key, picture.reason, picture.detail, fault=picture.fault)
                continue
            shard.add(picture.record, size=picture.size, **picture.arrays)
            if picture.amiss:
                part.note(picture.key, picture.amiss)
            else:
                part.keep()
            if layout:
                new = [caption for caption in picture.record["captions"].values() if caption not in known]
                known.update(new)
                fresh.extend(dict.fromkeys(new))
                while len(fresh) >= TEXT_BATCH:
                    add_texts(shard, _built(job.text), fresh[:TEXT_BATCH], TEXT_BATCH)
                    del fresh[:TEXT_BATCH]
        if fresh:
            add_texts(shard, _built(job.text), fresh, TEXT_BATCH)
        shard.finish(part.path(".npz"))


def _samples(job: _Job, name: str) -> "Iterator[Sample]":
    """The rows of a part that are still there, with all their captions."""
    gone = {key for step in job.skipped for key in dropped(step, name)}
    written: dict[str, dict[str, str]] = {}
    if job.captions:
        with open(job.captions / f"{name}.jsonl", encoding="utf-8") as file:
            written = {line["key"]: line["captions"] for line in map(json.loads, file)}
    for sample in job.source.read(name):
        if sample.key not in gone:
            captions = sample.captions | written.get(sample.key, {})
            sample.captions = {name: caption.strip() for name, caption in captions.items() if caption.strip()}
            yield sample


def _look(job: _Job, sample: "Sample") -> _Picture:
    """Decode a sample and fit it to its bucket, or say why not; runs in a thread."""
    from data.buckets import fit, nearest, scale_of
    from data.decode import Undecodable, decode

    config, key = job.config, sample.key
    if sample.image is None or sample.problem:
        return _Picture(key=key, reason=sample.problem or "no_image", fault=True)
    if job.filters and (reason := _unwanted(sample, job.filters)):
        return _Picture(key=key, reason=reason)
    if not sample.captions and not config.uncaptioned:
        return _Picture(key=key, reason="no_caption")
    try:
        image = decode(sample.image, max_pixels=config.max_pixels)
    except Undecodable as error:
        return _Picture(key=key, reason=error.reason, detail=error.detail, fault=True)
    height, width = image.height, image.width
    detail = f"{width} x {height} pixels"
    if max(height, width) > config.max_aspect * min(height, width):
        return _Picture(key=key, reason="too_wide", detail=detail)
    size = nearest(height, width, job.sizes)
    if not config.upscale and scale_of(height, width, size) > 1:
        return _Picture(key=key, reason="too_small", detail=f"{detail} for {size[1]} x {size[0]}")
    pixels, crop = fit(image, size)
    record = {"key": key, "captions": sample.captions, "original_size": [height, width], "crop": list(crop)}
    amiss = str(sample.about.get("amiss", ""))
    return _Picture(key=key, amiss=amiss, record=record | _known(sample.about), size=size, pixels=pixels)


def _unwanted(sample: "Sample", filters: "FilterConfig") -> str | None:
    """Why the filters drop a sample; what its source does not say is taken from the file."""
    from data.decode import header_size
    from prepare.filter import why_not

    assert sample.image is not None
    about = sample.about | {f"caption_{name}": caption for name, caption in sample.captions.items()}
    if size := header_size(sample.image):
        about = {"width": size[0], "height": size[1]} | about
    if filters.removed:
        about = {"sha256": hashlib.sha256(sample.image).hexdigest()} | about
    return why_not(about, filters)


def _known(about: dict[str, Any]) -> dict[str, Any]:
    """What training may use, and what is needed to find a picture again."""
    from prepare.metadata import known

    ours, found = known(about), {}
    try:
        if np.isfinite(aesthetic := float(ours.get("aesthetic", "nan"))):
            found["aesthetic"] = aesthetic
    except (TypeError, ValueError):
        pass  # not a number: not known
    label = about.get("class_id")
    if isinstance(label, int) and label >= 0:
        found["class_id"] = label
    return found | {name: ours[name] for name in ("url", "sha256") if isinstance(ours.get(name), str)}


def _batched(
    pictures: Iterable[_Picture], add_latents: Callable[[list[_Picture]], None], batch: int
) -> Iterator[_Picture]:
    """All pictures in their order, those without a reason encoded in batches of one size."""
    queue: deque[_Picture] = deque()
    pending: dict[Size, list[_Picture]] = {}
    for picture in pictures:
        queue.append(picture)
        if picture.waits:
            group = pending.setdefault(picture.size, [])
            group.append(picture)
            if len(group) == batch:
                add_latents(pending.pop(picture.size))
        if len(queue) > WINDOW and queue[0].waits:
            add_latents(pending.pop(queue[0].size))
        while queue and not queue[0].waits:
            yield queue.popleft()
    for group in pending.values():
        add_latents(group)
    yield from queue


def _add_latents(config: EncodeConfig, vae: "Autoencoder", pictures: list[_Picture]) -> None:
    """Encode pictures of one size, and let go of their pixels."""
    import torch

    stacked = torch.from_numpy(np.stack([picture.pixels for picture in pictures if picture.pixels is not None]))
    with torch.inference_mode():
        pixels = stacked.to(_device()).permute(0, 3, 1, 2) / 127.5 - 1  # b 3 h w
        mean, std = vae.moments(pixels) if config.std else (vae.encode(pixels), None)
        arrays = {"latent": mean, "flip": vae.encode(pixels.flip(-1)) if config.flip else None, "std": std}
    rows = {name: array.cpu().numpy() for name, array in arrays.items() if array is not None}
    for i, picture in enumerate(pictures):
        picture.arrays = {name: array[i] for name, array in rows.items()}
        picture.pixels = None


# --- the set ------------------------------------------------------------------------------------------------


def _index(folder: Path, resolution: int, info: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Write the index of a finished step, unless it is there."""
    from data.shards import load_table, write_index

    done = finished(folder)
    path = folder / "index.json"
    if path.exists() and json.loads(path.read_bytes())["extra"].get("digest") == done["digest"]:
        return
    tables = [load_table(folder / f"{name}.npz") for name in done["parts"]]
    if not any(len(table.records) for table in tables):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in done["tally"]["dropped"].items())
        raise ValueError(
            f"{folder} has no pictures: of {done['tally']['given']:,} none was kept ({reasons});"
            f" see {folder}/*.dropped.parquet, and ask less of the pictures or choose a smaller resolution"
        )
    extra = {"recipe": recipe, "digest": done["digest"], "num_classes": _num_classes(folder, tables)}
    write_index(folder, tables, resolution=resolution, vae=info, extra=extra)


def _num_classes(folder: Path, tables: "list[Table]") -> int | None:
    """Classes of the set if every record has one, else None; stops at the first that has none."""
    highest = -1
    for table in tables:
        with open(folder / f"{table.name}.tar", "rb") as tar:
            for row in table.records:
                tar.seek(row["json"])
                label = json.loads(tar.read(row["json_bytes"])).get("class_id")
                if label is None:
                    return None
                highest = max(highest, label)
    return highest + 1


_BUILT: dict[str, Any] = {}  # a process builds each network once


def _built(config: Any) -> Any:
    """The network of a config, where it will compute."""
    if (name := repr(config)) not in _BUILT:
        _BUILT[name] = config.build().to(_device())
    return _BUILT[name]


def _device() -> Any:
    """This process' accelerator if there is one, else the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", 0)))


def _reading(text: "TextConfig") -> dict[str, Any]:
    """How captions are read, of what changes the states; the weights are known by their digest."""
    names = ("penultimate", "length", "masked", "lower", "empty", "width")
    return {f"text_{name}": getattr(text, name) for name in names} | {"precision": text.precision.name}


def _plain(value: Any) -> Any:
    """Enums as their values, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value
