"""Weights that stay in a set: at every step, at the nearest point in the rule's metric, with hypergradients through the projection."""

import copy
import io
import math

import numpy as np
import pytest
import test_derivatives
import torch
from cases import CASES
from small import backward, differences, net, snapshot, train
from torch import nn
from torch._dynamo.utils import counters

from hyperopt import SGD, Adam, Averaged, Ball, Box, Hyper, Lion, Muon, ScheduleFree

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BOX, BALL = Box(-0.25, 0.25), Ball(1.0)
SOME = ("sgd", "sgd-everything", "rmsprop-momentum", "adagrad-everything", "adam-eps", "adamw")
some_cases = pytest.mark.parametrize("case", [case for case in CASES if case.name in SOME], ids=lambda case: case.name)
every_set = pytest.mark.parametrize("inside", [BOX, BALL], ids=["box", "ball"])


def weights(model):
    return [p.detach() for p in model.parameters()]


def flat(model):
    return torch.cat([w.flatten() for w in weights(model)])


def outside(inside, tensors):
    """By how much, relative to the set, tensors that are one vector are outside of it."""
    vector = torch.cat([t.detach().double().flatten() for t in tensors])
    if isinstance(inside, Ball):
        return float(vector.norm()) / inside.radius - 1
    return max(inside.lo - float(vector.min()), float(vector.max()) - inside.hi) / (inside.hi - inside.lo)


def nearest(ys, metrics, inside):
    """The nearest point of the set in float64: clipping, or bisection for the multiplier of the ball."""
    y = np.concatenate([y.double().flatten().numpy() for y in ys])
    h = np.concatenate(
        [
            (h if isinstance(h, torch.Tensor) else torch.tensor(h)).double().expand(y.shape).flatten()
            for y, h in zip(ys, metrics, strict=True)
        ]
    )
    if isinstance(inside, Box):
        x = np.clip(y, inside.lo, inside.hi)
    elif np.linalg.norm(y) <= inside.radius:
        x = y
    else:
        low, high = -80.0, 80.0  # bounds of the logarithm of the multiplier
        while low < (middle := (low + high) / 2) < high:
            if np.linalg.norm(y * (h / (h + math.exp(middle)))) > inside.radius:
                low = middle
            else:
                high = middle
        x = y * (h / (h + math.exp(high)))
    parts = torch.from_numpy(x).split([y.numel() for y in ys])
    return [part.view(y.shape).to(y.dtype) for part, y in zip(parts, ys, strict=True)]


# ---- feasible


@pytest.mark.one_in(3)
@every_set
@every_case
def test_inside_at_every_step(case, inside, monkeypatch):
    monkeypatch.setattr("hyperopt.body.choose.LARGE", 10)  # the two matrices are chunks of their own
    model = net()
    optimizer = Hyper(case.rule, learn=case.learnable, project=inside).stack(Adam).bind(model.parameters())
    assert outside(inside, weights(model)) > 0.1
    for at in range(4):
        train(model, optimizer, range(at, at + 1))
        assert outside(inside, weights(model)) < 1e-6
        assert at or outside(inside, weights(model)) > -1e-6
    assert len(optimizer._groups()[0].buffers) == (3 if case.rule.elementwise else 4)
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}
    values = optimizer.hyperparameters()
    assert all(value.isfinite().all() for value in values.values())


@every_set
def test_inside_with_weights_of_two_dtypes(inside):
    # The bounds are numbers of bfloat16, and what its rounding adds to a norm is at most 2^-9 of it.
    model = net()
    model[0].bfloat16()
    params = list(model.parameters())
    optimizer = Hyper(Adam, lr=0.05, project=inside).stack(Adam).bind(params)
    for at in range(10):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(at)).to(p.dtype)
        optimizer.step()
        assert outside(inside, params) < (1e-6 if inside is BOX else 2**-9)
    assert len(optimizer._groups()[0].buffers) == 2


@pytest.mark.parametrize("height", [0, 1])
def test_a_set_for_each_group(height):
    model = net()
    first, second, third, fourth = model.parameters()
    groups = [{"params": [first], "project": BOX}, {"params": [second, third]}, {"params": [fourth], "project": Ball(0.2)}]
    tower = Hyper(Adam, lr=0.05, project=Ball(0.5))
    optimizer = (tower.stack(Adam) if height else tower).bind(groups)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "project": Box(0, 0.5)})
    last = optimizer.param_groups[3]["params"][0]
    for at in range(8):
        backward(model, at)
        last.grad = torch.tensor([-1.0, 1.0, 1e-3])
        optimizer.step()
        for inside, members in ((BOX, [first]), (Ball(0.5), [second, third]), (Ball(0.2), [fourth]), (Box(0, 0.5), [last])):
            assert outside(inside, members) < 1e-6
    assert float(second.detach().norm()) < 0.5 < math.hypot(*(float(p.detach().norm()) for p in model.parameters()))
    assert last.tolist()[0] == 0.5


@pytest.mark.parametrize("base", [Adam, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("kind", [ScheduleFree, Averaged])
@every_set
def test_averages_and_what_they_are_made_of_are_inside(inside, kind, base):
    model = net()
    optimizer = Hyper(kind(base), lr=0.5 if base is SGD else 0.05, project=inside).stack(Adam).bind(model.parameters())
    rule = optimizer.tower.rule
    for at in range(20):
        train(model, optimizer, range(at, at + 1))
        assert outside(inside, weights(model)) < 1e-6
        moved, averages = zip(
            *[[of(p.detach(), optimizer.state[p]) for of in (rule.place, rule.average)] for p in model.parameters()], strict=True
        )
        assert outside(inside, moved) < 1e-6
        assert outside(inside, averages) < 1e-6
    assert outside(inside, moved if kind is ScheduleFree else averages) > -0.1
    with optimizer.averaged():
        assert outside(inside, weights(model)) < 1e-6


# ---- nearest


@pytest.mark.parametrize("decades", [0, 1, 2, 4, 6, 8])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
def test_the_nearest_point_of_a_ball(dtype, rtol, decades):
    rng = np.random.default_rng(decades)
    for _ in range(40):
        sizes = rng.integers(1, 20, 3)
        ys = [torch.tensor(rng.normal(size=n), dtype=dtype) for n in sizes]
        metrics = [torch.tensor(10 ** rng.uniform(-decades, 0, n), dtype=dtype) for n in sizes]
        ball = Ball(float(torch.cat(ys).norm()) * 10 ** rng.uniform(-4, 0))
        xs = ball.project(ys, metrics)
        x, y, h = (torch.cat(parts).double() for parts in (xs, ys, metrics))
        assert float(x.norm()) == pytest.approx(ball.radius, rel=rtol)
        assert float((x - torch.cat(nearest(ys, metrics, ball))).norm()) < rtol * ball.radius
        # H (y − x) = λ x with one λ above 0, to the digits that y − x has.
        residual = h * (y - x)
        multiplier = torch.dot(residual, x) / torch.dot(x, x)
        assert multiplier > 0
        assert float((residual - multiplier * x).norm()) < 100 * rtol * float((h * y).norm())


APART = {
    "rmsprop-momentum": "the momentum is of steps that were divided already, by the metrics of their own time",
    "rmsprop-everything": "as above",
    "adopt": "as above",
    "adopt-clipped": "as above",
    "adopt-decay": "as above",
    "unified": "as above, in part",
    "adadelta": "the step divides by the s before it, the metric by the s after it",
    "adadelta-decay": "as above",
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in APART], ids=lambda case: case.name)
def test_the_metric_is_what_the_rule_divides_by(case):
    """The step is a common factor times m / metric, where m is the first moment, or the gradient."""
    rule = case.rule
    if isinstance(rule, SGD | Lion | Muon):
        assert rule.metric({}, None, None) == 1
        return
    w = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    optimizer = Hyper(rule).bind([w])
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-2, 1, 9, dtype=torch.float64)
    for _ in range(case.steps):
        w.grad = scale * (1 + torch.rand(9, generator=generator, dtype=torch.float64))
        optimizer.step()
    node = optimizer._groups()[0].root.body
    chunk = node.buffers[0]
    h, t = node.hypers.values({}), chunk.t + 1
    x, g = chunk.x(), scale.clone()
    x1, after = node.rule.update(x, g, chunk.state, h, t)
    metric = node.rule.metric(after, h, t)
    moment = next((name for name in ("m", "g1") if name in after), None)
    if moment is None:
        product = (x1 - x) * metric / (g + getattr(rule, "weight_decay", 0) * x)
    else:
        bump = 1e-6 * chunk.state[moment].abs()
        more, less = (node.rule.update(x, g, {**chunk.state, moment: chunk.state[moment] + k * bump}, h, t)[0] for k in (1, -1))
        product = (more - less) / (2 * bump) * metric
    torch.testing.assert_close(product, product.mean().expand_as(product), rtol=1e-6, atol=0)
    assert metric.max() > 1.01 * metric.min()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@every_set
def test_sgd_is_torchs_followed_by_the_plain_projection(inside, momentum):
    model, twin = net(torch.float64), net(torch.float64)
    optimizer = Hyper(SGD, lr=0.1, momentum=momentum, project=inside).bind(model.parameters())
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum)
    active = 0
    for at in range(100):
        train(model, optimizer, range(at, at + 1))
        train(twin, reference, range(at, at + 1))
        if inside is BOX:
            active += bool((flat(twin).abs() > 0.25).any())
            for w in weights(twin):
                w.clamp_(-0.25, 0.25)
        else:
            norm = float(flat(twin).norm())
            active += norm > 1
            for w in weights(twin):
                w.mul_(min(1, 1 / norm))
    assert active > 20
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tower", [Hyper(Adam, lr=0.02), Hyper(Adam, lr=0.02, learn=("lr", "beta1")).stack(Adam)], ids=str)
def test_a_set_that_is_never_left_has_no_effect(tower):
    ends = []
    for inside in (None, Ball(100), Box(-50, 50), Box(-math.inf, math.inf)):
        model = net()
        optimizer = (tower if inside is None else tower.inside(inside)).bind(model.parameters())
        train(model, optimizer, range(20))
        ends.append((flat(model), optimizer.hyperparameters(), optimizer.hypergradients()))
    assert differences(ends[1], ends[2]) == differences(ends[1], ends[3]) == []
    for name in ends[0][1]:
        torch.testing.assert_close(ends[0][1][name], ends[1][1][name])
    torch.testing.assert_close(ends[0][0], ends[1][0])  # without a set, Adam steps with a kernel of torch's own


# ---- hypergradients


def replay(node, steps, shift):
    """As test_derivatives.replay, with all chunks together moved to the nearest point after each step."""
    xs, states, out = steps[0].x, steps[0].state, []
    for i, step in enumerate(steps):
        raw = {name: r + (shift.get(name, 0) if i == 0 else 0) for name, r in step.raw.items()}
        rows = list(zip(node.body.buffers, xs, step.g, states, step.t, strict=True))
        ys, states = zip(*[test_derivatives.update(node, c, x, g, s, raw, t) for c, x, g, s, t in rows], strict=True)
        values = {name: h.value for name, h in node.hypers.own.items()} | {
            name: node.body.rule.declared()[name].domain.value(r) for name, r in raw.items()
        }
        h = test_derivatives.Plain(values)
        xs = nearest(ys, [node.body.rule.metric(s, h, t) for s, t in zip(states, step.t, strict=True)], node.body.feasible)
        out.append(xs)
    return out


def tower(case, inside, learn, horizon, strategy="tangents"):
    node = Hyper(case.rule, learn=learn, horizon=horizon, trust=None, strategy=strategy, project=inside)
    return node.stack(test_derivatives.TOP)


@pytest.mark.parametrize("horizon", [1, 10])
@every_set
@some_cases
def test_hypergradients_are_finite_differences(case, inside, horizon, monkeypatch):
    monkeypatch.setattr(test_derivatives, "replay", replay)
    monkeypatch.setattr(test_derivatives, "H", 3e-5)  # a weight that meets a bound is a kink, and within 3·H there must be none
    node, steps = test_derivatives.run(case, tower(case, inside, case.learnable, horizon), 0)
    assert node.body.feasible == inside
    assert max(outside(inside, step.x_new) for step in steps) == pytest.approx(0, abs=1e-12)
    test_derivatives.check(case, node, steps, horizon)


@pytest.mark.parametrize("size", [1.0, 1e15, 1e20, 1e30, 1e37])
def test_weights_without_a_square_come_back_to_the_ball(size):
    ys = [torch.tensor([3.0, -4.0]) * size, torch.zeros(0), torch.tensor(12.0, dtype=torch.float64) * size]
    for metrics in ([1.0] * 3, [torch.tensor([0.5, 0.5]), torch.zeros(0), torch.tensor(0.5, dtype=torch.float64)]):
        xs = Ball(2).project(ys, metrics)
        for x, part in zip(xs, ([3 / 13, -4 / 13], [], 12 / 13), strict=True):
            torch.testing.assert_close(x.float(), 2 * torch.tensor(part), rtol=1e-4, atol=0)


@every_set
@some_cases
def test_the_graph_is_the_same_at_horizon_1(case, inside):
    graph, tangents = (test_derivatives.run(case, tower(case, inside, case.learnable, 1, s), 0)[1] for s in ("graph", "tangents"))
    for name in case.learnable:
        test_derivatives.close(test_derivatives.reported(graph, name), test_derivatives.reported(tangents, name), rtol=1e-12, atol=1e-12)
    assert any(step.q["lr"] for step in graph[1:])


@pytest.mark.parametrize("base", [Adam, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("kind", [ScheduleFree, Averaged])
@every_set
def test_hypergradients_of_averaging_rules(inside, kind, base):
    # horizon inf with lr moved once, at the start, for all steps: the derivative of the whole run with gradients held.
    lr, held = 0.5 if base is SGD else 0.02, []

    def end(shift, learn=False):
        model = net(torch.float64)
        spec = Hyper(kind(base), lr=lr * math.exp(shift), horizon=math.inf, trust=None, project=inside)
        optimizer = (spec.stack(SGD, lr=1e-30) if learn else spec).bind(model.parameters())
        for at in range(6):
            if learn:
                backward(model, at)
                held.append([p.grad.clone() for p in model.parameters()])
            for p, g in zip(model.parameters(), held[at], strict=True):
                p.grad = g.clone()
            optimizer.step()
        name = "gap" if kind is ScheduleFree else "average"
        names = ["Z.lr", f"Z.lr.{name}"] if learn else [name]
        kept = [torch.cat([optimizer.state[p][name].flatten() for p in model.parameters()]) for name in names]
        return torch.stack(kept if learn else [flat(model), *kept])

    found = end(0, learn=True)
    h = 1e-4
    expected = sum(w * (end(k * h) - end(-k * h)) for k, w in test_derivatives.STENCIL.items()) / h
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    assert (found.norm(dim=1) > 1e-3).all()


def test_a_weight_at_a_bound_has_no_tangent():
    model = net()
    optimizer = Hyper(Adam, lr=0.02, horizon=1, project=BOX).stack(Adam).bind(model.parameters())
    train(model, optimizer, range(3))
    tangent = torch.cat([optimizer.state[p]["Z.lr"].flatten() for p in model.parameters()])
    bound = flat(model).abs() == 0.25
    assert 3 < int(bound.sum()) < bound.numel() - 3
    assert not tangent[bound].any()
    assert tangent[~bound].all()


def test_the_derivative_of_a_ball_has_no_part_along_its_normal():
    w = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    optimizer = Hyper(SGD, lr=0.1, horizon=1, trust=None, project=BALL).stack(SGD, lr=1e-30).bind([w])
    assert not optimizer._groups()[0].body.tangents.closed
    for _ in range(3):
        w.grad = torch.linspace(0.1, 1, 6, dtype=torch.float64) - w.detach()
        optimizer.step()
    tangent = optimizer.state[w]["Z.lr"]
    assert float(w.detach().norm()) == pytest.approx(1, rel=1e-12)
    assert abs(float(torch.dot(tangent, w.detach()))) < 1e-12
    assert float(tangent.norm()) > 1e-3


# ---- text, checkpoints, compilation


def test_text():
    for inside in (Box(0, 1), Box(-math.inf, 0), Box(-2.5, math.inf), Ball(3), Ball(1e-30)):
        spec = Hyper(Adam, lr=0.1, project=inside).stack(SGD)
        again = Hyper.parse(str(spec))
        assert again == spec
        assert again.project == inside
    assert str(spec) == "Adam(lr=0.1, project=Ball(1e-30)) / SGD"
    assert Hyper(Adam, project=Ball(1)) != Hyper(Adam, project=Ball(2)) != Hyper(Adam)


@pytest.mark.parametrize("way", ["checkpoint", "deepcopy"])
def test_a_checkpoint_keeps_the_sets_of_the_groups(way):
    def bound(model, inside):
        first, *rest = model.parameters()
        groups = [{"params": [first]}, {"params": rest}]
        if inside:
            groups[0]["project"] = inside
        return Hyper(Adam, lr=0.05).stack(Adam).bind(groups)

    model = net()
    optimizer = bound(model, BOX)
    train(model, optimizer, range(5))
    if way == "checkpoint":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin = copy.deepcopy(model)
        other = bound(twin, None)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin, other = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(5, 12))
        assert outside(BOX, [m[0].weight]) == 0
        assert outside(BOX, [m[2].weight]) > 0.1
    assert differences(snapshot(model, optimizer), snapshot(twin, other)) == []


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@every_set
def test_compiled_equals_eager(inside, monkeypatch):
    monkeypatch.setattr("hyperopt.feasible.ITERATIONS", 3)  # all 30 are one after the other in the compiled step, and take a minute
    torch._dynamo.reset()
    counters.clear()
    pairs = [
        (w := nn.Parameter(torch.linspace(-1, 1, 12)), Hyper(Adam, lr=0.05, project=inside).stack(Adam).bind([w], compile=c))
        for c in (False, True)
    ]
    for at in range(12):
        for w, optimizer in pairs:
            w.grad = torch.randn(12, generator=torch.Generator().manual_seed(at))
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    (w, eager), (v, fused) = pairs
    torch.testing.assert_close(w, v, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(eager.state[w]["Z.lr"], fused.state[v]["Z.lr"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(eager.hyperparameters(), fused.hyperparameters(), rtol=1e-3, atol=1e-7)
    assert outside(inside, [v]) < 1e-6


# ---- refused


BAD = [
    (lambda: Box(1, 0), ValueError, r"Box\(1.0, 0.0\): give a lower bound that is below"),
    (lambda: Box(1, 1), ValueError, "give a lower bound that is below"),
    (lambda: Box(math.nan, 1), ValueError, r"Box\(lo\) is not a number"),
    (lambda: Box(0, math.nan), ValueError, r"Box\(hi\) is not a number"),
    (lambda: Box("0", 1), TypeError, r"Box\(lo\) must be a number, got '0'"),
    (lambda: Box(0, True), TypeError, r"Box\(hi\) must be a number, got True"),
    (lambda: Ball(0), ValueError, r"Ball\(0.0\): give a finite radius above 0"),
    (lambda: Ball(-1), ValueError, "give a finite radius above 0"),
    (lambda: Ball(math.inf), ValueError, "give a finite radius above 0"),
    (lambda: Ball(math.nan), ValueError, r"Ball\(radius\) is not a number"),
    (lambda: Ball(None), TypeError, r"Ball\(radius\) must be a number, got None"),
    (lambda: Hyper(Adam, project=(0, 1)), TypeError, r"project = \(0, 1\) must be a set of weights such as Box"),
    (lambda: Hyper(Adam, project=Box), TypeError, "must be a set of weights"),
    (lambda: Hyper(Adam, project="Ball(1)"), TypeError, "must be a set of weights"),
    (lambda: Hyper(Adam).stack(Adam, project=Ball(1)), ValueError, r"project=Ball\(1.0\) belongs to level 0"),
    (lambda: Hyper(Adam).stack(lr=Hyper(Adam, project=Box(0, 1))), ValueError, "belongs to level 0"),
    (lambda: Hyper.parse("Adam / Adam(project=Ball(1))"), ValueError, "belongs to level 0"),
    (lambda: Hyper.parse("Adam(project=Ball(-1))"), ValueError, "give a finite radius above 0"),
    (lambda: Hyper.parse("Adam(project=Cube(1))"), ValueError, "Cube"),
    (lambda: Hyper.parse("Adam(project=Ball(radius=1))"), ValueError, "Ball"),
    (lambda: Hyper.parse("Adam(project=Box(1))"), ValueError, "Box"),
    (lambda: Hyper.parse("Adam(project=3)"), ValueError, "must be a set of weights"),
    (lambda: Hyper.parse("Adam(project=Positive)"), ValueError, "must be a set of weights"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("given", ["Ball(1)", 1.0, (0, 1), Ball])
def test_a_group_with_what_is_no_set(given):
    model = net()
    optimizer = Hyper(Adam).bind([model[0].weight])
    for make in (Hyper(Adam).bind, lambda groups: optimizer.add_param_group(groups[0])):
        with pytest.raises(TypeError, match="must be a set of weights such as Box"):
            make([{"params": [model[2].weight], "project": given}])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("text", ["Cube(1)", "Ball(", "Ball(-1)", "Positive", "1", "Adam(lr=1)", "Ball(1, 2)", ""])
def test_a_checkpoint_with_what_is_no_set(text):
    model = net()
    optimizer = Hyper(Adam).stack(Adam).bind([{"params": list(model.parameters()), "project": BOX}])
    train(model, optimizer, range(3))
    given, before = copy.deepcopy(optimizer.state_dict()), snapshot(model, optimizer)
    given["param_groups"][0]["project"] = text
    with pytest.raises(ValueError, match=r"is not a set of weights|a finite radius|is not a number, a name"):
        optimizer.load_state_dict(given)
    assert differences(before, snapshot(model, optimizer)) == []
    train(model, optimizer, range(3, 6))
    assert outside(BOX, weights(model)) == 0
