"""What all rivals of the coalescer share, endpoint regression and IMLE, and where trained rivals end."""

import math
from dataclasses import replace

import pytest
import torch
from known_flows import (
    CENTER,
    HALFWAY,
    NO_TEACHER,
    SPREAD,
    FakeNetwork,
    SmallNetwork,
    derivative,
    make_batch,
    mean_velocity,
    sample,
    train,
)

from trainer.objectives.base import StepInput, Training
from trainer.objectives.registry import make_objective

RIVALS = ["endpoint", "flow_matching", "rectified_flow", "mean_flow", "shortcut", "consistency", "imle"]


class Conditional(FakeNetwork):
    """Predicts 1 with a condition and -0.5 without."""

    def forward(self, x, text, *, cond_mask=None, **path):
        prediction = super().forward(x, text, cond_mask=cond_mask, **path)
        conditional = torch.ones(len(x), dtype=torch.bool) if cond_mask is None else cond_mask
        return prediction._replace(direction=torch.where(conditional[:, None], 1.0, -0.5).expand_as(x))


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "rectified_flow"])
def test_a_fraction_of_the_training_inputs_is_unconditional(name):
    objective, batch = make_objective(name, "default", dropout=0.25), make_batch(4000)
    network = Conditional(lambda x, time, step_size: x)
    objective.loss(network, batch, Training(0.0, network))
    cond_mask = network.calls[-1]["cond_mask"]
    assert cond_mask.float().mean().item() == pytest.approx(0.75, abs=0.02)
    # As often near R as near y.
    near_r = (network.calls[-1]["x"] - batch.r).norm(dim=1) < (batch.y - batch.r).norm(dim=1) / 2
    if 100 < near_r.sum() < 3900:
        assert cond_mask[near_r].float().mean().item() == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("name", RIVALS)
def test_guidance_extrapolates_from_the_unconditional_end(name):
    objective, network = make_objective(name, "default"), Conditional(lambda x, time, step_size: x)
    conditional, unconditional, guided = (
        sample(objective, network, 1, 64, guidance_scale=w)[0] for w in (1.0, 0.0, 3.0)
    )
    assert not torch.allclose(conditional, unconditional)
    assert torch.allclose(guided, unconditional + 3 * (conditional - unconditional), atol=1e-4)


def test_the_mean_velocity_of_these_tests_solves_the_flow():
    """Against a thousand small steps of the velocity, which is E[y - R | x] by Gaussian conditioning."""
    x = make_batch(50).r
    time, step_size = torch.full((50,), 0.2), torch.full((50,), 0.7)
    end, h = x.double(), 0.7 / 1000
    for i in range(1000):
        t = 0.2 + (i + 0.5) * h
        gain = (t * SPREAD**2 - (1 - t)) / ((1 - t) ** 2 + (t * SPREAD) ** 2)
        end = end + h * (CENTER + gain * (end - t * CENTER))
    assert torch.allclose(x + 0.7 * mean_velocity(x, time, step_size), end.float(), atol=1e-3)


def test_endpoint_regression_trains_at_the_points_of_the_coalescer_and_is_as_consistent():
    batch = make_batch(256)
    ours, theirs = (FakeNetwork(lambda x, time, step_size: torch.zeros_like(x)) for _ in range(2))
    loss = make_objective("endpoint", "default").loss(ours, batch, HALFWAY)
    coalescer_loss = make_objective("coalescer", "default").loss(theirs, batch, HALFWAY)
    for one, other in zip(ours.calls, theirs.calls, strict=True):
        assert torch.equal(one["x"], other["x"])
        assert torch.equal(one["cond_mask"], other["cond_mask"])
    assert torch.allclose(loss.parts["consistency"], coalescer_loss.parts["consistency"])
    far, near = (call["x"] for call in ours.calls)
    error, difference = (batch.y - far).square().mean().item(), (near - far).square().mean().item()
    assert loss.total.item() == pytest.approx(error + 30 * 0.5**8 * difference, rel=1e-5)


def test_the_endpoint_of_noise_is_the_mean_of_its_pairs():
    """With R independent of y the loss at R is least, and flat, at the mean of y."""
    batch, objective = make_batch(20_000), make_objective("endpoint", "default", segment=0.0, consistency=0.0)
    derivatives = []
    for error in (0.0, 0.1):
        shift = torch.tensor(error, requires_grad=True)
        network = FakeNetwork(lambda x, time, step_size, shift=shift: CENTER + shift - x)
        derivatives.append(derivative(objective.loss(network, batch, NO_TEACHER), shift))
    assert abs(derivatives[0]) < 0.01
    assert derivatives[1] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_endpoint_steps_are_equal(n):
    batch, objective = make_batch(64), make_objective("endpoint", "default")
    network = FakeNetwork(lambda x, time, step_size: batch.y - x)
    assert objective.loss(network, batch, NO_TEACHER).total.item() == pytest.approx(0, abs=1e-12)
    x = batch.r
    for i in range(n):
        x = objective.step(network, StepInput(x=x, text=batch.text, i=i, n=n, noise=pytest.fail)).x
        assert torch.allclose(x, batch.r + (i + 1) / n * (batch.y - batch.r), atol=1e-5)


def test_imle_trains_the_nearest_output_of_the_pool_that_is_not_rejected():
    batch = make_batch(30)
    network = FakeNetwork(lambda x, time, step_size: x.flip(1))
    loss = make_objective("imle", "default", pool_size=4, eps=0.6).loss(network, batch, NO_TEACHER)
    errors, rejected, chosen = [], 0, []
    for row in range(30):
        pool = [batch.r[(row - shift) % 30] for shift in range(4)]
        distances = [(r.flip(0) - batch.y[row]).square().mean().item() for r in pool]
        kept = [(distance, shift) for shift, distance in enumerate(distances) if distance >= 0.6**2]
        rejected += 4 - len(kept)
        errors.append(min(kept)[0] if kept else 0.0)
        chosen.append(pool[min(kept)[1]] if kept else batch.r[row])
    assert rejected > 3
    assert loss.total.item() == pytest.approx(sum(errors) / 30, rel=1e-5)
    assert loss.parts["rejected_fraction"].item() == pytest.approx(rejected / 120, rel=1e-5)
    assert torch.equal(network.calls[-1]["x"], torch.stack(chosen))


def test_imle_has_no_loss_for_data_that_the_whole_pool_is_near():
    batch = make_batch(16, y=lambda r: CENTER.expand(len(r), 2))
    shift = torch.tensor(0.05, requires_grad=True)
    network = FakeNetwork(lambda x, time, step_size: (CENTER + shift).expand(len(x), 2))
    near = make_objective("imle", "default", eps=0.1).loss(network, batch, NO_TEACHER)
    assert (near.total.item(), derivative(near, shift)) == (0, 0)
    far = make_objective("imle", "default", eps=0.0).loss(network, batch, NO_TEACHER)
    assert derivative(far, shift) == pytest.approx(0.1, rel=1e-4)


MODES = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]])


@pytest.mark.slow
def test_imle_covers_every_mode_and_regression_gives_their_mean():
    """The reason for IMLE (1809.09087, figure 1): each datum has an output near it."""

    def batches(step):
        batch = make_batch(256, seed=step)
        return replace(batch, y=MODES[(batch.uniforms[:, 7] * 4).long()])

    outputs = {}
    for name, hyperparameters in (("imle", {"pool_size": 12.0}), ("endpoint", {"segment": 0.0})):
        objective = make_objective(name, "default", **hyperparameters)
        outputs[name], _ = sample(objective, train(objective, 400, batches), 1)
    fractions = (torch.cdist(outputs["imle"], MODES) < 0.4).float().mean(0)
    assert fractions.min().item() > 0.08
    assert outputs["endpoint"].norm(dim=1).mean().item() < 0.3


def test_further_steps_of_imle_change_nothing():
    network = SmallNetwork()
    one, many = (sample(make_objective("imle", "default"), network, n)[0] for n in (1, 4))
    assert torch.equal(one, many)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hyperparameters", "steps"),
    [
        ("mean_flow", {}, 800),
        ("shortcut", {"bootstrap_fraction": 0.5}, 1200),
        # Noise levels above 10 are rarely drawn and weigh little: this short a training does not reach 80.
        ("consistency", {"stages": 4.0, "sigma_max": 10.0}, 1500),
    ],
)
def test_one_step_of_a_trained_rival_ends_where_the_flow_does(name, hyperparameters, steps):
    """At CENTER + SPREAD R. One Euler step of the flow's velocity, E[y - R | R], ends at CENTER instead."""
    objective = make_objective(name, "default", **hyperparameters)
    network = train(objective, steps, lambda step: make_batch(256, seed=1000 + step))
    x, r = sample(objective, network, 1)
    euler, _ = sample(make_objective("flow_matching", "default"), FakeNetwork(mean_velocity), 1)
    expected = CENTER + SPREAD * r
    assert torch.allclose(euler, CENTER.expand_as(r), atol=1e-5)
    assert torch.allclose(x.mean(0), CENTER, atol=0.1)
    assert x.std(0).mean().item() == pytest.approx(SPREAD, abs=0.1)
    assert (x - expected).norm(dim=1).mean().item() < 0.3 * (euler - expected).norm(dim=1).mean().item()


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_mean_flow_and_shortcuts_that_know_the_mean_velocity_end_where_the_flow_does(n):
    known = {
        "mean_flow": mean_velocity,
        "shortcut": lambda x, time, step_size: mean_velocity(x, time, torch.exp2(-7 * (1 - step_size))),
    }
    for name, function in known.items():
        x, r = sample(make_objective(name, "default"), FakeNetwork(function), n)
        assert torch.allclose(x, CENTER + SPREAD * r, atol=1e-5)


def test_shortcut_steps_below_the_smallest_count_as_the_smallest():
    network = FakeNetwork(lambda x, time, step_size: x)
    sample(make_objective("shortcut", "default"), network, 200, rows=4)
    assert {call["step_size"][0].item() for call in network.calls} == {0.0}
    assert make_objective("shortcut", "default").step_size(3) == pytest.approx(1 - math.log2(3) / 7)
