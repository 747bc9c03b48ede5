"""MeanFlow, shortcut models and rectified flow against flows in closed form, finite differences and loops over rows."""

import math
from dataclasses import replace

import pytest
import torch
from known_flows import (
    CENTER,
    NO_TEACHER,
    SPREAD,
    TEXT_DIM,
    FakeNetwork,
    SmallNetwork,
    derivative,
    make_batch,
    mean_velocity,
    sample,
    straight_velocity,
)

from index.errors import OptionError, RunError
from index.table.storage import write_json
from trainer.models import mlp, transformer
from trainer.models.mlp import LatentMLP
from trainer.models.transformer import LatentTransformer
from trainer.objectives import rectified_flow
from trainer.objectives.base import Training
from trainer.objectives.registry import make_objective
from trainer.run_folder import FORMAT, save_network

SHAPES = {"mlp": (3, 2, 2), "transformer": (4, 8, 8)}
BUILD = {
    "mlp": lambda: LatentMLP(SHAPES["mlp"], TEXT_DIM, *mlp.SIZES["tiny"]),
    "transformer": lambda: LatentTransformer(SHAPES["transformer"], TEXT_DIM, *transformer.SIZES["tiny"]),
}


def build(name):
    torch.manual_seed(1)
    return BUILD[name]()


def latent_batch(name, rows=8):
    return make_batch(rows, y=lambda r: r.flip(0) * 1.2, dim=math.prod(SHAPES[name]))


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_target_of_mean_flow_is_that_of_finite_differences(name):
    network, batch = build(name), latent_batch(name)
    objective = make_objective("mean_flow", "default", norm_p=0.0, dropout=0.3)
    time, step_size = objective.sample_intervals(batch)
    cond_mask, v = objective.cond_mask(batch), batch.y - batch.r

    def u(h):
        x = batch.r + (time + h)[:, None] * v
        path = {"time": time + h, "step_size": step_size - h}
        return network(x, batch.text, cond_mask=cond_mask, **path).direction.detach()

    du_dt = (u(0.01) - u(-0.01)) / 0.02
    loss = objective.loss(network, batch, NO_TEACHER)
    # Fresh networks change with time no faster than points do; otherwise du/dt would dominate the targets.
    assert loss.parts["du_dt"] < v.square().sum(1).mean()
    assert loss.parts["du_dt"].item() == pytest.approx(du_dt.square().sum(1).mean().item(), rel=0.02)
    error = (u(0) - v - step_size[:, None] * du_dt).square().sum(1).mean()
    assert loss.total.item() == pytest.approx(error.item(), rel=0.02)
    assert loss.total.item() != pytest.approx((u(0) - v).square().sum(1).mean().item(), rel=0.05)


def test_the_loss_of_mean_flow_is_flat_at_the_mean_velocity_alone():
    objective, batch = make_objective("mean_flow", "default", norm_p=0.0), make_batch(100_000)
    derivatives = []
    for size in (1.0, 0.9):
        gain = torch.tensor(size, requires_grad=True)
        network = FakeNetwork(lambda x, time, step_size, gain=gain: gain * mean_velocity(x, time, step_size))
        derivatives.append(derivative(objective.loss(network, batch, NO_TEACHER), gain))
    assert abs(derivatives[0]) < 0.05 * abs(derivatives[1])


def test_intervals_of_mean_flow_have_the_authors_distribution():
    """Quantiles of the normal: the median start is sigmoid(0.6) in our time, and a quarter of the inputs have none."""
    time, step_size = make_objective("mean_flow", "default").sample_intervals(make_batch(100_000))
    assert time.median().item() == pytest.approx(1 / (1 + math.exp(-0.6)), abs=0.01)
    # An interval is also empty if its end, with mean -4 and the start's std of 1.6, would lie before the start.
    before = 0.5 * (1 + math.erf(-3.4 / (1.6 * math.sqrt(2)) / math.sqrt(2)))
    assert (step_size == 0).float().mean().item() == pytest.approx(0.25 + 0.75 * before, abs=0.01)
    assert ((step_size >= 0) & (time + step_size <= 1)).all()


def test_the_weight_of_mean_flow_makes_all_errors_count_alike():
    """With p = 1 and no eps each loss is 1; its gradient is that of the logarithm of the squared error."""
    batch, gain = make_batch(64, y=lambda r: r + 1), torch.tensor(3.0, requires_grad=True)
    network = FakeNetwork(lambda x, time, step_size: gain * torch.ones_like(x))
    loss = make_objective("mean_flow", "default", norm_p=1.0, norm_eps=1e-12).loss(network, batch, NO_TEACHER)
    assert loss.total.item() == pytest.approx(1, rel=1e-5)
    # The error is 2 (gain - 1)^2.
    assert derivative(loss, gain) == pytest.approx(2 / (3 - 1), rel=1e-5)


def test_the_derivative_of_mean_flow_is_computed_in_full_precision():
    """Under autocast as accelerate applies it, to the instance's forward."""
    objective, batch = make_objective("mean_flow", "default"), latent_batch("mlp")
    full, network = objective.loss(build("mlp"), batch, NO_TEACHER), build("mlp")
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    low = objective.loss(network, batch, NO_TEACHER)
    assert low.total.item() != full.total.item()
    assert low.parts["du_dt"].item() == full.parts["du_dt"].item()


class Wrapper(torch.nn.Module):
    """A wrapper like that of distributed training."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled(network):
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize("wrap", [Wrapper, compiled, lambda network: Wrapper(compiled(network))])
def test_mean_flow_has_the_same_gradients_through_wrappers(wrap):
    network, batch, objective = SmallNetwork(), make_batch(64), make_objective("mean_flow", "default")
    gradients = []
    for each in (network, wrap(network)):
        objective.loss(each, batch, NO_TEACHER).total.backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


def test_targets_of_shortcuts_are_those_of_a_loop_over_rows():
    batch, objective = make_batch(200), make_objective("shortcut", "default", clip=1.5)
    network = FakeNetwork(lambda x, time, step_size: torch.zeros_like(x))
    teacher = FakeNetwork(lambda x, time, step_size: 0.3 * x.flip(1) + time[:, None] - 2 * step_size[:, None])
    loss = objective.loss(network, batch, Training(0.0, teacher))
    (call,), errors, bootstrapped = network.calls, [], 0
    for row in range(200):
        t, log_size = call["time"][row].item(), call["step_size"][row].item()
        halvings = round(7 * (1 - log_size))
        assert log_size == pytest.approx(1 - halvings / 7, abs=1e-6)
        d = 0.5**halvings
        assert (t / d).is_integer()
        r, y = batch.r[row], batch.y[row]
        x, target = (1 - t) * r + t * y, y - r
        assert torch.allclose(call["x"][row], x, atol=1e-6)
        if halvings < 7:
            half_log_size = 1 - (halvings + 1) / 7
            first = 0.3 * x.flip(0) + t - 2 * half_log_size
            middle = (x + d / 2 * first).clamp(-1.5, 1.5)
            second = 0.3 * middle.flip(0) + t + d / 2 - 2 * half_log_size
            target = ((first + second) / 2).clamp(-1.5, 1.5)
            bootstrapped += 1
        errors.append(target.square().mean().item())
    # An eighth of 200 rows.
    assert 10 < bootstrapped < 45
    assert len(teacher.calls[0]["x"]) == bootstrapped
    assert loss.total.item() == pytest.approx(sum(errors) / 200, rel=1e-5)
    assert sum(loss.parts.values()).item() == pytest.approx(loss.total.item(), rel=1e-5)


def test_a_flow_agrees_with_its_own_two_half_steps():
    """Mean velocities of a flow are self-consistent for any pairs; those scaled by 0.9 are not."""
    batch, objective = make_batch(2000), make_objective("shortcut", "default", bootstrap_fraction=1.0, clip=math.inf)
    losses = []
    for scale in (1.0, 0.9):
        network = FakeNetwork(
            lambda x, time, step_size, scale=scale: scale * mean_velocity(x, time, torch.exp2(-7 * (1 - step_size)))
        )
        losses.append(objective.loss(network, batch, Training(0.0, network)).total.item())
    assert losses[0] < 1e-10
    assert losses[1] > 1e-5


def test_a_shortcut_that_knows_straight_pairs_has_no_loss():
    batch = make_batch(500, y=lambda r: CENTER + SPREAD * r)
    objective = make_objective("shortcut", "default", bootstrap_fraction=0.5)
    gain = torch.tensor(1.0, requires_grad=True)
    network = FakeNetwork(lambda x, time, step_size: gain * straight_velocity(x, time))
    loss = objective.loss(network, batch, Training(0.0, network))
    assert loss.total.item() == pytest.approx(0, abs=1e-10)
    assert abs(derivative(loss, gain)) < 1e-5


def test_no_gradient_flows_through_the_teacher_of_a_shortcut():
    batch = make_batch(500, y=lambda r: CENTER + SPREAD * r)
    objective = make_objective("shortcut", "default", bootstrap_fraction=0.5)
    gain = torch.tensor(0.8, requires_grad=True)
    network = FakeNetwork(lambda x, time, step_size: gain * straight_velocity(x, time))
    constant = FakeNetwork(lambda x, time, step_size: 0.8 * straight_velocity(x, time))
    expected = derivative(objective.loss(network, batch, Training(0.0, constant)), gain)
    assert abs(expected) > 0.05
    assert derivative(objective.loss(network, batch, Training(0.0, network)), gain) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_bootstrap_targets_does_not_call_the_teacher():
    batch = replace(make_batch(8), uniforms=torch.full((8, 8), 0.5))
    loss = make_objective("shortcut", "default").loss(SmallNetwork(), batch, NO_TEACHER)
    assert loss.parts["self_consistency"].item() == 0


def make_run(folder, objective="flow_matching"):
    """A run folder whose network's velocity is CENTER everywhere."""
    network = LatentMLP([2, 1, 1], TEXT_DIM, *mlp.SIZES["tiny"])
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.cat([torch.zeros(2), CENTER]))
    folder.mkdir()
    fitted = {"objective": objective, "preset": "default"}
    write_json(folder / "config.json", {"format": FORMAT, "fit": fitted, "objective": {}})
    save_network(folder, network)
    return folder


@pytest.mark.parametrize("steps", [1.0, 4.0])
def test_a_rectified_flow_trains_on_pairs_of_noise_and_the_flows_ends(tmp_path, steps):
    hyperparameters = {"flow": str(make_run(tmp_path / "flow")), "solver_steps": steps, "dropout": 0.0}
    objective = make_objective("rectified_flow", "default", **hyperparameters)
    objective.check()
    batch, gain = make_batch(64), torch.tensor(1.0, requires_grad=True)
    network = FakeNetwork(lambda x, time, step_size: gain * CENTER.expand(len(x), 2))
    loss = objective.loss(network, batch, NO_TEACHER)
    assert loss.total.item() == pytest.approx(0, abs=1e-10)
    assert abs(derivative(loss, gain)) < 1e-5
    (call,) = network.calls
    assert torch.allclose(call["x"], batch.r + call["time"][:, None] * CENTER, atol=1e-5)
    assert call["time"].std() > 0.2
    zero = FakeNetwork(lambda x, time, step_size: torch.zeros_like(x))
    loss = objective.loss(zero, batch, NO_TEACHER).total.item()
    assert loss == pytest.approx(CENTER.square().mean().item(), rel=1e-5)


def test_ends_of_the_flow_approach_the_closed_form_with_more_solver_steps(tmp_path, monkeypatch):
    """The flow to a Gaussian ends at CENTER + SPREAD R; Euler's error falls as 1 / steps, the loss as its square."""
    monkeypatch.setattr(rectified_flow, "load_network", lambda folder: FakeNetwork(mean_velocity))
    losses = []
    for steps in (10, 40):
        flow = str(make_run(tmp_path / str(steps)))
        objective = make_objective("rectified_flow", "default", flow=flow, solver_steps=steps)
        losses.append(objective.loss(FakeNetwork(straight_velocity), make_batch(2000), NO_TEACHER).total.item())
    assert losses[0] < 0.01
    assert losses[1] == pytest.approx(losses[0] / 16, rel=0.2)


@pytest.mark.parametrize("n", [1, 3])
def test_one_step_along_straight_pairs_is_as_good_as_many(n):
    x, r = sample(make_objective("rectified_flow", "default"), FakeNetwork(straight_velocity), n)
    assert torch.allclose(x, CENTER + SPREAD * r, atol=1e-5)


def refusal(flow, error=RunError):
    with pytest.raises(error) as caught:
        make_objective("rectified_flow", "default", flow=str(flow)).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flow_that_is_missing_or_not_a_flow_is_refused_before_training(tmp_path):
    assert "add --set flow=RUN, made with --objective flow_matching" in refusal("", OptionError)
    assert f"{tmp_path / 'nowhere'} is not a training run: it has no config.json" in refusal(tmp_path / "nowhere")
    other = make_run(tmp_path / "other", objective="coalescer")
    assert f"{other} is a run of coalescer: use --set flow=RUN with a run of flow_matching or" in refusal(other)
    unfinished = make_run(tmp_path / "unfinished")
    (unfinished / "network" / "diffusion_pytorch_model.safetensors").unlink()
    assert f"{unfinished / 'network'} holds no trained network" in refusal(unfinished)
    complete = make_run(tmp_path / "complete")
    make_objective("rectified_flow", "default", flow=str(complete)).check()
