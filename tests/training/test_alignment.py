"""Alignment: what it adds to the loss, whom it teaches, where features come from, and that it survives a resume."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from diffusion.objective import Objective, ObjectiveConfig, Prediction
from diffusion.schedule import Path as NoisePath
from diffusion.timesteps import TimeLaw
from inference.pipeline import Pipeline
from models.autoencoder import AutoencoderConfig
from models.base import Cond
from models.ccdit import CCDiTConfig
from models.unet import UNetConfig
from training.alignment import AlignConfig, Alignment, check_alignment
from training.run import run
from training.step import kept_tokens, losses

SHAPES = {"path": "assets/shapes", "subfolder": "image_encoder"}
FLOW = Objective(ObjectiveConfig(prediction=Prediction.flow, path=NoisePath.linear, times=TimeLaw.uniform))


class Patches(nn.Module):
    """An encoder whose tokens are the means of patches, behind two that are no patches."""

    dtype = torch.float32

    def __init__(self, channels):
        super().__init__()
        self.config = SimpleNamespace(num_channels=channels, patch_size=2, hidden_size=channels)

    def forward(self, x):
        means = F.avg_pool2d(x, 2).flatten(2).mT
        return SimpleNamespace(last_hidden_state=torch.cat([torch.full_like(means[:, :2], 9.0), means], 1))


def network(**options):
    """A small network none of whose weights are zero."""
    torch.manual_seed(0)
    sizes = {"hidden": 16, "depth": 4, "heads": 2, "in_channels": 8, "base_size": 8, "num_classes": 4}
    denoiser = CCDiTConfig(**sizes | {"align_dim": 8, "align_depth": 2} | options).build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser


def losses_of(denoiser, alignment, x0):
    positions = torch.arange(len(x0))
    cond = Cond(class_id=positions % 4)
    return losses(denoiser, FLOW, x0, cond, positions, 3, len(x0), alignment)


def patches(weight=0.5, patch_size=2):
    return Alignment(Patches(8), AlignConfig(weight=weight), patch_size, None)


def test_it_adds_the_mean_of_one_minus_cosine():
    denoiser, x0 = network(), torch.randn(4, 8, 8, 8)
    seen = []
    denoiser.projector.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    (plain, unweighted, _), (more, same, _) = losses_of(denoiser, None, x0), losses_of(denoiser, patches(), x0)
    cosine = F.cosine_similarity(seen[0], F.avg_pool2d(x0, 2).flatten(2).mT, dim=2)
    torch.testing.assert_close(more - plain, 0.5 * (1 - cosine.mean(1)))
    assert torch.equal(unweighted, same)
    assert patches().loss(3 * F.avg_pool2d(x0, 2).flatten(2).mT, x0).abs().max() < 1e-6


@pytest.mark.parametrize("route", [{}, {"route": 0.5, "route_blocks": [1, 2]}])
def test_it_teaches_the_blocks_before_it_alone(route):
    denoiser, x0 = network(**route), torch.randn(4, 8, 8, 8)
    alignment = patches()
    (losses_of(denoiser, alignment, x0)[0] - losses_of(denoiser, None, x0)[0]).sum().backward()
    taught = {name for name, p in denoiser.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert {name for name in taught if name.startswith("blocks.")} == {
        name for name, _ in denoiser.named_parameters() if name.startswith(("blocks.0.", "blocks.1."))
    }
    assert "projector.fc2.weight" in taught
    assert not [name for name in taught if name.startswith("final.")]


def test_tokens_inside_a_route_are_compared_with_their_own_features():
    denoiser, x0 = network(route=0.5, route_blocks=[0, 3]), torch.randn(4, 8, 8, 8)
    seen = []
    denoiser.projector.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    more = losses_of(denoiser, patches(), x0)[0] - losses_of(denoiser, None, x0)[0]
    kept = kept_tokens(denoiser.config, x0.shape, torch.arange(4), 3, "cpu")
    means = F.avg_pool2d(x0, 2).flatten(2).mT
    wanted = torch.stack([means[i, kept[i]] for i in range(4)])
    torch.testing.assert_close(more, 0.5 * (1 - F.cosine_similarity(seen[0], wanted, dim=2).mean(1)))


def test_features_of_latents_are_those_of_where_the_token_lies():
    x0 = torch.randn(2, 8, 8, 16)
    torch.testing.assert_close(patches(patch_size=4).features(x0), F.avg_pool2d(x0, 4).flatten(2).mT)


def saved(kind, folder, **options):
    """A small encoder of pictures on disk, as the hub has them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    config_class = {CLIPVisionModel: CLIPVisionConfig, Dinov2Model: Dinov2Config}.get(kind, Dinov2WithRegistersConfig)
    module = kind(config_class(**sizes, **options)).eval()
    module.save_pretrained(folder)
    ImageProcessingMixin(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return module


@pytest.mark.parametrize("kind", [CLIPVisionModel, Dinov2Model, Dinov2WithRegistersModel])
def test_features_of_pictures_are_the_encoders_own(kind, tmp_path):
    """At its own size, and with as many patches as tokens at another."""
    module, vae = saved(kind, tmp_path), AutoencoderConfig(path="assets/shapes").build()
    alignment = AlignConfig(path=str(tmp_path), weight=0.5).build(
        CCDiTConfig(in_channels=8, patch_size=2, align_dim=16, align_depth=1), vae
    )
    x0 = vae.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    pixels = F.interpolate(vae.decode(x0), (16, 16), mode="bicubic", antialias=True).clamp(-1, 1)
    x = (pixels / 2 + 0.5 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        tokens = module(x).last_hidden_state
    torch.testing.assert_close(alignment.features(x0), tokens[:, tokens.shape[1] - 16 :], rtol=1e-4, atol=1e-5)
    assert alignment.features(torch.cat([x0, x0[..., :4]], 3)).shape == (2, 24, 16)
    assert not any(parameter.requires_grad for parameter in alignment.parameters())


def test_the_shapes_encoder_tells_what_is_where():
    """Two scenes in one latent, side by side: a token's features are nearest to those of its own scene at its place."""
    vae = AutoencoderConfig(path="assets/shapes").build()
    model = CCDiTConfig(in_channels=8, patch_size=2, align_dim=64, align_depth=1)
    alignment = AlignConfig(**SHAPES, weight=0.5).build(model, vae)
    from data import shapes

    stack = [shapes.render(shapes.scene(2, i), 64) for i in range(16)]
    x0 = vae.encode(torch.stack([torch.from_numpy(k.copy()) for k in stack]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    features = F.normalize(alignment.features(x0), dim=-1)
    again = F.normalize(alignment.features(x0 + 0.05 * torch.randn_like(x0)), dim=-1)
    assert features.shape == (16, 16, 64)
    nearest = torch.einsum("ind,jnd->ij", features, again).argmax(1)
    assert torch.equal(nearest, torch.arange(16))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: AlignConfig(weight=-1), r"align.weight=-1 is negative; choose 0 for none, or 0.5"),
        (
            lambda: check_alignment(AlignConfig(weight=0.5), CCDiTConfig()),
            r"align.weight=0.5 with model.align_dim=0; give both, of a transformer, or neither",
        ),
        (
            lambda: check_alignment(AlignConfig(), CCDiTConfig(align_dim=64)),
            r"align.weight=0.0 with model.align_dim=64",
        ),
        (
            lambda: check_alignment(AlignConfig(weight=0.5), CCDiTConfig(align_dim=64), adapts=True),
            r"align.weight=0.5 trains a projector, but lora.rank trains adapters alone; give align.weight=0 and",
        ),
        (lambda: check_alignment(AlignConfig(weight=0.5), UNetConfig()), r"align.weight=0.5 with model.align_dim=0"),
        (
            lambda: build(SHAPES, align_dim=48),
            r"model.align_dim=48, but the encoder of align.path=assets/shapes has features of 64; give .*align_dim=64",
        ),
        (
            lambda: build({"path": "assets/shapes", "subfolder": "text_encoder"}, align_dim=64),
            r"align.path=assets/shapes is a CLIPTextModel, no encoder of a picture's patches; choose a DINOv2 or CLIP",
        ),
    ],
)
def test_refusals(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


def build(where, channels=8, **options):
    vae = SimpleNamespace(channels=channels)
    return AlignConfig(**where, weight=0.5).build(CCDiTConfig(**options, align_depth=1), vae)


def test_an_encoder_of_other_latents_is_refused():
    with pytest.raises(ValueError, match=r"align.path=assets/shapes looks at 8 channels, neither 3 nor the 4 of"):
        build(SHAPES, channels=4, align_dim=64)


@pytest.mark.parametrize("route", [[], ["model.route=0.5", "model.route_blocks=[1,1]"]])
def test_the_projector_is_trained_resumed_and_of_no_matter_to_sampling(config, route):
    options = ["align=shapes", "model.align_depth=1", "train.images=32", *route]
    whole = config("stage3", *options, name="whole")
    parts = config("stage3", *options, "train.stop_at=16", name="parts")
    run(whole)
    run(parts)
    early = load_file(parts.folder / "checkpoints" / "16" / "denoiser" / "model.safetensors")
    parts.train.stop_at = None
    run(parts)
    a, b = (load_file(cfg.folder / "checkpoints" / "32" / "denoiser" / "model.safetensors") for cfg in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["projector.fc1.weight"], early["projector.fc1.weight"])
    assert Pipeline.load(whole.folder).generate(["a red circle"]).shape == (1, 128, 128, 3)
