"""Losses against their formulas written out again, steps against a network that knows the pair."""

from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from index.errors import OptionError
from trainer.models.base import Network, Prediction
from trainer.objectives.base import StepInput, Training
from trainer.objectives.hyperparameters import parse_hyperparameters
from trainer.objectives.registry import OBJECTIVES, PRESETS, make_objective
from trainer.stream import Batch

B, L, T = 64, 12, 5


def make_batch(rows: int = B, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    r, y = torch.randn(rows, L, generator=g), torch.randn(rows, L, generator=g)
    text = torch.randn(rows, 1, T, generator=g)
    return Batch(r=r, text=text, y=y, uniforms=torch.rand(rows, 8, generator=g))


START = Training(0.0, lambda *_: None)


def no_noise():
    raise AssertionError("no step of this objective adds noise")


def step_input(x, text, i=0, n=1, guidance_scale=1.0):
    return StepInput(x=x, text=text, i=i, n=n, guidance_scale=guidance_scale, noise=no_noise)


def coalescer(**hyperparameters):
    """The default coalescer, without consistency unless it is asked for."""
    return make_objective("coalescer", "default", **({"consistency": 0.0} | hyperparameters))


class Call(NamedTuple):
    x: torch.Tensor
    text: torch.Tensor
    cond_mask: torch.Tensor | None
    time: torch.Tensor | None


class FakeNetwork(Network):
    """Predicts a function of the point, with a constant confidence, and records its calls.

    `function` returns a distance and a direction; as a coalescer's network does, it predicts sqrt(L) times the latter.
    """

    def __init__(self, function, confidence=0.0):
        torch.nn.Module.__init__(self)
        self.function, self.constant, self.calls = function, confidence, []

    def __call__(self, x, text, *, cond_mask=None, time=None):
        self.calls.append(Call(x, text, cond_mask, time))
        distance, direction = self.function(x)
        confidence = torch.as_tensor(self.constant).expand(len(x))
        return Prediction(distance.expand(len(x)), direction.expand_as(x) * L**0.5, confidence)


def knows(y):
    """A network that predicts the pair without error."""
    return FakeNetwork(lambda x: ((y - x).norm(dim=1), normalize(y - x, dim=1)), confidence=1.0)


def swerves(confidence, scale=0.7):
    """A network whose full displacement is `scale` times x rolled by one, with directions of length 0.2."""

    def function(x):
        displacement = torch.roll(x, 1, dims=1) * scale
        return displacement.norm(dim=1), normalize(displacement, dim=1) * 0.2

    return FakeNetwork(function, confidence)


def position(x, start, end):
    """t of points x = (1 - t) start + t end, which they are asserted to be."""
    t = ((x - start) * (end - start)).sum(1) / (end - start).square().sum(1)
    assert torch.allclose(x, start + t[:, None] * (end - start), atol=1e-5)
    return t


def test_paper_losses_are_those_first_proposed():
    batch = make_batch()
    g = torch.Generator().manual_seed(1)
    distance, direction = torch.randn(B, generator=g), torch.randn(B, L, generator=g)
    network = FakeNetwork(lambda x: (distance, direction))
    loss = make_objective("coalescer", "paper").loss(network, batch, START)
    (call,) = network.calls
    assert torch.equal(call.x, batch.r)
    assert torch.equal(call.text, batch.text)
    assert call.cond_mask.all()
    length = (batch.y - batch.r).norm(dim=1)
    first = ((distance - length) ** 2).mean()
    second = (direction - (batch.y - batch.r) / length[:, None]).norm(dim=1).sqrt().mean()
    assert loss.total.item() == pytest.approx((first + second).item(), rel=1e-5)


def test_default_losses_are_squares_at_points_of_the_segments():
    batch = make_batch(rows=4000)
    network = FakeNetwork(lambda x: (torch.ones(()), torch.zeros(L)))
    loss = coalescer().loss(network, batch, START)
    (call,) = network.calls
    t = position(call.x, batch.r, batch.y)
    on_segment = t.abs() > 1e-5
    assert on_segment.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert t[on_segment].sort().values.numpy() == pytest.approx(torch.linspace(0, 1, on_segment.sum()), abs=0.04)
    conditional = call.cond_mask.float()
    assert conditional.mean().item() == pytest.approx(0.9, abs=0.02)
    assert conditional[on_segment].mean().item() == pytest.approx(0.9, abs=0.02)
    length = (batch.y - call.x).norm(dim=1)
    assert loss.total.item() == pytest.approx(((1 - length).square().mean() / L + 1).item(), rel=1e-5)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_p_is_the_exponent_of_the_direction_loss(p):
    batch = make_batch()
    network = FakeNetwork(lambda x: ((batch.y - batch.r).norm(dim=1), torch.full((L,), 0.3)))
    objective = coalescer(p=p, segment=0.0, confidence_weight=0.0)
    unit = normalize(batch.y - batch.r, dim=1)
    expected = (0.3 - unit).norm(dim=1).pow(p).mean()
    assert objective.loss(network, batch, START).total.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_network_that_knows_the_pair_has_no_loss(preset):
    batch = make_batch()
    loss = make_objective("coalescer", preset).loss(knows(batch.y), batch, START)
    assert loss.total.item() == pytest.approx(0, abs=2e-3)


def test_the_root_of_an_error_that_is_zero_has_a_finite_gradient():
    batch = make_batch()
    direction = normalize(batch.y - batch.r, dim=1).requires_grad_()
    network = FakeNetwork(lambda x: ((batch.y - x).norm(dim=1), direction))
    make_objective("coalescer", "paper").loss(network, batch, START).total.backward()
    assert torch.isfinite(direction.grad).all()


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_confidence_learns_the_cosine_of_direction_and_displacement(weight):
    batch = make_batch()
    loss = coalescer(segment=0.0, confidence_weight=weight).loss(swerves(0.3), batch, START)
    cosine = cosine_similarity(torch.roll(batch.r, 1, dims=1), batch.y - batch.r, dim=1)
    error = (0.3 - cosine).square().mean()
    assert loss.parts["confidence"].item() == pytest.approx(error.item(), rel=1e-5)
    rest = coalescer(segment=0.0, confidence_weight=0.0).loss(swerves(0.3), batch, START)
    assert loss.total.item() == pytest.approx((rest.total + weight * error).item(), rel=1e-6)


def test_the_learned_confidence_is_calibrated_and_the_length_of_a_sharp_direction_is_not():
    """Of unit vectors that are u with probability 0.8 and -u otherwise, the mean cosine with u is 0.6."""
    g = torch.Generator().manual_seed(0)
    u = normalize(torch.randn(1, L, generator=g), dim=1)
    sign = torch.where(torch.rand(4096, 1, generator=g) < 0.8, 1.0, -1.0)
    text, uniforms = torch.zeros(4096, 1, T), torch.rand(4096, 8, generator=g)
    batch = Batch(r=torch.zeros(4096, L), text=text, y=sign * u, uniforms=uniforms)
    direction, confidence = torch.nn.Parameter(torch.randn(L, generator=g)), torch.nn.Parameter(torch.zeros(()))
    network = FakeNetwork(lambda x: (torch.ones(()), direction), confidence)
    objective = coalescer(p=0.5, segment=0.0)
    adam = torch.optim.Adam([direction, confidence], 0.02)
    for _ in range(400):
        adam.zero_grad()
        objective.loss(network, batch, START).total.backward()
        adam.step()
    assert confidence.item() == pytest.approx(0.6, abs=0.03)
    assert direction.norm().item() > 0.9
    inputs = step_input(batch.r, text)
    assert objective.step(network, inputs).confidence[0].item() == confidence.item()
    without_head = make_objective("coalescer", "paper").step(network, inputs)
    assert without_head.confidence[0].item() == pytest.approx(direction.norm().item())


def test_self_segments_end_where_the_network_itself_would():
    batch, network = make_batch(rows=4000), swerves(0.3)
    objective = coalescer(segment=0.3, self_segment=0.4, step_rule="even")
    objective.loss(network, batch, START)
    first, trained = network.calls
    assert torch.equal(first.x, batch.r)
    assert torch.equal(first.cond_mask, trained.cond_mask)
    own_end = batch.r + 0.7 * torch.roll(batch.r, 1, dims=1)
    moved = trained.x - batch.r
    at_r = moved.norm(dim=1) < 1e-4
    along_pair = (cosine_similarity(moved, batch.y - batch.r, dim=1) > 0.9999) & ~at_r
    along_own = (cosine_similarity(moved, own_end - batch.r, dim=1) > 0.9999) & ~at_r
    assert (at_r | along_pair | along_own).all()
    fractions = [each.float().mean().item() for each in (at_r, along_pair, along_own)]
    assert fractions == pytest.approx([0.3, 0.3, 0.4], abs=0.03)
    t = position(trained.x[along_own], batch.r[along_own], own_end[along_own])
    assert t.mean().item() == pytest.approx(0.5, abs=0.03)
    assert ((t >= 0) & (t <= 1)).all()


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("step_rule", ["mean", "even"])
def test_consistency_compares_the_ends_of_two_points_of_a_segment_and_trains_the_farther(p, step_rule):
    batch, scale = make_batch(), torch.tensor(0.7, requires_grad=True)
    network = swerves(0.3, scale)
    objective = coalescer(consistency=2.0, consistency_ramp=0.0, consistency_gap=0.4, p=p, step_rule=step_rule)
    loss = objective.loss(network, batch, START)
    rest = coalescer(p=p, step_rule=step_rule).loss(network, batch, START)
    far, near = network.calls[0].x, network.calls[1].x
    gap = position(near, far, batch.y)
    assert ((gap >= 0) & (gap <= 0.4)).all()
    assert gap.mean().item() == pytest.approx(0.2, abs=0.04)

    def end(x, scale):
        return x + scale * torch.roll(x, 1, dims=1) * (0.2 if step_rule == "mean" else 1.0)

    difference = (end(far, scale) - end(near, 0.7)).square().mean(1).pow(p / 2).mean()
    expected = rest.total + 2 * difference
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    (expected_gradient,) = torch.autograd.grad(expected, scale, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss.total, scale)
    assert gradient.item() == pytest.approx(expected_gradient.item(), rel=1e-3)


@pytest.mark.parametrize(("ramp", "factor"), [(0.0, 1.0), (1.0, 0.5), (3.0, 0.125)])
def test_the_weight_of_consistency_grows_over_training(ramp, factor):
    batch, halfway = make_batch(), START._replace(progress=0.5)
    loss = coalescer(consistency=2.0, consistency_ramp=ramp).loss(swerves(0.3), batch, halfway)
    rest = coalescer().loss(swerves(0.3), batch, halfway)
    assert loss.total.item() == pytest.approx((rest.total + factor * 2 * loss.parts["consistency"]).item(), rel=1e-5)


def test_a_network_that_knows_the_pair_is_consistent():
    batch = make_batch()
    loss = make_objective("coalescer", "default", consistency=1.0).loss(knows(batch.y), batch, START)
    assert loss.parts["consistency"].item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("step_rule", ["mean", "even", "confident"])
def test_steps_of_a_network_that_knows_the_pair_are_equal(n, step_rule):
    batch = make_batch()
    network, objective, x = knows(batch.y), make_objective("coalescer", "default", step_rule=step_rule), batch.r
    for i in range(n):
        x = objective.step(network, step_input(x, batch.text, i, n)).x
        assert torch.allclose(x, batch.r + (i + 1) / n * (batch.y - batch.r), atol=1e-4)


@pytest.mark.parametrize(("step_rule", "length"), [("mean", 0.2), ("even", 1.0), ("confident", 0.3)])
def test_step_rules_scale_the_distance_by_the_direction_nothing_or_the_confidence(step_rule, length):
    """The network has directions of length 0.2, distances of 0.7 |x| and a confidence of 0.3."""
    batch = make_batch()
    objective = make_objective("coalescer", "default", step_rule=step_rule)
    output = objective.step(swerves(0.3), step_input(batch.r, batch.text, i=1, n=3))
    assert torch.allclose(output.x - batch.r, length / 2 * 0.7 * torch.roll(batch.r, 1, dims=1), atol=1e-5)
    assert torch.allclose(output.confidence, torch.full((B,), 0.3))


def test_time_conditioning_passes_the_position_on_the_segment():
    batch, network = make_batch(), swerves(0.3)
    objective = coalescer(consistency=1.0, consistency_gap=0.5, time_conditioning=True)
    objective.loss(network, batch, START)
    far, near = network.calls
    for call in (far, near):
        assert torch.allclose(call.time, position(call.x, batch.r, batch.y), atol=1e-5)
    assert (near.time > far.time).all()
    objective.step(network, step_input(batch.r, batch.text, 3, 4, guidance_scale=2.0))
    assert all(torch.equal(call.time, torch.full((B,), 0.75)) for call in network.calls[2:])
    make_objective("coalescer", "default").step(network, step_input(batch.r, batch.text, 3, 4))
    assert network.calls[-1].time is None


def test_paper_steps_cover_the_whole_distance_each_time():
    batch = make_batch()
    network = FakeNetwork(lambda x: (torch.full((), 2.0), torch.eye(L)[0] * 0.3))
    output = make_objective("coalescer", "paper").step(network, step_input(batch.r, batch.text, 0, 4))
    assert torch.allclose(output.x - batch.r, 2 * torch.eye(L)[:1].expand(B, L), atol=1e-6)
    assert torch.allclose(output.confidence, torch.full((B,), 0.3))


@pytest.mark.parametrize("name", ["coalescer", "flow_matching"])
def test_guidance_extrapolates_from_the_unconditional_step(name):
    """The conditional step is along the first axis, the unconditional one along the second."""
    batch = make_batch()

    class Conditional(FakeNetwork):
        def __call__(self, x, text, *, cond_mask=None, time=None):
            axis = 0 if cond_mask is None else 1
            assert cond_mask is None or not cond_mask.any()
            direction = torch.eye(L)[axis].expand(len(x), L)
            return Prediction(torch.ones(len(x)), direction * L**0.5, torch.zeros(len(x)))

    objective, network = make_objective(name, "default"), Conditional(None)

    def move(guidance_scale):
        return objective.step(network, step_input(batch.r, batch.text, guidance_scale=guidance_scale)).x - batch.r

    length = 1.0 if name == "coalescer" else L**0.5
    for w in (0.0, 1.0, 3.0):
        expected = length * (w * torch.eye(L)[0] + (1 - w) * torch.eye(L)[1])
        assert torch.allclose(move(w), expected.expand(B, L), atol=1e-5)


def test_flow_matching_regresses_the_velocity_and_integrates_it():
    batch = make_batch()
    objective = make_objective("flow_matching", "default")
    network = FakeNetwork(lambda x: (torch.zeros(()), (batch.y - batch.r) / L**0.5))
    assert objective.loss(network, batch, START).total.item() == pytest.approx(0, abs=1e-10)
    x = batch.r
    for i in range(5):
        output = objective.step(network, step_input(x, batch.text, i, 5))
        x = output.x
        assert torch.allclose(network.calls[-1].time, torch.full((B,), i / 5))
        assert output.confidence.isnan().all()
    assert torch.allclose(x, batch.y, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(OptionError, match=r"--objective 'diffusion'.*coalescer, endpoint, flow_matching"):
        make_objective("diffusion", "default")
    with pytest.raises(OptionError, match=r"--preset 'best'.*default, paper"):
        make_objective("coalescer", "best")
    with pytest.raises(OptionError, match=r"--set q is unknown for coalescer: choose one of dropout, p, segment"):
        make_objective("coalescer", "default", q=1.0)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("coalescer", {"p": 0.0}, "--set p=0.0 is out of range: use a number above 0"),
        ("coalescer", {"step_rule": "fast"}, "--set step_rule=fast is out of range: choose one of mean, even"),
        ("coalescer", {"segment": 0.7, "self_segment": 0.5}, "segment=0.7 and --set self_segment=0.5 are more than 1"),
        ("coalescer", {"time_conditioning": 2.0}, "--set time_conditioning=2 is not a yes or no: use .*=1 or .*=0"),
        ("coalescer", {"p": "x"}, "--set p=x is not a number"),
        ("endpoint", {"segment": 1.5}, "--set segment=1.5 is out of range: use a number from 0 to 1"),
        ("endpoint", {"consistency": -1.0}, "--set consistency=-1.0 is out of range: use 0 or more"),
        ("flow_matching", {"dropout": 2.0}, "--set dropout=2.0 is out of range"),
        ("rectified_flow", {"flow": 7.0}, "--set flow=7 is a number: use a name, for a folder flow=./7"),
        ("mean_flow", {"norm_eps": float("nan")}, "--set norm_eps=nan is out of range"),
        ("shortcut", {"bootstrap_fraction": -1.0}, "--set bootstrap_fraction=-1.0 is out of range"),
        ("consistency", {"stages": float("inf")}, "--set stages=inf is not a whole number"),
        ("imle", {"pool_size": 2.5}, "--set pool_size=2.5 is not a whole number: use for instance pool_size=10"),
        ("imle", {"pool_size": 0.0}, "--set pool_size=0 is out of range: use a number above 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name, hyperparameters, message):
    with pytest.raises(OptionError, match=message):
        make_objective(name, "default", **hyperparameters)


def test_hyperparameters_get_the_types_of_their_defaults():
    """From a command line every number is a float."""
    imle = make_objective("imle", "default", **parse_hyperparameters(["pool_size=7", "eps=0"]))
    assert (imle.pool_size, type(imle.pool_size), type(imle.eps)) == (7, int, float)
    given = parse_hyperparameters(["time_conditioning=1", "step_rule=even"])
    objective = make_objective("coalescer", "default", **given)
    assert objective.time_conditioning is True
    assert objective.step_rule == "even"
    with pytest.raises(OptionError, match=r"--set 'p' is not NAME=VALUE: use for instance --set p=0\.5"):
        parse_hyperparameters(["p"])


def test_a_hyperparameter_replaces_the_preset_alone():
    paper, changed = (make_objective("coalescer", "paper", **each) for each in ({}, {"p": 1.0}))
    assert (paper.p, changed.p) == (0.5, 1.0)
    assert changed.step_rule == paper.step_rule == "paper"


def test_every_preset_can_be_made():
    for name in OBJECTIVES:
        for preset in PRESETS[name]:
            assert isinstance(make_objective(name, preset), OBJECTIVES[name])
