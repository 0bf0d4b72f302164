"""From a checkpoint to pictures: everything that samples, samples through here.

A checkpoint says how it was trained (`pipeline.json`: objective, autoencoder, text encoders, resolution), and the
pipeline obeys. What is drawn, and from what, is all said to the sampler through the one function that it asks,
denoise(z, t) -> x0:

    guidance      an affine combination of branches                           diffusion/guidance.py
    a refiner     another network's denoise from some noise time on, by default the one up to which it was trained
    inpainting    x0 is the given picture's outside the mask, so z stays on its noised copies there

Picture i depends on its own seed alone, so a batch gives what its members give one by one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.guidance import guided
from diffusion.objective import Objective
from diffusion.sample import Denoise, sample
from inference.condition import Along, Conditions, chunks_needed, of_classes, of_prompts
from inference.denoise import in_turn, outside, side_by_side
from inference.description import Description, SamplerConfig, find
from inference.device import Offload, Precision, best_device, precision
from inference.networks import Stacked, load_networks
from models.autoencoder import Autoencoder
from models.folder import sha256
from models.layers import sliced_attention
from models.text import Conditioner
from models.weights import locate

HANDOVER = 0.8  # SDXL's share of the steps before its refiner's
MOST_PIXELS = 2**20  # that the autoencoder decodes at once
PREVIEW_CELLS = 32  # a side, at most, of the latents that a preview decodes


class Pipeline:
    """Denoiser, objective, conditioner and autoencoder, ready to draw.

    `evaluations` counts the calls of the network in the last drawing; `attention_slices`, if set, is how many queries
    are attended for at once; `together` false runs the branches of guidance one after the other.
    """

    def __init__(
        self,
        denoiser: Any,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        description: Description,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.denoiser = denoiser
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.description = description
        self.objective = Objective(description.objective)
        self.device = torch.device(device)
        self.dtype = dtype
        self.attention_slices: int | None = None
        self.together = True
        self.evaluations = 0
        self.name, self.weights_file = "", Path()
        self._hash: str | None = None
        self._loras = Stacked()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        weights: str = "ema",
        device: torch.device | str | None = None,
        compute: Precision = Precision.auto,
        loras: Sequence[tuple[str | Path, float]] = (),
        offload: Offload = Offload.none,
    ) -> "Pipeline":
        """Open a run folder, a checkpoint, a pipeline of ours or one in diffusers' layout. `weights` is ema or model.

        A checkpoint of adapters is merged with its base. `loras` are files and their weights, added for good; those of
        `set_loras` can be changed.
        """
        if compute is Precision.fp8:
            raise ValueError("compute=fp8 is for training; choose bf16, which draws what such a model learnt")
        device = torch.device(device or best_device())
        folder = Path(locate(str(path)))
        if (folder / "model_index.json").is_file():
            from inference.export.start import from_public

            start = from_public(str(path))
            description, denoiser = start.description, start.denoiser
            text = description.text.build() if description.text else None
            source = next(iter(sorted(folder.glob("*/diffusion_pytorch_model*.safetensors"))), folder)
        else:
            folder = find(path)
            description, denoiser, text = load_networks(folder, weights)
            source = folder / "denoiser" / f"{weights}.safetensors"
        if loras:
            from inference.lora import apply

            apply(denoiser, text, loras)
        conditioner = Conditioner(text, description.num_classes, getattr(denoiser.config, "vector_dim", 0))
        dtype = precision(compute, device)
        pipeline = cls(denoiser.eval(), conditioner, description.vae.build(), description, device, dtype)
        pipeline.name, pipeline.weights_file = Path(path).name, source
        if offload is Offload.none:
            for part in filter(None, (denoiser, text, pipeline.autoencoder)):
                part.to(device)
        else:
            from inference.offload import offload_parts

            offload_parts(pipeline, offload)
        return pipeline

    def set_loras(self, loras: Sequence[tuple[str | Path, float]]) -> None:
        """Draw with these LoRA files, each with its weight, instead of those set before; [] is with none.

        What they change comes back bit for bit. ValueError if a file is not understood or does not fit, and then
        nothing is touched.
        """
        self._loras.set(self.denoiser, self.conditioner.text, loras)
        self.conditioner.forget()

    def model_hash(self) -> str:
        """The first ten digits of the SHA-256 of the denoiser's file, "" where it came from none."""
        if self._hash is None:
            self._hash = sha256(self.weights_file)[:10] if self.weights_file.is_file() else ""
        return self._hash

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        negative: str | Sequence[str] = "",
        class_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        size: tuple[int, int] | None = None,
        times: Tensor | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float = 1.0,
        refiner: "Pipeline | None" = None,
        handover: float | None = None,
        progress: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> np.ndarray:
        """Draw one picture for each prompt, or for each class: (b, height, width, 3) uint8.

        `negative` is one for all or one for each. `seeds` has one number a picture, `size` is (height, width) in
        pixels, `times` are noise times to walk down to 0 instead of `sampler.steps` on the objective's grid.

        `image` (height, width, 3) uint8 is drawn over: the last `strength` of the steps are walked from its noised
        copy, from pure noise if that is 1. `mask` (height, width), true where to paint, keeps the rest as it is. After
        the share `handover` of the steps `refiner` goes on; None: from the noise time up to which it was trained.
        `progress(step, z, x0)` is called after each step; an exception that it raises ends the drawing.
        """
        if size is None and image is not None:
            size = (image.shape[0], image.shape[1])
        latents = self.draw(
            prompts, negative=negative, class_ids=class_ids, seeds=seeds, sampler=sampler, size=size, times=times,
            image=image, mask=mask, strength=strength, refiner=refiner, handover=handover, progress=progress,
        )  # fmt: skip
        pictures = self.decode(latents)
        if image is not None and mask is not None:
            pictures = np.where(np.asarray(mask, bool)[None, ..., None], pictures, image)
        return pictures

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str] | None = None,
        *,
        negative: str | Sequence[str] = "",
        class_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        size: tuple[int, int] | None = None,
        times: Tensor | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float = 1.0,
        refiner: "Pipeline | None" = None,
        handover: float | None = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        z: Tensor | None = None,
        progress: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> Tensor:
        """`generate`, before the autoencoder: latents (b, c, h, w).

        Of all steps those between the shares `denoising_start` and `denoising_end` are walked, beginning at `z`, the
        latents of a drawing that ended there.
        """
        subjects = prompts if prompts is not None else class_ids or []
        count = len(subjects)
        negatives = [negative] * count if isinstance(negative, str) else list(negative)
        seeds = list(range(count)) if seeds is None else list(seeds)
        for name, given in (("seeds", seeds), ("negative", negatives)):
            if len(given) != count:
                raise ValueError(f"{name} has {len(given)} entries for {count} pictures; give one a picture")
        shares = {"handover": handover or 0.0, "denoising_start": denoising_start, "denoising_end": denoising_end}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is a share of the steps; choose 0 to 1")
        sampler = sampler or self.description.sampler
        size = size or (self.description.resolution, self.description.resolution)
        shape = self._latent_shape(size)
        times = self.times(sampler, size) if times is None else times
        steps = len(times) - 1
        known = None if image is None else self._encoded(image, size, count)
        painted = None if mask is None else self._painted(mask, image, size)
        first = round(denoising_start * steps) if known is None else steps - self.steps(sampler, strength, steps)
        last = round(denoising_end * steps)
        if first >= last:
            if known is not None:
                return known
            raise ValueError(f"denoising_start={denoising_start} leaves no step before {denoising_end}; choose less")
        self._require_range(times[first], begins=known is None and z is None)
        turn = 0.0
        if refiner:
            turn = refiner.takes_over(times, handover)
            refiner.join(self, turn)

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(_step: int = 0) -> Tensor:
            # drawn one picture at a time and on the CPU: the same whatever the batch and the device
            return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.device)

        self.evaluations = 0
        denoise = self._denoise(prompts, class_ids, negatives, sampler, size, times)
        if refiner:
            denoise = in_turn(denoise, refiner._denoise(prompts, class_ids, negatives, sampler, size, times), turn)
        if z is None:
            fresh, t = noise(), float(times[first])
            noised = fresh if known is None else (1 - t) * known + t * fresh
            z = noised if known is not None and first > 0 else self.objective.start(fresh, times[first:])
            if painted is not None and known is not None:
                z = torch.where(painted, z, noised)
        if painted is not None and known is not None:
            denoise = outside(painted, known, denoise)
        with sliced_attention(self.attention_slices):
            z = sample(
                sampler.name, denoise, z, times[first : last + 1], progress,
                eta=sampler.eta, noise=noise, tolerance=sampler.tolerance,
            )  # fmt: skip
        self.evaluations += refiner.evaluations if refiner else 0
        return z if painted is None or known is None or last < steps else torch.where(painted, z, known)

    def times(self, sampler: SamplerConfig, size: tuple[int, int] | None = None) -> Tensor:
        """The noise times that a picture of `size` pixels is walked through: (steps + 1,) float64."""
        _, h, w = self._latent_shape(size or (self.description.resolution, self.description.resolution))
        return sampler.times(self.objective, h * w)

    @staticmethod
    def steps(sampler: SamplerConfig, strength: float = 1.0, of: int | None = None) -> int:
        """How many of the steps are walked over a given picture."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength} is a share of the steps; choose 0 to keep the picture, up to 1")
        return round(strength * (of or sampler.steps))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (b, c, h, w) to pictures (b, height, width, 3) uint8, a megapixel at a time."""
        pixels_each = latents.shape[2] * latents.shape[3] * self.autoencoder.factor**2
        parts = [self.autoencoder.decode(part) for part in latents.split(max(1, MOST_PIXELS // pixels_each))]
        pixels = (torch.cat(parts) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def preview(self, x0: Tensor) -> np.ndarray:
        """A quick look at an x0 estimate (b, c, h, w): its picture, made small where it is large."""
        side = max(x0.shape[2:])
        if side > PREVIEW_CELLS:
            x0 = F.interpolate(x0, scale_factor=PREVIEW_CELLS / side, mode="area")
        return self.decode(x0)

    def _denoise(
        self,
        prompts: Sequence[str] | None,
        class_ids: Sequence[int] | None,
        negatives: Sequence[str],
        sampler: SamplerConfig,
        size: tuple[int, int],
        times: Tensor,
    ) -> Denoise:
        """What the sampler asks: this network's x0, guided, under the conditions of the step that a time lies in."""
        steps = len(times) - 1
        if prompts is None:
            if class_ids is None or self.conditioner.text is not None:
                self.conditioner(None, None)  # says what this model is conditioned on
            if any(negatives):
                raise ValueError("this model is conditioned on classes, which have no negative prompt; leave it away")
            conditions = of_classes(self.conditioner, class_ids or [], steps, self.device)
            return self._guided(conditions, sampler, times)
        groups: dict[int, list[int]] = {}
        for i, texts in enumerate(zip(prompts, negatives, strict=True)):
            groups.setdefault(chunks_needed(self.conditioner, texts, steps), []).append(i)
        parts = []
        for chunks, members in sorted(groups.items()):  # of one length: padding would change what a picture is shown
            texts = [prompts[i] for i in members], [negatives[i] for i in members]
            scores = sampler.aesthetic, sampler.negative_aesthetic
            conditions = of_prompts(self.conditioner, *texts, steps, chunks, size, scores, self.device)
            parts.append((members, self._guided(conditions, sampler, times)))
        return parts[0][1] if len(parts) == 1 else side_by_side(parts)

    def _guided(self, conditions: Conditions, sampler: SamplerConfig, times: Tensor) -> Denoise:
        starts = times[1:-1].tolist()

        def x0_of(z: Tensor, t: Tensor, along: Along) -> Tensor:
            now = float(t[0])
            step = sum(now <= start + 1e-6 for start in starts)
            return network(z, t, along.at(step))

        network = self.objective.denoise(self._network)
        null, negative = conditions.null, conditions.negative
        if negative is not None and sampler.negative_scale is None:
            null, negative = negative, None
        return guided(
            x0_of, conditions.positive, null, sampler.guidance,
            negative=None if negative is None else (negative, sampler.negative_scale or 0.0),
            rescale=sampler.rescale, interval=(sampler.interval[0], sampler.interval[1]), together=self.together,
        )  # fmt: skip

    def _network(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.evaluations += 1
        half: AbstractContextManager = nullcontext()
        if self.dtype is not torch.float32:
            half = torch.autocast(self.device.type, self.dtype)
        with half:
            return self.denoiser(x_t, t, cond).float()

    def _encoded(self, image: np.ndarray, size: tuple[int, int], count: int) -> Tensor:
        """The latents of a given picture, once for each to draw."""
        if image.dtype != np.uint8 or image.shape[-1:] != (3,) or image.shape[:2] != tuple(size):
            raise ValueError(
                f"the picture to draw over is {image.dtype} of shape {image.shape}; give uint8 of shape"
                f" {(*size, 3)}, as inference.picture.fit makes it"
            )
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.device) / 127.5 - 1
        return self.autoencoder.encode(pixels).expand(count, -1, -1, -1)

    def _painted(self, mask: np.ndarray, image: np.ndarray | None, size: tuple[int, int]) -> Tensor:
        """The cells (1, 1, h, w) that the mask touches."""
        if image is None:
            raise ValueError("a mask says where to paint on a picture, and there is none; give the picture too")
        if mask.shape != tuple(size):
            raise ValueError(f"the mask has the shape {mask.shape}, but the picture {tuple(size)}; give one as large")
        cells = F.max_pool2d(torch.from_numpy(np.asarray(mask, np.float32))[None, None], self.autoencoder.factor)
        if not cells.any():
            raise ValueError("the mask is empty, so nothing would be painted; make white what is to be drawn anew")
        return cells.to(self.device) > 0

    def _require_range(self, t: Tensor, begins: bool) -> None:
        """Refuse a network trained on a part of the times where it would have to begin outside of it."""
        top = self.description.objective.range[1]
        if (begins and top < 1) or float(t) > top + 1e-6:
            raise ValueError(
                f"this checkpoint was trained at noise times up to {top:g} only, and the drawing would begin at"
                f" {float(t):.3g}; draw over a picture with less strength, or give it as the refiner of another"
            )

    def takes_over(self, times: Tensor, handover: float | None) -> float:
        """The noise time of a hand-over to this network: after a share of the steps, or where its training ends."""
        steps, top = len(times) - 1, self.objective.t_max
        if handover is not None or self.description.objective.range[1] == 1:
            return float(times[round((HANDOVER if handover is None else handover) * steps)])
        if steps and float(times[-2]) > top + 1e-6:
            raise ValueError(
                f"the refiner {self.name} was trained up to noise time {top:.3g}, and the last of the {steps} steps"
                f" begins at {float(times[-2]):.3g}, so that it would draw nothing; choose more steps"
            )
        return top

    def join(self, base: "Pipeline", t: float = 0.0) -> None:
        """Make ready to go on where `base` is at time t; ValueError if that cannot be."""
        if self.autoencoder.digest != base.autoencoder.digest:
            raise ValueError(
                f"the refiner {self.name} was trained with the autoencoder {self.description.vae.path}, the base"
                f" {base.name} with {base.description.vae.path}; a refiner goes on with the same latents"
            )
        if t > (top := self.objective.t_max) + 1e-6:
            raise ValueError(
                f"the refiner {self.name} would take over at noise time {t:.3g}, but was trained up to"
                f" {top:.3g}; choose a later handover, nearer to 1"
            )
        self.evaluations = 0

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for a picture of `size` pixels, which must be whole patches."""
        height, width = size
        unit = self.autoencoder.factor * self.denoiser.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % unit:
                raise ValueError(
                    f"{name}={side} must be a multiple of {unit}, the autoencoder's factor times the patch;"
                    f" choose {max(unit, side // unit * unit)}"
                )
        return self.autoencoder.channels, height // self.autoencoder.factor, width // self.autoencoder.factor
