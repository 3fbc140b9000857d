"""Every hypergradient of every rule, at levels 0, 1 and 2, against finite differences of what the node itself did, in float64.

The definition: q = <g, Z> with Z = Σ_s γ^(T−s) ∂x_T/∂r_s, where x_T is what the node's own updates make of the gradients
it received, held fixed, r_s are its raw hyperparameters at step s, and γ = 1 − 1/horizon of the hyperparameter. At horizon 1 only s = T
counts.
"""

import dataclasses
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from cases import CASES
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hyperopt import SGD, Adam, Hyper, Optimizable, RAdam
from hyperopt.body.graph import Graph
from hyperopt.tangents import read_by_direction

LEVELS = (0, 1, 2)
HORIZONS = (1, 10, math.inf)
H = 1e-3  # small, as few coordinates may pass a kink (a maximum, a clip) within 3·H
STENCIL = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}  # central differences of order 6: the error is about H^6/140

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_level_and_horizon = pytest.mark.parametrize(("level", "horizon"), list(itertools.product(LEVELS, HORIZONS)))


# ---- towers with one rule of the table at one level


TOP = Hyper(SGD, lr=0.1, trust=None)


def tower(case, level, learn, *, horizon, trust=None, strategy="tangents", top=TOP):
    """The case's rule at `level`, rules whose hyperparameters move below it, and a held rule on top."""
    below = (
        Hyper(Adam, lr=0.05, beta2=0.9, eps=0.01, learn=("lr", "beta1", "beta2"), horizon=1, trust=None),
        Hyper(SGD, lr=0.5, momentum=0.5, learn=("lr", "momentum"), horizon=1, trust=None),
    )
    node = Hyper(case.rule, learn=learn, horizon=horizon, trust=trust, strategy=strategy)
    levels = (*below[:level], node, top)
    spec = levels[0]
    for above in levels[1:]:
        spec = spec.stack(above)
    return spec


@dataclass
class Step:
    """What a node was given at one step, and what it made of it; one entry a chunk."""

    x: list[Tensor]
    state: list[dict[str, Tensor]]
    t: list[Tensor]
    g: list[Tensor]
    q: dict[str, Tensor]
    given: dict[str, Tensor]  # after the level above and the user
    raw: dict[str, Tensor]  # as used: after trust
    x_new: list[Tensor]


@contextmanager
def watch(level):
    """A list to which the node of `level` adds a `Step` whenever it takes one."""
    steps, original = [], Optimizable.step

    def step(node, gs, ok, *arguments, **keywords):
        if node.level != level or not ok:
            return original(node, gs, ok, *arguments, **keywords)
        buffers, hypers = node.body.buffers, node.hypers
        x, g = [c.x().clone() for c in buffers], [g.clone() for g in gs]
        state = [{key: s.clone() for key, s in c.state.items()} for c in buffers]
        t = [c.t + 1 for c in buffers]
        given = {}

        def assigned(r):
            raw = type(hypers).assigned(hypers, r)
            given.update({name: r.clone() for name, r in raw.items()})
            return raw

        with mock.patch.object(hypers, "assigned", assigned):
            original(node, gs, ok, *arguments, **keywords)
        q = {name: v.clone() for name, v in node.q.items()}
        steps.append(Step(x, state, t, g, q, given, hypers.raw(), [c.x().clone() for c in buffers]))
        return None

    with mock.patch.object(Optimizable, "step", step):
        yield steps


def run(case, spec, level, *, whole=False):
    """Train a small network: the node of `level`, and what it did. `whole`: nothing is known of what directions depend on."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    reads = (lambda rule: rule.declared().keys()) if whole else read_by_direction
    with watch(level) as steps, mock.patch("hyperopt.tangents.read_by_direction", reads):
        optimizer = spec.bind(model.parameters())
        node = optimizer._groups()[0].nodes[str(level)]
        for _ in range(case.steps):
            x = torch.randn(8, 4, dtype=torch.float64)
            y = 3 * x[:, :2].sin() + 1
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
    return node, steps


# ---- the brute force, which differentiates nothing


class Plain:
    """Hyperparameters as a rule asks for them, in plain arithmetic."""

    def __init__(self, values):
        self.__dict__ = values

    def one_minus(self, name):
        return 1 - self.__dict__[name]

    def one_minus_power(self, name, t):
        return 1 - self.__dict__[name] ** t


def update(node, chunk, x, g, state, raw, t):
    """The rule alone, with its own domains."""
    values = {name: h.value for name, h in node.hypers.own.items()} | {
        name: node.body.rule.declared()[name].domain.value(r) for name, r in raw.items()
    }
    return chunk.rule.update(x, g, state, Plain({name: chunk.spread(name, value) for name, value in values.items()}), t)


def replay(node, steps, shift):
    """x after each of `steps`, from the state before the first, where the raw hyperparameters alone are shifted."""
    xs, states, out = steps[0].x, steps[0].state, []
    for i, step in enumerate(steps):
        raw = {name: r + (shift.get(name, 0) if i == 0 else 0) for name, r in step.raw.items()}
        rows = zip(node.body.buffers, xs, step.g, states, step.t, strict=True)
        xs, states = zip(*[update(node, c, x, g, s, raw, t) for c, x, g, s, t in rows], strict=True)
        out.append(xs)
    return out


def fading(node, steps, index):
    """By how much the guard against a falling lr multiplies tangents before each step."""
    if not node.body.projects:
        return [1.0] * len(steps)
    factors, anchor = [], float(steps[0].given["lr"][index])  # log lr, from the first value on
    for step in steps:
        log = float(step.raw["lr"][index])
        before, anchor = anchor, min(max(anchor, log), log + 1)
        factors.append(math.exp(min(0.0, 4 * (anchor - before))))
    return factors


def brute_force(node, steps, name, gamma, index=()):
    """The hypergradient of `name` (of one value, where there are several) at every step but the first."""
    fades = fading(node, steps, index) if name == "lr" else [1.0] * len(steps)
    shift = torch.zeros_like(node.hypers.raw()[name])
    shift[index] = H
    q = torch.zeros(len(steps), dtype=torch.float64)
    for first in range(len(steps) - 1):
        seen = steps[first:-1] if gamma else steps[first : first + 1]
        ends = {k: replay(node, seen, {name: k * shift}) for k in (-3, -2, -1, 1, 2, 3)}
        for later in range(len(seen)):
            for chunk, g in enumerate(steps[first + later + 1].g):
                dx = sum(w * (ends[k][later][chunk] - ends[-k][later][chunk]) for k, w in STENCIL.items()) / H
                q[first + later + 1] += gamma**later * math.prod(fades[first + 1 : first + later + 1]) * (g * dx).sum()
    return q[1:]


def flat(tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def reported(steps, name):
    return torch.stack([step.q[name] for step in steps[1:]])


def close(actual, expected, rtol, atol, least=0.0):
    """Equal up to rtol of each number, or up to atol of the largest, or `least`, where a number is 0 but for rounding."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=max(atol * float(expected.abs().max()), least))


def check(case, node, steps, horizon, indices=((),)):
    """What the node reported is what the definition says."""
    for x, step in zip(replay(node, steps, {}), steps, strict=True):
        torch.testing.assert_close(list(x), step.x_new, rtol=1e-12, atol=1e-12)
    for name in node.hypers.raw():
        for index in indices:
            q = reported(steps, name)[(slice(None), *index)]
            # Weights of about 1 are rounded at 1e-16, and their differences divided by H.
            mine = horizon[name] if isinstance(horizon, dict) else horizon
            close(q, brute_force(node, steps, name, 1 - 1 / mine, index), rtol=1e-6, atol=1e-9, least=2e-13)
            if name in case.late and mine == 1:
                assert not q.any(), f"{name} does act within one step: take it out of `late`"
            else:
                assert q.any(), f"the hypergradient of {name} is always zero"


# ---- properties


@pytest.mark.one_in(4)
@every_level_and_horizon
@every_case
def test_all_learned(case, level, horizon):
    node, steps = run(case, tower(case, level, case.learnable, horizon=horizon), level)
    assert (node.body.rule, set(node.hypers.raw())) == (case.rule, set(case.learnable))
    check(case, node, steps, horizon)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("level", [0, 1])
@every_case
def test_a_horizon_for_each(case, level):
    """10 for lr and 1, 10 and inf for the others in turn: nothing is carried for those with 1."""
    others = [name for name in case.learnable if name != "lr"]
    horizon = {"lr": 10} | dict(zip(others, itertools.cycle(HORIZONS), strict=False))
    node, steps = run(case, tower(case, level, case.learnable, horizon=horizon), level)
    check(case, node, steps, horizon)
    for buffer in node.body.buffers:
        assert not {name for name, z in buffer.tangents.items() if horizon[name] == 1 and set(z) != {"x"}}


@pytest.mark.one_in(4)
@every_level_and_horizon
@every_case
def test_lr_alone(case, level, horizon):
    spec = tower(case, level, "lr", horizon=horizon)
    node, steps = run(case, spec, level)
    assert node.body.tangents.closed == (not case.rule._couples())
    check(case, node, steps, horizon)
    general = run(case, spec, level, whole=True)[1]
    close(reported(steps, "lr"), reported(general, "lr"), rtol=1e-12, atol=1e-12)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("level", "trust"), [(0, None), (1, None), pytest.param(2, None, marks=pytest.mark.slow), (0, 3e-3)])
@pytest.mark.parametrize("alone", [False, True], ids=["all", "lr"])
@every_case
def test_graph_is_the_same_at_horizon_1(case, level, alone, trust):
    learn = "lr" if alone else case.learnable
    graph, tangents = (run(case, tower(case, level, learn, horizon=1, trust=trust, strategy=s), level) for s in ("graph", "tangents"))
    assert isinstance(graph[0].body, Graph)
    for name in tangents[0].hypers.raw():
        close(reported(graph[1], name), reported(tangents[1], name), rtol=1e-12, atol=1e-12)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("learn", ["lr", "all"])
@pytest.mark.parametrize(("level", "trust"), [(0, 3e-3), (1, 1e-3)])
@pytest.mark.parametrize("horizon", [1, 10])
@every_case
def test_projected_lr(case, horizon, level, trust, learn):
    """With trust at work Z belongs to the lr that was used, and the factor that made it smaller is a constant."""
    top = Hyper(SGD, lr=1e4, trust=0.5)  # moves by .5 at every step, so that trust has work in more than the first
    learn = learn if learn == "lr" else case.learnable
    with mock.patch("hyperopt.guards.Pace.LIMIT", 0.5):  # a raw lr above level 0 would move by .005
        node, steps = run(case, tower(case, level, learn, horizon=horizon, trust=trust, top=top), level)
    moves = [flat(s.x_new) - flat(s.x) for s in steps]
    if level == 0:
        moves = torch.stack([move.norm() / flat(s.x).norm() for s, move in zip(steps, moves, strict=True)])
    else:
        moves = torch.stack([move.abs().max() for move in moves])
    assert moves.max() <= trust * (1 + 1e-9)
    assert (moves > trust * (1 - 1e-9)).sum() >= 2, "trust was never at work"
    check(case, node, steps, horizon)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("per", "values"), [("tensor", 4), ("coordinate", 37)])
@every_case
def test_several_values(case, per, values):
    coupled = read_by_direction(case.rule) if per == "coordinate" and not case.rule.elementwise else ()
    learn = tuple(name for name in case.learnable if name not in coupled)
    spec = Hyper(case.rule, learn=learn, horizon=10, trust=None, per=per).stack(SGD, lr=0.1, trust=None)
    node, steps = run(case, spec, 0)
    assert node.hypers.raw()["lr"].shape == (values,)
    check(case, node, steps, 10, indices=[(2,)])


def test_a_value_each_is_a_tower_each():
    """One vector with a value per coordinate, its elements with a value per tensor, and its elements in groups of their own."""

    def trained(leaves, groups, per):
        spec = Hyper(Adam, lr=0.05, learn=("lr", "beta1"), trust=None, per=per).stack(SGD, lr=0.5, trust=None)
        optimizer = spec.bind(groups)
        for _ in range(7):
            optimizer.zero_grad()
            w = torch.cat(leaves)
            (w.sin() * w.roll(1) + w**2).sum().backward()
            optimizer.step()
        values = optimizer.hyperparameters()
        learned = [values[key].reshape(-1) for key in sorted(values) if key.startswith(("0.lr", "0.beta1"))]
        return torch.cat([w.detach(), *learned])

    start = torch.randn(5, dtype=torch.float64)
    vector = start.clone().requires_grad_()
    elements = [[w.clone().requires_grad_() for w in start.split(1)] for _ in range(2)]
    coordinates = trained([vector], [vector], "coordinate")
    tensors = trained(elements[0], elements[0], "tensor")
    groups = trained(elements[1], [{"params": [w]} for w in elements[1]], "group")
    assert coordinates[5:10].unique().numel() == 5
    torch.testing.assert_close(tensors, coordinates, rtol=1e-12, atol=0)
    torch.testing.assert_close(groups, coordinates, rtol=1e-12, atol=0)


def test_a_step_size_each_is_a_branch_each():
    """One SGD with a step size for each hyperparameter, and a tree with an SGD for each."""
    case, sizes = next(case for case in CASES if len(case.learnable) > 2), (0.1, 0.03, 0.01, 0.003)
    steps = dict(zip(case.learnable, sizes, strict=False))
    base = Hyper(case.rule, learn=tuple(steps), trust=None)
    one = run(case, base.stack(SGD, lr=steps, trust=None), 0)[1]
    tree = run(case, Hyper(case.rule, trust=None).stack(**{name: Hyper(SGD, lr=lr, trust=None) for name, lr in steps.items()}), 0)[1]
    for name in steps:
        close(reported(one, name), reported(tree, name), rtol=1e-12, atol=1e-12)
        assert one[-1].raw[name] != one[0].raw[name]


@every_case
def test_alive_by_default(case):
    """With defaults and in float32 too every hyperparameter that can be learned gets a gradient, and is moved by it."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = Hyper(case.rule, learn=case.learnable).stack(Adam).bind([w])
    start = optimizer.hyperparameters()
    for i in range(case.steps):
        w.grad = torch.linspace(0, 1 + i % 2, 6)
        optimizer.step()
    end, q = optimizer.hyperparameters(), optimizer.hypergradients()
    for name in case.learnable:
        assert q[f"0.{name}"] != 0
        assert end[f"0.{name}"] != start[f"0.{name}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_case
def test_zero_gradients(case, dtype):
    """Three steps without any gradient (v = 0) move nothing but what weight decay moves, and the first real one finds all finite."""
    w, peer = (torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype)) for _ in range(2))
    before = w.detach().clone()
    optimizer = Hyper(case.rule, learn=case.learnable, horizon=10, trust=None).stack(Adam).stack(SGD).bind([w])
    for _ in range(3):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    if getattr(case.rule, "weight_decay", 0) == 0:
        assert w.equal(before)
    else:
        theirs = case.peer([peer])
        for _ in range(3):
            peer.grad = torch.zeros_like(peer)
            theirs.step()
        torch.testing.assert_close(w, peer, rtol=1e-5, atol=0)
    w.grad = torch.linspace(0, 1, 6, dtype=dtype)
    for _ in range(2):
        optimizer.step()
    everything = [w, *optimizer.state[w].values(), *optimizer.hyperparameters().values(), *optimizer.hypergradients().values()]
    assert all(value.isfinite().all() for value in everything)
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("operations_of_torch")
@every_case
def test_bfloat16(case):
    """Weights in bfloat16 are those of float32, rounded after each step, and so is all that is learned from them."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 6).bfloat16().to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizers = [Hyper(case.rule, learn=case.learnable).stack(Adam).bind([w]) for w in weights]
    for i in range(case.steps):
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = torch.linspace(0, 1 + i % 2, 6).bfloat16().to(w.dtype)
            optimizer.step()
        half, single = (w.data for w in weights)
        assert half.equal(single.bfloat16())
        single.copy_(half)
    learned = [optimizer.hyperparameters() for optimizer in optimizers]
    assert all(learned[0][name] == learned[1][name] for name in learned[1])


@every_case
def test_no_gradient_yet_and_no_eps(case):
    """With eps held at 0 a coordinate without any gradient so far stays where it is, and its 0/0 reaches nothing else."""
    without = {name: 0.0 for name in ("eps",) if name in case.rule.declared()}
    rule, learn = dataclasses.replace(case.rule, **without), tuple(name for name in case.learnable if name not in without)
    w = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = Hyper(rule, learn=learn, horizon=10, trust=None).stack(SGD, lr=1e-30, trust=None).bind([w])
    start = w.detach().clone()
    for _ in range(4):
        w.grad = torch.linspace(0, 1, 6)
        optimizer.step()
    everything = [w, *optimizer.state[w].values(), *optimizer.hypergradients().values()]
    assert all(value.isfinite().all() for value in everything)
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}
    assert w[0] == start[0] or getattr(rule, "weight_decay", 0)


@pytest.mark.parametrize("strategy", ["graph", "tangents"])
@pytest.mark.parametrize("beta2", [0.3, 0.6, 0.9])
def test_the_branch_that_is_not_taken_makes_no_nan(beta2, strategy):
    """RAdam rectifies no step where beta2 < 2/3, and none of the first five: what it would divide by may be 0 or negative there."""
    spec = Hyper(RAdam, lr=0.02, beta2=beta2, learn=("lr", "beta2"), horizon=1, trust=None, strategy=strategy).stack(SGD, trust=None)
    w = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = spec.bind([w])
    for _ in range(8):
        w.grad = torch.linspace(0, 1, 6)
        optimizer.step()
    assert bool(optimizer.hypergradients()["0.beta2"] != 0) == (beta2 > 2 / 3)
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}


@every_case
def test_rows_say_why(case):
    """A hyperparameter that is not learned in these tests, or a rule that torch does not have, has a reason in its row."""
    assert case.reason or (case.torch and set(case.learnable) == set(case.rule.declared()))
