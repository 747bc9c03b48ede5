"""Consistency training against consistency functions in closed form."""

import math

import pytest
import torch
from known_flows import CENTER, NO_TEACHER, SPREAD, FakeNetwork, derivative, make_batch, sample

from trainer.objectives.base import Training
from trainer.objectives.registry import make_objective


def network_of(consistency_function, sigma_max=80.0):
    """A network whose D(x, sigma) is a given function, by inverting EDM's preconditioning."""

    def direction(x, time, step_size):
        sigma = (sigma_max * (0.002 / sigma_max) ** time)[:, None]
        scale = (sigma**2 + 0.25).sqrt()
        return (consistency_function(x * scale, sigma) - 0.25 / scale**2 * (x * scale)) * scale / (0.5 * sigma)

    return FakeNetwork(direction)


def test_d_is_the_identity_without_noise_and_preconditioned_with_it():
    x, objective = make_batch(64).r, make_objective("consistency", "default")
    network = FakeNetwork(lambda x, time, step_size: torch.full_like(x, 3.0))
    assert torch.equal(objective.denoise(network, x, torch.zeros(64), x[:, None], None), x)
    end = objective.denoise(network, x, torch.full((64,), 1.2), x[:, None], None)
    assert torch.allclose(end, 0.25 / 1.69 * x + 0.6 / 1.3 * 3.0, atol=1e-5)
    assert torch.allclose(network.calls[-1]["x"], x / 1.3)


@pytest.mark.parametrize(
    ("progress", "t", "r"),
    [
        (0.0, 1.0, 0.0),  # 1 - (1 + 8 sigmoid(-1)) / 2 is below 0
        (0.0, 4.0, 4 * (1 - (1 + 8 / (1 + math.e**4)) / 2)),
        (0.124, 4.0, 4 * (1 - (1 + 8 / (1 + math.e**4)) / 2)),
        (0.125, 4.0, 4 * (1 - (1 + 8 / (1 + math.e**4)) / 4)),
        (0.999, 1e-3, 1e-3 * (1 - (1 + 8 / (1 + math.e**1e-3)) / 256)),
        (1.0, 50.0, 50 * (1 - 1 / 256)),
    ],
)
def test_the_lower_noise_level_approaches_the_higher_in_stages(progress, t, r):
    objective = make_objective("consistency", "default")
    assert objective.lower_level(torch.tensor([t]), progress).item() == pytest.approx(r, rel=1e-5)


def test_the_loss_vanishes_for_a_function_that_knows_the_pair_and_trains_the_noisier_point():
    batch = make_batch(256, y=lambda r: CENTER.expand(len(r), 2))
    objective = make_objective("consistency", "default", p_mean=0.0, p_std=1.0)
    results = []
    for error in (0.0, 0.3):
        gain = torch.tensor(error, requires_grad=True)
        network = network_of(lambda x, sigma, gain=gain: 0.5 * CENTER + gain * sigma * torch.ones(2))
        loss = objective.loss(network, batch, Training(0.5, NO_TEACHER.teacher))
        results.append((loss.total.item(), derivative(loss, gain)))
    assert results[0] == pytest.approx((0, 0), abs=1e-2)
    # The difference is 0.3 (t - r) in each of two dimensions, the weight 1 / (t - r); the gradient is t's alone.
    t = batch.normal(1).exp()
    gradient = math.sqrt(2) * (t / (t - objective.lower_level(t, 0.5))).mean().item()
    assert results[1] == pytest.approx((0.3 * math.sqrt(2), gradient), rel=0.05)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7])
def test_the_loss_is_flat_at_its_closed_form(progress):
    """The solution for y ~ N(0, s^2 I) and squared distances, which a large constant c makes of the loss.

    E[x_r | x_t] is x_t (s^2 + r t) / (s^2 + t^2), so D(x, t) = a(t) x with a(t) = a(r) (s^2 + r t) / (s^2 + t^2) and
    a(0) = 1.
    """
    objective = make_objective("consistency", "default", p_mean=0.0, p_std=1.0, c=10.0)
    batch = make_batch(40_000, y=lambda r: torch.randn(r.shape, generator=torch.Generator().manual_seed(5)))

    def a(t):
        product = torch.ones_like(t)
        for _ in range(600):
            r = objective.lower_level(t[:, 0], progress)[:, None]
            product, t = product * (0.25 + r * t) / (0.25 + t**2), r
        return product

    derivatives = []
    for exponent in (1.0, 0.9):
        # A power, because with a factor all levels would still be consistent with each other.
        gain = torch.tensor(exponent, requires_grad=True)
        network = network_of(lambda x, sigma, gain=gain: a(sigma) ** gain * x)
        derivatives.append(derivative(objective.loss(network, batch, Training(progress, NO_TEACHER.teacher)), gain))
    assert abs(derivatives[0]) < 0.05 * abs(derivatives[1])


def test_steps_denoise_and_add_noise_of_the_middle_level():
    """D of the Gaussian: the path of x at sigma ends at c + (x - c) s / sqrt(s^2 + sigma^2), s = SPREAD / 2 here."""
    objective = make_objective("consistency", "default")
    c, s = CENTER / 2, SPREAD / 2
    network = network_of(lambda x, sigma: c + (x - c) * s / (s**2 + sigma**2).sqrt())
    one, r = sample(objective, network, 1)
    assert torch.allclose(one, CENTER + SPREAD * r, atol=1e-2)
    two, _ = sample(objective, network, 2)
    fresh = torch.randn(2000, 2, generator=torch.Generator().manual_seed(7))
    expected = c + (one / 2 + 0.821 * fresh - c) * s / math.sqrt(s**2 + 0.821**2)
    assert torch.allclose(two, 2 * expected, atol=1e-3)
    sample(objective, network, 3)
    levels = [80.0 * (0.002 / 80.0) ** call["time"][0].item() for call in network.calls]
    assert levels == pytest.approx([80.0, 80.0, 0.821, 80.0, math.sqrt(80.0 * 0.821), 0.821], rel=1e-3)
