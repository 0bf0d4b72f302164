"""Representation alignment (REPA, Yu et al. 2024, arXiv:2410.06940): a denoiser's early blocks learn from an encoder.

    loss += weight (1 - cos(projector(h_k), f(x0)))        the mean over tokens

h_k are the tokens after `model.align_depth` blocks of the noisy latent, f the features of the clean picture where the
token lies, from a frozen encoder of patches. Only the blocks before k learn from it. The projector (the denoiser's own,
of two linears where the paper has three) is trained, averaged, saved and resumed with the denoiser; sampling does not
call it, and exports leave it out.

An encoder of three channels looks at the decoded picture, which is decoded in every step since shards hold latents
alone: that may cost more than the step itself. One of the latent's own channels looks at x0 itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.base import ModelConfig
from models.layers import take
from models.pretrained import FrozenConfig


@dataclass(slots=True, kw_only=True)
class AlignConfig(FrozenConfig):
    """Where the encoder is, a transformers folder or hub name (DINOv2, CLIP), and what its loss weighs: 0 for none."""

    group: ClassVar[str] = "align"

    path: str = "facebook/dinov2-base"
    subfolder: str = ""  # of path; "": path itself
    weight: float = 0.0  # the paper's 0.5

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"align.weight={self.weight} is negative; choose 0 for none, or 0.5")

    def build(self, model: ModelConfig, autoencoder: Autoencoder) -> "Alignment":
        """Load the encoder, frozen; ValueError if it is none of patches, or not what the model is made for."""
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading a file: it would break into ours
        module = self.network(AutoModel, self.subfolder)
        module = getattr(module, "vision_model", module)
        options = module.config
        if not hasattr(options, "patch_size") or not hasattr(options, "num_channels"):
            raise ValueError(
                f"align.path={self.path} is a {type(module).__name__}, no encoder of a picture's patches;"
                " choose a DINOv2 or CLIP"
            )
        if options.hidden_size != (width := getattr(model, "align_dim", 0)):
            raise ValueError(
                f"model.align_dim={width}, but the encoder of align.path={self.path} has features of"
                f" {options.hidden_size}; give model.align_dim={options.hidden_size}"
            )
        if options.num_channels not in (3, autoencoder.channels):
            raise ValueError(
                f"align.path={self.path} looks at {options.num_channels} channels, neither 3 nor the"
                f" {autoencoder.channels} of the latents; choose another encoder"
            )
        return Alignment(module.to(self.precision.value), self, model.patch_size, autoencoder)

    def colours(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the pictures that the encoder was made for, in [0, 1]."""
        from transformers.image_processing_base import ImageProcessingMixin

        described, _ = self.read(ImageProcessingMixin.get_image_processor_dict, self.subfolder)
        return described["image_mean"], described["image_std"]


def check_alignment(config: AlignConfig, model: ModelConfig, adapts: bool = False) -> None:
    """Refuse a loss without a projector, and a projector that nothing trains."""
    if bool(config.weight) != bool(width := getattr(model, "align_dim", 0)):
        raise ValueError(
            f"align.weight={config.weight} with model.align_dim={width}; give both, of a transformer, or neither:"
            " align_dim is the width of the encoder's features"
        )
    if config.weight and adapts:
        raise ValueError(
            f"align.weight={config.weight} trains a projector, but lora.rank trains adapters alone;"
            " give align.weight=0 and model.align_dim=0, or lora.rank=null"
        )


class Alignment(nn.Module):
    """The frozen encoder and its loss."""

    def __init__(self, encoder: Any, config: AlignConfig, patch_size: int, autoencoder: Autoencoder):
        super().__init__()
        self.encoder, self.config, self.patch_size = encoder, config, patch_size
        self.decode: Callable[[Tensor], Tensor] | None = None
        if encoder.config.num_channels == 3:
            self.decode = autoencoder.decode
            self.colours = [torch.tensor(k)[:, None, None] for k in config.colours()]
        named = signature(encoder.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in named else {}

    @torch.no_grad()
    def features(self, x0: Tensor) -> Tensor:
        """What the encoder says of clean latents (b, c, h, w), at the denoiser's tokens: (b, n, d) float32.

        Pixels are scaled until the encoder has as many patches as the denoiser; its patches of a latent are averaged.
        """
        with torch.autocast(x0.device.type, enabled=False):
            return self._features(x0)

    def _features(self, x0: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in x0.shape[2:])
        cell, x = self.encoder.config.patch_size, x0
        if self.decode is not None:
            size = (rows * cell, columns * cell)
            x = F.interpolate(self.decode(x0), size, mode="bicubic", antialias=True).clamp(-1, 1)
            mean, std = (k.to(x.device) for k in self.colours)
            x = ((x + 1) / 2 - mean) / std
        tokens = self.encoder(x.to(self.encoder.dtype), **self.options).last_hidden_state
        patches = x.shape[2] // cell, x.shape[3] // cell
        grid = tokens[:, -patches[0] * patches[1] :].mT.unflatten(2, patches)  # others, of the whole, come first
        return F.adaptive_avg_pool2d(grid.float(), (rows, columns)).flatten(2).mT

    def loss(self, projected: Tensor, x0: Tensor, kept: Tensor | None = None) -> Tensor:
        """weight (1 - cosine) of each image, (b,); projected (b, n, d), or (b, k, d) of the tokens `kept` (b, k)."""
        wanted = self.features(x0)
        if kept is not None and projected.shape[1] < wanted.shape[1]:
            wanted = take(wanted, kept)
        return self.config.weight * (1 - F.cosine_similarity(projected.float(), wanted, dim=-1)).mean(1)
