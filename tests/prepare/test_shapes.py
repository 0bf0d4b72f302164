"""Preparing the embedded data set: what the shards hold, and what a second call does."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import shapes
from data.loader import Batches, DataConfig, open_shards
from data.reader import ShardReader
from prepare.shapes import prepare_shapes
from scripts import prepare

RESOLUTION, COUNT, SEED = 32, 21, 7


class Pooling:
    """A deterministic stand-in for an autoencoder: means of 8 x 8 pixels."""

    factor = 8

    def __init__(self, name="pooling"):
        self.name = name

    def encode(self, pixels):
        assert pixels.dtype == torch.float32
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        return torch.nn.functional.avg_pool2d(pixels, self.factor)

    def info(self):
        return {"id": self.name, "scale": 1.0, "shift": 0.0, "image_range": (-1, 1)}


class Letters(torch.nn.Module):
    """A deterministic stand-in for text encoders: the codes of the first letters."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def encode(self, captions):
        codes = torch.tensor([[ord(letter) for letter in caption.ljust(16)[:16]] for caption in captions])
        return self.weight * codes[..., None].float(), codes != 32, self.weight * codes.float()


def make(out, **options):
    options = {"resolution": RESOLUTION, "num_images": COUNT, "seed": SEED, "vae": Pooling(), "batch": 4} | options
    return prepare_shapes(out, **options)


def latents_of(reader, count):
    found = np.empty((count, *reader.buckets[0].shape), np.float16)
    assert not any(reader.read("latent", np.arange(count), list(found)))
    return found.astype(np.float32)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("two", [0, 0.25, 1])
def test_records_are_the_scenes_of_the_seed(tmp_path, two):
    assert make(tmp_path, two=two)
    reader = ShardReader(tmp_path, verify=True)
    assert len(reader) == COUNT
    latents = latents_of(reader, COUNT)
    for row in range(COUNT):
        scene = shapes.scene(SEED, row, two=two)
        record = reader.record(row)
        assert record["captions"] == shapes.captions(scene, SEED, row)
        assert record.get("class_id") == (scene.things[0].class_id if len(scene.things) == 1 else None)
        picture = shapes.render(scene, RESOLUTION) / 127.5 - 1
        assert latents[row] == pytest.approx(picture.reshape(4, 8, 4, 8, 3).mean((1, 3)).transpose(2, 0, 1), abs=1e-3)
    assert reader.num_classes == (shapes.NUM_CLASSES if two == 0 else None)
    assert reader.index["resolution"] == RESOLUTION
    assert reader.index["vae"]["id"] == "pooling"


def test_text_states_are_those_of_each_caption(tmp_path):
    make(tmp_path, text=Letters())
    config = DataConfig(path=str(tmp_path), resolution=RESOLUTION, text_states=True)
    batch = Batches(config, open_shards(config), 0, start=0, stop=16, batch_size=16, micro_batch=16)[0].to("cpu")
    text, mask, pooled = Letters().encode(batch.captions)
    longest = batch.text.shape[1]
    assert torch.equal(batch.text, text[:, :longest] * mask[:, :longest, None])
    assert torch.equal(batch.text_mask, mask[:, :longest])
    assert batch.text_mask[:, -1].any()
    assert not mask[:, longest:].any()
    assert torch.equal(batch.pooled, pooled)


def test_prepared_twice_is_the_same_to_the_byte(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name, text=Letters())
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_finished_set_is_left_alone(tmp_path):
    told = []
    assert make(tmp_path, progress=told.append)
    assert told == [4, 8, 12, 16, 20, 21]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert not make(tmp_path, progress=pytest.fail)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 22}, "images=21, not 22"),
        ({"seed": 8}, "seed=7, not 8"),
        ({"resolution": 64}, "resolution=32, not 64"),
        ({"two": 0}, "two=0.5, not 0"),
        ({"vae": Pooling("another")}, "vae=pooling, not another"),
        ({"text": Letters(2.0)}, "text_states=.*, not"),
    ],
)
def test_another_set_is_not_replaced_unasked(tmp_path, changes, message):
    make(tmp_path, text=Letters() if "text" in changes else None)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=f"already holds a data set with {message}.*--out.*--overwrite"):
        make(tmp_path, **changes)
    assert hashes(tmp_path) == before
    assert make(tmp_path, overwrite=True, **changes)
    assert not make(tmp_path, **changes)


def test_a_damaged_set_is_not_called_finished(tmp_path):
    make(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match="00000.tar has 5 bytes .* --overwrite"):
        make(tmp_path)
    assert make(tmp_path, overwrite=True)


def test_an_interrupted_set_is_begun_afresh(tmp_path):
    def interrupt(done):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert make(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 36}, "resolution=36 must be a multiple of 8"),
        ({"resolution": 16}, "resolution=16 .* at least 32"),
        ({"num_images": 0}, "images=0 must be at least 1"),
    ],
)
def test_wrong_sizes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "set", **changes)
    assert not (tmp_path / "set").exists()


# --- the command line ---------------------------------------------------------------------------------------


def test_help_is_quick_and_tells_the_defaults():
    """It must not import torch, which alone takes seconds."""
    program = """
import sys
from scripts.prepare import main
try:
    main(["shapes", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("datasets/shapes-RESOLUTION", "assets/shapes", "--overwrite", "--text-states", "20000"):
        assert word in done.stdout


@pytest.fixture
def fakes(monkeypatch):
    """The command line with the stand-ins instead of networks."""
    autoencoder, text = pytest.importorskip("models.autoencoder"), pytest.importorskip("models.text")

    class Movable(Pooling):
        def to(self, device):
            return self

    monkeypatch.setattr(autoencoder.AutoencoderConfig, "build", lambda self: Movable(self.path))
    monkeypatch.setattr(text.TextConfig, "build", lambda self: Letters())


def test_command_prepares_and_tells_what_to_do_next(fakes, tmp_path, capsys):
    out = str(tmp_path / "set")
    command = ["shapes", "--out", out, "--resolution", "32", "--images", "100", "--two", "0", "--text-states"]
    prepare.main(command)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{out} holds 100 pictures. Train on it with data.path={out}"
    assert said[0].startswith("64/100 images, ")  # plain lines where there is no terminal
    assert "s left" in said[0]
    config = DataConfig(path=out, resolution=32, text_states=True)
    assert [len(reader) for reader in open_shards(config, num_classes=shapes.NUM_CLASSES)] == [100]
    prepare.main(command)
    assert capsys.readouterr().out == f"{out} is already prepared, with the same settings. Nothing to do\n"


def test_command_ends_errors_with_one_sentence(fakes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare.main(["shapes", "--resolution", "32", "--images", "3"])
    assert len(ShardReader("datasets/shapes-32")) == 3
    with pytest.raises(SystemExit, match=r"prepare.py: datasets/shapes-32 already holds .* images=3, not 4"):
        prepare.main(["shapes", "--resolution", "32", "--images", "4"])
    prepare.main(["shapes", "--resolution", "32", "--images", "4", "--overwrite"])
    with pytest.raises(SystemExit, match="images=0 must be at least 1"):
        prepare.main(["shapes", "--images", "0"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("assets/shapes/vae").exists(), reason="needs the embedded autoencoder")
def test_script_with_the_real_autoencoder(tmp_path):
    """Run as a file, as users do: from its own folder, `prepare` must still be the package."""
    from models.autoencoder import AutoencoderConfig

    command = [sys.executable, "scripts/prepare.py", "shapes", "--resolution", "64", "--images", "8", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reader = ShardReader(tmp_path, verify=True)
    vae = AutoencoderConfig(path="assets/shapes").build()
    pictures = np.stack([shapes.render(shapes.scene(0, i), 64) for i in range(8)])
    latents = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    assert latents_of(reader, 8) == pytest.approx(latents, rel=1e-3, abs=1e-3)
    assert reader.index["vae"]["id"] == vae.info()["id"]
