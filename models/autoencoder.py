"""Pixels to latents and back, through a frozen diffusers `AutoencoderKL`.

This module alone owns the image range, the scale and the shift. Everyone else sees latents of about unit
variance, `(z - shift) * scale`, and pixels in [-1, 1]. Both are one number, or one a channel where the autoencoder's
config has `latents_mean` and `latents_std`: then, as in diffusers, shift = mean and scale = scaling_factor / std.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.pretrained import FrozenConfig, FrozenPrecision


@dataclass(slots=True, kw_only=True)
class AutoencoderConfig(FrozenConfig):
    """Where the autoencoder is: a folder or hub name in diffusers layout.

    latents_mean: of each channel of z, instead of the folder's scale and shift; [] for those. latents_std: the
    deviations, likewise. `scripts/inspect_data.py` measures both, of the latents that a data set holds.
    """

    group: ClassVar[str] = "vae"

    subfolder: str = "vae"  # of path; "": path itself
    latents_mean: list[float] = field(default_factory=list)
    latents_std: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        mean, std = self.latents_mean, self.latents_std
        if len(mean) != len(std) or not all(deviation > 0 for deviation in std):
            raise ValueError(
                f"vae.latents_mean={mean} and vae.latents_std={std} must be one number a channel each, deviations above"
                " 0; give both, or [] for the autoencoder's own scale and shift"
            )

    def build(self) -> "Autoencoder":
        """Load it, frozen; one whose config says `force_upcast` (SDXL's) overflows in float16 and gets float32."""
        from diffusers import AutoencoderKL  # slow to import, so only when one is wanted

        # in float32 whatever the precision: its digest is taken of these numbers
        module = self.network(AutoencoderKL, self.subfolder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        module.to(memory_format=torch.channels_last)  # 1.4 times faster on a CPU
        if self.latents_mean:
            if len(self.latents_mean) != (channels := module.config.latent_channels):
                raise ValueError(
                    f"vae.latents_mean={self.latents_mean} has {len(self.latents_mean)} numbers, but the latents of"
                    f" vae.path={self.path} have {channels} channels; give one a channel"
                )
            module.register_to_config(
                latents_mean=self.latents_mean, latents_std=self.latents_std, scaling_factor=1.0, shift_factor=None
            )
        config = self
        if self.precision is FrozenPrecision.fp16 and module.config.force_upcast:
            warnings.warn(
                f"vae.precision=fp16, but the config of vae.path={self.path} asks for more (force_upcast);"
                " it computes in fp32, and vae.precision=bf16 would be faster",
                stacklevel=2,
            )
            config = replace(self, precision=FrozenPrecision.fp32)
        return Autoencoder(module, config)


class Autoencoder(nn.Module):
    """Frozen; `factor` pixels a side make one latent cell of `channels` numbers."""

    def __init__(self, module: Any, config: AutoencoderConfig):
        super().__init__()
        self.digest = _digest(module)
        self.module: Any = module
        self.to(config.precision.value)
        self.config = config
        self.scale: float | Tensor = module.config.scaling_factor
        self.shift: float | Tensor = getattr(module.config, "shift_factor", None) or 0.0
        mean, std = (getattr(module.config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and std is not None:
            del self.scale, self.shift
            self.register_buffer("scale", module.config.scaling_factor / column(std), persistent=False)
            self.register_buffer("shift", column(mean), persistent=False)
        self.channels: int = module.config.latent_channels
        self.factor: int = factor_of(module.config)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] -> the posterior's mean, normalised: (b, c, h/factor, w/factor) float32."""
        return self.moments(pixels)[0]

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) in [-1, 1] -> the posterior's mean and deviation, normalised: (b, c, h/factor, w/factor)."""
        posterior = self.module.encode(pixels.to(self.module.dtype)).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scale
        return self.config.require_finite(mean, "latents"), posterior.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) normalised latents -> pixels, clamped to [-1, 1]: float32."""
        z = (latents / self.scale + self.shift).to(self.module.dtype)
        return self.config.require_finite(self.module.decode(z).sample.float(), "pixels").clamp(-1, 1)

    def tile(self, side: int = 512) -> None:
        """From now on encode and decode in overlapping tiles of `side` pixels, where a picture is larger: less memory.

        Each tile has statistics of its own in the decoder's GroupNorm, so the picture changes a little.
        """
        self.module.enable_tiling()
        self.module.tile_sample_min_size, self.module.tile_latent_min_size = side, side // self.factor

    def info(self) -> dict[str, Any]:
        """What a shard or checkpoint must say of the latents it holds; `id` is a digest of weights and statistics."""
        return {
            "path": self.config.path,
            "id": self.digest,
            "scale": numbers(self.scale),
            "shift": numbers(self.shift),
            "channels": self.channels,
            "factor": self.factor,
            "image_range": [-1, 1],
        }


def column(values: Sequence[float]) -> Tensor:
    """One number a channel, as (c, 1, 1)."""
    return torch.tensor(list(values), dtype=torch.float32)[:, None, None]


def numbers(value: float | Tensor) -> float | list[float]:
    """A scale or shift as JSON knows it."""
    return value.flatten().tolist() if isinstance(value, Tensor) else value


def factor_of(config: Mapping[str, Any]) -> int:
    """Pixels to a latent cell, a side, of a public autoencoder's config: every level but the last halves."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for name in ("latents_mean", "latents_std"):
        if (values := getattr(module.config, name, None)) is not None:
            digest.update(f"{name}{list(map(float, values))}".encode())
    return digest.hexdigest()[:16]
