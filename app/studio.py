"""From the page's fields to pictures: no word of HTML or Gradio."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from app.form import AS_TRAINED, Form, axis, title
from app.sheet import labelled
from app.watch import Glance, Watch, follow
from inference.export.lora import trigger_of
from inference.picture import Settings, fingerprint, fit, open_mask, open_picture, read_settings, save_picture
from inference.pipeline import Pipeline

MOST_CELLS = 100
LARGEST_SEED = 2**53 - 1  # what a browser's numbers hold exactly


@dataclass(slots=True, kw_only=True)
class Drawn:
    """A finished picture: its file, what it says of itself, its line in the gallery."""

    path: Path
    settings: Settings
    caption: str


@dataclass(slots=True, kw_only=True)
class Lora:
    """A LoRA file: where it is, its weight at the start, the words that call it."""

    path: Path
    weight: float
    trigger: str


class Studio:
    """The open checkpoints, and the folder that their pictures go to.

    `loras`, files with their weights, and `refiner` go with `checkpoint` alone, which beside itself shows what they do.
    `private` is False where strangers may reach the page: no folder is opened then but those it was started with.
    """

    def __init__(
        self, checkpoint: str, compare: str | None = None, *, folder: str | Path, private: bool = True,
        loras: Sequence[tuple[Path, float]] = (), refiner: str | None = None,
    ):  # fmt: skip
        self.checkpoint, self.compare, self.folder, self.private = checkpoint, compare, Path(folder), private
        self.pipeline = Pipeline.load(checkpoint)
        self.pipeline.set_loras(loras)
        self.loras = {path.name: Lora(path=path, weight=weight, trigger=trigger_of(path)) for path, weight in loras}
        if len(self.loras) < len(loras):
            raise ValueError("two files of --lora have the same name, by which pictures tell them; rename one")
        self.on: dict[str, float] | None = {name: lora.weight for name, lora in self.loras.items()}
        self.refiner = Pipeline.load(refiner) if refiner else None
        if self.refiner:
            self.refiner.join(self.pipeline)
        self.opened = {compare: Pipeline.load(compare)} if compare else {}
        self.numbers = count(1)
        self.lock = threading.Lock()

    @property
    def by_class(self) -> bool:
        """Whether a subject is a class number."""
        return self.pipeline.conditioner.text is None

    @cached_property
    def model_hash(self) -> str:
        """By which pictures name the checkpoint; a large one takes seconds to read."""
        return self.pipeline.model_hash()

    @property
    def unit(self) -> int:
        """Pixels that a side is a multiple of."""
        return self.pipeline.autoencoder.factor * self.pipeline.denoiser.config.patch_size

    def follow(self, mode: str, form: Form) -> Iterator[Glance | list[Drawn] | None]:
        """The form being drawn, one drawing at a time, and at last its pictures; see `watch.follow`."""
        return follow(lambda watch: self.draw(mode, form, watch), self.lock)

    def draw(self, mode: str, form: Form, watch: Watch) -> list[Drawn]:
        """The pictures, last seed first, that a mode makes of the form: text, image, inpaint, grid or compare."""
        if mode == "grid":
            return [self.table(form, watch)]
        if mode == "compare":
            return [self.side_by_side(form, watch)]
        given = begun(mode, form)
        watch.total = Pipeline.steps(form.config(), given[2])
        said = [self.settings(form, seed, *given) for seed in form.seeds()]
        pixels = self.pictures(self.pipeline, form, watch, *given)
        drawn = [self.keep(*pair, f"seed {pair[1].seed}") for pair in zip(pixels, said, strict=True)]
        return drawn[::-1]

    def pictures(
        self, pipeline: Pipeline, form: Form, watch: Watch,
        image: np.ndarray | None = None, mask: np.ndarray | None = None, strength: float = 1.0,
    ) -> np.ndarray:  # fmt: skip
        """(b, h, w, 3) uint8, one for each seed, from nothing or from a picture that is cut to their size."""
        size, seeds = size_of(pipeline, form), form.seeds()
        by_class = pipeline.conditioner.text is None
        own = pipeline is self.pipeline
        if own:
            self.add(form.added())
        return pipeline.generate(
            None if by_class else [str(form.subject)] * len(seeds),
            class_ids=[class_id(form.subject)] * len(seeds) if by_class else None,
            negative="" if by_class else form.negative,
            seeds=seeds,
            sampler=form.config(),
            size=size,
            image=None if image is None else fit(image, size),
            mask=None if mask is None else fit(mask, size),
            strength=strength,
            refiner=self.refiner if own and form.refine else None,
            handover=form.handover,
            progress=watch.over(pipeline.preview),
        )

    def add(self, loras: dict[str, float]) -> None:
        """Draw with these LoRAs, by the names of their files, and no others from now on."""
        if loras != self.on:
            self.on = None  # should it fail half-way
            self.pipeline.set_loras([(self.loras[name].path, weight) for name, weight in loras.items()])
            self.on = loras

    def table(self, form: Form, watch: Watch) -> Drawn:
        """One picture for each pair of values of the two axes, as one sheet."""
        columns, rows = axis(form.x_key, form.x_values), axis(form.y_key, form.y_values)
        if len(columns) * len(rows) > MOST_CELLS:
            raise ValueError(
                f"the grid has {len(columns)} x {len(rows)} pictures, above {MOST_CELLS}; take fewer values"
            )
        form = replace(form, count=1)
        forms = [[change_y(change_x(form)) for _, change_x in columns] for _, change_y in rows]
        watch.total = sum(cell.config().steps for row in forms for cell in row)  # refuses before the first is drawn
        cells = [[self.pictures(self.pipeline, cell, watch)[0] for cell in row] for row in forms]
        sheet = labelled(cells, [label for label, _ in columns], [label for label, _ in rows])
        return self.keep(sheet, self.settings(form, form.seed), "grid")

    def side_by_side(self, form: Form, watch: Watch) -> Drawn:
        """The same seeds drawn by both checkpoints, a column each.

        Each has its own subject where one knows text and the other classes, and its own size unless one is asked for.
        """
        path = form.other.strip() or self.compare or ""
        other, trained = self.open(path), self.pipeline.description.resolution
        theirs = replace(form, subject=form.other_subject.strip() or form.subject)
        if (form.width, form.height) == (trained, trained):
            theirs = replace(theirs, width=None, height=None)
        watch.total = 2 * form.config().steps
        columns = [self.pictures(self.pipeline, form, watch), self.pictures(other, theirs, watch)]
        seeds = [f"seed {seed}" for seed in form.seeds()] if len(form.seeds()) > 1 else [""]
        ours = " + ".join([short(self.checkpoint), *(title(name) for name in form.added())])
        sheet = labelled(list(zip(*columns, strict=True)), [ours, short(path)], seeds)
        return self.keep(sheet, self.settings(form, form.seed), "side by side")

    def open(self, path: str) -> Pipeline:
        """The other checkpoint; one that was typed stays open until another one is."""
        if not path:
            raise ValueError("the other checkpoint is missing; type its folder, or start the page with --compare")
        if path not in self.opened:
            if not self.private:
                raise ValueError(f"a shared page opens no folder that is typed; start it with --compare {path}")
            self.opened = {key: self.opened[key] for key in self.opened if key == self.compare}
            self.opened[path] = Pipeline.load(path)
        return self.opened[path]

    def settings(
        self, form: Form, seed: int,
        image: np.ndarray | None = None, mask: np.ndarray | None = None, strength: float = 1.0,
    ) -> Settings:  # fmt: skip
        """What a picture of the form's says of itself."""
        size = size_of(self.pipeline, form)
        return Settings(
            prompt="" if self.by_class else str(form.subject),
            class_id=class_id(form.subject) if self.by_class else None,
            negative=form.negative,
            seed=int(seed),
            size=list(size),
            sampler=form.config(),
            strength=strength,
            image=None if image is None else fingerprint(fit(image, size)),
            mask=None if mask is None else fingerprint(fit(mask, size)),
            refiner=self.refiner.name if self.refiner and form.refine else None,
            handover=form.handover if form.refine else None,
            loras=form.added(),
            model=self.pipeline.name,
            model_hash=self.model_hash,
        )

    def keep(self, pixels: np.ndarray, settings: Settings, caption: str) -> Drawn:
        """Write a picture, which carries its settings, to the temporary folder."""
        path = self.folder / f"{next(self.numbers):05d}-{caption.replace(' ', '-')}.png"
        save_picture(path, pixels, settings)
        return Drawn(path=path, settings=settings, caption=caption)

    def restored(self, path: str) -> tuple[dict[str, Any], str]:
        """What a picture says of the form's fields, and what the page cannot restore of it."""
        known = read_settings(Path(path).read_bytes())
        config, notes = known.sampler, []
        if known.seed > LARGEST_SEED:
            raise ValueError(f"seed={known.seed} has more digits than a browser keeps; draw it with scripts/sample.py")
        values = {
            "base": config, "negative": known.negative, "seed": known.seed,
            "sampler": config.name.name, "grid": config.grid.name if config.grid else AS_TRAINED,
            "steps": config.steps, "guidance": config.guidance, "rescale": config.rescale, "eta": config.eta,
            "negative_scale": config.negative_scale, "count": 1,
            "loras": {name: known.loras.get(name, 0.0) for name in self.loras},
            "refine": bool(self.refiner and self.refiner.name == known.refiner),
            "handover": known.handover, "aesthetic": config.aesthetic,
        }  # fmt: skip
        if known.size:
            values["height"], values["width"] = known.size
        if self.by_class == (known.class_id is not None):
            values["subject"] = known.class_id if self.by_class else known.prompt
        else:
            notes.append(f"it shows a {'prompt' if self.by_class else 'class'}, which this checkpoint does not know")
        if known.image:
            notes.append("it began from a picture, which must be dropped again")
            values["inpaint_strength" if known.mask else "strength"] = known.strength
        absent = [f"the LoRA {name}" for name, weight in known.loras.items() if weight and name not in self.loras]
        if known.refiner and not values["refine"]:
            absent.append(f"the refiner {known.refiner}")
        notes += [f"it was drawn with {one}, which is not open here" for one in absent]
        if known.model_hash and known.model_hash != self.model_hash:
            notes.append(f"it was drawn by another checkpoint, {known.model or known.model_hash}")
        return values, "; ".join(notes)

    def about(self) -> list[tuple[str, str]]:
        """What the checkpoint says of itself."""
        described, network = self.pipeline.description, self.pipeline.denoiser
        objective, config = described.objective, described.sampler
        parameters = sum(parameter.numel() for parameter in network.parameters())
        text = described.text
        return [
            ("Checkpoint", self.checkpoint),
            ("Network", type(network).__name__),
            ("Parameters", _grouped(parameters)),
            ("Weights", "moving average (ema)"),
            ("Predicts", objective.prediction.name),
            ("Noise", f"{objective.path.name} path, times drawn {objective.times.name}, shift {objective.shift:g}"),
            ("Conditioned on", f"text ({', '.join(text.encoders)})" if text else f"{described.num_classes} classes"),
            ("Size", f"{described.resolution} px"),
            ("Sampler", f"{config.name.name}, {config.steps} steps, guidance {config.guidance:g}"),
            ("Device", str(self.pipeline.device)),
            *(("LoRA", str(lora.path)) for lora in self.loras.values()),
            *([("Refiner", self.refiner.name)] if self.refiner else []),
        ]


def begun(mode: str, form: Form) -> tuple[np.ndarray | None, np.ndarray | None, float]:
    """Picture to begin from, where it is painted anew, and strength; (None, None, 1) for one from nothing."""
    if mode == "image":
        if not form.picture:
            raise ValueError("the picture to begin from is missing; drop one on the page")
        return opened(form.picture), None, form.strength
    if mode == "inpaint":
        painting = form.painting or {}
        if not painting.get("background"):
            raise ValueError("the picture to paint anew is missing; drop one on the canvas")
        picture = opened(painting["background"])
        return picture, painted(form, picture.shape[:2]), form.inpaint_strength
    return None, None, 1.0


def painted(form: Form, size: tuple[int, int]) -> np.ndarray:
    """Where the picture is painted anew, (h, w) bool: the mask that was dropped, or what was brushed."""
    if form.mask:
        mask = fit(open_mask(Path(form.mask).read_bytes(), what="the mask"), size)
    else:
        layers = [open_mask(Path(layer).read_bytes(), what="the layer") for layer in (form.painting or {})["layers"]]
        mask = np.any([fit(layer, size) for layer in layers], axis=0) if layers else np.zeros(size, bool)
    if not mask.any():
        raise ValueError("nothing is marked to be drawn anew; paint over a part of the picture, or drop a mask")
    return mask


def opened(path: str) -> np.ndarray:
    """A dropped picture; its temporary path is nothing to name in an error."""
    return open_picture(Path(path).read_bytes(), what="the picture")


def size_of(pipeline: Pipeline, form: Form) -> tuple[int, int]:
    """(height, width) asked for, or as trained."""
    trained = pipeline.description.resolution
    return int(form.height or trained), int(form.width or trained)


def class_id(subject: str | int) -> int:
    """A class number."""
    try:
        return int(subject)
    except ValueError:
        raise ValueError(f"class {subject!r} is no number; this checkpoint knows classes by theirs") from None


def short(path: str) -> str:
    """The last two folders of a checkpoint's path, enough to tell it by."""
    return "/".join(Path(path).resolve().parts[-2:])


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")
