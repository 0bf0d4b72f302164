"""The page's own bits of HTML: header, progress, pictures in the making. All text is escaped."""

import base64
import io
from html import escape

import numpy as np
import torch

from app.studio import Studio, short
from app.watch import Glance


def header(studio: Studio) -> str:
    """Name of the product and of the checkpoint, and what it is in four words."""
    facts = dict(studio.about())
    few = f"{facts['Predicts']} prediction", facts["Size"], f"{facts['Parameters']} parameters", facts["Device"]
    chips = "".join(f"<span>{escape(fact)}</span>" for fact in few)
    name = escape(short(studio.checkpoint))
    return f'<h1>Triptych <em>Studio</em></h1><p><b title="{escape(studio.checkpoint)}">{name}</b>{chips}</p>'


def about(studio: Studio) -> str:
    """What the checkpoint says of itself, as a table."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in studio.about())
    return f"<table>{rows}</table>"


def line(text: str, share: float = 0.0) -> str:
    """One line of status over a bar that is `share` full."""
    return f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div><span>{escape(text)}</span>'


def progress(glance: Glance) -> str:
    """Step and time left."""
    left = f"about {duration(glance.left)} left" if glance.done < glance.total else "finishing"
    return line(f"Step {glance.done} of {glance.total} · {left}", glance.done / glance.total)


def duration(seconds: float) -> str:
    """Seconds as one reads them: 0.4 s, 12 s, 3 min 20 s."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def sentence(error: Exception) -> str:
    """What went wrong, for whoever drew: our own sentences as they are, of others only that the log has them."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The device has no memory left for this drawing; make it smaller, or draw fewer pictures."
    return escape(str(error)) if isinstance(error, ValueError) else "The drawing failed; the terminal says why."


def making(previews: np.ndarray) -> str:
    """Estimates of the pictures (b, h, w, 3) uint8, inside the page itself."""
    return "".join(f'<img decoding="sync" alt="a picture in the making" src="{_inline(one)}">' for one in previews)


def _inline(picture: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "webp", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
