"""Aspect buckets: a few sizes of about the same area, so that pictures keep their shape and batches their cost.

    height, width = multiples of `step`,   0.9 r^2 <= height width <= r^2,   1/max_aspect <= height/width <= max_aspect

At r = 1024, step = 64, max_aspect = 4 these are SDXL's sizes (Podell et al. 2023, appendix I). A picture goes to the
bucket of the nearest aspect, is resized to cover it and cropped at the centre. Data of squares is the one bucket
(r, r). SDXL is told of both: `original_size` is the picture's before resizing, `crop` is counted after it.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]  # height, width


def bucket_sizes(resolution: int, step: int = 64, max_aspect: float = 4.0) -> list[Size]:
    """All (height, width) of about resolution^2 pixels in multiples of `step`, the widest first.

    Raises ValueError if there are none, which happens only to a step that does not divide the resolution.
    """
    area, sides = resolution**2, range(step, int(resolution * max_aspect**0.5) + 1, step)
    sizes = [
        (height, width)
        for height in sides
        for width in reversed(sides)
        if 9 * area <= 10 * height * width <= 10 * area and max(height, width) <= max_aspect * min(height, width)
    ]
    if not sizes:
        raise ValueError(
            f"step={step} has no multiples of about {resolution} x {resolution} pixels;"
            f" choose one that divides the resolution {resolution}"
        )
    return sizes


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect differs least, as a factor, from that of a picture; then the larger; then the taller."""

    def unlike(size: Size) -> tuple[float, int, int]:
        ours, theirs = height * size[1], width * size[0]  # exp |log aspect difference| is the larger by the smaller
        return max(ours, theirs) / min(ours, theirs), -size[0] * size[1], -size[0]

    return min(sizes, key=unlike)


def scale_of(height: int, width: int, bucket: Size) -> float:
    """By what a picture is multiplied to cover a bucket; above 1 it is enlarged."""
    return max(bucket[0] / height, bucket[1] / width)


def fit(image: Image.Image, bucket: Size) -> tuple[np.ndarray, Size]:
    """Resize an RGB picture to cover (height, width) and crop the centre: uint8 (h, w, 3), and (top, left) of the crop.

    Lanczos, antialiased; what is more than three times too large is first averaged over whole pixels, which cannot
    be told by eye and takes a fraction of the time.
    """
    height, width = bucket
    if height * image.width >= width * image.height:  # its height is what is short
        cover = height, max(width, round(image.width * height / image.height))
    else:
        cover = max(height, round(image.height * width / image.width)), width
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    resized = image.resize((cover[1], cover[0]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(resized)[top : top + height, left : left + width].copy(), (top, left)
