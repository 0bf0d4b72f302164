"""Pixels to latents and back, through a frozen diffusers `AutoencoderKL`.

This module alone owns the image range, the scale and the shift. Everyone else sees latents of about unit
variance, `(z - shift) * scale`, and pixels in [-1, 1].
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.pretrained import FrozenConfig, FrozenPrecision


@dataclass(slots=True, kw_only=True)
class AutoencoderConfig(FrozenConfig):
    """Where the autoencoder is: a folder or hub name in diffusers layout."""

    group: ClassVar[str] = "vae"

    subfolder: str = "vae"

    def build(self) -> "Autoencoder":
        """Load it, frozen; one whose config says `force_upcast` (SDXL's) overflows in float16 and gets float32."""
        from diffusers import AutoencoderKL  # slow to import, so only when one is wanted

        # in float32 whatever the precision: its digest is taken of these numbers
        module = self.network(AutoencoderKL, self.subfolder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        module.to(memory_format=torch.channels_last)  # 1.4 times faster on a CPU
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
        self.scale: float = module.config.scaling_factor
        self.shift: float = getattr(module.config, "shift_factor", None) or 0.0
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
        """What a shard or checkpoint must say of the latents it holds; `id` is a digest of the weights."""
        return {
            "path": self.config.path,
            "id": self.digest,
            "scale": self.scale,
            "shift": self.shift,
            "channels": self.channels,
            "factor": self.factor,
            "image_range": [-1, 1],
        }


def factor_of(config: Mapping[str, Any]) -> int:
    """Pixels to a latent cell, a side, of a public autoencoder's config: every level but the last halves."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
