"""ONNX folders: every network and the pictures are torch's, also where no torch is; what does not fit is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.objective import NetworkTime, ObjectiveConfig, Prediction
from diffusion.sample import Sampler
from diffusion.schedule import Path as NoisePath
from diffusion.timesteps import TimeLaw
from inference.description import Description, SamplerConfig
from inference.export.onnx_export import _T5, _text, _text_inputs, _write_text, _Writer, quantize, refuse, to_onnx
from inference.export.onnx_sample import OnnxPipeline, TextEncoders, _size
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.base import Cond, ModelConfig
from models.ccdit import CCDiTConfig
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.text import Conditioner, TextConfig
from models.unet import UNetConfig

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

ROOT = Path(__file__).parents[3]
SHAPES = "assets/shapes"
SIDE = 16  # pixels: 8 cells
EPS = ObjectiveConfig(network_time=NetworkTime.index)
V = ObjectiveConfig(prediction=Prediction.v, zero_terminal=True)
FLOW = ObjectiveConfig(prediction=Prediction.flow, path=NoisePath.linear, times=TimeLaw.logit_normal, shift=2.0)

TRANSFORMER: dict[str, Any] = {"base_size": 8, "hidden": 32, "depth": 2, "heads": 4}
UNET: dict[str, Any] = {"base_size": 8, "groups": 8, "layers": 1}
SD: dict[str, Any] = UNET | {"channels": [16] * 4, "depths": [1, 1, 1, 0], "heads": [2] * 4}  # halved as often as SD's
SDXL: dict[str, Any] = UNET | {"channels": [16] * 3, "depths": [0, 1, 1], "heads": [2] * 3}
MODELS: dict[str, tuple[ModelConfig, ObjectiveConfig]] = {
    "ccdit": (CCDiTConfig(**TRANSFORMER, num_classes=5), EPS),
    "pixart": (PixArtConfig(**TRANSFORMER, text_dim=40, kv_compression=2, kv_blocks=[1, 1]), V),
    "mmdit": (
        MMDiTConfig(
            **TRANSFORMER, in_channels=4, text_dim=40, pooled_dim=32, qk_norm=True, positions="crop", table_size=12,
            dual=1,
        ),
        FLOW,
    ),
    "sd": (UNetConfig(**SD, text_dim=16), V),
    "sdxl": (UNetConfig(**SDXL, text_dim=32, vector_dim=32 + 6 * 256, linear_projection=True), EPS),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder whose decoder attends, two CLIPs with projections and a T5, all tiny."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    clip = CLIPTokenizer.from_pretrained(SHAPES, subfolder="tokenizer")
    for suffix in ("", "_2"):
        clip.save_pretrained(folder / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            vocab_size=641, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, projection_dim=16, bos_token_id=639, eos_token_id=640, pad_token_id=640,
        )  # fmt: skip
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "star"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "tokenizer_3")
    t5 = T5Config(vocab_size=8, d_model=40, d_kv=10, d_ff=32, num_layers=2, num_heads=4)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_3")
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=0.7,
        shift_factor=0.1,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    return folder


def text_config(name: str, parts: Path) -> TextConfig | None:
    def of(*suffixes: str, **options: Any) -> TextConfig:
        named = {f"{what}s": [f"{what}{i}" for i in suffixes] for what in ("tokenizer",)}
        return TextConfig(path=str(parts), encoders=[f"text_encoder{i}" for i in suffixes], **named, **options)

    match name:
        case "pixart":
            return of("_3", length=9, lower=True)
        case "mmdit":
            return of("", "_2", "_3", length=7, masked=False)
        case "sd":
            return of("", penultimate=False, masked=False)
        case "sdxl":
            return of("", "_2", zero_null=True)
    return None


def build(name: str, parts: Path) -> Pipeline:
    """A pipeline of a network that answers to everything, but mildly."""
    torch.manual_seed(1)
    model, objective = MODELS[name]
    denoiser: Any = model.build().eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    text, classes = text_config(name, parts), getattr(model, "num_classes", None)
    sampler = SamplerConfig(name=Sampler.ddim, steps=5, guidance=3.0, eta=0.3, interval=[0.1, 0.9])
    description = Description(
        objective=objective, sampler=sampler, vae=AutoencoderConfig(path=str(parts)), text=text, resolution=SIDE,
        num_classes=classes,
    )  # fmt: skip
    conditioner = Conditioner(text.build() if text else None, classes, getattr(model, "vector_dim", 0))
    return Pipeline(denoiser, conditioner, description.vae.build(), description)


def pixels(pipeline: Any, **subject: Any) -> np.ndarray:
    """(b, 3, h, w) in [0, 1], before they are rounded to bytes."""
    return np.asarray((pipeline.decode(pipeline.draw(**subject)) + 1) / 2)


def pixels_of_torch(pipeline: Pipeline, **subject: Any) -> np.ndarray:
    known = subject | {"sampler": replace(pipeline.description.sampler, **subject.get("sampler", {}))}
    known["sampler"].name = Sampler[getattr(known["sampler"].name, "name", known["sampler"].name)]
    return ((pipeline.autoencoder.decode(pipeline.draw(**known)) + 1) / 2).numpy()


def cond(pipeline: Pipeline, b: int, n: int) -> dict[str, torch.Tensor]:
    """Conditions of every kind that the denoiser may read."""
    config: Any = pipeline.denoiser.config
    made = {"class_id": torch.arange(b) % 5, "pooled": torch.randn(b, 32), "size_ids": torch.rand(b, 6) * 64}
    return made | {
        "text": torch.randn(b, n, getattr(config, "text_dim", 1)),
        "text_mask": torch.arange(n) < torch.arange(b)[:, None],  # the first row has no token
    }


SIZES = {"ccdit": [(1, 2, 2), (3, 10, 6)], "sd": [(1, 2, 2), (3, 9, 5)]}  # a UNet's sides may be odd


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_denoiser_and_its_pictures_are_torchs(name: str, parts: Path, tmp_path: Path):
    pipeline = build(name, parts)
    about = to_onnx(pipeline, tmp_path, name, external_from=1000 if name == "pixart" else 10**9)
    mine = OnnxPipeline(tmp_path)
    assert all(apart < 1e-4 for apart in about["differences"].values())
    assert {f.name for f in tmp_path.glob("*.data")} >= ({"denoiser.onnx.data"} if name == "pixart" else set())
    assert all(onnx.load(f, load_external_data=False).opset_import[0].version == 20 for f in tmp_path.glob("*.onnx"))
    torch.manual_seed(0)
    for b, h, w in SIZES.get(name, [(1, 4, 4), (3, 10, 6)]):
        for n in (1, 11):
            x, t = torch.randn(b, 4, h, w), torch.rand(b)
            given = {key: value for key, value in cond(pipeline, b, n).items() if key in about["reads"]}
            with torch.no_grad():
                want = pipeline.denoiser(x, t, Cond(**given)).numpy()
            (got,) = mine._run["denoiser"]({key: v.numpy() for key, v in ({"x": x, "t": t} | given).items()})
            assert np.abs(got - want).max() < 1e-4, (b, h, w, n)
    for b, size in ((1, (16, 16)), (4, (20, 12))):
        subject = {"class_ids": [*range(b)]} if name == "ccdit" else {"prompts": PROMPT_LIST[:b]}
        if b > 1 and name != "ccdit":
            subject["negative"] = ["", "red", "blue AND star", ""]
        want = pixels_of_torch(pipeline, **subject, size=size)
        assert want.std() > 0.01
        assert np.abs(pixels(mine, **subject, size=size) - want).max() < 1e-3
    if name == "mmdit":
        with pytest.raises(ValueError, match="width=52 is more than the positions of this model reach; choose 48"):
            mine.generate(["a star"], size=(16, 52))
    with pytest.raises(ValueError, match="height=18 must be a multiple of 4; choose 16" if "dit" in name else "."):
        mine.generate(**subject, size=(18 if "dit" in name else 17, 16), seeds=[0] * 4)


PROMPT_LIST = [
    "a red star",
    "a (blue:1.5) circle AND a [red|blue] star:0.5",
    "a red [circle:star:0.5] BREAK blue",  # CLIP's in two chunks
    "a Red star, a blue circle, a red circle, a blue star, a star",  # longer than CLIP's 12 and T5's 9
]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed pipeline, by the command line."""
    out = tmp_path_factory.mktemp("onnx") / "shapes"
    command = ["scripts/export.py", "--format", "onnx", "--checkpoint", f"{SHAPES}/pipeline", "--out", str(out)]
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "denoiser.onnx: within" in done.stdout
    assert "ONNX of opset 20" in done.stdout
    return out


@pytest.mark.slow
def test_the_committed_pipeline_draws_the_same_pictures(exported: Path):
    """At two sizes and two batch sizes, neither those that it was traced with."""
    ours, mine = Pipeline.load(f"{SHAPES}/pipeline", device="cpu"), OnnxPipeline(exported)
    prompts = ["a large red circle at the top", "a small (blue:1.3) star AND a ring:0.5", "a [red|blue] square"]
    for sampler in (
        {"steps": 6},
        {"steps": 5, "name": "dpmpp_2m", "eta": None},
        {"steps": 4, "name": "euler", "eta": 0},
    ):
        for subject in (
            {"prompts": prompts[:1], "size": (128, 128)},
            {"prompts": prompts, "size": (64, 96), "negative": "blue", "seeds": [7, 8, 9]},
        ):
            want = pixels_of_torch(ours, **subject, sampler=sampler)
            assert want.std() > 0.1
            assert np.abs(pixels(mine, **subject, sampler=sampler) - want).max() < 1e-3


@pytest.mark.slow
def test_int8_is_smaller_and_its_error_is_what_it_says(parts: Path, tmp_path: Path):
    pipeline = build("ccdit", parts)
    to_onnx(pipeline, tmp_path, "x", external_from=1000)  # the names of external data must survive
    before = pixels(OnnxPipeline(tmp_path), class_ids=[0, 4])
    said = quantize(tmp_path)
    assert json.loads((tmp_path / "sampling.json").read_text())["quantized"] == said
    apart = np.abs(pixels(OnnxPipeline(tmp_path), class_ids=[0, 4]) - before)
    assert 0 < said["mean"] <= said["largest"] < 0.1
    assert np.isclose(apart.max(), said["largest"])
    assert np.isclose(apart.mean(), said["mean"])
    files = {file.name: file for file in tmp_path.iterdir()}
    assert "denoiser.onnx" in files
    assert not [name for name in files if "int8" in name]
    assert sum(f.stat().st_size for name, f in files.items() if ".onnx" in name) == said["bytes"][1] < said["bytes"][0]
    operators = {node.op_type for node in onnx.load(files["denoiser.onnx"]).graph.node}
    assert "MatMulInteger" in operators
    assert "MatMulInteger" not in {node.op_type for node in onnx.load(files["decoder.onnx"]).graph.node}


@pytest.mark.slow
def test_t5gemma_is_traced_too(tmp_path: Path):
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    part: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    part |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4}
    config: Any = T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False, vocab_size=32)
    writer = _Writer(tmp_path, 20, 10**9)
    writer.write("text_encoder_1.onnx", _T5(T5GemmaEncoderModel(config).eval()), _text_inputs(9, 32, True))
    assert writer.differences["text_encoder_1.onnx"] < 1e-4


# --- without torch -----------------------------------------------------------------------------------------


def test_sampling_imports_no_torch():
    code = "import sys, inference.export.onnx_sample; sys.exit(any(m in sys.modules for m in ('torch', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_an_environment_without_torch_draws_it(exported: Path, tmp_path: Path):
    """A virtual environment with nothing but onnxruntime, tokenizers, numpy and Pillow."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    packages = ["onnxruntime", "tokenizers", "numpy", "pillow"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True, timeout=600
    )
    if done.returncode and "CI" not in os.environ:
        pytest.skip(f"pip cannot install {', '.join(packages)}: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, env=clean).returncode == 1
    out = tmp_path / "made/picture.png"
    how = ["--steps", "6", "--guidance", "3", "--negative", "blue", "--seed", "5", "--size", "64x96"]
    command = ["-m", "inference.export.onnx_sample", exported, "--prompt", "a large red circle", *how]
    command += ["--sampler", "dpmpp_2m", "--num-images", "2", "--out", out]
    for name in ("inference/export/onnx_sample.py", "inference/export/onnx_math.py", "inference/prompt.py"):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "code" / name)  # all that it needs of this checkout
    done = subprocess.run([python, *command], capture_output=True, text=True, env=clean, cwd=tmp_path / "code")
    assert not done.returncode, done.stderr
    pipeline = Pipeline.load(f"{SHAPES}/pipeline", device="cpu")
    sampler = replace(pipeline.description.sampler, name=Sampler.dpmpp_2m, steps=6, guidance=3.0, eta=0.0)
    want = pipeline.generate(
        ["a large red circle"] * 2, negative="blue", seeds=[5, 6], sampler=sampler, size=(64, 96)
    )  # fmt: skip
    got = np.stack([np.asarray(Image.open(out.with_name(f"picture-{i}.png"))) for i in range(2)])
    assert np.abs(got.astype(int) - want).max() <= 1  # rounded to bytes


# --- text --------------------------------------------------------------------------------------------------


class NoNetworks(_Writer):
    def write(self, *_: Any) -> None:
        """Leave it: to be traced takes seconds."""


def test_prompts_become_the_same_tokens(parts: Path, tmp_path: Path):
    """Ids, masks and weights of chunks, cuts and small letters; the networks themselves stand aside."""
    text = build("mmdit", parts).conditioner.text
    assert text is not None
    encoders = _write_text(text, NoNetworks(tmp_path, 20, 0))
    seen: dict[str, Any] = {}

    def spy(name: str, width: int) -> Any:
        return lambda given: (seen.__setitem__(name, given), np.zeros((*given["ids"].shape, width), np.float32))[1:]

    mine = TextEncoders(_text(text, encoders), tmp_path, {f"text_encoder_{i}": spy(str(i), 16) for i in (1, 2, 3)})
    prompts = [[[("a red star", 1.0), (" and", 1.5)], [("Blue", 1.0)]], [[("", 1.0)]], [[("a star " * 20, 1.0)]]]
    chunks = mine.chunks_needed(prompts)
    assert chunks == text.chunks_needed(prompts) > 1
    mine.encode(prompts, chunks)
    for number, encoder in enumerate(text.encoders, 1):
        wanted: list[torch.Tensor] = []
        handle = encoder.register_forward_pre_hook(lambda _, ids, wanted=wanted: wanted.append(ids[0]))
        text.encode_weighted(prompts, chunks)
        handle.remove()
        assert np.array_equal(seen[str(number)]["ids"], wanted[0].numpy())


# --- refusals ----------------------------------------------------------------------------------------------


def spoilt(what: str, parts: Path) -> Pipeline:
    pipeline = build("ccdit", parts)
    match what:
        case "refiner":
            pipeline.description.objective = replace(EPS, range=[0.0, 0.4])
        case "offload":
            pipeline.denoiser.to("meta")
        case "half":
            pipeline.denoiser.to(torch.bfloat16)
        case "compute":
            pipeline.dtype = torch.bfloat16
        case "other":
            pipeline.denoiser.config = ModelConfig()
    return pipeline


REFUSED = {
    "refiner": "makes this a refiner, which goes on with another's latents.*export the base",
    "offload": "the weights are on cpu, meta or offloaded.*load the pipeline with device=cpu and offload=none",
    "half": "the network computes in bfloat16, but ONNX is written in float32; leave --dtype away, or give",
    "compute": "the network computes in bfloat16",
    "other": "ModelConfig has no inputs known here; give a ccdit, pixart, mmdit or unet",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_refused(what: str, parts: Path):
    with pytest.raises(ValueError, match=REFUSED[what]):
        refuse(spoilt(what, parts))


@pytest.mark.parametrize("opset", [17, 23])
def test_an_opset_is_refused(opset: int, parts: Path):
    with pytest.raises(ValueError, match=f"--opset {opset} is not written here; choose 18 to 22"):
        to_onnx(build("ccdit", parts), parts, "x", opset=opset)


def test_an_encoder_that_cannot_be_traced_is_named(parts: Path, tmp_path: Path):
    class Odd(torch.nn.Module):
        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            raise NotImplementedError("a kernel of its own")

    message = "text_encoder_1.onnx cannot be written.* does not follow a Odd .a kernel of its own.*CLIP, T5 and"
    with pytest.raises(ValueError, match=message):
        _Writer(tmp_path, 20, 10**9).write("text_encoder_1.onnx", _T5(Odd()), _text_inputs(4, 8, True))


def test_a_tokenizer_of_python_alone_is_refused(parts: Path, tmp_path: Path):
    text = build("sd", parts).conditioner.text
    assert text is not None
    text.tokenizers = [type("Slow", (), {})()]

    with pytest.raises(ValueError, match="the tokenizer tokenizer is a Slow of Python alone; give one that"):
        _write_text(text, NoNetworks(tmp_path, 20, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx", "--dtype", "bfloat16"], "--dtype bfloat16 is not for ONNX.*float32; leave it away"),
        (["--format", "onnx", "--quantize", "int4"], "--quantize int4 is not known here; give int8"),
        (["--format", "onnx", "--variant", "fp16"], "--variant is diffusers', not of --format onnx; leave it away"),
        (["--quantize", "int8"], "--opset and --quantize are ONNX's, not of --format diffusers; give --format onnx"),
    ],
)
def test_the_command_line_refuses(options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from scripts import export

    given = ["--checkpoint", f"{SHAPES}/pipeline", "--out", str(tmp_path / "x"), *options]
    monkeypatch.setattr(sys, "argv", ["export.py", *given])
    with pytest.raises(SystemExit, match=message):
        export.main()


def test_drawing_refuses(tmp_path: Path):
    about = {"objective": {"sigma_max": None}, "times": {"table": [], "ends": []}, "networks": {}, "text": None}
    about |= {"num_classes": 5, "sampler": {}, "reads": ["class_id"], "resolution": 16}
    with pytest.raises(
        ValueError, match="holds no sampling.json; give a folder that scripts/export.py --format onnx has"
    ):
        OnnxPipeline(tmp_path)
    (tmp_path / "sampling.json").write_text(json.dumps(about | {"networks": {"denoiser": "denoiser.onnx"}}))
    with pytest.raises(ValueError, match="denoiser.onnx is missing; export the checkpoint again"):
        OnnxPipeline(tmp_path)
    (tmp_path / "denoiser.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="denoiser.onnx cannot be read .*; export it again"):
        OnnxPipeline(tmp_path)
    (tmp_path / "sampling.json").write_text(json.dumps(about))
    pipeline = OnnxPipeline(tmp_path)
    for subject, message in (
        ({"prompts": ["a star"]}, "conditioned on classes: give class labels, not a prompt"),
        ({"class_ids": [1], "negative": "red"}, "classes, which have no negative prompt; leave it away"),
        ({"class_ids": [1], "seeds": [1, 2]}, "seeds has 2 entries for 1 pictures; give one a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.draw(**subject)
    with pytest.raises(ValueError, match="class 5 does not exist; this model knows classes 0 to 4"):
        pipeline._of_classes([5], 1)
    pipeline.text = pipeline  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="conditioned on text: give a prompt, not a class label"):
        pipeline.draw(class_ids=[1])


def test_a_size_that_is_none_is_refused():
    assert _size("64x96") == (64, 96)
    with pytest.raises(ValueError, match="--size 64 is not HxW; give height and width in pixels, such as 128x192"):
        _size("64")
