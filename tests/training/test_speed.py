"""Options that change no result: the same losses, the same weights, the same names."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from models.base import Cond
from models.layers import Checkpointing
from models.unet import UNetConfig
from models.weights import save_denoiser
from training.config import TrainConfig
from training.run import run
from training.speed import Attention, Compile, channels_last, check_attention, check_compiler, compile_denoiser


def trained(config, *options, name="run"):
    cfg = config("stage3", "model=mmdit_tiny", "train.images=32", "evaluate.count=0", *options, name=name)
    run(cfg)
    lines = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(cfg.folder / "checkpoints" / "32" / "denoiser" / "ema.safetensors")
    return [line["loss"] for line in lines if line["kind"] == "train"], weights, lines


@pytest.mark.parametrize("option", ["train.checkpointing=full", "train.checkpointing=selective"])
def test_checkpointing_changes_no_bit(config, option):
    losses, weights, _ = trained(config, name="plain")
    same_losses, same_weights, _ = trained(config, option, name="option")
    assert losses == same_losses
    assert all(torch.equal(tensor, same_weights[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("option", ["train.attention=math", "train.attention=flash"])
def test_attention_changes_the_order_of_sums_alone(config, option):
    assert_close(trained(config, name="plain"), trained(config, option, name="option"))


def assert_close(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-3, atol=1e-4)


def unet():
    torch.manual_seed(0)
    denoiser = UNetConfig(channels=[16, 16], depths=[0, 2], heads=[2, 4], layers=1, text_dim=12, groups=8).build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser, (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), Cond(text=torch.randn(2, 5, 12)))


def step(module, inputs):
    module.zero_grad()
    out = module(*inputs)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in module.parameters())]


def test_channels_last_changes_the_order_of_sums_alone(tmp_path):
    denoiser, inputs = unet()
    before = step(denoiser, inputs)
    save_denoiser(denoiser, tmp_path, "before")
    channels_last(denoiser)
    assert denoiser.down[0].res[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert denoiser.down[0].res[0](torch.randn(2, 16, 8, 8), torch.randn(2, 64)).stride(1) == 1
    for one, other in zip(before, step(denoiser, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    save_denoiser(denoiser, tmp_path, "after")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("wanted", "checkpointing"), [(Compile.blocks, "none"), (Compile.blocks, "selective"), (Compile.whole, "full")]
)
def test_compiled_is_the_same_network_with_the_same_names(monkeypatch, wanted, checkpointing):
    """Traced through autograd too, without the C++ that the default back-end writes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    denoiser, inputs = unet()
    before, names, average = step(denoiser, inputs), list(denoiser.state_dict()), copy.deepcopy(denoiser)
    denoiser.checkpoint(Checkpointing(checkpointing))
    compile_denoiser(denoiser, wanted)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        for one, other in zip(before, step(denoiser, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0
    assert list(denoiser.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(before, step(average, inputs), strict=True))
    copy.deepcopy(denoiser)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["blocks", "whole"])
def test_compiled_runs_train_save_and_say_how_long_it_took(config, wanted):
    compiled = trained(config, f"train.compile={wanted}", "train.checkpointing=selective", name="compiled")
    assert_close(trained(config, name="plain"), compiled)
    (said,) = [line for line in compiled[2] if line["kind"] == "compile"]
    assert 1 < said["seconds"] < 600


def test_what_this_machine_lacks_is_said_in_a_sentence(config, monkeypatch):
    monkeypatch.setattr("models.mmdit.MMDiTConfig.build", lambda self: pytest.fail("built a denoiser"))
    with pytest.raises(ValueError, match=r"train.attention=cudnn cannot be had on cpu in float32 with masked text;"):
        trained(config, "train.attention=cudnn")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"train.compile=blocks needs a C\+\+ compiler, .* choose train.compile=none"):
        trained(config, "train.compile=blocks")
    with pytest.raises(ValueError, match=r"train.checkpoint_every=0 counts blocks from 1"):
        TrainConfig(checkpoint_every=0)
    check_compiler(Compile.none)
    check_attention(Attention.auto, torch.device("cpu"), torch.bfloat16, masked=False)
