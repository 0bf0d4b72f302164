"""How fast shards are read, beside other libraries that hold the same samples and beside plain reads of their bytes.

    python benchmarks/loading.py                                     prints the tables and writes benchmarks/loading.md
    python benchmarks/loading.py --gigabytes 0.4 --passes 1          to try it

Every library stores the same synthetic samples in its own format, and hands over shuffled batches of 64 with latents
and text states as tensors. Each reads in a process of its own, and they take turns. A pass is an epoch, or the first
`--seconds` of one, from when all workers have started: starting is measured apart, on a million records.

    mapped safetensors    a file of 1,000 samples, tensors by name: no captions are read, nothing is checked
    bytes alone           positioned reads of what our reader reads into one buffer, which is handed to nobody

Cold means that the kernel has dropped its pages; what lies beneath it may still hold them. It then reads ahead, most
of all around mapped pages. In sets as small as these, all of that is used a moment later; in larger ones it is not.
"""

import argparse
import ctypes
import gc
import json
import math
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children, get_context, set_start_method
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
LENGTH, WIDTH, POOLED = 77, 2048, 1280  # what the text encoders of SDXL give for a caption
WORKERS = (0, 1, 2)
LEAST = BATCH * (1 + 4 * max(WORKERS) + 3)  # samples: a batch to start with, what is made ahead, and some to time
MILLION = 1_000_000
POOL = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(np.float16)  # all samples are cuts of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A set of samples; their latents are float16."""

    name: str
    about: str
    side: int  # of the picture in pixels
    shape: tuple[int, int, int]
    text: bool = True

    @property
    def numbers(self) -> int:
        """How many float16 a sample has."""
        return math.prod(self.shape) + self.text * (LENGTH * WIDTH + POOLED)


CASES = (
    Case(name="256", about="256 px, text states", side=256, shape=(4, 32, 32)),
    Case(name="1024", about="1024 px, text states", side=1024, shape=(4, 128, 128)),
    Case(name="latents", about="1088 x 1104 px, text encoded online", side=1104, shape=(4, 136, 138), text=False),
)


@dataclass(slots=True, kw_only=True)
class Sample:
    """What every library stores of a picture."""

    record: dict[str, Any]
    latent: np.ndarray
    states: np.ndarray | None = None
    pooled: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """By their names."""
        named = {"latent": self.latent, "states": self.states, "pooled": self.pooled}
        return {name: array for name, array in named.items() if array is not None}


def sample(case: Case, number: int) -> Sample:
    """A sample of a set, always the same."""
    start = number * 4099 % (len(POOL) - case.numbers)  # a prime, so that no two begin alike
    cut = POOL[start : start + case.numbers]
    size = math.prod(case.shape)
    words = f"picture {number} of a red circle beside a blue square"
    record = {
        "captions": {"alt": words, "short": f"a {words}", "long": f"a long caption of {words}, " * 6},
        "original_size": [case.side, case.side],
        "crop": [0, 0],
        "aesthetic": 5.5,
        "url": f"https://example.org/pictures/{number:09d}.jpg",
    }
    latent = cut[:size].reshape(case.shape)
    if not case.text:
        return Sample(record=record, latent=latent)
    return Sample(record=record, latent=latent, states=cut[size:-POOLED].reshape(LENGTH, WIDTH), pooled=cut[-POOLED:])


def shard_size(count: int) -> int:
    """Samples in a file: a thousand, or fewer where there would be less than two files for each of two workers."""
    return max(BATCH, min(1000, -(-count // 4)))


# Ours


def write_ours(folder: Path, case: Case, count: int, dtype: str = "float16") -> None:
    """Shards, with text states in 16 bits or 8."""
    from data.shards import ShardWriter
    from data.texts import TextLayout

    layout = TextLayout(dtype=dtype, width=WIDTH, length=LENGTH, masked=False, encoder="synthetic", pooled=POOLED)
    text = layout if case.text else None
    with ShardWriter(folder, resolution=case.side, vae={}, text=text, shard_size=shard_size(count)) as writer:
        for one in (sample(case, number) for number in range(count)):
            writer.add(one.record, latent=one.latent)
            if one.states is not None:
                writer.add_text(one.record["captions"]["alt"], one.states, one.pooled)


def read_ours(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """Our loader."""
    from data.loader import Batches, DataConfig, open_shards

    config = DataConfig(
        path=str(folder),
        resolution=case.side,
        caption_weights={"alt": 1.0} if case.text else {},
        workers=workers,
        text_states=case.text,
    )
    stop = count // BATCH * BATCH
    batches = Batches(config, open_shards(config), 0, start=0, stop=stop, batch_size=BATCH, micro_batch=BATCH)
    return ((batch.latents, batch.text) for batch in batches.loader())


# webdataset


def write_webdataset(folder: Path, case: Case, count: int) -> None:
    """Tars with everything of a sample side by side."""
    webdataset: Any = import_module("webdataset")
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=shard_size(count), verbose=0) as writer:
        for number in range(count):
            one = sample(case, number)
            arrays = {f"{name}.npy": array for name, array in one.arrays().items()}
            writer.write({"__key__": f"{number:09d}", **arrays, "json": one.record})


def read_webdataset(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """As its manual has it: shards in a random order, samples through a buffer of 1,000."""
    webdataset: Any = import_module("webdataset")
    names = ["latent.npy", *(["states.npy", "pooled.npy"] if case.text else []), "json"]
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode().to_tuple(*names)
    batches = webdataset.WebLoader(samples.batched(BATCH, partial=False), batch_size=None, num_workers=workers)
    return ((batch[0], batch[1] if case.text else None) for batch in batches)


# litdata


def write_litdata(folder: Path, case: Case, count: int) -> None:
    """Chunks of 64 MB."""
    litdata: Any = import_module("litdata")
    litdata.optimize(
        partial(flat, case), list(range(count)), str(folder), num_workers=1, chunk_bytes="64MB", verbose=False
    )


def flat(case: Case, number: int) -> dict[str, Any]:
    """A sample as one dictionary."""
    one = sample(case, number)
    return {**one.arrays(), "json": json.dumps(one.record)}


def read_litdata(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """Its own dataset and loader; by default it would decode some hundred samples for each that it shows."""
    litdata: Any = import_module("litdata")
    stored = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True, batch_decode=False)
    batches = litdata.StreamingDataLoader(stored, batch_size=BATCH, num_workers=workers, drop_last=True)
    return ((batch["latent"], batch.get("states")) for batch in decoded(batches))


def decoded(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches with their JSON read."""
    for batch in batches:
        yield batch | {"json": [json.loads(text) for text in batch["json"]]}


# mosaicml-streaming


def write_streaming(folder: Path, case: Case, count: int) -> None:
    """MDS, uncompressed."""
    streaming: Any = import_module("streaming")
    shapes = {name: ",".join(map(str, array.shape)) for name, array in sample(case, 0).arrays().items()}
    columns = {name: f"ndarray:float16:{shape}" for name, shape in shapes.items()} | {"json": "json"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for number in range(count):
            one = sample(case, number)
            writer.write({**one.arrays(), "json": one.record})


def read_streaming(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """Its dataset in torch's loader."""
    from torch.utils.data import DataLoader

    streaming: Any = import_module("streaming")
    streaming.base.util.clean_stale_shared_memory()  # what an interrupted pass left would stop the next
    stored = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    batches = DataLoader(stored, BATCH, num_workers=workers, drop_last=True, collate_fn=collated)
    return ((batch["latent"], batch.get("states")) for batch in batches)


def collated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of arrays, and of records as they are: torch's own function would take those apart."""
    import torch

    stacked = {
        name: torch.from_numpy(np.stack([one[name] for one in samples])) for name in samples[0].keys() - {"json"}
    }
    return stacked | {"json": [one["json"] for one in samples]}


# Hugging Face datasets


def write_datasets(folder: Path, case: Case, count: int) -> None:
    """An Arrow file; arrays as lists of a fixed length, which are read without a copy."""
    datasets: Any = import_module("datasets")
    value = datasets.Value("float16")
    lengths = {name: array.size for name, array in sample(case, 0).arrays().items()}
    columns = {name: datasets.List(value, length=length) for name, length in lengths.items()}
    features = datasets.Features(columns | {"json": datasets.Value("string")})
    writer = import_module("datasets.arrow_writer").ArrowWriter(path=str(folder / "data.arrow"), features=features)
    for number in range(count):
        one = sample(case, number)
        writer.write({name: array.ravel() for name, array in one.arrays().items()} | {"json": json.dumps(one.record)})
    writer.finalize()


def read_datasets(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """Rows at random, as numpy arrays, in torch's loader."""
    from torch.utils.data import DataLoader

    datasets: Any = import_module("datasets")
    stored = datasets.Dataset.from_file(str(folder / "data.arrow")).with_format("numpy", dtype=np.float16)
    batches = DataLoader(stored, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    shapes = {name: (BATCH, *array.shape) for name, array in sample(case, 0).arrays().items()}
    for batch in decoded(batches):
        yield batch["latent"].view(shapes["latent"]), batch["states"].view(shapes["states"]) if case.text else None


# Mapped safetensors, and bytes alone


def write_safetensors(folder: Path, case: Case, count: int) -> None:
    """A file of up to 1,000 samples, without their records."""
    from safetensors.numpy import save_file

    size = shard_size(count)
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        tensors = {f"{n}.{name}": array.copy() for n in numbers for name, array in sample(case, n).arrays().items()}
        save_file(tensors, folder / f"{start // size:05d}.safetensors")


class Mapped:
    """Batches of tensors by name out of mapped files; a dataset for torch's loader."""

    def __init__(self, folder: Path, case: Case, count: int):
        self._folder, self._size, self._files = folder, shard_size(count), {}
        self._names = list(sample(case, 0).arrays())
        self._order = np.random.default_rng(0).permutation(count)

    def __len__(self) -> int:
        return len(self._order) // BATCH

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        import torch

        rows = self._order[number * BATCH : (number + 1) * BATCH].tolist()
        return tuple(torch.stack([self._file(n).get_tensor(f"{n}.{name}") for n in rows]) for name in self._names)

    def _file(self, number: int) -> Any:
        """Opened when first needed, in whatever process needs it."""
        from safetensors import safe_open

        shard = number // self._size
        if shard not in self._files:
            self._files[shard] = safe_open(self._folder / f"{shard:05d}.safetensors", framework="pt")
        return self._files[shard]


def read_safetensors(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """Tensors of a random order, stacked."""
    from torch.utils.data import DataLoader

    mapped: Any = Mapped(folder, case, count)
    return ((batch[0], batch[1] if case.text else None) for batch in DataLoader(mapped, None, num_workers=workers))


class Bytes:
    """Positioned reads of our shards, into one buffer of a batch; a dataset for torch's loader that hands over none."""

    def __init__(self, folder: Path, case: Case, count: int):
        self._folder, self._files, self._buffer = folder, {}, None
        reads = list(zip(*stretches(folder, case, count), strict=True))
        self._reads = [reads[n] for n in np.random.default_rng(0).permutation(count)]
        self._largest = BATCH * max(sum(size for *_, size in one) for one in reads)

    def __len__(self) -> int:
        return len(self._reads) // BATCH

    def __getitem__(self, number: int) -> tuple[None, None]:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(self._largest))
        start = 0
        for one in self._reads[number * BATCH : (number + 1) * BATCH]:
            for name, offset, size in one:
                os.preadv(self._file(name), [self._buffer[start : start + size]], offset)
                start += size
        return None, None

    def _file(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._files[name]


def stretches(folder: Path, case: Case, count: int) -> Iterator[list[tuple[str, int, int]]]:
    """File, start and length of each sample's latent and record, and of its text states: each in one piece."""
    from data.texts import caption_hash

    found = np.load(folder / "records.npy")[["shard", "latent", "json", "json_bytes"]].tolist()
    yield [(f"{shard:05d}.tar", latent, text + size - latent) for shard, latent, text, size in found]
    if case.text:
        texts = np.load(folder / "texts.npy")
        keys = [caption_hash(sample(case, number).record["captions"]["alt"]) for number in range(count)]
        found = texts[np.searchsorted(texts["caption"], np.array(keys, np.uint64))][["shard", "start"]].tolist()
        yield [(f"{shard:05d}.text.tar", start, 2 * (POOLED + LENGTH * WIDTH)) for shard, start in found]


def read_bytes(folder: Path, case: Case, count: int, workers: int) -> Iterable[tuple[Any, Any]]:
    """What there is to read, and nothing else."""
    from torch.utils.data import DataLoader

    alone: Any = Bytes(folder, case, count)
    return iter(DataLoader(alone, None, num_workers=workers))


Write = Callable[[Path, Case, int], None]
Read = Callable[[Path, Case, int, int], Iterable[tuple[Any, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One way to store and read."""

    name: str
    package: str
    folder: str
    write: Write
    read: Read
    text_alone: bool = False  # differs from another in text states only


LIBRARIES = (
    Library(name="**ours**", package="torch", folder="ours", write=write_ours, read=read_ours),
    Library(
        name="**ours**, text in int8", package="torch", folder="int8", write=partial(write_ours, dtype="int8"),
        read=read_ours, text_alone=True,
    ),
    Library(
        name="webdataset", package="webdataset", folder="webdataset", write=write_webdataset, read=read_webdataset
    ),
    Library(name="litdata", package="litdata", folder="litdata", write=write_litdata, read=read_litdata),
    Library(
        name="mosaicml-streaming", package="streaming", folder="streaming", write=write_streaming, read=read_streaming
    ),
    Library(name="HF datasets", package="datasets", folder="datasets", write=write_datasets, read=read_datasets),
    Library(
        name="mapped safetensors", package="safetensors", folder="safetensors", write=write_safetensors,
        read=read_safetensors,
    ),
    Library(name="bytes alone", package="torch", folder="ours", write=write_ours, read=read_bytes),
)  # fmt: skip


# Measuring


def one_pass(library: Library, folder: Path, case: Case, count: int, workers: int, limit: float) -> tuple[float, float]:
    """Samples a second, and processor time of all processes by the time it took."""
    batches = iter(library.read(folder, case, count, workers))
    check(library, case, next(batches))
    for _ in range(4 * workers):  # until all workers have started, and what they had made ahead is used up
        next(batches)
    samples, start, used = 0, time.perf_counter(), processor_seconds()
    for _ in batches:
        samples += BATCH
        if time.perf_counter() - start > limit:
            break
    took = time.perf_counter() - start
    result = samples / took, (processor_seconds() - used) / took
    del batches
    gc.collect()  # what is still mapped cannot be dropped
    return result


def check(library: Library, case: Case, batch: tuple[Any, Any]) -> None:
    """A batch must be what was stored."""
    latents, states = batch
    if library.read is not read_bytes:
        assert (str(latents.dtype), tuple(latents.shape)) == ("torch.float16", (BATCH, *case.shape))
        assert not case.text or tuple(states.shape) == (BATCH, LENGTH, WIDTH)


def processor_seconds() -> float:
    """Of this process and its children, as Linux accounts for them."""
    children = active_children()  # this first: it adds those that have ended to the times
    total = sum(os.times()[:4])
    for child in children:
        with suppress(FileNotFoundError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def anonymous() -> float:
    """MiB of memory that no file stands behind, of this process and its children."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in active_children())):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total / 1024


def memory(folder: Path, case: Case, count: int, workers: int) -> list[float]:
    """MiB at 10 %, 50 % and 100 % of an epoch of ours."""
    batches = count // BATCH
    marks = [max(1, batches // 10), batches // 2, batches - 1 - 4 * workers]  # workers end when nothing is left to read
    found = []
    for number, _ in enumerate(read_ours(folder, case, count, workers)):
        if number in marks:
            found.append(anonymous())
    return found


def drop(folder: Path) -> float:
    """Have the kernel forget the files of a folder; returns the share of their pages that it keeps none the less."""
    os.sync()
    kept = pages = 0
    for path in files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                content = np.frombuffer(mapped, np.uint8)
                resident = np.empty(-(-len(content) // mmap.PAGESIZE), np.uint8)
                address, size = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content))
                ctypes.CDLL(None).mincore(address, size, ctypes.c_void_p(resident.ctypes.data))
                kept, pages = kept + int((resident & 1).sum()), pages + len(resident)
                del content
    return kept / pages


def fetch(folder: Path) -> None:
    """Have the kernel hold all files of a folder."""
    for path in files(folder):
        with open(path, "rb") as file:
            while file.read(2**22):
                pass


def files(folder: Path) -> list[Path]:
    """All that are not empty, in all folders below."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


def million(folder: Path) -> tuple[Case, int]:
    """A set whose tables have a million rows, of the same 256 records again and again, each with its text states."""
    from data.shards import Shard, write_index
    from data.texts import TextLayout

    case, held = CASES[0], 256
    if (folder / "index.json").exists():
        return case, MILLION
    folder.mkdir(parents=True)
    layout = TextLayout(dtype="float16", width=WIDTH, length=LENGTH, masked=False, encoder="synthetic", pooled=POOLED)
    with Shard(folder / "00000.tar", folder / "00000.text.tar", number=0, text=layout) as shard:
        for one in (sample(case, number) for number in range(held)):
            shard.add(one.record, size=(case.side, case.side), latent=one.latent)
            assert one.states is not None
            shard.add_text(one.record["captions"]["alt"], one.states, one.pooled)
        table = shard.finish()
    texts = np.resize(table.texts, MILLION)  # those of captions that no record has, but for the first
    texts["caption"][held:] = np.random.default_rng(0).integers(2**63, size=MILLION - held)
    buckets = [bucket | {"count": MILLION} for bucket in table.buckets]
    captions = dict.fromkeys(table.captions, MILLION)
    records = np.resize(table.records, MILLION)
    table = replace(table, records=records, texts=texts, buckets=buckets, captions=captions)
    write_index(folder, [table], resolution=case.side, vae={})
    return case, MILLION


def first_batch(folder: Path, case: Case, count: int, workers: int) -> tuple[float, float]:
    """Seconds of importing the loader, and from opening the set to the first batch."""
    start = time.perf_counter()
    import_module("data.loader")
    imported = time.perf_counter()
    next(iter(read_ours(folder, case, count, workers)))
    return imported - start, time.perf_counter() - imported


def alone(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns in a process of its own."""
    with process() as pool:
        return pool.submit(call, *arguments).result()


def process() -> ProcessPoolExecutor:
    """A process that has imported nothing of ours."""
    return ProcessPoolExecutor(1, get_context("spawn"), forking)


def forking() -> None:
    """Loaders start their workers as Linux does for a program that says nothing, and not as they were started here."""
    set_start_method("fork", force=True)


# The program


def lacking(package: str) -> str | None:
    """Why a library cannot be imported, if it cannot."""
    try:
        import_module(package)
    except (ImportError, RuntimeError) as error:  # torchvision, which two of them import, raises the latter
        return f"{type(error).__name__}: {error}"


class Bench:
    """The libraries that are installed, each with its process."""

    def __init__(self, folder: Path, gigabytes: float, passes: int, seconds: float, stack: ExitStack):
        self.folder, self._gigabytes, self._passes, self._seconds = folder, gigabytes, passes, seconds
        self.missing: list[str] = []
        self._pools: dict[str, ProcessPoolExecutor] = {}
        for library in LIBRARIES:
            self._pools[library.name] = stack.enter_context(process())
            if error := self._pools[library.name].submit(lacking, library.package).result():
                self.missing += [f"{library.name} is left out: {error}.", ""]
                del self._pools[library.name]

    def count(self, case: Case) -> int:
        """Samples of a set."""
        return int(self._gigabytes * 1e9 / (2 * case.numbers)) // BATCH * BATCH

    def of(self, case: Case) -> list[Library]:
        """The libraries that take part."""
        return [one for one in LIBRARIES if one.name in self._pools and (case.text or not one.text_alone)]

    def place(self, library: Library, case: Case) -> Path:
        """Where a library's samples lie; they are written if they do not."""
        folder = self.folder / f"{case.name}-{self.count(case)}" / library.folder
        whole = folder.with_suffix(".whole")
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            print(f"writing {folder}", file=sys.stderr, flush=True)
            self._pools[library.name].submit(library.write, folder, case, self.count(case)).result()
            whole.touch()
        return folder

    def row(self, library: Library, case: Case, workers: int) -> tuple[float, float]:
        """One pass."""
        given = library, self.place(library, case), case, self.count(case), workers, self._seconds
        return self._pools[library.name].submit(one_pass, *given).result()

    def table(self, case: Case) -> Iterator[str]:
        """Rows of a case's table, and what they say."""
        libraries, kept = self.of(case), {library.name: 0.0 for library in self.of(case)}
        cold: dict[tuple[str, int], tuple[float, float]] = {}
        warm: dict[tuple[str, int], tuple[float, float]] = {}
        for library in libraries:
            for workers in WORKERS:
                kept[library.name] = max(kept[library.name], drop(self.place(library, case)))
                cold[library.name, workers] = self.row(library, case, workers)
        for library in libraries:
            fetch(self.place(library, case))
        for workers in WORKERS:
            turns = [[self.row(library, case, workers) for library in libraries] for _ in range(self._passes)]
            for library, rows in zip(libraries, zip(*turns, strict=True), strict=True):
                rate, share = (statistics.median(column) for column in zip(*rows, strict=True))
                warm[library.name, workers] = rate, share
        kilobytes = 2 * case.numbers / 1000
        yield f"## {case.about}: {self.count(case):,} samples of {kilobytes:.0f} KB"
        yield ""
        columns = [f"{state}, workers={workers}" for state in ("warm", "cold") for workers in WORKERS]
        yield f"| samples/s (processors) | {' | '.join(columns)} |"
        yield "|---" * (1 + len(columns)) + "|"
        for library in libraries:
            cells = [measured[library.name, workers] for measured in (warm, cold) for workers in WORKERS]
            yield f"| {library.name} | {' | '.join(f'{rate:,.0f} ({share:.2f})' for rate, share in cells)} |"
        yield ""
        for other in ("webdataset", "mapped safetensors", "bytes alone"):
            if other in self._pools:
                ratios = ", ".join(f"{warm['**ours**', w][0] / warm[other, w][0]:.2f}" for w in WORKERS)
                yield f"Ours over {other}, warm, with 0, 1 and 2 workers: {ratios}.  "
        still = ", ".join(f"{share:.0%} for {name}" for name, share in kept.items() if share >= 0.005)
        yield f"Share of the pages that the kernel kept when told to drop them: {still or 'none'}."
        yield ""

    def starting(self) -> Iterator[str]:
        """Time to the first batch of a set of a million."""
        folder = self.folder / "million"
        case, count = million(folder)
        yield f"## First batch of {count:,} records with text states, in a fresh process"
        yield ""
        yield "| | import, s | from opening the set to the first batch, s |"
        yield "|---|---|---|"
        for state in ("cold", "warm"):
            for workers in (0, 2):
                drop(folder) if state == "cold" else fetch(folder)
                imported, took = alone(first_batch, folder, case, count, workers)
                yield f"| {state}, workers={workers} | {imported:.2f} | {took:.2f} |"
        yield ""

    def flat(self) -> Iterator[str]:
        """Memory over an epoch."""
        yield "## Anonymous memory of ours over an epoch, all processes, MiB"
        yield ""
        yield "| | 10 % | 50 % | 100 % |"
        yield "|---|---|---|---|"
        for case in CASES:
            for workers in (0, 2):
                found = alone(memory, self.place(LIBRARIES[0], case), case, self.count(case), workers)
                yield f"| {case.about}, workers={workers} | {' | '.join(f'{n:.0f}' for n in found)} |"
        yield ""


def head(folder: Path) -> Iterator[str]:
    """What ran where."""
    yield "# Reading"
    yield ""
    yield f"`python {' '.join(sys.argv)}`"
    yield ""
    memory_size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    system = max(inside, key=lambda mount: len(mount[1]))[2]
    machine = f"{len(model)} x {model[0]}, {memory_size:.0f} GiB, {system}"
    yield f"{machine}, Linux {platform.release()}, Python {platform.python_version()}."
    names = (
        "torch",
        "numpy",
        "webdataset",
        "litdata",
        "mosaicml-streaming",
        "datasets",
        "pyarrow",
        "safetensors",
        "xxhash",
    )
    versions = []
    for name in names:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    yield f"{', '.join(versions)}."
    yield ""


def main() -> None:
    """Write what is not there, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of each set")
    parser.add_argument("--passes", type=int, default=3, help="of which the median is given")
    parser.add_argument("--seconds", type=float, default=0.7, help="after which a pass ends")
    parser.add_argument("--folder", type=Path, help="keeps the sets for another run; by default they are deleted")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/loading.md"))
    args = parser.parse_args()
    if (least := LEAST * 2 * max(case.numbers for case in CASES) / 1e9) > args.gigabytes:
        parser.error(f"--gigabytes={args.gigabytes} is too little to time two workers; give at least {least:.2f}")
    lines = []
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, args.gigabytes, args.passes, args.seconds, stack)
        tables = (bench.table(case) for case in CASES)
        for part in (head(folder), bench.missing, *tables, bench.starting(), bench.flat()):
            for line in part:
                print(line, flush=True)
                lines.append(line)
    args.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
