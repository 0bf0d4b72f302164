"""What pictures say of themselves comes back, whoever wrote it; what users give is opened, or refused in a sentence."""

import io
import json
import random
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffusion.sample import ETA, Sampler
from diffusion.timesteps import Grid
from inference.description import SamplerConfig
from inference.picture import (
    GRIDS,
    MAX_PIXELS,
    SAMPLERS,
    Settings,
    fingerprint,
    fit,
    from_parameters,
    open_mask,
    open_picture,
    parameters,
    read_settings,
    save_picture,
)

A1111 = """a photo of a cat, (fluffy:1.2), [dog|fox]
on two lines: see, here
Negative prompt: blurry, (bad hands:1.4)
ugly
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 4065803281, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned, Denoising strength: 0.6, Hires upscale: 2, \
Lora hashes: "style: 1234, other: 5678", Version: v1.10.1"""
PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
LETTERS = "abc XYZ 012 ,:;\"\\\n'(){}[]<>|=é漢😀\t%"


def draw_text(pick: random.Random, letters: str = LETTERS) -> str:
    return "".join(pick.choice(letters) for _ in range(pick.randrange(40)))


def draw_settings(seed: int) -> Settings:
    pick = random.Random(seed)

    def maybe(value):
        return value if pick.random() < 0.6 else None

    name = pick.choice(list(Sampler))
    return Settings(
        prompt=draw_text(pick),
        class_id=maybe(pick.randrange(1000)),
        negative=draw_text(pick),
        seed=pick.choice([0, 1, 2**32 - 1, 2**64 - 1, pick.randrange(2**40)]),
        size=maybe([pick.randrange(1, 4096), pick.randrange(1, 4096)]),
        sampler=SamplerConfig(
            name=name,
            steps=pick.randrange(1, 1000),
            grid=maybe(pick.choice(list(Grid))),
            guidance=pick.choice([0.0, 1.0, 7.5, pick.random() * 20, 1e-7]),
            negative_scale=maybe(pick.random()),
            rescale=pick.choice([0.0, 0.7, pick.random()]),
            interval=pick.choice([[0.0, 1.0], [0.25, 0.75]]),
            eta=maybe(pick.random()) if name in ETA else None,
            rho=pick.choice([7.0, 5.5]),
            ramp_max=maybe(14.6),
            tolerance=pick.choice([1e-3, 1e-5]),
            aesthetic=pick.choice([6.0, 7.25]),
            negative_aesthetic=pick.choice([2.5, 4.0]),
        ),
        strength=pick.choice([1.0, pick.random()]),
        image=maybe(fingerprint(PIXELS)),
        mask=maybe(fingerprint(PIXELS[..., 0] > 9)),
        refiner=maybe(f"runs/{draw_text(pick)}"),
        handover=maybe(pick.random()),
        loras={draw_text(pick): pick.random() for _ in range(pick.randrange(3))},
        model=draw_text(pick),
        model_hash=f"{pick.randrange(16**10):010x}",
        weights=pick.choice(["ema", "model"]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_settings_come_back_from_a_picture_whole(seed, tmp_path):
    settings, path = draw_settings(seed), tmp_path / "new" / "a.png"
    save_picture(path, PIXELS, settings)
    assert read_settings(path) == settings
    assert read_settings(path.read_bytes()) == settings
    with Image.open(path) as image:
        assert read_settings(image) == settings
        assert np.array_equal(np.asarray(image), PIXELS)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("seed", range(200))
def test_the_text_says_all_settings(seed):
    settings = draw_settings(seed)
    assert from_parameters(parameters(settings)) == settings


def test_the_text_is_as_a1111_writes_it():
    sampler = SamplerConfig(name=Sampler.dpmpp_2m, steps=28, grid=Grid.karras, guidance=4.0)
    settings = Settings(prompt="a cat\non a mat", negative="dogs", seed=1, size=[768, 512], sampler=sampler)
    settings = replace(settings, model="one, two", model_hash="0123456789", strength=0.6)
    assert parameters(settings) == (
        "a cat\non a mat\nNegative prompt: dogs\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 1, Size: 512x768,"
        ' Model hash: 0123456789, Model: "one, two", Denoising strength: 0.6'
    )
    assert parameters(Settings()) == "Steps: 28, Sampler: Euler, CFG scale: 4, Seed: 0"


def test_another_programs_text_is_read():
    settings = from_parameters(A1111)
    assert settings.prompt == "a photo of a cat, (fluffy:1.2), [dog|fox]\non two lines: see, here"
    assert settings.negative == "blurry, (bad hands:1.4)\nugly"
    sampler = SamplerConfig(name=Sampler.dpmpp_2m, steps=20, grid=Grid.karras, guidance=7.5)
    assert settings == Settings(
        prompt=settings.prompt, negative=settings.negative, seed=4065803281, size=[768, 512], sampler=sampler,
        strength=0.6, model="v1-5-pruned", model_hash="6ce0161689",
    )  # fmt: skip
    assert from_parameters(A1111.replace("\n", "\r\n")) == settings
    assert from_parameters(A1111 + "\n") == settings


@pytest.mark.parametrize(
    ("said", "name", "grid"),
    [
        ("Euler a", Sampler.euler_ancestral, None),
        ("DPM++ 2M Karras", Sampler.dpmpp_2m, Grid.karras),  # before A1111 1.9
        ("DPM++ 2M SDE Exponential", Sampler.dpmpp_2m_sde, Grid.exponential),
        ("DPM++ 2M SDE, Schedule type: SGM Uniform", Sampler.dpmpp_2m_sde, Grid.trailing),
        ("DDIM, Schedule type: Simple", Sampler.ddim, Grid.trailing),
        ("Heun, Schedule type: Automatic", Sampler.heun_edm, None),
        ("dpmpp_2m", Sampler.dpmpp_2m, None),
        ("DPM fast Karras", Sampler.euler, Grid.karras),  # one that is not here: the default
    ],
)
def test_samplers_and_schedules_by_their_public_names(said, name, grid):
    sampler = from_parameters(f"x\nSteps: 9, Sampler: {said}, Seed: 5").sampler
    assert (sampler.name, sampler.grid, sampler.steps) == (name, grid, 9)


def test_every_sampler_and_grid_has_a_name_of_its_own():
    assert SAMPLERS.keys() == set(Sampler) and len({label.lower() for label in SAMPLERS.values()}) == len(Sampler)
    assert GRIDS.keys() == set(Grid) and len({label.lower() for label in GRIDS.values()}) == len(Grid)


def test_the_last_line_is_settings_from_three_pairs_on():
    assert from_parameters("a cat\nSteps: 20, Seed: 3") == Settings(prompt="a cat\nSteps: 20, Seed: 3")
    assert from_parameters("a cat\nSteps: 20, Seed: 3, What: ever").seed == 3
    assert from_parameters("Steps: 20, Seed: 3, What: ever").prompt == ""
    assert from_parameters("Negative prompt: dogs").negative == "dogs"


def test_values_that_mean_nothing_are_left():
    line = "Steps: 0, Sampler: {, CFG scale: nan, Seed: -1e3, Size: 0x5, Class: true, LoRAs: [1], Eta: 1e999, Rho: x"
    assert from_parameters(f"x\n{line}, Tolerance: {'[' * 50}, Model: ok") == Settings(prompt="x", model="ok")
    assert from_parameters(f"x\nSteps: 5, Seed: 1, Tolerance: {'[' * 10**5}").seed == 1
    assert from_parameters(f"x\nSteps: {'9' * 10**4}, Seed: {2**64}, Size: 1x2x3").sampler.steps == 28


def test_garbage_never_breaks_the_reader():
    pick = random.Random(0)
    for _ in range(2000):
        text = draw_text(pick, LETTERS + "Steps: 1, Sampler: Seed: \x00\ud800\u2028")
        from_parameters(text + pick.choice(["", "\nNegative prompt: ", "\nSteps: 1, Seed: 2, Size: 1x2, "]) + text)
    for text in ("a" * 10**6, " " * 10**6, ":" * 10**6, 'a:"' * 10**5, "a:" * 10**6, "a: , " * 10**5, 'a:"\\' * 10**5):
        from_parameters(f"{text}\n{text}")  # in linear time


def png_with(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "PNG"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-8", "ascii", "none"])
def test_exif_carries_the_text(form, encoding):
    text = A1111 if encoding == "ascii" else A1111.replace("cat", "猫")
    comment = {
        "utf-16-be": b"UNICODE\0" + text.encode("utf-16-be"),
        "utf-16-le": b"UNICODE\0" + text.encode("utf-16-le"),
        "utf-8": bytes(8) + text.encode(),
        "ascii": b"ASCII\0\0\0" + text.encode(),
        "none": text.encode(),
    }[encoding]
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0131] = "software"  # Pillow writes none that has no tag of its own
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.fromarray(PIXELS).save(buffer, form, exif=exif)
    assert read_settings(buffer.getvalue()) == from_parameters(text)


def test_ours_is_read_first_and_theirs_if_ours_is_spoilt():
    ours = json.dumps({"prompt": "ours", "sampler": {"name": "ddim"}, "of a later version": 1})
    assert read_settings(png_with(triptych=ours, parameters=A1111)) == Settings(
        prompt="ours", sampler=SamplerConfig(name=Sampler.ddim)
    )
    theirs = from_parameters(A1111)
    for spoilt in (
        "", "{", "[]", "null", "[" * 10**5, '{"prompt": 3}', '{"seed": 1.5}', '{"seed": 1e400}', '{"seed": true}',
        '{"size": [1]}', '{"size": [1, 0]}', '{"sampler": []}', '{"sampler": {"name": []}}', '{"loras": {"a": null}}',
        '{"sampler": {"name": "dpm"}}', '{"sampler": {"steps": 0}}', '{"sampler": {"interval": [0.5]}}',
        '{"sampler": {"guidance": NaN}}', '{"strength": Infinity}', '{"seed": 99999999999999999999}',
    ):  # fmt: skip
        assert read_settings(png_with(triptych=spoilt, parameters=A1111)) == theirs


def test_a_picture_that_says_nothing_is_refused(tmp_path):
    path = tmp_path / "plain.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(ValueError, match="plain.png does not say how it was made; give a PNG as it was saved"):
        read_settings(path)


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seed=-9223372036854775809 does not fit 64 bits; choose 0 to"):
        Settings(seed=-(2**63) - 1)
    with pytest.raises(ValueError, match=r"size=\[64\] is not a height and a width in pixels"):
        Settings(size=[64])
    with pytest.raises(ValueError, match="a.jpg must end in .png"):
        save_picture(tmp_path / "a.jpg", PIXELS, Settings())


# --- pictures that users give ------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_pixels_are_opened_as_they_are(form, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(encoded(Image.fromarray(PIXELS), form))
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file, Image.fromarray(PIXELS)):
            assert np.array_equal(open_picture(source), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1), 6: np.rot90(PIXELS, -1), 7: np.rot90(PIXELS.swapaxes(0, 1), 2), 8: np.rot90(PIXELS),
    }[orientation]  # fmt: skip
    assert np.array_equal(open_picture(encoded(Image.fromarray(PIXELS), exif=exif)), turned)
    mask = np.zeros((5, 7), bool)
    mask[:2, :3] = True
    expected = np.zeros_like(turned[..., 0], bool)
    expected |= np.isin(turned[..., 0], PIXELS[:2, :3, 0])
    assert np.array_equal(open_mask(encoded(Image.fromarray(mask), exif=exif)), expected)


def test_transparency_lies_on_white_and_in_a_mask_on_black():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[0, :, 3] = 255, 0, 102
    assert open_picture(encoded(Image.fromarray(pixels))).tolist() == [[[200, 0, 0], [255] * 3, [233, 153, 153]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert open_picture(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]
    strokes = np.full((1, 2, 4), 255, np.uint8)
    strokes[0, 1, 3] = 0
    assert open_mask(encoded(Image.fromarray(strokes))).tolist() == [[True, False]]


def test_every_mode_becomes_the_same_colours():
    grey = np.array([[0, 128, 255]], np.uint8)
    wide = np.array([[0, 128 * 257, 65535]], np.uint16)
    for image in (grey, wide, np.stack([grey] * 3, -1)):
        assert open_picture(encoded(Image.fromarray(image)))[..., 0].tolist() == grey.tolist()
        assert open_mask(encoded(Image.fromarray(image))).tolist() == [[False, True, True]]
    one = Image.fromarray(grey).convert("CMYK")
    assert open_picture(encoded(one, "TIFF"))[..., 1].tolist() == grey.tolist()


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "TIFF"):
        moving = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert open_picture(moving)[0, 0].tolist() == [255, 0, 0]


def test_what_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="--init-image .*a.png does not exist; give the file of a picture"):
        open_picture(path)
    with pytest.raises(ValueError, match="--mask .* does not exist"):
        open_mask(tmp_path)
    path.write_text("<svg/>")
    with pytest.raises(ValueError, match="a.png is not a picture, or a damaged one; give a file of PNG, JPEG, .* or"):
        open_picture(path)
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
    with pytest.raises(ValueError, match=r"--mask cannot be read \(.*\); save it again, as PNG"):
        open_mask(whole[: len(whole) // 2])
    deep = Image.fromarray(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="32 bits a channel"):
        open_picture(encoded(deep, "TIFF"))
    postscript = encoded(Image.new("RGB", (4, 4)), "EPS")  # which an interpreter of programs would read
    with pytest.raises(ValueError, match="is not a picture"):
        open_picture(postscript)


@pytest.mark.parametrize("side", [8001, 9500, 12000, 60000])  # beyond ours; beyond where Pillow warns, and refuses
def test_a_picture_too_large_is_refused_before_it_is_decoded(side):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert side**2 > MAX_PIXELS
    with pytest.raises(ValueError, match="--init-image has more than 64 million pixels; make it smaller first"):
        open_picture(bomb)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is wrong with EXIF
def test_broken_files_raise_nothing_but_a_sentence():
    pick, said = random.Random(0), set()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    noise = Image.effect_noise((24, 17), 60).convert("RGB")
    forms = [("PNG", {"exif": exif}), ("JPEG", {"exif": exif}), ("WEBP", {"exif": exif}), ("GIF", {}), ("BMP", {})]
    forms += [("TIFF", {"exif": exif, "compression": "tiff_lzw"}), ("AVIF", {"exif": exif})]
    for form, options in forms:
        whole = encoded(noise, form, **options)
        for _ in range(60):
            broken = bytearray(whole[: pick.randrange(1, len(whole) + 1)])
            for _ in range(pick.randrange(6)):
                broken[pick.randrange(len(broken))] = pick.randrange(256)
            for read in (open_picture, open_mask, read_settings):
                try:
                    read(bytes(broken))
                except ValueError as error:
                    said.add(str(error))
    assert len(said) > 10
    assert all(re.search(r"; (save it again|give a|make it smaller)", sentence) for sentence in said)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (12, 4), (16, 5)])
def test_fit_covers_and_cuts_evenly(size):
    height, width = size
    ramp = np.broadcast_to(np.linspace(0, 255, 30)[None, :, None], (20, 30, 3)).round().astype(np.uint8)
    fitted = fit(ramp, size)
    assert fitted.shape == (height, width, 3)
    shown = min(30.0, 20 * width / height)  # columns of the source that stay
    centres = 14.5 + ((np.arange(width) + 0.5) / width - 0.5) * shown
    gap = fitted[:, 1:-1, 0] - (centres * 255 / 29)[None, 1:-1]
    assert np.abs(gap).max() < 3
    assert np.array_equal(fit(ramp, (20, 30)), ramp)
    assert np.all(fit(np.full((9, 5, 3), 77, np.uint8), size) == 77)


def test_masks_are_fitted_as_masks():
    mask = np.zeros((10, 20), bool)
    mask[:, :10] = True
    fitted = fit(mask, (5, 10))
    assert fitted.dtype == bool and fitted[:, :5].all() and not fitted[:, 5:].any()


def test_fingerprints_tell_pictures_apart():
    assert fingerprint(PIXELS) == fingerprint(PIXELS.copy(order="F"))
    others = {fingerprint(x) for x in (PIXELS, PIXELS[::-1], PIXELS.swapaxes(0, 1), PIXELS.reshape(7, 5, 3))}
    assert len(others) == 4
