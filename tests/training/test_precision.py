"""FP8: where it is had and where refused, what it converts, that checkpoints cannot tell, and float32 gradients.

torchao's emulation rounds as the device does, and is tested where torchao is installed. Transformer Engine needs CUDA:
a stand-in that keeps its contract takes its place here (no forward outside of its autocast, rows in multiples, no
gradient for autograd when it is added to main_grad), so ours is tested and theirs is not.

Run by torchrun, this file is two ranks that train with main_grad: see `test_main_grad_is_the_mean_over_ranks`.
"""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.loader import Batches, open_shards
from diffusion.objective import Objective
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.layers import Checkpointing
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import Conditioner
from models.unet import UNetConfig
from models.weights import save_denoiser
from training import precision
from training.distributed import Parallel, Ranks, session
from training.optim import OptimConfig, build_optimizer, guarded_step
from training.precision import FP8Config, Library, MainGrads, Recipe, check_main_grad, convert, linears, recipe
from training.step import clean, condition, losses

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
EMULATED, TE = FP8Config(emulate=True), FP8Config(library=Library.transformer_engine)


def cards(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: set[str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some card")
    monkeypatch.setattr(precision, "find_spec", lambda name: name in installed or None)


@pytest.mark.parametrize(
    ("capability", "by_engine", "by_torchao"),
    [
        ((8, 9), Recipe.current, Recipe.torchao),
        ((9, 0), Recipe.current, Recipe.torchao),
        ((10, 0), Recipe.mxfp8, Recipe.torchao),
        ((10, 3), Recipe.mxfp8, Recipe.torchao),
    ],
)
def test_the_recipe_is_the_devices(monkeypatch, capability, by_engine, by_torchao):
    cards(monkeypatch, capability, {"transformer_engine", "torchao"})
    assert recipe(FP8Config(), GPU) is by_engine
    assert recipe(FP8Config(library=Library.torchao), GPU) is by_torchao
    cards(monkeypatch, capability, {"torchao"})
    assert recipe(FP8Config(), GPU) is by_torchao


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (12, 0), (12, 1)])
def test_a_card_without_fp8_is_refused_and_bf16_is_a_wish(monkeypatch, capability):
    cards(monkeypatch, capability, {"transformer_engine", "torchao"})
    number = f"{capability[0]}.{capability[1]}"
    with pytest.raises(ValueError, match=f"needs compute capability 8.9, 9.0, 10.0, 10.3, and some card has {number};"):
        recipe(FP8Config(), GPU)
    said: list[str] = []
    assert recipe(FP8Config(fallback=True), GPU, said.append) is Recipe.bf16
    assert len(said) == 1
    assert said[0].startswith("fp8.fallback=true: all is computed in bf16, because train.precision=fp8 needs")


def test_refusals(monkeypatch):
    with pytest.raises(
        ValueError, match="needs an NVIDIA GPU, and this device is cpu; choose train.precision=bf16, or"
    ):
        recipe(FP8Config(), CPU)
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose MI200 says 9.0
    cards(monkeypatch, (9, 0), {"torchao"})
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this device is some card"):
        recipe(FP8Config(), GPU)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ValueError, match="fp8.main_grad=true needs Transformer Engine, which is not installed; pip"):
        recipe(FP8Config(main_grad=True), GPU)
    cards(monkeypatch, (9, 0), set())
    for config, package in ((FP8Config(), "torchao"), (TE, "'transformer-engine.pytorch.'"), (EMULATED, "torchao")):
        with pytest.raises(ValueError, match=f"which is not installed; pip install {package}, or choose train.precis"):
            recipe(config, GPU)
    with pytest.raises(ValueError, match="fp8.emulate=true is not for fp8.library=transformer_engine"):
        FP8Config(emulate=True, library=Library.transformer_engine)
    for wrong in (partial(FP8Config, emulate=True), partial(FP8Config, library=Library.torchao)):
        with pytest.raises(ValueError, match="fp8.main_grad=true needs Transformer Engine, whose products add"):
            wrong(main_grad=True)


def scrambled(denoiser: nn.Module) -> nn.Module:
    """Without the zeros that silence branches at the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def mmdit(hidden: int = 32):
    torch.manual_seed(0)
    config = MMDiTConfig(in_channels=4, base_size=8, hidden=hidden, depth=2, heads=2, text_dim=24, pooled_dim=8, dual=1)
    return scrambled(config.build())


def inputs(batch: int = 3):
    torch.manual_seed(2)  # 3 x 16 tokens of the picture, and 3 x 5 of the text, which is no multiple of anything
    return (
        torch.randn(batch, 4, 8, 8),
        torch.linspace(0.1, 0.9, batch),
        Cond(text=torch.randn(batch, 5, 24), pooled=torch.randn(batch, 8)),
    )


KINDS = {
    "ccdit": (CCDiTConfig(hidden=32, depth=1, heads=2), {"attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2"}),
    "pixart": (
        PixArtConfig(hidden=32, depth=1, heads=2, text_dim=24),
        {"attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2", "cross_attn.q", "cross_attn.kv", "cross_attn.out"},
    ),
    "mmdit": (
        MMDiTConfig(hidden=32, depth=1, heads=2, text_dim=24, pooled_dim=8),
        {"text.attn.qkv", "image.attn.qkv", "image.attn.out", "image.mlp.fc1", "image.mlp.fc2"},
    ),
    "unet": (
        UNetConfig(channels=[32], depths=[0], heads=[2], layers=1, text_dim=16, groups=8),
        {"attn.qkv", "attn.out", "cross_attn.q", "cross_attn.kv", "cross_attn.out", "mlp.fc1", "mlp.fc2"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_mlps_of_the_blocks_are_converted_and_nothing_else(kind):
    config, names = KINDS[kind]
    found = linears(config.build())
    assert {name.split("blocks.0.")[1] for name in found} == names
    assert not any(word in name for name in found for word in ("modulation", "embed", "final", "time", "pooled_mlp"))


def test_widths_that_do_not_fit_are_named_or_left():
    denoiser = mmdit(hidden=24)
    with pytest.raises(
        ValueError,
        match="multiples of 16, and 15 of 15 layers have others, such as blocks.0.text.attn.qkv from 24 to 72; choose",
    ):
        convert(denoiser, Recipe.emulated, EMULATED)
    assert convert(copy.deepcopy(denoiser), Recipe.bf16, EMULATED) == []
    with pytest.raises(
        ValueError, match="multiples of 32, and 4 of 4 layers have others, such as blocks.0.attn.qkv from 48 to"
    ):
        convert(CCDiTConfig(hidden=48, depth=1, heads=2).build(), Recipe.mxfp8, TE)


@torchao
def test_widths_that_do_not_fit_stay_in_bf16_where_that_is_asked_for():
    denoiser = UNetConfig(channels=[32], depths=[0], heads=[2], layers=1, text_dim=20, groups=8).build()
    names = convert(denoiser, Recipe.emulated, FP8Config(emulate=True, fallback=True))
    assert len(names) == 6
    assert not any("cross_attn.kv" in name for name in names)
    assert type(denoiser.middle.attn[0].blocks[0].cross_attn.kv) is nn.Linear
    assert type(denoiser.middle.attn[0].blocks[0].cross_attn.q).__name__ == "Float8Linear"


# --- a stand-in for Transformer Engine ---------------------------------------------------------------------------


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Q(x) with one scale for all, in the precision of x."""
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return ((x.float() / scale).to(dtype).float() * scale).to(x.dtype)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, fused: bool) -> Tensor:
        x_q, weight_q = rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x_q, weight_q)
        ctx.main_grad = weight.main_grad if fused else None  # type: ignore[attr-defined]
        return x_q @ weight_q.T

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        (x_q, weight_q), g = ctx.saved_tensors, rounded(g, torch.float8_e5m2)
        if ctx.main_grad is None:
            return g @ weight_q, g.T @ x_q, None
        ctx.main_grad.add_(g.T @ x_q)
        return g @ weight_q, None, None


class StandIn(nn.Module):
    """`transformer_engine.pytorch.Linear`, as far as it is used."""

    multiple = 0  # of the recipe in force; 0 outside of autocast

    def __init__(self, in_features, out_features, bias, params_dtype, device, fuse_wgrad_accumulation):
        super().__init__()
        self.fused = fuse_wgrad_accumulation
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else torch.Tensor()

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        assert StandIn.multiple, "outside of autocast nothing would be rounded"
        assert not x[..., 0].numel() % StandIn.multiple
        y = Product.apply(x, self.weight, self.fused)
        return y + self.bias if len(self.bias) else y  # type: ignore[operator]


class autocast:  # noqa: N801
    def __init__(self, enabled, recipe):
        self.multiple = enabled * (32 if recipe == "MXFP8BlockScaling" else 16)

    def __enter__(self):
        StandIn.multiple = self.multiple

    def __exit__(self, *_):
        StandIn.multiple = 0


def stand_in(install=sys.modules.__setitem__) -> None:
    """Put the stand-in where `import transformer_engine` finds it."""
    recipes = {name: partial(str, name) for name in ("Float8CurrentScaling", "MXFP8BlockScaling")}
    contents = {"": {}, ".common": {}, ".common.recipe": recipes, ".pytorch": {"Linear": StandIn, "autocast": autocast}}
    for name, content in contents.items():
        module = ModuleType(f"transformer_engine{name}")
        module.__dict__.update(content, __path__=[], __spec__=ModuleSpec(module.__name__, None))
        install(module.__name__, module)
    sys.modules["transformer_engine"].__dict__["pytorch"] = sys.modules["transformer_engine.pytorch"]
    precision._transformer_engine.cache_clear()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch):
    stand_in(partial(monkeypatch.setitem, sys.modules))
    yield
    precision._transformer_engine.cache_clear()


# --- what a conversion leaves alone, and what it computes ---------------------------------------------------------

HOWS = [
    pytest.param(Recipe.emulated, EMULATED, marks=torchao),
    pytest.param(Recipe.current, TE),
    pytest.param(Recipe.mxfp8, TE),
    pytest.param(Recipe.current, FP8Config(library=Library.transformer_engine, main_grad=True)),
]


@pytest.mark.parametrize(("how", "config"), HOWS)
def test_checkpoints_optimizers_and_averages_cannot_tell(how, config, engine, tmp_path):
    denoiser = mmdit()
    save_denoiser(denoiser, tmp_path, "before")
    kept, parameters = copy.deepcopy(denoiser.state_dict()), dict(denoiser.named_parameters())
    names = convert(denoiser, how, config)
    assert len(names) == len(linears(mmdit())) == 15
    assert list(denoiser.state_dict()) == list(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in denoiser.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in denoiser.named_parameters())
    assert all(parameter.dtype is torch.float32 for parameter in parameters.values())
    save_denoiser(denoiser, tmp_path, "after")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    denoiser.load_state_dict(kept, strict=True)


def gradients(denoiser: nn.Module, checkpointing: Checkpointing = Checkpointing.none, bf16: bool = False):
    denoiser.checkpoint(checkpointing)
    denoiser.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        out = denoiser(*inputs())
    out.float().square().mean().backward()
    return [out.detach().float(), *(parameter.grad.clone() for parameter in denoiser.parameters())]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("how", "config"), HOWS[:3])
def test_products_are_the_same_up_to_fp8(how, config, engine):
    exact = gradients(mmdit())
    denoiser = mmdit()
    convert(denoiser, how, config)
    found = gradients(denoiser)
    assert 1e-3 < distance(found[0], exact[0]) < 0.1  # e4m3 has 3 bits behind the point: up to 1/16 for each number
    assert max(map(distance, found, exact)) < 0.3
    again = gradients(denoiser, Checkpointing.full)  # blocks that are computed again round alike
    assert all(map(torch.equal, found, again))


@torchao
def test_under_autocast_gradients_are_float32_and_the_same_up_to_fp8():
    exact = gradients(mmdit())
    denoiser = mmdit()
    convert(denoiser, Recipe.emulated, EMULATED)
    found = gradients(denoiser, bf16=True)
    assert all(tensor.dtype is torch.float32 for tensor in found)
    assert distance(found[0], exact[0]) < 0.1
    assert max(map(distance, found, exact)) < 0.3


@torchao
def test_the_emulation_rounds_as_written():
    """y = Q(x) Q(w)^T + b, against a few lines of ours."""
    torch.manual_seed(0)
    denoiser, x = mmdit(), torch.randn(7, 5, 32)
    convert(denoiser, Recipe.emulated, EMULATED)
    layer = denoiser.blocks[0].image.mlp.fc1
    expected = rounded(x, torch.float8_e4m3fn) @ rounded(layer.weight, torch.float8_e4m3fn).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@torchao
def test_fifty_steps_on_shapes_end_where_float32_does(config):
    cfg = config("stage1", "model=ccdit_tiny", "train.images=800", "train.batch_size=16")
    trained = {how: fifty_steps(cfg, how) for how in (Recipe.bf16, Recipe.emulated)}
    exact, found = (sum(trained[how][-10:]) / 10 for how in (Recipe.bf16, Recipe.emulated))
    assert exact < 0.9 * sum(trained[Recipe.bf16][:10]) / 10  # it learnt something
    assert trained[Recipe.emulated] != trained[Recipe.bf16]
    assert found == pytest.approx(exact, rel=0.01)


def fifty_steps(cfg, how: Recipe) -> list[float]:
    torch.manual_seed(0)
    denoiser = cfg.model.build()
    optimizer, objective = build_optimizer(denoiser, cfg.optim), Objective(cfg.objective)
    convert(denoiser, how, EMULATED)
    conditioner = Conditioner(None, cfg.model.num_classes, 0)
    sets = open_shards(cfg.data, num_classes=cfg.model.num_classes)
    found, size = [], cfg.train.batch_size
    batches = Batches(cfg.data, sets, 0, start=0, stop=800, batch_size=size, micro_batch=size, rank=0, world=1).loader()
    for batch in batches:
        cond = condition(batch, conditioner, 0.1, 0, CPU)
        loss = losses(denoiser, objective, clean(batch, 0), cond, batch.positions, 0, size)[0].mean()
        loss.backward()
        guarded_step(optimizer, list(denoiser.parameters()), 1e-3, 1.0)
        found.append(float(loss.detach()))
    assert len(found) == 50
    return found


# --- main_grad ----------------------------------------------------------------------------------------------------


def micro_batches(count: int) -> list:
    x, t, cond = inputs(8)
    return [(x[i::count], t[i::count], cond.select(torch.arange(i, 8, count))) for i in range(count)]


def one_step(main_grad: bool, batches: list, ranks: Ranks) -> nn.Module:
    """A step of the loop on this rank's batches: what run.py does, with DDP where there are ranks."""
    denoiser = mmdit()
    optimizer = build_optimizer(denoiser, OptimConfig(eps=1e-3))
    config = FP8Config(library=Library.transformer_engine, main_grad=main_grad)
    main = MainGrads(denoiser, convert(denoiser, Recipe.current, config) if main_grad else [])
    if not main_grad:
        convert(denoiser, Recipe.current, config)
    wrapped = ranks.wrap(denoiser)
    for _ in range(2):
        main.start()
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if ranks.world == 1 or last else wrapped.no_sync():
                (wrapped(*batch).square().sum() / 100).backward()
        main.finish(ranks)
        guarded_step(optimizer, list(denoiser.parameters()), 1e-3, 1e9)
    return denoiser


ALONE = Ranks(0, 1, CPU)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("count", [1, 2])
def test_main_grad_is_the_gradient(engine, count):
    batches = micro_batches(count)
    assert same_weights(one_step(True, batches, ALONE), one_step(False, batches, ALONE))


def test_main_grad_reaches_the_optimizer_and_starts_anew(engine):
    denoiser, batch = mmdit(), micro_batches(1)[0]
    names = convert(denoiser, Recipe.current, FP8Config(main_grad=True))
    main, weight = MainGrads(denoiser, names), denoiser.get_parameter(f"{names[0]}.weight")
    found = []
    for _ in range(2):
        main.start()
        denoiser(*batch).square().mean().backward()
        assert weight.grad is None
        main.finish(ALONE)
        found.append(weight.grad.clone())
        denoiser.zero_grad(set_to_none=True)
    assert found[0].any()
    assert torch.equal(*found)


def test_main_grad_is_refused_where_autograd_must_bring_the_gradient():
    config = FP8Config(main_grad=True)
    check_main_grad(config, Parallel.ddp, in_backward=False)
    check_main_grad(FP8Config(), Parallel.fsdp, in_backward=True)
    with pytest.raises(ValueError, match="whole weights on every rank, and train.parallel=hsdp shards them; choose"):
        check_main_grad(config, Parallel.hsdp, in_backward=False)
    with pytest.raises(ValueError, match="optim.in_backward=true updates a weight when autograd brings its gradient"):
        check_main_grad(config, Parallel.ddp, in_backward=True)


def test_main_grad_leaves_frozen_weights_alone(engine):
    denoiser = mmdit()
    names = convert(denoiser, Recipe.current, FP8Config(main_grad=True))
    frozen = denoiser.get_parameter(f"{names[0]}.weight").requires_grad_(False)
    MainGrads(denoiser, names).finish(ALONE)
    assert frozen.grad is None
    assert denoiser.get_parameter(f"{names[1]}.weight").grad is not None


def test_main_grad_is_the_mean_over_ranks(tmp_path):
    """Two ranks end with the same weights: those of DDP with ordinary gradients, to float order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, str(tmp_path)], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    start = mmdit().state_dict()
    for count in (1, 2):
        one, other, ordinary = (load_file(tmp_path / f"{name}-{count}") for name in ("main-0", "main-1", "grad-0"))
        assert one.keys() == other.keys() == ordinary.keys() == start.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
            torch.testing.assert_close(tensor, ordinary[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(tensor, start[name]), name


def rank_of_two(folder: Path) -> None:
    stand_in()
    with session() as ranks:
        for count in (1, 2):
            batches = micro_batches(2 * count)[ranks.rank :: 2]
            for name, main_grad in (("main", True), ("grad", False)):
                trained = one_step(main_grad, batches, ranks).state_dict()
                save_file(trained, folder / f"{name}-{ranks.rank}-{count}")


# --- the real thing -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("library", ["torchao", "transformer_engine"])
def test_on_the_device_products_are_the_same_up_to_fp8(library):
    config = FP8Config(library=Library[library])
    try:
        how = recipe(config, GPU)
    except ValueError as reason:
        pytest.skip(str(reason))
    found = []
    for here in (Recipe.bf16, how):
        denoiser = mmdit(64).to(GPU)
        convert(denoiser, here, config)
        x, t, cond = inputs()
        with torch.autocast("cuda", torch.bfloat16):
            out = denoiser(x.to(GPU), t.to(GPU), cond.to(GPU))
        out.float().square().mean().backward()
        found.append([out.detach().float(), *(parameter.grad for parameter in denoiser.parameters())])
    assert max(map(distance, found[1], found[0])) < 0.3


if __name__ == "__main__":
    rank_of_two(Path(sys.argv[1]))
