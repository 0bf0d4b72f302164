"""The page's fields as one value, and what one of them may run through in an X/Y grid."""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from diffusion.sample import ETA, Sampler
from diffusion.timesteps import Grid
from inference.description import SamplerConfig

AS_TRAINED = "as trained"  # the grid of times that the objective was trained for
NOTHING = "nothing"  # an axis that is not used
LORA = "LoRA "  # before a file's name: its weight, as a field and as an axis
NUMBERS = {"steps": int, "guidance": float, "seed": int, "eta": float, "rescale": float, "negative_scale": float}
CHOICES = {"sampler": [*Sampler.__members__], "grid": [AS_TRAINED, *Grid.__members__]}
EXAMPLES = {"steps": "10, 20, 40", "guidance": "1, 2, 4", "seed": "1, 2, 3", "class": "0, 7, 12"}
MOST_PICTURES, LONGEST_SIDE = 16, 4096

Axis = list[tuple[str, Callable[["Form"], "Form"]]]


@dataclass(slots=True, kw_only=True)
class Form:
    """The page's fields. `subject` is a prompt, or a class number where the checkpoint is conditioned on classes.

    Sizes are in pixels. What is None or empty is left to the checkpoint; `base` holds the sampler's settings that the
    page does not show. Files are those that were dropped on the page; `painting` is what gr.ImageEditor gives. `loras`
    are weights by the names of files; `refine` lets the refiner go on after the share `handover` of the steps.
    """

    subject: str | int
    negative: str = ""
    count: int = 1
    seed: int = 0
    width: int | None = None
    height: int | None = None
    sampler: str
    grid: str = AS_TRAINED
    steps: int
    guidance: float
    rescale: float = 0.0
    eta: float | None = None
    negative_scale: float | None = None
    base: SamplerConfig
    loras: dict[str, float] = field(default_factory=dict)
    refine: bool = False
    handover: float | None = None
    aesthetic: float | None = None
    picture: str | None = None
    strength: float = 0.7
    painting: dict | None = None
    mask: str | None = None
    inpaint_strength: float = 1.0
    x_key: str = NOTHING
    x_values: str = ""
    y_key: str = NOTHING
    y_values: str = ""
    other: str = ""
    other_subject: str = ""

    def __post_init__(self):
        for key in ("subject", "count", "seed", "steps", "guidance", "rescale", "strength", "inpaint_strength"):
            if getattr(self, key) is None:  # a field of the page that was emptied
                raise ValueError(f"{key.replace('_', ' ')} is empty; give a number")
        for name, weight in self.loras.items():
            if weight is None or not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is no number; give 1, or 0 to take it off")
        if not 1 <= self.count <= MOST_PICTURES:
            raise ValueError(f"count={self.count} pictures are not drawn at once; choose 1 to {MOST_PICTURES}")
        for key in ("width", "height"):
            if (getattr(self, key) or 0) > LONGEST_SIDE:
                raise ValueError(f"{key}={getattr(self, key)} is above {LONGEST_SIDE} pixels; choose a smaller one")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Form":
        """From the page's fields, among which each LoRA's weight has one."""
        loras = {key.removeprefix(LORA): fields[key] for key in fields if key.startswith(LORA)}
        return cls(loras=loras, **{key: fields[key] for key in fields if not key.startswith(LORA)})

    def config(self) -> SamplerConfig:
        """The sampler's settings; what does not hold is refused with its sentence."""
        return replace(
            self.base, name=Sampler[self.sampler], grid=None if self.grid == AS_TRAINED else Grid[self.grid],
            steps=int(self.steps), guidance=self.guidance, rescale=self.rescale, eta=self.eta,
            negative_scale=self.negative_scale,
            aesthetic=self.base.aesthetic if self.aesthetic is None else self.aesthetic,
        )  # fmt: skip

    def added(self) -> dict[str, float]:
        """The LoRAs that are on."""
        return {name: weight for name, weight in self.loras.items() if weight}

    def seeds(self) -> list[int]:
        """One a picture, counting up."""
        return [int(self.seed) + i for i in range(int(self.count))]


def keys(by_class: bool, loras: Iterable[str]) -> list[str]:
    """What an axis may run through."""
    return [NOTHING, *NUMBERS, *CHOICES, "class" if by_class else "prompt", *(LORA + name for name in loras)]


def title(lora: str) -> str:
    """The name of a LoRA's file for people."""
    return lora.removesuffix(".safetensors")


def axis(key: str, text: str) -> Axis:
    """A label and a change of the form for each of the comma-separated values; one empty of both for no axis.

    The values of a prompt are words: the first is looked for, and each of them, itself included, put in its place. A
    value that holds a comma is written in double quotes.
    """
    if key == NOTHING:
        return [("", lambda form: form)]
    values = [value.strip() for value in next(csv.reader([text], skipinitialspace=True), []) if value.strip()]
    if not values:
        raise ValueError(f"the grid has no values for {key}; give some, such as {_example(key)}")
    if key == "prompt":
        return [(word, _replacing(values[0], word)) for word in values]
    if key == "sampler":
        return [(value, _sampling(str(_read(key, value)))) for value in values]
    if key.startswith(LORA):
        name = key.removeprefix(LORA)
        return [(f"{title(name)} {value}", _weighing(name, float(_read(key, value)))) for value in values]
    return [(f"{key} {value}", _setting("subject" if key == "class" else key, _read(key, value))) for value in values]


def _setting(key: str, value: object) -> Callable[[Form], Form]:
    return lambda form: replace(form, **{key: value})


def _weighing(name: str, weight: float) -> Callable[[Form], Form]:
    return lambda form: replace(form, loras=form.loras | {name: weight})


def _sampling(name: str) -> Callable[[Form], Form]:
    """Eta goes where the sampler takes no fresh noise."""
    return lambda form: replace(form, sampler=name, eta=form.eta if Sampler[name] in ETA else None)


def _replacing(old: str, new: str) -> Callable[[Form], Form]:
    def change(form: Form) -> Form:
        if old not in str(form.subject):
            raise ValueError(f"the grid looks for {old!r}, which the prompt does not hold; begin with a word of it")
        return replace(form, subject=str(form.subject).replace(old, new))

    return change


def _read(key: str, value: str) -> Any:
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise ValueError(f"the grid's {key} {value!r} is unknown; choose from {', '.join(CHOICES[key])}")
        return value
    try:
        return (float if key.startswith(LORA) else NUMBERS.get(key, int))(value)
    except ValueError:
        raise ValueError(f"the grid's {key} {value!r} is no number that fits; give {_example(key)}") from None


def _example(key: str) -> str:
    if key == "prompt":
        return "red, blue, green: the first is looked for in the prompt"
    return ", ".join(CHOICES[key][:3]) if key in CHOICES else EXAMPLES.get(key, "0, 0.5, 1")
