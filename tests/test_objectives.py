"""Losses against their formulas written out again, steps against a network that knows the answer."""

import pytest
import torch
from torch.nn.functional import normalize

from index.errors import OptionError
from trainer.models.base import Network, Prediction
from trainer.objectives.base import Training, make_objective
from trainer.stream import Batch

B, L, T = 64, 12, 5


def some_batch(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    r, y = torch.randn(B, L, generator=g), torch.randn(B, L, generator=g)
    text = torch.randn(B, 1, T, generator=g)
    return Batch(r=r, text=text, y=y, uniforms=torch.rand(B, 8, generator=g))


ALONE = Training(0.0, lambda *_: None)


def still():
    raise AssertionError("nobody needs fresh points")


def coalescer(**hyperparameters):
    """The default coalescer without the consistency term unless asked for."""
    return make_objective("coalescer", "default", **({"consistency": 0.0} | hyperparameters))


def said(distance, direction, sure):
    """What a coalescer's network says: the direction in units of 1/sqrt(L)."""
    return Prediction(distance, direction * L**0.5, sure)


class Fixed(Network):
    """A network that answers by a function of the point and remembers what it was asked."""

    def __init__(self, answer, sure=0.0):
        torch.nn.Module.__init__(self)
        self.answer, self.sure, self.seen = answer, sure, []

    def __call__(self, x, text, *, keep=None, time=None):
        self.seen.append((x, text, keep, time))
        return said(*self.answer(x), torch.full((B,), self.sure))


def knows(y):
    def answer(x):
        way = y - x
        return way.norm(dim=1), normalize(way, dim=1)

    return Fixed(answer, sure=1.0)


def test_paper_losses_are_those_of_the_design():
    batch = some_batch()
    g = torch.Generator().manual_seed(1)
    distance, direction = torch.randn(B, generator=g), torch.randn(B, L, generator=g)
    network = Fixed(lambda x: (distance, direction))
    loss = make_objective("coalescer", "paper").loss(network, batch, ALONE)
    assert torch.equal(network.seen[0][0], batch.r)
    assert torch.equal(network.seen[0][1], batch.text)
    assert network.seen[0][2].all()
    far = (batch.y - batch.r).norm(dim=1)
    first = ((distance - far) ** 2).mean()
    second = (direction - (batch.y - batch.r) / far[:, None]).norm(dim=1).sqrt().mean()
    assert loss.total.item() == pytest.approx((first + second).item(), rel=1e-5)


def test_default_losses_use_segment_points_and_squares():
    batch = some_batch()
    network = Fixed(lambda x: (torch.ones(B), torch.zeros(B, L)))
    loss = coalescer().loss(network, batch, ALONE)
    x = network.seen[0][0]
    t = torch.where(batch.uniforms[:, 0] < 0.9, batch.uniforms[:, 1], 0.0)[:, None]
    assert torch.allclose(x, (1 - t) * batch.r + t * batch.y, atol=1e-6)
    assert 0.7 < (t > 0).float().mean() < 1
    assert torch.equal(network.seen[0][2], batch.uniforms[:, 2] >= 0.1)
    far = (batch.y - x).norm(dim=1)
    assert loss.total.item() == pytest.approx(((1 - far).square().mean() / L + 1).item(), rel=1e-5)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_p_is_the_exponent_of_the_direction_loss(p):
    batch = some_batch()
    network = Fixed(lambda x: ((batch.y - batch.r).norm(dim=1), torch.full((B, L), 0.3)))
    objective = coalescer(p=p, segment=0.0, confidence_weight=0.0)
    unit = normalize(batch.y - batch.r, dim=1)
    expected = (0.3 - unit).norm(dim=1).pow(p).mean()
    assert objective.loss(network, batch, ALONE).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_perfect_network_has_no_loss_and_finite_gradients():
    batch = some_batch()
    for preset in ("default", "paper"):
        loss = make_objective("coalescer", preset).loss(knows(batch.y), batch, ALONE)
        assert loss.total.item() == pytest.approx(0, abs=2e-3)
    direction = normalize(batch.y - batch.r, dim=1).requires_grad_()
    network = Fixed(lambda x: ((batch.y - x).norm(dim=1), direction))
    make_objective("coalescer", "paper").loss(network, batch, ALONE).total.backward()
    assert torch.isfinite(direction.grad).all()


class Sure(Fixed):
    """Goes a little astray, and says how sure it is."""

    def __init__(self, sure, stray=0.7):
        super().__init__(None, sure)
        self.stray = stray

    def __call__(self, x, text, *, keep=None, time=None):
        self.seen.append((x, text, keep, time))
        way = torch.roll(x, 1, dims=1) * self.stray
        return said(way.norm(dim=1), normalize(way, dim=1) * 0.2, torch.full((len(x),), self.sure))


def test_confidence_is_learned_as_the_cosine_of_the_way():
    batch, network = some_batch(), Sure(0.3)
    loss = coalescer(segment=0.0).loss(network, batch, ALONE)
    cosine = torch.nn.functional.cosine_similarity(torch.roll(batch.r, 1, dims=1), batch.y - batch.r, dim=1)
    assert loss.parts["confidence"].item() == pytest.approx((0.3 - cosine).square().mean().item(), rel=1e-5)
    rest = loss.parts["distance"] / L + loss.parts["direction"]
    assert loss.total.item() == pytest.approx((rest + loss.parts["confidence"]).item(), rel=1e-6)
    light = coalescer(segment=0.0, confidence_weight=0.25).loss(network, batch, ALONE)
    assert light.total.item() == pytest.approx((rest + 0.25 * loss.parts["confidence"]).item(), rel=1e-6)


def test_the_learned_confidence_is_calibrated_where_the_direction_is_not():
    """Of unit vectors that are u with probability 0.8 and -u otherwise, the mean cosine with u is 0.6."""
    g = torch.Generator().manual_seed(0)
    u = normalize(torch.randn(1, L, generator=g), dim=1)
    sign = torch.where(torch.rand(4096, 1, generator=g) < 0.8, 1.0, -1.0)
    batch = Batch(
        r=torch.zeros(4096, L), text=torch.zeros(4096, 1, T), y=sign * u,
        uniforms=torch.rand(4096, 8, generator=g),
    )  # fmt: skip
    way, sure = torch.nn.Parameter(torch.randn(L, generator=g)), torch.nn.Parameter(torch.zeros(()))

    class Free(Fixed):
        def __call__(self, x, text, *, keep=None, time=None):
            return said(torch.ones(len(x)), way.expand(len(x), L), sure.expand(len(x)))

    objective = coalescer(p=0.5, segment=0.0)
    adam = torch.optim.Adam([way, sure], 0.02)
    for _ in range(400):
        adam.zero_grad()
        objective.loss(Free(None), batch, ALONE).total.backward()
        adam.step()
    assert sure.item() == pytest.approx(0.6, abs=0.03)
    assert way.norm().item() > 0.9
    step = objective.step(Free(None), batch.r, batch.text, 0, 1, 1.0, still)
    assert step.confidence[0].item() == sure.item()
    bare = make_objective("coalescer", "paper").step(Free(None), batch.r, batch.text, 0, 1, 1.0, still)
    assert bare.confidence[0].item() == pytest.approx(way.norm().item())


def test_own_inputs_lie_where_the_network_itself_would_go():
    batch, network = some_batch(), Sure(0.3)
    coalescer(segment=0.3, own=0.4, rule="even").loss(network, batch, ALONE)
    (r, _, keep, _), (x, _, same, _) = network.seen
    assert torch.equal(r, batch.r)
    assert torch.equal(keep, same)
    goal = r + 0.7 * torch.roll(r, 1, dims=1)
    kind, place = batch.uniforms[:, :1], batch.uniforms[:, 1:2]
    expected = torch.where(kind < 0.3, r + place * (batch.y - r), torch.where(kind < 0.7, r + place * (goal - r), r))
    assert torch.allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("rule", ["mean", "even"])
def test_consistency_compares_two_points_of_a_segment_and_teaches_the_farther(p, rule):
    batch = some_batch()
    stray = torch.tensor(0.7, requires_grad=True)
    network = Sure(0.3, stray)
    objective = coalescer(consistency=2.0, ramp=0.0, gap=0.4, p=p, rule=rule)
    loss = objective.loss(network, batch, ALONE)
    plain = coalescer(p=p, rule=rule).loss(network, batch, ALONE)
    x, ahead = network.seen[0][0], network.seen[1][0]
    assert torch.allclose(ahead, x + 0.4 * batch.uniforms[:, 3:4] * (batch.y - x), atol=1e-6)

    def end(x, stray):
        return x + stray * torch.roll(x, 1, dims=1) * (0.2 if rule == "mean" else 1.0)

    apart = (end(x, stray) - end(ahead, 0.7)).square().mean(1).pow(p / 2).mean()
    assert loss.total.item() == pytest.approx((plain.total + 2 * apart).item(), rel=1e-4)
    (wanted,) = torch.autograd.grad(plain.total + 2 * apart, stray, retain_graph=True)
    (given,) = torch.autograd.grad(loss.total, stray)
    assert given.item() == pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize(("ramp", "share"), [(0.0, 1.0), (1.0, 0.5), (3.0, 0.125)])
def test_consistency_grows_over_training(ramp, share):
    batch, halfway = some_batch(), ALONE._replace(progress=0.5)
    loss = coalescer(consistency=2.0, ramp=ramp).loss(Sure(0.3), batch, halfway)
    plain = coalescer().loss(Sure(0.3), batch, halfway)
    assert loss.total.item() == pytest.approx((plain.total + share * 2 * loss.parts["consistency"]).item(), rel=1e-5)


def test_a_network_that_always_ends_at_the_pair_is_consistent():
    batch = some_batch()
    loss = make_objective("coalescer", "default", consistency=1.0).loss(knows(batch.y), batch, ALONE)
    assert loss.parts["consistency"].item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("rule", ["mean", "even"])
def test_steps_of_a_perfect_network_divide_the_way_evenly(n, rule):
    batch = some_batch()
    network, objective, x = knows(batch.y), make_objective("coalescer", "default", rule=rule), batch.r
    for i in range(n):
        x = objective.step(network, x, batch.text, i, n, 1.0, still).x
        assert torch.allclose(x, batch.r + (i + 1) / n * (batch.y - batch.r), atol=1e-4)


def test_a_mean_step_is_as_short_as_the_direction_and_an_even_one_is_not():
    """`Sure` has directions of length 0.2, and distances of 0.7 |x|."""
    batch = some_batch()
    for rule, share in (("mean", 0.2), ("even", 1.0)):
        objective = make_objective("coalescer", "default", rule=rule)
        moved = objective.step(Sure(0.3), batch.r, batch.text, 1, 3, 1.0, still).x - batch.r
        assert torch.allclose(moved, share / 2 * 0.7 * torch.roll(batch.r, 1, dims=1), atol=1e-5)


def test_confident_steps_are_shorter_where_the_network_is_unsure():
    batch, network = some_batch(), Sure(0.3)
    objective = make_objective("coalescer", "default", rule="confident")
    step = objective.step(network, batch.r, batch.text, 0, 2, 1.0, still)
    assert torch.allclose(step.x, batch.r + 0.3 / 2 * 0.7 * torch.roll(batch.r, 1, dims=1), atol=1e-5)
    assert torch.allclose(step.confidence, torch.full((B,), 0.3))


def test_a_clock_tells_how_far_along_the_segment_a_point_is():
    batch, network = some_batch(), Sure(0.3)
    coalescer(consistency=1.0, gap=0.5, clock=True).loss(network, batch, ALONE)
    (x, _, _, t), (ahead, _, _, later) = network.seen
    assert torch.allclose(x, batch.r + t[:, None] * (batch.y - batch.r), atol=1e-6)
    assert torch.allclose(ahead, batch.r + later[:, None] * (batch.y - batch.r), atol=1e-5)
    assert (later > t).all()
    objective = make_objective("coalescer", "default", clock=True)
    objective.step(network, batch.r, batch.text, 3, 4, 2.0, still)
    assert all(torch.equal(asked[3], torch.full((B,), 0.75)) for asked in network.seen[-2:])
    make_objective("coalescer", "default").step(network, batch.r, batch.text, 3, 4, 1.0, still)
    assert network.seen[-1][3] is None


def test_paper_steps_move_the_whole_distance_each_time():
    batch = some_batch()
    network = Fixed(lambda x: (torch.full((B,), 2.0), torch.eye(L)[:1].expand(B, L) * 0.3))
    objective = make_objective("coalescer", "paper")
    step = objective.step(network, batch.r, batch.text, 0, 4, 1.0, still)
    assert torch.allclose(step.x - batch.r, 2 * torch.eye(L)[:1].expand(B, L), atol=1e-6)
    assert torch.allclose(step.confidence, torch.full((B,), 0.3))


@pytest.mark.parametrize("name", ["coalescer", "flow_matching"])
def test_guidance_extrapolates_from_the_blind_step(name):
    batch = some_batch()

    class Two(Fixed):
        def __call__(self, x, text, *, keep=None, time=None):
            blind = keep is not None and not keep.any()
            return said(torch.ones(B), torch.eye(L)[1 if blind else 0].expand(B, L), torch.zeros(B))

    objective, network = make_objective(name, "default"), Two(None)
    told = objective.step(network, batch.r, batch.text, 0, 1, 1.0, still).x
    strong = objective.step(network, batch.r, batch.text, 0, 1, 3.0, still).x
    blind = objective.step(network, batch.r, batch.text, 0, 1, 0.0, still).x
    assert torch.equal((blind - batch.r).argmax(1), torch.ones(B, dtype=torch.long))
    assert torch.allclose(strong, blind + 3 * (told - blind), atol=1e-5)


def test_flow_matching_regresses_the_velocity_and_integrates_it():
    batch = some_batch()
    objective = make_objective("flow_matching", "default")
    right = Fixed(lambda x: (torch.zeros(B), (batch.y - batch.r) / L**0.5))
    assert objective.loss(right, batch, ALONE).total.item() == pytest.approx(0, abs=1e-10)
    x = batch.r
    for i in range(5):
        x = objective.step(right, x, batch.text, i, 5, 1.0, still).x
    assert torch.allclose(x, batch.y, atol=1e-5)
    assert torch.allclose(right.seen[-1][3], torch.full((B,), 0.8))
    assert objective.step(right, x, batch.text, 0, 1, 1.0, still).confidence.isnan().all()


def test_unknown_names_are_refused():
    with pytest.raises(OptionError, match=r"--objective 'diffusion'.*coalescer, endpoint, flow_matching"):
        make_objective("diffusion", "default")
    with pytest.raises(OptionError, match=r"--preset 'best'.*default, paper"):
        make_objective("coalescer", "best")
