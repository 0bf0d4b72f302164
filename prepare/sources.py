"""Captioned pictures as they lie, so that nobody converts anything by hand.

`open_source` looks at what the paths name, local or through fsspec (http, s3, hf, memory), and divides it into parts:

    tars       what img2dataset wrote, and any other WebDataset                               a part a tar
    folders    name.jpg + name.txt, name.caption, name.json; metadata.jsonl, .csv, .parquet   `part_size` of them a part
    tables     .parquet, .jsonl, .csv, .tsv with a column of images or of their paths         `part_size` rows a part
    datasets:  any other data set that the library can stream                                 a part a shard of it

A part yields its samples in a fixed order. What cannot be had is a sample too, with a `problem` and without an image:
nothing ends silently, and one broken row does not stop the rest. Only a connection that breaks within a tar or a table
raises, since its rows are there, and another run has them.

Captions have names. Files `name.txt` and `name.caption` and columns such as caption, text, TEXT or alt_text are `alt`;
any other is called as its column, without caption_ or _caption. Several under one name are alt, alt_2, alt_3. What
else is said of a picture in plain numbers and words is `about` it.

Tars are read with Python's tarfile, not with the webdataset library, though they are grouped as it does. The library
passes over a tar that was cut between two members, cannot leave out a member for its size, and holds decoders that
unpickle and URLs that run commands.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, groupby, islice
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any, Protocol

PICTURES = ("jpg", "jpeg", "png", "webp")  # of several in one group of a tar, the first is taken
OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl")  # counted, not read
TEXTS = ("txt", "caption")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
TABLES = ("parquet", "jsonl", "csv", "tsv")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")
PATH_COLUMNS = ("image_path", "file_name", "path", "filepath", "file_path", "filename")
URL_COLUMNS = ("url", "URL", "image_url", "img_url")
ALT = ("caption", "captions", "text", "alt", "alt_text", "txt")  # all these, in any case, are called alt
CAPTIONS = ("caption", "captions", "text", "TEXT", "alt", "alt_text", "prompt", "short", "long")

MAX_PICTURE = 1 << 30  # bytes: what is larger is not brought into memory
MAX_TEXT = 1 << 24
BLOCK = 512  # of a tar
MAX_HEADER = 1 << 20  # of a member's name and the like, which tarfile reads as a whole
AT_ONCE = 32  # pictures asked for at a time where each is a request over the network
PAUSES = (1.0, 4.0)  # seconds before a request is tried again


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """Where captioned pictures are. Braces ({00000..00012}.tar) and globs are expanded; several paths join in order."""

    paths: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)  # columns, JSON fields or extensions; empty: those known
    image: str | None = None  # the column of images, or of their paths; None: one of those known
    part_size: int = 10_000

    def __post_init__(self):
        if self.part_size < 1:
            raise ValueError(f"source.part_size={self.part_size} must be at least 1; 10000 is usual")


@dataclass(slots=True)
class Sample:
    """A picture as it is stored, and what is said of it."""

    key: str
    image: bytes | None  # the encoded file; None where it could not be had
    captions: dict[str, str]  # by name
    about: dict[str, Any]  # plain JSON: url, width, ...; `amiss`: what could not be read of the words
    problem: str = ""  # why there is no image, in snake_case


class Readable(Protocol):
    """A part of a source, light and picklable; `name` is the part's."""

    def read(self, name: str, /) -> Iterator[Sample]: ...


@dataclass(slots=True)
class Source:
    """What `open_source` found: names of the parts, and a digest of all that they consist of."""

    names: list[str]
    digest: str
    parts: list[Readable] = field(repr=False)

    def read(self, name: str) -> Iterator[Sample]:
        """The samples of one part, always in the same order."""
        return self.parts[self.names.index(name)].read(name)


def open_source(config: SourceConfig) -> Source:
    """Find what the paths name and divide it into parts, without reading pictures.

    Of tars, folders and parquet files only names, sizes and footers are looked at; .jsonl, .csv and .tsv are read
    through once, to find where their parts begin. Raises ValueError if a path is not a source of pictures.
    """
    paths = [expanded for path in config.paths for expanded in _braces(path)]
    if not paths:
        raise ValueError("source.paths=[] names no pictures; give tars, folders or tables, such as [pictures/*.tar]")
    with ThreadPoolExecutor(AT_ONCE) as pool:  # over the network, each look is a request
        found = list(pool.map(partial(_open, config=config), paths))
    parts: list[Readable] = [part for opened in found for part in opened.parts]
    if config.image and not any(opened.columns for opened in found):
        raise ValueError(f"source.image={config.image} chooses a column, and source.paths are no tables; leave it out")
    if config.captions:
        _check_captions(config, parts)
    recipe = [[opened.kind, opened.files] for opened in found]
    recipe.append([config.captions, config.image, config.part_size])
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return Source([f"{number:05d}" for number in range(len(parts))], digest, parts)


# What the paths name


@dataclass(slots=True)
class _Opened:
    kind: str
    parts: list[Any]
    files: list[tuple[str, int | None]]  # name and bytes of all files that it is made of, or one digest of that
    columns: bool = False  # whether it has any


@dataclass(slots=True)
class _File:
    """A file of some file system, `size` in bytes if it is known."""

    system: Any
    path: str
    size: int | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def local(self) -> bool:
        return _is_local(self.system)

    def open(self, *, seekable: bool = False) -> io.BufferedReader:
        """Its bytes from the beginning; OSError once a connection broke for good."""
        return io.BufferedReader(_Bytes(self, seekable), 1 << 20)

    def content(self, most: int = MAX_PICTURE) -> tuple[bytes | None, str]:
        """All bytes, or None and why not, in snake_case."""
        if self.size is not None and self.size > most:
            return None, "too_large"
        for pause in (*PAUSES, None):
            try:
                read = _local_content if self.local else self.system.cat_file
                content = read(self.path, 0, most + 1)
                return (None, "too_large") if len(content) > most else (content, "")
            except (FileNotFoundError, NotADirectoryError):
                return None, "missing_file"
            except Exception as error:  # each file system has its own
                if self.local or isinstance(error, PermissionError):
                    return None, "unreadable"
                if pause is not None:
                    time.sleep(pause)
        return None, "unreachable"


class _Bytes(io.RawIOBase):
    """A file of any file system, read in pieces. A request that fails is made again, from where it was."""

    def __init__(self, file: _File, seekable: bool):
        self.whole, self._seekable = file, seekable
        self.file = file.system.open(file.path, "rb")
        self.tries = () if file.local else PAUSES
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = self.file.seek(offset, whence)
        return self.position

    def readinto(self, buffer: Any) -> int:
        for pause in (*self.tries, None):
            try:
                content = self.file.read(len(buffer))
                buffer[: len(content)] = content
                self.position += len(content)
                return len(content)
            except Exception as error:
                if _is_http(self.whole.system) and "range requests" in str(error):
                    self._stream()
                    return self.readinto(buffer)
                if pause is None:
                    path = self.whole.path
                    raise ConnectionError(f"{path} broke off while it was read ({error!r}); run again") from error
                time.sleep(pause)
                self.file.seek(self.position)
        raise AssertionError

    def _stream(self) -> None:
        """For servers that do not answer requests for a range: one request, from front to back."""
        if self._seekable:
            raise ValueError(
                f"source.paths={self.whole.path} lies on a server that does not answer range requests, which parquet"
                " needs; download it first"
            )
        self.file.close()
        self.file, self.tries = self.whole.system.open(self.whole.path, "rb", block_size=0), ()
        _skip(self.file, self.position)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def _open(path: str, config: SourceConfig) -> _Opened:
    """Parts and files of one path."""
    if path.startswith("datasets:"):
        return _open_dataset(path, config)
    found = _find(path)
    system, root, files = found.system, found.root, found.files
    tars = [name for name in files if name.lower().endswith(ARCHIVES)]
    pictures = [name for name in files if _suffix(name) in PICTURES + OTHER_PICTURES]
    tables = [name for name in files if _suffix(name) in TABLES]
    if tars and pictures:
        raise ValueError(
            f"source.paths={path} holds both tars ({tars[0]}) and pictures ({pictures[0]}), and may be only one of"
            f" them; name the tars by {_join(path, '*.tar')}, or the folder of the pictures"
        )
    if tars:
        parts = [_Tar(_File(system, _join(root, name), files[name]), config.captions) for name in tars]
        return _Opened("tars", parts, [(name, files[name]) for name in tars])
    if pictures:
        if strange := [name for name in tables if PurePosixPath(name).stem != "metadata"]:
            raise ValueError(
                f"source.paths={path} holds both pictures ({pictures[0]}) and a table ({strange[0]}), and may be only"
                f" one of them; name the table itself if it has their paths, or the folder of the pictures alone"
            )
        return _open_folder(path, config)
    if tables:
        return _open_tables(path, [_File(system, _join(root, name), files[name]) for name in tables], config)
    known = ", ".join((*ARCHIVES, *PICTURES, *TABLES))
    if len(files) == 1:
        raise ValueError(f"source.paths={path} is of an unsupported kind; give one of {known}, or a folder of them")
    raise ValueError(f"source.paths={path} holds no pictures; give one of {known}, or a folder of them")


@dataclass(slots=True)
class _Found:
    system: Any
    root: str  # the folder that names are relative to
    files: dict[str, int | None]  # name and bytes, sorted; none that are hidden
    whole: bool  # all that lies in the folder, and not some files of it


def _find(path: str) -> _Found:
    """The files that a path names; ValueError if there are none."""
    system, inner = _file_system(path)
    system.invalidate_cache()
    magic, why = "[*]" if _is_http(system) else "[*?[]", ""
    root, files, whole = str(system._parent(inner)), {}, False
    try:
        try:
            kind, size = _look(system, inner)
            root = inner if kind == "directory" else root
            whole = kind == "directory"
            files = _walk(system, inner) if whole else {inner: size}
        except FileNotFoundError as error:
            why = f" ({error.__cause__})" if error.__cause__ else ""
            if re.search(magic, inner):
                root = re.split(magic, inner, maxsplit=1)[0].rpartition("/")[0]
                for match in map(str, system.glob(inner)):
                    try:
                        kind, size = _look(system, match)
                    except OSError:  # a link to nowhere: its picture is missing, and counted
                        kind, size = "file", None
                    files |= _walk(system, match) if kind == "directory" else {match: size}
    except Exception as error:  # each file system has its own
        raise ValueError(f"source.paths={path} cannot be read ({error}); check your rights to it") from error
    names = {name[len(root) :].lstrip("/"): size for name, size in sorted(files.items())}
    files = {name: size for name, size in names.items() if not _is_hidden(name)}
    if not files:
        raise ValueError(f"source.paths={path} matches nothing{why}; check its spelling, or from where it is relative")
    return _Found(system, root, files, whole)


def _file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within."""
    import fsspec

    options = {}
    protocol = path.partition("://")[0] if "://" in path else ""
    try:
        if protocol in ("http", "https"):
            import aiohttp  # its usual limit of five minutes is too short for the stream of a tar

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)}
        system, inner = fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}
        package |= {"http": "aiohttp", "https": "aiohttp"}
        need = package.get(protocol, f"the fsspec package of {protocol}")
        raise ValueError(f"source.paths={path} needs {need}; pip install {need}") from error
    except ValueError as error:
        raise ValueError(f"source.paths={path} is not understood ({error}); use http, https, s3, hf or gs") from error
    return system, str(inner)


def _look(system: Any, path: str) -> tuple[str, int | None]:
    """`file` or `directory`, and its bytes."""
    if _is_local(system):
        about = os.stat(path)
        return ("directory", None) if stat.S_ISDIR(about.st_mode) else ("file", about.st_size)
    if _is_http(system) and path.endswith("/"):
        return "directory", None
    about = system.info(path)
    return about["type"], about.get("size")


def _walk(system: Any, root: str) -> dict[str, int | None]:
    """Path and size of all files below a folder."""
    if _is_local(system):
        return dict(_walk_local(root, frozenset()))
    found = system.find(root, detail=True)
    unknown = [path for path, about in found.items() if about.get("size") is None]
    sizes = dict(zip(unknown, system.sizes(unknown), strict=True)) if unknown else {}
    return {path: sizes.get(path, about.get("size")) for path, about in found.items()}


def _walk_local(folder: str, above: frozenset[str]) -> Iterator[tuple[str, int | None]]:
    """fsspec passes over links; here they are followed, except where one leads back above itself."""
    if (real := os.path.realpath(folder)) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                about = entry.stat()
            except OSError:  # a link to nowhere: its picture is missing, and counted
                yield entry.path, None
                continue
            if stat.S_ISDIR(about.st_mode) and not _is_hidden(entry.name):
                yield from _walk_local(entry.path, above | {real})
            elif stat.S_ISREG(about.st_mode):
                yield entry.path, about.st_size


def _braces(path: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(path, escape=False))
    except ValueError as error:
        raise ValueError(f"source.paths={path} has a brace without its other; write {{00000..00012}}") from error


# Tars


@dataclass(slots=True)
class _Tar:
    file: _File
    captions: list[str]

    def read(self, name: str) -> Iterator[Sample]:
        return (group.sample(self.captions) for group in self.groups())

    def groups(self) -> Iterator["_Group"]:
        """Consecutive members that are called the same up to the first dot, as one; then whether the tar was cut.

        What was being read at the cut may lack its caption and is not given.
        """
        seen = set()
        try:
            with self.file.open() as stream:
                for key, members in groupby(_members(stream, (*TEXTS, "json", *self.captions)), itemgetter(0)):
                    group = _Group(key, {}, {})
                    for _, suffix, content, problem in members:
                        group.problem = group.problem or problem
                        if suffix in group.files or key in seen:
                            group.problem = "repeated_key"
                        group.files[suffix] = content
                    seen.add(key)
                    yield group
        except _CutError as cut:
            yield _Group(_clean(self.file.name), {}, {}, str(cut))


class _CutError(Exception):
    """The archive ended, or was no archive any more, before its end."""


class _Header(tarfile.TarInfo):
    """A header that tells its archive when the two blocks of zeros were met: tarfile ends at anything."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_Header":
        try:
            return super().fromtarfile(tarfile)
        except EOF_HEADER:
            tarfile.whole = tarfile.fileobj.read(BLOCK) == bytes(BLOCK)
            raise

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in b"xgXLK" and header.size > MAX_HEADER):
            raise tarfile.ReadError("a header of unlikely size")
        return header


EOF_HEADER: type[Exception] = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]


class _Archive(tarfile.TarFile):
    whole = False

    def forget(self) -> None:
        """tarfile would keep all headers until the end."""
        self.members = []


def _members(stream: io.BufferedReader, texts: tuple[str, ...]) -> Iterator[tuple[str, str, bytes, str]]:
    """Key, suffix, content and problem of each regular member; `_CutError` if the archive is not whole.

    Contents that are not pictures or `texts` are passed over.
    """
    tar = None
    broken = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError)  # as tarfile raises
    try:
        tar = _Archive.open(fileobj=stream, mode="r|*", tarinfo=_Header, encoding="utf-8", errors="replace")
        assert isinstance(tar, _Archive)
        while (member := tar.next()) is not None:
            tar.forget()
            name = member.name.removeprefix("./")
            folder, slash, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not member.isreg() or _is_hidden(name) or not dot or re.match("__[^/]*__(/|$)", name):
                continue
            suffix, content, problem = suffix.lower(), b"", ""
            if suffix in PICTURES or suffix in texts:
                if member.size > (MAX_PICTURE if suffix in PICTURES else MAX_TEXT):
                    problem = "too_large"
                else:
                    file = tar.extractfile(member)
                    content = file.read() if file else b""
            yield _clean(folder + slash + stem), suffix, content, problem
    except broken as error:
        begun = tar is not None or getattr(stream.raw, "position", 0) < BLOCK
        raise _CutError("tar_cut" if begun else "not_a_tar") from error
    if not tar.whole:
        raise _CutError("tar_cut")


@dataclass(slots=True)
class _Group:
    """A picture and the files and the row that belong to it."""

    key: str
    files: dict[str, bytes]  # by suffix
    row: dict[str, Any]
    problem: str = ""

    def sample(self, wanted: list[str]) -> Sample:
        texts, said, amiss = self.words(wanted)
        image = next((self.files[suffix] for suffix in PICTURES if suffix in self.files), None)
        problem = self.problem
        if image is None and not problem:
            problem = "unsupported_format" if any(suffix in self.files for suffix in OTHER_PICTURES) else "no_image"
        return _sample(self.key, image, problem, texts, said | amiss, wanted)

    def words(self, wanted: list[str]) -> tuple[list[tuple[str, list[str]]], dict[str, Any], dict[str, str]]:
        """Texts by suffix, fields of the JSON and of the row, and what was amiss with them."""
        said, amiss = {}, {}
        if "json" in self.files:
            said = _json(self.files["json"])
            if not isinstance(said, dict):
                said, amiss = {}, {"amiss": "json_broken"}
        texts = []
        for suffix in dict.fromkeys((*TEXTS, *wanted)):
            if suffix not in self.files or suffix == "json":
                continue
            try:
                text = self.files[suffix].decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                amiss = {"amiss": "caption_not_utf8"}
                continue
            same = isinstance(said.get("caption"), str) and text == said["caption"].strip()
            texts.append((suffix, [text] if same else _lines(text)))
        return texts, said | self.row, amiss


# Folders of pictures


@dataclass(slots=True)
class _Folder:
    """`count` pictures of a folder from `first` on. The list of files is not carried along: it is made again."""

    path: str
    listing: str  # digest of the list
    first: int
    count: int
    captions: list[str]

    def read(self, name: str) -> Iterator[Sample]:
        return (group.sample(self.captions) for group in self.groups())

    def groups(self) -> Iterator["_Group"]:
        album = _album(self.path, self.listing, tuple(self.captions))
        items = album.items[self.first : self.first + self.count]
        return _together(partial(album.group, captions=self.captions), items, album.system)


@dataclass(slots=True)
class _Album:
    """Pictures of a folder, sorted, with the rows of its metadata tables and the lines that are broken there."""

    system: Any
    root: str
    files: dict[str, int | None]
    rows: dict[str, dict[str, Any]]
    items: list[str]
    stems: Counter[str]

    def group(self, name: str, captions: list[str]) -> _Group:
        """The picture `name`, read, with all that belongs to it."""
        stem = name.rpartition(".")[0]
        suffix = _suffix(name)
        key = _clean(stem if self.stems[stem] == 1 else name)
        row = self.rows.get(name, {})
        if suffix not in PICTURES + OTHER_PICTURES:
            return _Group(_clean(name), {}, row, "unsupported_format" if name in self.files else "row_broken")
        if name not in self.files:
            return _Group(key, {}, row, "missing_file")
        files, problem = {}, ""
        for wanted in (suffix, *dict.fromkeys((*TEXTS, "json", *captions))):
            beside = f"{stem}.{wanted}" if wanted != suffix else name
            if beside not in self.files or (wanted in OTHER_PICTURES):
                continue
            most = MAX_PICTURE if beside == name else MAX_TEXT
            content, trouble = _File(self.system, _join(self.root, beside), self.files[beside]).content(most)
            problem = problem or trouble
            if content is not None:
                files[wanted] = content
        if suffix in OTHER_PICTURES:
            problem = "unsupported_format"
        return _Group(key, files, row, problem)


def _open_folder(path: str, config: SourceConfig) -> _Opened:
    album = _scan(path, config.captions)
    listing = _listing(album)
    firsts = range(0, len(album.items), config.part_size)
    parts = [
        _Folder(path, listing, first, min(config.part_size, len(album.items) - first), config.captions)
        for first in firsts
    ]
    return _Opened("folder", parts, [(listing, None)])


@lru_cache(maxsize=4)
def _album(path: str, listing: str, captions: tuple[str, ...]) -> _Album:
    """The folder as it was when it was opened; ValueError if it is so no more."""
    album = _scan(path, list(captions))
    if _listing(album) != listing:
        raise ValueError(
            f"source.paths={path} has changed since it was opened; let it be while it is read and run again"
        )
    return album


def _scan(path: str, captions: list[str]) -> _Album:
    """All pictures that a folder, a glob or a single path names, and the files that belong to them."""
    found = _find(path)
    system, root, beside = found.system, found.root, dict(found.files)
    if not found.whole:  # a glob of pictures leaves out what lies beside them
        for folder in {_join(root, name).rpartition("/")[0] for name in found.files}:
            for about in system.ls(folder, detail=True):
                if about["type"] != "directory":
                    beside.setdefault(about["name"][len(root) :].lstrip("/"), about.get("size"))
    tables = sorted(filter(_is_metadata, beside))
    rows: dict[str, dict[str, Any]] = {}
    for table in tables:
        rows |= _metadata(_File(system, _join(root, table), beside[table]), table)
    pictures = {name for name in found.files if _suffix(name) in PICTURES + OTHER_PICTURES}
    if found.whole:  # of a glob, the other rows are not asked for
        pictures |= rows.keys()
    stems = Counter(name.rpartition(".")[0] for name in pictures)
    words = {f"{stem}.{suffix}" for stem in stems for suffix in (*TEXTS, "json", *captions)}
    files = {name: beside[name] for name in sorted(beside.keys() & {*pictures, *words, *tables})}
    return _Album(system, root, files, rows, sorted(pictures), stems)


def _metadata(file: _File, table: str) -> dict[str, dict[str, Any]]:
    """Rows of an imagefolder's table by the name of their file; what is no such row, by its number in the table."""
    folder = str(PurePosixPath(table).parent)
    rows = {}
    for number, row in enumerate(_all_rows(file), 1):
        name = (row or {}).pop("file_name", None)
        rows[os.path.normpath(os.path.join(folder, name)) if isinstance(name, str) else f"{table}:{number}"] = row or {}
    return rows


def _is_metadata(name: str) -> bool:
    return PurePosixPath(name).stem == "metadata" and _suffix(name) in TABLES


def _listing(album: _Album) -> str:
    listed = [list(album.files.items()), album.items]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


# Tables


@dataclass(slots=True)
class _Columns:
    image: str
    captions: list[str]
    about: list[str]


@dataclass(slots=True)
class _Table:
    """`count` rows of a table from `first` on; for text, `offset` is where their bytes begin."""

    file: _File
    columns: _Columns
    first: int
    count: int
    offset: int = 0
    header: list[str] = field(default_factory=list)

    def read(self, name: str) -> Iterator[Sample]:
        rows = enumerate(self.rows())
        return _together(lambda row: self.sample(f"{name}{row[0]:04d}", row[1]), rows, self.file.system)

    def rows(self) -> Iterator[dict[str, Any] | None]:
        if _suffix(self.file.path) == "parquet":
            columns = [self.columns.image, *self.columns.captions, *self.columns.about]
            return _parquet_rows(self.file, columns, self.first, self.first + self.count)
        return islice(_text_rows(self.file, self.header, self.offset), self.count)

    def sample(self, key: str, row: dict[str, Any] | None) -> Sample:
        if row is None:
            return Sample(key, None, {}, {}, "row_broken")
        return _from_row(key, row, self.columns, self.beside)

    def beside(self, path: str) -> tuple[bytes | None, str]:
        """The picture at a path relative to the table. A table of somewhere else may not name what lies elsewhere."""
        folder = self.file.path.rpartition("/")[0]
        if "://" in path or (not self.file.local and (path.startswith("/") or ".." in path.split("/"))):
            return None, "outside"
        return _File(self.file.system, os.path.join(folder, path)).content()


def _open_tables(path: str, files: list[_File], config: SourceConfig) -> _Opened:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = list(pool.map(partial(_table_parts, path, config=config), files))
    if not any(parts):
        raise ValueError(f"source.paths={path} is a table without rows; check what wrote it")
    joined = [part for some in parts for part in some]
    return _Opened("tables", joined, [(_clean(file.name), file.size) for file in files], columns=True)


def _table_parts(path: str, file: _File, *, config: SourceConfig) -> list[_Table]:
    if _suffix(file.path) == "parquet":
        return _parquet_parts(path, file, config)
    header: list[str] = []
    offset = 0
    if _suffix(file.path) != "jsonl":
        offset, header = next(_records(file, fields=True), (0, []))
        header = [name.removeprefix("\ufeff") for name in header]
    offsets, total = [offset], 0
    for end, _ in _records(file, offset, fields=bool(header)):
        total += 1
        if total % config.part_size == 0:
            offsets.append(offset + end)
    if not total:
        return []
    some = [row for row in islice(_text_rows(file, header, offset), 100) if row]
    kinds = dict.fromkeys(header, "text") or {name: _kind(value) for row in some for name, value in row.items()}
    columns = _columns(path, kinds, some, config)
    return [
        _Table(file, columns, first, min(config.part_size, total - first), offset, header)
        for first, offset in zip(range(0, total, config.part_size), offsets, strict=False)
    ]


def _columns(path: str, kinds: dict[str, str], some: list[dict[str, Any]], config: SourceConfig) -> _Columns:
    """Which columns to take; ValueError, naming those there are, if that is not to be seen."""
    there = ", ".join(kinds) or "none"
    for key, names in (("image", [config.image] if config.image else []), ("captions", config.captions)):
        for name in names:
            if name not in kinds:
                raise ValueError(f"source.{key}={name} is no column of {path}; choose from those there are: {there}")
    image = config.image or next(iter(_image_columns(kinds)), None)
    urls = [name for name in kinds if name in URL_COLUMNS]
    if image and any(str(row.get(image)).startswith(("http://", "https://")) for row in some):
        urls, image = [image], None
    if image is None and urls:
        raise ValueError(
            f"source.paths={path} has pictures by address alone, in the column {urls[0]}, and sources are not"
            " downloaded; use pipeline=web, whose steps download them first"
        )
    if image is None:
        raise ValueError(
            f"source.paths={path} has no column of images or of their paths that is known by its name; give"
            f" source.image= one of those there are: {there}"
        )
    recognised = [name for name, kind in kinds.items() if _is_caption(name) and kind in ("text", "texts")]
    captions = config.captions or [name for name in recognised if name != image]
    about = [name for name, kind in kinds.items() if kind in ("text", "scalar") and name not in (image, *captions)]
    return _Columns(image, captions, about)


def _image_columns(kinds: dict[str, str]) -> Iterable[str]:
    """Columns that may hold the picture, the likeliest first."""
    pictures = [name for name, kind in kinds.items() if kind == "picture"]
    yield from (name for name in IMAGE_COLUMNS if name in pictures)
    yield from pictures if len(pictures) == 1 else ()
    yield from (name for name in PATH_COLUMNS + IMAGE_COLUMNS if kinds.get(name) == "text")


def _kind(value: Any) -> str:
    if isinstance(value, bytes) or (isinstance(value, dict) and value.keys() <= {"bytes", "path"}):
        return "picture"
    if isinstance(value, list | dict):
        return "texts"
    return "text" if isinstance(value, str) else "scalar"


def _parquet_parts(path: str, file: _File, config: SourceConfig) -> list[_Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open(seekable=True) as stream:
            table = pq.ParquetFile(stream)
            total, kinds = (
                table.metadata.num_rows,
                {column.name: _arrow_kind(column.type) for column in table.schema_arrow},
            )
            texts = [name for name in _image_columns(kinds) if kinds[name] == "text"]
            texts += [config.image] if config.image and kinds.get(config.image) == "text" else []
            some = [row for row in islice(_rows_of(table, texts, 0, min(total, 100)), 100) if row] if texts else []
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"source.paths={path} holds {file.name}, which is no parquet file; check its writer"
        ) from error
    if not total:
        return []
    columns = _columns(path, kinds, some, config)
    return [
        _Table(file, columns, first, min(config.part_size, total - first))
        for first in range(0, total, config.part_size)
    ]


def _arrow_kind(kind: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _arrow_kind(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "picture"
    if types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        texts = all(_arrow_kind(kind.field(i).type) in ("text", "texts") for i in range(kind.num_fields))
        return "picture" if names == {"bytes", "path"} else "texts" if texts else "other"
    if types.is_list(kind) or types.is_large_list(kind):
        return "texts" if _arrow_kind(kind.value_type) == "text" else "other"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return "scalar" if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) else "other"


def _parquet_rows(file: _File, columns: list[str], first: int, last: int) -> Iterator[dict[str, Any] | None]:
    import pyarrow.parquet as pq

    with file.open(seekable=True) as stream:
        yield from _rows_of(pq.ParquetFile(stream, buffer_size=1 << 20), columns, first, last)


def _rows_of(table: Any, columns: list[str] | None, first: int, last: int) -> Iterator[dict[str, Any] | None]:
    """Rows first to last; None for those that are broken."""
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    begins = [0, *accumulate(sizes)]
    for group in range(max(bisect(begins, first) - 1, 0), len(sizes)):
        if begins[group] >= last:
            return
        rows = _group_rows(table, group, sizes[group], columns)
        yield from islice(rows, max(first - begins[group], 0), last - begins[group])


def _group_rows(table: Any, group: int, count: int, columns: list[str] | None) -> Iterator[dict[str, Any] | None]:
    """Rows of a row group in small batches; where its bytes are broken, the rest of it is None."""
    import pyarrow as pa

    done = 0
    try:
        for batch in table.iter_batches(batch_size=AT_ONCE, row_groups=[group], columns=columns):
            for index in range(batch.num_rows):
                done += 1
                try:
                    row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                except ValueError:  # such as words that are not UTF-8
                    row = None
                yield row
    except (pa.ArrowInvalid, OSError) as error:
        if type(error) not in (pa.ArrowInvalid, OSError) or getattr(error, "errno", None):
            raise  # the connection or the disk, not the file
    yield from [None] * (count - done)


def _records(file: _File, offset: int = 0, *, fields: bool) -> Iterator[tuple[int, Any]]:
    """Each record of a table of text, and where it ends, counted from `offset`: a line, or the fields of one."""
    with file.open() as stream:
        _skip(stream, offset)
        lines = _Lines(stream)
        if fields:
            yield from _csv_records(lines, "\t" if _suffix(file.path) == "tsv" else ",")
        else:
            yield from ((lines.end, line) for line in lines if line.strip())


class _Lines:
    """Lines of a file, and where the last one given ended."""

    def __init__(self, stream: io.BufferedReader):
        self.stream, self.end = stream, 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self.stream:
            self.end += len(line)
            yield line


def _csv_records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    reader = csv.reader((line.decode(errors="surrogateescape") for line in lines), delimiter=delimiter)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield lines.end, None
            continue
        if fields:
            yield lines.end, fields


def _skip(stream: Any, count: int) -> None:
    while count > 0 and (passed := len(stream.read(min(count, 1 << 20)))):
        count -= passed


def _text_rows(file: _File, header: list[str], offset: int) -> Iterator[dict[str, Any] | None]:
    """Rows from a byte on, up to the end; None for those that are broken."""
    for _, record in _records(file, offset, fields=bool(header)):
        if not header:
            row = _json(record)
            yield row if isinstance(row, dict) else None
        elif record is None or len(record) != len(header) or "".join(record) != _clean("".join(record)):
            yield None  # torn, of another length, or not UTF-8
        else:
            yield {name: _number(text) for name, text in zip(header, record, strict=True)}


def _all_rows(file: _File) -> Iterator[dict[str, Any] | None]:
    """All rows of a table with all their columns that are words or numbers."""
    if _suffix(file.path) == "parquet":
        import pyarrow.parquet as pq

        with file.open(seekable=True) as stream:
            table = pq.ParquetFile(stream)
            kinds = {column.name: _arrow_kind(column.type) for column in table.schema_arrow}
            names = [name for name, kind in kinds.items() if kind not in ("picture", "other")]
            yield from _rows_of(table, names, 0, table.metadata.num_rows)
    else:
        offset, header = 0, []
        if _suffix(file.path) != "jsonl":
            offset, header = next(_records(file, fields=True), (0, []))
        yield from _text_rows(file, [name.removeprefix("\ufeff") for name in header], offset)


# The library `datasets`


@dataclass(slots=True)
class _Shard:
    """Shard `index` of `of` of a data set that the library `datasets` streams."""

    path: str
    split: str
    index: int
    of: int
    columns: _Columns

    def read(self, name: str) -> Iterator[Sample]:
        shard = _dataset(self.path, self.split).shard(self.of, self.index)
        for row, values in enumerate(shard):
            yield _from_row(f"{name}{row:04d}", values, self.columns, _anywhere)


def _anywhere(path: str) -> tuple[bytes | None, str]:
    return _File(*_file_system(path)).content()  # as the library found it


def _open_dataset(path: str, config: SourceConfig) -> _Opened:
    name, _, split = path.removeprefix("datasets:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"source.paths={path} needs the library datasets; pip install datasets") from error
    try:
        builder = datasets.load_dataset_builder(name)
        splits = [str(known) for known in builder.config.data_files or ()]
        split = split or ("train" if "train" in splits or not splits else splits[0])
        data = _dataset(name, split)
        some = [dict(row) for row in data.take(1)]
    except Exception as error:  # as many kinds as there are ways to lack a data set
        raise ValueError(
            f"source.paths={path} cannot be opened with the library datasets"
            f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); check its name and split"
        ) from error
    if not some:
        raise ValueError(f"source.paths={path} is a data set without rows; choose another split")
    kinds = {column: _kind(value) for column, value in some[0].items()}
    columns = _columns(path, kinds, some, config)
    of = data.num_shards
    files = [_data_file(url) for url in (builder.config.data_files or {}).get(split, [])]
    return _Opened(
        f"datasets:{split}", [_Shard(name, split, index, of, columns) for index in range(of)], files, columns=True
    )


def _data_file(url: str) -> tuple[str, int | None]:
    """On the Hub the revision is in the name; of a file here, the size tells."""
    return (PurePosixPath(url).name, os.path.getsize(url)) if os.path.exists(url) else (url, None)


@lru_cache(maxsize=4)
def _dataset(path: str, split: str) -> Any:
    """The streamed data set, with pictures as they are stored."""
    import datasets

    data = datasets.load_dataset(path, split=split, streaming=True)
    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


# Words


def _from_row(
    key: str, row: dict[str, Any], columns: _Columns, beside: Callable[[str], tuple[bytes | None, str]]
) -> Sample:
    value, problem = row.get(columns.image), ""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        value, problem = beside(value)
    image = value if isinstance(value, bytes) and value else None
    if image is not None and len(image) > MAX_PICTURE:
        image, problem = None, "too_large"
    if image is None:
        problem = problem or "no_image"
    said = {name: row.get(name) for name in (*columns.captions, *columns.about)}
    return _sample(key, image, problem, [], said, columns.captions)


def _sample(
    key: str,
    image: bytes | None,
    problem: str,
    texts: list[tuple[str, list[str]]],
    said: dict[str, Any],
    wanted: list[str],
) -> Sample:
    """The captions among texts and fields under their names, the other fields as `about`."""
    fields = {
        name: value
        for name, value in said.items()
        if isinstance(value, str | list | dict) and (name in wanted if wanted else _is_caption(name))
    }
    texts = [text for text in texts if not wanted or text[0] in wanted]
    captions = _captions([*texts, *fields.items()])
    about = {_clean(name): _plain(value) for name, value in said.items() if name not in fields and _is_plain(value)}
    if str(said.get("status", "")).startswith("failed"):  # img2dataset's word for what it could not download
        status = said["status"]
        problem = status if status in ("failed_to_download", "failed_to_resize") else "failed"
    return Sample(key, None if problem else image, captions, about, problem)


def _captions(found: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Captions by name; equal ones of a name are one, others are numbered."""
    lists: dict[str, list[str]] = {}
    for name, value in found:
        named = value.items() if isinstance(value, dict) else [(name, value)]
        for inner, words in named:
            lists.setdefault(_name(inner), []).extend(_several(words))
    captions: dict[str, str] = {}
    for name, words in lists.items():
        for number, text in enumerate(dict.fromkeys(words), 1):
            captions[name if number == 1 else f"{name}_{number}"] = text
    return captions


def _name(source: str) -> str:
    """What captions of a column or of files with this extension are called."""
    name = source.removesuffix(".txt").removesuffix(".caption").removeprefix("caption_").removesuffix("_caption")
    return "alt" if name.lower() in ALT else _clean(name)


def _is_caption(name: str) -> bool:
    return name in CAPTIONS or name.startswith("caption_") or name.endswith("_caption")


def _several(value: Any) -> list[str]:
    """The captions of a text, a list of texts or JSON of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        read = _json(value)
        value = read if isinstance(read, list) and all(isinstance(text, str) for text in read) else value
    texts = value if isinstance(value, list) else [value]
    texts = [_clean(text).strip() for text in texts if isinstance(text, str)]
    return [text for text in texts if text]


def _lines(text: str) -> list[str]:
    return re.split(r"\r?\n|\r", text) if _several(text) == [text] else _several(text)


def _json(text: str | bytes) -> Any:
    """What JSON says; None if it is broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> str | int | float:
    """A number of a table of text as such, if it is written as numbers are."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,17}\.\d{1,17}(e[+-]?\d\d?)?", text) else text


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | bool) or (isinstance(value, int) and abs(value) < 1 << 63)


def _plain(value: Any) -> Any:
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    """Without lone surrogates, which a name or an escape may bring and nothing can write."""
    return text.encode(errors="replace").decode()


# Small things


def _check_captions(config: SourceConfig, parts: list[Readable]) -> None:
    """ValueError if the first samples of tars or folders have nothing of what `source.captions` names."""
    seen: dict[str, None] = {}
    groups = (group for part in parts if isinstance(part, _Tar | _Folder) for group in part.groups())
    for group in islice(groups, 100):
        texts, said, _ = group.words(config.captions)
        seen |= dict.fromkeys(name for name, _ in texts)
        seen |= dict.fromkeys(name for name, value in said.items() if isinstance(value, str | list | dict))
        if any(name in seen for name in config.captions):
            return
    if any(isinstance(part, _Tar | _Folder) for part in parts):
        raise ValueError(
            f"source.captions={config.captions} names nothing that the first pictures have; choose from those there"
            f" are: {', '.join(seen) or 'none'}"
        )


def _together(read: Callable[[Any], Any], items: Iterable[Any], system: Any) -> Iterator[Any]:
    """`read` of each item, in order; several at a time where each waits for the network."""
    if _is_local(system):
        yield from map(read, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while batch := list(islice(items, AT_ONCE)):
            yield from pool.map(read, batch)


def _local_content(path: str, start: int, end: int) -> bytes:
    """Of regular files alone: a pipe would never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        return file.read(end - start)


def _is_local(system: Any) -> bool:
    return type(system).__name__ == "LocalFileSystem"


def _is_http(system: Any) -> bool:
    return "http" in system.protocol


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if name else folder


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _is_hidden(name: str) -> bool:
    return any(piece.startswith(".") or piece == "__MACOSX" for piece in name.split("/"))
