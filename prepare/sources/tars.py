"""What img2dataset wrote, and any other WebDataset: a part a tar.

Read with Python's tarfile, not with the webdataset library, though grouped as it does. The library passes over a tar
that was cut between two members, cannot leave out a member for its size, and holds decoders that unpickle and URLs
that run commands.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from prepare.sources.files import MAX_BYTES, File, Found, is_hidden
from prepare.sources.sample import PICTURES, TEXTS, Group, Opened, Sample, clean

BLOCK = 512  # of a tar
BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError)  # as tarfile raises


@dataclass(slots=True)
class Tar:
    """One tar; of its members are read pictures, .json, and texts, those with the extensions `captions` included."""

    file: File
    captions: list[str]

    def read(self, name: str) -> Iterator[Sample]:
        """Consecutive members that are called the same up to the first dot, as one; then whether the tar was cut.

        What was being read at the cut may lack its caption and is not given. A key that comes again is a problem:
        whose the caption is cannot be told.
        """
        group, seen = None, set()
        try:
            with self.file.open() as stream:
                for key, suffix, content, problem in self._members(stream):
                    if group is None or key != group.key or suffix in group.files:
                        if group:
                            yield group.sample(self.captions)
                        group = Group(key, problem="repeated_key" if key in seen else "")
                        seen.add(key)
                    group.files[suffix] = content
                    group.problem = group.problem or problem
                if group:
                    yield group.sample(self.captions)
        except _CutError as cut:
            yield Sample(clean(self.file.name), None, {}, {}, str(cut))

    def _members(self, stream: BinaryIO) -> Iterator[tuple[str, str, bytes, str]]:
        """Key, suffix, content and problem of each regular member; `_CutError` if the archive is not whole."""
        tar = None
        try:
            tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header, errors="replace")  # noqa: SIM115
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it would keep all headers)
                name = member.name.removeprefix("./")
                folder, slash, base = name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if member.isreg() and dot and not is_hidden(name) and not re.match("__[^/]*__(/|$)", name):
                    yield clean(folder + slash + stem), suffix.lower(), *self._content(tar, member, suffix.lower())
        except BROKEN as error:
            short = self.file.size is not None and self.file.size < BLOCK
            raise _CutError("tar_cut" if tar or short else "not_a_tar") from error
        if not getattr(tar, "whole", False):
            raise _CutError("tar_cut")

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> tuple[bytes, str]:
        if suffix not in (*PICTURES, *TEXTS, "json", *self.captions):
            return b"", ""
        if member.size > MAX_BYTES:
            return b"", "too_large"
        file = tar.extractfile(member)
        return file.read() if file else b"", ""


class _CutError(Exception):
    """The archive ended, or was no archive any more, before its end."""


class _Header(tarfile.TarInfo):
    """Tells its archive when the two blocks of zeros were met: tarfile ends at anything."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_Header":
        try:
            return super().fromtarfile(tarfile)
        except END:
            tarfile.whole = tarfile.fileobj.read(BLOCK) == bytes(BLOCK)
            raise


END: type[Exception] = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]


def open_tars(found: Found, names: list[str], captions: list[str]) -> Opened:
    """Those of the files that are tars."""
    return Opened("tars", [Tar(found.file(name), captions) for name in names], [(n, found.files[n]) for n in names])
