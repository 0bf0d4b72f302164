"""Find pictures that are there twice: the same file, the same picture saved anew, or a copy that was edited.

Two passes. The first looks at each picture once, part by part, and leaves in `hashes/`

    NAME.parquet   key, sha256 of the file, pixels, phash (64 bits; null for a flat picture), in the order of keys
    NAME.npy       with `model`, a unit vector a picture, float16

The second compares all with all, in the order of falling pixel count, then part, then key. A picture is kept unless
one kept before it is alike, and then the first such one is named:

    duplicate       the same bytes
    near_duplicate  perceptual hashes that differ in at most `distance` bits
    copy            vectors of a copy detector whose cosine is above `similarity`
    in_other_set    one of these is met by a picture of another set, such as the one for evaluation

The perceptual hash is the DCT of the picture in grey at 32 x 32: its 8 x 8 lowest frequencies, each above their median
or not (pHash). Half of the bits are ones, so that two hashes differ in an even number of them. Where there is next to
no contrast the bits are the noise of the encoder: flat pictures are compared by their bytes alone.

Hashes are not compared pair by pair. Cut 64 bits into d + k blocks: two hashes that differ in d bits or fewer agree
on k of them at least. So for each choice of k blocks all hashes are sorted by these, and neighbours compared. A
larger k means more sorting and fewer neighbours; it is chosen by what a sample of the hashes makes of it.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.decode import MAX_PIXELS, Undecodable, decode
from data.files import sha256
from prepare.parts import Part, Tally, dropped, finished, run_step
from prepare.sources import Source

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from PIL import Image

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
Join = Callable[[np.ndarray, np.ndarray], Pairs]

# Standard deviation in grey levels. Of textures with this much, 82 % are found again as JPEG q50; with half, 13 %.
FLAT = 2.0
IMAGENET_MEAN = np.array([[[0.485]], [[0.456]], [[0.406]]], np.float32)  # of RGB
IMAGENET_STD = np.array([[[0.229]], [[0.224]], [[0.225]]], np.float32)
PAIRS = 2**22  # held in memory at once
CHUNK = 2**20  # compared at once


@dataclass(slots=True, kw_only=True)
class DedupConfig:
    """What counts as the same picture.

    `distance=4`: of 200 textures of 512 px, those saved as JPEG q50, at half the size, or at a quarter in q70 are all
    found; of those brightened by a tenth 98 %; of those cropped by 1 % a side 94 %, by 2 % 66 %, by 5 % 2 %. Among
    20,000 different ones no two are within 6 bits, 4 pairs within 8, 33 within 10. A distance of 2 finds 92 % of the
    brightened and 66 % and 27 % of the cropped; 6 finds 87 % of those cropped by 2 %, and would take, by these
    figures, some thousand wrong pairs for right in a million pictures, ten times as many as 4 does.
    Drawings of a few plain shapes are another matter: of 4,000 different scenes of `data/shapes.py` 48 % are within 4
    bits of an earlier one, 19 % have its very hash; and 2 % of those saved as JPEG q50 are further off. For such data
    choose null.

    `model` is a TorchScript file, such as SSCD's `sscd_disc_mixup.torchscript.pt`, whose authors give 90 % precision
    for a `similarity` of 0.75. It maps (1, 3, h, w), ImageNet-normalised with a short side of 288 px, to (1, n).
    TorchScript is a program and can do what this process can: take it from where you would take code from.
    """

    distance: int | None = 4  # bits of 64; null: near duplicates may stay
    model: str | None = None
    similarity: float = 0.75
    device: str = "cpu"  # for the model, and for comparing its vectors
    against: list[str] = field(
        default_factory=list
    )  # folders of finished dedup steps, none of whose pictures may occur
    max_pixels: int = MAX_PIXELS  # larger pictures are not decoded
    max_faults: float = 0.5  # share of pictures that may be broken

    def __post_init__(self):
        if self.distance is not None and not 0 <= self.distance <= 10:
            raise ValueError(
                f"dedup.distance={self.distance} is outside 0 to 10 bits, beyond which pictures are merely alike;"
                " choose 4, or null to keep near duplicates"
            )
        if not 0 < self.similarity < 1:
            raise ValueError(f"dedup.similarity={self.similarity} is not between 0 and 1; SSCD's authors advise 0.75")
        if self.max_pixels < 1:
            raise ValueError(f"dedup.max_pixels={self.max_pixels} is not a number of pixels; choose {MAX_PIXELS}")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"dedup.max_faults={self.max_faults} is no share; choose 0 (none) to 1 (all)")
        if self.model is not None and not Path(self.model).is_file():
            raise ValueError(f"dedup.model={self.model} is not a file; give a TorchScript file, or null for none")


def dedup(
    config: DedupConfig,
    source: Source,
    folder: Path,
    *,
    processes: int = 1,
    tick: Callable[[int], None] | None = None,
) -> Tally:
    """Write to `folder` which of the source's pictures are to be left out, and return the account.

    Needs some 100 bytes of memory a picture, and with a model 2 more for each number of its vector.
    Raises ValueError for what the config asks in vain. Pictures that cannot be decoded are dropped here, as faults.
    """
    model = sha256(Path(config.model)) if config.model else None
    others = [_other(path, model) for path in config.against]
    hashes = folder / "hashes"
    run_step(
        hashes,
        source.names,
        partial(_hash_part, config, source),
        recipe={"input": source.digest, "max_pixels": config.max_pixels, "model": model},
        title="dedup",
        max_faults=config.max_faults,
        processes=processes,
        tick=tick,
    )
    recipe = {
        "input": finished(hashes)["digest"],
        "distance": config.distance,
        "similarity": config.similarity if model else None,
        "against": [finished(other)["digest"] for other in others],
    }
    fates = cache(partial(_compare, config, hashes, others))  # asked for by the first part that is not made yet
    return run_step(
        folder,
        source.names,
        lambda part: _account(hashes, fates(), part),
        recipe=recipe,
        title="dedup",
        max_faults=config.max_faults,
    )


def _other(path: str, model: str | None) -> Path:
    folder = Path(path)
    try:
        finished(folder)
        theirs = finished(folder / "hashes")["recipe"]["model"]
    except ValueError as error:
        raise ValueError(
            f"dedup.against={path} is not the folder of a finished dedup step; run that one first, or leave it out"
        ) from error
    if model and theirs != model:
        raise ValueError(
            f"dedup.against={path} has no vectors of dedup.model; run it with the same model, or this one with none"
        )
    return folder


def _account(hashes: Path, fates: dict[str, dict[str, tuple[str, str]]], part: Part) -> None:
    import pyarrow.parquet as pq

    fate = fates.get(part.name, {})
    for key in pq.read_table(hashes / f"{part.name}.parquet", columns=["key"])["key"].to_pylist():
        if key in fate:
            part.drop(key, *fate[key])
        else:
            part.keep()
    lost = hashes / f"{part.name}.dropped.parquet"
    for row in pq.read_table(lost).to_pylist() if lost.exists() else ():
        part.drop(row["key"], row["reason"], row["detail"], fault=True)


# --- the first pass: one picture ------------------------------------------------------------------------------


def _hash_part(config: DedupConfig, source: Source, part: Part) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[tuple[str, bytes, int, int | None, np.ndarray | None]] = []
    for sample in source.read(part.name):
        if sample.image is None:
            part.drop(sample.key, sample.problem, fault=True)
            continue
        try:
            image = decode(sample.image, max_pixels=config.max_pixels)
        except Undecodable as error:
            part.drop(sample.key, error.reason, error.detail, fault=True)
            continue
        vector = _embed(image, config.model, config.device) if config.model else None
        digest = hashlib.sha256(sample.image).digest()
        rows.append((sample.key, digest, image.width * image.height, phash(image), vector))
        part.keep()
    rows.sort(key=lambda row: row[0])
    types = {"key": pa.string(), "sha256": pa.binary(32), "pixels": pa.int64(), "phash": pa.uint64()}
    columns = {name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(types.items())}
    pq.write_table(pa.table(columns), part.path(".parquet"), compression="zstd")
    if config.model:
        with open(part.path(".npy"), "wb") as file:
            np.save(
                file,
                np.stack([row[-1] for row in rows if row[-1] is not None]) if rows else np.zeros((0, 0), np.float16),
            )


def phash(image: "Image.Image") -> int | None:
    """64 bits, the lowest frequency first, as `imagehash.phash` gives them; None for a picture without contrast."""
    from PIL.Image import Resampling
    from scipy.fft import dctn

    grey = np.asarray(image.convert("L").resize((32, 32), Resampling.LANCZOS))
    if grey.std() < FLAT:
        return None
    low = np.asarray(dctn(grey))[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _embed(image: "Image.Image", model: str, device: str) -> np.ndarray:
    """A unit vector (n,) float16. One picture at a time and one thread: the bits depend on the picture alone."""
    import torch
    from PIL.Image import Resampling

    # as SSCD's authors prepare a picture, but not longer than four times its short side, for the memory's sake
    short = min(image.size)
    width, height = (min(288 * side // short, 4 * 288) for side in image.size)
    pixels = np.array(image.resize((width, height), Resampling.BILINEAR), np.float32).transpose(2, 0, 1) / 255
    batch = torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD)[None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            vector = _model(model, device)(batch.to(device))
    finally:
        torch.set_num_threads(threads)
    if not isinstance(vector, torch.Tensor) or vector.ndim != 2 or len(vector) != 1:
        raise ValueError(
            f"dedup.model={model} does not map a picture (1, 3, h, w) to one vector (1, n); give one that does"
        )
    return torch.nn.functional.normalize(vector[0].float(), dim=0).half().cpu().numpy()


@lru_cache(maxsize=1)
def _model(path: str, device: str) -> "torch.jit.ScriptModule":
    import torch

    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"dedup.model={path} does not load as TorchScript on dedup.device={device}: {reason}"
        ) from error


# --- the second pass: all pictures ----------------------------------------------------------------------------


@dataclass(slots=True)
class Pictures:
    """What is known of n pictures of one set. `place` is a part, by its number in `names`."""

    names: list[str]
    place: np.ndarray  # (n,) int32
    key: "pa.ChunkedArray"
    sha256: np.ndarray  # (n,) S32
    pixels: np.ndarray  # (n,) int64
    phash: np.ndarray  # (n,) uint64
    flat: np.ndarray  # (n,) bool
    vector: np.ndarray | None  # (n, dim) float16


def _pictures(hashes: Path, *, model: bool, title: str = "", but: Path | None = None) -> Pictures:
    """Those of a finished first pass, by part and key, but for those that the step `but` dropped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted(finished(hashes)["parts"])
    tables, vectors = [], []
    for name in names:
        table = pq.read_table(hashes / f"{name}.parquet")
        lost = dropped(but, name) if but else {}
        stay = np.array([key not in lost for key in table["key"].to_pylist()], bool)
        tables.append(table.filter(pa.array(stay)))
        if model and stay.any():
            vectors.append(np.load(hashes / f"{name}.npy", mmap_mode="r")[stay])
    table = pa.concat_tables(tables)
    return Pictures(
        names=[f"{title}{name}" for name in names],
        place=np.repeat(np.arange(len(names), dtype=np.int32), [len(table) for table in tables]),
        key=table["key"],
        sha256=np.frombuffer(b"".join(table["sha256"].to_pylist()), "S32"),
        pixels=table["pixels"].to_numpy(),
        phash=table["phash"].fill_null(0).to_numpy(),
        flat=table["phash"].is_null().to_numpy(),
        vector=np.concatenate(vectors) if vectors else None,
    )


def _compare(config: DedupConfig, hashes: Path, others: list[Path]) -> dict[str, dict[str, tuple[str, str]]]:
    """Reason and detail of every picture that has to go, by part and key."""
    sets = [
        _pictures(other / "hashes", model=config.model is not None, title=f"{other.resolve().parent.name}/", but=other)
        for other in others
    ]
    ours = _pictures(hashes, model=config.model is not None)
    known = sum(len(them.place) for them in sets)  # the others come first, and none of them has to go
    order = np.concatenate([np.arange(known), known + np.argsort(-ours.pixels, kind="stable")])
    every = _joined([*sets, ours])
    sha, hashed, flat = every.sha256[order], every.phash[order], every.flat[order]
    vector = every.vector[order] if every.vector is not None else None
    joins = []
    if config.distance is not None:
        joins.append(partial(near, hashed, config.distance))
    if vector is not None:
        joins.append(partial(alike, vector, config.similarity, config.device))
    of = first_alike(sha, flat, known, lambda a, b: chain.from_iterable(join(a, b) for join in joins))

    fates: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    gone = np.flatnonzero(of < len(of))
    keys, kept_keys = (every.key.take(order[rows]).to_pylist() for rows in (gone, of[gone]))
    for j, i, key, kept in zip(gone, of[gone], keys, kept_keys, strict=True):
        bits = int(np.bitwise_count(hashed[i] ^ hashed[j]))
        if sha[i] == sha[j]:
            reason, how = "duplicate", "the same bytes"
        elif config.distance is not None and bits <= config.distance:
            reason, how = "near_duplicate", f"distance {bits}"
        else:
            assert vector is not None
            reason, how = "copy", f"similarity {_cosine(vector[i], vector[j]):.3f}"
        place, kept_place = (every.names[every.place[order[row]]] for row in (j, i))
        fates[place][key] = ("in_other_set" if i < known else reason, f"of {kept_place}/{kept}, {how}")
    return fates


def _joined(sets: Sequence[Pictures]) -> Pictures:
    """Several sets as one."""
    import pyarrow as pa

    starts = np.cumsum([0, *(len(them.names) for them in sets)])
    vectors = [them.vector for them in sets if them.vector is not None]
    return Pictures(
        names=[name for them in sets for name in them.names],
        place=np.concatenate([start + them.place for start, them in zip(starts, sets, strict=False)]),
        key=pa.chunked_array([piece for them in sets for piece in them.key.chunks], pa.string()),
        sha256=np.concatenate([them.sha256 for them in sets]),
        pixels=np.concatenate([them.pixels for them in sets]),
        phash=np.concatenate([them.phash for them in sets]),
        flat=np.concatenate([them.flat for them in sets]),
        vector=np.concatenate(vectors) if vectors else None,
    )


def first_alike(sha: np.ndarray, flat: np.ndarray, known: int, join: Join, limit: int = PAIRS) -> np.ndarray:
    """For each of n pictures in order the first kept one that is alike, or n if there is none and it is kept itself.

    The first `known` are kept whatever they are. `join(a, b)` yields the pairs i of a and j of b that are alike,
    of two ascending arrays of numbers, or all i < j if a is b; of flat pictures it is not asked.
    """
    n = len(sha)
    _, first, group = np.unique(sha, return_index=True, return_inverse=True)
    first = first[group]  # the first with the same bytes
    of = np.full(n, n)
    number = np.arange(n)
    compared = np.flatnonzero(~flat & ((first == number) | (number < known)))
    theirs, ours = compared[compared < known], compared[compared >= known]
    _drop(join, theirs, ours, of)
    _keep_first(join, ours[of[ours] == n], of, limit)
    same = np.flatnonzero((first < number) & (number >= known))
    of[same] = np.where(of[first[same]] < n, of[first[same]], first[same])
    return of


def _keep_first(join: Join, among: np.ndarray, of: np.ndarray, limit: int) -> None:
    """Settle pictures in order. Thousands that are all alike have too many pairs: then the first half goes first, and
    takes with it what is like its kept ones."""
    n = len(of)
    if (pairs := _all_pairs(join, among, limit)) is None:
        early, late = np.array_split(among, 2)
        _keep_first(join, early, of, limit)
        _drop(join, early[of[early] == n], late, of)
        _keep_first(join, late[of[late] == n], of, limit)
        return
    i, j = pairs
    for code in np.unique(j * n + i).tolist():  # by j, then i: when j is asked for, every i before it is settled
        j, i = divmod(code, n)
        if of[j] == n and of[i] == n:
            of[j] = i


def _all_pairs(join: Join, among: np.ndarray, limit: int) -> np.ndarray | None:
    """(2, pairs), or None if they are more than `limit`."""
    held, count = [np.zeros((2, 0), np.int64)], 0
    for pair in join(among, among):
        held.append(np.stack(pair))
        count += len(pair[0])
        if count > limit:
            return None
    return np.concatenate(held, 1)


def _drop(join: Join, kept: np.ndarray, late: np.ndarray, of: np.ndarray) -> None:
    for i, j in join(kept, late):
        np.minimum.at(of, j, i)


def near(hashes: np.ndarray, distance: int, a: np.ndarray, b: np.ndarray) -> Pairs:
    """The pairs of a and b whose 64-bit hashes differ in at most `distance` bits; some come more than once."""
    if not len(a) or not len(b):
        return
    for mask in _masks(distance, _agreeing(hashes[b], distance, len(a))):
        left = a[np.argsort(hashes[a] & mask, kind="stable")]
        right = left if a is b else b[np.argsort(hashes[b] & mask, kind="stable")]
        key = hashes[right] & mask
        start = np.searchsorted(hashes[left] & mask, key, "left")
        stop = np.arange(len(right)) if a is b else np.searchsorted(hashes[left] & mask, key, "right")
        for i, j in _ranges(start, stop):
            i, j = left[i], right[j]
            close = np.bitwise_count(hashes[i] ^ hashes[j]) <= distance
            if close.any():
                yield i[close], j[close]


def _masks(distance: int, agreeing: int) -> list[np.uint64]:
    """Every choice of `agreeing` blocks of bits out of distance + agreeing."""
    edges = np.linspace(0, 64, distance + agreeing + 1).round().astype(int).tolist()
    blocks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [np.uint64(sum(choice)) for choice in combinations(blocks, agreeing)]


def _agreeing(hashes: np.ndarray, distance: int, others: int) -> int:
    """How many blocks should agree: that with the least work, by the neighbours found in a sample of the hashes."""
    n = len(hashes)
    sample = np.unique(hashes[:: n // 2**14 + 1])
    pairs = len(sample) * (len(sample) - 1) / 2
    best, least = 1, math.inf
    for agreeing in (1, 2, 3):
        masks = _masks(distance, agreeing)
        work = 40.0 * n * len(masks)  # to sort and look up one hash costs some 40 times what a comparison does
        if work >= least or not pairs:
            break
        counts = np.concatenate([np.unique(sample & mask, return_counts=True)[1] for mask in masks])
        work += n * others * float((counts * (counts - 1) / 2).sum()) / pairs
        if work < least:
            best, least = agreeing, work
    return best


def _ranges(start: np.ndarray, stop: np.ndarray) -> Pairs:
    """All (i, j) with start[j] <= i < stop[j], some CHUNK at a time."""
    rows = np.flatnonzero(stop > start)
    start, count = start[rows], stop[rows] - start[rows]
    total = np.cumsum(count)
    while len(rows):
        take = max(1, int(np.searchsorted(total, CHUNK, "right")))
        size, offset = count[:take], total[:take] - count[:take]
        yield np.arange(total[take - 1]) + np.repeat(start[:take] - offset, size), np.repeat(rows[:take], size)
        rows, start, count, total = rows[take:], start[take:], count[take:], total[take:] - total[take - 1]


def alike(vectors: np.ndarray, similarity: float, device: str, a: np.ndarray, b: np.ndarray) -> Pairs:
    """The pairs of a and b whose unit vectors have a cosine above `similarity`.

    A product of matrices proposes, whose last bits depend on the machine; a sum in float64 decides.
    """
    import torch

    def block(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(vectors[rows]).to(device).float()

    for right in (b[at : at + 1024] for at in range(0, len(b), 1024)):
        columns = block(right).T
        for left in (a[at : at + 8192] for at in range(0, len(a), 8192)):
            if a is b and left[0] >= right[-1]:
                break
            close = block(left) @ columns > similarity - 0.005
            rows, cols = close.nonzero().cpu().numpy().T
            i, j = left[rows], right[cols]
            sure = (_cosine(vectors[i], vectors[j]) > similarity) & ((i < j) if a is b else True)
            if sure.any():
                yield i[sure], j[sure]


def _cosine(x: np.ndarray, y: np.ndarray) -> Any:
    return np.einsum("...n,...n->...", x.astype(np.float64), y.astype(np.float64))
