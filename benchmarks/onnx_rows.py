"""Drawing pictures on the CPU: onnxruntime from an ONNX folder beside our own torch, same steps, noise and threads.

The committed pipeline of shapes, whose pictures are asserted to be the same before anything is timed.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Row, compare
from inference.pipeline import Pipeline

CHECKPOINT = "assets/shapes/pipeline"
STEPS = 20
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "star")]


def onnx_rows() -> Iterator[Row]:
    """A picture alone and one of four, by float32 and by int8 networks; ours is ONNX, usual is torch."""
    from inference.export.onnx_export import quantize, to_onnx
    from inference.export.onnx_sample import OnnxPipeline

    usual = Pipeline.load(CHECKPOINT, device="cpu")
    sampler = replace(usual.description.sampler, steps=STEPS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        to_onnx(usual, folder, "shapes")
        for kind in ("float32", "int8"):
            if kind == "int8":
                quantize(folder)
            ours = OnnxPipeline(folder, torch.get_num_threads())

            def draw_ours(count: int, ours: OnnxPipeline = ours) -> np.ndarray:
                return ours.generate(PROMPTS[:count], sampler={"steps": STEPS})

            def draw_usual(count: int) -> np.ndarray:
                return usual.generate(PROMPTS[:count], sampler=sampler)

            if kind == "float32":  # else the two would not do the same work
                apart = np.abs(draw_ours(len(PROMPTS)).astype(int) - draw_usual(len(PROMPTS))).max()
                assert apart <= 1, f"pictures are {apart} of 255 apart"
            for count in (1, len(PROMPTS)):
                row = compare(
                    f"ONNX {kind}: a picture, {STEPS} steps, batch {count}",
                    lambda draw=draw_ours, count=count: draw(count),
                    lambda draw=draw_usual, count=count: draw(count),
                    rounds=3,
                )
                yield row.each(count)


if __name__ == "__main__":
    for row in onnx_rows():
        print(row)
