"""A picture and what is said of it, in one form whatever the source: captions by name, and the rest as `about`."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PICTURES = ("jpg", "jpeg", "png", "webp")  # of several in one group of a tar, the first is taken
OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl")  # counted, not read
TEXTS = ("txt", "caption")
ALT = ("caption", "captions", "text", "alt", "alt_text", "txt")  # all these, in any case, are called alt
CAPTIONS = ("caption", "captions", "text", "TEXT", "alt", "alt_text", "prompt", "short", "long")


@dataclass(slots=True)
class Sample:
    """A picture as it is stored, and what is said of it."""

    key: str
    image: bytes | None  # the encoded file; None where it could not be had
    captions: dict[str, str]  # by name
    about: dict[str, Any]  # plain JSON: url, width, ...; `amiss`: what could not be read of the words
    problem: str = ""  # why there is no image, in snake_case


class Opened(NamedTuple):
    """What one path consists of."""

    kind: str
    parts: list[Any]
    files: list[tuple[str, int | None]]  # name and bytes of each, or one digest of that: goes into the source's


@dataclass(slots=True)
class Group:
    """The files and the row that belong to one picture."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)  # by suffix
    row: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    def sample(self, wanted: list[str]) -> Sample:
        """What the files and the row say, put together."""
        image = next((self.files[suffix] for suffix in PICTURES if suffix in self.files), None)
        problem = self.problem
        if image is None and not problem:
            problem = "unsupported_format" if self.files.keys() & {*OTHER_PICTURES} else "no_image"
        fields = read_json(self.files.get("json", "{}"))
        fields = fields | self.row if isinstance(fields, dict) else self.row | {"amiss": "json_broken"}
        texts = {}
        for name in dict.fromkeys((*TEXTS, *wanted)):
            if name not in self.files or name == "json":
                continue
            try:
                text = self.files[name].decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                fields["amiss"] = "caption_not_utf8"
                continue
            same = isinstance(fields.get("caption"), str) and text == fields["caption"].strip()
            texts[name] = text if same or _several(text) != [text] else text.split("\n")
        return make_sample(self.key, image, problem, texts, fields, wanted)


def make_sample(
    key: str, image: bytes | None, problem: str, texts: dict[str, Any], fields: dict[str, Any], wanted: list[str]
) -> Sample:
    """Captions are the texts, and fields of a known name; with `wanted`, both of those names alone."""
    chosen = {
        name: value
        for name, value in fields.items()
        if isinstance(value, str | list | dict) and (name in wanted if wanted else is_caption(name))
    }
    texts = {name: text for name, text in texts.items() if not wanted or name in wanted}
    captions = _captions([*texts.items(), *chosen.items()])
    about = {clean(name): _plain(value) for name, value in fields.items() if name not in chosen}
    about = {name: value for name, value in about.items() if value is not None}
    return Sample(key, None if problem else image, captions, about, problem)


def _captions(found: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Captions by name; equal ones of a name are one, others are numbered."""
    lists: dict[str, list[str]] = {}
    for name, value in found:
        for inner, words in value.items() if isinstance(value, dict) else [(name, value)]:
            lists.setdefault(_caption_name(inner), []).extend(_several(words))
    return {
        name if number == 1 else f"{name}_{number}": text
        for name, words in lists.items()
        for number, text in enumerate(dict.fromkeys(words), 1)
    }


def is_caption(name: str) -> bool:
    """Whether a field of this name holds captions."""
    return name in CAPTIONS or name.startswith("caption_") or name.endswith("_caption")


def _caption_name(source: str) -> str:
    """What captions of a column or of files with this extension are called."""
    name = source.removesuffix(".txt").removesuffix(".caption").removeprefix("caption_").removesuffix("_caption")
    return "alt" if name.lower() in ALT else clean(name)


def _several(value: Any) -> list[str]:
    """The captions of a text, a list of texts or JSON of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        read = read_json(value)
        value = read if isinstance(read, list) and all(isinstance(text, str) for text in read) else value
    texts = value if isinstance(value, list) else [value]
    texts = [clean(text).strip() for text in texts if isinstance(text, str)]
    return [text for text in texts if text]


def read_json(text: str | bytes) -> Any:
    """What JSON says; None if it is broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _plain(value: Any) -> str | int | float | None:
    """Words, a number or a truth; None for anything else."""
    if isinstance(value, str):
        return clean(value)
    return value if isinstance(value, int | float) and abs(value) < 1 << 63 else None


def clean(text: str) -> str:
    """Without lone surrogates, which a name or an escape may bring and nothing can write."""
    return text.encode(errors="replace").decode()
