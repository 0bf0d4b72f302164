"""Draw pictures from a checkpoint.

python scripts/sample.py --checkpoint assets/shapes/pipeline --prompt "a small red circle above a large blue star"
python scripts/sample.py --checkpoint outputs/stage1 --class-id 7 --num-images 4
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse, draw, save PNGs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint or exported pipeline")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--class-id", action="append", type=int, help="for models conditioned on classes")
    parser.add_argument("--num-images", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--size", metavar="HxW", help="in pixels; default: as trained")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler", help="euler, heun or ddim")
    parser.add_argument("--guidance", type=float, help="1: none")
    parser.add_argument("--weights", default="ema", choices=("ema", "model"))
    parser.add_argument("--out", type=Path, default=Path("outputs/pictures"))
    options = parser.parse_args()
    try:
        draw(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def draw(options: argparse.Namespace) -> None:
    """Load once, draw everything in one batch, name files by seed."""
    from dataclasses import replace

    from PIL import Image

    from diffusion.sample import Sampler
    from inference.pipeline import Pipeline

    subjects = options.prompt or options.class_id
    if not subjects or (options.prompt and options.class_id):
        raise ValueError("give --prompt or --class-id, one of the two")
    changed = {key: value for key in ("steps", "guidance") if (value := getattr(options, key)) is not None}
    if options.sampler:
        if options.sampler not in Sampler.__members__:
            raise ValueError(f"--sampler {options.sampler} is unknown; choose one of {', '.join(Sampler.__members__)}")
        changed["name"] = Sampler[options.sampler]
    size = None
    if options.size:
        height, _, width = options.size.partition("x")
        if not (height.isdigit() and width.isdigit()):
            raise ValueError(f"--size {options.size} is not HEIGHTxWIDTH in pixels, such as 128x128")
        size = int(height), int(width)

    pipeline = Pipeline.load(options.checkpoint, weights=options.weights)
    repeated = [subject for subject in subjects for _ in range(options.num_images)]
    seeds = [options.seed + i for i in range(len(repeated))]
    pictures = pipeline.generate(
        repeated if options.prompt else None,
        class_ids=None if options.prompt else repeated,
        seeds=seeds,
        sampler=replace(pipeline.description.sampler, **changed),
        size=size,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for picture, seed, subject in zip(pictures, seeds, repeated, strict=True):
        path = options.out / f"{seed:06d}.png"
        Image.fromarray(picture).save(path)
        print(f"{path}  {subject}")


if __name__ == "__main__":
    main()
