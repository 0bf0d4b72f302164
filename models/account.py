"""What became of every tensor when one model was made into another."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from models.weights import first_names

KINDS = (
    "copied",
    "folded",  # several numbers of the source in one
    "interpolated",  # kernels of another patch size
    "redrawn",  # at random, with the norms of the source's rows
    "duplicated",  # a second time
    "widened",  # channels in copies that share their weight
    "padded",  # with rows of zeros
    "zeroed",
    "identity",
    "initialised",  # as the target was
    "dropped",
)


@dataclass(slots=True)
class Piece:
    """The value that a tensor of the target is to take, and the source's tensors it is made of."""

    kind: str
    value: Tensor
    source: list[str]


@dataclass(slots=True)
class Entry:
    """What became of one tensor. A dropped one belongs to the source, all others to the target."""

    name: str
    kind: str
    parameters: int
    source: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Account:
    """Every tensor of the target and every unused one of the source, and what else the user should know."""

    title: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def names(self, kind: str) -> list[str]:
        """Tensors of one kind."""
        return [entry.name for entry in self.entries if entry.kind == kind]

    def summary(self) -> list[str]:
        """One line a kind, with counts and what it comprises, and the notes."""
        lines = [self.title]
        owners = {(part, entry.kind) for entry in self.entries for part in _parts(entry.name)}
        shared = {part for part, kind in owners if any((part, other) in owners for other in KINDS if other != kind)}
        for kind in KINDS:
            these = [entry for entry in self.entries if entry.kind == kind]
            if these:
                count = sum(entry.parameters for entry in these)
                # the widest name that is all of this kind
                parts = (next((p for p in _parts(entry.name) if p not in shared), entry.name) for entry in these)
                lines.append(f"{kind:<12} {len(these):>4} tensors {count:>13,} parameters  {_listed(parts)}")
        return lines + [f"note: {note}" for note in self.notes]

    def table(self) -> list[dict[str, Any]]:
        """All entries as what JSON knows."""
        return [asdict(entry) for entry in self.entries]


def _parts(name: str) -> list[str]:
    """Ever narrower: `blocks.*.attn`, `blocks.*.attn.qkv`, `blocks.*.attn.qkv.weight`, and so on with `blocks.3`."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    first = min(3, len(name.removesuffix(".weight").removesuffix(".bias").split(".")))
    return [
        ".".join("*" if i in numbers[kept:] else word for i, word in enumerate(words[:length]))
        for kept in range(len(numbers) + 1)
        for length in range(first, len(words) + 1)
    ]


def _listed(names: Iterable[str]) -> str:
    """The first ten of many names, those that differ in one number written as one: `blocks.{1,3}.attn`."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(names):
        before, number, after = (*re.split(r"(?<=\.)(\d+)(?=\.|$)", name, maxsplit=1), "", "")[:3]
        alike.setdefault((before, after), []).append(number)
    ranges = {key: n if len(n) < 7 else [*n[:3], "...", n[-1]] for key, n in alike.items()}
    joined = {key: n[0] if len(n) == 1 else "{" + ",".join(n) + "}" for key, n in ranges.items()}
    return first_names([f"{before}{numbers}{after}" for (before, after), numbers in joined.items()])
