"""What an export says of itself: a pipeline's model card, and a single file's metadata.

The card has Python that draws with diffusers alone, and what the public class does otherwise than our sampler.
"""

import json
from datetime import UTC, datetime
from inspect import signature
from typing import Any

from torch import nn

from diffusion.objective import NetworkTime
from diffusion.sample import ETA, Sampler
from diffusion.schedule import Betas, Path
from inference.description import plain
from inference.export.scheduler import PREDICTIONS, walked
from inference.export.single_file import modelspec
from inference.pipeline import Pipeline

FIRST_ORDER = (Sampler.euler, Sampler.ode_euler, Sampler.ddim, Sampler.ddpm, Sampler.euler_ancestral)
OBJECTIVE = "triptych.objective"  # a single file's whole objective, as in pipeline.json


def model_card(pipeline: Pipeline, public: Any, title: str) -> str:
    """README.md with the front matter that model hubs read."""
    description, name = pipeline.description, type(public).__name__
    sampler, objective = description.sampler, description.objective
    task = "text-to-image" if description.text else "unconditional-image-generation"
    times = walked(public.scheduler, sampler.steps)
    size = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    rows = {
        "network": f"{type(pipeline.denoiser).__name__}, {size:,} parameters",
        "prediction": f"{objective.prediction.name}, path {objective.path.name}",
        "scheduler": type(public.scheduler).__name__,
        "resolution": f"{description.resolution} px",
        "noise times of its steps": f"{times[0]:.4f}, {times[1]:.4f}, ... {times[-2]:.4f}, {times[-1]:.0f}",
    }
    lines = [
        f"---\nlibrary_name: diffusers\npipeline_tag: {task}\ntags: [triptych, {objective.prediction.name}]\n---\n",
        f"# {title}\n",
        f"A `{name}` of diffusers, trained with Triptych. It needs no code of Triptych:\n",
        f"```python\n{snippet(pipeline, public)}\n```\n",
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items()) + "\n",
    ]
    if notes := departures(pipeline):
        lines += ["What Triptych's sampler does that this class does not:\n", *(f"* {note}" for note in notes), ""]
    return "\n".join(lines)


def snippet(pipeline: Pipeline, public: Any) -> str:
    """Python that draws a picture with diffusers alone: as our sampler draws it, or, of a refiner, finishes one."""
    description = pipeline.description
    sampler, text, side = description.sampler, description.text, description.resolution
    known = signature(type(public).__call__).parameters
    call: dict[str, Any] = {"guidance_scale": sampler.guidance, "num_inference_steps": sampler.steps}
    if hasattr(public.scheduler, "shift"):  # FlowMatchEuler
        call["sigmas"] = f"[1 - i / {sampler.steps} for i in range({sampler.steps})]"
    if "height" in known:
        call |= {"height": side, "width": side}
    if "image" in known:
        call["image"] = 'Image.open("picture.png")'
    if "use_resolution_binning" in known:
        call |= {"use_resolution_binning": False, "clean_caption": False}
    if text and "max_sequence_length" in known:
        call["max_sequence_length"] = text.length or text.empty
    if sampler.rescale and "guidance_rescale" in known:
        call["guidance_rescale"] = sampler.rescale
    subject = '"a photograph of a red apple"' if text else "class_labels=[0]"
    arguments = ", ".join([subject, *(f"{key}={value}" for key, value in call.items())])
    absent = "".join(f", {key}=None" for key in ("text_encoder_3", "tokenizer_3") if getattr(public, key, 0) is None)
    return (
        "from diffusers import DiffusionPipeline\n"
        + ("from PIL import Image\n" if "image" in call else "")
        + f'\npipeline = DiffusionPipeline.from_pretrained("this folder"{absent})\n'
        + f"pipeline({arguments}).images[0]"
    )


def departures(pipeline: Pipeline) -> list[str]:
    """What no public class can be told."""
    sampler, objective = pipeline.description.sampler, pipeline.description.objective
    config, notes = pipeline.denoiser.config, []
    if list(sampler.interval) != [0.0, 1.0]:
        notes.append(f"guides only at noise times {sampler.interval[0]:g} to {sampler.interval[1]:g}")
    if sampler.rescale:
        notes.append("rescales guidance by the contrast of the clean picture, not of the prediction")
    eta = ETA.get(sampler.name, 0.0) if sampler.eta is None else sampler.eta
    if eta:
        notes.append(f"adds fresh noise in every step (eta {eta:g})")
    if sampler.name not in FIRST_ORDER:
        notes.append(f"takes steps of second order or higher ({sampler.name.name})")
    if sampler.grid not in (None, pipeline.objective.default_grid):
        notes.append(f"spaces its steps by the grid {sampler.grid.name}")
    if getattr(config, "positions", None) == "centre":
        notes.append(
            f"anchors positions by their centre: the same at {pipeline.description.resolution} px, not at other sizes"
        )
    if objective.path is Path.vp and objective.shift != 1:
        notes.append(f"spaces its steps with a shift of {objective.shift:g}")
    return notes


def file_metadata(pipeline: Pipeline, modules: dict[str, nn.Module], title: str) -> dict[str, str]:
    """Metadata of a single file of these public modules. ValueError if its readers would take it for something else."""
    description = pipeline.description
    objective = description.objective
    if objective.path is Path.vp and (
        objective.network_time is not NetworkTime.index or objective.betas is not Betas.scaled_linear
    ):
        raise ValueError(
            f"objective.network_time={objective.network_time.name} with betas={objective.betas.name}, but readers of"
            " single files tell networks the index of scaled_linear betas; export this one with --format diffusers"
        )
    about = modelspec(
        modules,
        title=title,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        resolution=(description.resolution, description.resolution),
        prediction_type=PREDICTIONS[objective.prediction].removesuffix("_prediction"),
        zero_terminal_snr=objective.zero_terminal,
    )
    return about | {OBJECTIVE: json.dumps(plain(objective))}
