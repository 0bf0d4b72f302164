"""The command line that draws."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import shapes
from diffusion.sample import Sampler
from diffusion.timesteps import Grid
from inference.picture import read_settings
from scripts import sample

ASSETS = "assets/shapes/pipeline"
QUICK = ["--steps", "2", "--size", "64x96"]
PROMPT = "a large red circle in the centre on a white background"


def run(out: Path, *arguments: str) -> list[str]:
    """Draw in this process; what could not be drawn."""
    return sample.draw(sample.parser().parse_args(["--checkpoint", ASSETS, "--out", str(out), *arguments]))


def pictures(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]


def test_it_draws_one_file_a_picture(tmp_path):
    out = tmp_path / "pictures"
    command = [sys.executable, "scripts/sample.py", "--checkpoint", ASSETS, "--out", str(out), *QUICK]
    done = subprocess.run([*command, "--prompt", PROMPT, "--num-images", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted(out.iterdir())] == ["00000-0.png", "00001-1.png"]
    assert Image.open(out / "00000-0.png").size == (96, 64)
    assert PROMPT in done.stdout and "2 pictures in" in done.stdout


def test_help_needs_no_torch_and_names_every_choice():
    code = "import sys; sys.argv = ['sample.py', '--help']; import runpy\ntry:\n    runpy.run_path('scripts/sample.py', run_name='__main__')\nexcept SystemExit:\n    pass\nassert not {'torch', 'numpy', 'PIL', 'rich'} & set(sys.modules)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in [*Sampler.__members__, *Grid.__members__]:
        assert name in done.stdout.split()


def test_a_picture_draws_itself_again(tmp_path):
    how = ["--sampler", "dpmpp_2m", "--grid", "karras", "--guidance", "3", "--eta", "0", "--negative", 'blue, "dark"']
    assert not run(tmp_path / "a", *QUICK, *how, "--prompt", PROMPT, "--prompt", "a (blue:1.2) star", "--seed", "7")
    first = sorted((tmp_path / "a").iterdir())
    said = read_settings(first[1])
    assert (said.prompt, said.seed, said.negative, said.size) == ("a (blue:1.2) star", 8, 'blue, "dark"', [64, 96])
    assert (said.sampler.name, said.sampler.grid, said.model) == (Sampler.dpmpp_2m, Grid.karras, "pipeline")
    assert len(said.model_hash) == 10
    assert not run(tmp_path / "b", "--settings", str(first[1]))
    assert np.abs(pictures(tmp_path / "b")[0].astype(int) - pictures(tmp_path / "a")[1]).max() <= 1
    assert not run(tmp_path / "b", "--settings", str(first[1]), "--seed", "9")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000-8.png", "00001-9.png"]


def test_it_draws_over_a_picture(tmp_path):
    given = shapes.render(shapes.scene(3, 0, two=0), 128)
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given_too = ["--prompt", PROMPT, "--steps", "3", "--init-image", str(tmp_path / "given.png")]
    assert not run(tmp_path / "over", *given_too, "--strength", "0.7")
    assert not run(tmp_path / "in", *given_too, "--mask", str(tmp_path / "mask.png"))
    painted = pictures(tmp_path / "in")[0]
    assert np.array_equal(painted[:, :64], given[:, :64]) and not np.array_equal(painted[:, 64:], given[:, 64:])
    settings = [read_settings(next((tmp_path / name).iterdir())) for name in ("over", "in")]
    assert [each.strength for each in settings] == [0.7, 1.0]
    assert settings[0].image == settings[1].image and settings[0].mask is None and settings[1].mask


def test_a_refiner_takes_over(tmp_path):
    assert not run(tmp_path / "both", *QUICK, "--prompt", PROMPT, "--refiner", ASSETS, "--handover", "0.5")
    assert not run(tmp_path / "base", *QUICK, "--prompt", PROMPT)
    assert np.array_equal(pictures(tmp_path / "both")[0], pictures(tmp_path / "base")[0])
    said = read_settings(next((tmp_path / "both").iterdir()))
    assert (said.refiner, said.handover) == ("pipeline", 0.5)


def test_of_a_batch_file_the_good_lines_are_drawn_and_the_others_listed(tmp_path):
    lines = ["a red circle", "", "a blue star"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    failed = run(tmp_path / "txt", *QUICK, "--batch-file", str(tmp_path / "prompts.txt"))
    assert failed == [f"{tmp_path}/prompts.txt:2 is empty; write a prompt there, or delete the line"]
    assert [read_settings(path).prompt for path in sorted((tmp_path / "txt").iterdir())] == [
        "a red circle",
        "a blue star",
    ]

    objects = [
        {"prompt": "a red circle", "seed": 5, "size": "64x64", "num_images": 2},
        {"prompt": "a blue star", "size": "64x65"},
        {"prompt": "a ring", "colour": "red"},
        {"class_id": 3},
        {"prompt": "a cross", "sampler": "unipc", "eta": None, "steps": 3},
        {"prompt": "a cross", "sampler": "magic"},
        {"prompt": "a cross", "steps": "many"},
    ]
    text = "\n".join([*map(json.dumps, objects), "no json"])
    (tmp_path / "prompts.jsonl").write_text(text)
    failed = run(tmp_path / "jsonl", *QUICK, "--batch-file", str(tmp_path / "prompts.jsonl"))
    for sentence in (
        "a blue star: width=65 must be a multiple of 32",
        "colour=red says nothing here; give prompt",
        "class 3: this model is conditioned on text: give a prompt",
        "sampler magic is unknown; choose one of euler, heun",
        "steps many is not a number",
        "prompts.jsonl:8 is no JSON object",
    ):
        assert [line for line in failed if sentence in line], (sentence, failed)
    assert len(failed) == 6
    drawn = [read_settings(path) for path in sorted((tmp_path / "jsonl").iterdir())]
    assert [(each.prompt, each.seed, each.sampler.steps) for each in drawn] == [
        ("a red circle", 5, 2), ("a red circle", 6, 2), ("a cross", 4, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--sampler", "magic"], "--sampler magic is unknown; choose one of euler, heun"),
        (["--prompt", "a", "--grid", "magic"], "--grid magic is unknown; choose one of uniform, trailing"),
        (["--prompt", "a", "--size", "big"], "--size big is not HEIGHTxWIDTH"),
        (["--prompt", "a", "--steps", "0"], "sampler.steps=0 must be at least 1"),
        (["--prompt", "a", "--interval", "0.8", "0.2"], r"sampler.interval=\[0.8, 0.2\] must rise within"),
        (["--prompt", "a", "--num-images", "0"], "--num-images and --batch-size count pictures"),
        (["--prompt", "a", "--strength", "0.5"], "--mask and --strength are about a picture to draw over"),
        (["--prompt", "a", "--init-image", "pyproject.toml"], "--init-image pyproject.toml is not a picture"),
        (["--prompt", "a", "--init-image", "no.png"], "--init-image no.png does not exist"),
        (["--prompt", "a", "--lora", "x.safetensors:much"], "--lora x.safetensors:much does not end in a weight"),
        (["--prompt", "a", "--lora", "no.safetensors:1"], "no.safetensors"),
        (["--batch-file", "no.txt"], "--batch-file no.txt cannot be read"),
        (["--prompt", "a", "--class-id", "1"], "give --prompt, --class-id, --batch-file or --settings, one of them"),
        ([], "give --prompt, --class-id, --batch-file or --settings, one of them"),
    ],
)
def test_errors_are_one_sentence(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_an_error_ends_the_command_with_its_sentence(tmp_path):
    command = [sys.executable, "scripts/sample.py", "--checkpoint", str(tmp_path), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path} holds no whole checkpoint")
    assert len(done.stderr.splitlines()) == 1
