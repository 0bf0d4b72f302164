"""Recomputed or compiled block by block, every network has the same output and the same gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import memory
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.layers import Checkpointing, lean
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.unet import UNetConfig

SMALL = {"hidden": 32, "depth": 4, "heads": 2, "base_size": 8}
CONFIGS = {
    "ccdit": CCDiTConfig(**SMALL, num_classes=3),
    "pixart": PixArtConfig(**SMALL, text_dim=12),
    "mmdit": MMDiTConfig(**SMALL, in_channels=4, text_dim=12, pooled_dim=6, dual=1, qk_norm=True),
    "unet": UNetConfig(channels=[16, 32], depths=[0, 2], heads=[2, 4], text_dim=12, groups=8),
}
EVERY_NETWORK = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def network(config):
    torch.manual_seed(0)
    denoiser = config.build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    cond = Cond(text=text, text_mask=torch.ones(2, 5).bool(), pooled=torch.randn(2, 6), class_id=torch.tensor([0, 3]))
    return denoiser, (x, torch.tensor([0.2, 0.9]), cond)


def trained(denoiser, inputs):
    """Output, gradients, MiB kept for the backward pass, FLOPs."""
    denoiser.zero_grad()
    with FlopCounterMode(display=False) as flops:
        out = denoiser(*inputs)
        out.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in denoiser.parameters()]
    return out.detach(), gradients, memory(lambda: denoiser(*inputs))[1], flops.get_total_flops()


@EVERY_NETWORK
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_checkpointing_changes_no_bit_and_keeps_less(monkeypatch, config, autocast):
    monkeypatch.setattr("models.layers.LEAN_FROM", 0)  # one inside the other
    denoiser, inputs = network(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        runs = {}
        for kind in Checkpointing:
            denoiser.checkpoint(kind)
            runs[kind] = trained(denoiser, inputs)
        denoiser.checkpoint(Checkpointing.full, every=2)
        runs["every second"] = trained(denoiser, inputs)
    out, gradients, kept, flops = runs.pop(Checkpointing.none)
    for other_out, other_gradients, _, _ in runs.values():
        assert torch.equal(out, other_out)
        assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    assert runs[Checkpointing.full][2] < runs["every second"][2] < kept
    assert runs[Checkpointing.full][2] < runs[Checkpointing.selective][2] < kept
    assert runs[Checkpointing.selective][3] == flops < runs[Checkpointing.full][3]


def test_a_lean_layer_keeps_its_input_alone_and_repeats_no_product():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 16), torch.randn(2**13, 64, requires_grad=True)
    both = []
    for call in (lambda: layer(torch.tanh(torch.sin(x))), lambda: lean(layer, lambda x: torch.tanh(torch.sin(x)), x)):
        kept = []
        with FlopCounterMode(display=False) as flops:
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
                out = call()
            gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        both.append((out, *gradients, flops.get_total_flops(), kept))
    (*plain, flops, kept), (*leaner, other_flops, other_kept) = both
    assert all(torch.equal(a, b) for a, b in zip(plain, leaner, strict=True))
    assert flops == other_flops
    assert len(other_kept) < len(kept)
