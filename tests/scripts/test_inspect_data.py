"""The page about a data set: what it says is what is there, it says what is wrong, and it needs nothing else."""

import base64
import io
import json
import re
import subprocess
import sys
import tarfile
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import shapes
from data.shards import ShardWriter
from data.texts import TextLayout
from models.autoencoder import AutoencoderConfig
from prepare.parts import Part, run_step
from scripts import inspect_data
from scripts.inspect_data import Options, Spread, even, lengths, octaves

ROOT = Path(__file__).parents[2]
TEXT = TextLayout(dtype="int8", width=64, length=5, masked=True, encoder="fake", pooled=6)
MASK = np.array([True, True, True, False, False])
NAUGHTY = "</script><b>\"two\"</b> & 'three' https://example.org/a.js"


def inspect(out: Path, *arguments: str | Path) -> tuple[list[dict], str]:
    """The numbers in the page, by set, and the page."""
    inspect_data.main([*map(str, arguments), "--out", str(out)])
    text = out.read_text()
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1]), text


def elements_of(text: str) -> list[tuple[str, dict]]:
    """All elements of a page, with their attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))
    parser.feed(text)
    return found


def jpeg(height: int, width: int, colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 255 - colour, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six squares, three twice as wide as high, a copy, a cut file and one that is no picture; four are captioned."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"square{i}.jpg").write_bytes(jpeg(256, 256, 20 * i))
    for i in range(3):
        (folder / f"wide{i}.jpg").write_bytes(jpeg(200, 400, 20 * i))
    (folder / "wide_again.jpg").write_bytes(jpeg(200, 400, 20))
    (folder / "cut.jpg").write_bytes(jpeg(256, 256, 7)[:-400])
    (folder / "words.png").write_bytes(b"these are words")
    for name, caption in {"square0": "a b c", "square1": "a b c", "wide0": "a", "wide1": NAUGHTY}.items():
        (folder / f"{name}.txt").write_text(caption)
    return folder


def write_shards(folder: Path, vae: dict) -> Path:
    """Twelve squares and eight of twice the width in two shards; latent 11 is that of record 3."""
    with ShardWriter(folder, resolution=64, vae=vae, text=TEXT, shard_size=12) as writer:
        for row in range(20):
            captions = {"long": f"picture {row} of twenty"} | ({"short": "the same"} if row % 4 == 0 else {})
            record = {"captions": captions, "original_size": [512, 512] if row < 12 else [300, 1200], "crop": [0, 0]}
            writer.add(record, size=(64, 64 if row < 12 else 128), latent=latent_of(row))
            for caption in captions.values():
                writer.add_text(caption, np.random.default_rng(row).standard_normal((3, 64)), np.zeros(6), MASK)
    return folder


def latent_of(row: int) -> np.ndarray:
    shape = (8, 8, 8 if row < 12 else 16)
    return np.random.default_rng(3 if row == 11 else row).standard_normal(shape)


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


@pytest.fixture(scope="module")
def vae():
    return AutoencoderConfig(path="assets/shapes").build()


@pytest.fixture
def shards(tmp_path: Path, vae) -> Path:
    return write_shards(tmp_path / "mine", vae.info())


def test_pictures_are_counted_and_what_is_wrong_is_named(tmp_path: Path, pictures: Path):
    (seen,), text = inspect(tmp_path / "x.html", pictures)
    assert seen["count"] == seen["read"] == 12
    assert {(b["height"], b["width"]): b["count"] for b in seen["buckets"]} == {(1024, 1024): 6, (704, 1408): 4}
    assert {why: problem["count"] for why, problem in seen["problems"].items()} == {"broken": 1, "not_an_image": 1}
    assert seen["problems"]["broken"]["names"][0].startswith("cut")
    assert seen["problems"]["not_an_image"]["names"][0].startswith("words")
    assert seen["repeats"] == {"count": 1, "compared": True, "names": ["wide_again repeats wide1"]}
    captions = seen["captions"]
    assert captions["names"]["alt"]["records"] == 4
    assert captions["uncaptioned"] == 8
    assert (captions["distinct"], captions["repeated"], captions["frequent"]) == (3, 1, [["a b c", 2]])
    assert captions["words"][0] == ["a", 4]
    assert captions["names"]["alt"]["words"]["longest"] == 10
    assert seen["original_sizes"]["count"] == 10
    assert seen["original_sizes"]["aspect"] == {"first": 0, "counts": [6, 0, 0, 0, 4]}
    assert text.count("<img") == 10
    assert "wide_again repeats wide1" in text


def test_the_page_fetches_nothing(tmp_path: Path, pictures: Path, shards: Path):
    """Whatever captions say: no element names an address but data URLs and places on the page."""
    _, text = inspect(tmp_path / "x.html", pictures, shards)
    elements = elements_of(text)
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    for _, attributes in elements:
        assert attributes.keys().isdisjoint(
            {"srcset", "data", "action", "poster", "background", "xlink:href", "onload"}
        )
        assert attributes.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,")
        assert attributes.get("href", "#set-0").removeprefix("#") in ids
        assert "url" not in attributes.get("style", "")
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 1
    assert {"link", "iframe", "object", "base", "form"}.isdisjoint(tags)
    assert not re.search(r"url\(|@import", text)


def test_the_bytes_follow_from_the_data(tmp_path: Path, pictures: Path, shards: Path):
    for name in ("a.html", "b.html"):
        inspect(tmp_path / name, shards, pictures, "--samples", "3")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_shards_are_counted_and_decoded(tmp_path: Path, shards: Path):
    (seen,), text = inspect(tmp_path / "x.html", shards, "--samples", "5")
    assert (seen["count"], seen["shards"], seen["problems"]) == (20, 2, {})
    assert {(b["height"], b["width"]): b["count"] for b in seen["buckets"]} == {(64, 64): 12, (64, 128): 8}
    assert seen["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    names = seen["captions"]["names"]
    assert {name: found["records"] for name, found in names.items()} == {"long": 20, "short": 5}
    assert (seen["captions"]["distinct"], seen["captions"]["frequent"]) == (21, [["the same", 5]])
    assert seen["repeats"]["count"] == 1
    assert "record 11 repeats" in seen["repeats"]["names"][0]
    assert seen["original_sizes"]["aspect"] == {"first": 0, "counts": [12, *[0] * 7, 8]}  # squares and 4:1
    text_states = seen["text_states"]
    assert (text_states["captions"], text_states["mean_tokens"], text_states["most_tokens"]) == (21, 3, 3)
    assert text_states["bytes"] == sum(path.stat().st_size for path in shards.glob("*.text.tar"))
    assert "decoded by assets/shapes" in text
    assert text.count("<img") == 10


def test_a_decoded_picture_is_the_autoencoders(tmp_path: Path, vae):
    """Encoded shapes come back as themselves, not as channels: the picture on the page is near the one encoded."""
    picture = shapes.render(shapes.scene(1, 2, two=0), 64)
    latent = vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)[0].numpy()
    with ShardWriter(tmp_path / "one", resolution=64, vae=vae.info()) as writer:
        writer.add({"captions": {}}, latent=latent)
    seen = inspect_data.look_at_shards(tmp_path / "one", Options())
    (card,) = seen.sheets[0].cards
    shown = opened(card.url)
    assert shown.size == (64, 64)
    assert np.abs(np.asarray(shown, float) - picture).mean() < 12


def test_latent_statistics_are_numpys(tmp_path: Path, shards: Path):
    (seen,), _ = inspect(tmp_path / "x.html", shards)
    latents = [latent_of(row).astype(np.float16).astype(float) for row in range(20)]
    moments = np.array([[x.mean((1, 2)), (x**2).mean((1, 2))] for x in latents]).mean(0)
    np.testing.assert_allclose(seen["latents"]["mean"], moments[0], atol=1e-12)
    np.testing.assert_allclose(seen["latents"]["std"], np.sqrt(moments[1] - moments[0] ** 2), atol=1e-12)
    np.testing.assert_allclose(seen["latents"]["lowest"], np.min([x.min((1, 2)) for x in latents], axis=0))
    np.testing.assert_allclose(seen["latents"]["highest"], np.max([x.max((1, 2)) for x in latents], axis=0))
    assert seen["latents"]["read"] == 20


def test_without_its_autoencoder_channels_are_shown(tmp_path: Path):
    folder = write_shards(tmp_path / "other", {"path": "assets/shapes", "id": "another"})
    seen = inspect_data.look_at_shards(folder, Options())
    assert "is not the one that made these latents (another)" in seen.notes[-1]
    assert "first three channels" in seen.notes[-1]
    latent = latent_of(0)
    mean, std = (np.array(seen.numbers["latents"][key]) for key in ("mean", "std"))
    expected = (127.5 + 127.5 * (latent[:3].transpose(1, 2, 0) - mean[:3]) / (3 * std[:3])).clip(0, 255)
    shown = opened(seen.sheets[0].cards[0].url)
    assert np.abs(np.asarray(shown, float) - expected).max() < 1.5
    folder = write_shards(tmp_path / "nobody", {"id": "another"})
    assert "names no autoencoder" in inspect_data.look_at_shards(folder, Options()).notes[-1]
    lost = inspect_data.look_at_shards(folder, Options(vae=str(tmp_path)))
    assert f"vae.path={tmp_path} has nothing readable" in lost.notes[-1]


def test_a_trained_model_lends_its_autoencoder(shards: Path):
    seen = inspect_data.look_at_shards(shards, Options(vae="assets/shapes/pipeline", samples=2))
    assert "decoded by assets/shapes" in seen.notes[-1]
    assert not any(card.coarse for sheet in seen.sheets for card in sheet.cards)


def damage(folder: Path, suffix: str, content: bytes) -> None:
    """Flip a bit of the first shard, in the middle of some content that stands there once."""
    path = folder / f"00000{suffix}"
    whole = bytearray(path.read_bytes())
    assert whole.count(content) == 1
    whole[whole.index(content) + len(content) // 2] ^= 1
    path.write_bytes(whole)


def test_damage_is_named_and_the_rest_is_shown(tmp_path: Path, shards: Path):
    damage(shards, ".tar", b"picture 5 of twenty")
    damage(shards, ".tar", latent_of(7).astype("<f2").tobytes())
    (seen,), text = inspect(tmp_path / "x.html", shards)
    place = f"{shards}/00000.tar, record"
    assert seen["problems"] == {
        "damaged_record": {"count": 1, "names": [f"{place} 5: its JSON differs from its checksum"]},
        "damaged_latent": {"count": 1, "names": [f"{place} 7: its latent differs from its checksum"]},
    }
    assert seen["captions"]["records"] == 19
    assert text.count("<img") == 19
    assert f"{place} 7: its latent differs from its checksum" in text


def test_verify_finds_what_sampling_passes_over(tmp_path: Path, shards: Path):
    damage(shards, ".tar", latent_of(7).astype("<f2").tobytes())
    content, begin, *_ = TEXT.pack(np.random.default_rng(5).standard_normal((3, 64)), np.zeros(6), MASK)
    damage(shards, ".text.tar", content[begin:])
    (seen,), _ = inspect(tmp_path / "x.html", shards, "--samples", "2")
    assert seen["problems"] == {}
    (seen,), _ = inspect(tmp_path / "x.html", shards, "--samples", "2", "--verify")
    assert {reason: problem["count"] for reason, problem in seen["problems"].items()} == {
        "damaged_file": 2,
        "damaged_latent": 1,
        "damaged_text_states": 1,
    }
    assert "record 7" in seen["problems"]["damaged_latent"]["names"][0]
    assert "'picture 5 of twenty'" in seen["problems"]["damaged_text_states"]["names"][0]


def make(rows: dict[str, str], part: Part) -> None:
    """Keep, note or drop rows by what is said of each; a tar of a picture for each that is kept."""
    with tarfile.open(part.path(".tar"), "w") as tar:
        for key, fate in rows.items():
            if fate.startswith("no_"):
                part.drop(key, fate, "so it was", fault=fate == "no_answer")
                continue
            content = jpeg(64, 64, int(key))
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            part.note(key, fate) if fate else part.keep()


def test_the_funnel_of_a_preparation(tmp_path: Path, vae):
    folder = tmp_path / "mine"
    first = {"0": "", "1": "no_answer", "2": "no_wish", "3": "no_wish", "4": "odd"}
    second = {"0": "", "4": "no_reason"}
    run_step(folder / "dedup", ["00000"], partial(make, second), recipe={})
    run_step(folder / "images", ["00000"], partial(make, first), recipe={})
    with pytest.raises(ZeroDivisionError):  # the step captions was interrupted
        run_step(folder / "captions", ["00000", "00001"], partial(interrupted, second), recipe={})
    write_shards(folder / "256", vae.info())
    (folder / "256" / "step.json").write_text(json.dumps({"recipe": {}}))
    (folder / "report.json").write_text(json.dumps({"seconds": "<12>"}))
    sets, text = inspect(tmp_path / "x.html", folder)
    assert [seen["title"] for seen in sets] == ["mine", "mine/images", "mine/256"]
    assert [seen["kind"] for seen in sets] == ["preparation", "pictures", "latents"]
    steps = {step["name"]: step for step in sets[0]["steps"]}
    assert list(steps) == ["images", "dedup", "captions", "256"]
    images = steps["images"]
    assert (images["given"], images["kept"], images["faults"], images["done"]) == (5, 2, 2, True)
    assert images["dropped"] == {"no_wish": 2, "no_answer": 1}
    assert images["noted"] == {"odd": 1}
    assert images["examples"] == {
        "no_answer": ["1: so it was"],
        "no_wish": ["2: so it was", "3: so it was"],
        "odd": ["4"],
    }
    assert (steps["captions"]["done"], steps["captions"]["parts"], steps["captions"]["given"]) == (False, 1, 2)
    assert sets[1]["count"] == 2
    assert "2 of 5" in text
    assert "no wish" in text
    assert "not finished: 1 parts so far" in text
    assert '<a href="#set-1">images</a>' in text
    assert '<a href="#set-2">256</a>' in text
    assert "&lt;12&gt;" in text


def interrupted(rows: dict[str, str], part: Part) -> None:
    make(rows, part)
    if part.name == "00001":
        raise ZeroDivisionError


def test_a_broken_set_does_not_hide_the_preparation(tmp_path: Path):
    folder = tmp_path / "mine"
    run_step(folder / "images", ["00000"], partial(make, {"0": ""}), recipe={})
    (folder / "512").mkdir()
    (folder / "512" / "step.json").write_text(json.dumps({"recipe": {}}))
    (folder / "512" / "index.json").write_text("{")
    sets, _ = inspect(tmp_path / "x.html", folder)
    assert [seen["title"] for seen in sets] == ["mine", "mine/images"]
    assert "index.json is damaged" in sets[0]["problems"]["512_unreadable"]["names"][0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/nowhere"], "inspect_data.py: source.paths={tmp}/nowhere matches no file"),
        (["{tmp}"], "inspect_data.py: source.paths={tmp} matches no file"),
        (["{tmp}", "--samples", "0"], "inspect_data.py: --samples=0 must be at least 1; 24 is usual"),
        (["{tmp}", "--out", "{tmp}/no/x.html"], "inspect_data.py: --out={tmp}/no/x.html is in a folder that does not"),
    ],
)
def test_refusals_are_one_sentence(tmp_path: Path, arguments: list[str], sentence: str):
    with pytest.raises(SystemExit) as refusal:
        inspect_data.main([argument.format(tmp=tmp_path) for argument in arguments])
    assert str(refusal.value).startswith(sentence.format(tmp=tmp_path))
    assert "\n" not in str(refusal.value)


def test_an_unfinished_set_of_shards_is_refused(tmp_path: Path, shards: Path):
    (shards / "index.json").unlink()
    with pytest.raises(SystemExit, match="was not finished: it has no index.json"):
        inspect_data.main([str(shards), "--out", str(tmp_path / "x.html")])


def test_the_script_runs_from_anywhere_and_help_is_quick(tmp_path: Path, pictures: Path):
    script = ROOT / "scripts" / "inspect_data.py"
    done = subprocess.run([sys.executable, script, pictures], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "wrote inspect.html" in done.stdout
    assert (tmp_path / "inspect.html").stat().st_size > 10_000
    told = (
        f"import sys; sys.argv = ['', '--help']; sys.path.insert(0, {str(ROOT)!r})\nfrom scripts import inspect_data\n"
    )
    told += (
        "try: inspect_data.main()\nfinally: print(sorted({'torch', 'diffusers', 'pyarrow', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_samples_are_spread_evenly():
    assert even(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert even(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert even(7, 1).tolist() == [0]
    assert even(0, 3).tolist() == []
    for count in (1, 7, 24, 100, 1_000):
        spread = Spread(8)
        for item in range(count):
            if spread.wants():
                spread.add(item)
        assert min(8, count) <= len(spread.items) <= 16
        assert spread.items == list(range(0, count, spread.step))


def test_histograms():
    assert octaves([512, 512, 1024, 1e9], 4, 14)["counts"] == [2, 0, 0, 0, 1, *[0] * 15, 1]
    assert octaves([512], 4, 14)["first"] == 36
    found = lengths(np.array([0, 1, 1, 3]))
    assert (found["width"], found["counts"], found["longest"]) == (1, [1, 2, 0, 1], 3)
    long = lengths(np.arange(1_000).repeat(2))
    assert sum(long["counts"]) == 2_000
    assert len(long["counts"]) <= 31


def test_parts_of_a_large_source_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspect_data, "CAPTIONS", 6)
    monkeypatch.setattr(inspect_data, "DECODED", 2)
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(5):
                content = jpeg(64, 64, 10 * i)
                member = tarfile.TarInfo(f"{name}{i}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (seen,), text = inspect(tmp_path / "x.html", tmp_path / "a.tar", tmp_path / "b.tar")
    assert (seen["count"], seen["read"], seen["repeats"]["count"]) == (None, 6, 3)
    assert "more than 6" in text
    assert "the first of 2 of the 2 parts" in text
    (seen,), _ = inspect(tmp_path / "x.html", tmp_path / "a.tar", tmp_path / "b.tar", "--verify")
    assert (seen["count"], seen["read"], seen["decoded"], seen["repeats"]["count"]) == (10, 10, 10, 5)


def test_verify_compares_the_files_of_steps(tmp_path: Path):
    folder = tmp_path / "mine"
    run_step(folder / "images", ["00000", "00001"], partial(make, {"0": "", "1": ""}), recipe={})
    damage(folder / "images", ".tar", b"1.jpg")
    assert inspect(tmp_path / "x.html", folder)[0][0]["problems"] == {}
    sets, _ = inspect(tmp_path / "x.html", folder, "--verify")
    tar = folder / "images" / "00000.tar"
    names = [f"{tar}: its SHA-256 is not that of 00000.json"]
    assert sets[0]["problems"] == {"damaged_file": {"count": 1, "names": names}}


def test_empty_captions_are_a_share(tmp_path: Path):
    with ShardWriter(tmp_path / "mine", resolution=64, vae={"id": "none"}) as writer:
        for row in range(8):
            writer.add({"captions": {"alt": " " if row < 2 else f"picture {row}"}}, latent=latent_of(row))
    (seen,), text = inspect(tmp_path / "x.html", tmp_path / "mine")
    alt = seen["captions"]["names"]["alt"]
    assert (alt["records"], alt["read"], alt["empty"], seen["captions"]["uncaptioned"]) == (8, 8, 2, 2)
    assert "25.0\N{NARROW NO-BREAK SPACE}%" in text
