"""The step: accumulation, ranks, the guard against bad numbers, rates, averages, dropout."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from configs.schema import compose
from data.draws import uniform
from data.loader import Batch
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.base import Cond
from models.text import Conditioner, TextConfig, TextEncoders
from prepare.shapes import prepare_shapes
from training.ema import EMA, EMAConfig
from training.optim import OptimConfig, build_optimizer, guarded_step, learning_rate
from training.run import check_text, run
from training.step import condition


def train_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def weights(folder, images):
    return load_file(folder / "checkpoints" / str(images) / "denoiser" / "model.safetensors")


def assert_same_training(one, two, images):
    for a, b in zip(train_lines(one), train_lines(two), strict=True):
        assert a["images"] == b["images"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for x, y in zip(a["loss_bins"], b["loss_bins"], strict=True):
            assert x == (y if y is None else pytest.approx(y, rel=1e-4))
    first, second = weights(one, images), weights(two, images)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5)


def test_accumulated_micro_batches_equal_one_batch(config):
    whole = config("stage1", "train.images=48", name="whole")
    parts = config("stage1", "train.images=48", "train.micro_batch=2", name="parts")
    run(whole)
    run(parts)
    assert_same_training(whole.folder, parts.folder, 48)


def test_worker_processes_change_nothing(config):
    plain = config("stage2", "train.images=24", name="plain")
    workers = config("stage2", "train.images=24", "data.workers=2", name="workers")
    run(plain)
    run(workers)
    assert_same_training(plain.folder, workers.folder, 24)


@pytest.mark.slow
def test_two_ranks_equal_one_and_reduce_once_a_step(config, tmp_path):
    cfg = config("stage1", "train.images=48", name="one")
    run(cfg)
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook\n"
        "from configs.schema import compose\n"
        "from training import distributed, run\n"
        "reductions = []\n"
        "wrap = distributed.Ranks.wrap\n"
        "def counting(self, module):\n"
        "    wrapped = wrap(self, module)\n"
        "    def hook(state, bucket):\n"
        "        reductions.append(bucket.is_last())\n"
        "        return allreduce_hook(state, bucket)\n"
        "    wrapped.register_comm_hook(None, hook)\n"
        "    return wrapped\n"
        "distributed.Ranks.wrap = counting\n"
        "run.run(compose('stage1', json.loads(sys.argv[1])))\n"
        "Path(sys.argv[2], 'reductions' + os.environ['RANK']).write_text(str(sum(reductions)))\n"
    )
    overrides = [
        "name=two", f"outputs={tmp_path}", f"data.path={cfg.data.path}", "train.images=48", "train.micro_batch=2",
        "model.hidden=32", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.log_every=8",
        "optim.warmup=16", "optim.lr=1e-3", "sample.every=1000000", "sample.first=1000000",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(overrides), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [(tmp_path / f"reductions{rank}").read_text() for rank in (0, 1)]
    assert counts == ["6", "6"]  # 6 steps of 2 micro-batches a rank: one each, not two
    assert_same_training(cfg.folder, tmp_path / "two", 48)


def test_a_bad_gradient_skips_the_update_and_counts(config, monkeypatch):
    net = nn.Linear(4, 4)
    config_ = OptimConfig(weight_decay=0.1)
    optimizer = build_optimizer(net, config_)
    net(torch.ones(2, 4)).sum().backward()
    norm, skipped = guarded_step(optimizer, list(net.parameters()), 0.1, 1.0)
    assert norm > 0
    assert skipped == 0
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    (net(torch.ones(2, 4)).sum() * float("nan")).backward()
    _, skipped = guarded_step(optimizer, list(net.parameters()), 0.1, 1.0)
    assert skipped == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(torch.equal(a, e["exp_avg"]) for a, e in zip(moments, optimizer.state.values(), strict=True))
    net(torch.ones(2, 4)).sum().backward()
    guarded_step(optimizer, list(net.parameters()), 0.1, 1.0)
    assert not torch.equal(before["weight"], net.weight)


def test_a_run_of_bad_gradients_ends_with_the_way_out(config, monkeypatch):
    from training import step

    monkeypatch.setattr(step, "noise", lambda *a: torch.full((8, 8, 8, 8), float("nan")))
    with pytest.raises(FloatingPointError, match=r"train.max_skipped=2; lower optim.lr"):
        run(config("stage1", "train.images=64", "train.max_skipped=2"))


def test_learning_rate_is_a_function_of_images_alone():
    config_ = OptimConfig(lr=1.0, warmup=100, final=0.1)
    assert learning_rate(config_, 50, 1100) == 0.5
    assert learning_rate(config_, 100, 1100) == 1.0
    assert learning_rate(config_, 600, 1100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(config_, 1100, 1100) == pytest.approx(0.1)


def test_groups_scale_freeze_and_spare_biases_from_decay():
    net = nn.ModuleDict({"trunk": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    config_ = OptimConfig(weight_decay=0.5, groups=[])
    assert {group["weight_decay"] for group in build_optimizer(net, config_).param_groups} == {0.0, 0.5}
    from training.optim import GroupConfig

    frozen = replace(
        config_, groups=[GroupConfig(pattern="^trunk", frozen=True), GroupConfig(pattern="head", lr_scale=0.1)]
    )
    groups = build_optimizer(net, frozen).param_groups
    assert {group["lr_scale"] for group in groups} == {0.1}
    assert not net["trunk"].weight.requires_grad
    with pytest.raises(ValueError, match="matches no parameter; choose a part of a name such as trunk.weight"):
        build_optimizer(net, replace(config_, groups=[GroupConfig(pattern="tail")]))


def test_ema_halves_in_a_halflife():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, EMAConfig(halflife=1000, rampup=1e9))
    nn.init.ones_(net.weight)
    for step in range(100):
        ema.update(net, (step + 1) * 10, 10)
    assert ema.module.weight.item() == pytest.approx(0.5, rel=1e-5)
    assert ema.beta(10, 10) == pytest.approx(0.5 ** (10 / 1000))
    assert EMA(net, EMAConfig(halflife=1000, rampup=0.1)).beta(100, 10) == pytest.approx(0.5)


def test_measured_dropout_is_the_setting_and_the_null_is_the_samplers():
    dropped = uniform(0, "drop", np.arange(100_000)) < 0.1
    assert dropped.mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 100_000))
    conditioner = Conditioner(TextConfig(path="assets/shapes").build())
    cond = conditioner(["a red circle", "a blue star"])
    mixed = cond.where(torch.tensor([True, False]), conditioner.null())
    empty = conditioner([""])
    assert isinstance(mixed, Cond)
    assert mixed.text is not None
    assert cond.text is not None
    assert empty.text is not None
    assert torch.equal(mixed.text[0], empty.text[0])
    assert torch.equal(mixed.text[1], cond.text[1])


# --- sizes and text that only some models read ----------------------------------------------------------------


def test_a_picture_without_its_text_keeps_its_size():
    conditioner = Conditioner(TextConfig(path="assets/shapes").build(), vector_dim=128 + 5 * 256)
    sizes = torch.tensor([[600.0, 800, 4, 8, 128, 128, 5.5], [128, 128, 0, 0, 128, 128, 6]])
    batch = Batch(
        latents=torch.zeros(2, 8, 16, 16),
        captions=["a red circle", "a blue star"],
        class_id=torch.tensor([-1, -1]),
        positions=torch.arange(2),
        sizes=sizes,
    )
    cond = condition(batch, conditioner, 1.0, 0, torch.device("cpu"))
    assert torch.equal(cond.text[0], conditioner.null().text[0])
    assert cond.size_ids.tolist() == [[600, 800, 4, 8, 5.5], [128, 128, 0, 0, 6]]


UNET = ["model=unet_tiny", "model.channels=[16,32]", "model.depths=[0,1]", "model.heads=[1,2]", "model.layers=1"]


@pytest.fixture
def small(shards, tmp_path):
    """A short run on the shapes, of the model that is given."""
    data = [f"data.path={shards / 'shapes-128'}", f"outputs={tmp_path}", "name=small", "sampler.steps=2"]
    clocks = ["train.batch_size=4", "train.images=16", "train.log_every=4", "sample.first=16", "sample.count=2"]
    return lambda *overrides: compose("stage3", [*data, *clocks, *overrides])


@pytest.mark.parametrize("numbers", [6, 5])
def test_a_unet_with_a_vector_trains_and_draws(small, numbers):
    cfg = small(*UNET, f"model.vector_dim={128 + numbers * 256}", "optim.lr=1e-2")
    run(cfg)
    moments = load_file(cfg.folder / "checkpoints" / "16" / "optimizer.safetensors")["exp_avg/vector_mlp.fc1.weight"]
    assert moments[:, :128].abs().sum() > 0
    assert moments[:, 128:].abs().sum() > 0  # the sizes
    assert Pipeline.load(cfg.folder).generate(["a red circle"], size=(64, 96)).shape == (1, 64, 96, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*UNET, "model.vector_dim=1500"],
            "model.vector_dim=1500 is not a pooled text of 128 and 6 numbers .*=1664 or 1408",
        ),
        (
            ["model=mmdit_tiny", "text.encoders=[text_encoder]", "text.tokenizers=[tokenizer]", "model.text_dim=64"],
            "model.pooled_dim=128, but the encoders of text.path=assets/shapes give none; choose encoders that have",
        ),
        (
            ["model=mmdit_tiny", "model.pooled_dim=64"],
            "model.pooled_dim=64, but .* give 128; give model.pooled_dim=128",
        ),
    ],
)
def test_text_that_is_not_what_the_model_reads(small, overrides, message, monkeypatch):
    for config_class in ("unet.UNetConfig", "mmdit.MMDiTConfig"):
        monkeypatch.setattr(f"models.{config_class}.build", lambda self: pytest.fail("built a denoiser"))
    with pytest.raises(ValueError, match=message):
        run(small(*overrides))


def prepared(out, **options):
    """Shapes with their text states stored."""
    vae, text = AutoencoderConfig(path="assets/shapes").build(), TextConfig(path="assets/shapes", **options).build()
    prepare_shapes(out, resolution=128, num_images=8, seed=0, vae=vae, text=text)
    return out


ALONE = {"encoders": ["text_encoder"], "tokenizers": ["tokenizer"], "masked": False}  # no mask, nothing pooled


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({}, ["model=mmdit_tiny", "model.depth=1"]),
        (
            ALONE,
            ["text.encoders=[text_encoder]", "text.tokenizers=[tokenizer]", "text.masked=false", "model.text_dim=64"],
        ),
    ],
)
def test_stored_text_trains_as_encoded_text_does(small, tmp_path, options, overrides):
    """Up to float16, in which it is stored."""
    data, found = prepared(tmp_path / "shapes-128", **options), []
    for stored in ("true", "false"):
        cfg = small(f"data.path={data}", f"data.text_states={stored}", *overrides)
        cfg.name = stored
        run(cfg)
        found.append([line["loss"] for line in train_lines(cfg.folder)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_stored_text_must_be_the_encoders(small, tmp_path):
    data = prepared(tmp_path / "shapes-128")
    with pytest.raises(ValueError, match=r"holds states of .*'mask': \[32\].* give \{'text': \[32, 192\], 'pooled': "):
        run(small(f"data.path={data}", "data.text_states=true", "text.masked=false"))


@pytest.mark.parametrize(
    ("text", "model", "sizes"),
    [
        ("clip_l", "unet_sd15", None),
        ("sdxl", "unet_sdxl", 6),
        ("sdxl_refiner", "unet_sdxl_refiner", 5),
        ("sd3", "mmdit_2b", None),
        ("pixart", "pixart_xl2", None),
    ],
)
def test_public_encoders_fit_the_public_models(text, model, sizes):
    """At their full widths, on the meta device; widths and projections are the public ones."""
    cfg = compose("train", ["name=fit", f"text={text}", f"model={model}"])
    projects = {"text_encoder": text == "sd3", "text_encoder_2": True}
    with torch.device("meta"):
        found = []
        for name in cfg.text.encoders:
            if name == "text_encoder_3" or text == "pixart":
                found.append(T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, num_layers=1)))
            else:
                width = 1280 if name == "text_encoder_2" else 768
                config = CLIPTextConfig(hidden_size=width, projection_dim=width, num_hidden_layers=1)
                found.append((CLIPTextModelWithProjection if projects[name] else CLIPTextModel)(config))
    encoders = TextEncoders(cfg.text, found, found)
    check_text(cfg, encoders, SimpleNamespace(fields={}))
    ids = Conditioner(encoders, None, getattr(cfg.model, "vector_dim", 0)).size_ids(torch.zeros(1, 7))
    assert sizes == (ids if ids is None else ids.shape[1])
