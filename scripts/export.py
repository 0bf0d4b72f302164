"""Write a checkpoint as what others open: a pipeline of diffusers, or a single file with the original names.

python scripts/export.py --checkpoint outputs/stage3 --format diffusers --out outputs/stage3-diffusers
python scripts/export.py --checkpoint outputs/stage3 --format single-file --out outputs/stage3.safetensors
python scripts/export.py --checkpoint outputs/stage3 --format ckpt --out outputs/stage3.ckpt

`DiffusionPipeline.from_pretrained` runs the first without any code of this project; its README.md says how. The others
are for programs that read the files of SD 1.x, SDXL and SD3. What no public pipeline can run is refused.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse, export; a user's error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint or pipeline")
    parser.add_argument("--format", choices=("diffusers", "single-file", "ckpt"), default="diffusers")
    parser.add_argument("--out", required=True, type=Path, help="folder, or file, to write; must not exist")
    parser.add_argument("--weights", default="ema", choices=("ema", "model"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the network")
    parser.add_argument("--variant", help="middle of the names of the files in the folder, such as fp16")
    parser.add_argument("--shard-size", default="10GB", help="largest file of the folder (default: 10GB)")
    parser.add_argument("--title", help="for the model card and the file's metadata (default: the name of --out)")
    options = parser.parse_args()
    try:
        export(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def export(options: argparse.Namespace) -> None:
    """Open, convert, write."""
    if options.out.exists():
        raise ValueError(f"{options.out} exists already and is never overwritten; move it away or choose another --out")

    import torch

    from inference.export.card import file_metadata, model_card
    from inference.export.pipeline import to_public
    from inference.export.single_file import write_single_file
    from inference.pipeline import Pipeline
    from models.folder import publish

    pipeline = Pipeline.load(options.checkpoint, weights=options.weights, device="cpu")
    pipeline.denoiser.to(getattr(torch, options.dtype))
    public = to_public(pipeline)
    title = options.title or options.out.stem
    if options.format == "diffusers":

        def write(aside: Path) -> None:
            public.save_pretrained(aside, variant=options.variant, max_shard_size=options.shard_size)
            (aside / "README.md").write_text(model_card(pipeline, public, title))

        publish(options.out, write)
        print(f"wrote {options.out}, a {type(public).__name__}; its README.md says how to run it")
    else:
        modules = {name: part for name, part in public.components.items() if isinstance(part, torch.nn.Module)}
        about = file_metadata(pipeline, modules, title)
        write_single_file(options.out, modules, about, pickled=options.format == "ckpt")
        print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
