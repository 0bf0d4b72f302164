"""Folders that are either whole or not there: written aside, hashed, synced, and renamed into place.

`manifest.json` is written last and names every file with its size and SHA-256. A folder without one, or one that
disagrees with it, is not read. `hold` keeps a folder for one writer at a time.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

MANIFEST, LOCK = "manifest.json", "lock"
HASHES = 4  # files that are hashed at once; hashlib lets go of the interpreter meanwhile
CHUNK = 1 << 24  # bytes written and hashed at once
DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def publish(folder: Path, write: Callable[[Path], Mapping[str, str] | None]) -> None:
    """Let `write(aside)` fill a folder, then make it appear as `folder` in one step. Never overwrites.

    `write` may return the SHA-256 of files, by their path within the folder, that it knows from writing them.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already and is never overwritten; move it away or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        aside.mkdir()
        known = write(aside) or {}
        files = {path.relative_to(aside).as_posix(): path for path in sorted(aside.rglob("*")) if path.is_file()}
        manifest = {
            name: {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256(path)}
            for name, path in files.items()
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*files.values(), aside / MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside):
            _sync(path)
        aside.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def fault(folder: Path) -> str | None:
    """Why the folder must not be read, or None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or broken"
    with ThreadPoolExecutor(HASHES) as pool:
        return next(filter(None, pool.map(lambda name: _fault_of(folder / name, name, manifest[name]), manifest)), None)


def _fault_of(path: Path, name: str, known: Mapping[str, str | int]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != known["bytes"] or sha256(path) != known["sha256"]:
        return f"{name} does not match its hash"
    return None


def numbered(parent: Path) -> list[Path]:
    """The folders that have a number for a name, the highest first."""
    found = (path for path in parent.glob("[0-9]*") if path.is_dir() and path.name.isdigit())
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def newest(parent: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The whole folder with the highest number for a name; broken ones are named and passed over."""
    for folder in numbered(parent):
        reason = fault(folder)
        if reason is None:
            return folder
        warn(f"{folder} is passed over: {reason}")
    return None


def discard(folder: Path) -> None:
    """Remove a folder so that nobody ever sees half of it."""
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean(parent: Path) -> None:
    """Remove what killed writers left behind: folders of `publish`, and files of safetensors (`.tmpXXXXXX`)."""
    for path in (*parent.glob(".*.tmp"), *parent.glob(".tmp*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def hold(folder: Path, warn: Callable[[str], None] = print) -> Iterator[None]:
    """Keep `folder` for this process; ValueError names host and process that have it already.

    A POSIX record lock on `folder`/lock: the kernel lets go of it with the process, however that ends, worker
    processes do not inherit it (as they would flock's), and NFS and Lustre pass it on to other nodes where their lock
    service runs. Where a file system has no locks, that is said and nothing is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another process'}; wait for it or stop it,"
                " or give another name=... for a run of its own"
            ) from error
        except OSError as error:
            warn(f"{folder} cannot be locked against a second job ({error.strerror}): start only one")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its SHA-256, hashed on the way; one pass, no copy of what is on the CPU.

    For tensors of one dtype the same bytes as `safetensors.torch.save_file`'s, but with the permissions that the umask
    grants. The layout is https://huggingface.co/docs/safetensors: length of the header, header in JSON, tensors.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # aligned, whatever the sizes
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}  # pyright: ignore[reportArgumentType]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        _put(file.fileno(), digest, memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            _put(file.fileno(), digest, flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put(descriptor: int, digest, data: memoryview) -> None:
    while data:
        written = os.write(descriptor, data[:CHUNK])
        digest.update(data[:written])
        data = data[written:]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
