"""The page's fields as one value, axes of a grid, sheets of pictures: without a page and without a checkpoint."""

from dataclasses import replace

import numpy as np
import pytest

from app.form import AS_TRAINED, Form, axis, keys
from app.sheet import GAP, SMALLEST, labelled
from diffusion.sample import Sampler
from diffusion.timesteps import Grid
from inference.description import SamplerConfig

FORM = Form(subject="a red circle", sampler="ddim", steps=20, guidance=2.0, eta=0.5, base=SamplerConfig(rho=5.0))


def test_a_form_is_the_settings_of_its_fields_and_of_those_it_does_not_show():
    changed = replace(FORM, sampler="dpmpp_2m", grid="karras", eta=None, negative_scale=1.5)
    expected = SamplerConfig(
        name=Sampler.dpmpp_2m, grid=Grid.karras, steps=20, guidance=2.0, rho=5.0, negative_scale=1.5
    )
    assert changed.config() == expected
    assert replace(FORM, grid=AS_TRAINED).config().grid is None
    assert replace(FORM, seed=7, count=3).seeds() == [7, 8, 9]
    scored = replace(FORM, base=SamplerConfig(aesthetic=5.0))
    assert [replace(scored, aesthetic=score).config().aesthetic for score in (None, 0)] == [5.0, 0]


def test_weights_of_loras_are_fields_of_the_page_and_axes_of_a_grid():
    shown = {"subject": "a", "sampler": "ddim", "steps": 20, "guidance": 2.0, "base": SamplerConfig()}
    form = Form.of(shown | {"LoRA seed.safetensors": 0.7, "LoRA figure": 0})
    assert form == Form(**shown, loras={"seed.safetensors": 0.7, "figure": 0})
    assert form.added() == {"seed.safetensors": 0.7}
    assert "LoRA figure" in keys(by_class=False, loras=form.loras)
    assert [(label, change(form).loras) for label, change in axis("LoRA seed.safetensors", "0, -0.5")] == [
        ("seed 0", {"seed.safetensors": 0.0, "figure": 0}),
        ("seed -0.5", {"seed.safetensors": -0.5, "figure": 0}),
    ]


def test_an_axis_changes_one_field():
    assert [change(FORM).steps for _, change in axis("steps", "5, 10")] == [5, 10]
    assert [change(FORM).subject for _, change in axis("class", "0,47")] == [0, 47]
    assert [(label, change(FORM).subject) for label, change in axis("prompt", "red, blue, dark green")] == [
        ("red", "a red circle"),
        ("blue", "a blue circle"),
        ("dark green", "a dark green circle"),
    ]
    assert axis("prompt", '"red, large", blue')[0][0] == "red, large"
    assert [change(FORM) for _, change in axis("nothing", "")] == [FORM]


def test_an_axis_of_samplers_leaves_eta_to_those_that_take_noise():
    changed = [change(FORM) for _, change in axis("sampler", "ddim, euler")]
    assert [(form.sampler, form.eta) for form in changed] == [("ddim", 0.5), ("euler", None)]


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("steps", "ten", "the grid's steps 'ten' is no number that fits; give 10, 20, 40"),
        ("sampler", "magic", "the grid's sampler 'magic' is unknown; choose from euler, heun"),
        ("guidance", " , ", "the grid has no values for guidance; give some, such as 1, 2, 4"),
        ("LoRA style", "much", "the grid's LoRA style 'much' is no number that fits; give 0, 0.5, 1"),
        ("prompt", "green, blue", "the grid looks for 'green', which the prompt does not hold"),
    ],
)
def test_an_axis_refuses_what_is_none(key, values, message):
    with pytest.raises(ValueError, match=message):
        [change(FORM) for _, change in axis(key, values)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("guidance", None, "guidance is empty; give a number"),
        ("count", 17, "count=17 pictures are not drawn at once; choose 1 to 16"),
        ("height", 5000, "height=5000 is above 4096 pixels; choose a smaller one"),
        ("loras", {"style": None}, "the weight of style is no number; give 1, or 0 to take it off"),
        ("loras", {"style": float("nan")}, "the weight of style is no number"),
        ("steps", 0, "sampler.steps=0 must be at least 1"),
    ],
)
def test_a_form_refuses_what_no_drawing_can_have(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(FORM, **{field: value}).config()


def test_a_sheet_holds_each_picture_where_its_labels_say():
    """Small pictures are enlarged by a whole factor, pixel for pixel; labels leave ink beside them and nowhere else."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    sheet = labelled([[*row] for row in pictures], ["one", "two", "three"], ["above", "below"])
    factor = -(-SMALLEST // 64)
    side = 64 * factor
    for row in range(2):
        for column in range(3):
            y = sheet.shape[0] - (2 - row) * (side + GAP)
            x = sheet.shape[1] - (3 - column) * (side + GAP)
            assert (sheet[y : y + side : factor, x : x + side : factor] == pictures[row, column]).all()
    bare = labelled([[*pictures[0]]], [""] * 3, [""])
    assert bare.shape == (side + 2 * GAP, 3 * (side + GAP) + GAP, 3)
    assert sheet[: sheet.shape[0] - 2 * (side + GAP)].min() < 100
    assert bare[:GAP].min() > 200


def test_a_long_label_is_cut_rather_than_run_into_the_next():
    long = "a small red circle above a large blue star " * 3
    sheet = labelled([[np.full((64, 64, 3), 255, np.uint8)] * 2], [long, "b"], [""])
    gap = sheet[: -SMALLEST - GAP, GAP + SMALLEST : 2 * GAP + SMALLEST]
    assert gap.min() > 200
