"""Training speed on a CUDA device, ours beside diffusers' classes in one run: bfloat16, latents and text already there.

    python benchmarks/accelerator.py                        full sizes
    python benchmarks/accelerator.py --tiny --device cpu    the same code on a CPU, to see that it runs

A step is forward, backward, clip, fused AdamW and EMA, alike for both: only the network differs. `graph` replays
forward and backward as one CUDA graph, for which shapes must be fixed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import seconds
from benchmarks.networks import TINY_DIT, TINY_MMDIT, TINY_UNET, Case, Pair
from models.ccdit import CCDiTConfig
from models.mmdit import MMDiTConfig
from models.unet import UNetConfig
from training.ema import EMA, EMAConfig
from training.flops import flops_per_image, peak_tflops
from training.optim import OptimConfig, build_optimizer, guarded_step

SD2 = UNetConfig(heads=[5, 10, 20, 20], text_dim=1024, linear_projection=True)
SDXL = UNetConfig(
    channels=[320, 640, 1280], depths=[0, 2, 10], middle_depth=10, heads=[5, 10, 20], text_dim=2048, vector_dim=2816,
    base_size=128, linear_projection=True,
)  # fmt: skip
FULL = (
    Case(name="UNet of SD 2, 512 px", config=SD2, side=64, tokens=77, batch=32),
    Case(name="DiT-XL/2, 256 px", config=CCDiTConfig(as_diffusers=True, positions="corner"), side=32, batch=64),
    Case(name="UNet of SDXL, 1024 px", config=SDXL, side=128, tokens=77, batch=4),
    Case(name="MMDiT 2B, 1024 px", config=MMDiTConfig(positions="crop"), side=128, tokens=154, batch=4),
)
TINY = (TINY_UNET, TINY_DIT, TINY_MMDIT)


def step_of(module: nn.Module, call: Callable[[], torch.Tensor], graph: bool) -> Callable[[], None]:
    """A whole step of a network that `call` calls."""
    optimizer, ema, free = build_optimizer(module, OptimConfig()), EMA(module, EMAConfig()), [*module.parameters()]

    def passes() -> None:
        call().float().square().mean().backward()

    replay = graphed(passes, free) if graph else passes

    def step() -> None:
        replay()
        gradients = [parameter.grad for parameter in free]
        guarded_step(optimizer, free, 1e-4, 1.0)
        ema.update(module, 10**6, 256)
        if graph:  # the graph adds to these very tensors
            for parameter, gradient in zip(free, gradients, strict=True):
                parameter.grad = gradient

    return step


def graphed(passes: Callable[[], None], free: list[nn.Parameter]) -> Callable[[], None]:
    """Both passes as one CUDA graph, warmed up beside the main stream as CUDA asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            passes()
    torch.cuda.current_stream().wait_stream(stream)
    for parameter in free:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()

    def replay() -> None:
        torch._foreach_zero_([parameter.grad for parameter in free if parameter.grad is not None])
        graph.replay()

    return replay


def measured(case: Case, device: str, steps: int, compiled: bool) -> list[dict[str, Any]]:
    """Images a second, TFLOP/s and share of the peak of every way to run a case."""
    peak, source = peak_tflops(torch.device(device), torch.bfloat16)
    rows = []
    for name, compiling, graph in (("eager", False, False), ("blocks compiled", True, False), ("graph", True, True)):
        if (compiling and not compiled) or (graph and device != "cuda"):
            continue
        for whose in ("ours", "diffusers"):
            pair = Pair(case, device, torch.bfloat16)
            flops = flops_per_image(pair.ours, tuple(pair.x.shape[1:]), pair.cond.select(slice(0, 1)))
            module, call = (pair.ours, pair.call_ours) if whose == "ours" else (pair.theirs, pair.call_theirs)
            if compiling:
                pair.compile()
            step = step_of(module, call, graph)
            for _ in range(3):
                step()
            took = sorted(seconds(step) for _ in range(steps))[steps // 2]
            rate = case.batch / took
            rows.append(
                {
                    "name": case.name, "whose": whose, "how": name, "images_per_s": rate,
                    "tflops": rate * flops / 1e12, "peak_share": rate * flops / 1e12 / peak, "peak": source,
                }
            )  # fmt: skip
            print("{name:26}{whose:12}{how:18}{images_per_s:10.1f}{tflops:10.2f}{peak_share:10.1%}".format(**rows[-1]))
            del pair, module, call, step
            torch.compiler.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measure, print, write benchmarks/accelerator.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device=cuda needs a CUDA device, and torch sees none; give --tiny --device cpu to try the code")
    print(f"{'':26}{'':12}{'':18}{'images/s':>10}{'TFLOP/s':>10}{'of peak':>10}")
    cases = TINY if args.tiny else FULL
    rows = [row for case in cases for row in measured(case, args.device, args.steps, not args.eager)]
    if args.device == "cuda":
        about = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
        Path("benchmarks/accelerator.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
