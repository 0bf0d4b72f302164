"""Decoding: each odd kind of picture is shown as it is meant or refused by name, and no bytes do anything else."""

import io
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from data.decode import MAX_PIXELS, REASONS, Undecodable, decode

DRAW = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(DRAW.integers(0, 256, (5, 7, 3), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)
)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


def refused(content, **options):
    with pytest.raises(Undecodable) as caught:
        decode(content, **options)
    return caught.value.reason


def png(width, height, depth=8, colour=2, data=b"", *more):
    """A PNG put together by hand, for what no library writes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in more)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


VALID = {
    "jpeg": encoded(SMOOTH, "JPEG", quality=95),
    "progressive": encoded(SMOOTH, "JPEG", progressive=True),
    "png": encoded(SMOOTH, "PNG"),
    "palette": encoded(Image.fromarray(SMOOTH).quantize(16), "PNG", transparency=3),
    "webp": encoded(SMOOTH, "WEBP"),
    "lossless": encoded(SMOOTH, "WEBP", lossless=True),
    "rotated": encoded(SMOOTH, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
}

# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_come_back_exactly(kind):
    image = decode(encoded(SMOOTH, kind, lossless=True))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), SMOOTH)


def test_a_jpeg_comes_back_nearly():
    assert np.abs(np.asarray(decode(VALID["jpeg"]), int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(SMOOTH, kind, exif=exif, quality=100)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(decode(content)), np.asarray(upright))
    assert decode(content).size == ((56, 40) if orientation < 5 else (40, 56))


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_ignored():
    content = encoded(SMOOTH, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert np.array_equal(np.asarray(decode(content)), SMOOTH)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_over_white(kind):
    alpha = DRAW.integers(0, 256, SMOOTH.shape[:2], np.uint8)
    content = encoded(np.dstack([SMOOTH, alpha]), kind, lossless=True, exact=True)
    expected = SMOOTH * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(np.asarray(decode(content), float) - expected).max() <= 1


def test_palettes_greys_and_bits_become_rgb():
    grey = np.asarray(Image.fromarray(SMOOTH).convert("L"))
    assert np.array_equal(np.asarray(decode(encoded(grey, "PNG"))), np.dstack([grey] * 3))
    half = np.full_like(grey, 128)
    laid = np.asarray(decode(encoded(Image.fromarray(np.dstack([grey, half]), "LA"), "PNG")), float)
    assert np.abs(laid - (np.dstack([grey] * 3) / 2 + 127.5)).max() <= 1.5
    bits = Image.fromarray(grey > 128)
    assert set(np.unique(np.asarray(decode(encoded(bits, "PNG"))))) == {0, 255}
    palette = Image.fromarray(SMOOTH).quantize(16)
    assert np.array_equal(np.asarray(decode(encoded(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    index = np.asarray(palette)
    seen = np.asarray(decode(encoded(palette, "PNG", transparency=3)))  # colour 3 is clear, the others opaque
    assert (seen[index == 3] == 255).all()
    assert np.array_equal(seen[index != 3], np.asarray(palette.convert("RGB"))[index != 3])
    keyed = encoded(np.where(index[..., None] == 3, np.uint8(7), SMOOTH // 2 + 100), "PNG", transparency=(7, 7, 7))
    assert (np.asarray(decode(keyed))[index == 3] == 255).all()


def swapped_profile():
    """sRGB with the colorants of red and green exchanged, by exchanging their entries in the table of tags."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


def test_a_profile_is_converted_to_srgb():
    content = encoded(SMOOTH, "PNG", icc_profile=swapped_profile())
    assert np.abs(np.asarray(decode(content), int) - SMOOTH[..., [1, 0, 2]]).max() <= 1
    clear = np.dstack([SMOOTH, np.full(SMOOTH.shape[:2], 255, np.uint8)])
    content = encoded(clear, "PNG", icc_profile=swapped_profile())
    assert np.abs(np.asarray(decode(content), int) - SMOOTH[..., [1, 0, 2]]).max() <= 1


def test_a_profile_that_changes_nothing_or_cannot_be_read_is_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, b"no profile at all", srgb[:200]):
        assert np.array_equal(np.asarray(decode(encoded(SMOOTH, "PNG", icc_profile=profile))), SMOOTH)
    grey = np.asarray(Image.fromarray(SMOOTH).convert("L"))
    seen = np.asarray(decode(encoded(grey, "PNG", icc_profile=swapped_profile())), int)
    assert np.abs(seen - grey[..., None]).max() <= 1  # grey is grey in a profile of RGB too


def test_a_photo_with_a_second_picture_behind_it_is_the_photo():
    other = Image.fromarray(255 - SMOOTH)
    content = encoded(SMOOTH, "MPO", save_all=True, append_images=[other], quality=100)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert np.abs(np.asarray(decode(content), int) - SMOOTH).mean() < 3


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_films_are_refused(kind):
    frames = [Image.fromarray(np.roll(SMOOTH, i, 1)) for i in range(3)]
    assert refused(encoded(frames[0], kind, save_all=True, append_images=frames[1:])) == "animated"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind):
    assert refused(encoded(SMOOTH, kind)) == "not_an_image"


def test_ink_colours_are_refused():
    assert refused(encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG")) == "cmyk"


def test_sixteen_bits_are_refused():
    values = bytes(range(256)) * 100
    assert refused(encoded(np.arange(400, dtype=np.uint16).reshape(20, 20), "PNG")) == "sixteen_bit"
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        rows = b"".join(b"\0" + values[: 5 * 2 * channels] for _ in range(4))
        assert refused(png(5, 4, 16, colour, rows)) == "sixteen_bit"
        rows = b"".join(b"\0" + values[: 5 * channels] for _ in range(4))
        assert decode(png(5, 4, 8, colour, rows)).size == (5, 4)


def test_nothing_is_refused_as_zero_size():
    assert refused(b"") == "zero_size"
    assert refused(png(0, 5)) == refused(png(5, 0)) == "zero_size"
    jpeg = VALID["jpeg"]
    at = jpeg.index(b"\xff\xc0") + 5  # of the height
    assert refused(jpeg[:at] + b"\0\0" + jpeg[at + 2 :]) == "zero_size"
    webp = VALID["webp"]
    assert refused(webp[:26] + b"\0\0" + webp[28:]) == "zero_size"


@pytest.mark.parametrize("name", VALID)
def test_the_cap_is_exact_for_every_format(name):
    assert decode(VALID[name], max_pixels=56 * 40)
    assert refused(VALID[name], max_pixels=56 * 40 - 1) == "too_many_pixels"


def test_bombs_are_refused_by_their_header():
    """Some hundred bytes that claim gigabytes: none may be decoded, and none may end in a mere warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for side in (9_000, 12_000, 40_000):  # Pillow: no word, a warning, an error
            assert refused(png(side, side)) == "too_many_pixels"
    wide = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (16382).to_bytes(3, "little")
    assert refused(b"RIFF" + struct.pack("<I", 4 + len(wide)) + b"WEBP" + wide) == "too_many_pixels"
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", VALID)
def test_files_that_were_cut_are_broken(name, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries do
    content = VALID[name]
    for length in (len(content) * 2 // 3, len(content) // 2, 40):
        assert refused(content[:length]) == "broken"


def test_text_is_not_an_image():
    assert refused(b"<html><body>404</body></html>") == "not_an_image"
    with pytest.raises(Undecodable, match="not_an_image: UnidentifiedImageError"):
        decode(b"GIF89a")


@pytest.mark.filterwarnings("ignore")
def test_no_bytes_do_anything_else():
    """Thousands of noises, flips, cuts and splices: a picture within the cap, or Undecodable."""
    draw, reasons = random.Random(0), set()
    image, rows = Image.fromarray(SMOOTH), bytes(4 * (1 + 5 * 6))
    films = [encoded(image, kind, save_all=True, append_images=[image.rotate(180)]) for kind in ("PNG", "WEBP")]
    profiled = encoded(SMOOTH, "PNG", icc_profile=swapped_profile())
    files = [*VALID.values(), *films, profiled, png(5, 4, 16, 2, rows), encoded(image.convert("CMYK"), "JPEG")]
    for trial in range(20_000):
        content = bytearray(draw.choice(files))
        match trial % 4:
            case 0:
                content = content[:12] + draw.randbytes(draw.randrange(200))
            case 1:
                for _ in range(draw.randrange(1, 20)):
                    content[draw.randrange(len(content))] = draw.randrange(256)
            case 2:
                for _ in range(draw.randrange(1, 4)):  # the header is where lies are dangerous
                    content[draw.randrange(min(64, len(content)))] = draw.randrange(256)
                content = content[: draw.randrange(len(content))]
            case 3:
                other = draw.choice(files)
                content = content[: draw.randrange(len(content))] + other[draw.randrange(len(other)) :]
        try:
            image = decode(bytes(content), max_pixels=10_000)
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= 10_000
        except Undecodable as error:
            reasons.add(error.reason)
    assert reasons == set(REASONS)


def test_threads_do_not_disturb_each_other():
    files = [*VALID.values(), encoded(SMOOTH, "PNG", icc_profile=swapped_profile()), VALID["png"][:99]] * 20

    def outcome(content):
        try:
            return decode(content).tobytes()
        except Undecodable as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files)) == [outcome(content) for content in files]
