"""The recipes: full size on the meta device with published numbers, tiny in the real loop, chained, and their words.

The tiny runs change sizes and places only: objective, optimizer, averages, dropout, captions and buckets are the
recipe's own. What is trained on are latents of noise, in three sizes, with encoders made here.
"""

import json
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from configs.schema import CONFIGS, compose
from data.shards import ShardWriter
from diffusion.objective import Objective, Prediction, Weighting
from diffusion.timesteps import TimeLaw
from inference.description import Description, find
from inference.device import Precision
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.layers import Checkpointing
from models.text import TextConfig
from prepare.texts import add_texts, text_layout
from training.config import RunConfig
from training.ema import EMA
from training.plan import GIB, Rehearsal, asked, frozen_parts, memory, shard, usable
from training.run import run

FOLDER = CONFIGS / "experiment"
RECIPES = {
    "sd15_from_scratch": "stage2",
    "sdxl_base/256": "stage2",
    "sdxl_base/512": "stage2",
    "sdxl_base/1024": "stage2",
    "sdxl_refiner": "stage2",
    "sdxl_novelai_v3": "stage2",
    "sdxl_flow": "stage3",
    "sdxl_lora": "stage2",
    "pixart_alpha/pixel": "stage1",
    "pixart_alpha/alignment": "stage2",
    "pixart_alpha/quality_256": "stage3",
    "pixart_alpha/quality_512": "stage3",
    "pixart_alpha/quality_1024": "stage3",
    "sd3_medium/256": "stage2",
    "sd3_medium/1024": "stage3",
    "rectified_flow_staged/stage1": "stage1",
    "rectified_flow_staged/stage2": "stage2",
    "rectified_flow_staged/stage3": "stage3",
}
EVERY = pytest.mark.parametrize("name", RECIPES)


def recipe(name: str, *overrides: str) -> RunConfig:
    given = ["data.path=datasets/mine", "init.from=outputs/start"]
    return compose(RECIPES[name], [f"experiment={name}", *given, *overrides])


# --- full size --------------------------------------------------------------------------------------------

PARAMETERS = {  # of the public weights; those of DiT and PixArt make a variance too
    "sd15_from_scratch": 859_520_964,
    "sdxl_base/1024": 2_567_463_684,
    "sdxl_novelai_v3": 2_567_463_684,
    "sdxl_flow": 2_567_463_684,
    "sdxl_lora": 2_567_463_684,
    "sdxl_refiner": 2_259_526_660,
    "sd3_medium/1024": 2_028_328_000,
    "pixart_alpha/quality_256": 610_856_096,
    "pixart_alpha/pixel": 675_129_632 - 256 * 1152,  # without the table of positions, which is computed
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_network_is_the_public_one(name):
    variance = ["model.variance=true"] * name.startswith("pixart")
    with torch.device("meta"):
        built = recipe(name, *variance).model.build()
    assert sum(p.numel() for p in built.parameters()) == PARAMETERS[name]


def test_every_recipe_is_in_the_table_above_and_names_its_own_folder():
    files = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("**/*.yaml")}
    assert {name for name in files if not name.startswith("demo/")} == {*RECIPES, "exportable"}
    assert all(recipe(name).name == name for name in RECIPES)


def beta(cfg: RunConfig) -> float:
    """Of the average, in the last step of the run."""
    average = EMA(torch.nn.Linear(1, 1), cfg.ema)
    return average.beta(cfg.train.images, cfg.train.batch_size)


STEPS = {  # images are steps times the batch, as the papers count
    "sd15_from_scratch": (136_279, 96),
    "sdxl_base/256": (600_000, 2048),
    "sdxl_base/512": (200_000, 2048),
    "pixart_alpha/pixel": (300_000, 128 * 8),
    "pixart_alpha/alignment": (150_000, 178 * 64),
    "pixart_alpha/quality_256": (90_000, 178 * 64),
    "pixart_alpha/quality_512": (100_000, 40 * 64),
    "pixart_alpha/quality_1024": (16_000, 12 * 32),
    "sd3_medium/256": (500_000, 4096),
    "rectified_flow_staged/stage1": (300_000, 128 * 8),
    "rectified_flow_staged/stage2": (150_000, 320 * 4 * 8),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_length_is_the_published_one_and_the_average_forgets_as_published(name):
    cfg = recipe(name)
    assert (cfg.train.images, cfg.train.batch_size) == (STEPS[name][0] * STEPS[name][1], STEPS[name][1])
    assert beta(cfg) == pytest.approx(0.9999, abs=1e-8)


def test_sd15_from_scratch():
    cfg = recipe("sd15_from_scratch")
    objective, optim = cfg.objective, cfg.optim
    assert (objective.prediction, objective.weighting, objective.gamma) == (Prediction.eps, Weighting.min_snr, 5)
    assert (objective.betas.name, cfg.data.resolution, cfg.train.text_dropout) == ("scaled_linear", 512, 0.1)
    assert (optim.lr, optim.betas, optim.weight_decay, optim.clip, optim.warmup) == (1e-4, [0.9, 0.999], 0.01, 1, 48000)
    # after n steps theirs keeps (1 + n) / (10 + n) of the average until that is 0.9999
    for n in (100, 1000, 10_000):
        ours = EMA(torch.nn.Linear(1, 1), cfg.ema).beta(96 * n, 96)
        assert ours == pytest.approx((1 + n) / (10 + n), rel=5e-3)


def test_sdxl_novelai_v3():
    cfg = recipe("sdxl_novelai_v3")
    objective = cfg.objective
    assert (objective.prediction, objective.zero_terminal, objective.sigma_max) == (Prediction.v, True, 20000)
    assert (objective.weighting, objective.gamma, objective.floor > 0) == (Weighting.min_snr, 5, True)
    assert (cfg.sampler.grid and cfg.sampler.grid.name, cfg.sampler.rescale) == ("karras", 0.7)


def test_sdxl_base_has_offset_noise_at_1024_pixels_alone():
    sizes = ("256", "512", "1024")
    found = [(cfg.data.resolution, cfg.objective.offset_noise) for cfg in (recipe(f"sdxl_base/{s}") for s in sizes)]
    assert found == [(256, 0), (512, 0), (1024, 0.05)]
    assert recipe("sdxl_base/256").objective.weighting is Weighting.none


def test_sdxl_flow_and_refiner():
    flow, refiner = recipe("sdxl_flow").objective, recipe("sdxl_refiner")
    assert (flow.prediction, flow.times) == (Prediction.flow, TimeLaw.logit_normal)
    assert (flow.logit_mean, flow.logit_std, flow.shift) == (0, 1, 1)
    assert len(Objective(refiner.objective)._trained(1.0)) == 200  # of 1000 noise levels
    assert refiner.text and refiner.text.encoders == ["text_encoder_2"]


def test_pixart_alpha():
    for name in ("pixel", "alignment", "quality_256", "quality_512", "quality_1024"):
        cfg = recipe(f"pixart_alpha/{name}")
        optim, objective = cfg.optim, cfg.objective
        assert (optim.lr, optim.weight_decay, optim.eps, optim.clip, optim.final) == (2e-5, 0.03, 1e-10, 0.01, 1)
        assert (objective.prediction, objective.betas.name) == (Prediction.eps, "linear")
        assert (cfg.train.text_dropout, optim.warmup) == (0.1, 1000 * cfg.train.batch_size)
        assert name == "pixel" or (cfg.text and cfg.text.length) == 120


def test_sd3_medium():
    low, high = recipe("sd3_medium/256"), recipe("sd3_medium/1024")
    assert (low.objective.shift, high.objective.shift) == (1, 3)
    for cfg in (low, high):
        assert cfg.text and len(cfg.text.encoders) == len(cfg.train.encoder_dropout) == 3
        dropped = cfg.train.text_dropout + (1 - cfg.train.text_dropout) * np.prod(cfg.train.encoder_dropout)
        assert dropped == pytest.approx(0.1, abs=1e-3)
        assert cfg.data.caption_weights == {"alt": 0.5, "long": 0.5}


def test_rectified_flow_staged():
    one, two = recipe("rectified_flow_staged/stage1"), recipe("rectified_flow_staged/stage2")
    assert (one.model.in_channels, one.optim.eps, one.optim.lr, one.optim.weight_decay) == (16, 1e-15, 1e-4, 0.03)
    assert (two.train.precision, two.data.caption_weights) == (Precision.fp8, {"short": 0.5, "long": 0.5})
    assert two.text and (two.text.path, two.text.length) == ("google/t5gemma-xl-xl-ul2", 120)


@pytest.mark.slow
def test_novelai_v3_fits_a_card_of_24_gb_by_the_plan():
    line = next(command for command in commands("sdxl_novelai_v3") if "optim.in_backward=true" in command)
    script, overrides, _ = parsed(line)
    cfg = compose(script, overrides)
    assert cfg.train.checkpointing is Checkpointing.full
    parts = frozen_parts(cfg)
    rehearsal, way = Rehearsal(cfg, parts), asked(cfg, 1)
    held = memory(rehearsal, parts, way, shard(cfg, 1), rehearsal.step(way.micro_batch, way.checkpointing))
    assert held.total < usable(24) < 24 * GIB


# --- their words ------------------------------------------------------------------------------------------


def commands(name: str) -> list[str]:
    """Commands in the comment at the head of a recipe, continued lines joined."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    head = "\n".join(line.removeprefix("#").strip() for line in lines[: lines.index("defaults:")])
    return re.findall(r"^(?:python|torchrun) .*$", head.replace("\\\n", " "), re.MULTILINE)


def parsed(command: str) -> tuple[str, list[str], list[str]]:
    """The config that a command composes, its overrides, and its other words."""
    script = re.search(r"train_(stage\d)", command)
    assert script, command
    words = shlex.split(command[script.end() :].removeprefix(".py"))
    return script[1], [word for word in words if "=" in word], [word for word in words if "=" not in word]


@EVERY
def test_the_commands_of_a_recipe_compose_it(name):
    found = commands(name)
    assert any(re.search(r"train_stage\d\.py", command) for command in found)
    for command in found:
        script, overrides, _ = parsed(command)
        assert script == RECIPES[name]
        assert f"experiment={name}" in overrides
        cfg = compose(script, overrides)
        assert cfg.data.paths, command


# --- tiny runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sd, sd3, t5 and gemma with text encoders, and data sets 64, 96, 128, buckets and states."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("recipes")
    make_encoders(root)
    text = TextConfig(
        path=str(root / "t5"), encoders=["text_encoder"], tokenizers=["tokenizer"], length=120, lower=True
    )
    for side in (64, 96, 128):
        write_set(root / str(side), [(side, side)], None)
        write_set(root / f"states-{side}", [(side, side)], text)
    write_set(root / "buckets", [(96, 96), (64, 128), (128, 64)], None, resolution=96)
    return root


def make_encoders(root: Path) -> None:
    scales: dict[str, Any] = {
        "vocab_size": 641,
        "max_position_embeddings": 32,
        "bos_token_id": 639,
        "eos_token_id": 640,
    }

    def clip(kind: Any, width: int, projection: int) -> Any:
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection}
        return kind(CLIPTextConfig(**scales, **sizes, num_hidden_layers=2, num_attention_heads=2))

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle", "long", "short"])}
    spelt = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    spelt.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=spelt, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    half: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    half |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    gemma: Any = T5GemmaConfig(encoder=T5GemmaModuleConfig(**half), decoder=T5GemmaModuleConfig(**half), vocab_size=8)
    t5 = T5EncoderModel(T5Config(vocab_size=8, d_model=96, d_kv=16, d_ff=64, num_layers=2, num_heads=4))
    clips = {tail: CLIPTokenizer.from_pretrained("assets/shapes", subfolder=f"tokenizer{tail}") for tail in ("", "_2")}
    for folder, first in (
        ("sd", clip(CLIPTextModel, 24, 24)),
        ("sd3", clip(CLIPTextModelWithProjection, 24, 12)),
    ):
        first.save_pretrained(root / folder / "text_encoder")
        clip(CLIPTextModelWithProjection, 40, 20).save_pretrained(root / folder / "text_encoder_2")
        for tail, one in clips.items():
            one.save_pretrained(root / folder / f"tokenizer{tail}")
    for folder, tail in (("sd3", "_3"), ("t5", "")):
        t5.save_pretrained(root / folder / f"text_encoder{tail}")
        tokenizer.save_pretrained(root / folder / f"tokenizer{tail}")
    T5GemmaForConditionalGeneration(gemma).save_pretrained(root / "gemma")
    tokenizer.save_pretrained(root / "gemma")


def write_set(
    folder: Path, sizes: list[tuple[int, int]], text: TextConfig | None, resolution: int | None = None
) -> None:
    """24 latents of noise with three captions and a class, and with text states if there is `text`."""
    info = AutoencoderConfig(path="assets/shapes").build().info()
    rng, encoders = np.random.default_rng(0), text.build() if text else None
    layout = text_layout(encoders, "float16") if encoders else None
    about: dict[str, Any] = {"resolution": resolution or sizes[0][0], "vae": info, "extra": {"num_classes": 48}}
    captions = {"alt": "a red circle", "short": "a short circle", "long": "a long red circle"}
    with ShardWriter(folder, text=layout, **about) as writer:
        for row in range(24):
            size = sizes[row % len(sizes)]
            latent = rng.standard_normal((info["channels"], size[0] // 8, size[1] // 8))
            writer.add({"captions": captions, "class_id": row}, size=size, latent=latent)
        if encoders:
            add_texts(writer, encoders, list(captions.values()) * 24)


UNET = "model.channels=[16,32] model.depths=[0,1] model.middle_depth=1 model.heads=[1,2] model.layers=1 model.groups=8"
DIT = "model.hidden=32 model.depth=2 model.heads=2"
SDXL = f"{UNET} model.text_dim=64 model.vector_dim=1556 text.path=sd"  # pooled 20 and 6 numbers x 256
T5 = f"{DIT} model.text_dim=96 text.path=t5"
SIZES = {  # of network and encoders, by the recipe's family; and the data set of each run
    "sd15_from_scratch": (f"{UNET} model.text_dim=24 text.path=sd", "64"),
    "sdxl_base/256": (SDXL, "64"),
    "sdxl_base/512": (SDXL, "96"),
    "sdxl_base/1024": (SDXL, "buckets"),
    "sdxl_refiner": (f"{UNET} model.text_dim=40 model.vector_dim=1300 text.path=sd", "64"),
    "sdxl_novelai_v3": (SDXL, "buckets"),
    "sdxl_flow": (SDXL, "buckets"),
    "sdxl_lora": (SDXL, "64"),
    "pixart_alpha/pixel": (f"{DIT} model.num_classes=48", "64"),
    "pixart_alpha/alignment": (T5, "states-64"),
    "pixart_alpha/quality_256": (T5, "states-64"),
    "pixart_alpha/quality_512": (T5, "states-96"),
    "pixart_alpha/quality_1024": (T5, "states-128"),
    "sd3_medium/256": (f"{DIT} model.text_dim=96 model.pooled_dim=32 text.path=sd3", "64"),
    "sd3_medium/1024": (f"{DIT} model.text_dim=96 model.pooled_dim=32 text.path=sd3", "buckets"),
    "rectified_flow_staged/stage1": (f"{DIT} model.num_classes=48", "64"),
    "rectified_flow_staged/stage2": (f"{DIT} model.text_dim=32 text.path=gemma", "64"),
    "rectified_flow_staged/stage3": (f"{DIT} model.text_dim=32 text.path=gemma", "96"),
}
CLOCKS = "train.images=24 train.batch_size=8 train.micro_batch=4 train.log_every=8 sample.every=1000000"
CLOCKS += " sample.first=1000000 sample.count=1 checkpoint.every=1000000 sampler.steps=2"


@pytest.fixture
def tiny(places: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`tiny(name, ...)`: a recipe with its sizes, clocks and places changed, and nothing else."""

    def make(name: str, *overrides: str) -> RunConfig:
        sizes, data = SIZES[name]
        sizes = re.sub(r"text\.path=(\w+)", lambda found: f"text.path={places / found[1]} text.revision=null", sizes)
        side = json.loads((places / data / "index.json").read_text())["resolution"]
        where = [f"outputs={tmp_path}", f"data.path={places / data}", f"data.resolution={side}"]
        latents = ["model.in_channels=8", "vae.path=assets/shapes", "vae.revision=null"]
        everything = [f"experiment={name}", *sizes.split(), *CLOCKS.split(), *where, *latents, *overrides]
        return compose(RECIPES[name], everything)

    return make


def lines(cfg: RunConfig) -> list[dict]:
    found = [json.loads(line) for line in (cfg.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def check(cfg: RunConfig) -> None:
    """The run's losses are finite, its checkpoint is there, and it draws as the recipe says."""
    run(cfg)
    assert len(lines(cfg)) == 3
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines(cfg))
    description = Description.load(find(cfg.folder))
    assert description.objective == cfg.objective
    assert description.sampler == cfg.sampler
    if cfg.objective.range[1] < 1:
        return  # it refines what another drew
    pipeline = Pipeline.load(cfg.folder)
    drawn = pipeline.generate(class_ids=[1]) if cfg.model.condition == "class" else pipeline.generate(["a red circle"])
    assert drawn.shape == (1, cfg.data.resolution, cfg.data.resolution, 3)


@pytest.mark.parametrize("name", ["sd15_from_scratch", "sdxl_refiner"])
def test_a_recipe_of_one_run_trains_and_draws(tiny, name):
    check(tiny(name))


CHAINS = [
    ["sdxl_base/256", "sdxl_base/512", "sdxl_base/1024"],
    ["sd3_medium/256", "sd3_medium/1024"],
    [f"rectified_flow_staged/stage{n}" for n in (1, 2, 3)],
    [f"pixart_alpha/{name}" for name in ("pixel", "alignment", "quality_256", "quality_512", "quality_1024")],
]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[0].partition("/")[0])
def test_runs_of_a_recipe_hand_over_to_each_other(tiny, chain, capsys):
    check(tiny(chain[0]))
    assert "starts from scratch" in capsys.readouterr().out
    for before, name in pairwise(chain):
        cfg = tiny(name)
        check(cfg)
        said = capsys.readouterr().out
        assert f"starts from {find(cfg.folder.parent / before.rpartition('/')[2])}" in said
        assert ("folded" in said) == (type(cfg.model) is not type(tiny(before).model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl_novelai_v3", "sdxl_flow"])
def test_sdxl_learns_another_objective(tiny, name, capsys):
    base = tiny("sdxl_base/256")
    run(base)
    capsys.readouterr()
    cfg = tiny(name, f"init.from={base.folder}")
    check(cfg)
    assert f"overridden  objective.prediction: eps -> {cfg.objective.prediction.name}" in capsys.readouterr().out


def test_sdxl_lora_trains_adapters_alone_and_draws(tiny):
    base = tiny("sdxl_base/256")
    run(base)
    cfg = tiny("sdxl_lora", f"init.from={base.folder}")
    check(cfg)
    files = [path for path in (find(cfg.folder) / "denoiser").iterdir() if path.suffix == ".safetensors"]
    names = {name for path in files for name in load_file(path)}
    assert {name.partition(".lora_")[2] for name in names if not name.endswith(".alpha")} == {"A.weight", "B.weight"}
