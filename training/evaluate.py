"""Pictures at fixed seeds while training, and the exam at the end; both through the one pipeline, with EMA weights."""

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import shapes
from inference.pipeline import Pipeline
from training.checkpoint import FULL
from training.config import RunConfig
from training.refiner import Refined


@dataclass(slots=True)
class Subjects:
    """What the sample grid shows: prompts or class labels, and a caption for each."""

    captions: list[str]
    class_ids: list[int] | None


def subjects(cfg: RunConfig, captions: list[str]) -> Subjects:
    """From `sample.prompts`, else from the data's exam, else the first `captions` of the data itself."""
    count = cfg.sample.count
    if cfg.model.condition == "class":
        known = [shapes.PAIRS.index(pair) for pair in shapes.TRAIN_PAIRS]
        if cfg.data.exam == "shapes":
            ids = [known[round(i * (len(known) - 1) / max(1, count - 1))] for i in range(count)]
            return Subjects([" ".join(shapes.PAIRS[i]) for i in ids], ids)
        return Subjects([f"class {i}" for i in range(count)], list(range(count)))
    if cfg.sample.prompts:
        return Subjects(cfg.sample.prompts[:count], None)
    if cfg.data.exam == "shapes":
        asked = [shapes.scene(cfg.sample.seed, i, two=i % 2, held_out=True) for i in range(count)]
        return Subjects([shapes.prompt(scene) for scene in asked], None)
    return Subjects(captions[:count], None)


def draw_grid(
    pipeline: Pipeline | Refined, what: Subjects, seed: int, path: Path | None, columns: int = 4
) -> dict[str, Any]:
    """Draw the subjects at fixed seeds into one PNG, if this rank writes any; returns the record for metrics.jsonl."""
    prompts = what.captions if what.class_ids is None else None
    seeds = range(seed, seed + len(what.captions))
    pictures = draw(pipeline, seeds, prompts=prompts, class_ids=what.class_ids)
    blank = np.zeros((-len(pictures) % columns, *pictures.shape[1:]), np.uint8)
    tiles = np.concatenate([pictures, blank])
    rows = [np.concatenate(list(tiles[i : i + columns]), 1) for i in range(0, len(tiles), columns)]
    if path is not None:
        _write(np.concatenate(rows), path)
    return {"prompts": what.captions, "columns": columns, "tile": pictures.shape[1]}


def _write(picture: np.ndarray, path: Path) -> None:
    """A picture as PNG, whole or not at all; one for which there is no room ends no run."""
    content, aside = io.BytesIO(), path.with_suffix(".tmp")
    Image.fromarray(picture).save(content, format="PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content.getbuffer())
        aside.rename(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        aside.unlink(missing_ok=True)
        print(f"{path} was not written: {error.strerror}; the run goes on without it", file=sys.stderr)


def take_exam(pipeline: Pipeline | Refined, cfg: RunConfig) -> dict[str, Any]:
    """Prompt accuracy on held-out pairs, or class accuracy on trained ones, by the reader."""
    start, count, seed = time.time(), cfg.evaluate.count, cfg.evaluate.seed
    seeds = [seed + i for i in range(count)]
    if cfg.model.condition == "class":
        known = [shapes.PAIRS.index(pair) for pair in shapes.TRAIN_PAIRS]
        ids = [known[i % len(known)] for i in range(count)]
        pictures = draw(pipeline, seeds, class_ids=ids, batch=cfg.evaluate.batch)
        result: dict[str, Any] = {"class_accuracy": shapes.mark_classes(ids, pictures)}
    else:
        one, two = (
            shapes.mark(
                scenes, draw(pipeline, seeds, prompts=[shapes.prompt(s) for s in scenes], batch=cfg.evaluate.batch)
            )
            for scenes in (shapes.exam(seed, count, 1), shapes.exam(seed, count, 2))
        )
        result = _named(one) | {"two_objects": _named(two) | {"count": count}}
    return result | {"count": count, "seconds": time.time() - start}


def _named(marks: dict[str, float]) -> dict[str, Any]:
    return {"prompt_accuracy": marks["all"], "attributes": {k: v for k, v in marks.items() if k != "all"}}


def draw(
    pipeline: Pipeline | Refined,
    seeds: Sequence[int],
    *,
    prompts: Sequence[str] | None = None,
    class_ids: Sequence[int] | None = None,
    batch: int = 50,
    **options: Any,
) -> np.ndarray:
    """A picture for each seed, with its prompt or its class, `batch` at a time; `options` are those of `generate`."""
    parts = []
    for i in range(0, len(seeds), batch):
        some = slice(i, i + batch)
        asked, ids = prompts and prompts[some], class_ids and class_ids[some]
        parts.append(pipeline.generate(asked, class_ids=ids, seeds=seeds[some], **options))
    return np.concatenate(parts)
