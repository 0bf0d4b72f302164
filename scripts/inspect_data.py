"""Look at a data set before training on it: one page with its pictures, captions and numbers.

    python scripts/inspect_data.py datasets/shapes-64             latent shards: folders with an index.json
    python scripts/inspect_data.py pictures/ 'tars/*.tar'         pictures as they lie, of any kind that prepare/ reads
    python scripts/inspect_data.py datasets/mine                  all steps of a preparation, and the sets they made
    python scripts/inspect_data.py datasets/mine/1024 --verify    every byte

The page is one file that needs nothing else: pictures and charts are inside, nothing is fetched, and its bytes follow
from the data alone. Its numbers are in it as JSON too, in <script id="numbers">. A set of any size takes about as long:
captions are counted in at most 20,000 records and a few hundred pictures are decoded, both spread evenly, and the page
says of how many. Of tars, which have to be read from the front, as many of the first records of each are taken. Only
--verify reads everything.

Shards hold latents. The autoencoder that their index names, or --vae, decodes those that are shown, if its weights are
those that made them; without it, the first three channels are shown as colours.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.report import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, compact, facts, percent, svg, ticks, write

if TYPE_CHECKING:
    from PIL import Image

    from data.reader import ShardReader
    from models.autoencoder import Autoencoder

CAPTIONS = 20_000  # records whose captions are counted
DECODED = 2_000  # pictures that are decoded to see whether they can be
PARTS = 64  # parts of a source that are looked into
CARDS = 600  # pictures that are shown of a set
NAMED = 10  # things of a kind that are named
COMPARED = 2_000  # latents that are compared byte by byte
THUMBNAIL = 192  # pixels: a side of a square picture on the page; others have its area
RESOLUTION = 1024  # pictures as they lie are sorted into SDXL's buckets
STEPS = ("metadata", "filter", "images", "dedup", "captions")
TIMES = "\N{MULTIPLICATION SIGN}"
TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    samples: int = 24  # pictures a bucket
    verify: bool = False
    vae: str | None = None

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"--samples={self.samples} must be at least 1; 24 is usual")


@dataclass(slots=True)
class Card:
    """A picture on the page."""

    url: str
    captions: dict[str, str]
    about: str  # where it lies, and its size
    coarse: bool = False  # a pixel is a latent cell


@dataclass(slots=True, kw_only=True)
class Sheet:
    """Pictures of one bucket, evenly spread."""

    height: int
    width: int
    count: int
    cards: list[Card]


@dataclass(slots=True, kw_only=True)
class Seen:
    """What was seen of a set: `numbers` are plain JSON and stand in the page as such."""

    title: str
    kind: str  # latents, pictures or preparation
    path: str
    numbers: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what a reader must know of the numbers
    sheets: list[Sheet] = field(default_factory=list)


# --- counting ---------------------------------------------------------------------------------------------


def even(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers (n,) below `count`, ascending and evenly spread, first and last among them."""
    if most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64) if most > 1 else np.zeros(min(count, 1), np.int64)


class Spread:
    """At least `most` of the items that come one by one, evenly spread though nobody knows how many will come."""

    def __init__(self, most: int):
        self.most, self.step, self.count, self.items = most, 1, 0, []

    def wants(self) -> bool:
        """Whether the next item is one of them."""
        self.count += 1
        return (self.count - 1) % self.step == 0

    def add(self, item: Any) -> None:
        self.items.append(item)
        if len(self.items) >= 2 * self.most:
            self.items, self.step = self.items[::2], 2 * self.step


class Named:
    """What is wrong, by its reason: how many, and the names of the first."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        if len(self.names[reason]) < NAMED:
            self.names[reason].append(name)

    def numbers(self) -> dict[str, dict[str, Any]]:
        return {reason: {"count": count, "names": self.names[reason]} for reason, count in self.counts.most_common()}


class Words:
    """Statistics of captions, record by record."""

    def __init__(self):
        self.records = self.uncaptioned = 0
        self.lengths: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.empty: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.words: Counter[str] = Counter()

    def add(self, captions: dict[str, str]) -> None:
        self.records += 1
        for name, text in captions.items():
            words = re.findall(r"\w[\w'\u2019-]*", text.lower())
            self.lengths[name].append((len(text), len(words)))
            self.empty[name] += not text.strip()
            self.words.update(words)
        told = {text for text in captions.values() if text.strip()}
        self.texts.update(told)
        self.uncaptioned += not told

    def numbers(self) -> dict[str, Any]:
        names = {}
        for name, pairs in sorted(self.lengths.items()):
            chars, words = np.array(pairs).T
            names[name] = {"records": len(pairs), "read": len(pairs), "empty": self.empty[name]}
            names[name] |= {"characters": lengths(chars), "words": lengths(words)}
        ordered = sorted(self.texts.items(), key=lambda item: (-item[1], item[0]))
        return {
            "records": self.records,
            "uncaptioned": self.uncaptioned,
            "names": names,
            "distinct": len(self.texts),
            "repeated": sum(count > 1 for count in self.texts.values()),
            "frequent": [[text[:200], count] for text, count in ordered[:NAMED] if count > 1],
            "words": sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[: 2 * NAMED],
        }


def lengths(values: np.ndarray) -> dict[str, Any]:
    """Quantiles and a histogram of whole numbers (n,); its last bar holds all that are longer."""
    low, median, high = np.percentile(values, [5, 50, 95])
    width = max(1, math.ceil(np.percentile(values, 99) / 30))
    bins = np.minimum(values // width, 30)
    counts = np.bincount(bins).tolist()
    return {"p5": low, "median": median, "p95": high, "longest": int(values.max()), "width": width, "counts": counts}


def octaves(values: Iterable[float], lowest: int, highest: int) -> dict[str, Any]:
    """A histogram over quarters of octaves: bar k counts values of about 2^((first + k)/4), the outer all beyond."""
    bins = np.clip(np.round(4 * np.log2(np.fromiter(values, np.float64))), 4 * lowest, 4 * highest).astype(int)
    first = int(bins.min(initial=4 * highest))
    return {"first": first, "counts": np.bincount(bins - first).tolist()}


def size_numbers(sizes: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Histograms of original (height, width): the square root of the area, and width/height."""
    if not sizes:
        return None
    return {
        "count": len(sizes),
        "side": octaves((math.sqrt(h * w) for h, w in sizes), 4, 14),
        "aspect": octaves((w / h for h, w in sizes), -3, 3),
    }


# --- latent shards ----------------------------------------------------------------------------------------


def look_at_shards(folder: Path, options: Options) -> Seen:
    """What a folder of latent shards holds; ValueError if it is not finished or its index is not to be trusted."""
    from data.reader import ShardReader

    reader = ShardReader(folder)
    index, problems, words, sizes = reader.index, Named(), Words(), []
    if options.verify:
        _verify(reader, problems)
    for row in even(len(reader), CAPTIONS):
        if record := _record(reader, row, problems, count=not options.verify):
            words.add(record["captions"])
            sizes += [tuple(record["original_size"])] if "original_size" in record else []
    counts = [{"height": b.height, "width": b.width, "count": b.count} for b in reader.buckets]
    latents, sheets, note = _latent_sheets(reader, options, problems)
    captions = words.numbers()
    for name, count in index["captions"].items():  # of all records
        captions["names"].setdefault(name, {})["records"] = count
    numbers = {
        "count": len(reader),
        "bytes": index["bytes"],
        "resolution": index["resolution"],
        "shards": len(index["shards"]),
        "fields": index["fields"],
        "classes": reader.num_classes,
        "autoencoder": {key: index["vae"].get(key) for key in ("path", "id", "channels", "factor")},
        "verified": options.verify,
        "buckets": counts,
        "original_sizes": size_numbers(sizes),
        "captions": captions,
        "repeats": _repeated_latents(reader, folder),
        "latents": latents,
        "text_states": _text_numbers(reader, folder),
        "problems": problems.numbers(),
    }
    notes = [_sampled(captions["records"], len(reader))]
    notes.append(
        "Every file was compared with its SHA-256, and every record with its checksums."
        if options.verify
        else "Of the records, only those sampled were compared with their checksums; --verify reads all."
    )
    return Seen(
        title=folder.resolve().name,
        kind="latents",
        path=str(folder),
        numbers=numbers,
        notes=[*notes, note],
        sheets=sheets,
    )


def _sampled(looked_at: int, count: int) -> str:
    if looked_at >= count:
        return f"Captions were counted in all {count:,} records."
    return f"Captions and original sizes are those of {looked_at:,} of the {count:,} records, spread evenly."


def _record(reader: "ShardReader", row: int, problems: Named, *, count: bool = True) -> dict[str, Any] | None:
    from data.reader import DamagedError

    try:
        return reader.record(row)
    except DamagedError as error:
        if count:
            problems.add("damaged_record", str(error))
        return None


def _verify(reader: "ShardReader", problems: Named) -> None:
    """Read everything: files against their SHA-256, records, arrays and text states against their checksums."""
    from data.files import sha256

    for shard in reader.index["shards"]:
        for suffix, known in shard["files"].items():
            path = reader.folder / f"{shard['name']}{suffix}"
            if sha256(path) != known["sha256"]:
                problems.add("damaged_file", f"{path}: its SHA-256 is not that of index.json")
    for number in range(len(reader.buckets)):
        for rows in _chunks(reader.rows_of(number), 64):
            for name in reader.fields:
                _read(reader, number, name, rows, problems)
    for rows in _chunks(np.arange(len(reader)), 4):
        records = [_record(reader, row, problems) for row in rows]
        captions = list(dict.fromkeys(text for record in records if record for text in record["captions"].values()))
        if reader.text and captions:
            try:
                for sentence in filter(None, reader.texts(captions).damaged):
                    problems.add("damaged_text_states", sentence)
            except ValueError as error:  # a caption that the set does not hold
                problems.add("missing_text_states", str(error).partition(";")[0])


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _read(reader: "ShardReader", bucket: int, name: str, rows: np.ndarray, problems: Named | None) -> np.ndarray:
    """An array of some records of a bucket, (n, c, h, w) float16; of damaged ones, which are counted, zeros."""
    out = np.zeros((len(rows), *reader.buckets[bucket].shape), np.float16)
    for sentence in filter(None, reader.read(name, rows, list(out))):
        if problems:
            problems.add(f"damaged_{name}", sentence)
    return out


def _latent_sheets(reader: "ShardReader", options: Options, problems: Named) -> tuple[dict[str, Any], list[Sheet], str]:
    """Statistics of the latents, a sheet a bucket, and how its pictures came about."""
    index, own = reader.index, None if options.verify else problems  # what --verify found is not counted again
    vae, note = _autoencoder(index["vae"], options.vae)
    each = min(options.samples, max(2, CARDS // len(reader.buckets)))
    low, high, read, sheets = [], [], 0, []
    for number, bucket in enumerate(reader.buckets):
        rows = reader.rows_of(number)
        rows = rows[even(len(rows), each)]
        latents = _read(reader, number, "latent", rows, own)
        whole = latents.any(axis=(1, 2, 3))  # a latent of zeros is a damaged one
        if whole.any():
            low.append(latents[whole].min(axis=(0, 2, 3)))
            high.append(latents[whole].max(axis=(0, 2, 3)))
            read += int(whole.sum())
        cards = []
        for row, url in zip(rows[whole], _drawn(latents[whole], vae, index), strict=True):
            record = _record(reader, row, problems, count=False) or {"captions": {}}
            about = _place(reader, row)
            if "original_size" in record:
                about += f", originally {pixels(*record['original_size'])}"
            cards.append(Card(url, record["captions"], about, coarse=vae is None))
        sheets.append(Sheet(height=bucket.height, width=bucket.width, count=bucket.count, cards=cards))
    numbers = {"mean": index["latent_mean"], "std": index["latent_std"], "read": read}
    if read:
        numbers |= {"lowest": np.min(low, axis=0).astype(float).tolist()}
        numbers |= {"highest": np.max(high, axis=0).astype(float).tolist()}
    return numbers, sorted(sheets, key=_by_aspect), note


def _by_aspect(sheet: Sheet) -> tuple[float, int]:
    return sheet.width / sheet.height, sheet.width


def _autoencoder(made_by: dict[str, Any], path: str | None) -> "tuple[Autoencoder | None, str]":
    """The autoencoder that made the latents, ready to decode; or None and a sentence that says why not."""
    import torch

    from models.autoencoder import AutoencoderConfig
    from models.weights import locate

    without = "shown are the first three channels of the latents as red, green and blue"
    path = path or made_by.get("path")
    if not path:
        return None, f"The index names no autoencoder, so {without}; give one with --vae."
    place = Path(locate(path))
    config = AutoencoderConfig(path=path)
    if (place / "pipeline.json").exists():  # a trained model says which it needs
        config = AutoencoderConfig(**json.loads((place / "pipeline.json").read_text())["vae"])
    elif (place / "config.json").exists():
        config.subfolder = ""
    try:
        vae = config.build()
    except ValueError as error:
        return None, f"The autoencoder could not be had, so {without} ({error})."
    if vae.digest != made_by.get("id"):
        theirs = made_by.get("id", "unknown")
        return None, (
            f"The autoencoder {config.path} ({vae.digest}) is not the one that made these latents ({theirs}), so"
            f" {without}; give that one with --vae."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return vae.to(device or "cpu"), f"Pictures are latents, decoded by {config.path} ({vae.digest})."


def _drawn(latents: np.ndarray, vae: "Autoencoder | None", index: dict[str, Any]) -> Iterator[str]:
    """Data URLs of pictures of the latents (n, c, h, w): decoded, or their first channels within three deviations."""
    import torch
    from PIL import Image

    if vae is None:
        mean, std = (np.array(index[key])[:, None, None] for key in ("latent_mean", "latent_std"))
        colours = 127.5 + 127.5 * (latents - mean) / np.maximum(3 * std, 1e-6)
        channels = [min(channel, latents.shape[1] - 1) for channel in range(3)]
        for colour in colours.clip(0, 255).astype(np.uint8)[:, channels]:
            yield data_url(Image.fromarray(np.ascontiguousarray(colour.transpose(1, 2, 0))), lossless=True)
        return
    device = next(vae.parameters()).device
    batch = max(1, 2**19 // (latents.shape[2] * latents.shape[3] * vae.factor**2))
    for start in range(0, len(latents), batch):
        decoded = vae.decode(torch.from_numpy(latents[start : start + batch]).float().to(device))
        for picture in ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy():
            yield data_url(thumbnail(Image.fromarray(picture), picture.shape[:2]))


def thumbnail(image: "Image.Image", bucket: tuple[int, int]) -> "Image.Image":
    """The picture cut to the shape of its bucket (height, width), of at most THUMBNAIL^2 pixels, never enlarged."""
    from PIL import Image

    from data.buckets import fit, scale_of

    scale = min(THUMBNAIL / math.sqrt(bucket[0] * bucket[1]), 1 / scale_of(image.height, image.width, bucket))
    height, width = (max(1, round(side * scale)) for side in bucket)
    return image if image.size == (width, height) else Image.fromarray(fit(image, (height, width))[0])


def data_url(image: "Image.Image", *, lossless: bool = False) -> str:
    """The picture as WebP within its address."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _repeated_latents(reader: "ShardReader", folder: Path) -> dict[str, Any]:
    """Records whose latent is that of an earlier one.

    Equal checksums of 32 bits suggest it; up to COMPARED of them are compared byte by byte, since among a million
    records some hundred pairs agree by chance.
    """
    table = np.load(folder / "records.npy", mmap_mode="r", allow_pickle=False)
    keys = table["bucket"].astype(np.int64) << 32 | table["latent_check"]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[inverse] > 1)
    rows = rows[np.argsort(keys[rows], kind="stable")]  # equal ones together
    first: dict[tuple[int, bytes], int] = {}
    repeats = []
    for row in rows[:COMPARED]:
        bucket = int(table["bucket"][row])
        latent = _read(reader, bucket, "latent", np.array([row]), None)
        if latent.any() and (key := (bucket, hashlib.sha256(latent.data).digest())) in first:
            repeats.append((int(row), first[key]))
        elif latent.any():
            first[key] = int(row)
    left = rows[COMPARED:]
    names = [f"{_place(reader, row)} repeats {_place(reader, of)}" for row, of in sorted(repeats)[:NAMED]]
    return {"count": len(repeats) + len(left) - len(np.unique(keys[left])), "compared": not len(left), "names": names}


def _place(reader: "ShardReader", row: int) -> str:
    return reader.place(row).removeprefix(f"{reader.folder}/")


def _text_numbers(reader: "ShardReader", folder: Path) -> dict[str, Any] | None:
    """How the text states are stored, and what a caption takes."""
    if not reader.text:
        return None
    tokens = np.load(folder / "texts.npy", mmap_mode="r", allow_pickle=False)["tokens"]
    size = sum(shard["files"].get(".text.tar", {}).get("bytes", 0) for shard in reader.index["shards"])
    mean, longest = (float(tokens.mean()), int(tokens.max())) if len(tokens) else (0.0, 0)
    about = {"captions": len(tokens), "bytes": size, "bytes_a_caption": size / max(len(tokens), 1)}
    return reader.index["text"] | about | {"mean_tokens": mean, "most_tokens": longest}


# --- pictures as they lie ---------------------------------------------------------------------------------


def look_at_pictures(paths: list[str], options: Options, title: str = "") -> Seen:
    """What the paths hold, as one set; ValueError if they name no pictures."""
    from data.buckets import bucket_sizes, nearest
    from data.decode import Undecodable, decode, header_size
    from prepare.sources import SourceConfig, open_source

    source = open_source(SourceConfig(paths=paths))
    chosen = source.names if options.verify else [source.names[i] for i in even(len(source.names), PARTS)]
    read_most = math.inf if options.verify else CAPTIONS // len(chosen)
    decode_most = math.inf if options.verify else DECODED // len(chosen)
    words, problems, sizes, known = Words(), Named(), [], bucket_sizes(RESOLUTION)
    shown: dict[tuple[int, int], Spread] = {size: Spread(options.samples) for size in known}
    first, repeats, names = {}, 0, []  # by SHA-256, the key that has it first
    size_in_bytes = decoded = read = 0
    whole = len(chosen) == len(source.names)
    for part in chosen:
        for number, sample in enumerate(source.read(part)):
            if number >= read_most:
                whole = False
                break
            read += 1
            words.add(sample.captions)
            if amiss := sample.about.get("amiss"):
                problems.add(str(amiss), sample.key)
            if sample.image is None or sample.problem:
                problems.add(sample.problem or "no_image", sample.key)
                continue
            size_in_bytes += len(sample.image)
            digest = hashlib.sha256(sample.image).digest()
            if digest in first:
                repeats += 1
                names += [f"{sample.key} repeats {first[digest]}"] if len(names) < NAMED else []
            else:
                first[digest] = sample.key
            try:
                size, image = header_size(sample.image), None
                if number < decode_most or size is None or 0 in size:
                    image = decode(sample.image)
                    size = image.size
                    decoded += 1
                width, height = size
                bucket = nearest(height, width, known)
                if shown[bucket].wants():
                    card = thumbnail(image or decode(sample.image), bucket)
                    shown[bucket].add(Card(data_url(card), sample.captions, f"{sample.key}, {pixels(height, width)}"))
                sizes.append((height, width))
            except Undecodable as error:
                problems.add(error.reason, f"{sample.key}: {error.detail}" if error.detail else sample.key)
    counts = [getattr(part, "count", 0) for part in source.parts]  # tars do not say
    known_count = read if whole else sum(counts) if all(counts) else None
    captions = words.numbers()
    full = {size: spread for size, spread in shown.items() if spread.count}
    each = min(options.samples, max(2, CARDS // max(len(full), 1)))
    sheets = [
        Sheet(height=h, width=w, count=spread.count, cards=[spread.items[i] for i in even(len(spread.items), each)])
        for (h, w), spread in full.items()
    ]
    sheets.sort(key=_by_aspect)
    numbers = {
        "count": known_count,
        "read": read,
        "bytes": size_in_bytes,
        "parts": len(source.names),
        "decoded": decoded,
        "verified": options.verify,
        "buckets": [{"height": s.height, "width": s.width, "count": s.count} for s in sheets],
        "original_sizes": size_numbers(sizes),
        "captions": captions,
        "repeats": {"count": repeats, "compared": True, "names": names},
        "problems": problems.numbers(),
    }
    notes = []
    if not whole:
        of = f"of {known_count:,}" if known_count else "of more"
        notes.append(
            f"Read were {read:,} records {of}: the first of {len(chosen):,} of the {len(source.names):,} parts. All"
            " numbers here are theirs; --verify reads all."
        )
    if decoded < read - problems.counts.total():
        notes.append(
            f"Of the pictures {decoded:,} were decoded; what the others are was read from their headers alone."
        )
    notes.append(
        f"Buckets are those of training at {RESOLUTION} px; pictures are cut to their bucket as they would be there."
    )
    return Seen(
        title=title or Path(paths[0]).name or paths[0],
        kind="pictures",
        path=" ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""),
        numbers=numbers,
        notes=notes,
        sheets=sheets,
    )


# --- preparations -----------------------------------------------------------------------------------------


def look_at_preparation(folder: Path, options: Options) -> list[Seen]:
    """The steps of a preparation, then each set of pictures or latents that they made."""
    steps = sorted((path.parent for path in folder.glob("*/step.json")), key=_step_order)
    sets, problems = [], Named()
    for step in steps:
        try:
            if (step / "index.json").exists():
                sets.append(look_at_shards(step, options))
            elif step.name == "images" and any(step.glob("*.tar")):
                sets.append(look_at_pictures([str(step)], options, step.name))
        except ValueError as error:  # the rest can be shown
            problems.add(f"{step.name}_unreadable", str(error))
        if options.verify and not (step / "index.json").exists():
            _verify_step(step, problems)
    report = folder / "report.json"
    numbers = {
        "steps": [_step_numbers(step) for step in steps],
        "sets": [seen.title for seen in sets],
        "report": json.loads(report.read_text()) if report.exists() else None,
        "problems": problems.numbers(),
    }
    name = folder.resolve().name
    for seen in sets:
        seen.title = f"{name}/{seen.title}"
    return [Seen(title=name, kind="preparation", path=str(folder), numbers=numbers), *sets]


def _verify_step(step: Path, problems: Named) -> None:
    """Compare the files of a step with the SHA-256 in the accounts of its parts."""
    from data.files import sha256
    from prepare.parts import account

    for path in sorted(step.glob("[0-9]*.json")):
        if not path.stem.isdigit():
            continue
        if account(step, path.stem) is None:
            problems.add("missing_or_cut_file", f"{step / path.stem}: not all files that {path.name} names are whole")
            continue
        for suffix, known in json.loads(path.read_bytes())["files"].items():
            if sha256(file := step / f"{path.stem}{suffix}") != known["sha256"]:
                problems.add("damaged_file", f"{file}: its SHA-256 is not that of {path.name}")


def _step_order(step: Path) -> tuple[int, int, str]:
    """The order in which steps are run; resolutions come last, ascending."""
    if step.name in STEPS:
        return STEPS.index(step.name), 0, step.name
    return len(STEPS), int(step.name) if step.name.isdigit() else sys.maxsize, step.name


def _step_numbers(step: Path) -> dict[str, Any]:
    """The account of a step; of one that is not done, of the parts it has."""
    from prepare.parts import Tally, account, finished

    try:
        about = finished(step)
        tally, parts, done = Tally(**about["tally"]), len(about["parts"]), True
    except ValueError:
        tally, parts, done = Tally(), 0, False
        for path in sorted(step.glob("[0-9]*.json")):
            if part := account(step, path.stem) if path.stem.isdigit() else None:
                tally += part
                parts += 1
    return {
        "name": step.name,
        "done": done,
        "parts": parts,
        "given": tally.given,
        "kept": tally.kept,
        "dropped": dict(tally.dropped.most_common()),
        "noted": dict(tally.noted.most_common()),
        "faults": tally.faults,
        "examples": _examples(step, set(tally.dropped + tally.noted)),
    }


def _examples(step: Path, reasons: set[str]) -> dict[str, list[str]]:
    """Some rows of each reason by key and detail, from a few parts."""
    import pyarrow.parquet as pq

    found: dict[str, list[str]] = {reason: [] for reason in sorted(reasons)}
    for kind in ("dropped", "noted"):
        paths = sorted(step.glob(f"*.{kind}.parquet"))
        for path in (paths[i] for i in even(len(paths), 8)):
            for batch in pq.ParquetFile(path).iter_batches(batch_size=5_000):
                for row in batch.to_pylist():
                    if len(some := found.setdefault(row["reason"], [])) < 3:
                        some.append(f"{row['key']}: {row['detail']}"[:200] if row["detail"] else row["key"])
                break
    return found


# --- charts -----------------------------------------------------------------------------------------------


def bars(name: str, counts: list[int], titles: list[str], marks: dict[str, float], x_name: str, note: str = "") -> str:
    """Bars with a title each; `marks` label places on the axis, counted in bars from its left end."""
    base, high = HEIGHT - BOTTOM, max(counts) * 1.05
    pitch = (WIDTH - LEFT - RIGHT) / max(len(counts), 4)

    def down(value: float) -> float:
        return base - (base - TOP) * value / high

    gap = min(2.0, pitch / 5)
    drawn = [
        f'<rect x="{LEFT + k * pitch + gap / 2:.1f}" y="{down(count):.1f}" width="{pitch - gap:.1f}"'
        f' height="{base - down(count):.1f}" rx="1"><title>{escape(title)}: {count:,}</title></rect>'
        for k, (count, title) in enumerate(zip(counts, titles, strict=True))
        if count
    ]
    whole = [tick for tick in ticks(0, high, 4) if tick == round(tick)]
    frame = axes(
        {label: LEFT + place * pitch for label, place in marks.items()},
        {compact(tick): down(tick) for tick in whole},
        x_name,
    )
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(name)}</h3>{svg(name, frame, *drawn)}{caption}</figure>"


def octave_chart(name: str, histogram: dict[str, Any], label: Any, x_name: str, note: str = "") -> str:
    """Bars over quarters of octaves, whole octaves marked, or all where there are few."""
    counts, first = histogram["counts"], histogram["first"]
    places = range(len(counts))
    marked = [k for k in places if (first + k) % 4 == 0] if len(counts) > 6 else list(places)
    return bars(
        name,
        counts,
        [f"about {label(2 ** ((first + k) / 4))}" for k in places],
        {label(2 ** ((first + k) / 4)): k + 0.5 for k in marked},
        x_name,
        note,
    )


def length_chart(name: str, lengths: dict[str, Any]) -> str:
    """Bars of the lengths of captions."""
    counts, width = lengths["counts"], lengths["width"]
    titles = [f"{k * width} to {(k + 1) * width - 1}" if width > 1 else f"{k}" for k in range(len(counts))]
    if len(counts) == 31:
        titles[-1] = f"{30 * width} and more"
    half = 0.5 if width == 1 else 0
    span = max(len(counts), 4) * width
    marks = {f"{tick:g}": tick / width + half for tick in ticks(0, span - 1, 6) if tick == round(tick)}
    return bars(name, counts, titles, marks, name.rpartition(", ")[2])


def aspect_label(aspect: float) -> str:
    """Width to height, in small numbers: 2:1, 1:1, 1:1.4."""
    return f"{aspect:.2g}:1" if aspect > 1.01 else f"1:{1 / aspect:.2g}" if aspect < 0.99 else "1:1"


def bucket_chart(buckets: list[dict[str, int]]) -> str:
    """A bar a bucket, the tallest left, the widest right."""
    ordered = sorted(buckets, key=lambda b: (b["width"] / b["height"], b["width"]))
    names = [pixels(b["height"], b["width"]) for b in ordered]
    inner = sorted({len(names) * k // 6 for k in (1, 3, 5)})  # at the ends, the words would not have room
    marks = {names[k]: k + 0.5 for k in inner}
    return bars("Buckets", [b["count"] for b in ordered], names, marks, f"width {TIMES} height, by aspect")


# --- the page ---------------------------------------------------------------------------------------------


def section(seen: Seen, number: int) -> str:
    """Everything about one set: numbers first, pictures last, since of those there may be many."""
    numbers, name = seen.numbers, f"set-{number}"
    head = f'<section id="{name}"><h2>{escape(seen.title)}</h2><p class="muted path">{escape(seen.path)}</p>'
    if seen.kind == "preparation":
        return f"{head}{funnel(seen, number)}{problem_table(numbers['problems'])}</section>"
    parts = {
        "Sizes": size_charts(numbers),
        "Captions": caption_parts(numbers),
        "Latents": latent_table(numbers.get("latents")),
        "Text states": text_facts(numbers.get("text_states")),
        "Pictures": contact_sheets(seen),
    }
    parts = {part: content for part, content in parts.items() if content}
    links = "".join(f'<a href="#{name}-{k}">{part}</a>' for k, part in enumerate(parts))
    body = "".join(
        f'<h3 class="part" id="{name}-{k}">{part}</h3>{content}' for k, (part, content) in enumerate(parts.items())
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in seen.notes)
    return (
        f'{head}{facts(headline(seen))}<div class="notes muted">{notes}</div>{problem_table(numbers["problems"])}'
        f"{repeats_list(numbers['repeats'])}<nav>{links}</nav>{body}</section>"
    )


def headline(seen: Seen) -> dict[str, str]:
    """The numbers that come first."""
    numbers = seen.numbers
    broken = sum(problem["count"] for problem in numbers["problems"].values())
    pairs = {"records": _count(numbers), "size": amount(numbers["bytes"]), "buckets": f"{len(numbers['buckets']):,}"}
    if seen.kind == "latents":
        vae = numbers["autoencoder"]
        pairs |= {"shards": f"{numbers['shards']:,}", "resolution": f"{numbers['resolution']:,} px"}
        pairs |= {"arrays": ", ".join(numbers["fields"])}
        pairs |= {"classes": f"{numbers['classes']:,}"} if numbers["classes"] else {}
        pairs |= {"autoencoder": vae["path"] or "unknown"}
    else:
        pairs |= {"parts": f"{numbers['parts']:,}", "decoded": f"{numbers['decoded']:,}"}
    return pairs | {"exact repeats": f"{numbers['repeats']['count']:,}", "problems": f"{broken:,}"}


def _count(numbers: dict[str, Any]) -> str:
    return f"{numbers['count']:,}" if numbers["count"] is not None else f"more than {numbers['read']:,}"


def amount(size: float) -> str:
    """Bytes as a person says them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def pixels(height: int, width: int) -> str:
    return f"{width} {TIMES} {height}"


def bar(share: float) -> str:
    return f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'


def reason_words(reason: str) -> str:
    return reason.replace("_", " ")


def problem_table(problems: dict[str, dict[str, Any]]) -> str:
    """Every reason with its count and the names of the first."""
    if not problems:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(reason_words(reason))}</th><td class="names">{_names(found)}</td>'
        f'<td class="number">{found["count"]:,}</td></tr>'
        for reason, found in problems.items()
    ]
    return f'<div class="problems"><h3>Problems</h3><table class="listed">{"".join(rows)}</table></div>'


def _names(found: dict[str, Any]) -> str:
    more = found["count"] - len(found["names"])
    lines = [*found["names"], *([f"and {more:,} more"] if more > 0 else [])]
    return "<br>".join(escape(line) for line in lines)


def repeats_list(repeats: dict[str, Any]) -> str:
    if not repeats["count"]:
        return ""
    note = "" if repeats["compared"] else " Most were compared by their checksums alone."
    return (
        '<div class="repeats"><h3>Exact repeats</h3>'
        f'<p class="muted">{repeats["count"]:,} equal an earlier one.{note}</p>'
        f'<p class="names">{_names(repeats)}</p></div>'
    )


def size_charts(numbers: dict[str, Any]) -> str:
    """Sizes as they came, and buckets."""
    charts, sizes = [], numbers["original_sizes"]
    if len(numbers["buckets"]) > 1:
        charts.append(bucket_chart(numbers["buckets"]))
    if sizes:
        charts += [
            octave_chart(
                "Original resolution", sizes["side"], lambda side: f"{side:.0f}", f"\u221a(width {TIMES} height), px"
            ),
            octave_chart("Original aspect", sizes["aspect"], aspect_label, "width : height"),
        ]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def caption_parts(numbers: dict[str, Any]) -> str:
    """Captions by name, their lengths, and what is said most."""
    captions = numbers["captions"]
    records, names = captions["records"], captions["names"]
    if not names:
        return '<p class="muted">There are none.</p>'
    total = numbers["count"] if "fields" in numbers else numbers["read"]
    rows = []
    for name, found in names.items():
        share = min(1.0, found["records"] / max(total, 1))
        spans = [_span(found[kind]) if kind in found else ("", "", "") for kind in ("characters", "words")]
        cells = "".join(f'<td class="number">{text}</td>' for span in spans for text in span)
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{bar(share)}</td>'
            f'<td class="number">{found["records"]:,}</td><td class="number">{percent(share)}</td>'
            f'<td class="number">{percent(found["empty"] / found["read"]) if "read" in found else ""}</td>{cells}</tr>'
        )
    columns = ("records", "share", "empty", "characters", "5 to 95%", "longest", "words", "5 to 95%", "most")
    head = "".join(f'<th class="number">{column}</th>' for column in columns)
    charts = [
        length_chart(f"{name}, {kind}", found[kind])
        for name, found in list(names.items())[:6]
        for kind in ("characters", "words")
        if kind in found
    ]
    lead = f"{captions['uncaptioned']:,} of {records:,} records have no caption. " if captions["uncaptioned"] else ""
    lead += f"{captions['distinct']:,} different captions, of which {captions['repeated']:,} stand in several records."
    return (
        f'<p class="muted">{lead}</p>'
        '<div class="wide"><table class="bars captions"><thead>'
        f"<tr><th></th><th></th>{head}</tr></thead>{''.join(rows)}</table></div>"
        f'<div class="charts pairs">{"".join(charts)}</div><div class="columns">'
        f"{ranking('Most frequent captions', captions['frequent'], 'none stands twice')}"
        f"{ranking('Most frequent words', captions['words'], 'there are none')}</div>"
    )


def _span(lengths: dict[str, Any]) -> tuple[str, str, str]:
    return f"{lengths['median']:,.0f}", f"{lengths['p5']:,.0f} to {lengths['p95']:,.0f}", f"{lengths['longest']:,}"


def ranking(name: str, pairs: list[list[Any]], none: str) -> str:
    """A bar for each of the most frequent."""
    most = max((count for _, count in pairs), default=1)
    rows = [
        f'<tr><td class="ranked"><span>{escape(text) or "(empty)"}</span>'
        f'{bar(count / most)}</td><td class="number">{count:,}</td></tr>'
        for text, count in pairs
    ]
    return f"<table><caption><b>{name}</b>{'' if rows else none}</caption>{''.join(rows)}</table>"


def latent_table(latents: dict[str, Any] | None) -> str:
    """Mean and deviation of each channel, drawn on one scale."""
    if not latents:
        return ""
    pairs = list(zip(latents["mean"], latents["std"], strict=True))
    reach = max(1.5, *(abs(mean) + std for mean, std in pairs)) * 1.05
    rows = []
    for channel, (mean, std) in enumerate(pairs):
        left, width = 50 + 50 * (mean - std) / reach, 100 * std / reach
        ends = [f"{latents[key][channel]:.2f}" if key in latents else "" for key in ("lowest", "highest")]
        cells = "".join(f'<td class="number">{text}</td>' for text in (f"{mean:+.3f}", f"{std:.3f}", *ends))
        rows.append(
            f'<tr><th scope="row">{channel}</th><td><div class="bar zero"><i style="margin-left:{left:.1f}%;'
            f'width:{width:.1f}%"></i><u style="left:{50 + 50 * mean / reach:.1f}%"></u></div></td>{cells}</tr>'
        )
    head = "".join(f'<th class="number">{name}</th>' for name in ("mean", "deviation", "lowest", "highest"))
    return (
        '<p class="muted">Mean and deviation are of all records, lowest and highest of the'
        f" {latents['read']:,} that were read here. Bars span one deviation on each side of the mean; the line in the"
        " middle is 0. About 0 and 1 is what training expects.</p>"
        '<div class="wide"><table class="bars latents"><thead>'
        f"<tr><th>channel</th><th></th>{head}</tr></thead>{''.join(rows)}</table></div>"
    )


def text_facts(text: dict[str, Any] | None) -> str:
    """How text states are stored."""
    if not text:
        return ""
    pairs = {
        "captions": f"{text['captions']:,}",
        "stored as": f"{text['dtype']}, {text['width']:,} wide"
        + (f", {text['pooled']:,} pooled" if text["pooled"] else ""),
        "tokens": f"{text['mean_tokens']:.1f} on average, at most {text['most_tokens']:,} of {text['length']:,}",
        "padding": "left out" if text["masked"] else "read as it is",
        "bytes a caption": amount(text["bytes_a_caption"]),
        "in all": amount(text["bytes"]),
        "encoders": text["encoder"],
    }
    return facts(pairs)


def contact_sheets(seen: Seen) -> str:
    """Pictures of each bucket, the tallest first, with their captions."""
    sheets = []
    for sheet in seen.sheets:
        aspect = sheet.width / sheet.height
        width = max(84, round(124 * math.sqrt(aspect)))
        shown = "" if len(sheet.cards) == sheet.count else f", {len(sheet.cards):,} of them shown"
        sheets.append(
            f'<div style="--count:{len(sheet.cards)};--width:{width}px;--aspect:{sheet.width}/{sheet.height}">'
            f'<h4>{pixels(sheet.height, sheet.width)} <span class="muted">{sheet.count:,}{shown}</span></h4>'
            f'<div class="sheet">{"".join(map(card, sheet.cards))}</div></div>'
        )
    return f'<div class="sheets">{"".join(sheets)}</div>' if sheets else ""


def card(shown: Card) -> str:
    """A picture with its first caption; all of them appear when pointed at."""
    lines = [f"{name}: {text}"[:1000] for name, text in shown.captions.items()]
    first = next((text for text in shown.captions.values() if text.strip()), "")
    return (
        f'<figure class="{"coarse" if shown.coarse else "fine"}" title="{escape(chr(10).join([*lines, shown.about]))}">'
        f'<img loading="lazy" alt="{escape(first[:300])}"'
        f' src="{shown.url}"><figcaption>{escape(first[:300]) or "<i>no caption</i>"}</figcaption></figure>'
    )


def funnel(seen: Seen, number: int) -> str:
    """All steps, with what each kept, and why it dropped the others."""
    steps, links = seen.numbers["steps"], {}
    for offset, name in enumerate(seen.numbers["sets"], 1):
        links[name] = f"#set-{number + offset}"
    most = max((step["given"] for step in steps), default=0) or 1
    rows = []
    for step in steps:
        name = escape(step["name"])
        linked = f'<a href="{links[step["name"]]}">{name}</a>' if step["name"] in links else name
        state = "" if step["done"] else f' <span class="warn">not finished: {step["parts"]:,} parts so far</span>'
        kept, given = 100 * step["kept"] / most, 100 * step["given"] / most
        rows.append(
            f'<tr class="step"><th scope="row">{linked}{state}</th>'
            f'<td><div class="bar"><i style="width:{kept:.1f}%"></i>'
            f'<s style="left:{kept:.1f}%;width:{given - kept:.1f}%"></s></div></td>'
            f'<td class="number">{step["kept"]:,} of {step["given"]:,}</td>'
            f'<td class="number">{percent(step["kept"] / step["given"]) if step["given"] else ""}</td></tr>'
        )
        reasons = [(reason, count, "") for reason, count in step["dropped"].items()]
        reasons += [(reason, count, " (kept)") for reason, count in step["noted"].items()]
        for reason, count, kind in reasons:
            examples = escape("\n".join(step["examples"].get(reason, [])))
            rows.append(
                f'<tr class="reason"><td>{escape(reason_words(reason))}{kind}</td><td class="names">'
                f'<span title="{examples}">{examples.partition(chr(10))[0]}</span></td>'
                f'<td class="number">{count:,}</td>'
                f'<td class="number">{percent(count / max(step["given"], 1))}</td></tr>'
            )
    said = seen.numbers["report"]
    report = (
        f"<details><summary>report.json</summary><pre>{escape(json.dumps(said, indent=1)[:20_000])}</pre></details>"
    )
    return (
        '<p class="muted notes">Blue was kept, orange was dropped, below are the reasons with an example of each.</p>'
        f'<div class="wide"><table class="bars funnel"><thead><tr><th>step</th><th></th><th class="number">rows</th>'
        f'<th class="number">share</th></tr></thead>{"".join(rows)}</table></div>{report if said is not None else ""}'
    )


def page(sets: list[Seen]) -> str:
    """The whole page."""
    pictures = sum(seen.numbers.get("count") or seen.numbers.get("read", 0) for seen in sets)
    some = "" if all(seen.numbers.get("count", 0) is not None for seen in sets) else "more than "
    title = sets[0].title if len(sets) == 1 or sets[0].kind == "preparation" else f"{len(sets)} data sets"
    shown = [seen for seen in sets if seen.kind != "preparation"]
    lead = f"{some}{pictures:,} records" + (f" in {len(shown)} sets" if len(shown) > 1 else "")
    contents = "".join(
        f'<a href="#set-{number}">{escape(seen.title)}</a>' for number, seen in enumerate(sets) if len(sets) > 1
    )
    numbers = [{"title": seen.title, "kind": seen.kind, "path": seen.path} | seen.numbers for seen in sets]
    return Template(TEMPLATE.read_text()).substitute(
        title=escape(title),
        lead=escape(lead if shown else "No finished set yet"),
        contents=f"<nav>{contents}</nav>" if contents else "",
        alone="alone" if len(sets) == 1 else "",
        numbers=json.dumps(numbers).replace("<", "\\u003c"),
        body="\n".join(section(seen, number) for number, seen in enumerate(sets)),
    )


# --- all of it --------------------------------------------------------------------------------------------


def look(paths: Sequence[str], options: Options) -> Iterator[Seen]:
    """Each folder is a set or a preparation; all that are not folders are one set of pictures."""
    files = [path for path in paths if not Path(path).is_dir()]
    for path in dict.fromkeys(path if Path(path).is_dir() else "" for path in paths):
        folder = Path(path)
        if not path:
            yield look_at_pictures(files, options)
        elif any((folder / name).exists() for name in ("index.json", "records.npy")) or any(folder.glob("*.npz")):
            yield look_at_shards(folder, options)
        elif any(folder.glob("*/step.json")):
            yield from look_at_preparation(folder, options)
        else:
            yield look_at_pictures([path], options)


def summary(sets: list[Seen]) -> Any:
    """A row a set, for the terminal."""
    from rich.markup import escape as plain
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("set", "kind", "records", "size", "buckets", "captions", "repeats", "problems"):
        table.add_column(name, justify="left" if name in ("set", "kind") else "right", no_wrap=True)
    for seen in sets:
        numbers = seen.numbers
        broken = f"{sum(problem['count'] for problem in numbers['problems'].values()):,}"
        if seen.kind == "preparation":
            table.add_row(plain(seen.title), seen.kind, "", "", "", "", "", broken)
            for step in numbers["steps"]:
                state = "step" if step["done"] else "unfinished"
                table.add_row(f"  {plain(step['name'])}", state, f"{step['kept']:,}")
            continue
        captions = f"{len(numbers['captions']['names']):,}"  # so many names
        cells = (_count(numbers), amount(numbers["bytes"]), f"{len(numbers['buckets']):,}", captions)
        table.add_row(plain(seen.title), seen.kind, *cells, f"{numbers['repeats']['count']:,}", broken)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, look, write the page; a user's error ends it with one sentence."""
    options = _parser().parse_args(arguments)
    try:
        _inspect(options)
    except (ValueError, OSError) as error:
        sys.exit(f"inspect_data.py: {error}")


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    asked = Options(samples=options.samples, verify=options.verify, vae=options.vae)
    if not options.out.parent.is_dir():
        raise ValueError(f"--out={options.out} is in a folder that does not exist; make it first")
    with Console(stderr=True).status("looking"):
        sets = list(look(options.path, asked))
        content = page(sets).encode()
    write(options.out, content)
    Console().print(summary(sets))
    print(f"wrote {options.out} ({amount(len(content))})")


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="inspect_data.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", nargs="+", help="a folder of latent shards, pictures of any kind, or a preparation")
    parser.add_argument(
        "--out", type=Path, default=Path("inspect.html"), metavar="FILE", help="the page (default: inspect.html)"
    )
    parser.add_argument("--samples", type=int, default=24, help="pictures shown of each bucket (default: 24)")
    parser.add_argument("--verify", action="store_true", help="read everything, with checksums and SHA-256")
    parser.add_argument(
        "--vae",
        metavar="PATH",
        help="folder or hub name with a vae/ in it, or a trained model (default: as the set says)",
    )
    return parser


if __name__ == "__main__":
    # Python put scripts/ here, where `import prepare` would find a script and not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
