"""Tokens that skip blocks: the others see what they would alone, at their own places; all come back to theirs."""

import pytest
import torch

from models.base import Cond
from models.ccdit import CCDiTConfig
from models.interchange import to_diffusers
from models.mmdit import MMDiTConfig
from models.pixart import PixArtConfig
from models.surgery import transfer

SMALL = {"hidden": 32, "depth": 4, "heads": 2, "in_channels": 4, "base_size": 8}
TEXT = Cond(text=torch.randn(2, 5, 16), text_mask=torch.arange(5) < torch.tensor([[3], [5]]), pooled=torch.randn(2, 16))
NETWORKS = {
    "ccdit": (CCDiTConfig, {"num_classes": 3}, Cond(class_id=torch.tensor([0, 2]))),
    "pixart": (PixArtConfig, {"text_dim": 16}, TEXT),
    "mmdit": (MMDiTConfig, {"text_dim": 16, "pooled_dim": 16, "dual": 2}, TEXT),
}
KEPT = torch.tensor([[0, 3, 5, 6, 9, 10, 12, 15], [1, 2, 4, 7, 8, 11, 13, 14]])
SKIPPED = torch.tensor([[i for i in range(16) if i not in row] for row in KEPT.tolist()])


def network(name, **options):
    """A small network none of whose weights are zero, its inputs, and its condition."""
    torch.manual_seed(0)
    config_class, own, cond = NETWORKS[name]
    denoiser = config_class(**SMALL | own | options).build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return denoiser, torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), cond


def patches(x):
    """(b, c, 8, 8) -> (b, 16, 4c): tokens in reading order."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_tokens_kept_is_the_plain_network(name):
    denoiser, x_t, t, cond = network(name, route=0.5, route_blocks=[1, 2])
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(denoiser(x_t, t, cond, every), denoiser(x_t, t, cond), rtol=1e-5, atol=1e-5)
    plain, *_ = network(name)
    assert torch.equal(denoiser(x_t, t, cond), plain(x_t, t, cond))  # without `kept`, sampling sees all tokens


@pytest.mark.parametrize("name", NETWORKS)
def test_kept_tokens_see_one_another_alone_and_the_others_pass_by(name):
    """With every block on the route, what a token's output depends on says whom it met."""
    denoiser, x_t, t, cond = network(name, route=0.5, route_blocks=[0, 3])
    x_t.requires_grad_()
    output = patches(denoiser(x_t, t, cond, KEPT))
    for row in (0, 1):
        for tokens, met in ((KEPT[row], KEPT[row]), (SKIPPED[row][:1], SKIPPED[row][:1])):
            (gradient,) = torch.autograd.grad(output[row, tokens].square().sum(), x_t, retain_graph=True)
            reached = patches(gradient)[row].abs().sum(1).nonzero().flatten()
            assert torch.equal(reached, met)
            assert patches(gradient)[1 - row].abs().max() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_keep_their_places_and_gradients(name):
    """Against the blocks called one by one on chosen rows, each row by itself."""
    denoiser, x_t, t, cond = network(name, route=0.5, route_blocks=[1, 2])
    routed = denoiser(x_t, t, cond, KEPT)
    for row in (0, 1):
        one, mine = cond.select(slice(row, row + 1)), slice(row, row + 1)
        walk, places = denoiser.walk, KEPT[row]

        def by_hand(x, step, kept, places=places):
            x = step(denoiser.blocks[0], x)
            inside = step(denoiser.blocks[2], step(denoiser.blocks[1], x[:, places]))
            x = torch.stack([inside[0, places.tolist().index(i)] if i in places else x[0, i] for i in range(16)])[None]
            return step(denoiser.blocks[3], x), x

        denoiser.walk = by_hand
        alone = denoiser(x_t[mine], t[mine], one, KEPT[mine])
        denoiser.walk = walk
        torch.testing.assert_close(routed[mine], alone, rtol=1e-4, atol=1e-5)
    routed.square().sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": 1.0}, r"model.route=1.0 is no share of tokens to skip; choose 0 for none, or 0.5"),
        ({"route": 0.5}, r"model.route_blocks=\[\] is not the first and the last of the blocks 0 to 3 .* as \[1, 2\]"),
        ({"route": 0.5, "route_blocks": [2, 4]}, r"model.route_blocks=\[2, 4\] is not the first and the last"),
        (
            {"route": 0.5, "route_blocks": [1, 2], "kv_compression": 2, "kv_blocks": [2, 3]},
            r"model.route=0.5 leaves no grid for model.kv_compression=2 in the blocks 2 to 2; choose other",
        ),
        ({"align_dim": -1}, r"model.align_dim=-1 is no width"),
        ({"align_dim": 8}, r"model.align_depth=8 is not among the 4 blocks; choose about a third of them, 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PixArtConfig(**SMALL | options)


def test_compression_and_routes_may_lie_apart():
    PixArtConfig(**SMALL, route=0.5, route_blocks=[0, 1], kv_compression=2, kv_blocks=[2, 3])


def test_a_projector_is_neither_exported_nor_carried_over():
    options = {"align_dim": 8, "align_depth": 2, "positions": "corner", "as_diffusers": True}
    denoiser, x_t, t, cond = network("ccdit", **options, route=0.5, route_blocks=[2, 3])
    public = to_diffusers(denoiser)
    plain, *_ = network("ccdit", positions="corner", as_diffusers=True)
    account = transfer(denoiser, plain)
    assert {name.split(".")[0] for name in account.names("dropped")} == {"projector"}
    assert torch.equal(plain(x_t, t, cond), denoiser(x_t, t, cond))
    assert public.state_dict().keys() == to_diffusers(plain).state_dict().keys()
    shorter, *_ = network("ccdit", **options, depth=3, route=0.5, route_blocks=[1, 2])
    before = shorter.projector.fc1.weight.clone()
    assert set(transfer(denoiser, shorter).names("initialised")) == {
        f"projector.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")
    }
    assert torch.equal(shorter.projector.fc1.weight, before)
