"""A pipeline as a folder of ONNX files, for machines without torch; `inference.export.onnx_sample` draws from it.

    denoiser.onnx         x (b, c, h, w), t (b,) and what it reads of text, text_mask, pooled, class_id, size_ids
    decoder.onnx          z (b, c, h, w), latents / scale + shift  ->  pixels
    text_encoder_1.onnx   ids (b, n), of T5 also mask (b, n)       ->  states, of some CLIPs also pooled
    tokenizer_1.json      of the library tokenizers
    sampling.json         all that a sampler must know beside the networks

Batch, height, width and the denoiser's tokens are dynamic; a text encoder always reads its own length. Weights lie in
the file itself below 2 GB, the most that its format holds, else in a second one beside it. Everything is float32.
Each network is compared with torch's before the folder is there, at a size and a batch it was not traced with.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.schedule import table_times
from inference.description import plain
from inference.export.onnx_math import SAMPLERS
from inference.export.onnx_sample import ABOUT, OnnxPipeline
from inference.pipeline import Pipeline
from models.autoencoder import numbers
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import SIZE_COLUMNS, TextEncoders
from models.unet import SIZE_DIM, UNetConfig

OPSET = 20
OPSETS = range(18, 23)  # torch's exporter begins with 18; of 23 onnxruntime refuses Attention with a mask of one row
EXTERNAL_FROM = 2 * 10**9  # bytes; protobuf's limit is 2^31
CLOSE = 1e-3  # of the largest number, how far apart torch and onnxruntime may be
QUANTIZED = ("MatMul", "Gemm")  # convolutions stay: dynamic int8 ones are slower on a CPU
PROMPTS = ("a photograph of a red apple", "a large blue star")  # of the pictures that measure an error

Names = dict[str, Any]


def to_onnx(
    pipeline: Pipeline, folder: Path, title: str, *, opset: int = OPSET, external_from: int = EXTERNAL_FROM
) -> Names:
    """Write a pipeline's networks, tokenizers and sampling.json into a folder; returns what the latter holds.

    ValueError names what cannot be written, and what can.
    """
    refuse(pipeline, opset)
    writer = _Writer(folder, opset, external_from)
    networks = {"denoiser": "denoiser.onnx", "decoder": "decoder.onnx"}
    reads = _reads(pipeline)
    writer.write("denoiser.onnx", _Denoiser(pipeline.denoiser, reads), _denoiser_inputs(pipeline, reads))
    writer.write("decoder.onnx", _Decoder(pipeline.autoencoder.module), _decoder_inputs(pipeline))
    text = pipeline.conditioner.text
    encoders = _write_text(text, writer) if text else []
    networks |= {one["network"]: f"{one['network']}.onnx" for one in encoders}
    about = {
        "title": title,
        "opset": opset,
        "networks": networks,
        "reads": reads,
        "differences": writer.differences,
        **_sampling(pipeline),
        "text": _text(text, encoders) if text else None,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return about


def refuse(pipeline: Pipeline, opset: int = OPSET) -> None:
    """ValueError if this cannot be an ONNX folder."""
    config, text, objective = pipeline.denoiser.config, pipeline.conditioner.text, pipeline.description.objective
    if opset not in OPSETS:
        raise ValueError(
            f"--opset {opset} is not written here; choose {OPSETS[0]} to {OPSETS[-1]}: torch's exporter begins with"
            f" {OPSETS[0]}, and onnxruntime does not run all that it makes of later ones"
        )
    if not isinstance(config, CCDiTConfig | PixArtConfig | MMDiTConfig | UNetConfig):
        raise ValueError(f"{type(config).__name__} has no inputs known here; give a ccdit, pixart, mmdit or unet")
    if objective.range[1] < 1:
        raise ValueError(
            f"objective.range={objective.range} makes this a refiner, which goes on with another's latents, and an ONNX"
            " folder draws from noise; export the base, and refine with scripts/sample.py --refiner"
        )
    parts = [part for part in (pipeline.denoiser, text, pipeline.autoencoder) if part is not None]
    places = {parameter.device.type for part in parts for parameter in part.parameters()}
    if places != {"cpu"} or (text is not None and text.home is not None):
        raise ValueError(
            f"the weights are on {', '.join(sorted(places))} or offloaded, and ONNX is written from main memory;"
            " load the pipeline with device=cpu and offload=none"
        )
    types = {parameter.dtype for parameter in pipeline.denoiser.parameters()} | {pipeline.dtype}
    if other := types - {torch.float32}:
        raise ValueError(
            f"the network computes in {', '.join(sorted(str(kind).removeprefix('torch.') for kind in other))}, but ONNX"
            " is written in float32; leave --dtype away, or give --quantize int8 for smaller files"
        )


# --- networks ----------------------------------------------------------------------------------------------


class _Denoiser(nn.Module):
    """A denoiser whose condition comes as arguments."""

    def __init__(self, network: Any, reads: list[str]):
        super().__init__()
        self.network, self.reads = network, reads

    def forward(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return self.network(x, t, Cond(**dict(zip(self.reads, cond, strict=True))))


class _Decoder(nn.Module):
    def __init__(self, module: Any):
        super().__init__()
        self.module = deepcopy(module).float()

    def forward(self, z: Tensor) -> Tensor:
        return self.module.decode(z).sample


class _Clip(nn.Module):
    def __init__(self, encoder: Any, penultimate: bool):
        super().__init__()
        self.encoder, self.penultimate = deepcopy(encoder).float(), penultimate

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(ids, output_hidden_states=True)
        states = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        pooled = output.get("text_embeds")
        return (states,) if pooled is None else (states, pooled)


class _T5(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = deepcopy(encoder).float()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(ids, attention_mask=mask).last_hidden_state,)


def _reads(pipeline: Pipeline) -> list[str]:
    """The fields of a Cond that the denoiser reads."""
    config, text = pipeline.denoiser.config, pipeline.conditioner.text
    if isinstance(config, CCDiTConfig):
        return ["class_id"]
    reads = ["text", "text_mask"] if text is None or text.config.masked else ["text"]
    if isinstance(config, MMDiTConfig) or getattr(config, "vector_dim", 0):
        reads.append("pooled")
    return [*reads, "size_ids"] if getattr(config, "vector_dim", 0) else reads


Inputs = Callable[[bool], dict[str, tuple[Tensor, dict[int, Any]]]]  # each input and its dynamic dimensions


def _dimension(name: str) -> Any:
    return torch.export.Dim(name, min=1)


def _denoiser_inputs(pipeline: Pipeline, reads: list[str]) -> Inputs:
    """Inputs to trace with, or, if asked for others, of another batch, size and number of tokens."""
    config, text = pipeline.denoiser.config, pipeline.conditioner.text
    p, batch = config.patch_size, _dimension("batch")
    # what a UNet halves must not come to one cell, which the tracer takes for a side that is always one
    levels = len(getattr(config, "channels", []))
    unit = 2 ** (levels - 1) if levels else 2 * p
    rows, columns = (p * _dimension(name) if p > 1 else _dimension(name) for name in ("rows", "columns"))
    pooled = text.pooled_width if text else getattr(config, "pooled_dim", 0)

    def inputs(others: bool) -> dict[str, tuple[Tensor, dict[int, Any]]]:
        b, height, width, n = (3, 3 * unit, 2 * unit, 5) if others else (2, 2 * unit, 3 * unit, 7)
        numbers = torch.Generator().manual_seed(b)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=numbers)

        token = {0: batch, 1: _dimension("tokens")}
        known = {
            "text": lambda: (normal(b, n, config.text_dim), token),
            "text_mask": lambda: (torch.arange(n) < torch.arange(n - b, n)[:, None], token),
            "pooled": lambda: (normal(b, pooled), {0: batch}),
            "class_id": lambda: (torch.arange(b) % config.num_classes, {0: batch}),
            "size_ids": lambda: (64 * normal(b, len(_size_columns(pipeline))).abs(), {0: batch}),
        }
        x = normal(b, config.in_channels, height, width), {0: batch, 2: rows, 3: columns}
        t = torch.linspace(0.1, 0.9, b), {0: batch}
        return {"x": x, "t": t} | {name: known[name]() for name in reads}

    return inputs


def _decoder_inputs(pipeline: Pipeline) -> Inputs:
    free = {0: _dimension("batch"), 2: _dimension("rows"), 3: _dimension("columns")}

    def inputs(others: bool) -> dict[str, tuple[Tensor, dict[int, Any]]]:
        shape = (3, pipeline.autoencoder.channels, *((5, 4) if others else (4, 6)))
        return {"z": (torch.randn(shape, generator=torch.Generator().manual_seed(0)), free)}

    return inputs


def _text_inputs(length: int, vocabulary: int, masked: bool) -> Inputs:
    free = {0: _dimension("batch")}

    def inputs(others: bool) -> dict[str, tuple[Tensor, dict[int, Any]]]:
        b = 3 if others else 2
        ids = torch.randint(vocabulary, (b, length), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(length) < torch.arange(1, b + 1)[:, None] * length // b).long()
        return {"ids": (ids, free)} | ({"mask": (mask, free)} if masked else {})

    return inputs


def _write_text(text: TextEncoders, writer: "_Writer") -> list[Names]:
    """Write encoders and tokenizers; what a sampler must know of each."""
    found = []
    for number, (tokenizer, encoder) in enumerate(zip(text.tokenizers, text.encoders, strict=True), 1):
        module: Any = encoder
        clip = module.config.model_type == "clip_text_model"
        length = text.clip_length if clip else text.config.length or 0
        inputs = _text_inputs(length, module.get_input_embeddings().num_embeddings, not clip)
        network = _Clip(module, text.config.penultimate) if clip else _T5(module)
        writer.write(f"text_encoder_{number}.onnx", network, inputs)
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(
                f"the tokenizer {text.config.tokenizers[number - 1]} is a {type(tokenizer).__name__} of Python alone;"
                " give one that has a tokenizer.json"
            )
        tokenizer.backend_tokenizer.save(str(writer.folder / f"tokenizer_{number}.json"))
        special = tokenizer("").input_ids
        inside = len(special) - (special[-1:] == [tokenizer.eos_token_id])
        found.append(
            {
                "network": f"text_encoder_{number}",
                "tokenizer": f"tokenizer_{number}.json",
                "clip": clip,
                "length": length,
                "start": special[:inside],
                "end": special[inside:],
                "pad": tokenizer.pad_token_id,
            }
        )
    return found


class _Writer:
    """Writes networks into a folder, and keeps how far each is from torch."""

    def __init__(self, folder: Path, opset: int, external_from: int):
        self.folder, self.opset, self.external_from = folder, opset, external_from
        self.differences: dict[str, float] = {}

    @torch.no_grad()
    def write(self, file: str, network: nn.Module, inputs: Inputs) -> None:
        """Trace, write, compare."""
        network.eval()
        given = inputs(False)
        arguments = tuple(x for x, _ in given.values())
        shapes = [dimensions for _, dimensions in given.values()]
        if isinstance(network, _Denoiser):  # its forward has the rest as one tuple
            shapes = [*shapes[:2], tuple(shapes[2:])]
        try:
            with _quietly():
                program: Any = torch.onnx.export(
                    network, arguments, dynamo=True, opset_version=self.opset, input_names=list(given),
                    dynamic_shapes=tuple(shapes), verbose=False,
                )  # fmt: skip
        except Exception as error:  # a tracer meets what any code of a network may raise
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            reason = " ".join(str(root).split())[:200]
            raise ValueError(
                f"{file} cannot be written, as torch.onnx does not follow a {_kind(network)} ({reason}); known to work"
                " are our four denoisers, CLIP, T5 and T5Gemma"
            ) from error
        program.model.metadata_props.update({"triptych.network": _kind(network), "triptych.opset": str(self.opset)})
        size = sum(parameter.nbytes for parameter in network.parameters())
        program.save(self.folder / file, external_data=size >= self.external_from)
        self.differences[file] = self._difference(file, network, inputs)

    def _difference(self, file: str, network: nn.Module, inputs: Inputs) -> float:
        import onnxruntime

        others = {name: x for name, (x, _) in inputs(True).items()}
        wanted = network(*others.values())
        wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
        session = onnxruntime.InferenceSession(self.folder / file, providers=["CPUExecutionProvider"])
        got: Any = session.run(None, {name: x.numpy() for name, x in others.items()})
        apart = [float(np.abs(y - x.numpy()).max()) for x, y in zip(wanted, got, strict=True)]
        if any(not d <= CLOSE * max(1.0, float(x.abs().max())) for d, x in zip(apart, wanted, strict=True)):
            raise ValueError(
                f"{file} computes something else than torch does, by up to {max(apart):.2g}; choose another --opset, or"
                " another version of onnxruntime"
            )
        return max(apart)


def _kind(network: Any) -> str:
    inner = getattr(network, "network", None) or getattr(network, "encoder", None) or network.module
    return type(inner).__name__


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of itself, such as that torchvision is not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- sampling.json -----------------------------------------------------------------------------------------


def _sampling(pipeline: Pipeline) -> Names:
    """All that is neither a network nor of the text."""
    description, autoencoder, config = pipeline.description, pipeline.autoencoder, pipeline.denoiser.config
    table = getattr(config, "table_size", 0) if getattr(config, "positions", "") == "crop" else 0
    unit = autoencoder.factor * config.patch_size
    return {
        "objective": plain(description.objective),
        "sampler": plain(description.sampler),
        "times": {
            "table": pipeline.objective.table.tolist(),
            "ends": table_times(description.objective.betas)[[0, -1]].tolist(),
        },
        "resolution": description.resolution,
        "num_classes": description.num_classes,
        "latent": {
            "channels": autoencoder.channels,
            "factor": autoencoder.factor,
            "scale": numbers(autoencoder.scale),
            "shift": numbers(autoencoder.shift),
            "multiple": unit,
            "largest": table * unit or None,
        },
        "size_columns": _size_columns(pipeline),
    }


def _size_columns(pipeline: Pipeline) -> list[int]:
    """Which of height, width, top, left, height, width, aesthetic the denoiser reads."""
    text, width = pipeline.conditioner.text, getattr(pipeline.denoiser.config, "vector_dim", 0)
    return SIZE_COLUMNS[(width - text.pooled_width) // SIZE_DIM] if text and width else []


def _text(text: TextEncoders, encoders: list[Names]) -> Names:
    config = text.config
    known = ("masked", "lower", "empty", "width", "zero_null", "penultimate")
    return {"encoders": encoders, **{name: getattr(config, name) for name in known}}


# --- int8 --------------------------------------------------------------------------------------------------


def quantize(folder: Path) -> Names:
    """Make the denoiser's and the text encoders' products int8, in place, and measure what that changes.

    Weights by the channel, inputs as they come (onnxruntime's dynamic quantization). Returned, and kept in
    sampling.json: the largest and the mean difference of pictures in [0, 1], and the bytes of the files, before, after.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    about = json.loads((folder / ABOUT).read_text())
    before, bytes_before = _pictures(folder), _bytes(folder)
    for name, file in about["networks"].items():
        if name == "decoder":
            continue
        path, made = folder / file, folder / f"int8-{file}"
        external = path.with_name(f"{file}.data")
        logging.disable(logging.WARNING)  # it advises a step that is for convolutions
        try:
            quantize_dynamic(
                path, made, op_types_to_quantize=list(QUANTIZED), per_channel=True, weight_type=QuantType.QInt8,
                use_external_data_format=external.is_file(),
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        if external.is_file():
            _rename(made, path)
        else:
            os.replace(made, path)
    apart = np.abs(_pictures(folder) - before)
    measured = {
        "kind": "int8",
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "pictures": len(before),
        "bytes": [bytes_before, _bytes(folder)],
    }
    (folder / ABOUT).write_text(json.dumps(about | {"quantized": measured}, indent=1) + "\n")
    return measured


def _rename(made: Path, path: Path) -> None:
    """Give a model and its external data the names of those they replace."""
    import onnx

    model = onnx.load(made)
    path.unlink()
    path.with_name(f"{path.name}.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    for left in made.parent.glob(f"{made.name}*"):
        left.unlink()


def _pictures(folder: Path) -> np.ndarray:
    """Two pictures of the folder's own size and sampler: (2, 3, h, w) in [0, 1]."""
    pipeline = OnnxPipeline(folder)
    about = pipeline.about
    sampler = {} if about["sampler"]["name"] in SAMPLERS else {"name": "euler", "eta": None}
    subject: Names = {"prompts": PROMPTS} if about["text"] else {"class_ids": [0, about["num_classes"] - 1]}
    return (pipeline.decode(pipeline.draw(**subject, sampler=sampler)) + 1) / 2


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.onnx*"))
