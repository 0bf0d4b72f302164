"""Make public weights a start for training: a pipeline of diffusers, or a single file with the original names.

python scripts/import.py --from stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --out outputs/sdxl
python scripts/import.py --from model.safetensors --config FOLDER --out outputs/start

Train from it with init.from=outputs/sdxl, carry it over with reparameterize.py, or draw with scripts/sample.py. Only
safetensors are read, and .ckpt files that hold nothing but tensors.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse, import; a user's error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, help="folder, hub name, or single file")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--variant", help="middle of the names of the files in the folder, such as fp16")
    parser.add_argument("--revision", help="of a hub name: a commit, so that it never changes under you")
    parser.add_argument("--config", help="of a single file: folder or hub name of a pipeline of the same kind")
    parser.add_argument("--weights", default="model", choices=("model", "ema"), help="of a .ckpt that has both")
    options = parser.parse_args()
    try:
        bring(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def bring(options: argparse.Namespace) -> None:
    """Read, convert, write."""
    if options.out.exists():
        raise ValueError(f"{options.out} exists already and is never overwritten; move it away or choose another --out")

    from inference.export.start import BESIDE, from_public, from_single_file
    from models.folder import publish
    from models.weights import save_denoiser

    single = Path(options.source).suffix in (".safetensors", ".ckpt")
    if single:
        start = from_single_file(options.source, options.config, ema=options.weights == "ema")
    else:
        start = from_public(options.source, variant=options.variant, revision=options.revision)

    def write(aside: Path) -> None:
        for name in ("model", "ema"):
            save_denoiser(start.denoiser, aside / "denoiser", name)
        for name, part in start.parts.items():
            part.save_pretrained(aside / name)
        start.description.save(aside)

    publish(options.out, write)
    known, size = start.description, sum(parameter.numel() for parameter in start.denoiser.parameters())
    kind, says = type(start.denoiser).__name__, known.objective.prediction.name
    frozen = {"vae": known.vae.path, "text": known.text.path if known.text else None}
    where = [f"{group}.path={options.out if path == BESIDE else path}" for group, path in frozen.items() if path]
    print(f"wrote {options.out}: {kind}, {size:,} parameters, {says} at {known.resolution} px")
    print(f"start from it with init.from={options.out} {' '.join(where)} and the model= of its size")


if __name__ == "__main__":
    main()
