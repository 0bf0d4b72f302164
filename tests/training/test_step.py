"""The step: accumulation, ranks, the guard against bad numbers, rates, averages, dropout."""

import itertools
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
from scipy.stats import kstest
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from configs.schema import compose
from data.draws import uniform
from data.loader import Batch
from diffusion.objective import Objective, ObjectiveConfig, Prediction, Weighting
from diffusion.schedule import Path as NoisePath
from diffusion.schedule import ShiftLaw, alpha_sigma, shift
from diffusion.timesteps import TimeLaw
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.text import Conditioner, TextConfig, TextEncoders
from prepare.shapes import prepare_shapes
from training.config import TrainConfig
from training.ema import EMA, EMAConfig
from training.optim import OptimConfig, build_optimizer, guarded_step, learning_rate
from training.pairing import paired
from training.run import check_text, run
from training.step import condition, kept_tokens, losses


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


# --- losses ------------------------------------------------------------------------------------------------------

FLOW = {"prediction": Prediction.flow, "path": NoisePath.linear, "times": TimeLaw.uniform}
LATENTS = torch.randn(16, 2, 3, 4, generator=torch.Generator().manual_seed(0))


class Seen(nn.Module):
    """A denoiser that answers with a mix of what it is shown, and keeps it."""

    def forward(self, x_t, t, cond):
        self.x_t, self.t = x_t, t
        return 0.3 * x_t + t.view(-1, 1, 1, 1)


def losses_of(start=0, count=16, x0=LATENTS, batch_size=8, **options):
    """((weighted, unweighted, t), x_t) for the positions from `start` on."""
    objective, seen = Objective(ObjectiveConfig(**options)), Seen()
    positions = torch.arange(start, start + count)
    found = losses(seen, objective, x0[start : start + count], None, positions, 3, batch_size)
    return found, seen.x_t


def noise_of(**options):
    """The noise that each image was given: x_t of flow, solved for it."""
    (_, _, t), x_t = losses_of(**FLOW, **options)
    s = t.view(-1, 1, 1, 1)
    return (x_t - (1 - s) * LATENTS) / s


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": Weighting.min_snr},
        FLOW | {"stratified": True, "shift_law": ShiftLaw.sqrt, "shift_cells": 48, "huber": 0.1},
        FLOW | {"pairing": 4, "offset_noise": 0.05, "range": [0.2, 0.8]},
    ],
)
def test_losses_of_an_image_are_the_same_in_any_micro_batch(options):
    whole, x_t = losses_of(**options)
    parts = [losses_of(start, 4, **options) for start in range(0, 16, 4)]
    for k in range(3):
        assert torch.equal(torch.cat([found[k] for found, _ in parts]), whole[k])
    assert torch.equal(torch.cat([part for _, part in parts]), x_t)


def test_contrast_takes_the_error_to_the_neighbour_off():
    (plain, unweighted, t), _ = losses_of(**FLOW)
    (less, same, _), x_t = losses_of(**FLOW, contrast=0.05)
    assert torch.equal(same, unweighted)
    flow = noise_of() - LATENTS
    pred = 0.3 * x_t + t.view(-1, 1, 1, 1)
    other = (pred - flow[[i ^ 1 for i in range(16)]]).square().mean((1, 2, 3))
    torch.testing.assert_close(less, plain - 0.05 * other, rtol=1e-4, atol=1e-4)


def test_contrast_makes_the_best_prediction_overshoot():
    """(E[target | x_t] - lambda E[target])/(1 - lambda), by least squares over what is Gaussian with a mean of 2."""
    lam, n = 0.2, 200_000
    x0 = 2 + torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = Objective(ObjectiveConfig(**FLOW, contrast=lam, range=[0.4999, 0.5001]))  # all at t = 1/2
    seen, scale = Seen(), torch.ones(2, requires_grad=True, dtype=torch.float64)
    seen.forward = lambda x_t, t, cond: scale[0] * x_t.double() + scale[1]
    optimizer = torch.optim.LBFGS([scale], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = losses(seen, objective, x0, None, torch.arange(n), 3, n)[0].mean()
        value.backward()
        return value

    optimizer.step(loss)
    # x_t = (x0 + eps)/2 says nothing of eps - x0: its best guess is the mean, -2, with contrast or without
    assert scale.tolist() == pytest.approx([0, -2], abs=0.03)
    x0.mul_(3).sub_(4)  # deviation 3, mean 2: cov(eps - x0, x_t) / var(x_t) = (1 - 9)/2 / (10/4) = -1.6
    optimizer = torch.optim.LBFGS([scale], line_search_fn="strong_wolfe")
    optimizer.step(loss)
    slope = -1.6 / (1 - lam)
    assert scale.tolist() == pytest.approx([slope, -2 - slope * 1], abs=0.05)


def test_contrast_needs_neighbours_and_flow():
    with pytest.raises(ValueError, match=r"contrast=0.05 sets images two by two, but a micro-batch has 3; choose"):
        losses_of(count=3, **FLOW, contrast=0.05)
    with pytest.raises(ValueError, match=r"contrast=0.05 parts flows, but objective.prediction=eps; set"):
        ObjectiveConfig(contrast=0.05)
    with pytest.raises(ValueError, match=r"objective.contrast=1.0 is not from 0 to below 1; choose 0 for none"):
        ObjectiveConfig(**FLOW, contrast=1.0)


ROUTED = {"hidden": 16, "depth": 3, "heads": 2, "in_channels": 2, "base_size": 8, "num_classes": 4}


def test_routes_keep_a_share_of_tokens_by_seed_and_position():
    config, positions = CCDiTConfig(**ROUTED, route=0.25, route_blocks=[1, 1]), torch.arange(4000)
    kept = kept_tokens(config, (2, 6, 8), positions, 3, "cpu")
    assert kept.shape == (4000, 9)
    assert (kept.diff(dim=1) > 0).all()
    shown = torch.nn.functional.one_hot(kept, 12).sum(1).double()
    sigma = math.sqrt(0.75 * 0.25 / 4000)
    assert (shown.mean(0) - 0.75).abs().max() < 4 * sigma
    assert torch.corrcoef(shown.T).add_(1 / 11).fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(4000)
    assert torch.equal(kept_tokens(config, (2, 6, 8), positions[70:73], 3, "cpu"), kept[70:73])
    assert not torch.equal(kept_tokens(config, (2, 6, 8), positions, 4, "cpu"), kept)
    assert kept_tokens(CCDiTConfig(**ROUTED), (2, 6, 8), positions, 3, "cpu") is None


def test_routed_losses_of_an_image_are_the_same_in_any_micro_batch():
    torch.manual_seed(0)
    found, x0, cond = {}, torch.randn(8, 2, 8, 8), Cond(class_id=torch.arange(8) % 4)
    for route in (0.0, 0.5):
        denoiser = CCDiTConfig(**ROUTED, route=route, route_blocks=[0, 2]).build()
        with torch.no_grad():
            for i, parameter in enumerate(denoiser.parameters()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        parts = []
        for size in (8, 2):
            cuts = [slice(i, i + size) for i in range(0, 8, size)]
            some = [
                losses(denoiser, Objective(ObjectiveConfig(**FLOW, contrast=0.05)), x0[i], cond.select(i), p, 3, 8)[0]
                for i, p in ((cut, torch.arange(8)[cut]) for cut in cuts)
            ]
            parts.append(torch.cat(some))
        torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-5)
        found[route] = parts[0]
    assert not torch.allclose(found[0.0], found[0.5], rtol=1e-3)


@pytest.mark.parametrize("options", [["objective.contrast=0.05"], ["model.route=0.5", "model.route_blocks=[1,1]"]])
def test_efficiency_options_resume_exactly_and_draw(config, options):
    whole = config("stage3", "train.images=32", *options, name="whole")
    parts = config("stage3", "train.images=32", "train.stop_at=16", *options, name="parts")
    run(whole)
    run(parts)
    parts.train.stop_at = None
    run(parts)
    a, b = (load_file(cfg.folder / "checkpoints" / "32" / "denoiser" / "model.safetensors") for cfg in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert Pipeline.load(whole.folder).generate(["a red circle"]).shape == (1, 128, 128, 3)


def test_loss_is_the_weighted_error_and_the_unweighted_one_stays_squared():
    (plain, unweighted, t), _ = losses_of(**FLOW)
    assert torch.equal(plain, unweighted)
    (weighted, same, _), _ = losses_of(**FLOW, weighting=Weighting.soft_min_snr, huber=0.1)
    assert torch.equal(same, unweighted) and (weighted < plain).all()
    tiny = [losses_of(**FLOW, weighting=Weighting.snr, huber=d)[0][0] for d in (1e6, None)]
    torch.testing.assert_close(*tiny)  # an error far below d costs its square
    torch.testing.assert_close(tiny[1], (1 - t) ** 2 * plain)


def test_times_of_a_stratified_run_fill_each_batch_evenly():
    (*_, t), _ = losses_of(**FLOW, stratified=True, batch_size=8)
    for batch in t.split(8):
        assert (8 * batch).long().tolist() == list(range(8))


def test_the_shift_is_that_of_the_latents_size():
    (*_, plain), _ = losses_of(**FLOW)
    (*_, shifted), _ = losses_of(**FLOW, shift=3.0, shift_law=ShiftLaw.sqrt, shift_cells=48)  # 12 cells: half
    torch.testing.assert_close(shifted, shift(plain, 1.5))


def test_offset_noise_is_one_gaussian_number_a_channel():
    images = torch.zeros(4000, 2, 2, 2)
    eps = [losses_of(count=4000, x0=images, prediction=Prediction.v, offset_noise=k)[1] for k in (0.0, 0.5)]
    (*_, t), _ = losses_of(count=4000, x0=images, prediction=Prediction.v)
    offset = (eps[1] - eps[0]) / alpha_sigma(NoisePath.vp, t)[1].view(-1, 1, 1, 1) / 0.5
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-4, rtol=0)
    one = offset[:, :, 0, 0]
    assert kstest(one.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(one.T.numpy())[0, 1]) < 0.05  # channels apart


def test_pairing_of_four_is_the_best_of_all_permutations():
    plain, dealt = noise_of(), noise_of(pairing=4)
    for x0, before, after in zip(LATENTS.split(4), plain.split(4), dealt.split(4), strict=True):
        cost = lambda order, x0=x0, eps=before: (x0 - eps[list(order)]).square().sum()  # noqa: E731
        best = min(itertools.permutations(range(4)), key=cost)
        torch.testing.assert_close(after, before[list(best)], atol=1e-4, rtol=1e-4)
    assert torch.equal(noise_of(pairing=1), plain)


def test_pairing_keeps_the_noise_and_shortens_the_paths():
    images, eps = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(1))
    dealt = paired(images, eps, 32)
    assert torch.equal(dealt.flatten(1).unique(dim=0), eps.unique(dim=0))  # the same set
    assert (images - dealt).square().sum() < 0.6 * (images - eps).square().sum()
    assert torch.equal(paired(images, eps, 1), eps)
    with pytest.raises(ValueError, match=r"objective.pairing=5 does not divide a micro-batch of 64 images, .* divisor"):
        paired(images, eps, 5)


@pytest.mark.slow
def test_two_ranks_equal_one_and_reduce_once_a_step(config, tmp_path):
    draws = ["objective.stratified=true", "objective.pairing=2"]  # which look at whole batches and at neighbours
    cfg = config("stage1", "train.images=48", *draws, name="one")
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
        "def counting(self, module, *rest):\n"
        "    wrapped = wrap(self, module, *rest)\n"
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
        "optim.warmup=16", "optim.lr=1e-3", "sample.every=1000000", "sample.first=1000000", *draws,
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
    with pytest.raises(FloatingPointError, match=r"guard.max_skipped=2 .*; lower optim.lr"):
        run(config("stage1", "train.images=64", "guard.max_skipped=2"))


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


def three_encoders() -> TextEncoders:
    """CLIP, CLIP with a projection and a T5, small and random, that read words of the shapes."""
    pair, torch_state = TextConfig(path="assets/shapes").build(), torch.get_rng_state()
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=641, d_model=200, d_kv=16, d_ff=64, num_layers=1, num_heads=4)).eval()
    torch.set_rng_state(torch_state)
    config = TextConfig(path="", encoders=["a", "b", "c"], tokenizers=["a", "b", "c"], length=12)
    return TextEncoders(config, [*pair.tokenizers, pair.tokenizers[0]], [*pair.encoders, t5])


def captioned(captions: list[str], **stored) -> Batch:
    """A batch without a picture, at positions from 0."""
    n = len(captions)
    return Batch(
        latents=torch.zeros(n, 0, 0, 0), captions=captions, class_id=torch.full((n,), -1), positions=torch.arange(n),
        sizes=torch.zeros(n, 7), valid=torch.ones(n, dtype=torch.bool), **stored,
    )  # fmt: skip


def dropped(conditioner, batch, dropout, shares, seed=0) -> tuple[Cond, Cond]:
    """The batch's condition with and without dropout."""
    plain, mixed = (
        condition(batch, conditioner, rate, seed, torch.device("cpu"), encoder_dropout)
        for rate, encoder_dropout in ((0.0, []), (dropout, shares))
    )
    return plain, mixed


def test_each_encoder_is_dropped_at_its_rate_and_by_itself():
    """SD3's 46.4 %; the other encoders' numbers stay to the bit."""
    conditioner, shares, n = Conditioner(three_encoders()), [0.464, 0.2, 0.7], 4000
    one = conditioner(["a red circle"])
    rows = {"text": one.text.half().expand(n, -1, -1), "text_mask": one.text_mask.expand(n, -1)}
    batch = captioned(["a red circle"] * n, **rows, pooled=one.pooled.half().expand(n, -1))
    plain, mixed = dropped(conditioner, batch, 0.0, shares)
    null, found = conditioner.null().to(dtype=torch.float16), []
    for region in conditioner.text.regions:
        here = slice(None), region.tokens, region.features
        gone = (mixed.text[here] != plain.text[here]).flatten(1).any(1)
        assert torch.equal(mixed.text[here][gone], null.text[here].expand(int(gone.sum()), -1, -1))
        assert torch.equal(mixed.text[here][~gone], plain.text[here][~gone])
        pooled = slice(None), region.pooled
        assert torch.equal(mixed.pooled[pooled], torch.where(gone[:, None], null.pooled[pooled], plain.pooled[pooled]))
        found.append(gone)
    gone = torch.stack(found).double()
    sigmas = torch.tensor([math.sqrt(share * (1 - share)) for share in shares]).double()
    assert ((gone.mean(1) - torch.tensor(shares)).abs() < 4 * sigmas / math.sqrt(n)).all()
    correlation = torch.corrcoef(gone)[[0, 0, 1], [1, 2, 2]]
    assert (correlation.abs() < 4 / math.sqrt(n)).all()
    assert gone.prod(0).mean().item() == pytest.approx(math.prod(shares), rel=0.25)


def test_all_encoders_dropped_is_the_null_condition():
    conditioner = Conditioner(three_encoders())
    batch = captioned(["a red circle", "a small blue star at the top"])
    _, every = dropped(conditioner, batch, 0.0, [1, 1, 1])
    _, whole = dropped(conditioner, batch, 1.0, [])
    _, none = dropped(conditioner, batch, 0.0, [0, 0, 0])
    for name in ("text", "text_mask", "pooled"):
        assert torch.equal(getattr(every, name), getattr(whole, name))
        assert torch.equal(getattr(none, name), getattr(conditioner(batch.captions), name))


def test_encoders_are_dropped_from_stored_text_as_from_encoded_text():
    """Stored text is cut to the longest of its batch."""
    conditioner = Conditioner(three_encoders())
    captions = ["a red circle", "a small blue star at the top", "two stars", ""] * 4
    cond = conditioner(captions)
    length = int(cond.text_mask.nonzero()[:, 1].max()) + 1
    assert 32 < length < conditioner.text.length
    stored = captioned(captions, text=cond.text[:, :length], text_mask=cond.text_mask[:, :length], pooled=cond.pooled)
    found, expected = (dropped(conditioner, batch, 0.1, [0.5] * 3)[1] for batch in (stored, captioned(captions)))
    assert torch.equal(found.text, expected.text[:, :length])
    assert torch.equal(found.text_mask, expected.text_mask[:, :length])
    assert torch.equal(found.pooled, expected.pooled)
    assert not torch.equal(found.text, cond.text[:, :length])


def test_shares_of_encoder_dropout_are_shares():
    with pytest.raises(ValueError, match=r"train.encoder_dropout=\[0.5, 1.5\] has a share outside 0 to 1"):
        TrainConfig(encoder_dropout=[0.5, 1.5])


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
        valid=torch.ones(2, dtype=torch.bool),
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
    with pytest.raises(ValueError, match=r"holds states of \(32, 192, .*, True\) .* give \(32, 192, .*, False\)"):
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
    check_text(cfg, encoders, [SimpleNamespace(text=None)])
    ids = Conditioner(encoders, None, getattr(cfg.model, "vector_dim", 0)).size_ids(torch.zeros(1, 7))
    assert sizes == (ids if ids is None else ids.shape[1])
