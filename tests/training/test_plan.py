"""What a plan foretells is what is measured: memory of a step, shards, state, and the sizes of public parts."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks.measure import memory as measured
from configs.schema import compose
from diffusion.objective import Objective
from models.layers import Checkpointing
from training.ema import EMA
from training.optim import Kind, OptimConfig, build_optimizer, guarded_step
from training.plan import (
    BIG_G,
    CLIP_L,
    CLIP_L_PROJECTED,
    GIB,
    SD3_VAE,
    SD_VAE,
    T5_XXL,
    T5GEMMA_XL,
    Parts,
    Question,
    Rehearsal,
    asked,
    frozen_parts,
    memory,
    numbers,
    on_meta,
    shard,
    usable,
    ways,
)
from training.step import losses

MODELS = {"ccdit_tiny": "stage1", "pixart_tiny": "stage2", "mmdit_tiny": "stage3", "unet_tiny": "stage2"}


def config(model, *overrides):
    return compose(MODELS[model], [f"model={model}", "train.batch_size=8", *overrides])


def foretold(cfg):
    rehearsal = Rehearsal(cfg, frozen_parts(cfg), cuda=False)
    way = asked(cfg, 1)
    return rehearsal, memory(rehearsal, Parts(), way, shard(cfg, 1), rehearsal.step(way.micro_batch, way.checkpointing))


def trained(cfg, latent, cond):
    """Peak bytes of a run's two steps, from before its denoiser is built; and of a third by itself."""
    held = {}
    micro = cfg.train.micro_batch_of(1)
    objective = Objective(cfg.objective)
    half = cfg.train.precision.value == "bf16"

    def step():
        denoiser, optimizer, ema = held["denoiser"], held["optimizer"], held["ema"]
        for _ in range(cfg.train.batch_size // micro):
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                rows = cond._map(lambda one: torch.ones(micro, *one.shape[1:], dtype=one.dtype))
                x0, places = torch.rand(micro, *latent), torch.arange(micro)
                loss, *_ = losses(denoiser, objective, x0, rows, places, 0, cfg.train.batch_size)
            loss.sum().backward()
            del loss, _, x0, rows
        guarded_step(optimizer, [p for p in denoiser.parameters() if p.requires_grad], 1e-4, 1.0)
        ema.update(denoiser, 8, 8)

    def run():
        denoiser = cfg.model.build()
        denoiser.checkpoint(cfg.train.checkpointing, cfg.train.checkpoint_every)
        held.update(denoiser=denoiser, optimizer=build_optimizer(denoiser, cfg.optim), ema=EMA(denoiser, cfg.ema))
        step()
        step()

    return measured(run)[0] * 2**20, measured(step)[0] * 2**20


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["train.micro_batch=4"],
        ["train.checkpointing=full"],
        ["train.checkpointing=selective", "train.precision=bf16"],
    ],
    ids=["plain", "two passes", "full", "selective, bf16"],
)
def test_memory_is_what_a_run_takes(model, options):
    """Within a twentieth, of all and of what a step adds."""
    cfg = config(model, *options)
    rehearsal, held = foretold(cfg)
    total, step = trained(cfg, rehearsal.latent, rehearsal.cond)
    assert held.total == pytest.approx(total, rel=0.05)
    assert held.gradients + held.activations == pytest.approx(step, rel=0.05)


@pytest.mark.parametrize("kind", Kind)
def test_optimizer_state_is_what_a_step_leaves(kind):
    cfg = config("mmdit_tiny", f"optim.kind={kind.value}")
    foretold_state, _ = Rehearsal(cfg, frozen_parts(cfg), cuda=False).optimizer_bytes(cfg.optim)
    denoiser = cfg.model.build()
    optimizer = build_optimizer(denoiser, cfg.optim)
    for parameter in denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guarded_step(optimizer, list(denoiser.parameters()), 1e-4, 1.0)
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert foretold_state == pytest.approx(sum(x.nbytes for x in tensors), rel=0.01)


def test_weights_in_bfloat16_and_frozen_ones_are_smaller():
    plain, _ = foretold(config("pixart_tiny"))
    half, _ = foretold(config("pixart_tiny", "optim.weights=bf16", "train.precision=bf16"))
    assert half.weights == plain.weights / 2
    frozen, held = foretold(config("pixart_tiny", "optim.groups=[{pattern: blocks, frozen: true}]"))
    assert held.gradients < plain.gradients / 5
    assert frozen.optimizer == pytest.approx(2 * held.gradients, rel=0.01)


def test_adapters_alone_have_gradients_and_averages():
    plain, _ = foretold(config("pixart_tiny"))
    cfg = config("pixart_tiny", "model.lora.rank=4", "init.from=assets/shapes/pipeline")
    frozen, held = foretold(cfg)
    adapters = sum(p.nbytes for p in on_meta(cfg).parameters() if p.requires_grad)
    assert frozen.weights == plain.weights + adapters
    assert frozen.ema == held.gradients == adapters < plain.gradients / 20
    assert frozen.optimizer == pytest.approx(2 * adapters, rel=0.01)


def test_shards_are_a_share_and_rows_that_do_not_divide_lie_on_the_first_ranks():
    cfg = config("pixart_tiny")
    whole = numbers(on_meta(cfg).parameters())
    assert shard(cfg, 1).own == whole
    for ranks in (8, 64, 1024):
        own = sum(-(-p.shape[0] // ranks) * p[0].numel() for p in on_meta(cfg).parameters())
        assert shard(cfg, ranks).own == own >= whole / ranks
    assert shard(cfg, 8).root + cfg.model.depth * shard(cfg, 8).unit == whole
    assert not torch.distributed.is_initialized()


def test_cuda_keeps_group_norms_in_float32():
    cfg = config("unet_tiny", "train.precision=bf16")
    parts = frozen_parts(cfg)
    here, there = (Rehearsal(cfg, parts, cuda=cuda).step(8, Checkpointing.none).alone for cuda in (False, True))
    assert there > 1.05 * here


def test_cuda_recomputes_blocks_as_it_computed_them():
    """The norms of the backward pass are those of the forward pass, or torch would refuse what is recomputed."""
    cfg = config("unet_tiny", "train.precision=bf16")
    rehearsal = Rehearsal(cfg, frozen_parts(cfg), cuda=True)
    assert rehearsal.step(8, Checkpointing.full).alone < 0.8 * rehearsal.step(8, Checkpointing.none).alone


def test_a_rehearsal_leaves_nothing_fake_behind():
    cfg = config("pixart_tiny")
    rehearsal, _ = foretold(cfg)
    cond = rehearsal.cond._map(lambda one: torch.ones(1, *one.shape[1:], dtype=one.dtype))
    drawn = cfg.model.build()(torch.rand(1, *rehearsal.latent), torch.rand(1), cond)
    assert type(drawn) is torch.Tensor
    foretold(cfg)


def test_public_parts_have_the_sizes_of_their_classes():
    """Counted on meta tensors of the public classes, with the sizes of the public configs."""
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
        T5GemmaConfig,
        T5GemmaEncoderModel,
    )

    large = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
    huge = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    t5 = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    sizes = {"hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 24, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 32, "head_dim": 64, "vocab_size": 256_000}
    gemma = T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False, vocab_size=256_000)
    levels = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    with torch.device("meta"):
        made = {
            CLIP_L: CLIPTextModel(large),
            CLIP_L_PROJECTED: CLIPTextModelWithProjection(large),
            BIG_G: CLIPTextModelWithProjection(huge),
            T5_XXL: T5EncoderModel(t5),
            T5GEMMA_XL: T5GemmaEncoderModel(gemma),
            SD_VAE: AutoencoderKL(latent_channels=4, **levels),
            SD3_VAE: AutoencoderKL(latent_channels=16, **levels, **bare),
        }
    for known, module in made.items():
        assert known.parameters == sum(p.numel() for p in module.parameters())


def test_parts_on_this_machine_are_read_and_misfits_are_said():
    parts = frozen_parts(config("mmdit_tiny"))
    assert not parts.notes
    built = compose("stage3", []).text.build()
    assert parts.text == sum(p.nbytes for p in built.parameters())
    assert (parts.tokens, parts.pooled) == (built.length, built.pooled_width)
    notes = frozen_parts(compose("stage3", ["model=mmdit_2b"])).notes
    assert any("model.text_dim=4096, but text.path=assets/shapes gives 192" in note for note in notes)
    assert any("model.in_channels=16, but vae.path=assets/shapes gives 8 channels" in note for note in notes)
    options = ["align=shapes", "model.route=0.5", "model.route_blocks=[1,2]", "train.precision=fp8"]
    said = frozen_parts(compose("stage3", options)).notes
    assert [note.partition(" is ")[0] for note in said] == [
        "align.path=assets/shapes",
        "train.precision=fp8",
        "model.route=0.5",
    ]
    away = frozen_parts(config("pixart_tiny", "text.path=some/where", "vae.path=some/where"))
    assert [note.partition(" is not on this machine")[0] for note in away.notes] == [
        "vae.path=some/where",
        "text.path=some/where",
    ]


def test_options_go_from_fast_to_small():
    cfg = config("pixart_tiny", "train.batch_size=64")
    found = list(ways(cfg, 16, tokens=4096))
    assert found[0] == asked(cfg, 16)
    assert found[-1].eight_bit
    assert found[-1].shards == 16
    assert found[-1].micro_batch == 1
    assert {way.shards for way in found} == {1, 8, 16}
    full = replace(cfg, train=replace(cfg.train, checkpointing=Checkpointing.full))
    assert {way.checkpointing for way in ways(full, 16, tokens=4096)} == {Checkpointing.full}
    muon = replace(cfg, optim=OptimConfig(kind=Kind.muon))
    assert not any(way.eight_bit for way in ways(muon, 16, tokens=4096))
    assert usable(80) < 80 * GIB


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gpus": 0}, "--gpus=0 must be at least 1; choose a divisor of train.batch_size"),
        ({"gpu": "h1000"}, "--gpu=h1000 is not known; choose one of h100, "),
        ({"mfu": 1.5}, "--mfu=1.5 is a share of the peak, above 0 and at most 1; 0.4 is usual"),
        ({"price": -1.0}, "--price=-1.0 must be at least 0; give what a GPU costs an hour"),
        ({"ranks": [1]}, "--ranks=[1] must each be at least 2, to share the weights; 8,64,1024 is usual"),
        ({"images": 0}, "--images=0 must be positive; give how many pictures the data has"),
    ],
)
def test_questions_that_make_no_sense(wrong, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace("]", r"\]")):
        Question(**wrong)


def test_a_side_that_is_no_whole_number_of_patches():
    cfg = config("pixart_tiny", "data.resolution=100")
    with pytest.raises(ValueError, match="data.resolution=100 must be a multiple of 32, .* choose 96"):
        Rehearsal(cfg, frozen_parts(cfg))
