"""Captioned shapes: the embedded data set, and the reader that scores pictures of it.

A scene is one or two flat shapes on a plain background. Everything follows from `(seed, index)`: the
scene, its picture at any resolution and its captions. Six colour-and-shape pairs (`HELD_OUT`) never
occur in the training split, so a prompt such as "a purple star" asks for something never seen.

The reader is classical image analysis. It finds the background, cuts the objects out by colour, and
compares each silhouette with the six outlines the renderer draws. It knows nothing of networks, so what
it says of a generated picture is evidence.

Lengths are fractions of the picture's side; x runs right and y runs down.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

COLOURS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 222, 60),
    "green": (44, 150, 60),
    "cyan": (60, 205, 220),
    "blue": (40, 80, 215),
    "purple": (130, 50, 175),
    "pink": (248, 130, 190),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (18, 18, 18), "brown": (100, 66, 38)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.145, "large": 0.21}  # radius
PLACES = {
    (0, 0): "top left",
    (1, 0): "top",
    (2, 0): "top right",
    (0, 1): "left",
    (1, 1): "centre",
    (2, 1): "right",
    (0, 2): "bottom left",
    (1, 2): "bottom",
    (2, 2): "bottom right",
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
HELD_OUT = (
    ("red", "ring"),
    ("yellow", "cross"),
    ("green", "circle"),
    ("cyan", "triangle"),
    ("blue", "square"),
    ("purple", "star"),
)
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
TRAIN_PAIRS = [pair for pair in PAIRS if pair not in HELD_OUT]
NUM_CLASSES = len(PAIRS)

_THIRDS = (0.24, 0.5, 0.76)  # centres of the three columns and rows
_COLOUR_JITTER = 6.0
_PLACE_JITTER = 0.015
_SIZE_JITTER = 0.006


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: its words, where it is and how large."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]

    @property
    def class_id(self) -> int:
        """Index of (colour, shape) in `PAIRS`: the label of a class-conditioned model."""
        return PAIRS.index((self.colour, self.shape))


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a background; with two, `relation` says where the first is seen from the second."""

    background: str
    rgb: tuple[float, float, float]
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def place(self) -> str:
        """Name of the ninth of the picture that holds the first thing."""
        return _place(self.things[0].x, self.things[0].y)

    def attributes(self) -> dict[str, tuple[str, ...]]:
        """What a full caption says and the reader must find, by kind."""
        said = {
            "colour": tuple(thing.colour for thing in self.things),
            "shape": tuple(thing.shape for thing in self.things),
            "size": tuple(thing.size for thing in self.things),
            "background": (self.background,),
        }
        return said | ({"relation": (self.relation,)} if self.relation else {"place": (self.place,)})


# --- scenes -----------------------------------------------------------------------------------------------


class _Draw:
    """Random choices from uniform doubles only, whose stream numpy keeps stable across versions."""

    def __init__(self, seed: int, index: int):
        self._rng = np.random.Generator(np.random.PCG64([seed, index]))

    def choice(self, options):
        options = list(options)
        return options[int(self._rng.random() * len(options))]

    def chance(self, share: float) -> bool:
        return share > 0 and (share >= 1 or self._rng.random() >= 1 - share)  # what is certain takes no draw

    def jitter(self, scale: float) -> float:
        return scale * (2.0 * self._rng.random() - 1.0)


def scene(seed: int, index: int, *, two: float = 0.5, held_out: bool = False) -> Scene:
    """Scene number `index` of the endless list that `seed` names.

    `two` is the share of scenes with two things. With `held_out` the first thing is a pair of `HELD_OUT`;
    without it no thing is.
    """
    draw = _Draw(seed, index)
    count = 1 + draw.chance(two)
    background = draw.choice(BACKGROUNDS)
    rgb = _jittered(draw, BACKGROUNDS[background])
    pairs = [draw.choice(HELD_OUT if held_out else TRAIN_PAIRS)]
    if count == 1:
        column, row = draw.choice(PLACES)
        return Scene(background, rgb, (_thing(draw, pairs[0], _THIRDS[column], _THIRDS[row]),))
    pairs.append(draw.choice(pair for pair in TRAIN_PAIRS if pair != pairs[0]))
    relation = draw.choice(RELATIONS)
    dx, dy = RELATIONS[relation]
    spread = 0.5 - _THIRDS[0]
    things = tuple(
        _thing(draw, pair, 0.5 + side * dx * spread, 0.5 + side * dy * spread, relation)
        for pair, side in zip(pairs, (1, -1), strict=True)
    )
    return Scene(background, rgb, things, relation)


def _thing(draw: _Draw, pair: tuple[str, str], x: float, y: float, relation: str | None = None) -> Thing:
    size = draw.choice(SIZES)
    across = 0.1 if relation else _PLACE_JITTER  # two things may drift, but only across the line that joins them
    sideways = relation in ("left of", "right of")
    x += draw.jitter(across if relation and not sideways else _PLACE_JITTER)
    y += draw.jitter(across if relation and sideways else _PLACE_JITTER)
    radius = SIZES[size] + draw.jitter(_SIZE_JITTER)
    return Thing(*pair, size, x, y, radius, _jittered(draw, COLOURS[pair[0]]))


def _jittered(draw: _Draw, rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = (min(255.0, max(0.0, channel + draw.jitter(_COLOUR_JITTER))) for channel in rgb)
    return red, green, blue


def _place(x: float, y: float) -> str:
    column, row = (sum(value > edge for edge in (0.37, 0.63)) for value in (x, y))
    return PLACES[column, row]


# --- pictures ---------------------------------------------------------------------------------------------


def render(scene: Scene, resolution: int) -> np.ndarray:
    """The scene's picture: (resolution, resolution, 3) uint8, edges antialiased over one pixel."""
    picture = np.broadcast_to(np.asarray(scene.rgb, np.float32), (resolution, resolution, 3)).copy()
    centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    for thing in scene.things:
        x, y = (centres - thing.x) / thing.radius, (centres - thing.y) / thing.radius
        pixel = 1.0 / (resolution * thing.radius)
        coverage = np.clip(0.5 - _distance(thing.shape, x[None, :], y[:, None]) / pixel, 0, 1)[..., None]
        picture += coverage * (np.asarray(thing.rgb, np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def _polygon(shape: str) -> np.ndarray:
    """Corners (n, 2) of a shape of radius about 1, centred on its bounding box."""
    if shape == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        return 0.88 * np.asarray(corners, np.float32)
    if shape == "triangle":
        return np.asarray([(0, -0.95), (1.05, 0.95), (-1.05, 0.95)], np.float32)
    if shape == "cross":
        a, b = 0.34, 1.0
        right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        return np.asarray(right + [(-x, y) for x, y in reversed(right)], np.float32)
    angle = np.pi * np.arange(10) / 5  # star: five points out, five in, alternating
    reach = np.where(np.arange(10) % 2, 0.46, 1.12)
    corners = np.stack([np.sin(angle) * reach, -np.cos(angle) * reach], 1)
    return np.asarray(corners - (corners.max(0) + corners.min(0)) / 2, np.float32)


_CORNERS = {shape: _polygon(shape) for shape in ("square", "triangle", "star", "cross")}


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance from (x, y) to the outline of a unit shape, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    corners = _CORNERS[shape]
    x, y = np.broadcast_arrays(x, y)
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ey:  # even-odd rule: count the edges crossed by a ray to the right
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


# --- captions ---------------------------------------------------------------------------------------------


def captions(scene: Scene, seed: int, index: int) -> dict[str, str]:
    """Four captions by name, short, medium, long and full, each in a wording drawn from `(seed, index)`."""
    draw = _Draw(seed + 1_000_003, index)
    opening = draw.choice(("", "a picture of ", "an image of ", "a drawing of "))
    ground = draw.choice((" on a {} background", " against a {} background", ", {} background"))
    ground = ground.format(scene.background)
    first, *rest = scene.things
    if not rest:
        where = draw.choice((" at the {}", " in the {}")).format(scene.place)
        if scene.place == "centre":
            where = " in the centre"
        return {
            "short": f"{opening}{_noun(first)}",
            "medium": f"{opening}{_noun(first)}{ground}",
            "long": f"{opening}{_noun(first, sized=True)}{where}",
            "full": f"{opening}{_noun(first, sized=True)}{where}{ground}",
        }
    between = draw.choice((" {} ", " that is {} ", " placed {} ")).format(scene.relation)
    return {
        "short": f"{opening}{_noun(first)} and {_noun(rest[0])}",
        "medium": f"{opening}{_noun(first)}{between}{_noun(rest[0])}",
        "long": f"{opening}{_noun(first)}{between}{_noun(rest[0])}{ground}",
        "full": f"{opening}{_noun(first, sized=True)}{between}{_noun(rest[0], sized=True)}{ground}",
    }


def prompt(scene: Scene) -> str:
    """The plain full caption, which names every attribute the reader checks."""
    first, *rest = scene.things
    ground = f" on a {scene.background} background"
    if rest:
        return f"{_noun(first, sized=True)} {scene.relation} {_noun(rest[0], sized=True)}{ground}"
    where = "in the centre" if scene.place == "centre" else f"at the {scene.place}"
    return f"{_noun(first, sized=True)} {where}{ground}"


def _noun(thing: Thing, sized: bool = False) -> str:
    words = f"{thing.size} {thing.colour} {thing.shape}" if sized else f"{thing.colour} {thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# --- the reader -------------------------------------------------------------------------------------------

_GRID = 24  # silhouettes are compared on a grid of this many points a side
_STEPS = (np.arange(_GRID) + 0.5) / _GRID


def _silhouette(shape: str) -> tuple[np.ndarray, float]:
    """A shape's coverage over its own bounding box, and the half-side of that box for radius 1."""
    fine = np.linspace(-1.3, 1.3, 521, dtype=np.float32)
    inside = _distance(shape, fine[None, :], fine[:, None]) <= 0
    columns, rows = fine[inside.any(0)], fine[inside.any(1)]
    half = (np.ptp(columns) / 2, np.ptp(rows) / 2)
    x = (columns.mean() + half[0] * (2 * _STEPS - 1)).astype(np.float32)
    y = (rows.mean() + half[1] * (2 * _STEPS - 1)).astype(np.float32)
    soft = np.clip(0.5 - _distance(shape, x[None, :], y[:, None]) * _GRID / 2, 0, 1)
    return soft, float(np.mean(half))


_SILHOUETTES = {shape: _silhouette(shape) for shape in SHAPES}


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader sees: the background and the things on it, largest first."""

    background: str
    things: tuple[Thing, ...]


def read(picture: np.ndarray) -> Reading:
    """Say what is on a picture, (h, h, 3) uint8, or float in [0, 1]."""
    pixels = np.asarray(picture, np.float32) * (255.0 if np.issubdtype(picture.dtype, np.floating) else 1.0)
    side = pixels.shape[0]
    names = np.array([*BACKGROUNDS, *COLOURS])
    palette = np.asarray([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)
    label = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)

    border = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]])
    background = int(np.bincount(border, minlength=len(names))[: len(BACKGROUNDS)].argmax())
    ground = np.median(pixels[label == background], 0) if (label == background).any() else palette[background]

    things = []
    smallest = 0.25 * (SIZES["small"] * side) ** 2  # a thin ring still covers 1.4 r^2; edge slivers cover far less
    for colour in range(len(BACKGROUNDS), len(names)):
        parts = np.zeros(label.shape, np.int32)
        ndimage.label(label == colour, np.ones((3, 3)), parts)
        for part, window in enumerate(ndimage.find_objects(parts), 1):
            own = parts[window] == part
            if own.sum() >= smallest and ndimage.binary_erosion(own).sum() >= 0.2 * own.sum():
                things.append(_read_thing(pixels, ground, names[colour], np.median(pixels[window][own], 0), window))
    things = [thing for thing in things if thing is not None]
    return Reading(str(names[background]), tuple(sorted(things, key=lambda thing: -thing.radius)))


def _read_thing(pixels: np.ndarray, ground: np.ndarray, colour: str, rgb: np.ndarray, window) -> Thing | None:
    """Fit one object: `rgb` on `ground`, somewhere in `window` (a pair of slices) or one pixel round it."""
    side = pixels.shape[0]
    top, left = (max(0, edge.start - 2) for edge in window)
    bottom, right = (min(side, edge.stop + 2) for edge in window)
    axis = rgb - ground
    # how much of each pixel is the object: its place on the line from the background's colour to the object's
    offset = pixels[top:bottom, left:right] - ground
    coverage = np.clip(offset @ axis / (axis @ axis), 0, 1)
    stray = offset - coverage[..., None] * axis
    coverage = np.where((stray**2).sum(-1) < 0.25 * (axis @ axis), coverage, 0)
    (y0, y1), (x0, x1) = _extent(coverage.max(1)), _extent(coverage.max(0))
    if y1 - y0 < 2 or x1 - x0 < 2 or not 0.6 < (x1 - x0) / (y1 - y0) < 1.6:
        return None
    grid = np.meshgrid(y0 + _STEPS * (y1 - y0) - 0.5, x0 + _STEPS * (x1 - x0) - 0.5, indexing="ij")
    seen = ndimage.map_coordinates(coverage, grid, order=1, mode="nearest")
    overlap = {
        shape: np.minimum(seen, known).sum() / np.maximum(seen, known).sum()
        for shape, (known, _) in _SILHOUETTES.items()
    }
    shape = max(overlap, key=overlap.__getitem__)
    if overlap[shape] < 0.6:
        return None
    radius = (y1 - y0 + x1 - x0) / 4 / side / _SILHOUETTES[shape][1]
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    x, y = (left + (x0 + x1) / 2) / side, (top + (y0 + y1) / 2) / side
    return Thing(
        str(colour), shape, size, float(x), float(y), float(radius), (float(rgb[0]), float(rgb[1]), float(rgb[2]))
    )


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile of coverages rises through one half and falls again, in pixels, to a fraction of one."""
    inside = np.flatnonzero(profile >= 0.5)
    if not len(inside):
        return 0.0, 0.0
    first, last = inside[0], inside[-1]
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return float(first - before), float(last + 1 + after)


def score(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Which attributes of `scene` the reading shows, by kind, and `all`: every one of them and nothing besides."""
    right = dict.fromkeys(scene.attributes(), False)
    right["background"] = reading.background == scene.background
    if len(reading.things) == len(scene.things):
        things = _matched(scene, reading)
        for kind in ("colour", "shape", "size"):
            right[kind] = all(getattr(a, kind) == getattr(b, kind) for a, b in zip(things, scene.things, strict=True))
        if scene.relation:
            dx, dy = RELATIONS[scene.relation]
            along = (things[0].x - things[1].x, things[0].y - things[1].y)
            right["relation"] = along[0] * dx + along[1] * dy > max(abs(along[0] * dy), abs(along[1] * dx), 0.1)
        else:
            right["place"] = _place(things[0].x, things[0].y) == scene.place
    return right | {"all": all(right.values())}


def _matched(scene: Scene, reading: Reading) -> tuple[Thing, ...]:
    """The things read, in the order that agrees best with the scene's colours and shapes."""
    orders = [reading.things, reading.things[::-1]]

    def agreement(order):
        pairs = list(zip(order, scene.things, strict=True))
        return sum((a.colour == b.colour) + (a.shape == b.shape) for a, b in pairs)

    return max(orders, key=agreement)


# --- the exam ---------------------------------------------------------------------------------------------


def exam(seed: int, count: int, num_things: int) -> list[Scene]:
    """Scenes with held-out pairs, whose `prompt` a model is asked to draw."""
    return [scene(seed, index, two=num_things - 1, held_out=True) for index in range(count)]


def mark(scenes: list[Scene], pictures: np.ndarray) -> dict[str, float]:
    """Share of pictures right in each attribute, and in `all` of them at once."""
    marks = [score(asked, read(picture)) for asked, picture in zip(scenes, pictures, strict=True)]
    kinds = dict.fromkeys(kind for one in marks for kind in one)
    return {kind: float(np.mean([one[kind] for one in marks if kind in one])) for kind in kinds}


def mark_classes(class_ids: list[int], pictures: np.ndarray) -> float:
    """Share of pictures that show exactly one thing, of the colour and shape that the label names."""
    right = []
    for class_id, picture in zip(class_ids, pictures, strict=True):
        things = read(picture).things
        right.append(len(things) == 1 and things[0].class_id == class_id)
    return float(np.mean(right))
