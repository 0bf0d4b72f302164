"""The UNet alone: its start, what it reads, checkpoints, and what it refuses. Its twin is in test_interchange.py."""

import pytest
import torch

from models.base import Cond
from models.unet import UNetConfig

TINY = {"channels": [16, 32], "depths": [0, 1], "heads": [2, 4], "text_dim": 12, "groups": 8}


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return x, torch.tensor([0.2, 0.9]), Cond(text=text, text_mask=torch.arange(5)[None] < torch.tensor([[5], [2]]))


def stirred(**options):
    torch.manual_seed(0)
    model = UNetConfig(**(TINY | options)).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_start_says_nothing():
    x, t, cond = inputs()
    assert UNetConfig(**TINY).build()(x, t, cond).abs().max() == 0


def test_padding_is_not_read_and_text_is():
    model, (x, t, cond) = stirred(), inputs()
    out = model(x, t, cond)
    assert cond.text is not None
    cond.text = cond.text.clone()
    cond.text[1, 2:] = float("nan")
    assert torch.equal(model(x, t, cond), out)
    cond.text[1, 1] += 1
    changed = model(x, t, cond)
    assert torch.equal(changed[0], out[0])
    assert not torch.allclose(changed[1], out[1])


def test_times_and_sizes_are_told_apart():
    model, (x, t, cond) = stirred(vector_dim=6 + 2 * 256), inputs()
    cond.pooled, cond.size_ids = torch.ones(2, 6), torch.tensor([[64, 128], [64, 128]])
    out = model(x, t, cond)
    assert (model(x, t + 0.001, cond) - out).norm() > 1e-4 * out.norm()
    cond.size_ids = cond.size_ids + 1
    assert (model(x, t, cond) - out).norm() > 1e-4 * out.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 2}, "patch_size=2 but a UNet works on single cells"),
        ({"heads": [2]}, "must name the same levels"),
        ({"channels": [16, 36]}, "36, which is not a multiple of model.groups=8"),
        ({"heads": [2, 5]}, "and of its 5 heads"),
        ({"depths": [0, -1]}, "has a negative depth"),
        ({"layers": 0}, "model.layers=0 is not positive"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**(TINY | options))


def test_what_is_missing_is_named():
    x, t, cond = inputs()
    model = stirred(vector_dim=6 + 2 * 256)
    with pytest.raises(ValueError, match="cond.pooled is None but model.vector_dim=518"):
        model(x, t, cond)
    cond.pooled, cond.size_ids = torch.ones(2, 6), torch.ones(2, 6)
    with pytest.raises(ValueError, match="of 6 and 256 for each of 6 size_ids make 1542"):
        model(x, t, cond)
    with pytest.raises(ValueError, match="in_channels=4 but the latent has 3 channels"):
        stirred()(x[:, :3], t, cond)
