"""What the options that need less memory save, and what they change: `python benchmarks/memory.py` prints a table.

A UNet with random weights draws the latents of 512 px, 64 x 64 cells, in two steps with guidance; the autoencoder
decodes four pictures of 1024 px. Peaks are MiB of tensors over the weights (benchmarks/measure.py), seconds medians of
three. The difference is relative to the largest number.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import memory, seconds
from data import shapes
from inference.description import Description
from inference.device import Offload
from inference.pipeline import Pipeline
from models.unet import UNetConfig
from models.weights import save_denoiser

SIDE = 512


def checkpoint(folder: Path) -> None:
    """A pipeline with loud random weights."""
    config = UNetConfig(
        in_channels=8, base_size=64, channels=[64, 128], depths=[1, 1], heads=[2, 4], layers=1, groups=16,
        text_dim=192, vector_dim=1664, linear_projection=True,
    )  # fmt: skip
    torch.manual_seed(0)
    denoiser = config.build()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for name in ("model", "ema"):
        save_denoiser(denoiser, folder / "denoiser", name)
    known = Description.load(Path("assets/shapes/pipeline"))
    sampler = replace(known.sampler, steps=2, eta=0.0, interval=[0.0, 1.0])
    replace(known, sampler=sampler, resolution=SIDE).save(folder)


def main() -> None:
    """Measure each option against the same without it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint(folder)
        plain, disk = Pipeline.load(folder), Pipeline.load(folder, offload=Offload.disk)

        def draw(pipeline: Pipeline) -> Tensor:
            return pipeline.draw(["a red circle"], size=(SIDE, SIDE))

        print("| | peak | without | seconds | without | largest difference |\n|---|---|---|---|---|---|")
        before = Way(lambda: draw(plain))
        before.beside("weights on disk", Way(lambda: draw(disk)))
        plain.together = False
        before.beside("branches of guidance one by one", Way(lambda: draw(plain)))
        plain.together = True
        with sdpa_kernel(SDPBackend.MATH):  # what devices without a fused kernel do
            scores = Way(lambda: draw(plain))
            plain.attention_slices = 512
            scores.beside("512 queries at once, no fused kernel", Way(lambda: draw(plain)))
        plain.attention_slices = None
        latents = plain.autoencoder.encode(pictures(4, 1024))
        together = Way(lambda: plain.autoencoder.decode(latents))
        together.beside(
            "decode one by one", Way(lambda: torch.cat([plain.autoencoder.decode(z) for z in latents.split(1)]))
        )
        plain.autoencoder.tile()
        together.beside(
            "decode in tiles", Way(lambda: torch.cat([plain.autoencoder.decode(z) for z in latents.split(1)]))
        )
        held = [sum(p.nbytes for p in weights(one) if p.device.type != "meta") / 2**20 for one in (plain, disk)]
        print(f"\nWeights held: {held[0]:.1f} MiB, on disk {held[1]:.1f} MiB.")


def pictures(count: int, side: int) -> Tensor:
    """Shapes (count, 3, side, side) in [-1, 1]."""
    drawn = [shapes.render(shapes.scene(0, i), side) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1


def weights(pipeline: Pipeline) -> list[Tensor]:
    """All of a pipeline's weights."""
    parts = (pipeline.denoiser, pipeline.autoencoder, pipeline.conditioner.text)
    return [parameter for part in parts if part for parameter in part.parameters()]


class Way:
    """What one way to compute something takes, and what it gives."""

    def __init__(self, call: Callable[[], Tensor]):
        self.result = call()
        self.peak, _ = memory(call)
        self.seconds = statistics.median(seconds(call) for _ in range(3))

    def beside(self, name: str, other: "Way") -> None:
        """Print a row that compares another way with this one."""
        apart = (other.result - self.result).abs().max() / self.result.abs().max()
        print(
            f"| {name} | {other.peak:.0f} MiB | {self.peak:.0f} MiB | {other.seconds:.2f} | {self.seconds:.2f} |"
            f" {float(apart):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
