"""The optimizers: their rules against oracles, an exact no-op when skipped, exact resume, shards, 8 and 16 bits."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.mmdit import MMDiTConfig
from training import optim
from training.checkpoint import load_optimizer, optimizer_tensors
from training.optim import (
    GroupConfig,
    Kind,
    OptimConfig,
    Ruled,
    Weights,
    averaged,
    build_optimizer,
    check_state,
    gradient_norm,
    guarded_step,
    set_rate,
)
from training.rules import compress, expand, polar, round_by_chance

BF16 = {"weights": Weights.bf16}
CHOICES = [*(OptimConfig(kind=kind, lr=1e-2) for kind in Kind), OptimConfig(lr=1e-2, **BF16)]
CHOICES += [OptimConfig(kind=Kind.schedule_free, lr=1e-2, **BF16), OptimConfig(kind=Kind.muon, lr=1e-2, **BF16)]
each = pytest.mark.parametrize("config", CHOICES, ids=lambda c: f"{c.kind.value}-{c.weights.value}")


class Tiny(nn.Module):
    """Names as in a denoiser: one block with attention and MLP between two other layers."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, 2)
        attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(3 * width, width)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn})])
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        h = self.embed(x).mean((2, 3)).tanh()
        attn = self.blocks[0]["attn"]
        return self.head(h + attn["out"](attn["qkv"](h).tanh()))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def fill(net: nn.Module, step: int, scale: float = 1.0) -> None:
    """Gradients that are a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def go(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, lr: float = 1e-2) -> None:
    for step in steps:
        fill(net, step)
        guarded_step(optimizer, list(net.parameters()), lr * (1 + step), 1.0)


def bits(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {**net.state_dict(), **optimizer_tensors(net, optimizer)}
    return {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("draws/")}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@each
def test_a_skipped_step_changes_nothing_for_a_bad_gradient_as_for_a_veto(config):
    net = tiny()
    optimizer = build_optimizer(net, config)
    free = list(net.parameters())
    fill(net, 0)
    _, skipped = guarded_step(optimizer, free, 1e-2, 1.0, torch.ones(()))
    assert skipped == 1
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(free, tiny().parameters(), strict=True))
    go(net, optimizer, range(2))
    before = bits(net, optimizer)
    for bad in (math.nan, math.inf):
        fill(net, 2)
        next(net.parameters()).grad.view(-1)[0] = bad
        _, skipped = guarded_step(optimizer, free, 1e-2, 1.0)
        assert skipped == 1
        assert_equal(before, bits(net, optimizer))
    fill(net, 2)
    norm, skipped = guarded_step(optimizer, free, 1e-2, 1.0, veto=torch.ones(()), norm=gradient_norm(free))
    assert math.isfinite(norm) and skipped == 1
    assert_equal(before, bits(net, optimizer))
    go(net, optimizer, range(2, 3))
    assert not torch.equal(before["head.weight"], net.head.weight)


@each
def test_six_steps_are_three_saved_loaded_and_three_more(config, tmp_path):
    whole, first, second = tiny(), tiny(), tiny()
    optimizers = [build_optimizer(net, config) for net in (whole, first, second)]
    go(whole, optimizers[0], range(6))
    go(first, optimizers[1], range(3))
    second.load_state_dict(first.state_dict())
    save_file(optimizer_tensors(first, optimizers[1]), tmp_path / "optimizer.safetensors")
    load_optimizer(second, optimizers[2], load_file(tmp_path / "optimizer.safetensors"))
    check_state(optimizers[2])
    go(second, optimizers[2], range(3, 6))
    assert_equal(bits(whole, optimizers[0]), bits(second, optimizers[2]))


@each
def test_each_kind_learns_a_regression(config):
    net = tiny()
    optimizer = build_optimizer(net, config)
    torch.manual_seed(1)
    x, teacher = torch.randn(64, 3, 4, 4), Tiny()
    target = teacher(x).detach()
    kept = []
    for step in range(80):
        loss = (net(x.to(net.head.weight.dtype)).float() - target).square().mean()
        kept.append(loss.item())
        loss.backward()
        guarded_step(optimizer, list(net.parameters()), 5e-3 * (1 - step / 80), 1.0)
    with averaged(optimizer):
        last = (net(x.to(net.head.weight.dtype)).float() - target).square().mean().item()
    assert last < 0.1 * kept[0]


@pytest.mark.parametrize(("of", "into"), [("adamw", "muon"), ("muon", "adamw"), ("adamw", "adamw8bit")])
def test_state_of_another_kind_is_refused(of, into):
    net = tiny()
    optimizer, other = (build_optimizer(net, OptimConfig(kind=Kind(kind))) for kind in (of, into))
    go(net, optimizer, range(1))
    check_state(optimizer)
    load_optimizer(net, other, optimizer_tensors(net, optimizer))
    with pytest.raises(ValueError, match=r"state holds .*, but this optim.kind keeps .*; give the optim.kind of that"):
        check_state(other)


def test_plain_adamw_is_the_fused_kernel_and_its_rule_agrees_with_it():
    fused, ruled = tiny(), tiny()
    a = build_optimizer(fused, OptimConfig(lr=1e-2))
    assert type(a) is torch.optim.AdamW
    b = build_optimizer(ruled, OptimConfig(lr=1e-2, clip=math.inf, in_backward=True))
    b.norms = None  # its rule, stepped by hand
    go(fused, a, range(5))
    for parameter in ruled.parameters():
        parameter._post_accumulate_grad_hooks.clear()
    go(ruled, b, range(5))
    for p, q in zip(fused.parameters(), ruled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_adafactor_agrees_with_torch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.randn(7, 9)), nn.Parameter(torch.randn(11))

    torch.manual_seed(0)
    ours = Two()
    theirs = copy.deepcopy(ours)
    a = build_optimizer(ours, OptimConfig(kind=Kind.adafactor, weight_decay=0.0))
    b = torch.optim.Adafactor(theirs.parameters(), lr=1e-2)
    for step in range(6):
        fill(ours, step)
        fill(theirs, step)
        guarded_step(a, list(ours.parameters()), 1e-2, math.inf)
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_muon_agrees_with_torch_where_a_layer_is_one_matrix():
    ours, theirs = tiny(), tiny()
    a = build_optimizer(ours, OptimConfig(kind=Kind.muon, weight_decay=0.1))
    out = theirs.blocks[0]["attn"]["out"]
    b = torch.optim.Muon([out.weight], lr=1e-2, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        fill(ours, step)
        fill(theirs, step)
        guarded_step(a, list(ours.parameters()), 1e-2, math.inf)
        b.step()
    mine = ours.blocks[0]["attn"]["out"].weight
    moved = (out.weight - tiny().blocks[0]["attn"]["out"].weight).abs().mean()
    assert (mine - out.weight).abs().mean() < 0.04 * moved  # bfloat16 within, in another order


def test_muon_turns_q_k_and_v_apart_and_leaves_the_rest_to_adamw():
    net = tiny()
    optimizer = build_optimizer(net, OptimConfig(kind=Kind.muon, weight_decay=0.0))
    before = net.blocks[0]["attn"]["qkv"].weight.detach().clone()
    fill(net, 0)
    net.blocks[0]["attn"]["qkv"].weight.grad[:64] *= 1e3  # a loud q does not drown k and v
    guarded_step(optimizer, list(net.parameters()), 1e-2, math.inf)
    for part in (net.blocks[0]["attn"]["qkv"].weight - before).detach().split(64):
        values = torch.linalg.svdvals(part / (1e-2 * 0.2 * 8))
        assert 0.5 < values.median() < 1.3 and values.max() < 1.4
    kinds = set(optimizer_tensors(net, optimizer))
    assert {k for k in kinds if "momentum" in k} == {
        f"momentum_buffer/blocks.0.attn.{name}.weight" for name in ("qkv", "out")
    }
    assert "exp_avg/head.weight" in kinds
    with pytest.raises(ValueError, match="optim.kind=muon finds no free matrix .*; choose optim.kind=adamw"):
        build_optimizer(nn.Linear(3, 3), OptimConfig(kind=Kind.muon))


def test_muon_finds_the_matrices_of_a_real_model():
    net = MMDiTConfig(hidden=32, depth=2, heads=2, in_channels=4, text_dim=8, pooled_dim=8).build()
    optimizer = build_optimizer(net, OptimConfig(kind=Kind.muon))
    names = {id(p): name for name, p in net.named_parameters()}
    turned = {names[id(p)] for group in optimizer.param_groups if "MUON" in rule_name(group) for p in group["params"]}
    assert {"blocks.0.image.attn.qkv.weight", "blocks.1.image.mlp.fc1.weight"} <= turned
    assert not [name for name in turned if "modulation" in name or "embed" in name or "final" in name]


def rule_name(group) -> str:
    from training import rules

    return next(name for name in ("ADAMW", "MUON") if getattr(rules, name) is group["rule"])


@each
def test_parameters_of_one_shape_together_go_as_each_alone(config, monkeypatch):
    ends = []
    for together in (1 << 22, 1):
        monkeypatch.setattr(optim, "TOGETHER", together)
        torch.manual_seed(0)
        net = MMDiTConfig(hidden=32, depth=3, heads=2, in_channels=4, text_dim=8, pooled_dim=8).build()
        optimizer = build_optimizer(net, config)
        go(net, optimizer, range(3))
        ends.append(bits(net, optimizer))
    if config.kind is not Kind.muon:
        return assert_equal(*ends)
    near = 0.1 if config.weights is Weights.bf16 else 1e-3  # of steps of 1e-2 to 3e-2, turned in bfloat16
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=near, msg=lambda m, name=name: f"{name}: {m}")


def test_polar_brings_singular_values_near_one_and_keeps_the_vectors():
    torch.manual_seed(0)
    for shape in ((1, 32, 32), (3, 16, 40), (2, 48, 16)):
        x = torch.randn(shape)
        y = polar(x)
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.3 and values.max() < 1.3
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        off = (u.mT @ y @ vh.mT) - torch.diag_embed((u.mT @ y @ vh.mT).diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 0.05


def test_schedule_free_is_the_three_sequences_of_its_paper():
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False).double().float()
    optimizer = build_optimizer(net, OptimConfig(kind=Kind.schedule_free, betas=[0.9, 0.99], weight_decay=0.1))
    x = z = net.weight.detach().double().clone()
    v, total = torch.zeros_like(x), 0.0
    for t in range(1, 21):
        lr = 1e-2 * min(1.0, t / 5)
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(net.weight.detach().double(), y, rtol=1e-5, atol=1e-5)
        g = torch.randn(3, 4, generator=torch.Generator().manual_seed(t))
        net.weight.grad = g.clone()
        guarded_step(optimizer, [net.weight], lr, math.inf)
        v = 0.99 * v + 0.01 * g.double() ** 2
        rate = lr * math.sqrt(1 - 0.99**t)
        z = z - rate * (g.double() / (v.sqrt() + 1e-8) + 0.1 * y)
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
    trained = net.weight.detach().clone()
    with averaged(optimizer):
        torch.testing.assert_close(net.weight.detach().double(), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(net.weight, trained)


def test_other_kinds_have_no_other_weights_to_draw_with():
    net = tiny()
    optimizer = build_optimizer(net, OptimConfig(kind=Kind.adamw8bit))
    go(net, optimizer, range(2))
    before = net.head.weight.detach().clone()
    with averaged(optimizer):
        assert torch.equal(net.head.weight, before)


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -0.3337, 3e-20, 1e30):
        x = torch.full((200_000,), value)
        rounded = round_by_chance(x, generator).float()
        near = x[0].bfloat16().float()
        ulp = (rounded.unique() - near).abs().max()
        assert len(rounded.unique()) == 2 and ulp <= abs(value) * 2**-7
        error = (rounded.double().mean() - x[0].double()).abs()
        assert error < 4 * ulp * 0.5 / 200_000**0.5  # four standard deviations
    exact = torch.tensor([0.0, 1.0, -2.5])
    assert torch.equal(round_by_chance(exact, generator).float(), exact)


def test_small_steps_are_lost_to_the_nearest_and_kept_by_chance():
    moved = {}
    for chance in (False, True):
        net = nn.Linear(64, 64, bias=False)
        nn.init.ones_(net.weight)
        config = OptimConfig(weight_decay=0.0, stochastic_rounding=chance, **BF16)
        optimizer = build_optimizer(net, config)
        assert net.weight.dtype is torch.bfloat16
        for _ in range(50):
            net.weight.grad = torch.ones_like(net.weight)
            guarded_step(optimizer, [net.weight], 1e-4, math.inf)  # a 40th of the last bit
        moved[chance] = 1 - net.weight.float().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(50e-4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_eight_bits_are_unbiased_over_the_decades_of_a_block(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.logspace(-4, 0, 300).repeat(2, 1)
    if dtype is torch.int8:
        x[:, ::2] *= -1
    draws = torch.stack([expand(*compress(x, dtype, generator)) for _ in range(2000)])
    torch.testing.assert_close(draws.mean(0), x, rtol=0.01, atol=2e-6)
    assert (draws.std(0) / x.abs())[x.abs() > 1e-3].max() < (0.05 if dtype is torch.int8 else 0.025)
    nothing = torch.zeros(2, 300)
    assert torch.equal(expand(*compress(nothing, dtype, generator)), nothing)


def test_moments_of_eight_bits_take_two_bytes_a_weight_and_small_tensors_none():
    net = nn.Linear(512, 512)
    optimizer = build_optimizer(net, OptimConfig(kind=Kind.adamw8bit))
    go(net, optimizer, range(1))
    of_weight = [t for k, t in optimizer_tensors(net, optimizer).items() if k.endswith("/weight")]
    assert sum(t.numel() * t.element_size() for t in of_weight) < 2.05 * net.weight.numel()
    assert optimizer.state[net.bias]["exp_avg"].dtype is torch.float32


def test_an_update_in_the_backward_pass_equals_one_after_it():
    after, within = tiny(), tiny()
    a = build_optimizer(after, OptimConfig(kind=Kind.muon))
    b = build_optimizer(within, OptimConfig(kind=Kind.muon, in_backward=True, clip=math.inf))
    x = torch.randn(8, 3, 4, 4)
    for step in range(4):
        lr = 1e-2 * (1 + step)
        set_rate(b, lr)
        norms = []
        for net, optimizer in ((after, a), (within, b)):
            net(x).square().mean().backward()
            norms.append(guarded_step(optimizer, list(net.parameters()), lr, math.inf)[0])
        torch.testing.assert_close(*norms)
        assert all(p.grad is None for p in within.parameters())
    assert_equal(bits(after, a), bits(within, b))
    before = bits(within, b)
    (within(x).square().mean() * math.nan).backward()
    assert guarded_step(b, list(within.parameters()), 1e-2, math.inf)[1] == 1
    assert_equal(before, bits(within, b))
    within(x).square().mean().backward()
    with pytest.raises(ValueError, match="optim.in_backward=true has updated before a guard .*; set it to false"):
        guarded_step(b, list(within.parameters()), 1e-2, math.inf, veto=torch.zeros(()))


def test_what_cannot_work_is_refused():
    with pytest.raises(
        ValueError, match=r"optim.in_backward=true .* optim.clip=1.0 could not act; give optim.clip=inf"
    ):
        OptimConfig(in_backward=True)
    config = OptimConfig(in_backward=True, clip=math.inf)
    config.check_steps(1, 1)
    with pytest.raises(ValueError, match=r"a step sums 4 micro-batches on each of 2 replicas; .* set it to false"):
        config.check_steps(4, 2)
    with pytest.raises(ValueError, match=r"optim.betas=\[0.9, 1.0\] .*; choose \[0.9, 0.99\] and 0.95"):
        OptimConfig(betas=[0.9, 1.0])
    with pytest.raises(ValueError, match=r"optim.betas\[0\]=0 leaves nothing .*; choose 0.9"):
        OptimConfig(kind=Kind.schedule_free, betas=[0.0, 0.99])


@pytest.mark.parametrize("kind", list(Kind))
def test_groups_scale_the_rate_of_every_kind(kind):
    net = tiny()
    frozen = GroupConfig(pattern="^embed", frozen=True)
    config = OptimConfig(kind=kind, groups=[frozen, GroupConfig(pattern="head", lr_scale=0.0)])
    before = copy.deepcopy(net.state_dict())
    optimizer = build_optimizer(net, config)
    go(net, optimizer, range(2))
    after = net.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("embed", "head"))}
    assert isinstance(optimizer, Ruled) == (kind is not Kind.adamw)


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.training.test_optim import CHOICES, fill, guarded_step, optimizer_tensors, tiny
from training.optim import Kind, averaged, build_optimizer
from training.sharded import local, whole

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
for config in CHOICES:
    alone, net = tiny(), tiny()
    fully_shard(net, mesh=mesh)
    optimizer, other = build_optimizer(net, config), build_optimizer(alone, config)
    ours, theirs = list(net.parameters()), list(alone.parameters())
    bf16 = ours[0].dtype is torch.bfloat16
    for step in range(3):
        fill(alone, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = dist.tensor.distribute_tensor(q.grad, mesh, p.placements)
        if step == 2:  # a bad number on one rank is skipped by both
            if dist.get_rank() == 1:
                local(ours[0].grad).view(-1)[0] = float("nan")
            before = [local(p).clone() for p in ours]
        norm, skipped = guarded_step(optimizer, ours, 1e-2, 1.0)
        assert skipped == (step == 2), (config, step, norm)
        if step == 2:
            assert all(torch.equal(a, local(p)) for a, p in zip(before, ours, strict=True)), config
        else:
            expected, _ = guarded_step(other, theirs, 1e-2, 1.0)
            torch.testing.assert_close(norm, expected, rtol=1e-2 if bf16 else 1e-5, atol=0)
    noisy = config.kind is Kind.adamw8bit or bf16  # other shards draw other chances
    near = 2e-2 if noisy else 5e-4 if config.kind is Kind.muon else 1e-6  # polar() rounds to bfloat16
    with averaged(optimizer), averaged(other):
        for (name, p), q in zip(net.named_parameters(), theirs, strict=True):
            torch.testing.assert_close(
                whole(p.detach()), q.detach(), rtol=1e-4, atol=near, msg=lambda m: f"{config} {name} {m}"
            )
    wanted = optimizer_tensors(alone, other)
    for key, tensor in optimizer_tensors(net, optimizer).items():
        assert tensor.shape == wanted[key].shape and tensor.dtype == wanted[key].dtype, (config, key, tensor.shape)
        if not noisy and config.kind is not Kind.muon:
            torch.testing.assert_close(whole(tensor), wanted[key], rtol=1e-4, atol=1e-6)
    # read whole on every rank, the state goes on as it was
    saved = {key: whole(tensor).clone() for key, tensor in optimizer_tensors(net, optimizer).items()}
    again = build_optimizer(net, config)
    for key, tensor in saved.items():
        again.state[dict(net.named_parameters())[key.partition("/")[2]]][key.partition("/")[0]] = tensor
    if config.kind is Kind.adamw and not bf16:
        continue  # the fused kernel's are sharded in loading
    kept = [local(p).clone() for p in ours]
    ends = []
    for stepped in (optimizer, again):
        fill(alone, 3)
        for p, q, w in zip(ours, theirs, kept, strict=True):
            p.grad = dist.tensor.distribute_tensor(q.grad, mesh, p.placements)
            with torch.no_grad():
                local(p).copy_(w)
        guarded_step(stepped, ours, 1e-2, 1.0)
        ends.append({key: local(t).clone() for key, t in optimizer_tensors(net, stepped).items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), config
dist.barrier()  # a rank that leaves while the other is at work may abort
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_over_two_ranks_each_kind_does_as_on_one(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
