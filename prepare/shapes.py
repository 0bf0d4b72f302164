"""Draw, encode and store the embedded data set: `data/shapes.py` -> autoencoder -> shards.

Record i holds scene i of the seed, so the shards can be made again, to the byte, from what their index says.
Pictures of one thing carry its colour and shape as a class label.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data import shapes
from data.reader import ShardReader
from data.shards import ShardWriter
from prepare.texts import TextEncoders, add_texts, digest, text_layout


class Autoencoder(Protocol):
    """What is needed of `models.autoencoder.Autoencoder`."""

    factor: int

    def encode(self, pixels: torch.Tensor, /) -> torch.Tensor: ...
    def info(self) -> dict[str, Any]: ...


def prepare_shapes(
    out: str | Path,
    *,
    resolution: int,
    num_images: int,
    seed: int,
    vae: Autoencoder,
    text: TextEncoders | None = None,
    two: float = 0.5,
    batch: int = 64,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Write `num_images` scenes to `out`, with the text states of all their captions if `text` is given.

    `two` is the share of pictures with two things; at 0 they have a class.
    `progress` is told the number done after each batch. Returns False, and does nothing, if `out` already holds
    this very set; raises ValueError if it holds another, unless `overwrite`.
    """
    if resolution % vae.factor or resolution < 32:
        raise ValueError(
            f"resolution={resolution} must be a multiple of {vae.factor}, the autoencoder's factor, and at least 32; "
            "choose for instance 64, 128 or 256"
        )
    if num_images < 1:
        raise ValueError(f"images={num_images} must be at least 1; 20000 is a good start")
    if not 0 <= two <= 1:
        raise ValueError(f"two={two} is a share of the pictures; choose from 0, one thing on each, to 1")
    recipe = {
        "data": "shapes",
        "images": num_images,
        "resolution": resolution,
        "seed": seed,
        "two": two,
        "text_states": digest(text) if text else None,
    }
    info = json.loads(json.dumps(vae.info()))  # as it will be read back
    if not overwrite and _is_prepared(Path(out), recipe, info):
        return False
    extra = {"recipe": recipe, "num_classes": shapes.NUM_CLASSES if two == 0 else None}
    layout = text_layout(text, "float16") if text else None
    with ShardWriter(out, resolution=resolution, vae=info, text=layout, extra=extra, overwrite=overwrite) as writer:
        for first in range(0, num_images, batch):
            indices = range(first, min(first + batch, num_images))
            _add(writer, indices, resolution, seed, two, vae, text, device)
            if progress:
                progress(indices.stop)
    return True


@torch.inference_mode()
def _add(
    writer: ShardWriter,
    indices: range,
    resolution: int,
    seed: int,
    two: float,
    vae: Autoencoder,
    text: TextEncoders | None,
    device: torch.device | str,
) -> None:
    """Write the scenes with the given indices, encoded as one batch."""
    scenes = [shapes.scene(seed, index, two=two) for index in indices]
    pictures = np.stack([shapes.render(scene, resolution) for scene in scenes])
    pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2) / 127.5 - 1
    latents = vae.encode(pixels).cpu().numpy()
    captions = [shapes.captions(scene, seed, index) for scene, index in zip(scenes, indices, strict=True)]
    for index, scene, latent, named in zip(indices, scenes, latents, captions, strict=True):
        writer.add({"index": index, "captions": named} | _label(scene), latent=latent)
    if text:
        add_texts(writer, text, [caption for named in captions for caption in named.values()])


def _label(scene: shapes.Scene) -> dict[str, int]:
    return {"class_id": scene.things[0].class_id} if len(scene.things) == 1 else {}


def _is_prepared(out: Path, recipe: dict[str, Any], info: dict[str, Any]) -> bool:
    """Whether `out` holds just this set; ValueError if it holds another."""
    if not (out / "index.json").exists():
        return False
    index = ShardReader(out).index
    asked = recipe | {"vae": info["id"]}
    held = index["extra"].get("recipe", {}) | {"vae": index["vae"].get("id")}
    for key, value in asked.items():
        if held.get(key) != value:
            raise ValueError(
                f"{out} already holds a data set with {key}={held.get(key)}, not {value}; "
                "choose another --out, or pass --overwrite to replace it"
            )
    return True


def draw_pictures(folder: str | Path, num_images: int, address: str, seed: int = 0, side: int = 192) -> Path:
    """Draw scenes as picture files with captions in .txt, to try a preparation on; returns a table of their addresses.

    The pictures have four aspect ratios. `address` is where `folder` will be served, such as http://127.0.0.1:8000.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder, rows = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        scene = shapes.scene(seed, index)
        width, height = ((side, side), (side, side * 3 // 4), (side * 3 // 4, side), (side, side * 9 // 16))[index % 4]
        top, left = (side - height) // 2, (side - width) // 2
        picture = shapes.render(scene, side)[top : top + height, left : left + width]
        name, said = f"{index:05d}", shapes.captions(scene, seed, index)
        Image.fromarray(picture).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(said["full"] + "\n")
        rows.append({"url": f"{address}/{name}.png", "caption": said["short"], "width": width, "height": height})
    table = folder.with_suffix(".parquet")  # beside the folder, which holds pictures alone
    pq.write_table(pa.Table.from_pylist(rows), table)
    return table
