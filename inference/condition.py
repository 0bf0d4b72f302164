"""From what a user asks for to what the denoiser is given at every step.

Each distinct text that the prompts of a batch come to on the way, with its weights, is encoded once into a row of one
table; the null condition is the table's last row. A condition is then nothing but row numbers, one for each step and
picture, so prompts that change, alternate or compose cost no more than their words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from inference.prompt import Part, parse
from models.base import Cond
from models.text import Conditioner, Segments


@dataclass(slots=True)
class Along:
    """A condition for b pictures that may change with the steps: rows (steps, b) of `table`."""

    table: Cond
    rows: Tensor
    size_ids: Tensor | None

    def at(self, step: int) -> Cond:
        """What the denoiser is given at a step."""
        return replace(self.table.select(self.rows[step]), size_ids=self.size_ids)

    @staticmethod
    def cat(many: Sequence["Along"]) -> "Along":
        """Conditions on the same table as one batch."""
        sizes = [one.size_ids for one in many if one.size_ids is not None]
        return Along(many[0].table, torch.cat([one.rows for one in many], 1), torch.cat(sizes) if sizes else None)


@dataclass(slots=True)
class Conditions:
    """What guidance works with: composed positive prompts with weights (b,), the null, and the negative prompt."""

    positive: list[tuple[Along, Tensor]]
    null: Along
    negative: Along | None


def chunks_needed(conditioner: Conditioner, prompts: Sequence[str], steps: int) -> int:
    """Chunks of CLIP that the longest of these prompts takes, at any of so many steps; 1 without a text encoder."""
    if conditioner.text is None:
        return 1
    parts = [part for prompt in prompts for part in parse(prompt)]
    texts = {part.at(step, steps) for part in parts for step in range(steps)}
    return conditioner.text.chunks_needed([_segments(text) for text in texts])


def of_prompts(
    conditioner: Conditioner, prompts: Sequence[str], negatives: Sequence[str], steps: int, chunks: int,
    size: tuple[int, int], scores: tuple[float, float], device: torch.device,
) -> Conditions:  # fmt: skip
    """Conditions of b prompts and their negative prompts, all in so many chunks, for pictures of `size` pixels.

    `scores` are the aesthetic ones that prompts, and null and negative prompts, are told with.
    """
    composed = [parse(prompt) for prompt in prompts]
    table: dict[tuple, int] = {}

    def row(part: Part | None, step: int) -> int:
        return -1 if part is None else table.setdefault(part.at(step, steps), len(table))

    def rows(parts: Sequence[Part | None]) -> Tensor:
        return torch.tensor([[row(part, step) for part in parts] for step in range(steps)], device=device)

    columns = [
        [parts[k] if k < len(parts) else None for parts in composed] for k in range(max(map(len, composed), default=1))
    ]
    positive = [
        (rows(parts), torch.tensor([part.weight if part else 0.0 for part in parts], device=device))
        for parts in columns
    ]
    opposed = [_whole(parse(negative)) if negative else None for negative in negatives]
    negative = rows(opposed) if any(opposed) else None
    encoded = [conditioner.weighted([_segments(text) for text in table], chunks)] if table else []
    whole = _without_padding(Cond.cat([*(cond.to(device) for cond in encoded), conditioner.null(device, chunks)]))
    good, poor = (size_ids(conditioner, size, len(prompts), score, device) for score in scores)
    none = torch.full((steps, len(prompts)), -1, device=device)
    return Conditions(
        [(Along(whole, each, good), weights) for each, weights in positive],
        Along(whole, none, poor),
        None if negative is None else Along(whole, negative, poor),
    )


def of_classes(conditioner: Conditioner, class_ids: Sequence[int], steps: int, device: torch.device) -> Conditions:
    """Conditions of b class labels."""
    labels, null = torch.tensor(list(class_ids), device=device), conditioner.num_classes or 0
    if wrong := [label for label in class_ids if not 0 <= label < null]:
        raise ValueError(f"class {wrong[0]} does not exist; this model knows classes 0 to {null - 1}")
    table = Cond.cat([conditioner(None, labels), conditioner.null(device)])
    each = torch.arange(len(labels), device=device).expand(steps, -1)
    return Conditions(
        [(Along(table, each, None), torch.ones(len(labels), device=device))],
        Along(table, torch.full_like(each, -1), None),
        None,
    )


def size_ids(
    conditioner: Conditioner, size: tuple[int, int], count: int, aesthetic: float, device: torch.device
) -> Tensor | None:
    """What the denoiser reads of `count` whole pictures of `size` pixels: (count, 6 or 5), or None."""
    height, width = size
    told = [height, width, 0, 0, height, width, aesthetic]
    return conditioner.size_ids(torch.tensor([told] * count, dtype=torch.float32, device=device))


def _segments(text: tuple) -> Segments:
    return [list(segment) for segment in text]


def _whole(parts: Sequence[Part]) -> Part:
    """A negative prompt pushes away from all that it says at once: its ANDs begin chunks."""
    return parts[0] if len(parts) == 1 else Part(1.0, tuple(chain(*([*part.body, None] for part in parts))))


def _without_padding(cond: Cond) -> Cond:
    """The tokens up to the last that any row has, where masked: after it all is padding that no network sees."""
    if cond.text_mask is None:
        return cond
    return cond.cut(1 + int(cond.text_mask.any(0).nonzero().max()))
