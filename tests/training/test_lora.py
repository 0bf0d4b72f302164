"""Adapters are trained, resumed, averaged and saved as whole networks are, and what they stand on stays as it was."""

import copy
import json
import os
import re
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file, save_file

from configs.schema import compose, explain
from data.loader import Batch
from diffusion.objective import Objective, ObjectiveConfig
from inference.networks import load_networks, open_base
from inference.pipeline import Pipeline
from models.ccdit import CCDiTConfig
from models.folder import sha256
from models.lora import LoRAConfig, adapt, adapters, parts
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import Conditioner, TextConfig
from models.unet import UNetConfig
from models.weights import load_denoiser
from training.distributed import Ranks, session, synchronised
from training.ema import EMA, EMAConfig
from training.optim import OptimConfig, build_optimizer, set_rate
from training.run import run
from training.step import condition, losses

PIPELINE = "assets/shapes/pipeline"
SMALL = [
    "train.images=32", "train.batch_size=8", "train.log_every=8", "optim.warmup=8", "optim.lr=1e-3",
    "sample.every=1000000", "sample.first=1000000", "checkpoint.every=1000000", "checkpoint.keep=100",
]  # fmt: skip
FILES = ("denoiser/model.safetensors", "denoiser/ema.safetensors", "optimizer.safetensors")


@pytest.fixture
def config(shards, tmp_path):
    """`config("model.lora.rank=2", ...)`: the pipeline of the repository with adapters."""

    def make(*overrides: str, name: str = "run") -> Any:
        where = [f"name={name}", f"outputs={tmp_path}", f"data.path={shards / 'shapes-128'}", f"init.from={PIPELINE}"]
        return compose("stage3", [*SMALL, *where, *overrides])

    return make


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in FILES}


BOTH = ("model.lora.rank=2", "text.lora.rank=1", "train.micro_batch=4", "model.lora.dora=true")


@pytest.mark.parametrize("lora", [("model.lora.rank=2", "ema.sigma_rel=[0.1]"), BOTH], ids=["denoiser", "both"])
def test_a_stopped_run_ends_where_an_undisturbed_one_does(config, lora):
    run(config(*lora, name="straight"))
    for stop in (8, 24):
        run(config(*lora, f"train.stop_at={stop}", name="resumed"))
    cfg = config(*lora, "init.from=null", name="resumed")  # what it stands on is in its checkpoints
    run(cfg)
    straight, resumed = cfg.folder.parent / "straight/checkpoints/32", cfg.folder / "checkpoints/32"
    assert digests(straight) == digests(resumed)


def test_a_checkpoint_holds_adapters_alone_and_opens_with_its_base(config):
    cfg = config("model.lora.rank=2", "model.lora.alpha=4", "text.lora.rank=1", "model.lora.trigger=sks")
    run(cfg)
    folder = cfg.folder / "checkpoints/32"
    held, averaged = (load_file(folder / f"denoiser/{name}.safetensors") for name in ("model", "ema"))
    assert held.keys() == averaged.keys()
    assert {name.split(".")[0] for name in held} == {"denoiser", "text_encoder", "text_encoder_2"}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight", "alpha")) for name in held)
    assert (folder / FILES[0]).stat().st_size < Path(f"{PIPELINE}/denoiser/ema.safetensors").stat().st_size / 20
    assert held["denoiser.blocks.0.attn.qkv.alpha"] == 4
    assert any((averaged[name] != held[name]).any() for name in held if "lora_B" in name)
    _, denoiser, text = load_networks(folder)
    plain = load_denoiser(f"{PIPELINE}/denoiser", "ema").state_dict()
    a, b = (averaged[f"denoiser.blocks.1.mlp.fc1.lora_{i}.weight"] for i in "AB")
    weight = denoiser.state_dict()["blocks.1.mlp.fc1.weight"]
    assert b.any()
    torch.testing.assert_close(weight, plain["blocks.1.mlp.fc1.weight"] + 2 * b @ a)
    assert torch.equal(denoiser.state_dict()["patch_embed.weight"], plain["patch_embed.weight"])
    assert text is not None
    a, b = (averaged[f"text_encoder.encoder.layers.0.mlp.fc1.lora_{i}.weight"] for i in "AB")
    before = TextConfig(path="assets/shapes").build().encoders[0].state_dict()["encoder.layers.0.mlp.fc1.weight"]
    torch.testing.assert_close(text.encoders[0].state_dict()["encoder.layers.0.mlp.fc1.weight"], before + b @ a)
    assert Pipeline.load(cfg.folder, device="cpu").generate(["a red circle"]).shape == (1, 128, 128, 3)


def test_compiled_blocks_learn_the_same_adapters(config, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    plain, compiled = (config("model.lora.rank=2", f"train.compile={how}", name=how) for how in ("none", "blocks"))
    run(plain)
    torch._dynamo.utils.counters.clear()
    run(compiled)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0
    one, other = (load_file(cfg.folder / "checkpoints/32" / FILES[0]) for cfg in (plain, compiled))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_adapters_on_adapters_and_a_whole_run_from_them(config):
    """The base of the second is the first, merged; a run without adapters starts from both, merged."""
    first = config("model.lora.rank=2", name="first")
    run(first)
    second = config("model.lora.rank=1", f"init.from={first.folder}", name="second")
    run(second)
    base = load_networks(second.folder / "checkpoints/32")[0].base
    assert base is not None
    merged = load_networks(first.folder / "checkpoints/32")[1].state_dict()
    opened = open_base(base, second.folder).state_dict()
    assert all(torch.equal(opened[name], x) for name, x in merged.items())
    third = config(f"init.from={second.folder}", "train.stop_at=8", "optim.lr=1e-12", name="third")
    run(third)
    both = load_networks(second.folder / "checkpoints/32")[1].state_dict()
    started = load_denoiser(third.folder / "checkpoints/8/denoiser", "model").state_dict()
    assert all(torch.allclose(started[name], x, atol=1e-9) for name, x in both.items())


# --- networks ----------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"in_channels": 8, "base_size": 8, "hidden": 32, "depth": 3, "heads": 4}
NETWORKS: dict[str, Any] = {
    "ccdit": lambda lora: CCDiTConfig(**TINY, num_classes=4, lora=lora),
    "pixart": lambda lora: PixArtConfig(**TINY, text_dim=192, lora=lora),
    "mmdit": lambda lora: MMDiTConfig(**TINY, text_dim=192, pooled_dim=128, dual=1, lora=lora),
    "unet": lambda lora: UNetConfig(
        in_channels=8, base_size=8, channels=[16, 32], depths=[1, 1], heads=[2, 4], layers=1, text_dim=192,
        vector_dim=1664, groups=8, lora=lora,
    ),
}  # fmt: skip


def build(name: str, lora: LoRAConfig, words: LoRAConfig) -> Any:
    torch.manual_seed(0)
    denoiser = NETWORKS[name](lora).build()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = None if name == "ccdit" else TextConfig(path="assets/shapes", lora=words).build()
    return denoiser, text


def loss_of(called: Any, config: Any, text: Any, step: int, rows: slice = slice(None)) -> torch.Tensor:
    """The mean loss of rows of a batch of eight, from captions or classes to the end."""
    latents = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(step))[rows]
    positions = torch.arange(8 * step, 8 * step + 8)[rows]
    batch = Batch(
        latents=latents, positions=positions, captions=(["a red circle", "a star"] * 4)[rows],
        class_id=(torch.arange(8) % 4)[rows], valid=torch.ones(len(latents), dtype=torch.bool),
        sizes=torch.full((len(latents), 7), 64.0),
    )  # fmt: skip
    conditioner = Conditioner(text, getattr(config, "num_classes", None), getattr(config, "vector_dim", 0))
    cond = condition(batch, conditioner, 0.5, 0, torch.device("cpu"))
    return losses(called, Objective(ObjectiveConfig()), latents, cond, positions, 0, 8)[0].mean()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_adapter_learns_and_nothing_else(name, dora):
    """In the loop's arithmetic: each has a gradient, base and encoders keep every bit, the null is encoded anew."""
    lora, words = LoRAConfig(rank=2, dora=dora), LoRAConfig(rank=1, dora=dora)
    denoiser, text = build(name, lora, words)
    before = copy.deepcopy((denoiser.state_dict(), text.state_dict() if text else {}))
    trained = adapt(denoiser, text)
    ema = EMA(trained, EMAConfig())
    optimizer = build_optimizer(trained, OptimConfig(lr=1e-2))
    free = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    held = {n: x for n, x in adapters(trained).items() if not n.endswith("alpha")}
    assert sorted(map(id, held.values())) == sorted(map(id, free))
    assert any(n.startswith("text_encoder_2.") for n in held) == (text is not None)
    for step in range(2):
        loss_of(trained, trained.config, text, step).backward()
        assert all(parameter.grad is not None for parameter in free)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(trained, 8 * (step + 1), 8)
    assert all(parameter.grad is None for parameter in trained.parameters() if not parameter.requires_grad)
    for module, state in zip((denoiser, text), before, strict=True):
        now = {n.replace(".base_layer.", "."): x for n, x in module.state_dict().items()} if module else {}
        assert all(
            torch.equal(now[n].view(torch.int32), x.view(torch.int32))
            for n, x in state.items()
            if x.is_floating_point()
        )
    average, words_too = parts(ema.module)
    shared = {p.data_ptr() for p in trained.parameters() if not p.requires_grad}
    assert shared == {p.data_ptr() for p in ema.module.parameters() if p.data_ptr() in shared}
    for n, x in adapters(ema.module).items():
        assert n.endswith(("alpha", "lora_A.weight")) or not torch.equal(x, held[n])
    assert average is not denoiser and (words_too is None) == (text is None)


def test_convolutions_of_a_unet_are_adapted_where_they_are_named():
    denoiser, text = build("unet", LoRAConfig(rank=2, targets=["conv1", "resample", "attn.qkv"]), LoRAConfig())
    trained = adapt(denoiser, text)
    names = {name.rpartition(".lora_A")[0] for name in adapters(trained) if "lora_A" in name}
    assert any(name.endswith("res.0.conv1") for name in names)
    assert "denoiser.down.0.resample" in names and not any("text_encoder" in name for name in names)
    loss_of(trained, trained.config, text, 0).backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def two_steps(ranks: Ranks, micro: int) -> dict[str, torch.Tensor]:
    """The adapters of an MMDiT and its encoders after two steps of the loop's arithmetic."""
    denoiser, text = build("mmdit", LoRAConfig(rank=2), LoRAConfig(rank=1))
    trained = adapt(denoiser, text)
    optimizer = build_optimizer(trained, OptimConfig(lr=1e-2, eps=1e-2))
    wrapped, share = ranks.wrap(trained), 8 // ranks.world
    for step in range(2):
        set_rate(optimizer, 1e-2)
        for i in range(micro):
            first = ranks.rank * share + i * share // micro
            with synchronised(wrapped, i == micro - 1):
                (loss_of(wrapped, trained.config, text, step, slice(first, first + share // micro)) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in adapters(trained).items()}


def rank_of_two(rank: int, port: int, out: str) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with session(timeout=200) as ranks:
        tensors = two_steps(ranks, 2)
        save_file(tensors, f"{out}/{rank}.safetensors")


def test_two_ranks_train_adapters_as_one_does(tmp_path):
    """Of the text encoders too, whose work is before the call that DDP sees; with two micro-batches on each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_of_two, (port, str(tmp_path)), nprocs=2)
    alone = two_steps(Ranks(0, 1, torch.device("cpu")), 1)
    for rank in range(2):
        for name, tensor in load_file(tmp_path / f"{rank}.safetensors").items():
            torch.testing.assert_close(tensor, alone[name], atol=2e-6, rtol=1e-4)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.rank=0"], "lora.rank=0 is no rank; give a whole number from 1, such as 16, or null for none"),
        (["text.lora.rank=-3"], "lora.rank=-3 is no rank"),
        (["model.lora.rank=2", "model.lora.alpha=0"], "lora.alpha=0.0 is not positive; give the rank or half of it"),
        (["model.lora.rank=2", "train.parallel=fsdp"], "shards a whole network, but lora.rank trains adapters"),
        (["model.lora.rank=2", "train.precision=fp8"], "train.precision=fp8 multiplies by weights in training"),
        (["model.lora.rank=2", "optim.weights=bf16"], "would round what stays as it is, .* choose optim.weights=fp32"),
        (["text.lora.rank=2", "data.text_states=true"], "text.lora.rank=2 trains the text encoders, but data"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_built(config, overrides, message):
    with pytest.raises((ValueError, OmegaConfBaseException)) as caught:
        config(*overrides)
    assert re.search(message, explain(caught.value, "stage3"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init.from=null"], "lora.rank trains adapters on a network that has learnt, and init.from=null has none"),
        (["model.depth=5"], r"is another than model= says \(depth: 6 -> 5\); give the model of that, or carry it over"),
        (["model.lora.targets=[qkv,sideways]"], "model.lora.targets has 'sideways', .* choose among .*attn.qkv"),
        (["text.lora.rank=1", "text.lora.targets=[to_q]"], "text.lora.targets has 'to_q'.* among .*self_attn.q_proj"),
        (["optim=muon"], "optim.kind=muon finds no free matrix"),
    ],
)  # fmt: skip
def test_adapters_that_have_nothing_to_stand_on_are_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(config("model.lora.rank=2", *overrides))


def test_text_adapters_of_a_network_of_classes_are_refused():
    with pytest.raises((ValueError, OmegaConfBaseException)) as caught:
        compose("stage1", ["name=x", "text=shapes", "text.lora.rank=2"])
    assert "text.lora.rank=2 trains text encoders, which a model of classes does not" in explain(caught.value, "stage1")


def test_a_base_that_is_gone_or_another_is_said(config, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(PIPELINE, base)
    cfg = config("model.lora.rank=2", f"init.from={base}", "text.lora.rank=1")
    run(cfg)
    with pytest.raises(ValueError, match=r"has adapters on its text encoders.*give init.from=.*base, which they"):
        run(config("model.lora.rank=2", f"init.from={cfg.folder}", name="other"))
    file = base / "denoiser/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    message = "32 holds adapters for .*base with the SHA-256 .*, but the weights there have .*; put back those"
    with pytest.raises(ValueError, match=message):
        Pipeline.load(cfg.folder, device="cpu")
    with pytest.raises(ValueError, match="holds adapters for .*base with the SHA-256"):
        run(config("model.lora.rank=2", "text.lora.rank=1", "train.images=40"))
    file.unlink()
    with pytest.raises(
        ValueError, match="32 holds adapters alone, and .*base, .* has no denoiser's ema.safetensors; put"
    ):
        Pipeline.load(cfg.folder, device="cpu")


def test_a_checkpoint_of_another_rank_is_not_continued(config):
    run(config("model.lora.rank=2", "train.stop_at=8"))
    with pytest.raises(ValueError, match=r"model=.*'rank': 3.* differs from model="):
        run(config("model.lora.rank=3"))
    cfg = config("model.lora.rank=2", "text.lora.rank=1")
    with pytest.raises(ValueError, match="does not fit PixArt: .*missing: text_encoder"):
        run(cfg)
    path = cfg.folder / "checkpoints/8/config.json"
    assert json.loads(path.read_text())["model"]["lora"]["rank"] == 2
