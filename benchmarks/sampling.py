"""Drawing pictures: our pipeline beside diffusers', the same weights, noise, steps, guidance and threads in one run.

Both are small, with random weights, and each is read from a folder of its own: what a picture costs besides its network
shows most there. That both draw the same picture is asserted before anything is timed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Row, compare, memory
from diffusion.objective import NetworkTime, ObjectiveConfig, Prediction
from diffusion.sample import Sampler
from diffusion.schedule import Path as NoisePath
from diffusion.timesteps import TimeLaw
from inference.description import Description, SamplerConfig
from inference.export.pipeline import to_public
from inference.export.scheduler import walked
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.base import ModelConfig
from models.mmdit import MMDiTConfig
from models.text import Conditioner, TextConfig
from models.unet import UNetConfig
from models.weights import save_denoiser

SHAPES = "assets/shapes"
SIDE, STEPS, GUIDANCE = 128, 20, 3.0
TOKENS = 32  # zeros for T5's
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "pink") for shape in ("circle", "star")]
# The shortest program that draws one picture with diffusers.
USUAL = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
options = dict(guidance_scale={GUIDANCE}, num_inference_steps=8, generator=torch.Generator().manual_seed(0))
pipeline("a red circle", **options).images[0].save(sys.argv[2])
"""


@dataclass(slots=True, kw_only=True)
class Case:
    """What a pipeline is made of."""

    name: str
    network: ModelConfig
    text: TextConfig
    objective: ObjectiveConfig


SDXL = Case(
    name="SDXL, 2.9 M",
    network=UNetConfig(
        in_channels=8, base_size=16, channels=[48, 96], depths=[1, 1], heads=[2, 4], layers=1, text_dim=192,
        vector_dim=128 + 6 * 256, groups=16, linear_projection=True,
    ),
    text=TextConfig(path=SHAPES, masked=False, zero_null=True),
    objective=ObjectiveConfig(network_time=NetworkTime.index),
)  # fmt: skip
SD3 = Case(
    name="SD3, 2.6 M",
    network=MMDiTConfig(
        in_channels=8, base_size=16, hidden=128, depth=4, heads=4, text_dim=256, pooled_dim=256, positions="crop",
        table_size=16, qk_norm=True,
    ),
    text=TextConfig(
        path=SHAPES, encoders=["text_encoder_2"] * 2, tokenizers=["tokenizer_2"] * 2, masked=False, empty=TOKENS,
        width=256,
    ),
    objective=ObjectiveConfig(
        prediction=Prediction.flow, path=NoisePath.linear, times=TimeLaw.logit_normal, shift=2.0
    ),
)  # fmt: skip


class Pair:
    """A pipeline in both layouts, in `ours` and `usual` of a folder, and read from there."""

    def __init__(self, case: Case, folder: Path):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # about a T5 that is left out
        diffusers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        denoiser: Any = case.network.build().eval()
        with torch.no_grad():
            for parameter in denoiser.parameters():  # at its start a network says nothing
                parameter.add_(0.03 * torch.randn_like(parameter))
        description = Description(
            objective=case.objective, sampler=SamplerConfig(name=Sampler.euler, steps=STEPS, guidance=GUIDANCE),
            vae=AutoencoderConfig(path=SHAPES), text=case.text, resolution=SIDE, num_classes=None,
        )  # fmt: skip
        conditioner = Conditioner(case.text.build(), None, getattr(case.network, "vector_dim", 0))
        to_public(Pipeline(denoiser, conditioner, description.vae.build(), description)).save_pretrained(
            folder / "usual"
        )
        save_denoiser(denoiser, folder / "ours" / "denoiser", name="ema")
        description.save(folder / "ours")

        self._third: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if case is SD3 else {}
        self.ours = Pipeline.load(folder / "ours", device="cpu")
        self.usual: Any = diffusers.DiffusionPipeline.from_pretrained(folder / "usual", **self._third)
        self.usual.set_progress_bar_config(disable=True)

    def draw_ours(self, count: int, steps: int = STEPS) -> np.ndarray:
        """(count, h, w, 3) in [0, 1]."""
        sampler = replace(self.ours.description.sampler, steps=steps)
        times = walked(self.usual.scheduler, steps)
        return self.ours.generate(PROMPTS[:count], sampler=sampler, times=times) / 255

    def draw_usual(self, count: int, steps: int = STEPS) -> np.ndarray:
        options: dict[str, Any] = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "output_type": "np"}
        if self._third:
            options |= {"max_sequence_length": TOKENS, "sigmas": [1 - i / steps for i in range(steps)]}
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return self.usual(PROMPTS[:count], generator=generators, height=SIDE, width=SIDE, **options).images


def sampling() -> Iterator[Row]:
    """A picture alone and one of eight, the peak of memory for eight, and a whole program that draws one."""
    for case in (SDXL, SD3):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pair = Pair(case, folder)
            require_same_pictures(pair)
            for count in (1, len(PROMPTS)):
                row = compare(
                    f"{case.name}: a picture, {STEPS} steps, batch {count}",
                    lambda pair=pair, count=count: pair.draw_ours(count),
                    lambda pair=pair, count=count: pair.draw_usual(count),
                    rounds=7 if count == 1 else 3,
                )
                yield row.each(count)
            (ours, _), (usual, _) = (  # of any number of steps
                memory(lambda draw=draw: draw(len(PROMPTS), 2)) for draw in (pair.draw_ours, pair.draw_usual)
            )
            yield Row(name=f"{case.name}: batch {len(PROMPTS)}, peak", ours=ours, usual=usual, unit="MiB")
            if case is SDXL:
                yield first_picture(folder)


def require_same_pictures(pair: Pair) -> None:
    """Else the two would not do the same work. Ours are rounded to bytes."""
    ours, usual = pair.draw_ours(len(PROMPTS)), pair.draw_usual(len(PROMPTS))
    assert usual.std() > 0.05, "pictures are flat"
    assert (apart := float(np.abs(ours - usual).max())) < 1e-2, f"pictures are {apart} apart"


def first_picture(folder: Path) -> Row:
    """A program from its start to a PNG: scripts/sample.py against the shortest one with diffusers."""

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], check=True, capture_output=True)

    options = ("--prompt", "a red circle", "--steps", "8", "--out", str(folder / "pictures"))
    return compare(
        "a program that draws one picture, 8 steps",
        lambda: run("scripts/sample.py", "--checkpoint", str(folder / "ours"), *options),
        lambda: run("-c", USUAL, str(folder / "usual"), str(folder / "picture.png")),
        rounds=3,
    )
