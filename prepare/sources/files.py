"""Files wherever fsspec finds them: what a path names, and their bytes."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

MAX_BYTES = 1 << 30  # a file that is larger is not brought into memory
AT_ONCE = 32  # requests over the network
PAUSES = (1.0, 4.0)  # seconds before a request is made again


@dataclass(slots=True)
class File:
    """A file of some file system, `size` in bytes if it is known."""

    system: Any
    path: str
    size: int | None = None

    @property
    def name(self) -> str:
        path = self.path.partition("?")[0] if is_http(self.system) else self.path
        return path.rpartition("/")[2]

    def open(self, *, seekable: bool = False) -> BinaryIO:
        """Its bytes; without `seekable` from front to back alone, for which any server will do."""
        options = {"block_size": 0} if is_http(self.system) and not seekable else {}
        return self.system.open(self.path, "rb", **options)

    def content(self) -> tuple[bytes | None, str]:
        """All bytes, or None and why not, in snake_case."""
        if self.size is not None and self.size > MAX_BYTES:
            return None, "too_large"
        for pause in (*PAUSES, None):
            try:
                content = self.system.cat_file(self.path, 0, MAX_BYTES + 1)
                return (None, "too_large") if len(content) > MAX_BYTES else (content, "")
            except (FileNotFoundError, NotADirectoryError):
                return None, "missing_file"
            except Exception as error:  # each file system has its own
                if is_local(self.system) or isinstance(error, PermissionError):
                    return None, "unreadable"
                if pause is not None:
                    time.sleep(pause)
        return None, "unreachable"


@dataclass(slots=True)
class Found:
    """The files that a path names."""

    system: Any
    root: str  # the folder that names are relative to
    files: dict[str, int | None]  # name and bytes, sorted; none that are hidden
    whole: bool  # all that lies in the folder, and not some files of it

    def file(self, name: str) -> File:
        return File(self.system, join(self.root, name), self.files.get(name))


def find(path: str) -> Found:
    """The files that a path names: one, those of a folder, or those that a glob meets; ValueError if there are none."""
    system, inner = file_system(path)
    system.invalidate_cache()
    root, whole, why, files = str(system._parent(inner)), False, "", {}
    try:
        if (magic := re.search("[*]" if is_http(system) else "[*?[]", inner)) and not system.exists(inner):
            root = inner[: magic.start()].rpartition("/")[0]
            for match in map(str, system.glob(inner)):
                files |= _walk(system, match)
        else:
            files = _walk(system, inner)
            whole = inner not in files
            root = inner if whole else root
    except FileNotFoundError as error:
        why, files = f" ({error.__cause__})" if error.__cause__ else "", {}
    except Exception as error:  # each file system has its own
        raise ValueError(f"source.paths={path} cannot be read ({error}); check your rights to it") from error
    names = {name[len(root) :].lstrip("/"): size for name, size in sorted(files.items())}
    files = {name: size for name, size in names.items() if not is_hidden(name)}
    if not files:
        raise ValueError(
            f"source.paths={path} matches no file{why}; check the path, from where it is relative, and quote * and"
            " braces in a shell"
        )
    return Found(system, root, files, whole)


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within."""
    import fsspec

    options = {}
    try:
        if path.startswith(("http://", "https://")):
            import aiohttp  # its usual limit of five minutes is too short for the stream of a tar

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)}
        system, inner = fsspec.core.url_to_fs(path, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"source.paths={path} cannot be opened: {short(error)}; use https, s3, hf, gs or a local path"
        ) from error
    return system, str(inner)


def _walk(system: Any, path: str) -> dict[str, int | None]:
    """A file, or all files below a folder, and their bytes."""
    if is_local(system):
        return dict(_walk_local(path)) if os.path.isdir(path) else {path: _local_size(path)}
    if not (is_http(system) and path.endswith("/")) and (about := system.info(path))["type"] != "directory":
        return {path: about.get("size")}
    found = system.find(path, detail=True)
    unknown = [path for path, about in found.items() if about.get("size") is None]
    sizes = dict(zip(unknown, system.sizes(unknown), strict=True)) if unknown else {}
    return {path: sizes.get(path, about.get("size")) for path, about in found.items()}


def _walk_local(folder: str, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, int | None]]:
    """fsspec passes over links; here they are followed, except where one leads back above itself."""
    above |= {os.path.realpath(folder)}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            yield path, _local_size(path)
        elif not is_hidden(name) and os.path.realpath(path) not in above:
            yield from _walk_local(path, above)


def _local_size(path: str) -> int | None:
    os.lstat(path)  # FileNotFoundError if nothing is there
    return os.stat(path).st_size if os.path.exists(path) else None  # a link to nowhere: missing, and counted


def braces(path: str) -> list[str]:
    """All that `{000..127}` and `{a,b}` stand for, as in a shell."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", path)
    if not found:
        return [path]
    first, last, listed = found.groups()
    options = listed.split(",") if listed else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [done for option in options for done in braces(path[: found.start()] + option + path[found.end() :])]


def together(read: Callable[[Any], Any], items: Iterable[Any], system: Any) -> Iterator[Any]:
    """`read` of each item, in order; several at a time where each waits for the network."""
    if is_local(system):
        yield from map(read, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while batch := list(islice(items, AT_ONCE)):
            yield from pool.map(read, batch)


def is_local(system: Any) -> bool:
    return type(system).__name__ == "LocalFileSystem"


def is_http(system: Any) -> bool:
    return "http" in system.protocol


def is_hidden(name: str) -> bool:
    return any(piece.startswith(".") or piece == "__MACOSX" for piece in name.split("/"))


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if name else folder


def suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def short(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
