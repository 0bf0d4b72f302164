"""Folders that are either whole or not there: written aside, hashed, synced, and renamed into place.

`manifest.json` is written last and names every file with its size and SHA-256. A folder without one, or one that
disagrees with it, is not read.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write(aside)` fill a folder, then make it appear as `folder` in one step. Never overwrites."""
    if folder.exists():
        raise ValueError(f"{folder} exists already and is never overwritten; move it away or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        aside.mkdir()
        write(aside)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*files, aside / MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside):
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
    for name, known in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"] or sha256(path) != known["sha256"]:
            return f"{name} does not match its hash"
    return None


def newest(parent: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The whole folder with the highest number for a name; broken ones are named and passed over."""
    numbered = (path for path in parent.glob("[0-9]*") if path.is_dir() and path.name.isdigit())
    for folder in sorted(numbered, key=lambda path: int(path.name), reverse=True):
        reason = fault(folder)
        if reason is None:
            return folder
        warn(f"{folder} is passed over: {reason}")
    return None


def clean(parent: Path) -> None:
    """Remove what writers that were killed left behind."""
    for path in parent.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


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
