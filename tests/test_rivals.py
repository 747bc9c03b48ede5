"""Rivals against closed forms: where the right answer is known, losses vanish there alone and steps lead to it.

Most tests take pairs R ~ N(0, I) and y ~ N(CENTRE, SPREAD^2 I), of which flow, mean velocity and consistency function
are known, or y = CENTRE + SPREAD R, where the flow of the former leads.
"""

import math
from dataclasses import replace

import pytest
import torch

from index.errors import OptionError, RunError
from index.table.storage import write_json
from trainer.models.base import Network, NetworkConfig, Prediction, make_network
from trainer.objectives import rectified_flow
from trainer.objectives.base import Training, make_objective
from trainer.optimizer import Optimizer
from trainer.run_folder import FORMAT, save_network
from trainer.stream import Batch

T = 3
CENTRE, SPREAD = torch.tensor([0.8, -0.5]), 0.5
NOBODY = Training(0.0, lambda *_, **__: pytest.fail("no teacher is needed"))
HALFWAY = NOBODY._replace(progress=0.5)


def pairs(count, seed=0, y=None, size=2):
    """Random points and uniforms; y is drawn from the Gaussian unless given as a function of R."""
    g = torch.Generator().manual_seed(seed)
    r, z = torch.randn(count, size, generator=g), torch.randn(count, size, generator=g)
    words, uniforms = torch.randn(count, 1, T, generator=g), torch.rand(count, 8, generator=g)
    y = CENTRE + SPREAD * z if y is None else y(r)
    return Batch(r=r, text=words, y=y, uniforms=uniforms)


class Known(Network):
    """Answers by a function of point, time and span; remembers what it was asked."""

    def __init__(self, answer):
        torch.nn.Module.__init__(self)
        self.answer, self.asked = answer, []

    def forward(self, x, text, *, keep=None, time=None, span=None):
        self.asked.append({"x": x, "keep": keep, "time": time, "span": span})
        nothing = torch.zeros(len(x))
        return Prediction(nothing, self.answer(x, time, span), nothing)


class Small(Network):
    """A network for two dimensions that ignores descriptions."""

    def __init__(self, width=64):
        torch.nn.Module.__init__(self)
        layers = [torch.nn.Linear(4, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x, text, *, keep=None, time=None, span=None):
        nothing = torch.zeros(len(x))
        clock = [nothing if each is None else each for each in (time, span)]
        return Prediction(nothing, self.body(torch.cat([x, torch.stack(clock, 1)], 1)), nothing)


def fitted(objective, steps, batches, seed=0):
    """A small network trained by an objective, with its averaged weights."""
    torch.manual_seed(seed)
    network = Small()
    optimizer = Optimizer(network, steps=steps, learning_rate=5e-3, ema_decay=0.99)
    teacher = optimizer.teacher
    for step in range(steps):
        optimizer.step(objective.loss(network, batches(step), Training(step / steps, teacher)).total)
    return optimizer.averaged_model


def sampled(objective, network, n, count=2000, guidance=1.0):
    """Where n steps lead from fresh points, and these points."""
    batch = pairs(count, seed=99)
    noise = torch.Generator().manual_seed(7)
    x = batch.r
    with torch.no_grad():
        for i in range(n):
            step = objective.step(
                network, x, batch.text, i, n, guidance, lambda: torch.randn(count, 2, generator=noise)
            )
            x = step.x
    assert step.confidence.isnan().all()
    return x, batch.r


def still():
    raise AssertionError("nobody needs fresh points")


def slope_of(loss, gain):
    """The derivative of a loss by a number that it was computed with."""
    return torch.autograd.grad(loss.total, gain)[0].item()


def mean_velocity(x, time, span):
    """Of the flow from N(0, I) to N(CENTRE, SPREAD^2 I): with sd(t)^2 = (1 - t)^2 + t^2 SPREAD^2 a point x at time t
    moves to c t' + (x - c t) sd(t') / sd(t). Written so that span 0 gives the velocity."""
    span = torch.zeros_like(time) if span is None else span
    square = 1 + SPREAD**2

    def sd(t):
        return (1 - 2 * t + square * t**2).sqrt()

    rate = (square * (2 * time + span) - 2) / (sd(time) * (sd(time) + sd(time + span)))
    return CENTRE + rate[:, None] * (x - time[:, None] * CENTRE)


def straight(x, time, span=None):
    """The velocity of the segments from R to CENTRE + SPREAD R at a point of one."""
    r = (x - time[:, None] * CENTRE) / (1 - (1 - SPREAD) * time[:, None])
    return CENTRE - (1 - SPREAD) * r


RIVALS = ["endpoint", "flow_matching", "rectified_flow", "mean_flow", "shortcut", "consistency", "imle"]


def test_the_mean_velocity_written_here_solves_the_flow():
    """Against a thousand small steps of the velocity, which is E[y - R | x] by Gaussian conditioning."""
    x = pairs(50).r
    time, span = torch.full((50,), 0.2), torch.full((50,), 0.7)
    end, h = x.double(), 0.7 / 1000
    for i in range(1000):
        t = 0.2 + (i + 0.5) * h
        given = (t * SPREAD**2 - (1 - t)) / ((1 - t) ** 2 + (t * SPREAD) ** 2)
        end = end + h * (CENTRE + given * (end - t * CENTRE))
    assert torch.allclose(x + 0.7 * mean_velocity(x, time, span), end.float(), atol=1e-3)


@pytest.mark.parametrize("name", RIVALS)
def test_descriptions_are_dropped_by_dice_and_guidance_extrapolates_the_end(name):
    objective = make_objective(name, "default", dropout=0.25)
    batch = pairs(64)

    class Told(Known):
        def forward(self, x, text, *, keep=None, time=None, span=None):
            guess = super().forward(x, text, keep=keep, time=time, span=span)
            keep = torch.ones(len(x), dtype=torch.bool) if keep is None else keep
            return guess._replace(direction=torch.where(keep[:, None], 1.0, -0.5) * torch.ones_like(x))

    network = Told(lambda x, time, span: x)
    if name != "rectified_flow":
        objective.loss(network, batch, Training(0.0, network))
        keeps = [asked["keep"] for asked in network.asked]
        column = 2 if name == "endpoint" else 0
        assert torch.equal(keeps[-1], batch.uniforms[:, column] >= 0.25)
    plain, blind, strong = (sampled(objective, network, 1, 64, guidance=w)[0] for w in (1.0, 0.0, 3.0))
    assert not torch.allclose(plain, blind)
    assert torch.allclose(strong, blind + 3 * (plain - blind), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "said"),
    [
        ("endpoint", {"segment": 1.5}, "segment 1.5 is no share: give a number from 0 to 1"),
        ("shortcut", {"share": -1.0}, "share -1.0 is no share"),
        ("imle", {"pool": 2.5}, "--set pool=2.5 is no whole number: give for instance pool=10"),
        ("imle", {"pool": 0.0}, "pool 0 is not allowed: give a number above 0"),
        ("mean_flow", {"eps": float("nan")}, "eps nan is not allowed"),
        ("consistency", {"stages": float("inf")}, "--set stages=inf is no whole number"),
        ("rectified_flow", {"flow": 7.0}, "--set flow=7 is a number: give a name, for a folder flow=./7"),
        ("flow_matching", {"dropout": 2.0}, "dropout 2.0 is no share"),
        ("endpoint", {"consistency": -1.0}, "consistency -1.0 is no weight: give 0 or more"),
        ("coalescer", {"clock": 2.0}, "--set clock=2 is neither no nor yes: give clock=0 or clock=1"),
    ],
)
def test_dials_that_mean_nothing_are_refused(name, hyperparameters, said):
    with pytest.raises(OptionError, match=said):
        make_objective(name, "default", **hyperparameters)


def test_dials_come_as_their_defaults_are():
    """From a command line every number is a float."""
    hyperparameters = make_objective("imle", "default", pool=7.0, eps=0)
    assert (hyperparameters.pool, type(hyperparameters.pool), type(hyperparameters.eps)) == (7, int, float)
    assert make_objective("coalescer", "default", clock=1.0).clock is True


def test_an_endpoint_is_learned_at_the_points_of_the_coalescer_and_is_as_consistent():
    batch, network = pairs(256), Known(lambda x, time, span: torch.zeros_like(x))
    loss = make_objective("endpoint", "default").loss(network, batch, HALFWAY)
    other = Known(lambda x, time, span: torch.zeros_like(x))
    alike = make_objective("coalescer", "default").loss(other, batch, HALFWAY)
    for asked, same in zip(network.asked, other.asked, strict=True):
        assert torch.equal(asked["x"], same["x"])
        assert torch.equal(asked["keep"], same["keep"])
    assert torch.allclose(loss.parts["consistency"], alike.parts["consistency"])
    x, ahead = (asked["x"] for asked in network.asked)
    missed, apart = (batch.y - x).square().mean().item(), (ahead - x).square().mean().item()
    assert loss.total.item() == pytest.approx(missed + 30 * 0.5**8 * apart, rel=1e-5)


def test_the_endpoint_of_a_random_point_is_the_mean_of_its_pairs():
    """With R independent of y the loss at R is least, and flat, at the mean of y."""
    batch, objective = pairs(20_000), make_objective("endpoint", "default", segment=0.0, consistency=0.0)
    slopes = []
    for away in (0.0, 0.1):
        gain = torch.tensor(away, requires_grad=True)
        network = Known(lambda x, time, span, gain=gain: CENTRE + gain - x)
        slopes.append(slope_of(objective.loss(network, batch, NOBODY), gain))
    assert abs(slopes[0]) < 0.01
    assert slopes[1] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_endpoint_steps_divide_the_way_evenly(n):
    batch, objective = pairs(64), make_objective("endpoint", "default")
    network = Known(lambda x, time, span: batch.y - x)
    assert objective.loss(network, batch, NOBODY).total.item() == pytest.approx(0, abs=1e-12)
    x = batch.r
    for i in range(n):
        x = objective.step(network, x, batch.text, i, n, 1.0, still).x
        assert torch.allclose(x, batch.r + (i + 1) / n * (batch.y - batch.r), atol=1e-5)


def consistent(function, sigma_max=80.0):
    """A network whose D(x, sigma) is a given function, by EDM's preconditioning written the other way round."""

    def answer(x, time, span):
        sigma = (sigma_max * (0.002 / sigma_max) ** time)[:, None]
        size = (sigma**2 + 0.25).sqrt()
        return (function(x * size, sigma) - 0.25 / size**2 * (x * size)) * size / (0.5 * sigma)

    return Known(answer)


def test_a_consistency_function_is_the_identity_without_noise():
    x, objective = pairs(64).r, make_objective("consistency", "default")
    network = Known(lambda x, time, span: torch.full_like(x, 3.0))
    assert torch.equal(objective.end(network, x, torch.zeros(64), x[:, None], None), x)
    sigma = torch.full((64,), 1.2)
    end = objective.end(network, x, sigma, x[:, None], None)
    assert torch.allclose(end, 0.25 / 1.69 * x + 0.6 / 1.3 * 3.0, atol=1e-5)
    assert torch.allclose(network.asked[-1]["x"], x / 1.3)


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
def test_the_levels_that_are_compared_near_each_other_stage_by_stage(progress, t, r):
    objective = make_objective("consistency", "default")
    assert objective.earlier(torch.tensor([t]), progress).item() == pytest.approx(r, rel=1e-5)


def test_a_consistency_function_that_knows_the_pair_has_no_loss_and_one_beside_has():
    batch = pairs(256, y=lambda r: CENTRE.expand(len(r), 2))
    objective = make_objective("consistency", "default", mean=0.0, std=1.0)
    slopes = []
    for away in (0.0, 0.3):
        gain = torch.tensor(away, requires_grad=True)
        network = consistent(lambda x, sigma, gain=gain: 0.5 * CENTRE + gain * sigma * torch.ones(2))
        loss = objective.loss(network, batch, Training(0.5, NOBODY.teacher))
        slopes.append((loss.total.item(), slope_of(loss, gain)))
    assert slopes[0] == pytest.approx((0, 0), abs=1e-2)
    # Apart by 0.3 (t - r) in each of two dimensions, which the weight divides by t - r; only the noisier end learns.
    t = batch.normal(1).exp()
    wanted = math.sqrt(2) * (t / (t - objective.earlier(t, 0.5))).mean().item()
    assert slopes[1] == pytest.approx((0.3 * math.sqrt(2), wanted), rel=0.05)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7])
def test_the_loss_of_consistency_training_is_flat_at_its_closed_form(progress):
    """Of y ~ N(0, s^2 I) E[x_r | x_t] is x_t (s^2 + r t) / (s^2 + t^2), so D(x, t) = a(t) x with
    a(t) = a(r) (s^2 + r t) / (s^2 + t^2) and a(0) = 1, for squared distances: a large constant c makes them so."""
    objective = make_objective("consistency", "default", mean=0.0, std=1.0, c=10.0)
    batch = pairs(40_000, y=lambda r: torch.randn(r.shape, generator=torch.Generator().manual_seed(5)))

    def shrink(t):
        a = torch.ones_like(t)
        for _ in range(600):
            r = objective.earlier(t[:, 0], progress)[:, None]
            a, t = a * (0.25 + r * t) / (0.25 + t**2), r
        return a

    slopes = []
    for size in (1.0, 0.9):
        # A power, because a factor would leave all levels as consistent as they are.
        gain = torch.tensor(size, requires_grad=True)
        network = consistent(lambda x, sigma, gain=gain: shrink(sigma) ** gain * x)
        slopes.append(slope_of(objective.loss(network, batch, Training(progress, NOBODY.teacher)), gain))
    assert abs(slopes[0]) < 0.05 * abs(slopes[1])


def test_consistency_steps_renoise_at_the_middle_level():
    """D of the Gaussian: the path of x at sigma ends at c + (x - c) s / sqrt(s^2 + sigma^2), s = SPREAD / 2 here."""
    objective = make_objective("consistency", "default")
    c, s = CENTRE / 2, SPREAD / 2
    network = consistent(lambda x, sigma: c + (x - c) * s / (s**2 + sigma**2).sqrt())
    one, r = sampled(objective, network, 1)
    assert torch.allclose(one, CENTRE + SPREAD * r, atol=1e-2)
    two, _ = sampled(objective, network, 2)
    fresh = torch.randn(2000, 2, generator=torch.Generator().manual_seed(7))
    wanted = c + (one / 2 + 0.821 * fresh - c) * s / math.sqrt(s**2 + 0.821**2)
    assert torch.allclose(two, 2 * wanted, atol=1e-3)
    told = [80.0 * (0.002 / 80.0) ** asked["time"][0].item() for asked in network.asked]
    sampled(objective, network, 3)
    more = [80.0 * (0.002 / 80.0) ** asked["time"][0].item() for asked in network.asked[3:]]
    assert told == pytest.approx([80.0, 80.0, 0.821], rel=1e-3)
    assert more == pytest.approx([80.0, math.sqrt(80.0 * 0.821), 0.821], rel=1e-3)


SHAPES = {"mlp": (3, 2, 2), "transformer": (4, 8, 8)}


def fresh(kind):
    torch.manual_seed(1)
    channels, height, width = SHAPES[kind]
    return make_network(
        NetworkConfig(kind=kind, size="tiny", channels=channels, height=height, width=width, text_dim=T)
    )


def some_pairs(kind, count=8):
    return pairs(count, y=lambda r: r.flip(0) * 1.2, size=math.prod(SHAPES[kind]))


@pytest.mark.parametrize("kind", list(SHAPES))
def test_the_target_of_mean_flow_is_that_of_finite_differences(kind):
    network, batch = fresh(kind), some_pairs(kind)
    objective = make_objective("mean_flow", "default", power=0.0, dropout=0.3)
    time, span = objective.times(batch)
    keep, v = batch.uniforms[:, 0] >= 0.3, batch.y - batch.r

    def u(h):
        x = batch.r + (time + h)[:, None] * v
        return network(x, batch.text, keep=keep, time=time + h, span=span - h).direction.detach()

    change = (u(0.01) - u(-0.01)) / 0.02
    loss = objective.loss(network, batch, NOBODY)
    # Fresh networks change with time no faster than points do; targets would drown in it.
    assert loss.parts["slope"] < v.square().sum(1).mean()
    assert loss.parts["slope"].item() == pytest.approx(change.square().sum(1).mean().item(), rel=0.02)
    error = (u(0) - v - span[:, None] * change).square().sum(1).mean()
    assert loss.total.item() == pytest.approx(error.item(), rel=0.02)
    assert loss.total.item() != pytest.approx((u(0) - v).square().sum(1).mean().item(), rel=0.05)


def test_the_loss_of_mean_flow_is_flat_at_the_mean_velocity_alone():
    objective, batch = make_objective("mean_flow", "default", power=0.0), pairs(100_000)
    slopes = []
    for size in (1.0, 0.9):
        gain = torch.tensor(size, requires_grad=True)
        network = Known(lambda x, time, span, gain=gain: gain * mean_velocity(x, time, span))
        slopes.append(slope_of(objective.loss(network, batch, NOBODY), gain))
    assert abs(slopes[0]) < 0.05 * abs(slopes[1])


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_mean_flow_and_shortcuts_that_know_the_mean_velocity_end_where_the_flow_does(n):
    told = {
        "mean_flow": mean_velocity,
        "shortcut": lambda x, time, span: mean_velocity(x, time, torch.exp2(-7 * (1 - span))),
    }
    for name, answer in told.items():
        x, r = sampled(make_objective(name, "default"), Known(answer), n)
        assert torch.allclose(x, CENTRE + SPREAD * r, atol=1e-5)


def test_spans_of_mean_flow_have_the_authors_law():
    """Quantiles of the normal law: median start sigmoid(0.6) in our time; a quarter of spans is 0; ends are late."""
    batch = pairs(100_000)
    time, span = make_objective("mean_flow", "default").times(batch)
    assert time.median().item() == pytest.approx(1 / (1 + math.exp(-0.6)), abs=0.01)
    # A span is also 0 where the end, with mean -4 and std 1.6 as the start, would lie before the beginning.
    before = 0.5 * (1 + math.erf(-3.4 / (1.6 * math.sqrt(2)) / math.sqrt(2)))
    assert (span == 0).float().mean().item() == pytest.approx(0.25 + 0.75 * before, abs=0.01)
    assert ((span >= 0) & (time + span <= 1)).all()


def test_the_weight_of_mean_flow_makes_all_errors_count_alike():
    """With p = 1 and no eps each loss is 1; its gradient is that of the logarithm of the squared error."""
    batch, gain = pairs(64, y=lambda r: r + 1), torch.tensor(3.0, requires_grad=True)
    network = Known(lambda x, time, span: gain * torch.ones_like(x))
    loss = make_objective("mean_flow", "default", power=1.0, eps=1e-12).loss(network, batch, NOBODY)
    assert loss.total.item() == pytest.approx(1, rel=1e-5)
    # The error is 2 (gain - 1)^2.
    assert slope_of(loss, gain) == pytest.approx(2 / (3 - 1), rel=1e-5)


def test_the_slope_of_mean_flow_is_taken_in_full_precision():
    """As accelerate does it, the instance's forward computes in bfloat16; the slope does not."""
    objective, batch = make_objective("mean_flow", "default"), some_pairs("mlp")
    full, network = objective.loss(fresh("mlp"), batch, NOBODY), fresh("mlp")
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    low = objective.loss(network, batch, NOBODY)
    assert low.total.item() != full.total.item()
    assert low.parts["slope"].item() == full.parts["slope"].item()


class Within(torch.nn.Module):
    """A wrapper as that of distributed training."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *given, **named):
        return self.module(*given, **named)


def compiled(network):
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize("wrap", [Within, compiled, lambda network: Within(compiled(network))])
def test_mean_flow_learns_the_same_through_wrappers(wrap):
    network, batch, objective = Small(), pairs(64), make_objective("mean_flow", "default")
    gradients = []
    for asked in (network, wrap(network)):
        objective.loss(asked, batch, NOBODY).total.backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


def test_targets_of_shortcuts_written_out_row_by_row():
    batch, objective = pairs(200), make_objective("shortcut", "default", clip=1.5)
    network = Known(lambda x, time, span: torch.zeros_like(x))
    teacher = Known(lambda x, time, span: 0.3 * x.flip(1) + time[:, None] - 2 * span[:, None])
    loss = objective.loss(network, batch, Training(0.0, teacher))
    asked, errors, longer = network.asked[0], [], 0
    for row in range(200):
        _, place, kind, level = batch.uniforms[row, :4].tolist()
        own, halvings = kind < 1 / 8, 7 if kind >= 1 / 8 else math.floor(7 * level)
        d = 0.5**halvings
        t = math.floor(place * 2**halvings) * d
        r, y = batch.r[row], batch.y[row]
        x, target = (1 - t) * r + t * y, y - r
        if own:
            told = 1 - (halvings + 1) / 7
            one = 0.3 * x.flip(0) + t - 2 * told
            between = (x + d / 2 * one).clamp(-1.5, 1.5)
            other = 0.3 * between.flip(0) + t + d / 2 - 2 * told
            target = ((one + other) / 2).clamp(-1.5, 1.5)
            longer += 1
        assert torch.allclose(asked["x"][row], x, atol=1e-6)
        assert asked["time"][row].item() == pytest.approx(t)
        assert asked["span"][row].item() == pytest.approx(1 - halvings / 7, abs=1e-6)
        errors.append(target.square().mean().item())
    assert 10 < longer < 45
    assert len(teacher.asked[0]["x"]) == longer
    assert loss.total.item() == pytest.approx(sum(errors) / 200, rel=1e-5)
    assert sum(loss.parts.values()).item() == pytest.approx(loss.total.item(), rel=1e-5)


def test_a_flow_agrees_with_its_own_two_half_steps():
    """Mean velocities of a flow are self-consistent, whatever the pairs; those of another spread are not."""
    batch, objective = pairs(2000), make_objective("shortcut", "default", share=1.0, clip=math.inf)
    right = Known(lambda x, time, span: mean_velocity(x, time, torch.exp2(-7 * (1 - span))))
    wrong = Known(lambda x, time, span: 0.9 * mean_velocity(x, time, torch.exp2(-7 * (1 - span))))
    assert objective.loss(right, batch, Training(0.0, right)).total.item() < 1e-10
    assert objective.loss(wrong, batch, Training(0.0, wrong)).total.item() > 1e-5


def test_straight_pairs_leave_a_shortcut_no_loss_and_its_teacher_no_gradient():
    batch, objective = pairs(500, y=lambda r: CENTRE + SPREAD * r), make_objective("shortcut", "default", share=0.5)
    for size, loss_of in ((1.0, 0.0), (0.8, None)):
        gain = torch.tensor(size, requires_grad=True)
        network = Known(lambda x, time, span, gain=gain: gain * straight(x, time))
        loss = objective.loss(network, batch, Training(0.0, network))
        if loss_of is not None:
            assert loss.total.item() == pytest.approx(loss_of, abs=1e-10)
            assert abs(slope_of(loss, gain)) < 1e-5
        else:
            fixed = Known(lambda x, time, span: 0.8 * straight(x, time))
            wanted = slope_of(objective.loss(network, batch, Training(0.0, fixed)), gain)
            assert abs(wanted) > 0.05
            assert slope_of(loss, gain) == pytest.approx(wanted, rel=1e-5)


def test_a_batch_without_long_steps_asks_no_teacher():
    batch = replace(pairs(8), uniforms=torch.full((8, 8), 0.5))
    loss = make_objective("shortcut", "default").loss(Small(), batch, NOBODY)
    assert loss.parts["self_consistency"].item() == 0


def run_of(folder, objective="flow_matching", kind="mlp", **network):
    """A run folder whose network's direction is CENTRE everywhere."""
    config = {"kind": kind, "size": "tiny", "channels": 2, "height": 1, "width": 1, "text_dim": T} | network
    flow = make_network(NetworkConfig(**config))
    with torch.no_grad():
        flow.head.weight.zero_()
        flow.head.bias.copy_(torch.cat([torch.zeros(2), CENTRE]))
    folder.mkdir()
    write_json(
        folder / "config.json",
        {"format": FORMAT, "fit": {"objective": objective, "preset": "default"}, "network": config, "objective": {}},
    )
    save_network(folder, flow)
    return folder


@pytest.mark.parametrize("steps", [1.0, 4.0])
def test_pairs_of_a_rectified_flow_are_the_ends_of_the_flow_that_is_named(tmp_path, steps):
    objective = make_objective(
        "rectified_flow", "default", flow=str(run_of(tmp_path / "flow")), solver_steps=steps, dropout=0.0
    )
    objective.check()
    batch, gain = pairs(64), torch.tensor(1.0, requires_grad=True)
    network = Known(lambda x, time, span: gain * CENTRE.expand(len(x), 2))
    loss = objective.loss(network, batch, NOBODY)
    assert loss.total.item() == pytest.approx(0, abs=1e-10)
    assert abs(slope_of(loss, gain)) < 1e-5
    t = batch.uniforms[:, 1]
    assert torch.equal(network.asked[0]["time"], t)
    assert torch.allclose(network.asked[0]["x"], batch.r + t[:, None] * CENTRE, atol=1e-5)
    other = Known(lambda x, time, span: torch.zeros_like(x))
    assert objective.loss(other, batch, NOBODY).total.item() == pytest.approx(CENTRE.square().mean().item(), rel=1e-5)


def test_the_pairs_near_the_closed_form_as_the_solver_takes_more_steps(tmp_path, monkeypatch):
    """The flow to a Gaussian ends at CENTRE + SPREAD R; Euler's error falls as 1 / steps, the loss as its square."""
    monkeypatch.setattr(rectified_flow, "load_network", lambda folder: Known(mean_velocity))
    losses = []
    for steps in (10, 40):
        flow = str(run_of(tmp_path / str(steps)))
        objective = make_objective("rectified_flow", "default", flow=flow, solver_steps=steps)
        losses.append(objective.loss(Known(straight), pairs(2000), NOBODY).total.item())
    assert losses[0] < 0.01
    assert losses[1] == pytest.approx(losses[0] / 16, rel=0.2)


@pytest.mark.parametrize("n", [1, 3])
def test_one_step_along_straight_pairs_is_as_good_as_many(n):
    x, r = sampled(make_objective("rectified_flow", "default"), Known(straight), n)
    assert torch.allclose(x, CENTRE + SPREAD * r, atol=1e-5)


def test_a_flow_that_is_missing_or_none_is_refused_before_training(tmp_path):
    from trainer.config import FitConfig

    def refused(flow, error=RunError):
        with pytest.raises(error) as caught:
            FitConfig(objective="rectified_flow", hyperparameters={"flow": str(flow)} if flow else {})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "give --set flow=RUN, made with --objective flow_matching" in refused("", OptionError)
    assert "nowhere is no training run: it has no config.json" in refused(tmp_path / "nowhere")
    other = run_of(tmp_path / "other", objective="coalescer")
    assert "other is a run of coalescer: give --set flow=RUN of one of flow_matching, rectified_flow" in refused(other)
    half = run_of(tmp_path / "half")
    (half / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in refused(half)
    run_of(tmp_path / "good")
    FitConfig(objective="rectified_flow", hyperparameters={"flow": str(tmp_path / "good")})


def test_the_nearest_output_of_the_pool_is_pulled_to_each_datum():
    batch = pairs(30)
    network = Known(lambda x, time, span: x.flip(1))
    objective = make_objective("imle", "default", pool=4, eps=0.6)
    loss, errors, rejected, chosen = objective.loss(network, batch, NOBODY), [], 0, []
    for row in range(30):
        points = [batch.r[(row - slot) % 30] for slot in range(4)]
        misses = [(point.flip(0) - batch.y[row]).square().mean().item() for point in points]
        left = [(miss, slot) for slot, miss in enumerate(misses) if miss >= 0.6**2]
        rejected += 4 - len(left)
        errors.append(min(left)[0] if left else 0.0)
        chosen.append(points[min(left)[1]] if left else batch.r[row])
    assert rejected > 3
    assert loss.total.item() == pytest.approx(sum(errors) / 30, rel=1e-5)
    assert loss.parts["rejected"].item() == pytest.approx(rejected / 120, rel=1e-5)
    assert torch.equal(network.asked[-1]["x"], torch.stack(chosen))


def test_data_that_the_whole_pool_is_near_teach_nothing():
    batch, gain = pairs(16, y=lambda r: CENTRE.expand(len(r), 2)), torch.tensor(0.05, requires_grad=True)
    network = Known(lambda x, time, span: (CENTRE + gain).expand(len(x), 2))
    near = make_objective("imle", "default", eps=0.1).loss(network, batch, NOBODY)
    assert (near.total.item(), slope_of(near, gain)) == (0, 0)
    far = make_objective("imle", "default", eps=0.0).loss(network, batch, NOBODY)
    assert slope_of(far, gain) == pytest.approx(0.1, rel=1e-4)


MODES = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]])


def test_imle_covers_every_mode_where_regression_gives_their_mean():
    """Its reason to be (1809.09087, figure 1): each datum has an output near it."""

    def batches(step):
        batch = pairs(256, seed=step)
        return replace(batch, y=MODES[(batch.uniforms[:, 7] * 4).long()])

    outputs = {}
    for name, hyperparameters in (("imle", {"pool": 12.0}), ("endpoint", {"segment": 0.0})):
        objective = make_objective(name, "default", **hyperparameters)
        outputs[name], _ = sampled(objective, fitted(objective, 400, batches), 1)
    at = (torch.cdist(outputs["imle"], MODES) < 0.4).float().mean(0)
    assert at.min().item() > 0.08
    assert outputs["endpoint"].norm(dim=1).mean().item() < 0.3


def test_further_steps_of_imle_change_nothing():
    network = Small()
    one, many = (sampled(make_objective("imle", "default"), network, n)[0] for n in (1, 4))
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "steps"),
    [
        ("mean_flow", {}, 800),
        ("shortcut", {"share": 0.5}, 1200),
        # Noise levels above 10 are rarely drawn and weigh little: this short a training does not reach 80.
        ("consistency", {"stages": 4.0, "sigma_max": 10.0}, 1500),
    ],
)
def test_one_step_of_a_trained_rival_ends_where_the_flow_does(name, hyperparameters, steps):
    """Known to be CENTRE + SPREAD R. One Euler step of the flow's velocity, E[y - R | R], ends at CENTRE instead."""
    objective = make_objective(name, "default", **hyperparameters)
    network = fitted(objective, steps, lambda step: pairs(256, seed=1000 + step))
    x, r = sampled(objective, network, 1)
    euler, _ = sampled(make_objective("flow_matching", "default"), Known(mean_velocity), 1)
    wanted = CENTRE + SPREAD * r
    assert torch.allclose(euler, CENTRE.expand_as(r), atol=1e-5)
    assert torch.allclose(x.mean(0), CENTRE, atol=0.1)
    assert x.std(0).mean().item() == pytest.approx(SPREAD, abs=0.1)
    assert (x - wanted).norm(dim=1).mean().item() < 0.3 * (euler - wanted).norm(dim=1).mean().item()
