"""Speed as ratios, side by side in one run: ours and the usual way take turns; medians of several rounds.

make bench        prints the table and writes benchmarks/latest.json
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Row, compare


def optimizer() -> Row:
    """One AdamW step on 63 M parameters: ours against torch's default, which the public scripts use."""
    from training.optim import OptimConfig, build_optimizer, guarded_step

    mine, theirs = (nn.ModuleList([nn.Linear(1024, 1024) for _ in range(60)]) for _ in range(2))
    for net in (mine, theirs):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
    grads = [parameter.grad for parameter in mine.parameters()]
    fused, default = build_optimizer(mine, OptimConfig()), torch.optim.AdamW(theirs.parameters())

    def ours() -> None:
        for parameter, grad in zip(mine.parameters(), grads, strict=True):
            parameter.grad = grad
        guarded_step(fused, list(mine.parameters()), 1e-4, 1e9)

    def usual() -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e9)
        default.step()

    return compare("clip and AdamW, 63 M parameters", ours, usual)


def muon() -> Row:
    """A step of Muon on the demo's first network, AdamW for what is no matrix of a block: ours against torch's two."""
    from models.ccdit import CCDiTConfig
    from training.optim import MATRICES, Kind, OptimConfig, build_optimizer, guarded_step

    shape = CCDiTConfig(in_channels=8, patch_size=2, base_size=8, hidden=160, depth=6, heads=5, num_classes=48)
    mine, theirs = shape.build(), shape.build()
    for parameter in chain(mine.parameters(), theirs.parameters()):
        parameter.grad = torch.randn_like(parameter)
    free, grads = list(mine.parameters()), [parameter.grad for parameter in mine.parameters()]
    turning = build_optimizer(mine, OptimConfig(kind=Kind.muon))
    named = list(theirs.named_parameters())
    turned = torch.optim.Muon([p for name, p in named if MATRICES.search(name)], adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([p for name, p in named if not MATRICES.search(name)], fused=True)

    def ours() -> None:
        for parameter, grad in zip(free, grads, strict=True):
            parameter.grad = grad
        guarded_step(turning, free, 1e-4, 1e9)

    def usual() -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e9)
        turned.step()
        rest.step()

    return compare("clip and Muon, 2.9 M parameters", ours, usual)


def average() -> Row:
    """One EMA update on 63 M parameters: ours against diffusers' EMAModel."""
    from diffusers.training_utils import EMAModel

    from training.ema import EMA, EMAConfig

    net = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(60)])
    ema, theirs = EMA(net, EMAConfig()), EMAModel(net.parameters(), decay=0.9999)
    return compare("EMA, 63 M parameters", lambda: ema.update(net, 10**6, 256), lambda: theirs.step(net.parameters()))


def reading() -> Row:
    """2,000 latents of 128 px with captions in shuffled batches of 64: ours against webdataset on the same tars."""
    import numpy as np

    wds: Any = import_module("webdataset")  # its names are made at run time, out of a type checker's sight

    from data.loader import Batches, DataConfig
    from data.reader import ShardReader
    from data.shards import ShardWriter

    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    with ShardWriter(folder, resolution=128, vae={"factor": 8, "channels": 8}) as writer:
        for _ in range(2000):
            writer.add(
                {"captions": dict.fromkeys("abcd", "a red circle")},
                latent=rng.standard_normal((8, 16, 16)).astype("f2"),
            )
    reader, config = ShardReader(folder), DataConfig(path=str(folder), resolution=128)

    def ours() -> None:
        for _ in Batches(config, [reader], 0, start=0, stop=2000, batch_size=50, micro_batch=50).loader():
            pass

    def usual() -> None:
        tars = wds.WebDataset(str(folder / "00000.tar"), shardshuffle=False).shuffle(1000).decode()
        for _ in wds.WebLoader(tars.to_tuple("latent.npy", "json").batched(50), batch_size=None, num_workers=0):
            pass

    return compare("read 2,000 latents, warm", ours, usual)


def start_up() -> Row:
    """`scripts/sample.py --help` against importing torch, which a careless --help pays."""

    def run(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)

    return compare("--help of scripts/sample.py", run("scripts/sample.py", "--help"), run("-c", "import torch"))


def whole_step() -> Row:
    """A training step, zero to EMA, of one network: ours against the way diffusers' example scripts write it."""
    from diffusers.training_utils import EMAModel

    from benchmarks.networks import WIDE_MMDIT, Pair
    from training.ema import EMA, EMAConfig
    from training.optim import OptimConfig, build_optimizer, guarded_step

    pair = Pair(replace(WIDE_MMDIT, side=32, batch=1))
    fused, ema, free = build_optimizer(pair.ours, OptimConfig()), EMA(pair.ours, EMAConfig()), [*pair.ours.parameters()]
    default, theirs = torch.optim.AdamW(pair.theirs.parameters()), EMAModel(pair.theirs.parameters(), decay=0.9999)

    def ours() -> None:
        pair.call_ours().square().mean().backward()
        guarded_step(fused, free, 1e-4, 1.0)
        ema.update(pair.ours, 10**6, 256)

    def usual() -> None:
        loss = pair.call_theirs().square().mean()
        loss.item()  # averaged for the log at each step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), 1.0)
        default.step()
        default.zero_grad()
        theirs.step(pair.theirs.parameters())

    return compare("whole step, MMDiT of 159 M at 256 px", ours, usual, rounds=5)


def main() -> None:
    """Measure, print, write. A ratio above 1 is in our favour, in time as in memory."""
    from benchmarks.loop import loops
    from benchmarks.networks import networks
    from benchmarks.onnx_rows import onnx_rows
    from benchmarks.sampling import sampling
    from benchmarks.states import states

    parts: list[Callable[[], Row]] = [optimizer, muon, average, reading, start_up, whole_step]
    rows = []
    print(f"{'':64}{'ours':>16}{'usual':>16}{'ratio':>9}")
    for row in chain((part() for part in parts), loops()[0], states(), networks(), sampling(), onnx_rows()):
        print(row, flush=True)
        rows.append(asdict(row) | {"ratio": row.ratio})
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    Path("benchmarks/latest.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
