"""One encoded picture to RGB pixels as they are meant to be seen, or the reason why not.

Files from the web are hostile or odd, so this is narrow: JPEG, PNG and WebP alone, a cap on the pixels that is checked
in the header before anything is decoded, and one exception. What can be shown truly in 8-bit sRGB is; what cannot (ink
colours, 16 bits, films) is refused rather than guessed:

    rotation in EXIF             applied
    transparency                 laid over white
    palette, grey, black/white   made RGB
    another colour profile       converted to sRGB; one that cannot be read, or is of another kind of colour than the
                                 picture, is ignored: the numbers are then taken for sRGB, as browsers do
"""

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

MAX_PIXELS = 2**26  # 8192 x 8192; Pillow's own limit, 89,478,485, stays above it
REASONS = ("not_an_image", "broken", "animated", "cmyk", "sixteen_bit", "zero_size", "too_many_pixels")
ORIENTATION = 0x0112  # the tag in EXIF, whose values say by what the stored picture becomes upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # odd metadata of one file in millions
warnings.simplefilter("error", Image.DecompressionBombWarning)


class Undecodable(ValueError):  # noqa: N818  (it says what the file is; nobody erred)
    """Why there is no picture: `reason` is one of REASONS, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a JPEG, PNG or WebP file: RGB, upright, opaque, sRGB. Raises Undecodable and nothing else.

    Can be called from several threads, which decode at the same time. A JPEG whose data was damaged but not cut short
    decodes, with grey or wrong blocks: libjpeg does not tell.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # other libraries set it for everybody; then cut files look whole
    try:
        _check_size(content, max_pixels)
        with Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"]) as image:
            _check_kind(image, max_pixels)
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            image = _rgb(image)
            return image.transpose(turn) if turn is not None else image
    except Undecodable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Undecodable("too_many_pixels", str(error)) from error
    except Exception as error:  # whatever Pillow and the libraries beneath it come up with
        reason = "broken" if _format(content) else "not_an_image"
        raise Undecodable(reason, type(error).__name__) from error  # their words hold addresses in memory


def header_size(content: bytes) -> tuple[int, int] | None:
    """Width and height that a file claims, as it is stored; None if it is of no known kind, or cut off."""
    match _format(content):
        case "PNG" if content[12:16] == b"IHDR" and len(content) >= 24:
            return _big(content[16:20]), _big(content[20:24])
        case "JPEG":
            return _jpeg_size(content)
        case "WEBP" if len(content) >= 30:
            return _webp_size(content)
    return None


def _check_size(content: bytes, max_pixels: int) -> None:
    """Refuse by the header alone: Pillow prepares buffers for a WebP when it opens it, and has no word for 0 pixels."""
    if not content:
        raise Undecodable("zero_size", "the file has 0 bytes")
    if size := header_size(content):
        _check_pixels(*size, max_pixels)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise Undecodable("zero_size", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise Undecodable("too_many_pixels", f"{width} x {height} pixels are more than {max_pixels:,}")


def _check_kind(image: Image.Image, max_pixels: int) -> None:
    """Refuse what 8-bit RGB cannot show."""
    _check_pixels(*image.size, max_pixels)
    # a JPEG with more frames (MPO) is a photo with a second eye or a brightness map behind it: the first is the photo
    if image.format in ("PNG", "WEBP") and (frames := getattr(image, "n_frames", 1)) > 1:
        raise Undecodable("animated", f"{frames} frames")
    if image.mode == "CMYK":  # YCCK too
        raise Undecodable("cmyk", "the picture is in ink colours")
    if image.mode[0] in "IF" or any("16" in str(tile.args) for tile in getattr(image, "tile", ())):
        raise Undecodable("sixteen_bit", "more than 8 bits a channel, of which Pillow would drop half in silence")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Opaque sRGB of a loaded picture of any mode."""
    profile = image.info.get("icc_profile") or b""
    grey = image.mode in ("1", "L", "LA")
    if not image.has_transparency_data:
        return _srgb(image.convert("L") if grey else image.convert("RGB"), profile)
    rgba = image.convert("RGBA")
    colour = _srgb(rgba.convert("L") if grey else rgba.convert("RGB"), profile)
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(colour, mask=rgba.getchannel("A"))
    return white


def _srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An L or RGB picture in the colours of a profile -> RGB in sRGB."""
    for mode in dict.fromkeys((image.mode, "RGB")):  # a grey picture may have a profile of grey or of RGB
        if profile and (transform := _transform(profile, mode)):
            return ImageCms.applyTransform(image.convert(mode), transform) or image
    return image.convert("RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that changes nothing, or the profile is broken or of another kind of colour.

    Most embedded profiles are one of many editions of sRGB itself, which is found out by trying some 700 colours:
    that is quicker than transforming each picture, and spares it a rounding.
    """
    try:
        source: Any = ImageCms.getOpenProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"L": "GRAY", "RGB": "RGB"}[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        levels = np.linspace(0, 255, 256 if mode == "L" else 9).astype(np.uint8)
        grid = levels if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
        probe = Image.fromarray(grid[None])
        changed = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"), int)
        return transform if np.abs(changed).max() > 2 else None
    except Exception:
        return None


def _format(content: bytes) -> str | None:
    if content[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    return "WEBP" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """From the first start-of-frame segment (ITU T.81, B.2.2)."""
    at = 2
    while content[at : at + 1] == b"\xff" and at + 9 <= len(content):
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _big(content[at + 7 : at + 9]), _big(content[at + 5 : at + 7])
        at += 1 if marker == 0xFF else 2 + _big(content[at + 2 : at + 4])  # 0xFF may be repeated as a filler
    return None


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Of the canvas (RFC 9649): extended, lossless and lossy files each have their own header."""
    kind = content[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(content[26:28], "little") & 0x3FFF, int.from_bytes(content[28:30], "little") & 0x3FFF
    return None


def _big(number: bytes) -> int:
    return int.from_bytes(number, "big")
