import io
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import prepare.dedup as module
from data import shapes
from prepare.dedup import DedupConfig, alike, dedup, first_alike, near, phash
from prepare.parts import Tally, dropped
from prepare.sources import Source, SourceConfig, open_source

# --- pictures -------------------------------------------------------------------------------------------------


def texture(seed: int, side: int = 128, contrast: float = 30.0) -> Image.Image:
    """Noise whose amplitude falls as a power of the frequency, between 1 and 2, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * frequency ** -rng.uniform(1, 2))
    channels = noise[..., None] / noise.std() * contrast * rng.uniform(0.7, 1.3, 3) + rng.uniform(80, 180, 3)
    return Image.fromarray(np.clip(channels, 0, 255).astype(np.uint8))


def drawing(index: int, side: int = 128) -> Image.Image:
    return Image.fromarray(shapes.render(shapes.scene(3, index, two=0.5), side))


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 95, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=quality, **options)
    return file.getvalue()


def resaved(image: Image.Image, quality: int = 95) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, quality=quality))).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    edge = round(image.width * share)
    return image.crop((edge, edge, image.width - edge, image.height - edge))


def brightened(image: Image.Image) -> Image.Image:
    return image.point(lambda value: min(255, value * 1.1))


COPIES = {
    "q50": lambda image: resaved(image, 50),
    "half": lambda image: scaled(image, 0.5),
    "quarter_q70": lambda image: resaved(scaled(image, 0.25), 70),
    "brightened": lambda image: resaved(brightened(image)),
    "cropped_1": lambda image: resaved(cropped(image, 0.01)),
    "cropped_2": lambda image: resaved(cropped(image, 0.02)),
    "cropped_5": lambda image: resaved(cropped(image, 0.05)),
}


def bits(image: Image.Image) -> int:
    found = phash(image)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [texture, drawing])
def test_the_hash_is_imagehash_s(kind):
    pictures = [kind(i) for i in range(60)] + [kind(1).resize(size) for size in ((1, 7), (500, 20), (32, 32))]
    pictures += [Image.fromarray(np.hstack([half, half[:, ::-1]])) for half in map(np.asarray, pictures[:20])]  # ties
    pictures += [picture.convert("L") for picture in pictures[:5]]
    for picture in pictures:
        if (found := phash(picture)) is not None:
            assert f"{found:016x}" == str(imagehash.phash(picture))


def test_a_picture_without_contrast_has_no_hash():
    assert phash(Image.new("RGB", (64, 64), (10, 200, 30))) is None
    assert phash(resaved(texture(0, contrast=1.0))) is None
    noise = np.random.default_rng(0).normal(128, 5, (512, 512, 3)).clip(0, 255).astype(np.uint8)
    assert phash(Image.fromarray(noise)) is None  # which averages out at 32 x 32
    assert phash(texture(0, contrast=10.0)) is not None


def test_copies_are_found_and_others_are_not():
    """The figures behind the default distance, on fewer pictures than `DedupConfig` reports."""
    originals = [resaved(texture(i, 512)) for i in range(20)]
    hashes = [bits(image) for image in originals]

    def found(copy: str) -> float:
        distances = [
            (known ^ bits(COPIES[copy](image))).bit_count() for known, image in zip(hashes, originals, strict=True)
        ]
        assert not any(distance % 2 for distance in distances)  # as many ones in each
        return float(np.mean(np.array(distances) <= 4))

    assert [found(copy) for copy in ("q50", "half", "quarter_q70")] == [1, 1, 1]
    assert found("brightened") > 0.9
    assert found("cropped_1") > 0.8
    assert 0.4 < found("cropped_2") < 0.9
    assert found("cropped_5") < 0.2

    def closest(others: list[Image.Image]) -> np.ndarray:
        them = np.array([bits(image) for image in others], np.uint64)
        apart = np.bitwise_count(them[:, None] ^ them)
        np.fill_diagonal(apart, 64)
        return apart.min(0)

    assert closest([texture(1000 + i, 64) for i in range(1000)]).min() > 6
    # drawings of one or two shapes are too plain to be told apart: it is said in the docstring
    plain = [image for i in range(800) if phash(image := drawing(i, 64)) is not None]
    assert 0.2 < np.mean(closest(plain) <= 4) < 0.8


# --- all pairs of hashes --------------------------------------------------------------------------------------


def planted(n: int, seed: int, flips: int = 8) -> np.ndarray:
    """Random hashes, half of them with a neighbour up to `flips` bits away, and some that are equal."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    hashes[n // 2 :] = hashes[: n - n // 2]
    for i in range(n // 2, n):
        for bit in rng.choice(64, rng.integers(0, flips + 1), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    hashes[:20] = hashes[0]
    return rng.permutation(hashes)


def pairs_of(found: Iterator[tuple[np.ndarray, np.ndarray]]) -> set[tuple[int, int]]:
    return {pair for i, j in found for pair in zip(i.tolist(), j.tolist(), strict=True)}


@pytest.mark.parametrize("agreeing", [1, 2, 3])
@pytest.mark.parametrize("distance", range(8))
def test_near_finds_what_brute_force_finds(distance, agreeing, monkeypatch):
    monkeypatch.setattr(module, "_agreeing", lambda *_: agreeing)
    monkeypatch.setattr(module, "CHUNK", 500)
    hashes = planted(2000, distance)
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    every = np.arange(2000)
    found = pairs_of(near(hashes, distance, every, every))
    assert found == set(zip(*(x.tolist() for x in np.nonzero(np.triu(close, 1))), strict=True))
    assert len(found) > 250
    a, b = every[:1200:2], every[700:]
    i, j = np.nonzero(close[np.ix_(a, b)])
    assert pairs_of(near(hashes, distance, a, b)) == set(zip(a[i].tolist(), b[j].tolist(), strict=True))
    assert not pairs_of(near(hashes, distance, a, b[:0])) | pairs_of(near(hashes, distance, a[:0], b))


def greedy(sha: np.ndarray, flat: np.ndarray, known: int, close: np.ndarray) -> list[int]:
    """The definition, picture by picture."""
    n = len(sha)
    kept, of = list(range(known)), [n] * n
    for j in range(known, n):
        same = next((i for i in range(j) if sha[i] == sha[j]), None)
        if same is not None:  # it shares the fate of the first with these bytes
            of[j] = of[same] if of[same] < n else same
            continue
        of[j] = next((i for i in kept if close[i, j] and not flat[i] and not flat[j]), n)
        if of[j] == n:
            kept.append(j)
    return of


@pytest.mark.parametrize("limit", [3, 60, 10**6])
@pytest.mark.parametrize("distance", [0, 2, 5])
def test_who_is_kept_is_settled_in_order(distance, limit):
    n = 1200
    rng = np.random.default_rng(distance)
    hashes = rng.choice(planted(150, 1), n)  # clusters, whose members are near one another's neighbours
    for _ in range(3):
        hashes ^= rng.integers(0, 2, n).astype(np.uint64) << rng.integers(0, 64, n).astype(np.uint64)
    sha = np.array([f"{i:032d}" for i in rng.integers(0, 1100, n)], "S32")
    hashes = hashes[np.unique(sha, return_inverse=True)[1]]  # the same bytes have the same hash
    flat = (hashes % np.uint64(10)) == 0
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    for known in (0, 100):
        of = first_alike(sha, flat, known, partial(near, hashes, distance), limit)
        assert of.tolist() == greedy(sha, flat, known, close)
        assert 200 < (of < n).sum() < n - known


def test_thousands_of_equal_hashes_are_not_compared_in_pairs():
    hashes = planted(40_000, 3)
    hashes[5_000:25_000] = 7  # 200 million pairs
    seen = 0

    def counted(a, b):
        nonlocal seen
        for i, j in near(hashes, 4, a, b):
            seen += len(i)
            yield i, j

    sha = np.frombuffer(np.random.default_rng(0).bytes(32 * len(hashes)), "S32")
    of = first_alike(sha, np.zeros(len(hashes), bool), 0, counted, limit=50_000)
    assert of[5_000] == len(hashes)
    assert (of[5_001:25_000] == 5_000).all()
    assert seen < 20_000_000


def test_every_neighbour_planted_among_many_is_found():
    n, plants = 300_000, 15_000
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    rows = rng.permutation(n)[: 2 * plants]
    hashes[rows[plants:]] = hashes[rows[:plants]]
    for _ in range(4):
        hashes[rows[plants:]] ^= np.uint64(1) << rng.integers(0, 64, plants).astype(np.uint64)
    sha = np.frombuffer(rng.bytes(32 * n), "S32")
    of = first_alike(sha, np.zeros(n, bool), 0, partial(near, hashes, 4))
    assert ((of[rows[:plants]] < n) | (of[rows[plants:]] < n)).all()
    assert (of < n).sum() == plants


def test_alike_finds_what_brute_force_finds():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float16)
    close = vectors.astype(np.float64) @ vectors.astype(np.float64).T > 0.75
    every = np.arange(3000)
    expected = set(zip(*(x.tolist() for x in np.nonzero(np.triu(close, 1))), strict=True))
    assert pairs_of(alike(vectors, 0.75, "cpu", every, every)) == expected
    assert len(expected) > 300
    a, b = every[:2000], every[2000:]
    assert pairs_of(alike(vectors, 0.75, "cpu", a, b)) == {(i, j) for i, j in expected if i < 2000 <= j}


# --- the step -------------------------------------------------------------------------------------------------

SAME = texture(0, 200)
FILM = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
PARTS: list[dict[str, bytes]] = [
    {
        "00000a": encoded(scaled(SAME, 0.5), quality=60),  # of the last part's
        "00000b": encoded(texture(1)),
        "00000c": encoded(texture(1)),
        "00000d": b"<html>not found</html>",
        "00000e": encoded(Image.new("RGB", (99, 99), "white"), "PNG"),
    },
    {
        "00001a": encoded(FILM[0], "PNG", save_all=True, append_images=FILM[1:]),
        "00001b": encoded(texture(1)),
        "00001c": encoded(Image.new("RGB", (99, 99), "black"), "PNG"),
        "00001d": encoded(Image.new("RGB", (99, 99), "white"), "PNG"),
        "00001e": encoded(texture(2)),
        "00001f": b"",
    },
    {
        "00002a": encoded(SAME),
        "00002b": encoded(texture(2), quality=50),
        "00002c": encoded(resaved(texture(1)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "00002d": encoded(texture(3))[:900],
    },
]
FOUND = {  # reasons, and how the details begin
    "00000a": ("near_duplicate", "of 00002/00002a, distance "),
    "00000c": ("duplicate", "of 00000/00000b, the same bytes"),
    "00000d": ("not_an_image", ""),
    "00001a": ("animated", "2 frames"),
    "00001b": ("duplicate", "of 00000/00000b, the same bytes"),
    "00001d": ("duplicate", "of 00000/00000e, the same bytes"),
    "00001f": ("no_image", ""),
    "00002b": ("near_duplicate", "of 00001/00001e, distance "),
    "00002d": ("broken", ""),
}


def source(folder: Path, parts: list[dict[str, bytes]] = PARTS) -> Source:
    folder.mkdir(exist_ok=True)
    for i, pictures in enumerate(parts):
        with tarfile.open(folder / f"{i:05d}.tar", "w") as tar:
            for key, content in pictures.items():
                member = tarfile.TarInfo(f"{key}.jpg" if content else f"{key}.txt")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return open_source(SourceConfig(paths=[str(folder / "*.tar")]))


def left_out(folder: Path) -> dict[str, tuple[str, str]]:
    rows = [row for path in sorted(folder.glob("*.dropped.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["key"]: (row["reason"], row["detail"]) for row in rows}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def agree(found: dict[str, tuple[str, str]], expected: dict[str, tuple[str, str]]) -> bool:
    """Whether the reasons are the same, and the details begin as expected."""
    return found.keys() == expected.keys() and all(
        found[key][0] == reason and found[key][1].startswith(detail) for key, (reason, detail) in expected.items()
    )


@pytest.fixture
def tars(tmp_path: Path) -> Source:
    return source(tmp_path / "tars")


def test_every_picture_has_its_account(tmp_path, tars):
    ticks = []
    tally = dedup(DedupConfig(), tars, tmp_path / "dedup", tick=ticks.append)
    assert agree(left_out(tmp_path / "dedup"), FOUND), left_out(tmp_path / "dedup")
    assert (tally.given, tally.kept, tally.faults, sum(ticks)) == (15, 6, 4, 15)
    assert tally.dropped == {
        "duplicate": 3, "near_duplicate": 2, "not_an_image": 1, "animated": 1, "no_image": 1, "broken": 1,
    }  # fmt: skip
    assert dropped(tmp_path / "dedup", "00000").keys() == {"00000a", "00000c", "00000d"}
    ticks.clear()
    assert dedup(DedupConfig(), tars, tmp_path / "dedup", tick=ticks.append) == tally
    assert sum(ticks) == 15


def test_distance_null_looks_at_bytes_alone(tmp_path, tars):
    dedup(DedupConfig(distance=None), tars, tmp_path / "dedup")
    assert agree(
        left_out(tmp_path / "dedup"), {key: fate for key, fate in FOUND.items() if fate[0] != "near_duplicate"}
    )


def test_of_copies_the_largest_then_the_first_is_kept(tmp_path):
    big, small = encoded(SAME), encoded(scaled(SAME, 0.5))
    parts = [{"b": small, "a": encoded(SAME, quality=80)}, {"c": big, "d": encoded(SAME, quality=85)}]
    dedup(DedupConfig(), source(tmp_path / "tars", parts), tmp_path / "dedup")
    found = left_out(tmp_path / "dedup")
    assert found.keys() == {"b", "c", "d"}
    assert {detail.split(",")[0] for _, detail in found.values()} == {"of 00000/a"}


def test_a_chain_of_likenesses_does_not_go_through_those_dropped(tmp_path, monkeypatch):
    # 2 is like 1, and 3 like 2 but not like 1: 3 stays
    hashes = iter([0b0, 0b1111, 0b11111111])
    monkeypatch.setattr(module, "phash", lambda image: next(hashes))
    parts = [{f"{i}": encoded(texture(i, 100 - i)) for i in (1, 2, 3)}]
    dedup(DedupConfig(), source(tmp_path / "tars", parts), tmp_path / "dedup")
    assert left_out(tmp_path / "dedup") == {"2": ("near_duplicate", "of 00000/1, distance 4")}


class Backwards:
    """A source whose parts come, and are told, in another order."""

    def __init__(self, of: Source):
        self.names, self.digest, self.read = of.names[::-1], of.digest, of.read


def test_the_result_does_not_depend_on_processes_or_the_order_of_parts(tmp_path, tars):
    tally = dedup(DedupConfig(), tars, tmp_path / "one" / "dedup")
    dedup(DedupConfig(), tars, tmp_path / "two" / "dedup", processes=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    backwards = dedup(DedupConfig(), Backwards(tars), tmp_path / "three" / "dedup")  # type: ignore[arg-type]
    assert backwards == tally
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name] and "step.json" not in name] == []


RUN = """
import os, signal, sys
from pathlib import Path
import prepare.parts
from prepare.dedup import DedupConfig, dedup
from prepare.sources import SourceConfig, open_source

left = int(sys.argv[3])

def replace(one, other):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(one, other)

rename, prepare.parts.os.replace = os.replace, replace
dedup(DedupConfig(), open_source(SourceConfig(paths=[sys.argv[1] + "/*.tar"])), Path(sys.argv[2]))
"""


def test_killed_anywhere_it_ends_in_the_same_bytes(tmp_path, tars):
    dedup(DedupConfig(), tars, tmp_path / "whole" / "dedup")
    root = Path(__file__).parents[2]
    for kill_at in (4, 12, 5):  # within the first pass, at the start of the second, within it
        command = [sys.executable, "-c", RUN, str(tmp_path / "tars"), str(tmp_path / "again" / "dedup"), str(kill_at)]
        code = subprocess.run(command, cwd=root, check=False).returncode
        assert code == -signal.SIGKILL
        assert contents(tmp_path / "again") != contents(tmp_path / "whole")
    dedup(DedupConfig(), tars, tmp_path / "again" / "dedup")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_pictures_of_another_set_do_not_occur(tmp_path, tars):
    others = [
        {"x": encoded(texture(2), quality=85), "y": encoded(texture(1)), "z": encoded(scaled(texture(1), 0.5))},
        {"v": encoded(texture(9)), "w": encoded(Image.new("RGB", (99, 99), "black"), "PNG")},
    ]
    held_out = tmp_path / "held_out" / "dedup"
    dedup(DedupConfig(), source(tmp_path / "others", others), held_out)
    assert left_out(held_out).keys() == {"z"}
    dedup(DedupConfig(against=[str(held_out)]), tars, tmp_path / "dedup")
    expected = FOUND | {
        **dict.fromkeys(("00000b", "00000c", "00001b"), ("in_other_set", "of held_out/00000/y, the same bytes")),
        **dict.fromkeys(("00001e", "00002b"), ("in_other_set", "of held_out/00000/x, distance ")),
        "00001c": ("in_other_set", "of held_out/00001/w, the same bytes"),
    }
    assert agree(left_out(tmp_path / "dedup"), expected)


# --- vectors of a model ---------------------------------------------------------------------------------------


class Mirrored(torch.nn.Module):
    """Sixteen means over a picture and its mirror image, which are the same for both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(x + x.flip(3), 8)
        return (x - x.mean((2, 3), keepdim=True)).flatten(1)


class Many(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "mirrored.pt"
    torch.jit.script(Mirrored()).save(path)
    return str(path)


def test_a_model_finds_copies_that_hashes_do_not(tmp_path, tars, model):
    config = DedupConfig(model=model, similarity=0.95)
    tally = dedup(config, tars, tmp_path / "one" / "dedup")
    found = left_out(tmp_path / "one" / "dedup")
    reason, detail = found.pop("00002c")
    assert (reason, detail[:27]) == ("copy", "of 00000/00000b, similarity")
    assert float(detail[27:]) > 0.99
    assert agree(found, FOUND)
    assert (tally.given, tally.kept) == (15, 5)
    vectors = np.load(tmp_path / "one" / "dedup" / "hashes" / "00002.npy")
    assert (vectors.dtype, vectors.shape) == (np.float16, (3, 192))
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert dedup(config, tars, tmp_path / "two" / "dedup") == tally
    torch.set_num_threads(threads)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    # a set with a model is compared with another by vectors, too
    dedup(replace(config, against=[str(tmp_path / "one" / "dedup")]), source(tmp_path / "others", [
        {"a": encoded(texture(3)), "m": encoded(SAME.transpose(Image.Transpose.FLIP_LEFT_RIGHT))}
    ]), tmp_path / "three")  # fmt: skip
    assert agree(left_out(tmp_path / "three"), {"m": ("in_other_set", "of one/00002/00002a, similarity ")})


def test_the_model_sees_what_sscd_sees(monkeypatch):
    """A short side of 288 px, ImageNet's mean and deviation; a strip is not longer than four times that."""
    seen = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.ones(1, 4)

    monkeypatch.setattr(module, "_model", lambda *_: spy)
    for size in ((100, 200), (577, 288), (1000, 10)):
        vector = module._embed(Image.new("RGB", size, (255, 0, 51)), "a.pt", "cpu")
        np.testing.assert_array_equal(vector, np.float16([0.5] * 4))
    assert [tuple(x.shape) for x in seen] == [(1, 3, 576, 288), (1, 3, 288, 577), (1, 3, 288, 1152)]
    colour = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor(colour))


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"distance": 11}, "dedup.distance=11 is outside 0 to 10 bits.*choose 4, or null"),
        ({"distance": -1}, "dedup.distance=-1 is outside 0 to 10 bits"),
        ({"similarity": 1.0}, "dedup.similarity=1.0 is not between 0 and 1"),
        ({"max_pixels": 0}, "dedup.max_pixels=0 is not a number of pixels"),
        ({"max_faults": 2}, "dedup.max_faults=2 is no share"),
        ({"model": "no.pt"}, "dedup.model=no.pt is not a file"),
    ],
)
def test_configs_are_checked(asked, message):
    with pytest.raises(ValueError, match=message):
        DedupConfig(**asked)


def test_a_source_that_is_mostly_broken_is_refused(tmp_path, tars):
    with pytest.raises(ValueError, match="dedup: 4 of 15 rows failed.*dedup.max_faults=0.2"):
        dedup(DedupConfig(max_faults=0.2), tars, tmp_path / "dedup")


def test_another_distance_needs_another_folder(tmp_path, tars):
    dedup(DedupConfig(), tars, tmp_path / "dedup")
    with pytest.raises(ValueError, match="was made with dedup.distance=4, not 2"):
        dedup(DedupConfig(distance=2), tars, tmp_path / "dedup")


def test_against_must_be_finished_and_have_the_same_model(tmp_path, tars, model):
    with pytest.raises(ValueError, match="dedup.against=.*nowhere is not the folder of a finished dedup step"):
        dedup(DedupConfig(against=[str(tmp_path / "nowhere")]), tars, tmp_path / "dedup")
    dedup(DedupConfig(), tars, tmp_path / "plain")
    with pytest.raises(ValueError, match="dedup.against=.*plain has no vectors of dedup.model; run it with the same"):
        dedup(DedupConfig(against=[str(tmp_path / "plain")], model=model), tars, tmp_path / "dedup")


def test_a_model_must_load_and_give_vectors(tmp_path, tars):
    path = tmp_path / "model.pt"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="dedup.model=.*model.pt does not load as TorchScript on dedup.device=cpu"):
        dedup(DedupConfig(model=str(path)), tars, tmp_path / "dedup")
    path = tmp_path / "many.pt"
    torch.jit.script(Many()).save(path)
    with pytest.raises(ValueError, match=r"dedup.model=.*many.pt does not map a picture .* to one vector \(1, n\)"):
        dedup(DedupConfig(model=str(path)), tars, tmp_path / "dedup2")


def test_a_part_without_any_picture(tmp_path, model):
    tars = source(tmp_path / "tars", [{"a": b"", "b": b"nothing"}, {"c": encoded(SAME)}])
    tally = dedup(DedupConfig(model=model, max_faults=1.0), tars, tmp_path / "dedup")
    assert tally == Tally(
        given=3, kept=1, dropped={"no_image": 1, "not_an_image": 1}, failed={"no_image": 1, "not_an_image": 1}
    )  # type: ignore[arg-type]
