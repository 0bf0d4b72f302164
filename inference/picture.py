"""Pictures: those drawn carry the settings that draw them again, those that users give become arrays.

A PNG of ours has two text chunks. `triptych` is JSON of all settings, exactly; `parameters` is the text by which A1111
and the programs after it show and exchange theirs:

    a red circle above a blue star                      the prompt, in as many lines as it has
    Negative prompt: blurred                            where there is one
    Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 1, Size: 512x768, Model: "a, b", ...

The last line holds settings if it has three pairs at least; values with commas, colons, quotes or line ends are JSON
strings. JPEG, WebP and AVIF carry the same text in EXIF's UserComment. What has no name of A1111's has one of ours, and
a value that is the default is left out. The text cannot say a prompt with a line that begins `Negative prompt:`.

What is opened may come from anyone: only common formats are tried, nothing is decoded before its size is known, and
whatever is wrong is said in one sentence.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from io import BytesIO
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from diffusion.sample import Sampler
from diffusion.timesteps import Grid
from inference.description import SamplerConfig, plain
from models.weights import appearing

Source = str | Path | bytes | bytearray | memoryview | IO[bytes] | Image.Image
T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
OURS, THEIRS = "triptych", "parameters"  # names of the text chunks
NEGATIVE = "Negative prompt:"
EXIF, USER_COMMENT = 0x8769, 0x9286

SAMPLERS = {
    Sampler.euler: "Euler",
    Sampler.heun: "Heun in time",
    Sampler.heun_edm: "Heun",  # in sigma_edm, as k-diffusion's
    Sampler.ddim: "DDIM",
    Sampler.ddpm: "DDPM",
    Sampler.euler_ancestral: "Euler a",
    Sampler.dpmpp_2m: "DPM++ 2M",
    Sampler.dpmpp_2m_sde: "DPM++ 2M SDE",
    Sampler.unipc: "UniPC",
    Sampler.ode_euler: "ODE Euler",
    Sampler.dopri5: "ODE Dormand-Prince",
}
GRIDS = {
    Grid.uniform: "Uniform in time",
    Grid.trailing: "SGM Uniform",
    Grid.leading: "DDIM",
    Grid.linspace: "Uniform",
    Grid.karras: "Karras",
    Grid.exponential: "Exponential",
}
_READ_SAMPLERS = {kind.name: kind for kind in Sampler} | {label.lower(): kind for kind, label in SAMPLERS.items()}
_READ_GRIDS = {label.lower(): kind for kind, label in GRIDS.items()} | {
    "simple": Grid.trailing,
    "normal": Grid.linspace,
}
_ALWAYS = ("Steps", "Sampler", "CFG scale", "Seed")  # the rest is left out where it is the default
_KEYS = {
    "Steps": "sampler.steps",
    "Sampler": "sampler.name",
    "Schedule type": "sampler.grid",
    "CFG scale": "sampler.guidance",
    "Seed": "seed",
    "Size": "size",
    "Model hash": "model_hash",
    "Model": "model",
    "Weights": "weights",
    "Class": "class_id",
    "Denoising strength": "strength",
    "Image hash": "image",
    "Mask hash": "mask",
    "Refiner": "refiner",
    "Refiner switch at": "handover",
    "LoRAs": "loras",
    "Eta": "sampler.eta",
    "CFG Rescale": "sampler.rescale",
    "CFG interval": "sampler.interval",
    "Negative scale": "sampler.negative_scale",
    "Schedule rho": "sampler.rho",
    "Schedule max sigma": "sampler.ramp_max",
    "Tolerance": "sampler.tolerance",
    "Aesthetic score": "sampler.aesthetic",
    "Negative aesthetic score": "sampler.negative_aesthetic",
}
# Never longer to fail than the line is: nothing in it can match the same text in two ways.
_PAIR = re.compile(r'\s*([^\W_][^:,"]*):\s*("(?:[^"\\]|\\.)*"(?=\s*(?:,|$))|[^,]*)(?:\s*,|\s*$)')


@dataclass(slots=True, kw_only=True)
class Settings:
    """All that draws a picture again.

    class_id: in place of the prompt, for models of classes. size: height and width in pixels. strength: how much of
    `image`, where there is one, is drawn anew. image, mask: `fingerprint` of the picture begun from, and of where it
    was painted. refiner: the checkpoint that goes on after the share `handover` of the steps, or where its training
    ends. loras: weights by file. model: name of the checkpoint. model_hash: the first ten digits of the SHA-256 of its
    denoiser's file. weights: ema or model.
    """

    prompt: str = ""
    class_id: int | None = None
    negative: str = ""
    seed: int = 0
    size: list[int] | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    strength: float = 1.0
    image: str | None = None
    mask: str | None = None
    refiner: str | None = None
    handover: float | None = None
    loras: dict[str, float] = field(default_factory=dict)
    model: str = ""
    model_hash: str = ""
    weights: str = "ema"

    def __post_init__(self):
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} does not fit 64 bits; choose 0 to {2**64 - 1}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={self.size} is not a height and a width in pixels; give two numbers from 1")


# --- settings as text --------------------------------------------------------------------------------------


def parameters(settings: Settings) -> str:
    """The text of A1111 that says `settings`."""
    pairs, default = [], Settings()
    for key, name in _KEYS.items():
        value = _get(settings, name)
        if key in _ALWAYS or value != _get(default, name):
            pairs.append(f"{key}: {_quoted(_said(name, value))}")
    lines = [settings.prompt] * bool(settings.prompt)
    lines += [f"{NEGATIVE} {settings.negative}"] * bool(settings.negative)
    return "\n".join([*lines, ", ".join(pairs)])


def from_parameters(text: str) -> Settings:
    """What such a text says, ours or of another program; keys and values that mean nothing here are left."""
    *lines, last = text.replace("\r\n", "\n").rstrip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    split = next((row for row, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[split:]).removeprefix(NEGATIVE).removeprefix(" ")
    settings = Settings(prompt="\n".join(lines[:split]), negative=negative)
    _split_schedule(pairs)
    for key, name in _KEYS.items():
        if key in pairs:
            with suppress(ValueError, RecursionError):
                settings = _with(settings, name, _meant(name, pairs[key]))
    return settings


def _pairs(line: str) -> dict[str, str]:
    found, at = {}, 0
    while at < len(line):
        if pair := _PAIR.match(line, at):
            found[pair[1].strip()] = _unquoted(pair[2].strip())
            at = pair.end()
        else:
            at = line.find(",", at) + 1 or len(line)
    return found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text != text.strip() or re.search(r'[,:"\r\n]', text) else text


def _unquoted(text: str) -> str:
    with suppress(ValueError):
        return json.loads(text) if text.startswith('"') else text
    return text


def _split_schedule(pairs: dict[str, str]) -> None:
    """`DPM++ 2M Karras`, as A1111 said before 1.9, is a sampler and a schedule."""
    name = pairs.get("Sampler", "")
    for label in GRIDS.values():
        if name.endswith(f" {label}") and name.lower() not in _READ_SAMPLERS:
            pairs.setdefault("Schedule type", label)
            pairs["Sampler"] = name.removesuffix(f" {label}")
            return


def _said(name: str, value: Any) -> str:
    """A value as the text has it."""
    if name == "size":
        return f"{value[1]}x{value[0]}"
    if isinstance(value, Enum):
        return SAMPLERS[value] if isinstance(value, Sampler) else GRIDS[value]  # pyright: ignore[reportArgumentType]
    return value if isinstance(value, str) else json.dumps(value).removesuffix(".0")


def _meant(name: str, text: str) -> Any:
    """The value that the text has; ValueError if it is none."""
    if name == "size":
        width, _, height = text.partition("x")
        return [int(height), int(width)]
    if name in ("sampler.name", "sampler.grid"):
        kinds: dict[str, Enum] = dict(_READ_SAMPLERS if name == "sampler.name" else _READ_GRIDS)
        if text.lower() not in kinds:
            raise ValueError(f"{text} is not known here")
        return kinds[text.lower()]
    owner, _, leaf = name.rpartition(".")
    hint = get_type_hints(SamplerConfig if owner else Settings)[leaf]
    return text if hint in (str, str | None) else _of(hint, json.loads(text))


def _get(settings: Settings, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def _with(settings: Settings, name: str, value: Any) -> Settings:
    owner, _, leaf = name.rpartition(".")
    return replace(settings, **({"sampler": replace(settings.sampler, **{leaf: value})} if owner else {leaf: value}))


def _of(hint: Any, value: Any) -> Any:
    """What JSON knows as what a type says, enums by their names; ValueError if it is not. Unknown keys are left."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        hint, nothing = get_args(hint)
        assert nothing is NoneType
        return None if value is None else _of(hint, value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        return hint(**{key: _of(hints[key], value[key]) for key in hints if key in value})  # pyright: ignore
    if get_origin(hint) is list and isinstance(value, list):
        return [_of(get_args(hint)[0], item) for item in value]
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _of(get_args(hint)[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str) and value in hint.__members__:
        return hint[value]
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)  # neither NaN nor infinite
    if type(value) is hint and hint in (int, str):
        return value
    raise ValueError(f"{value!r} is not of the type {hint}")


# --- settings in pictures ----------------------------------------------------------------------------------


def save_picture(path: str | Path, pixels: np.ndarray, settings: Settings) -> None:
    """Write pixels (h, w, 3) uint8 as a PNG that says `settings`, at once or not at all."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png, the format that carries the settings; rename it")
    assert pixels.dtype == np.uint8
    text = PngImagePlugin.PngInfo()
    text.add_text(THEIRS, parameters(settings).encode("utf-8", "replace").decode())  # a lone surrogate has no bytes
    text.add_text(OURS, json.dumps(plain(settings)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as partial:
        Image.fromarray(pixels).save(partial, "PNG", pnginfo=text)


def read_settings(source: Source) -> Settings:
    """The settings in a picture: a path, its bytes or Pillow's. Ours if they are there, else A1111's text."""
    ours, theirs = _use(source, "the picture", _texts)
    with suppress(ValueError, RecursionError):  # not as we wrote it: what else there is may do
        return _of(Settings, json.loads(ours))
    if not theirs.strip():
        raise ValueError(
            f"{_named(source, 'the picture')} does not say how it was made; give a PNG as it was saved, since"
            " programs and sites that change a picture leave its settings out"
        )
    return from_parameters(theirs)


def _texts(image: Image.Image) -> tuple[str, str]:
    ours, theirs = (text if isinstance(text := image.info.get(name), str) else "" for name in (OURS, THEIRS))
    return ours, theirs or _user_comment(image)


def _user_comment(image: Image.Image) -> str:
    """EXIF's UserComment: eight bytes name its encoding, but not the order of the bytes of UTF-16."""
    raw = image.getexif().get_ifd(EXIF).get(USER_COMMENT, b"")
    if not isinstance(raw, bytes):
        return str(raw)
    if raw.startswith(b"UNICODE\0"):
        body = raw[8:]
        little = body[1::2].count(0) > body[::2].count(0)  # of Latin letters the high byte is 0
        text = body.decode("utf-16-le" if little else "utf-16-be", "replace")
    else:
        text = raw.removeprefix(b"ASCII\0\0\0").removeprefix(bytes(8)).decode("utf-8", "replace")
    return text.strip("\0\ufeff")


# --- pictures that users give ------------------------------------------------------------------------------


def open_picture(source: Source, *, what: str = "--init-image") -> np.ndarray:
    """A picture as it is meant to be seen: (h, w, 3) uint8, turned as EXIF says, on white, its first frame."""
    return _use(source, what, lambda image: np.asarray(_flat(image, "white").convert("RGB")).copy())


def open_mask(source: Source, *, what: str = "--mask") -> np.ndarray:
    """A mask (h, w) bool from a picture of any kind: True, where it is white, is to be painted anew."""
    return _use(source, what, lambda image: np.asarray(_flat(image, "black").convert("L")) >= 128)


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (h, w, 3) uint8 or a mask (h, w) bool that covers `size` (height, width), cut evenly on both sides."""
    if picture.dtype == np.bool_:
        return fit(255 * picture.astype(np.uint8), size) >= 128
    height, width = size
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS)).copy()


def fingerprint(pixels: np.ndarray) -> str:
    """SHA-256 of a picture or mask, of its shape and its numbers."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _flat(image: Image.Image, background: str) -> Image.Image:
    """The first frame, upright, without transparency, of 8 bits a channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a channel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image


def _use(source: Source, what: str, use: Callable[[Image.Image], T]) -> T:
    """`use` of an open picture, not decoded yet; whatever fails there, the picture is to blame."""
    name = _named(source, what)
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise ValueError(f"{name} does not exist; give the file of a picture")
    stream: Any = BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                return use(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture, or a damaged one; give a file of {_FORMATS}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass  # Pillow's own limit is higher
    except Exception as error:  # what its decoders raise at a broken file has no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason}); save it again, as PNG") from error
    raise ValueError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first")


_FORMATS = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def _named(source: Source, what: str) -> str:
    return f"{what} {source}" if isinstance(source, (str, Path)) else what
