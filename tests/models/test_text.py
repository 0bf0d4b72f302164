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

from models.base import Cond
from models.pretrained import FrozenPrecision
from models.text import SIZE_COLUMNS, Conditioner, TextConfig, TextEncoders, _rows, emphasised

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


# --- weights and chunks -------------------------------------------------------------------------------------

ALL = {**SD3, "encoders": [*SD3["encoders"], "t5"], "tokenizers": [*SD3["tokenizers"], "tokenizer_3"], "length": 20}
MIXED = {"encoders": ["t5", *PAIR["encoders"]], "tokenizers": ["tokenizer_3", *PAIR["tokenizers"]], "length": 9}
EMPTIED = {**SD3, "empty": 9, "width": 96}
LONG = " ".join(["red circle", "blue star", "green square"] * 25) + " at the top"  # 153 words


def plain(*captions):
    """Captions as prompts that weigh nothing."""
    return [[[(caption, 1.0)]] for caption in captions]


def same(one, two):
    """Whether two encodings are equal to the last bit."""
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", [PAIR, ALL, {**T5, "length": 12, "lower": True}, GEMMA, EMPTIED])
def test_plain_prompts_are_captions_to_the_last_bit(parts, options, masked):
    text = TextConfig(path=str(parts[0]), **{**options, "masked": masked}).build()
    for captions in (CAPTIONS, *([caption] for caption in CAPTIONS)):
        assert text.chunks_needed(plain(*captions)) == 1
        assert same(text.encode_weighted(plain(*captions)), text.encode(captions))
        halves = [[[(caption[:5], 1.0), (caption[5:], 1.0)]] for caption in [*captions[:1], "small red"]]
        assert text.encode_weighted(halves)[0].shape[1:] == (text.length, text.width)


@pytest.mark.parametrize("options", [PAIR, ALL, GEMMA, {**T5, "length": 4}])
def test_tokens_are_what_the_tokenizer_makes_of_a_caption(parts, options):
    """Start, end, padding, mask and cut are put together here; theirs are the tokenizer's."""
    text = TextConfig(path=str(parts[0]), **options).build()
    for tokenizer in text.tokenizers:
        captions = [*CAPTIONS, "a red circle at the top " * 12, "  a  red "]
        expected = tokenizer(
            captions, padding="max_length", max_length=9, truncation=True, padding_side="right", return_tensors="pt"
        )
        ids, mask, weights = _rows(tokenizer, [tokens for (tokens,) in text._tokens(tokenizer, plain(*captions))], 9)
        assert torch.equal(ids, expected.input_ids)
        assert torch.equal(mask, expected.attention_mask.bool())
        assert (weights == 1).all()


@torch.no_grad()
def test_a_long_prompt_is_its_chunks_encoded_alone(parts):
    text = TextConfig(path=str(parts[0]), **PAIR).build()
    words, again = (tokenizer(LONG, add_special_tokens=False).input_ids for tokenizer in text.tokenizers)
    assert words == again
    assert len(words) > 150
    chunks = text.chunks_needed(plain(LONG))
    assert chunks == -(-len(words) // 30)
    states, mask, pooled = text.encode_weighted(plain(LONG))
    assert states.shape == (1, 32 * chunks, text.width)
    start, end, widths = 639, 640, (0, 24, 64)
    for i in range(chunks):
        for k, (encoder, pad) in enumerate(zip(text.encoders, (640, 0), strict=True)):
            ids = [start, *words[30 * i : 30 * i + 30], end]
            assert mask[0, 32 * i : 32 * i + 32].sum() == len(ids)
            alone = encoder(torch.tensor([ids + [pad] * (32 - len(ids))]), output_hidden_states=True)
            found = states[:, 32 * i : 32 * i + 32, widths[k] : widths[k + 1]]
            torch.testing.assert_close(found, alone.hidden_states[-2])
            if i == 0 and k == 1:
                torch.testing.assert_close(pooled, alone.text_embeds)


def test_a_break_starts_a_chunk_and_t5_reads_on(parts):
    text = TextConfig(path=str(parts[0]), **ALL).build()
    broken = [[[("a red circle", 1.0)], [("two stars", 1.0)]]]
    assert text.chunks_needed(broken) == 2
    found, pooled = text.encode_weighted(broken)[::2]
    first, second = (text.encode([caption]) for caption in ("a red circle", "two stars"))
    torch.testing.assert_close(found[:, :32], first[0][:, :32])
    torch.testing.assert_close(found[:, 32:64], second[0][:, :32])
    torch.testing.assert_close(found[:, 64:], text.encode(["a red circle two stars"])[0][:, 32:])
    torch.testing.assert_close(pooled, first[2])


def test_prompts_of_a_call_are_filled_up_or_cut_to_the_same_chunks(parts):
    text = TextConfig(path=str(parts[0]), **ALL).build()
    chunks = text.chunks_needed(plain("two", LONG))
    states, _, pooled = text.encode_weighted(plain("two", LONG))
    short, empty = text.encode(["two"]), text.encode([""])
    torch.testing.assert_close(states[:1, :32], short[0][:, :32])
    torch.testing.assert_close(states[:1, 32 : 32 * chunks], empty[0][:, :32].repeat(1, chunks - 1, 1))
    torch.testing.assert_close(states[:1, 32 * chunks :], short[0][:, 32:])
    torch.testing.assert_close(pooled, torch.cat([short[2], text.encode([LONG])[2]]))
    cut = text.encode_weighted(plain("two", LONG), 2)
    torch.testing.assert_close(cut[0][:, :64], states[:, :64])
    torch.testing.assert_close(cut[0][:, 64:], states[:, 32 * chunks :])


def test_segments_without_tokens_are_chunks_and_t5_has_one(parts):
    text = TextConfig(path=str(parts[0]), **PAIR).build()
    assert text.chunks_needed([[[("", 1.0)], [(" ", 1.0)], [("a", 1.0)]]]) == 3
    assert TextConfig(path=str(parts[0]), **T5, length=9).build().chunks_needed(plain(LONG)) == 1


@pytest.mark.parametrize("weight", [1.3, 0.5, -1.0, 0.0])
def test_a_weight_scales_the_states_of_its_tokens(parts, weight, monkeypatch):
    """Before the mean is restored nothing else changes; restored, all of a chunk changes by one factor."""
    text = TextConfig(path=str(parts[0]), **ALL).build()
    prompt = [[[("a small", 1.0), ("red", weight), ("circle", 1.0)]]]
    (found, _, pooled), (plainly, _, plain_pooled) = text.encode_weighted(prompt), text.encode(["a small red circle"])
    assert torch.equal(pooled, plain_pooled)
    expected = torch.ones(52)
    for tokenizer, start, offset in ((text.tokenizers[0], 1, 0), (text.tokenizers[2], 0, 32)):
        before, red = (len(tokenizer(words, add_special_tokens=False).input_ids) for words in ("a small", "red"))
        expected[offset + start + before : offset + start + before + red] = weight
    weighted = plainly * expected[None, :, None]
    for tokens, features in (
        (slice(0, 32), slice(0, 24)),
        (slice(0, 32), slice(24, 64)),
        (slice(32, 52), slice(0, 96)),
    ):
        one, two = found[:, tokens, features], weighted[:, tokens, features]
        factor = (one * two).sum() / two.square().sum()
        torch.testing.assert_close(one, factor * two, rtol=1e-5, atol=1e-6)
        mean, whole = one.mean(), plainly[:, tokens, features].mean()
        assert factor == pytest.approx(1, abs=1e-5) or mean.item() == pytest.approx(whole.item(), rel=1e-3)
    monkeypatch.setattr("models.text.emphasised", lambda states, weights: states * weights[..., None])
    assert torch.equal(text.encode_weighted(prompt)[0], weighted)


def test_emphasis_restores_the_mean_of_each_row_where_there_is_one():
    torch.manual_seed(0)
    states, weights = torch.randn(2, 7, 50) + torch.tensor([[[0.3]], [[-0.5]]]), torch.ones(2, 7)
    assert torch.equal(emphasised(states, weights), states)
    weights[:, 2:4] = 1.5
    found = emphasised(states, weights)
    torch.testing.assert_close(found.mean((1, 2)), states.mean((1, 2)))
    weights[1] = 1
    assert torch.equal(emphasised(states, weights)[0], found[0])  # the other row's weights are its own
    assert torch.equal(emphasised(states, weights)[1], states[1])
    centred = states - states.mean(-1, keepdim=True)  # as a norm leaves them: the mean is rounding
    assert torch.equal(emphasised(centred, weights), centred * weights[..., None])
    small = torch.tensor([[[1, -0.99], [-0.99, 1]]])  # a mean of half a hundredth of the root mean square
    assert torch.equal(emphasised(small, torch.full((1, 2), 1.5)), small * 1.5)
    opposed, weights = torch.tensor([[[1.0], [-0.5]]]), torch.tensor([[1, 1.8]])  # five times would restore the mean
    assert torch.equal(emphasised(opposed, weights), opposed * weights[..., None])
    turned = torch.ones(1, 2, 3)
    weights = torch.tensor([[-1.0, 0.9]])  # the mean would come out 20 times as small, and of another sign
    assert torch.equal(emphasised(turned, weights), turned * weights[..., None])
    assert torch.equal(emphasised(turned, torch.zeros(1, 2)), torch.zeros(1, 2, 3))


def test_low_precision_weighs_in_float32(parts):
    config = TextConfig(path=str(parts[0]), **SD3)
    prompt = [[[("a small", 1.0), ("red", 1.3)]]]
    exact, rough = (replace(config, precision=FrozenPrecision[name]).build() for name in ("fp32", "fp16"))
    exact, rough = exact.encode_weighted(prompt)[0], rough.encode_weighted(prompt)[0]
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("options", [PAIR, ALL, {**T5, "length": 9}, MIXED, EMPTIED])
def test_regions_are_where_each_encoder_writes(parts, options):
    """Another encoder's weights change its region, and nothing else."""
    text = TextConfig(path=str(parts[0]), **options).build()
    states, _, pooled = text.encode(CAPTIONS)
    for encoder, region in zip(text.encoders, text.regions, strict=True):
        with torch.no_grad():
            saved = {name: p.clone() for name, p in encoder.named_parameters()}
            for p in encoder.parameters():
                p.add_(0.1 * torch.randn_like(p))
            found, _, changed = text.encode(CAPTIONS)
            encoder.load_state_dict(saved, strict=False)
        moved = torch.zeros_like(states, dtype=torch.bool)
        moved[:, region.tokens, region.features] = True
        assert torch.equal(found != states, moved)
        if pooled is not None:
            moved = torch.zeros_like(pooled, dtype=torch.bool)
            moved[:, region.pooled] = True
            assert torch.equal(changed != pooled, moved)


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
    longer = words.null(chunks=3)
    torch.testing.assert_close(longer.text, words.null().text.repeat(1, 3, 1))
    assert torch.equal(longer.text_mask, words.null().text_mask.repeat(1, 3))
    torch.testing.assert_close(longer.pooled, words.null().pooled)
    assert torch.equal(words.null().text, words([""]).text)
    zeros = Conditioner(TextConfig(path="assets/shapes", zero_null=True).build()).null(chunks=2)
    assert torch.equal(zeros.text, torch.zeros_like(longer.text[:, :64]))
    assert classes.null(chunks=2).class_id.tolist() == [48]
    with pytest.raises(ValueError, match="give a prompt, not a class label"):
        words(class_id=torch.tensor([1]))
    with pytest.raises(ValueError, match="give class labels, not a prompt"):
        classes(["a"])
    with pytest.raises(ValueError, match="give class labels, not a prompt"):
        classes.weighted(plain("a"))


def test_weighted_prompts_have_the_shape_of_their_null(text):
    words = Conditioner(text)
    prompts = [[[("a ", 1.0), ("red", 1.5)], [("circle", 1.0)]], *plain("a blue star")]
    cond, null = words.weighted(prompts, 3), words.null(chunks=3)
    assert Cond.cat([cond, null]).text.shape == (3, 96, 192)
    assert torch.equal(words.weighted(prompts).text, cond.text[:, :64])
    assert torch.equal(words.weighted(plain("a blue star")).text, words(["a blue star"]).text)


def test_the_vector_says_which_sizes_are_read(text):
    sizes = torch.tensor([[512.0, 768, 16, 32, 256, 384, 5.5]])
    assert Conditioner(text).size_ids(sizes) is None
    assert Conditioner(text, None, 128 + 6 * 256).size_ids(sizes).tolist() == [[512, 768, 16, 32, 256, 384]]
    assert Conditioner(text, None, 128 + 5 * 256).size_ids(sizes).tolist() == [[512, 768, 16, 32, 5.5]]
    assert set(SIZE_COLUMNS) == {5, 6}
    for wrong in (128 + 4 * 256, 128, 6 * 256, 128 + 6 * 256 + 1):
        with pytest.raises(ValueError, match=f"model.vector_dim={wrong} is not a pooled text of 128 .*=1664 or 1408"):
            Conditioner(text, None, wrong)
