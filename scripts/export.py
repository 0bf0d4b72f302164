"""Write a checkpoint as what others open: a pipeline of diffusers, a single file with the original names, ONNX, a LoRA.

python scripts/export.py --checkpoint outputs/stage3 --format diffusers --out outputs/stage3-diffusers
python scripts/export.py --checkpoint outputs/stage3 --format single-file --out outputs/stage3.safetensors
python scripts/export.py --checkpoint outputs/stage3 --format ckpt --out outputs/stage3.ckpt
python scripts/export.py --checkpoint outputs/stage3 --format onnx --quantize int8 --out outputs/stage3-onnx
python scripts/export.py --checkpoint outputs/lora --format lora --style kohya --out outputs/lora.safetensors

`DiffusionPipeline.from_pretrained` runs the first without any code of this project; its README.md says how. The next
two are for programs that read the files of SD 1.x, SDXL and SD3. What no public pipeline can run is refused. ONNX is
for machines without torch: `python -m inference.export.onnx_sample FOLDER --prompt ... --out red.png` draws from it. A
LoRA is what a run with `model.lora.rank` learnt, under the names of diffusers, kohya or ours.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Parse, export; a user's error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint or pipeline")
    parser.add_argument("--format", choices=("diffusers", "single-file", "ckpt", "onnx", "lora"), default="diffusers")
    parser.add_argument("--out", required=True, type=Path, help="folder, or file, to write; must not exist")
    parser.add_argument("--weights", default="ema", choices=("ema", "model"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the network")
    parser.add_argument("--variant", help="middle of the names of the files in the folder, such as fp16")
    parser.add_argument("--shard-size", default="10GB", help="largest file of the folder (default: 10GB)")
    parser.add_argument("--title", help="for the model card and the file's metadata (default: the name of --out)")
    parser.add_argument(
        "--style", choices=("diffusers", "kohya", "triptych"), help="names in a LoRA (default: diffusers)"
    )
    parser.add_argument("--opset", type=int, help="of ONNX (default: 20)")
    parser.add_argument("--quantize", metavar="int8", help="ONNX with smaller products; what that changes is measured")
    options = parser.parse_args()
    try:
        export(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def export(options: argparse.Namespace) -> None:
    """Open, convert, write."""
    if options.out.exists():
        raise ValueError(f"{options.out} exists already and is never overwritten; move it away or choose another --out")

    if options.format == "onnx":
        export_onnx(options)
        return
    if options.opset or options.quantize:
        raise ValueError(f"--opset and --quantize are ONNX's, not of --format {options.format}; give --format onnx")

    if options.style and options.format != "lora":
        raise ValueError(f"--style is of a LoRA's names, not of --format {options.format}; give --format lora")

    import torch

    if options.format == "lora":
        from inference.export.lora import export_lora

        dtype, style = getattr(torch, options.dtype), options.style or "diffusers"
        count = export_lora(
            options.checkpoint, options.out, style, weights=options.weights, dtype=dtype, title=options.title
        )
        print(f"wrote {options.out}, a LoRA of {count} layers")
        return

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


def export_onnx(options: argparse.Namespace) -> None:
    """The same for ONNX: networks, tokenizers and sampling.json in a folder."""
    if options.dtype != "float32":
        raise ValueError(
            f"--dtype {options.dtype} is not for ONNX, which is written in float32; leave it away, or give --quantize"
            " int8 for smaller files"
        )
    if options.variant:
        raise ValueError("--variant is diffusers', not of --format onnx; leave it away")
    if options.quantize not in (None, "int8"):
        raise ValueError(f"--quantize {options.quantize} is not known here; give int8, or leave it away for float32")
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f"ONNX needs {', '.join(missing)}, not installed here; run: pip install -e '.[onnx]'")

    from inference.export.onnx_export import OPSET, quantize, to_onnx
    from inference.pipeline import Pipeline
    from models.folder import publish

    pipeline, opset = Pipeline.load(options.checkpoint, weights=options.weights, device="cpu"), options.opset or OPSET

    def write(aside: Path) -> None:
        about = to_onnx(pipeline, aside, options.title or options.out.stem, opset=opset)
        for file, apart in about["differences"].items():
            print(f"{file}: within {apart:.1e} of torch")
        if options.quantize:
            error = quantize(aside)
            before, after = (size / 1e6 for size in error["bytes"])
            print(
                f"int8: {after:,.1f} MB instead of {before:,.1f}; pictures in [0, 1] differ by {error['mean']:.4f} in"
                f" the mean and {error['largest']:.4f} at most"
            )

    publish(options.out, write)
    print(
        f"wrote {options.out}, ONNX of opset {opset}; draw with: python -m inference.export.onnx_sample {options.out}"
    )


if __name__ == "__main__":
    main()
