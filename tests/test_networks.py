"""Both kinds of network keep the same promises: shapes, what a description may change, what padding may not."""

import math

import pytest
import torch

from index.errors import OptionError
from trainer.models.base import SIZES, NetworkConfig, count_flops, make_network

B, T = 6, 10
SHAPES = {"mlp": (3, 2, 2), "transformer": (4, 8, 8)}


def network_of(kind, *, size="tiny", seed=0, **options):
    torch.manual_seed(seed)
    channels, height, width = SHAPES[kind]
    shape = {"channels": channels, "height": height, "width": width, "text_dim": T}
    return make_network(NetworkConfig(kind=kind, size=size, **shape, **options))


def inputs(kind, *, tokens=0):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, math.prod(SHAPES[kind]), generator=g)
    return x, torch.randn(B, 1 + tokens, T, generator=g)


def same(a, b, **near):
    return all(torch.allclose(left, right, atol=1e-5, **near) for left, right in zip(a, b, strict=True))


kinds = pytest.mark.parametrize("kind", ["mlp", "transformer"])


@kinds
@pytest.mark.parametrize("size", list(SIZES)[:2])
def test_three_heads(kind, size):
    x, text = inputs(kind)
    guess = network_of(kind, size=size)(x, text)
    assert guess.distance.shape == guess.confidence.shape == (B,)
    assert guess.direction.shape == x.shape
    assert ((guess.confidence > 0) & (guess.confidence < 1)).all()
    # It starts near the distances that there are.
    assert abs(guess.distance.mean().item() / math.sqrt(x.shape[1]) - 1) < 0.6


@kinds
def test_a_description_counts_by_its_direction_and_may_be_left_out(kind):
    network, (x, text) = network_of(kind), inputs(kind)
    assert same(network(x, text), network(x, text * 7))
    assert not same(network(x, text), network(x, text.flip(0)))
    nothing = torch.zeros(B, dtype=torch.bool)
    blind = network(x, text, keep=nothing)
    assert same(blind, network(x, text.flip(0), keep=nothing))
    assert not same(network(x, text), blind)
    half = torch.arange(B) < 3
    mixed = network(x, text, keep=half)
    assert same([each[:3] for each in mixed], [each[:3] for each in network(x, text)])
    assert same([each[3:] for each in mixed], [each[3:] for each in blind])


@kinds
def test_time_and_span_are_read(kind):
    network, (x, text) = network_of(kind), inputs(kind)
    zero, some = torch.zeros(B), torch.full((B,), 0.5)
    assert same(network(x, text), network(x, text, time=zero, span=zero))
    assert not same(network(x, text), network(x, text, time=some))
    assert not same(network(x, text), network(x, text, span=some))


def test_token_states_are_read_and_padding_is_not():
    network, (x, text) = network_of("transformer", tokens=5), inputs("transformer", tokens=5)
    text[:, 4:] = 0
    assert same(network(x, text), network(x, text[:, :4]))
    other = text.clone()
    other[:, 3] = text[:, 2]
    assert not same(network(x, text), network(x, other))
    nothing = torch.zeros(B, dtype=torch.bool)
    assert same(network(x, text, keep=nothing), network(x, other, keep=nothing))


def test_a_patch_sees_the_others():
    network, (x, text) = network_of("transformer"), inputs("transformer")
    pictures = x.unflatten(1, SHAPES["transformer"]).clone()
    pictures[:, :, 0, 0] += 1
    moved = network(pictures.flatten(1), text).direction - network(x, text).direction
    assert (moved.unflatten(1, SHAPES["transformer"])[:, :, -1, -1].abs() > 1e-6).all()


@kinds
def test_gradients_reach_every_weight(kind):
    network, (x, text) = network_of(kind), inputs(kind)
    some = torch.rand(B)
    guess = network(x, text, keep=torch.arange(B) < 3, time=some, span=some)
    sum(each.square().sum() for each in guess).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None]
    assert still == []


def test_flops_of_an_mlp_are_two_per_weight_of_its_matrices():
    network = network_of("mlp")
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    assert count_flops(network) == 2 * matrices


def test_flops_of_a_transformer_grow_with_its_patches():
    """Sixteen patches of 2 x 2: per block 24 width^2 each for itself, half of cross attention, and attention itself."""
    network = network_of("transformer")
    width, patches, blocks, words = 192, 16, 6, 2
    each = patches * (2 * 12 * width**2 + 2 * 2 * width**2) + words * 2 * 2 * width**2
    attention = 4 * patches * (patches + words) * width
    assert count_flops(network) == pytest.approx(blocks * (each + attention), rel=0.1)


def test_the_kind_follows_the_latent(encoded):
    from dataclasses import replace

    assert NetworkConfig.of(encoded.meta, size="tiny").kind == "mlp"
    large = replace(encoded.meta, latent_shape=(4, 32, 32))
    config = NetworkConfig.of(large, size="tiny")
    assert (config.kind, config.tokens, config.latent_dim) == ("transformer", 77, 4096)
    assert NetworkConfig.of(large, size="tiny", kind="mlp").tokens == 0
    assert NetworkConfig.of(large, size="tiny", tokens=8).tokens == 8
    with pytest.raises(OptionError, match="--tokens 8 cannot be read by --network mlp"):
        NetworkConfig.of(encoded.meta, size="tiny", tokens=8)
