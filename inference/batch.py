"""Many pictures with settings of their own, drawn together where they can be; one that cannot stops no other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from diffusion.sample import Sampler
from inference.picture import Settings, fingerprint, fit
from inference.pipeline import Pipeline

Outcome = tuple[Settings, np.ndarray | ValueError]


def draw_all(
    pipeline: Pipeline,
    wanted: Sequence[Settings],
    *,
    batch_size: int = 8,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    refiner: Pipeline | None = None,
    progress: Callable[[int, int, Tensor], object] | None = None,
) -> Iterator[Outcome]:
    """Each of the settings, completed by what was drawn with, and its picture or why there is none; in their order.

    Neighbours that differ in subject and seed alone make a batch. `image` and `mask` are fitted to each size.
    progress(pictures, step, x0) is called after each step of so many pictures.
    """
    for group in _alike(wanted, batch_size):
        known = _known(pipeline, group[0], image, mask, refiner)
        group = [replace(settings, **known) for settings in group]
        try:
            pictures: Sequence[np.ndarray | ValueError] = _draw(pipeline, group, image, mask, refiner, progress)
        except ValueError as error:
            pictures = [error] if len(group) == 1 else _one_by_one(pipeline, group, image, mask, refiner, progress)
        yield from zip(group, pictures, strict=True)


def _draw(
    pipeline: Pipeline, group: Sequence[Settings], image: np.ndarray | None, mask: np.ndarray | None,
    refiner: Pipeline | None, progress: Callable[[int, int, Tensor], object] | None,
) -> list[np.ndarray]:  # fmt: skip
    first = group[0]
    assert first.size is not None  # `_known` has said it
    size = first.size[0], first.size[1]
    by_class = first.class_id is not None
    pictures = pipeline.generate(
        None if by_class else [settings.prompt for settings in group],
        class_ids=[settings.class_id or 0 for settings in group] if by_class else None,
        negative=[settings.negative for settings in group],
        seeds=[settings.seed for settings in group],
        sampler=first.sampler,
        size=size,
        image=None if image is None else fit(image, size),
        mask=None if mask is None else fit(mask, size),
        strength=first.strength,
        refiner=refiner,
        handover=first.handover,
        progress=None if progress is None else lambda step, z, x0: progress(len(group), step, x0),
    )
    return list(pictures)


def _one_by_one(pipeline: Pipeline, group: Sequence[Settings], *rest: Any) -> list[np.ndarray | ValueError]:
    """Whichever of them can be drawn."""
    found: list[np.ndarray | ValueError] = []
    for settings in group:
        try:
            found += _draw(pipeline, [settings], *rest)
        except ValueError as error:
            found.append(error)
    return found


def _alike(wanted: Sequence[Settings], most: int) -> Iterator[list[Settings]]:
    """Neighbours that one drawing can make; the adaptive solver's steps are chosen for a picture alone."""
    group: list[Settings] = []
    for settings in wanted:
        limit = 1 if settings.sampler.name is Sampler.dopri5 else most
        if group and (len(group) >= limit or _shared(group[0]) != _shared(settings)):
            yield group
            group = []
        group.append(settings)
    if group:
        yield group


def _shared(settings: Settings) -> Settings:
    """The settings with what may differ within a batch taken out."""
    return replace(settings, prompt="", negative="", seed=0, class_id=None if settings.class_id is None else 0)


def _known(
    pipeline: Pipeline, settings: Settings, image: np.ndarray | None, mask: np.ndarray | None, refiner: Pipeline | None
) -> dict[str, Any]:
    """What a drawing adds to the settings that asked for it."""
    side = pipeline.description.resolution
    return {
        "size": settings.size or [side, side],
        "model": pipeline.name,
        "model_hash": pipeline.model_hash(),
        "image": None if image is None else fingerprint(image),
        "mask": None if mask is None else fingerprint(mask),
        "refiner": refiner.name if refiner else None,
        "handover": settings.handover if refiner else None,
    }
