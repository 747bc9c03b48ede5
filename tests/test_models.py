"""Both networks keep the same contract: shapes, conditioning, padding, and files that diffusers reads."""

import json
import math
from dataclasses import replace

import pytest
import torch

from index.errors import OptionError, RunError
from trainer.models import mlp, transformer
from trainer.models.base import SIZE_NAMES, count_flops
from trainer.models.mlp import LatentMLP
from trainer.models.registry import load_network, make_network
from trainer.models.transformer import LatentTransformer

B, T = 6, 10
SHAPES = {"mlp": (3, 2, 2), "transformer": (4, 8, 8)}


def build(name, *, seed=0, **options):
    torch.manual_seed(seed)
    if name == "mlp":
        return LatentMLP(SHAPES[name], T, *mlp.SIZES["tiny"], **options)
    return LatentTransformer(SHAPES[name], T, *transformer.SIZES["tiny"], **options)


def inputs(name, *, num_tokens=0):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, math.prod(SHAPES[name]), generator=g)
    return x, torch.randn(B, 1 + num_tokens, T, generator=g)


def same(a, b):
    return all(torch.allclose(left, right, atol=1e-5) for left, right in zip(a, b, strict=True))


both = pytest.mark.parametrize("name", ["mlp", "transformer"])


@both
def test_predictions_have_the_shapes_and_ranges_of_the_heads(name):
    x, text = inputs(name)
    prediction = build(name)(x, text)
    assert prediction.distance.shape == prediction.confidence.shape == (B,)
    assert prediction.direction.shape == x.shape
    assert ((prediction.confidence > 0) & (prediction.confidence < 1)).all()
    # A fresh network predicts distances near those in the data.
    assert abs(prediction.distance.mean().item() / math.sqrt(x.shape[1]) - 1) < 0.6


@both
def test_text_counts_by_its_direction_and_not_where_it_is_masked(name):
    network, (x, text) = build(name), inputs(name)
    conditional = network(x, text)
    assert same(conditional, network(x, text * 7))
    assert not same(conditional, network(x, text.flip(0)))
    none = torch.zeros(B, dtype=torch.bool)
    unconditional = network(x, text, cond_mask=none)
    assert same(unconditional, network(x, text.flip(0), cond_mask=none))
    assert not same(conditional, unconditional)
    mixed = network(x, text, cond_mask=torch.arange(B) < 3)
    assert same([each[:3] for each in mixed], [each[:3] for each in conditional])
    assert same([each[3:] for each in mixed], [each[3:] for each in unconditional])


@both
def test_time_and_step_size_change_predictions_and_default_to_zero(name):
    network, (x, text) = build(name), inputs(name)
    zero, half = torch.zeros(B), torch.full((B,), 0.5)
    assert same(network(x, text), network(x, text, time=zero, step_size=zero))
    assert not same(network(x, text), network(x, text, time=half))
    assert not same(network(x, text), network(x, text, step_size=half))


def test_token_embeddings_count_and_their_padding_does_not():
    network, (x, text) = build("transformer", num_tokens=5), inputs("transformer", num_tokens=5)
    text[:, 4:] = 0
    assert same(network(x, text), network(x, text[:, :4]))
    changed = text.clone()
    changed[:, 3] = text[:, 2]
    assert not same(network(x, text), network(x, changed))
    none = torch.zeros(B, dtype=torch.bool)
    assert same(network(x, text, cond_mask=none), network(x, changed, cond_mask=none))


def test_patches_attend_to_each_other():
    network, (x, text) = build("transformer"), inputs("transformer")
    latents = x.unflatten(1, SHAPES["transformer"]).clone()
    latents[:, :, 0, 0] += 1
    change = network(latents.flatten(1), text).direction - network(x, text).direction
    assert (change.unflatten(1, SHAPES["transformer"])[:, :, -1, -1].abs() > 1e-6).all()


@both
def test_gradients_reach_every_weight(name):
    network, (x, text) = build(name), inputs(name)
    # Layers that start at zero, in the residual branches, hide those before them from the first gradient.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    t = torch.rand(B)
    prediction = network(x, text, cond_mask=torch.arange(B) < 3, time=t, step_size=t)
    sum(each.square().sum() for each in prediction).backward()
    without = [key for key, each in network.named_parameters() if each.grad is None or not each.grad.any()]
    assert without == []


def test_an_mlp_takes_two_operations_per_weight_of_its_matrices():
    network = build("mlp")
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    assert count_flops(network) == 2 * matrices


def test_operations_of_a_transformer_are_those_of_its_patches():
    """Sixteen patches of 2 x 2, two embeddings to attend to.

    Per block and patch 24 dim^2 operations for self-attention and MLP and 4 dim^2 for half of the cross-attention.
    """
    (dim, blocks), patches, embeddings = transformer.SIZES["tiny"], 16, 2
    block = patches * (2 * 12 * dim**2 + 2 * 2 * dim**2) + embeddings * 2 * 2 * dim**2
    attention = 4 * patches * (patches + embeddings) * dim
    assert count_flops(build("transformer")) == pytest.approx(blocks * (block + attention), rel=0.1)


def test_every_architecture_has_every_size():
    assert tuple(mlp.SIZES) == tuple(transformer.SIZES) == SIZE_NAMES


def test_auto_chooses_by_the_height_of_the_latents(encoded):
    large = replace(encoded.meta, latent_shape=(4, 32, 32))
    small = make_network(encoded.meta, size="tiny")
    assert (type(small), small.num_tokens, small.latent_dim) == (LatentMLP, 0, 32)
    automatic = make_network(large, size="tiny")
    assert (type(automatic), automatic.num_tokens, automatic.latent_dim) == (LatentTransformer, 77, 4096)
    assert type(make_network(large, size="tiny", network="mlp")) is LatentMLP
    assert make_network(large, size="tiny", num_tokens=8).num_tokens == 8


@pytest.mark.parametrize(("network", "num_tokens"), [("auto", 8), ("mlp", 1), ("transformer", -1)])
def test_token_embeddings_that_a_network_cannot_read_are_refused(encoded, network, num_tokens):
    with pytest.raises(OptionError, match=f"--num-tokens {num_tokens} does not go with --network"):
        make_network(encoded.meta, size="tiny", network=network, num_tokens=num_tokens)


@both
def test_a_saved_network_is_loaded_as_it_was_by_us_and_by_diffusers(name, tmp_path):
    network, (x, text) = build(name), inputs(name)
    network.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    for loaded in (load_network(tmp_path), type(network).from_pretrained(tmp_path)):
        assert type(loaded) is type(network)
        assert all(torch.equal(a, b) for a, b in zip(network(x, text), loaded(x, text), strict=True))


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved network."""
    build("mlp").save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def refusal(folder):
    with pytest.raises(RunError) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)
    assert "train" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused(saved, name):
    (saved / name).unlink()
    assert f"{saved} holds no trained network" in refusal(saved)


def test_damaged_files_are_refused(saved):
    weights = saved / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read" in refusal(saved)
    (saved / "config.json").write_text("{")
    assert "cannot be read" in refusal(saved)


@pytest.mark.parametrize("change", [{"hidden_dim": 384}, {"num_layers": 3}, {"num_layers": 5}, {"text_dim": 11}])
def test_weights_that_do_not_fit_the_config_are_refused(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    assert "do not fit its config.json" in refusal(saved)


def test_a_network_of_another_class_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    assert "KeyError: 'UNet2DModel'" in refusal(saved)
