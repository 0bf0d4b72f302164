"""The text encoders: what the public pipelines compute, on small random instances of their classes."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    PixArtAlphaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    T5TokenizerFast,
)

from models.pretrained import FrozenPrecision
from models.text import SIZE_COLUMNS, Conditioner, TextConfig, TextEncoders

CAPTIONS = ["A small Red circle at the top", "two zebras, übermütig", ""]
PAIR = {"encoders": ["clip_l", "clip_g"], "tokenizers": ["tokenizer", "tokenizer_2"]}
T5 = {"encoders": ["t5"], "tokenizers": ["tokenizer_3"]}
GEMMA = {"encoders": ["gemma"], "tokenizers": ["gemma"], "length": 14}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder with small random encoders, and all that is in it by name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("text")
    scales = {"vocab_size": 641, "max_position_embeddings": 32, "bos_token_id": 639, "eos_token_id": 640}

    def clip(kind, width, projection):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection}
        return kind(CLIPTextConfig(**scales, **sizes, num_hidden_layers=3, num_attention_heads=2))

    letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,"]
    words = [(f"▁{word}", -2.0) for word in ["a", "small", "red", "circle", "at", "the", "top", "two"]]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    t5 = T5Config(
        vocab_size=len(vocab), d_model=96, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    half = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    half |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = T5GemmaConfig(encoder=T5GemmaModuleConfig(**half), decoder=T5GemmaModuleConfig(**half), vocab_size=40)
    spelt = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1} | {word[1:]: 2 + i for i, (word, _) in enumerate(words)})
    )
    spelt.model.unk_token = "<unk>"
    spelt.pre_tokenizer = pre_tokenizers.Whitespace()
    made = {
        "clip_l": clip(CLIPTextModel, 24, 24),
        "clip_l_projected": clip(CLIPTextModelWithProjection, 24, 12),
        "clip_g": clip(CLIPTextModelWithProjection, 40, 20),
        "t5": T5EncoderModel(t5),
        "t5_whole": T5ForConditionalGeneration(t5),
        "gemma": T5GemmaForConditionalGeneration(gemma),
        "tokenizer": CLIPTokenizer.from_pretrained("assets/shapes", subfolder="tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained("assets/shapes", subfolder="tokenizer_2"),
        "tokenizer_3": T5TokenizerFast(vocab=vocab, extra_ids=0),
    }
    for name, part in made.items():
        part.save_pretrained(root / name)
    PreTrainedTokenizerFast(
        tokenizer_object=spelt, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(root / "gemma")
    return root, {name: part.eval() if hasattr(part, "eval") else part for name, part in made.items()}


def sd15(made):
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        None, made["clip_l"], made["tokenizer"], None, scheduler, None, None, requires_safety_checker=False
    )
    return pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0], None, None


def sdxl(made, base=True):
    first = (made["clip_l"], made["clip_g"], made["tokenizer"]) if base else (None, made["clip_g"], None)
    pipe = StableDiffusionXLPipeline(None, *first, made["tokenizer_2"], None, DDIMScheduler())
    states, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    return states, None, pooled


def sd3(made, t5=True):
    denoiser = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=96,
        caption_projection_dim=8, pooled_projection_dim=32,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        denoiser, None, None, made["clip_l_projected"], made["tokenizer"], made["clip_g"], made["tokenizer_2"],
        made["t5"] if t5 else None, made["tokenizer_3"],
    )  # fmt: skip
    states, _, pooled, _ = pipe.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=20
    )
    return states, None, pooled


def pixart(made):
    pipe = PixArtAlphaPipeline(made["tokenizer_3"], made["t5"], None, None, None)
    states, mask, _, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=30)
    return states, mask.bool(), None


SD3 = {"encoders": ["clip_l_projected", "clip_g"], "tokenizers": ["tokenizer", "tokenizer_2"], "masked": False}
PUBLIC = {
    "clip_l": (sd15, {"encoders": ["clip_l"], "tokenizers": ["tokenizer"], "penultimate": False, "masked": False}),
    "sdxl": (sdxl, {**PAIR, "masked": False}),
    "refiner": (
        lambda made: sdxl(made, base=False),
        {"encoders": ["clip_g"], "tokenizers": ["tokenizer_2"], "masked": False},
    ),
    "sd3": (
        sd3,
        {
            "encoders": [*SD3["encoders"], "t5"],
            "tokenizers": [*SD3["tokenizers"], "tokenizer_3"],
            "length": 20,
            "masked": False,
        },
    ),
    "sd3 without T5": (lambda made: sd3(made, t5=False), {**SD3, "empty": 20, "width": 96}),
    "pixart": (pixart, {**T5, "length": 30, "lower": True}),
}


@pytest.mark.parametrize("family", PUBLIC)
@torch.no_grad()
def test_states_are_those_of_the_public_pipeline(parts, family):
    root, made = parts
    public, options = PUBLIC[family]
    text = TextConfig(path=str(root), **options).build()
    expected, found = public(made), text.encode(CAPTIONS)
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)
    states, _, pooled = found
    assert states.shape == (3, text.length, text.width)
    assert text.pooled_width == (0 if pooled is None else pooled.shape[1])


@torch.no_grad()
def test_t5gemma_gives_its_encoder_half_padded_on_the_right(parts):
    root, made = parts
    text = TextConfig(path=str(root), **GEMMA).build()
    states, mask, pooled = text.encode(["a red circle", "two"])
    ids = torch.zeros(2, 14, dtype=torch.int64)
    ids[0, :3], ids[1, 0] = torch.tensor([2, 4, 5]), 9
    expected = made["gemma"].get_encoder()(ids, attention_mask=(ids > 0).long()).last_hidden_state
    torch.testing.assert_close(states, expected)
    assert torch.equal(mask, ids > 0)
    assert pooled is None


def test_t5_gives_its_encoder_half(parts):
    root, made = parts
    made["t5_whole"].encoder.load_state_dict(made["t5"].encoder.state_dict())
    made["t5_whole"].save_pretrained(root / "t5_whole")
    half, whole = (
        TextConfig(path=str(root), encoders=[name], tokenizers=["tokenizer_3"], length=9).build().encode(CAPTIONS)
        for name in ("t5", "t5_whole")
    )
    assert torch.equal(half[0], whole[0])


def test_masks_follow_the_sequence_and_close_the_empty_tokens(parts):
    root, _ = parts
    both = TextConfig(path=str(root), encoders=["t5", "clip_l"], tokenizers=["tokenizer_3", "tokenizer"], length=9)
    _, mask, _ = both.build().encode(["a red circle"])
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 32, 33, 34, 35]  # CLIP's come first, and add a start
    _, mask, _ = TextConfig(path=str(root), **PAIR, empty=5, width=96).build().encode(["a red circle"])
    assert mask.shape == (1, 37)
    assert mask.sum() == 5


def test_long_captions_are_cut_not_refused(parts):
    text = TextConfig(path=str(parts[0]), **PAIR).build()
    states, mask, _ = text.encode(["a red circle " * 50])
    assert states.shape[1] == text.length
    assert mask.all()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_is_near_and_returns_float32(parts, name):
    config = TextConfig(path=str(parts[0]), **SD3)
    text = replace(config, precision=FrozenPrecision[name]).build()
    assert next(text.parameters()).dtype == FrozenPrecision[name].value
    for exact, rough in zip(config.build().encode(CAPTIONS), text.encode(CAPTIONS), strict=True):
        if exact is not None:
            assert rough.dtype == torch.float32
            assert 0 < (exact - rough).norm() / exact.norm() < 0.02


def changed(parts, tmp_path, name, change):
    """A copy of one encoder and its tokenizer, with its tensors changed."""
    _, made = parts
    made[name].save_pretrained(tmp_path / "encoder")
    made["tokenizer"].save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return TextConfig(path=str(tmp_path), encoders=["encoder"], tokenizers=["tokenizer"])


def test_what_is_not_finite_is_refused(parts, tmp_path):
    def enlarge(tensors):
        for name in tensors:
            if name.endswith("mlp.fc2.weight"):
                tensors[name] *= 1e7

    config = changed(parts, tmp_path, "clip_l", enlarge)
    config.build().encode(CAPTIONS)
    for name in ("bf16", "fp32"):
        replace(config, precision=FrozenPrecision[name]).build().encode(CAPTIONS)
    with pytest.raises(ValueError, match="text.path=.* gave states that are not finite: float16 .*precision=bf16"):
        replace(config, precision=FrozenPrecision.fp16).build().encode(CAPTIONS)


def test_files_named_fp16_are_read_when_asked_for(parts, tmp_path):
    _, made = parts
    made["clip_l"].save_pretrained(tmp_path / "encoder", variant="fp16")
    made["tokenizer"].save_pretrained(tmp_path / "tokenizer")
    config = TextConfig(path=str(tmp_path), encoders=["encoder"], tokenizers=["tokenizer"], variant="fp16")
    assert replace(config).build().encode(["a"])[0].shape == (1, 32, 24)
    with pytest.raises(ValueError, match="has nothing readable in encoder: .*text.variant=fp16 if its files say"):
        replace(config, variant=None).build()


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_tokenizer_that_only_sentencepiece_reads_says_so(parts, tmp_path):
    parts[1]["t5"].save_pretrained(tmp_path / "encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(ValueError, match="has nothing readable in tokenizer: .*; pip install sentencepiece protobuf"):
        TextConfig(path=str(tmp_path), encoders=["encoder"], tokenizers=["tokenizer"], length=5).build()


def test_a_file_without_some_tensors_is_refused(parts, tmp_path):
    config = changed(parts, tmp_path, "clip_g", lambda tensors: tensors.pop("text_projection.weight"))
    with pytest.raises(ValueError, match="lacks tensors of a CLIPTextModelWithProjection in encoder: text_projection"):
        config.build()


def test_an_unknown_encoder_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='bert'; choose among clip_text_model, t5, t5gemma"):
        TextConfig(path=str(tmp_path), encoders=[""], tokenizers=[""]).build()


def test_t5_needs_a_length(parts):
    with pytest.raises(ValueError, match="text.length must be given for the t5 encoder"):
        TextConfig(path=str(parts[0]), **T5).build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": ["text_encoder"]}, "must pair up one to one"),
        ({"length": 0}, "text.length=0 is not positive"),
        ({"empty": 77}, "text.empty=77 and text.width=0 stand together"),
        ({"width": 4096}, "text.empty=0 and text.width=4096 stand together"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(path="x", **options)


# --- the conditioner ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    return TextConfig(path="assets/shapes").build()


def test_null_is_the_empty_caption_or_the_label_after_the_last(text):
    words, classes = Conditioner(text), Conditioner(num_classes=48)
    assert torch.equal(words.null().text, words([""]).text)
    assert classes.null().class_id.tolist() == [48]
    zeros = Conditioner(TextConfig(path="assets/shapes", zero_null=True).build()).null()
    assert torch.equal(zeros.text, torch.zeros_like(words.null().text))
    assert torch.equal(zeros.pooled, torch.zeros_like(words.null().pooled))
    with pytest.raises(ValueError, match="give a prompt, not a class label"):
        words(class_id=torch.tensor([1]))
    with pytest.raises(ValueError, match="give class labels, not a prompt"):
        classes(["a"])


def test_the_vector_says_which_sizes_are_read(text):
    sizes = torch.tensor([[512.0, 768, 16, 32, 256, 384, 5.5]])
    assert Conditioner(text).size_ids(sizes) is None
    assert Conditioner(text, None, 128 + 6 * 256).size_ids(sizes).tolist() == [[512, 768, 16, 32, 256, 384]]
    assert Conditioner(text, None, 128 + 5 * 256).size_ids(sizes).tolist() == [[512, 768, 16, 32, 5.5]]
    assert set(SIZE_COLUMNS) == {5, 6}
    for wrong in (128 + 4 * 256, 128, 6 * 256, 128 + 6 * 256 + 1):
        with pytest.raises(ValueError, match=f"model.vector_dim={wrong} is not a pooled text of 128 .*=1664 or 1408"):
            Conditioner(text, None, wrong)
