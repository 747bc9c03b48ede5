"""Losses against their formulas written out again, steps against a network that knows the answer."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from index.errors import OptionError
from trainer.network import SIZES, Network, NetworkConfig, Prediction, count_flops
from trainer.objectives import make_objective
from trainer.stream import Batch

B, L, T = 64, 12, 5


def some_batch(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    r, y = torch.randn(B, L, generator=g), torch.randn(B, L, generator=g)
    text, query = torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    return Batch(r=r, query=query, text=text, y=y, dice=torch.rand(B, 4, generator=g))


class Fixed(Network):
    """A network that answers by a function of the point and remembers what it was asked."""

    def __init__(self, answer):
        torch.nn.Module.__init__(self)
        self.answer, self.seen = answer, []

    def __call__(self, x, text, *, keep=None, time=None):
        self.seen.append((x, text, keep, time))
        return self.answer(x)


def knows(y):
    def answer(x):
        way = y - x
        return Prediction(way.norm(dim=1), normalize(way, dim=1))

    return Fixed(answer)


def test_paper_losses_are_those_of_the_design():
    batch = some_batch()
    g = torch.Generator().manual_seed(1)
    distance, direction = torch.randn(B, generator=g), torch.randn(B, L, generator=g)
    network = Fixed(lambda x: Prediction(distance, direction))
    loss = make_objective("coalescer", "paper").loss(network, batch)
    assert torch.equal(network.seen[0][0], batch.r)
    assert torch.equal(network.seen[0][1], batch.text)
    assert network.seen[0][2].all()
    far = (batch.y - batch.r).norm(dim=1)
    first = ((distance - far) ** 2).mean()
    second = (direction - (batch.y - batch.r) / far[:, None]).norm(dim=1).sqrt().mean()
    assert loss.total.item() == pytest.approx((first + second).item(), rel=1e-5)


def test_default_losses_use_segment_points_and_squares():
    batch = some_batch()
    network = Fixed(lambda x: Prediction(torch.ones(B), torch.zeros(B, L)))
    loss = make_objective("coalescer", "default").loss(network, batch)
    x = network.seen[0][0]
    t = torch.where(batch.dice[:, 0] < 0.5, batch.dice[:, 1], 0.0)[:, None]
    assert torch.allclose(x, (1 - t) * batch.r + t * batch.y, atol=1e-6)
    assert 0.2 < (t > 0).float().mean() < 0.8
    assert torch.equal(network.seen[0][2], batch.dice[:, 2] >= 0.1)
    far = (batch.y - x).norm(dim=1)
    assert loss.total.item() == pytest.approx(((1 - far).square().mean() / L + 1).item(), rel=1e-5)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_p_is_the_exponent_of_the_direction_loss(p):
    batch = some_batch()
    network = Fixed(lambda x: Prediction((batch.y - batch.r).norm(dim=1), torch.full((B, L), 0.3)))
    objective = make_objective("coalescer", "default", p=p, segment=0.0)
    unit = normalize(batch.y - batch.r, dim=1)
    expected = (0.3 - unit).norm(dim=1).pow(p).mean()
    assert objective.loss(network, batch).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_perfect_network_has_no_loss_and_finite_gradients():
    batch = some_batch()
    for preset in ("default", "paper"):
        loss = make_objective("coalescer", preset).loss(knows(batch.y), batch)
        assert loss.total.item() == pytest.approx(0, abs=2e-3)
    direction = normalize(batch.y - batch.r, dim=1).requires_grad_()
    network = Fixed(lambda x: Prediction((batch.y - x).norm(dim=1), direction))
    make_objective("coalescer", "paper").loss(network, batch).total.backward()
    assert torch.isfinite(direction.grad).all()


def test_condition_chooses_the_description():
    batch = some_batch()
    for condition, told in (("close", batch.text), ("query", batch.query)):
        network = knows(batch.y)
        make_objective("coalescer", "default", condition=condition).loss(network, batch)
        assert torch.equal(network.seen[0][1], told)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_even_steps_of_a_perfect_network_divide_the_way_evenly(n):
    batch = some_batch()
    network, objective, x = knows(batch.y), make_objective("coalescer", "default"), batch.r
    for i in range(n):
        x = objective.step(network, x, batch.text, i, n, 1.0).x
        assert torch.allclose(x, batch.r + (i + 1) / n * (batch.y - batch.r), atol=1e-4)


def test_confident_steps_are_shorter_where_the_direction_is():
    batch = some_batch()
    way = normalize(batch.y - batch.r, dim=1)
    network = Fixed(lambda x: Prediction((batch.y - x).norm(dim=1), 0.4 * way))
    x = make_objective("coalescer", "default", rule="confident").step(network, batch.r, batch.text, 0, 2, 1.0).x
    assert torch.allclose(x, batch.r + 0.4 / 2 * (batch.y - batch.r), atol=1e-5)


def test_paper_steps_move_the_whole_distance_each_time():
    batch = some_batch()
    network = Fixed(lambda x: Prediction(torch.full((B,), 2.0), torch.eye(L)[:1].expand(B, L) * 0.3))
    objective = make_objective("coalescer", "paper")
    step = objective.step(network, batch.r, batch.text, 0, 4, 1.0)
    assert torch.allclose(step.x - batch.r, 2 * torch.eye(L)[:1].expand(B, L), atol=1e-6)
    assert torch.allclose(step.confidence, torch.full((B,), 0.3))


@pytest.mark.parametrize("name", ["coalescer", "flow_matching"])
def test_guidance_extrapolates_from_the_blind_step(name):
    batch = some_batch()

    class Two(Fixed):
        def __call__(self, x, text, *, keep=None, time=None):
            blind = keep is not None and not keep.any()
            return Prediction(torch.full((B,), 1.0), torch.eye(L)[1 if blind else 0].expand(B, L))

    objective, network = make_objective(name, "default"), Two(None)
    told = objective.step(network, batch.r, batch.text, 0, 1, 1.0).x
    strong = objective.step(network, batch.r, batch.text, 0, 1, 3.0).x
    blind = batch.r + torch.eye(L)[1]
    assert torch.allclose(strong, blind + 3 * (told - blind), atol=1e-5)


def test_flow_matching_regresses_the_velocity_and_integrates_it():
    batch = some_batch()
    objective = make_objective("flow_matching", "default")
    right = Fixed(lambda x: Prediction(torch.zeros(B), batch.y - batch.r))
    assert objective.loss(right, batch).total.item() == pytest.approx(0, abs=1e-10)
    x = batch.r
    for i in range(5):
        x = objective.step(right, x, batch.text, i, 5, 1.0).x
    assert torch.allclose(x, batch.y, atol=1e-5)
    assert torch.allclose(right.seen[-1][3], torch.full((B,), 0.8))
    assert objective.step(right, x, batch.text, 0, 1, 1.0).confidence.isnan().all()


def test_unknown_names_are_refused():
    with pytest.raises(OptionError, match=r"--objective 'diffusion'.*coalescer, flow_matching"):
        make_objective("diffusion", "default")
    with pytest.raises(OptionError, match=r"--preset 'best'.*default, paper"):
        make_objective("coalescer", "best")


@pytest.mark.parametrize("size", list(SIZES)[:3])
def test_network_sizes_and_shapes(size):
    torch.manual_seed(0)
    network = Network(NetworkConfig(size=size, latent_size=L, text_width=T))
    batch = some_batch()
    guess = network(batch.r, batch.text)
    assert guess.distance.shape == (B,)
    assert guess.direction.shape == (B, L)
    # It starts near the distances that there are.
    assert abs(guess.distance.mean().item() - math.sqrt(L)) < 2


def test_network_reads_the_descriptions_direction_only_and_can_go_without():
    torch.manual_seed(0)
    network = Network(NetworkConfig(size="tiny", latent_size=L, text_width=T))
    batch = some_batch()
    one, scaled = network(batch.r, batch.text), network(batch.r, batch.text * 7)
    assert torch.allclose(one.direction, scaled.direction, atol=1e-5)
    nothing = torch.zeros(B, dtype=torch.bool)
    blind, other = network(batch.r, batch.text, keep=nothing), network(batch.r, batch.query, keep=nothing)
    assert torch.equal(blind.direction, other.direction)
    assert not torch.allclose(one.direction, blind.direction)


def test_flops_are_two_per_weight_of_the_matrices():
    network = Network(NetworkConfig(size="tiny", latent_size=5, text_width=3))
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    assert count_flops(network) == 2 * matrices
