"""Draw pictures from a folder of `scripts/export.py --format onnx`, without torch.

python -m inference.export.onnx_sample outputs/shapes-onnx --prompt "a small red circle" --out outputs/red.png
python -m inference.export.onnx_sample outputs/stage1-onnx --class-id 7 --steps 20 --size 256x384 --out outputs/7.png

What runs is onnxruntime, tokenizers and numpy. Prompts have the grammar of scripts/sample.py, and a seed gives its
picture there, within rounding. What is not given is as the checkpoint says.
"""

import argparse
import json
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from inference.export.onnx_math import Array, Noise, Objective, guided, sample
from inference.prompt import Part, parse

ABOUT = "sampling.json"  # all that a sampler must know beside the networks
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

Cond = dict[str, Array]  # what the denoiser reads, each a batch of rows
Tokens = list[tuple[int, float]]  # and the weight of each


class OnnxPipeline:
    """The networks of a folder, ready to draw; `about` is its sampling.json. `threads`: 0 is as many as there are."""

    def __init__(self, folder: str | Path, threads: int = 0):
        self.folder = Path(folder)
        if not (self.folder / ABOUT).is_file():
            raise ValueError(
                f"{folder} holds no {ABOUT}; give a folder that scripts/export.py --format onnx has written"
            )
        self.about: dict[str, Any] = json.loads((self.folder / ABOUT).read_text())
        self.objective = Objective(self.about["objective"], **self.about["times"])
        self._run = {name: _session(self.folder / file, threads) for name, file in self.about["networks"].items()}
        text = self.about["text"]
        self.text = TextEncoders(text, self.folder, self._run) if text else None

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        negative: str | Sequence[str] = "",
        class_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        sampler: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """Draw one picture for each prompt or class: (b, height, width, 3) uint8.

        `sampler` holds what is to differ from the checkpoint's own, by the names of SamplerConfig.
        """
        pixels = self.decode(
            self.draw(prompts, negative=negative, class_ids=class_ids, seeds=seeds, sampler=sampler, size=size)
        )
        return np.round((pixels + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)

    def draw(
        self,
        prompts: Sequence[str] | None = None,
        *,
        negative: str | Sequence[str] = "",
        class_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        sampler: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """`generate`, before the decoder: latents (b, c, h, w)."""
        self._require_subject(prompts, class_ids, negative)
        subjects: Sequence[Any] = (prompts if prompts is not None else class_ids) or []
        seeds = list(range(len(subjects))) if seeds is None else list(seeds)
        negatives = [negative] * len(subjects) if isinstance(negative, str) else list(negative)
        for name, given in (("seeds", seeds), ("negative", negatives)):
            if len(given) != len(subjects):
                raise ValueError(f"{name} has {len(given)} entries for {len(subjects)} pictures; give one a picture")
        how = self.about["sampler"] | dict(sampler or {})
        size = size or (self.about["resolution"], self.about["resolution"])
        shape = self._latent_shape(size)
        times = self.objective.grid(how["steps"], how["grid"], shape[1] * shape[2], how["rho"], how["ramp_max"])
        z = np.empty((len(subjects), *shape), np.float32)
        for chunks, rows in self._groups(prompts, negatives, how["steps"], len(subjects)).items():
            asked, opposed = [subjects[i] for i in rows], [negatives[i] for i in rows]
            conditions = (
                self._of_classes(asked, how["steps"])
                if self.text is None
                else self._of_prompts(asked, opposed, how, chunks, size)
            )
            z[rows] = self._walk(conditions, [Noise(seeds[i]) for i in rows], shape, how, times)
        return z

    def decode(self, latents: Array) -> Array:
        """Latents (b, c, h, w) to pixels (b, 3, height, width) in [-1, 1], one picture after the other."""
        latent = self.about["latent"]
        scale, shift = (np.reshape(latent[name], (-1, 1, 1)) for name in ("scale", "shift"))  # one, or one a channel
        z = (latents / scale + shift).astype(np.float32)
        return np.concatenate([self._run["decoder"]({"z": one[None]})[0] for one in z]).clip(-1, 1)

    def _walk(
        self, conditions: "Conditions", noises: list[Noise], shape: Sequence[int], how: Mapping[str, Any], times: Array
    ) -> Array:
        def fresh() -> Array:
            return np.stack([noise.normal(shape) for noise in noises])

        def network(x: Array, t: np.float32, cond: Cond) -> Array:
            known = {name: cond[name] for name in self.about["reads"]}
            return self._run["denoiser"]({"x": x, "t": np.full(len(x), t, np.float32)} | known)[0]

        x0_of = self.objective.denoise(network)
        starts = times[1:-1]

        def now(z: Array, t: np.float32, along: "Along") -> Array:
            return x0_of(z, t, along.at(int(np.sum(float(t) <= starts + 1e-6))))

        null, negative = conditions.null, conditions.negative
        if negative is not None and how["negative_scale"] is None:
            null, negative = negative, None
        denoise = guided(
            now, Along.cat, conditions.positive, null, how["guidance"],
            negative=None if negative is None else (negative, how["negative_scale"] or 0.0),
            rescale=how["rescale"], interval=how["interval"],
        )  # fmt: skip
        z = self.objective.start(fresh(), times)
        return sample(how["name"], lambda z, t: denoise(z, np.float32(t)), z, times, eta=how["eta"], noise=fresh)

    def _groups(self, prompts: Any, negatives: Sequence[str], steps: int, count: int) -> dict[int, list[int]]:
        """Pictures by the chunks that their prompts take: padding would change what a picture is shown."""
        if self.text is None:
            return {1: list(range(count))}
        groups: dict[int, list[int]] = {}
        for i, pair in enumerate(zip(prompts, negatives, strict=True)):
            parts = [part for prompt in pair for part in parse(prompt)]
            texts = {part.at(step, steps) for part in parts for step in range(steps)}
            groups.setdefault(self.text.chunks_needed(list(texts)), []).append(i)
        return groups

    def _of_prompts(
        self, prompts: list[str], negatives: list[str], how: Mapping[str, Any], chunks: int, size: tuple[int, int]
    ) -> "Conditions":
        """Conditions of b prompts and negative prompts; each distinct text on the way is encoded once."""
        assert self.text is not None
        steps, table = how["steps"], {}

        def rows(parts: Sequence[Part | None]) -> Array:
            texts = [[None if part is None else part.at(step, steps) for part in parts] for step in range(steps)]
            return np.array([[-1 if x is None else table.setdefault(x, len(table)) for x in row] for row in texts])

        composed = [parse(prompt) for prompt in prompts]
        columns = [[dict(enumerate(parts)).get(k) for parts in composed] for k in range(max(map(len, composed)))]
        positive = [
            (rows(parts), np.array([part.weight if part else 0 for part in parts], np.float32)) for parts in columns
        ]
        opposed = [_whole(parse(negative)) if negative else None for negative in negatives]
        negative = rows(opposed) if any(opposed) else None
        whole = self.text.encode([*table, ((("", 1.0),),)], chunks)
        if self.about["text"]["zero_null"]:
            for name in {"text", "pooled"} & whole.keys():
                whole[name][-1] = 0
        if "text_mask" in whole:  # after the last token that any has, all is padding
            last = 1 + int(np.flatnonzero(whole["text_mask"].any(axis=0)).max())
            whole |= {name: whole[name][:, :last] for name in ("text", "text_mask")}
        scores = how["aesthetic"], how["negative_aesthetic"]
        good, poor = (self._size_ids(size, len(prompts), score) for score in scores)
        none = np.full((steps, len(prompts)), -1)
        return Conditions(
            [(Along(whole, each, good), weights) for each, weights in positive],
            Along(whole, none, poor),
            None if negative is None else Along(whole, negative, poor),
        )

    def _of_classes(self, labels: list[int], steps: int) -> "Conditions":
        null = self.about["num_classes"]
        if wrong := [label for label in labels if not 0 <= label < null]:
            raise ValueError(f"class {wrong[0]} does not exist; this model knows classes 0 to {null - 1}")
        table = {"class_id": np.array([*labels, null])}
        each = np.tile(np.arange(len(labels)), (steps, 1))
        one = np.ones(len(labels), np.float32)
        return Conditions([(Along(table, each, {}), one)], Along(table, np.full_like(each, -1), {}), None)

    def _size_ids(self, size: tuple[int, int], count: int, aesthetic: float) -> Cond:
        if "size_ids" not in self.about["reads"]:
            return {}
        told = np.array([*size, 0, 0, *size, aesthetic], np.float32)[self.about["size_columns"]]
        return {"size_ids": np.tile(told, (count, 1))}

    def _require_subject(self, prompts: Any, class_ids: Any, negative: str | Sequence[str]) -> None:
        if self.text is None:
            if prompts is not None or class_ids is None:
                raise ValueError("this model is conditioned on classes: give class labels, not a prompt")
            if any(negative):
                raise ValueError("this model is conditioned on classes, which have no negative prompt; leave it away")
        elif prompts is None or class_ids is not None:
            raise ValueError("this model is conditioned on text: give a prompt, not a class label")

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for a picture of `size` pixels."""
        latent = self.about["latent"]
        unit, largest = latent["multiple"], latent["largest"]
        for name, side in (("height", size[0]), ("width", size[1])):
            if side <= 0 or side % unit:
                raise ValueError(f"{name}={side} must be a multiple of {unit}; choose {max(unit, side // unit * unit)}")
            if largest and side > largest:
                raise ValueError(f"{name}={side} is more than the positions of this model reach; choose {largest}")
        return latent["channels"], size[0] // latent["factor"], size[1] // latent["factor"]


@dataclass(slots=True)
class Along:
    """A condition for b pictures that may change with the steps: rows (steps, b) of `table`, and what never changes."""

    table: Cond
    rows: Array
    constant: Cond

    def at(self, step: int) -> Cond:
        """What the denoiser is given at a step."""
        return {name: x[self.rows[step]] for name, x in self.table.items()} | self.constant

    @staticmethod
    def cat(many: Sequence["Along"]) -> "Along":
        """Conditions on the same table as one batch."""
        constant = {name: np.concatenate([one.constant[name] for one in many]) for name in many[0].constant}
        return Along(many[0].table, np.concatenate([one.rows for one in many], 1), constant)


@dataclass(slots=True)
class Conditions:
    """Composed positive prompts with weights (b,), the null, and the negative prompt."""

    positive: list[tuple[Along, Array]]
    null: Along
    negative: Along | None


def _whole(parts: list[Part]) -> Part:
    """A negative prompt pushes away from all that it says at once: its ANDs begin chunks."""
    return parts[0] if len(parts) == 1 else Part(1.0, tuple(chain(*([*part.body, None] for part in parts))))


def _session(path: Path, threads: int) -> Callable[[Cond], list[Array]]:
    """A network of a file, from arrays by name to its outputs in their order."""
    import onnxruntime  # slow to import

    if not path.is_file():
        raise ValueError(f"{path} is missing; export the checkpoint again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    providers = [name for name in (CUDA, CPU) if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its own classes have no common one
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); export it again") from error
    return lambda inputs: [np.asarray(output) for output in session.run(None, inputs)]


# --- text --------------------------------------------------------------------------------------------------


class TextEncoders:
    """`models.text.TextEncoders` in numpy: several encoders read as one."""

    def __init__(self, about: Mapping[str, Any], folder: Path, run: Mapping[str, Callable[[Cond], list[Array]]]):
        from tokenizers import Tokenizer

        self.about, self._run = about, run
        self._tokenizers = [Tokenizer.from_file(str(folder / one["tokenizer"])) for one in about["encoders"]]
        for tokenizer in self._tokenizers:
            tokenizer.no_padding()
            tokenizer.no_truncation()

    def chunks_needed(self, prompts: Sequence[Any]) -> int:
        """Chunks of CLIP that hold the longest of the prompts; 1 where there is no CLIP."""
        clip = [i for i, one in enumerate(self.about["encoders"]) if one["clip"]]
        return max((len(chunks) for i in clip for chunks in self._chunks(i, prompts)), default=1)

    def encode(self, prompts: Sequence[Any], chunks: int) -> Cond:
        """Prompts, each segments of weighted fragments -> text (b, n, d), and text_mask and pooled where they are."""
        about = self.about
        clip, parts, pooled = [], [], []
        for i, one in enumerate(about["encoders"]):
            states, mask, vector = self._read(i, prompts, chunks)
            (clip if one["clip"] else parts).append((states, mask))
            pooled += [] if vector is None else [vector]
        if clip:
            parts.insert(0, (np.concatenate([states for states, _ in clip], -1), clip[0][1]))
        if about["empty"]:
            zeros = np.zeros((len(prompts), about["empty"], about["width"]), np.float32)
            parts.append((zeros, np.zeros(zeros.shape[:2], bool)))
        width = max(states.shape[-1] for states, _ in parts)
        wide = [np.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1]))) for states, _ in parts]
        cond = {"text": np.concatenate(wide, 1)}
        if about["masked"]:
            cond["text_mask"] = np.concatenate([mask for _, mask in parts], 1)
        return cond | ({"pooled": np.concatenate(pooled, -1)} if pooled else {})

    def _read(self, i: int, prompts: Sequence[Any], chunks: int) -> tuple[Array, Array, Array | None]:
        """States (b, n, width), mask (b, n), and pooled or None, of one encoder."""
        one = self.about["encoders"][i]
        if one["clip"]:
            rows = list(chain(*([*pieces, *[[]] * chunks][:chunks] for pieces in self._chunks(i, prompts))))
        else:
            chunks, rows = 1, [list(chain(*segments)) for segments in self._tokens(i, prompts)]
        ids, mask, weights = _rows(one, rows)
        read = mask if self.about["masked"] else np.ones_like(mask)
        given = {"ids": ids} | ({} if one["clip"] else {"mask": read.astype(np.int64)})
        states, *pooled = self._run[one["network"]](given)
        if (weights != 1).any():
            states = emphasised(states, weights)
        states, mask = (x.reshape(-1, chunks * x.shape[1], *x.shape[2:]) for x in (states, mask))
        return states, mask, pooled[0][::chunks] if pooled else None

    def _chunks(self, i: int, prompts: Sequence[Any]) -> list[list[Tokens]]:
        """Each prompt's chunks for CLIP; a segment without tokens is a chunk all the same."""
        one = self.about["encoders"][i]
        room = one["length"] - len(one["start"]) - len(one["end"])
        return [
            [segment[k : k + room] for segment in segments for k in range(0, max(len(segment), 1), room)]
            for segments in self._tokens(i, prompts)
        ]

    def _tokens(self, i: int, prompts: Sequence[Any]) -> list[list[Tokens]]:
        """Each prompt's segments as tokens and their weights, without the special ones."""

        def ids(text: str) -> list[int]:
            text = text.lower().strip() if self.about["lower"] else text
            return self._tokenizers[i].encode(text, add_special_tokens=False).ids

        return [
            [[(token, weight) for text, weight in segment for token in ids(text)] for segment in prompt]
            for prompt in prompts
        ]


def _rows(one: Mapping[str, Any], rows: list[Tokens]) -> tuple[Array, Array, Array]:
    """Ids, mask and weights (b, length) of rows of tokens, cut, with special tokens about them and padding behind."""
    length, (start, end) = one["length"], ([(token, 1.0) for token in one[key]] for key in ("start", "end"))
    full = [[*start, *row[: length - len(start) - len(end)], *end] for row in rows]
    padded = [[*row, *[(one["pad"], 1.0)] * (length - len(row))] for row in full]
    ids = np.array([[token for token, _ in row] for row in padded], np.int64)
    weights = np.array([[weight for _, weight in row] for row in padded], np.float32)
    return ids, np.arange(length) < np.array([[len(row)] for row in full]), weights


def emphasised(states: Array, weights: Array) -> Array:
    """States times weights, scaled to the mean that they had where that says something: see `models.text`."""
    weighted = states * weights[..., None]
    mean, after = states.mean((1, 2)), weighted.mean((1, 2))
    scale = mean / np.where(after == 0, 1, after)
    root = np.sqrt(np.square(states).mean((1, 2)))
    sound = (np.abs(mean) > root / 100) & (after != 0) & (scale > 1 / 4) & (scale < 4)
    return weighted * np.where(sound, scale, 1)[:, None, None].astype(np.float32)


# --- command line ------------------------------------------------------------------------------------------


def save_png(path: Path, pixels: Array) -> None:
    """(h, w, 3) uint8 as a PNG: its three chunks, and no filter."""

    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(lines)) + block(b"IEND", b"")
    )


def main() -> None:
    """Parse, draw, save; a user's error ends it with one sentence."""
    options = parser().parse_args()
    try:
        draw(options)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; run: pip install onnxruntime tokenizers numpy")
    except ValueError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m inference.export.onnx_sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("folder", type=Path, help="written by scripts/export.py --format onnx")
    add("--out", type=Path, required=True, help="PNG; of several pictures each gets its number before the suffix")
    add("--prompt", help="with weights (red:1.5), [a:b:0.5], [a|b], AND, BREAK")
    add("--class-id", type=int, help="for models conditioned on classes")
    add("--negative", default="", help="what to keep away from")
    add("--num-images", type=int, default=1)
    add("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    add("--size", metavar="HxW", help="in pixels")
    add("--sampler", dest="name", help="euler heun ddim ddpm euler_ancestral dpmpp_2m dpmpp_2m_sde")
    add("--grid", help="uniform trailing leading linspace karras exponential")
    add("--steps", type=int)
    for option in (
        "guidance",
        "negative-scale",
        "rescale",
        "eta",
        "rho",
        "ramp-max",
        "aesthetic",
        "negative-aesthetic",
    ):
        add(f"--{option}", type=float)
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise times at which guidance acts")
    add("--threads", type=int, default=0, help="of each operation (default: as many as there are)")
    return made


def draw(options: argparse.Namespace) -> None:
    """Draw as the options say."""
    if options.num_images < 1:
        raise ValueError(f"--num-images {options.num_images} draws nothing; give 1 or more")
    pipeline, count = OnnxPipeline(options.folder, options.threads), options.num_images
    sampler = {key: value for key in pipeline.about["sampler"] if (value := getattr(options, key, None)) is not None}
    if options.name not in (None, pipeline.about["sampler"]["name"]):
        sampler = {"eta": None, **sampler}  # another sampler has an eta of its own
    pictures = pipeline.generate(
        None if options.prompt is None else [options.prompt] * count,
        negative=options.negative,
        class_ids=None if options.class_id is None else [options.class_id] * count,
        seeds=[options.seed + i for i in range(count)],
        sampler=sampler,
        size=_size(options.size),
    )
    for i, picture in enumerate(pictures):
        out = options.out if count == 1 else options.out.with_name(f"{options.out.stem}-{i}{options.out.suffix}")
        save_png(out, picture)
        print(out)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size {text} is not HxW; give height and width in pixels, such as 128x192")
    return int(height), int(width)


if __name__ == "__main__":
    main()
