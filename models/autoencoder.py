"""Pixels to latents and back, through a frozen diffusers `AutoencoderKL`.

This module alone owns the image range, the scale and the shift. Everyone else sees latents of about unit
variance, `(z - shift) * scale`, and pixels in [-1, 1].
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.weights import locate


@dataclass(slots=True, kw_only=True)
class AutoencoderConfig:
    """Where the autoencoder is: a folder or hub name in diffusers layout."""

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    subfolder: str = "vae"
    revision: str | None = None

    def build(self) -> "Autoencoder":
        """Load it, frozen, in float32 (SDXL's is known to overflow in float16)."""
        from diffusers import AutoencoderKL  # slow to import, so only when one is wanted

        module: Any = AutoencoderKL.from_pretrained(
            locate(self.path),
            subfolder=self.subfolder,
            revision=self.revision,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
        module.to(memory_format=torch.channels_last)  # 1.4 times faster on a CPU
        return Autoencoder(module, self.path)


class Autoencoder(nn.Module):
    """Frozen; `factor` pixels a side make one latent cell of `channels` numbers."""

    def __init__(self, module: nn.Module, path: str):
        super().__init__()
        self.module: Any = module.eval().requires_grad_(False)
        self.path = path
        config: Any = module.config
        self.scale: float = config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0
        self.channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] -> the posterior's mean, normalised: (b, c, h/factor, w/factor)."""
        return (self.module.encode(pixels).latent_dist.mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) normalised latents -> pixels, clamped to [-1, 1]."""
        return self.module.decode(latents / self.scale + self.shift).sample.clamp(-1, 1)

    def info(self) -> dict[str, Any]:
        """What a shard or checkpoint must say of the latents it holds; `id` is a digest of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return {
            "path": self.path,
            "id": digest.hexdigest()[:16],
            "scale": self.scale,
            "shift": self.shift,
            "channels": self.channels,
            "factor": self.factor,
            "image_range": [-1, 1],
        }
