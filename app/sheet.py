"""Several pictures as one, with what differs between them written along the edges."""

from collections.abc import Sequence

import numpy as np

SMALLEST = 192  # px of a cell's longer side: smaller pictures are enlarged by a whole factor, so that labels fit
GAP = 8
INK, PAPER = (38, 38, 46), (250, 250, 249)


def labelled(rows: Sequence[Sequence[np.ndarray]], above: Sequence[str], beside: Sequence[str]) -> np.ndarray:
    """Pictures in rows and columns, (h, w, 3) uint8 each, as one, with a label above each column and beside each row.

    Cells are as large as the largest picture. Empty labels take no room.
    """
    from PIL import Image, ImageDraw

    shapes = [picture.shape for row in rows for picture in row]
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    scale = -(-SMALLEST // max(height, width))
    height, width = height * scale, width * scale
    letters = max(14, width // 18)
    font = _font(letters)
    above, beside = [_short(text, font, width) for text in above], [_short(text, font, 2 * width) for text in beside]
    left = GAP + (round(max(map(font.getlength, beside))) + GAP if any(beside) else 0)
    top = GAP + (letters + GAP if any(above) else 0)

    sheet = Image.new("RGB", (left + len(rows[0]) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(above):
        draw.text((left + column * (width + GAP) + width / 2, top / 2), text, INK, font, anchor="mm")
    for row, (pictures, text) in enumerate(zip(rows, beside, strict=True)):
        y = top + row * (height + GAP)
        draw.text((left - GAP, y + height / 2), text, INK, font, anchor="rm")
        for column, picture in enumerate(pictures):
            inside = _within(picture, height, width)
            x = left + column * (width + GAP)
            sheet.paste(inside, (x + (width - inside.width) // 2, y + (height - inside.height) // 2))
    return np.asarray(sheet)


def _within(picture: np.ndarray, height: int, width: int):
    """The picture as large as fits; a whole factor repeats its pixels."""
    from PIL import Image

    h, w = picture.shape[:2]
    scale = min(height / h, width / w)
    resampling = Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((round(w * scale), round(h * scale)), resampling)


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _short(text: str, font, width: float) -> str:
    """The text, cut short where it is wider than `width` pixels."""
    whole = text
    while text and font.getlength(text if text == whole else text + "…") > width:
        text = text[:-1]
    return text if text == whole else text.rstrip() + "…"
