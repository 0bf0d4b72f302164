"""From a checkpoint to pictures: seeds, sizes, samplers, and what the committed pipeline is said to do."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import shapes
from diffusion.sample import ETA, Sampler
from diffusion.timesteps import Grid
from inference.description import Description, SamplerConfig
from inference.device import Offload, Precision
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.text import Conditioner, TextConfig
from models.unet import UNetConfig

ASSETS = Path("assets/shapes/pipeline")
PROMPT = "a large red circle in the centre on a white background"
LONG = ", ".join([PROMPT] * 12)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(ASSETS)


@pytest.fixture(scope="module")
def fast(pipeline) -> SamplerConfig:
    return replace(pipeline.description.sampler, steps=4)


@pytest.fixture(scope="module")
def given() -> np.ndarray:
    """A picture to begin from: a blue square."""
    return shapes.render(
        next(s for i in range(999) if (s := shapes.scene(3, i, two=0)).things[0].colour == "blue"), 128
    )


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    """Its upper right, not along the cells' edges."""
    mask = np.zeros((128, 128), bool)
    mask[5:61, 70:123] = True
    return mask


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two pictures."""
    return int(np.abs(a.astype(int) - b).max())


# --- one picture, whatever is drawn beside it -------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", *(kind.name for kind in ETA)])
def test_a_picture_depends_on_its_own_seed_alone(pipeline, fast, name):
    sampler = replace(fast, name=Sampler[name], eta=1.0 if Sampler[name] in ETA else None)
    prompts = [PROMPT, "a small blue star at the top"]
    both = pipeline.generate(prompts, seeds=[3, 4], sampler=sampler)
    assert apart(both[1:], pipeline.generate(prompts[1:], seeds=[4], sampler=sampler)) <= 1  # float order in a batch


def test_prompts_of_other_lengths_change_no_picture(pipeline, fast):
    """One that takes two chunks of CLIP's, composed ones, and ones that change on the way."""
    prompts = [LONG, PROMPT, "a star AND red:0.5", "a [red|blue] [star:ring:0.5]"]
    negatives = ["", "blue", "", LONG]
    draw = partial(pipeline.generate, sampler=fast)
    together = draw(prompts, negative=negatives, seeds=[1, 2, 3, 4])
    for i in range(4):
        assert apart(together[i], draw([prompts[i]], negative=negatives[i], seeds=[i + 1])[0]) <= 1


def test_a_plain_prompt_is_shown_as_it_was_in_training(pipeline, fast):
    """Through the grammar, one table and its rows, the network is given what the encoders say of the caption."""
    told = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda _, args: told.append(args[2]))
    pipeline.generate([PROMPT], sampler=replace(fast, guidance=1.0))
    hook.remove()
    expected = pipeline.conditioner([PROMPT])
    n = told[0].text.shape[1]
    assert torch.equal(told[0].text, expected.text[:, :n]) and torch.equal(told[0].text_mask, expected.text_mask[:, :n])
    assert not expected.text_mask[:, n:].any()


# --- what prompts do --------------------------------------------------------------------------------------


def shown(pictures: np.ndarray, colour: str) -> float:
    """Share of pictures in which the reader finds something of a colour."""
    return float(np.mean([colour in {thing.colour for thing in shapes.read(picture).things} for picture in pictures]))


def test_guidance_makes_pictures_follow_the_prompt(pipeline):
    scenes = shapes.exam(5, 24, 1)
    prompts = [shapes.prompt(scene) for scene in scenes]
    right = {}
    for guidance in (0.0, 2.0):
        sampler = replace(pipeline.description.sampler, guidance=guidance)
        right[guidance] = shapes.mark(scenes, pipeline.generate(prompts, sampler=sampler))
    for kind in ("background", "place", "colour", "shape"):
        assert right[2.0][kind] > right[0.0][kind] + 0.2, kind
    assert right[0.0]["all"] < 0.2
    assert right[2.0]["all"] > 0.9


def test_a_negative_prompt_of_a_colour_lowers_its_share(pipeline):
    """A caption without a colour leaves it to the model, which likes pink; in both ways to say no."""
    draw = partial(pipeline.generate, ["a large circle on a white background"] * 16)
    sampler = replace(pipeline.description.sampler, steps=16)
    free = shown(draw(sampler=sampler), "pink")
    assert free > 0.4
    assert shown(draw(sampler=sampler, negative="pink"), "pink") < free - 0.3
    assert shown(draw(sampler=replace(sampler, negative_scale=1.0), negative="pink"), "pink") < free - 0.3
    none = replace(sampler, negative_scale=0.0)
    assert apart(draw(sampler=none, negative="pink"), draw(sampler=sampler)) <= 1


def test_the_weight_of_a_word_moves_its_share(pipeline):
    """Of two colours that are asked for at once."""
    sampler = replace(pipeline.description.sampler, steps=16)
    shares = [
        shown(pipeline.generate([f"a large green (red:{w}) star on a white background"] * 16, sampler=sampler), "red")
        for w in (0.5, 1, 1.5)
    ]
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1


def test_a_prompt_may_change_on_the_way(pipeline):
    sampler = replace(pipeline.description.sampler, steps=16)
    prompts = [f"a large [red:blue:{share}] star on a white background" for share in (0.1, 0.9)]
    pictures = pipeline.generate(prompts, sampler=sampler)
    assert shown(pictures[:1], "blue") == 1 and shown(pictures[1:], "red") == 1


# --- samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Sampler)
def test_every_sampler_draws_what_is_asked(pipeline, name):
    scenes = shapes.exam(5, 16, 1)
    sampler = replace(pipeline.description.sampler, name=name, steps=20, eta=None)
    pictures = pipeline.generate([shapes.prompt(scene) for scene in scenes], sampler=sampler)
    assert shapes.mark(scenes, pictures)["all"] > 0.85


def test_evaluations_of_the_network_are_counted(pipeline, fast):
    for name, expected in ((Sampler.euler, 4), (Sampler.heun, 7), (Sampler.unipc, 4)):
        pipeline.generate([PROMPT], sampler=replace(fast, name=name, eta=None))
        assert pipeline.evaluations == expected
    pipeline.generate([PROMPT], sampler=replace(fast, name=Sampler.dopri5, eta=None))
    assert pipeline.evaluations > 8


@pytest.mark.slow
def test_the_committed_pipeline_is_as_good_as_its_evaluation_says(pipeline):
    known = json.loads((ASSETS / "evaluation.json").read_text())
    scenes = shapes.exam(6, 60, 1)  # other scenes than those of the evaluation
    marks = shapes.mark(scenes, pipeline.generate([shapes.prompt(scene) for scene in scenes]))
    for kind, share in known["attributes"].items():
        likely = (share * known["count"] + 1) / (known["count"] + 2)  # all right so far is not certain
        error = math.sqrt(likely * (1 - likely) * (1 / 60 + 1 / known["count"]))
        assert marks[kind] == pytest.approx(share, abs=4 * error + 0.01), kind


# --- over a picture ---------------------------------------------------------------------------------------


def test_no_strength_returns_the_encoding_and_full_strength_ignores_the_picture(pipeline, fast, given):
    pixels = torch.from_numpy(given).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipeline.draw([PROMPT], sampler=fast, image=given, strength=0.0)
    assert torch.equal(latents, pipeline.autoencoder.encode(pixels))
    whole = pipeline.generate([PROMPT], sampler=fast, image=given, strength=1.0)
    assert apart(whole, pipeline.generate([PROMPT], sampler=fast)) == 0


def test_strength_is_the_share_of_the_steps_that_are_walked(pipeline, given):
    sampler = replace(pipeline.description.sampler, steps=10)
    distance = []
    for strength, steps in ((0.2, 2), (0.5, 5), (0.8, 8)):
        assert pipeline.steps(sampler, strength) == steps
        seen: list[int] = []
        drawn = pipeline.generate(
            [PROMPT], sampler=sampler, image=given, strength=strength,
            progress=lambda step, z, x0, seen=seen: seen.append(step),
        )  # fmt: skip
        assert seen == list(range(steps))
        distance.append(np.abs(drawn.astype(float) - given).mean())
    assert distance == sorted(distance) and distance[0] < 0.5 * distance[-1]


@pytest.mark.parametrize("name", Sampler)
def test_inpainting_changes_nothing_outside_the_mask(pipeline, fast, given, mask, name):
    sampler = replace(fast, name=name, eta=None)
    known = pipeline.draw([PROMPT], sampler=sampler, image=given, strength=0.0)
    latents = pipeline.draw([PROMPT], sampler=sampler, image=given, mask=mask)
    cells = torch.from_numpy(mask.reshape(16, 8, 16, 8).any((1, 3)))
    assert (latents - known).abs()[..., ~cells].max() == 0
    assert (latents - known).abs()[..., cells].max() > 0.1
    picture = pipeline.generate([PROMPT], sampler=sampler, image=given, mask=mask)[0]
    assert np.array_equal(picture[~mask], given[~mask]) and not np.array_equal(picture[mask], given[mask])


def test_what_is_painted_sees_what_is_kept(pipeline, given):
    """The whole prompt painted over a half: the background goes on, since the network saw the other half of it."""
    mask = np.ones((128, 128), bool)
    mask[:, :24] = False
    brown = np.full((128, 128, 3), shapes.BACKGROUNDS["brown"], np.uint8)
    sampler = replace(pipeline.description.sampler, steps=20, guidance=1.0)
    pictures = pipeline.generate(["a star"] * 6, sampler=sampler, image=brown, mask=mask)
    grounds = [shapes.read(picture).background for picture in pictures]
    assert grounds.count("brown") >= 5
    free = pipeline.generate(["a star"] * 6, sampler=sampler)
    assert [shapes.read(picture).background for picture in free].count("brown") <= 4


# --- two networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Sampler)
def test_a_refiner_that_is_the_base_changes_nothing(pipeline, fast, name):
    """In the middle of a multistep sampler too: the hand-over is in what it asks, not in how it steps."""
    draw = partial(pipeline.generate, [PROMPT], sampler=replace(fast, steps=6, name=name, eta=None))
    assert apart(draw(refiner=pipeline, handover=0.5), draw()) == 0


def test_a_refiner_draws_the_last_steps(pipeline, fast, tmp_path):
    other = Pipeline.load(ASSETS)
    calls = []
    other.denoiser.register_forward_hook(lambda *_: calls.append(1))
    pipeline.generate([PROMPT], sampler=replace(fast, steps=10), refiner=other, handover=0.7)
    assert len(calls) == 3 and pipeline.evaluations == 10


def test_one_ends_and_another_starts_with_its_latents(pipeline, fast):
    sampler = replace(fast, steps=10, name=Sampler.euler, eta=None)
    z = pipeline.draw([PROMPT], sampler=sampler, denoising_end=0.8)
    both = pipeline.draw([PROMPT], sampler=sampler, denoising_start=0.8, z=z)
    assert torch.equal(both, pipeline.draw([PROMPT], sampler=sampler))


def ranged(pipeline: Pipeline, top: float) -> Pipeline:
    """The pipeline as if it had been trained at times up to `top` alone."""
    objective = replace(pipeline.description.objective, range=[0.0, top])
    description = replace(pipeline.description, objective=objective)
    return Pipeline(pipeline.denoiser, pipeline.conditioner, pipeline.autoencoder, description)


def test_a_network_of_low_noise_begins_from_no_noise(pipeline, fast, given):
    refiner = ranged(pipeline, 0.4)
    with pytest.raises(ValueError, match="trained at noise times up to 0.4 only"):
        refiner.generate([PROMPT], sampler=fast)
    assert refiner.generate([PROMPT], sampler=fast, image=given, strength=0.5).shape == (1, 128, 128, 3)
    with pytest.raises(ValueError, match="would take over at noise time 0.667, .* choose a later handover"):
        pipeline.generate([PROMPT], sampler=fast, refiner=refiner, handover=0.5)
    pipeline.generate([PROMPT], sampler=replace(fast, steps=10), refiner=refiner, handover=0.9)


# --- the same picture with less memory --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Offload.sequential, Offload.disk])
def test_offloading_changes_no_picture(pipeline, fast, kind):
    frugal = Pipeline.load(ASSETS, device="cpu", offload=kind)
    held = sum(p.numel() for p in frugal.denoiser.parameters() if p.device.type != "meta")
    assert held == 0
    prompts = ["a (red:1.2) star", LONG]
    drawn = pipeline.generate(prompts, sampler=fast)
    assert apart(frugal.generate(prompts, sampler=fast), drawn) <= (kind is Offload.disk)  # it forgets channels_last


def test_branches_one_by_one_and_attention_in_slices_change_no_picture(pipeline, fast):
    draw = partial(pipeline.generate, [PROMPT], sampler=replace(fast, interval=[0.0, 1.0]))
    whole = draw()
    try:
        pipeline.together, pipeline.attention_slices = False, 3
        assert apart(draw(), whole) <= 1
        assert pipeline.evaluations == 8
    finally:
        pipeline.together, pipeline.attention_slices = True, None


def test_bf16_is_near(pipeline, fast):
    half = Pipeline.load(ASSETS, device="cpu", compute=Precision.bf16)
    drawn = pipeline.generate([PROMPT], sampler=fast).astype(float)
    assert 0 < np.abs(half.generate([PROMPT], sampler=fast) - drawn).mean() < 8


def test_decoding_in_parts_is_decoding(pipeline, monkeypatch):
    z = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, calls = pipeline.decode(z), []
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda z: calls.append(len(z)) or decode(z))
    monkeypatch.setattr("inference.pipeline.MOST_PIXELS", 2 * 128 * 128)
    assert apart(pipeline.decode(z), whole) <= 1 and calls == [2, 1]


def test_a_preview_is_a_small_picture_of_the_estimate(pipeline):
    z = pipeline.draw([PROMPT])
    assert apart(pipeline.preview(z), pipeline.decode(z)) == 0
    large = torch.nn.functional.interpolate(z, scale_factor=8, mode="nearest")
    small = pipeline.preview(large)[0]
    assert small.shape == (256, 256, 3)
    near = np.asarray(Image.fromarray(small).resize((128, 128), Image.Resampling.BOX)).astype(float)
    assert np.abs(near - pipeline.decode(z)[0]).mean() < 20


# --- what is refused --------------------------------------------------------------------------------------


def test_sizes_other_than_the_trained_are_whole_patches(pipeline, fast):
    assert pipeline.generate(["a red circle"], sampler=fast, size=(64, 160)).shape == (1, 64, 160, 3)
    with pytest.raises(ValueError, match="width=100 must be a multiple of 32, .* choose 96"):
        pipeline.generate(["a red circle"], size=(64, 100))


def test_wrong_questions_get_the_way_out(pipeline, fast, given, mask, tmp_path):
    draw = partial(pipeline.generate, [PROMPT], sampler=fast)
    for wrong, message in (
        ({"seeds": [1, 2]}, "seeds has 2 entries for 1 pictures"),
        ({"negative": ["a", "b"]}, "negative has 2 entries for 1 pictures"),
        ({"image": given, "strength": 1.5}, "strength=1.5 is a share of the steps"),
        ({"refiner": pipeline, "handover": 1.5}, "handover=1.5 is a share of the steps; choose 0 to 1"),
        ({"image": given[:64], "size": (128, 128)}, r"the picture to draw over is uint8 of shape \(64, 128, 3\); give"),
        ({"mask": mask}, "a mask says where to paint on a picture, and there is none"),
        ({"image": given, "mask": mask[:64]}, r"the mask has the shape \(64, 128\), but the picture \(128, 128\)"),
        ({"image": given, "mask": np.zeros_like(mask)}, "the mask is empty, so nothing would be painted"),
        ({"sampler": replace(fast, grid=Grid.trailing)}, "times=logit_normal"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**wrong)
    with pytest.raises(ValueError, match="sampler.eta=0.5 adds noise, but sampler.name=heun takes none"):
        replace(fast, name=Sampler.heun)
    with pytest.raises(ValueError, match="denoising_start=0.9 leaves no step before 0.5"):
        pipeline.draw([PROMPT], denoising_start=0.9, denoising_end=0.5)
    with pytest.raises(ValueError, match="conditioned on text: give a prompt"):
        pipeline.generate(class_ids=[1])
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        Pipeline.load(tmp_path)
    with pytest.raises(ValueError, match="offload=component moves parts .* and there is none; choose offload=disk"):
        Pipeline.load(ASSETS, device="cpu", offload=Offload.component)


def test_a_description_from_before_an_option_means_the_same(tmp_path):
    known = json.loads((ASSETS / "pipeline.json").read_text())
    for part, wanted in (("text", ["encoders", "path", "revision", "tokenizers"]), ("vae", ["path", "revision"])):
        known[part] = {key: known[part][key] for key in wanted}
    (tmp_path / "pipeline.json").write_text(json.dumps(known))
    old = Description.load(tmp_path)
    assert old.text == TextConfig(path="assets/shapes")
    assert (old.text.penultimate, old.text.masked, old.text.length, old.text.precision.name) == (
        True,
        True,
        None,
        "fp32",
    )
    assert old.vae == AutoencoderConfig(path="assets/shapes")
    old = replace(old, sampler=SamplerConfig(name=Sampler.ddim, grid=Grid.karras, eta=None))
    old.save(tmp_path)
    assert Description.load(tmp_path) == old


@pytest.mark.parametrize(
    ("numbers", "expected"), [(6, [[64, 96, 0, 0, 64, 96]] * 2), (5, [[64, 96, 0, 0, 6], [64, 96, 0, 0, 2.5]])]
)
def test_the_denoiser_is_told_the_size_that_is_asked_for(pipeline, numbers, expected):
    """In both branches of guidance; the refiner is led away from a low aesthetic score."""
    unet = UNetConfig(
        in_channels=8, channels=[16], depths=[0], heads=[1], layers=1, groups=16, text_dim=192,
        vector_dim=128 + numbers * 256,
    ).build()  # fmt: skip
    told = []
    unet.register_forward_pre_hook(lambda _, given: told.append(given[2].size_ids.tolist()))
    conditioner = Conditioner(pipeline.conditioner.text, None, unet.config.vector_dim)
    sized = Pipeline(unet, conditioner, pipeline.autoencoder, pipeline.description)
    with torch.no_grad():
        sized.generate(["a"], size=(64, 96), sampler=replace(pipeline.description.sampler, steps=2, interval=[0, 1]))
    assert told == [expected] * 2
