"""Guards: numbers that are not finite change nothing that counts and never freeze training; trust ratios hold at every level."""

import copy
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from small import backward, differences, loss_at, net, snapshot, train
from torch import nn

from hyperopt import SGD, Adam, AdamW, Hyper, Interval, Muon, Positive, Real, RMSprop, ScheduleFree, Unified, UnitInterval, hyper
from hyperopt.body.arithmetic import OnHost, Selected
from hyperopt.body.blocks import combined, length
from hyperopt.guards import Pace, is_finite
from hyperopt.rule import Rule
from hyperopt.spec.level import TRUST_ABOVE

CHAIN = Hyper(Adam, lr=1e-3).stack(Adam).stack(SGD)
ALL = Hyper(Adam, lr=1e-3, learn="all", horizon=10).stack(Adam)
TREE = Hyper(Adam, lr=1e-3).stack(lr=Hyper(Adam).stack(SGD), beta1=Hyper(SGD, lr=0.1))
GRAPH = Hyper(Adam, lr=1e-3, horizon=1, strategy="graph").stack(Hyper(SGD, lr=0.1, horizon=1, strategy="graph").stack(SGD))
MIXED = Hyper(SGD, lr=1e-3, momentum=0.9, learn="all", horizon=10).stack(Adam)
TOWERS = {"height 0": Hyper(Adam), "chain": CHAIN, "all": ALL, "tree": TREE, "graph": GRAPH, "momentum": MIXED}
BAD = [math.nan, math.inf, -math.inf]


def bound(tower, dtype=torch.float32, groups=1):
    model = net(dtype)
    params = list(model.parameters())
    return model, tower.bind([{"params": params[i::groups]} for i in range(groups)])


def spoil(model, step, value, tensor=0):
    """Gradients of a step, with one element of one tensor that is not finite."""
    backward(model, step)
    list(model.parameters())[tensor].grad.view(-1)[-1] = value


def values(optimizer, label="0.lr"):
    return float(optimizer.hyperparameters()[label])


def without_counts(state):
    for group in state["groups"]:
        group["tower"] = group["tower"]["nodes"]
    return state


# ---- gradients that are not finite


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_a_bad_gradient_changes_nothing(tower, groups, value):
    model, optimizer = bound(tower, groups=groups)
    train(model, optimizer, range(4))
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}
    before, seen = without_counts(snapshot(model, optimizer)), optimizer.hyperparameters()
    for i, tensor in enumerate((0, 3)):
        spoil(model, 4, value, tensor)
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert optimizer.skipped == {"gradients": i + 1, "hypergradients": 0}
        assert differences(grads, [p.grad for p in model.parameters()]) == []
    assert differences(before, without_counts(snapshot(model, optimizer))) == []
    assert differences(seen, optimizer.hyperparameters()) == []


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_training_is_as_if_the_bad_step_had_not_been(tower, groups, at):
    (model, optimizer), (twin, other) = (bound(tower, groups=groups) for _ in range(2))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(at))
    spoil(model, 99, math.nan)
    optimizer.step()
    assert differences([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()]) == []
    assert differences(optimizer.hyperparameters(), other.hyperparameters()) == []
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(at, at + 4))
    assert differences(without_counts(snapshot(model, optimizer)), without_counts(snapshot(twin, other))) == []
    assert optimizer.skipped["gradients"] == 1


def test_a_bad_step_leaves_a_pending_assignment_to_the_next():
    (model, optimizer), (twin, other) = (bound(CHAIN) for _ in range(2))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(3))
        o.param_groups[0]["lr"] = 0.0078125
    spoil(model, 99, math.nan)
    optimizer.step()
    assert values(optimizer) == 0.0078125
    train(model, optimizer, range(3, 4))
    train(twin, other, range(3, 4))
    assert values(optimizer) == values(other) == 0.0078125
    assert differences([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()]) == []


AVERAGING = {"schedule-free": Hyper(ScheduleFree(Adam)).stack(Adam), "above": Hyper(Adam).stack(ScheduleFree(Adam)).stack(SGD)}
HIGH = {"height 3": Hyper(Adam).stack(Adam).stack(Adam).stack(SGD), "high, all": Hyper(Adam, learn="all").stack(Adam).stack(Adam)}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("body", ["native", "torch", "compiled"])
@pytest.mark.parametrize("tower", (TOWERS | AVERAGING).values(), ids=TOWERS | AVERAGING)
def test_a_bad_gradient_leaves_what_is_not_finite_as_it_is(tower, body, bad, request, monkeypatch):
    """Weights, state and tangents, which a product with 0 would turn into NaN."""
    if body == "torch":
        request.getfixturevalue("operations_of_torch")
    if body == "compiled":  # as what is compiled writes, which nobody has to compile to see that
        monkeypatch.setattr("hyperopt.body.eager.OnHost", Selected)
        request.getfixturevalue("operations_of_torch")
    model, optimizer = bound(tower)
    train(model, optimizer, range(4))
    for p in model.parameters():
        for kept in (p.detach(), *(kept for kept in optimizer.state[p].values() if kept.dim())):
            kept.view(-1)[0], kept.view(-1)[1] = bad, -math.inf
    before = without_counts(snapshot(model, optimizer))
    for value in BAD:
        spoil(model, 4, value)
        optimizer.step()
    assert optimizer.skipped["gradients"] == 3
    # That the weights were changed is remembered, in a copy of them.
    assert [d for d in differences(before, without_counts(snapshot(model, optimizer))) if not d.endswith(".seen on one side only")] == []


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("tower", (AVERAGING | HIGH).values(), ids=AVERAGING | HIGH)
def test_a_bad_gradient_moves_no_level(tower, compile):
    model = net()
    optimizer = tower.bind(model.parameters(), compile=compile)
    train(model, optimizer, range(9))
    before, seen = without_counts(snapshot(model, optimizer)), optimizer.hyperparameters()
    assert len(seen) >= 6
    for at in range(6):  # compiled after the first of its kind
        spoil(model, 9, BAD[at % 3])
        optimizer.step()
    assert differences(before, without_counts(snapshot(model, optimizer))) == []
    assert differences(seen, optimizer.hyperparameters()) == []
    train(model, optimizer, range(9, 12))
    assert all(float(value) != float(seen[name]) for name, value in optimizer.hyperparameters().items() if name == "0.lr")


def test_what_an_average_above_follows_waits_for_a_step_that_counts():
    """An assigned lr takes the raw one along: the states that an average above is made of follow with the next step."""
    runs = []
    for bad in (False, True):
        model = net(torch.float64)
        optimizer = Hyper(SGD, lr=0.1).stack(ScheduleFree(Adam)).bind(model.parameters())
        train(model, optimizer, range(2))
        optimizer.param_groups[0]["lr"] = 0.01
        train(model, optimizer, range(2, 3))
        if bad:
            before = without_counts(snapshot(model, optimizer))
            spoil(model, 3, math.nan)
            optimizer.step()
            assert differences(before, without_counts(snapshot(model, optimizer))) == []
        train(model, optimizer, range(3, 6))
        runs.append(without_counts(snapshot(model, optimizer)))
    assert differences(*runs) == []


LARGE = {
    "native": Hyper(Adam).stack(Adam),
    "held": Hyper(SGD, lr=0.1, momentum=0.9),
    "momentum": MIXED,
    "all": ALL,
    "schedule-free": AVERAGING["schedule-free"],
    "adamw": Hyper(AdamW, learn=("lr", "beta1", "weight_decay")).stack(Adam),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("body", ["native", "torch", "compiled"])
@pytest.mark.parametrize("tower", LARGE.values(), ids=LARGE)
def test_no_finite_gradient_is_left_out(tower, body, groups, dtype, request, monkeypatch):
    """Their sums, their squares and the norms of steps overflow."""
    if body == "torch":
        request.getfixturevalue("operations_of_torch")
    if body == "compiled":
        monkeypatch.setattr("hyperopt.body.eager.OnHost", Selected)
        request.getfixturevalue("operations_of_torch")
    model, optimizer = bound(tower, dtype, groups)
    train(model, optimizer, range(3))
    most = torch.finfo(dtype).max * 0.9
    for sizes in ((most, most), (most, -most), (-most, 1.0), (most / 1e10, most), (most**0.5, -(most**0.5))):
        old = [p.detach().clone() for p in model.parameters()]
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, sizes[i % 2])
            p.grad.view(-1)[0] = sizes[0]
        optimizer.step()
        assert all(p.isfinite().all() and not torch.equal(p, x) for p, x in zip(model.parameters(), old, strict=True))
        kept = [s for p in model.parameters() for key, s in optimizer.state[p].items() if not key.startswith("Z.")]
        assert all(s.isfinite().all() for s in (*kept, *optimizer.hyperparameters().values()))
        if tower.above and groups == 1 and not tower.rule.gapped:
            moves = torch.cat([(p.detach() - x).reshape(-1) for p, x in zip(model.parameters(), old, strict=True)])
            assert float(moves.norm()) <= Rule.trust * float(torch.cat([x.reshape(-1) for x in old]).norm()) * 1.0001
    assert optimizer.skipped["gradients"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_bad_gradient_in_other_dtypes(dtype):
    model, optimizer = bound(CHAIN, dtype)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01 * (step + 1))
        optimizer.step()
    before = without_counts(snapshot(model, optimizer))
    model[0].weight.grad[0, 0] = math.inf
    optimizer.step()
    assert optimizer.skipped["gradients"] == 1
    assert differences(before, without_counts(snapshot(model, optimizer))) == []


def test_large_finite_half_precision_gradients_are_not_skipped():
    # Their sum overflows float16, and must not be taken in it.
    w = nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = CHAIN.bind([w])
    w.grad = torch.full_like(w, 3e4)
    optimizer.step()
    assert optimizer.skipped["gradients"] == 0
    assert float(w.detach().max()) < 1


@pytest.mark.parametrize("size", [3, 2**18 + 1])
def test_a_bad_gradient_in_a_large_tensor(size):
    w = nn.Parameter(torch.ones(size))
    optimizer = CHAIN.bind([w])
    for _ in range(3):
        w.grad = w.detach() * 2
        optimizer.step()
    before = w.detach().clone()
    w.grad = w.detach() * 2
    w.grad[-1] = math.nan
    optimizer.step()
    assert torch.equal(w, before)
    assert optimizer.skipped["gradients"] == 1


# ---- hypergradients and tangents that are not finite


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["lr", "beta1"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_bad_tangent_is_left_out_counted_and_started_again(name, groups, value):
    tower = Hyper(Adam, lr=1e-3, learn=("lr", "beta1")).stack(Adam)
    model, optimizer = bound(tower, torch.float64, groups)
    train(model, optimizer, range(4))
    before = optimizer.hyperparameters()
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.state[model[0].weight][f"Z.{name}"][0, 0] = value
    train(model, optimizer, range(4, 5))
    label = "[0]" if groups == 2 else ""
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 1}
    for key in (f"0.lr{label}", f"0.beta1{label}"):
        # One node learns both: it does not step on half a hypergradient.
        assert float(optimizer.hyperparameters()[key]) == pytest.approx(float(before[key]), rel=1e-12)
    if groups == 2:
        assert float(optimizer.hyperparameters()["0.lr[1]"]) != pytest.approx(float(before["0.lr[1]"]), rel=1e-6)
    assert all(not torch.equal(p, x) for p, x in zip(model.parameters(), old, strict=True))
    assert all(tensor.isfinite().all() for record in optimizer.state.values() for tensor in record.values())
    train(model, optimizer, range(5, 8))
    for key in (f"0.lr{label}", f"0.beta1{label}"):
        assert float(optimizer.hyperparameters()[key]) != pytest.approx(float(before[key]), rel=1e-6)
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 1}
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())


@pytest.mark.parametrize("tower", [Hyper(SGD, lr=0.125).stack(Adam), Hyper(SGD, lr=0.125, learn="all").stack(Adam)], ids=str)
def test_the_weights_step_with_the_hyperparameters_as_they_are(tower):
    model, optimizer = bound(tower, torch.float64)
    train(model, optimizer, range(4))
    lr = optimizer.hyperparameters()["0.lr"]
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.state[model[0].weight]["Z.lr"].fill_(math.nan)
    backward(model, 4)
    optimizer.step()
    for p, x in zip(model.parameters(), old, strict=True):
        assert torch.allclose(p, x - lr * p.grad, rtol=1e-12)


def test_the_tangent_starts_again_from_zero():
    model, optimizer = bound(Hyper(SGD, lr=0.125, horizon=math.inf, trust=None).stack(SGD, lr=1e-9), torch.float64)
    train(model, optimizer, range(4))
    old = [p.detach().clone() for p in model.parameters()]
    carried = optimizer.state[model[2].weight]["Z.lr"].clone()
    optimizer.state[model[0].weight]["Z.lr"][0, 0] = math.inf
    train(model, optimizer, range(4, 5))
    for p, x in zip(model.parameters(), old, strict=True):
        assert torch.allclose(optimizer.state[p]["Z.lr"], p.detach() - x, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(carried, optimizer.state[model[2].weight]["Z.lr"], rtol=0.1)


@pytest.mark.parametrize("tower", [ALL, MIXED], ids=str)
def test_a_bad_tangent_of_a_state_does_not_freeze_training(tower):
    model, optimizer = bound(tower, torch.float64)
    train(model, optimizer, range(4))
    state = next(key for key in optimizer.state[model[0].weight] if key.count(".") == 2)
    optimizer.state[model[0].weight][state].fill_(math.nan)
    before = optimizer.hyperparameters()
    train(model, optimizer, range(4, 9))
    assert all(tensor.isfinite().all() for record in optimizer.state.values() for tensor in record.values())
    for name in tower.learned:
        assert float(optimizer.hyperparameters()[f"0.{name}"]) != pytest.approx(float(before[f"0.{name}"]), rel=1e-9)


def test_an_upper_level_with_a_bad_tangent_lets_the_levels_below_learn():
    model, optimizer = bound(CHAIN, torch.float64)
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["tower"]["nodes"]["1"]["state"]["Z.lr"].fill_(math.nan)
    before = optimizer.hyperparameters()
    train(model, optimizer, range(5, 6))
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 1}
    assert values(optimizer, "1.lr") == pytest.approx(float(before["1.lr"]), rel=1e-12)
    assert values(optimizer) != pytest.approx(float(before["0.lr"]), rel=1e-6)
    train(model, optimizer, range(6, 9))
    assert values(optimizer, "1.lr") != pytest.approx(float(before["1.lr"]), rel=1e-6)
    assert optimizer.skipped["hypergradients"] == 1


def test_a_hypergradient_that_overflows_is_left_out():
    w = nn.Parameter(torch.full((4,), 1e22))
    optimizer = Hyper(SGD, lr=10.0, trust=None).stack(SGD).bind([w])
    for _ in range(4):
        w.grad = torch.full_like(w, 5e18)
        optimizer.step()
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 3}
    assert values(optimizer) == pytest.approx(10, rel=1e-6)
    assert float(w.detach().max()) == pytest.approx(1e22 - 2e20, rel=1e-6)
    for _ in range(4):
        w.grad = torch.full_like(w, 1.0)
        optimizer.step()
    # The tangent of the overflowing steps is gone; learning goes on.
    assert values(optimizer) > 10


def test_the_graph_recovers_from_a_hypergradient_that_is_not_finite():
    w = nn.Parameter(torch.full((4,), 1e25))
    optimizer = Hyper(SGD, lr=1e-3, trust=None, horizon=1, strategy="graph").stack(SGD).bind([w])
    for g in (1e25, 1e25, 1.0, 1.0, 1.0):
        w.grad = torch.full_like(w, g)
        optimizer.step()
    assert optimizer.skipped["hypergradients"] == 1
    assert values(optimizer) > 1e-3
    assert w.isfinite().all()


def test_v_of_zero_gives_finite_tangents():
    # A pixel that is always black: its gradient is 0 from the first step on.
    w = nn.Parameter(torch.ones(3))
    optimizer = ALL.bind([w])
    for _ in range(5):
        w.grad = torch.tensor([0.0, 1.0, 0.0]) * w.detach()
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in optimizer.state[w].values())
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}
    assert values(optimizer) > 1e-3


@pytest.mark.parametrize("tower", [CHAIN, ALL, MIXED, TREE], ids=str)
def test_gradients_of_zero_keep_everything_finite(tower):
    w = nn.Parameter(torch.ones(3))
    optimizer = tower.bind([w])
    for g in (0.0, 0.0, 1.0, 0.0, 0.0):
        w.grad = torch.full_like(w, g)
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in optimizer.state[w].values())
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}


# ---- trust at level 0


def relative_changes(model, optimizer, steps):
    for step in steps:
        old = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        train(model, optimizer, range(step, step + 1))
        new = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        yield float((new - old).norm() / old.norm())


TRUSTED = {
    "displacement": {"rule": Adam},
    "tangents": {"rule": Adam, "learn": "all"},
    "graph": {"rule": Adam, "horizon": 1, "strategy": "graph"},
    "momentum": {"rule": SGD, "momentum": 0.9},
    "coupled": {"rule": SGD, "weight_decay": 0.1},
    "decoupled": {"rule": AdamW, "weight_decay": 0.1},
    "per tensor": {"rule": Adam, "per": "tensor"},
    "per coordinate": {"rule": SGD, "per": "coordinate"},
}


@pytest.mark.parametrize("trust", [0.1, 0.01])
@pytest.mark.parametrize("options", TRUSTED.values(), ids=TRUSTED)
def test_the_relative_change_of_the_weights_never_exceeds_trust(options, trust):
    model, optimizer = bound(Hyper(**options, lr=1e2, trust=trust).stack(SGD), torch.float64)
    changes = list(relative_changes(model, optimizer, range(8)))
    assert max(changes) <= trust * (1 + 1e-9)
    assert changes[0] == pytest.approx(trust, rel=1e-6)
    assert optimizer.hyperparameters()["0.lr"].max() < 1e2


def test_the_projected_lr_is_the_one_that_was_used():
    model, optimizer = bound(Hyper(SGD, lr=1e2, trust=0.05).stack(SGD, lr=1e-9), torch.float64)
    old = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    optimizer.step()
    lr = values(optimizer)
    assert lr < 10
    for p, x in zip(model.parameters(), old, strict=True):
        assert torch.allclose(p, x - lr * p.grad, rtol=1e-9)
        # Z' is taken at the projected value: taking it before ruins the hypergradient.
        assert torch.allclose(optimizer.state[p]["Z.lr"], p.detach() - x, rtol=1e-9)


@pytest.mark.parametrize("rule", [Adam, SGD])
def test_tangents_are_taken_at_the_projected_value_too(rule):
    options = {"lr": 1e2, "trust": 0.05, "horizon": 5}
    (model, optimizer), (twin, other) = (
        bound(Hyper(rule, learn=learn, **options).stack(SGD, lr=1e-12), torch.float64) for learn in ("lr", "all")
    )
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9)
        assert torch.allclose(optimizer.state[p]["Z.lr"], other.state[q]["Z.lr"], rtol=1e-7, atol=1e-12)


def test_a_start_that_is_far_too_high_trains():
    model, optimizer = bound(Hyper(Adam, lr=1e2).stack(Adam))
    before = float(loss_at(model, 0).detach())
    train(model, optimizer, range(300))
    assert float(loss_at(model, 0).detach()) < 0.3 * before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler of torch 2.11
@pytest.mark.parametrize("compile", [False, True])
def test_the_trust_of_schedule_free_grows_over_the_first_steps(compile):
    w = nn.Parameter(torch.ones(4))
    # Along a slope lr goes up by half a unit of its logarithm in every step, so that trust has work in all of them.
    optimizer = Hyper(ScheduleFree(Adam), lr=1e2).stack(Adam, lr=0.5).bind([w], compile=compile)
    changes = []

    def moved(w):
        return w.detach() + 0.9 * optimizer.state[w]["gap"] if w in optimizer.state else w.detach().clone()

    for _ in range(25):
        old = moved(w)
        w.grad = torch.full_like(w, -1.0)
        optimizer.step()
        changes.append(float((moved(w) - old).norm() / old.norm()))
    # Half a unit is not enough to follow in the second and third.
    allowed = [min(0.1, 0.1 * k / 20) for k in range(1, 26)]
    assert changes[1] < allowed[1]
    assert changes[2] < allowed[2]
    assert [changes[0], *changes[3:]] == pytest.approx([allowed[0], *allowed[3:]], rel=1e-4)


@pytest.mark.parametrize(
    ("rule", "per"), [(ScheduleFree(Adam), "group"), (ScheduleFree(Adam), "tensor"), (Adam, "group"), (Adam, "tensor")]
)
def test_lr_climbs_fast_until_steps_do_something_or_a_hypergradient_says_down(rule, per):
    def climb(slopes, lr=1e-8, **options):
        rates = [lr]
        w = nn.Parameter(torch.ones(4))
        optimizer = Hyper(rule, lr=lr, per=per, **({"trust": 0.1} | options)).stack(Adam).bind([w])
        for slope in slopes:
            w.grad = torch.full_like(w, slope)
            optimizer.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        moves = [math.log(b / a) for a, b in itertools.pairwise(rates)]
        return moves[1:], rates[1:]  # in the first step there is no hypergradient yet

    # Adam on top, with a step size of .1, takes a little less while hypergradients grow.
    moves, rates = climb([-1e3] * 50)
    fast = [move > 0.2 for move in moves]
    assert all(0.4 < move < 0.51 if quick else 0 < move < 0.2 for move, quick in zip(moves, fast, strict=True))
    # A step is a thousandth of the weights at lr = 1e-3: a hundredth of trust.
    assert fast == [rate < 1e-3 for rate in rates[:-1]]
    moves, _ = climb([-1e3] * 5, lr=1e-2)
    assert all(0.08 < move < 0.11 for move in moves)
    # One gradient to the other side ends it for good, though steps are as small as before.
    moves, rates = climb([-1e3] * 8 + [1e3] + [-1e3] * 8)
    assert min(moves[:7]) > 0.4
    assert max(moves[7:]) < 0.11
    assert max(rates) < 1e-5
    moves, _ = climb([-1e3] * 5, trust=None)
    assert all(0.08 < move < 0.11 for move in moves)
    _, rates = climb([-1e3] * 5, lr=1e-8, domains={"lr": Real()}, trust=1e9)
    assert rates[-1] == pytest.approx(0.4, rel=0.1)  # by .1 a step, where it is learned as it is


def climbed(tower, steps=1, lr=1e-8):
    """Weights and an optimizer after some steps along a slope."""
    w = nn.Parameter(torch.ones(4))
    optimizer = tower.replace(lr=lr).bind([w])
    for _ in range(steps):
        w.grad = torch.full_like(w, -1e3)
        optimizer.step()
    return w, optimizer


@pytest.mark.parametrize("slopes", [[-1e3, -1e3], [-1e3, 1e3]])
def test_a_checkpoint_knows_whether_the_climb_has_ended(slopes):
    tower = Hyper(ScheduleFree(Adam)).stack(Adam)
    (w, optimizer), (v, other) = climbed(tower, 3), climbed(tower, 0)
    for slope in slopes:
        w.grad = torch.full_like(w, slope)
        optimizer.step()
    v.data.copy_(w.data)
    other.load_state_dict(optimizer.state_dict())
    for x in (w, v):
        x.grad = torch.full_like(x, -1e3)
    for each in (optimizer, other):
        each.step()
        each.step()
    assert torch.equal(optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"])


def test_without_trust_there_is_no_climb_whatever_the_checkpoint_says():
    _, optimizer = climbed(Hyper(Adam).stack(Adam), 3)
    w, other = climbed(Hyper(Adam, trust=None).stack(Adam), 0)
    other.load_state_dict(optimizer.state_dict())
    before = values(other)
    w.grad = torch.full_like(w, -1e3)
    other.step()
    assert 0.08 < math.log(values(other) / before) < 0.12


@pytest.mark.parametrize("top", [Hyper(Adam, lr=1.0, trust=0.05), Hyper(SGD, lr=1e30), Hyper(SGD, lr=1e30, trust=0.2)], ids=str)
def test_a_climb_stays_within_the_trust_of_the_level_above(top):
    _, optimizer = climbed(Hyper(Adam).stack(top), 1)
    _, other = climbed(Hyper(Adam).stack(top), 2)
    assert math.log(values(other) / values(optimizer)) <= (0.5 if top.trust == "default" else top.trust) * (1 + 1e-3)


def test_a_hypergradient_of_zero_does_not_end_a_climb():
    a, b = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = Hyper(Adam, lr=1e-8, per="tensor").stack(Adam).bind([a, b])
    for step in range(8):
        before = optimizer.param_groups[0]["lr"].clone()
        a.grad = torch.full_like(a, -1e3)
        b.grad = None if step == 3 else torch.zeros_like(b) if step == 4 else torch.full_like(b, -1e3)
        optimizer.step()
    assert ((optimizer.param_groups[0]["lr"] / before).log() > 0.3).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler of torch 2.11
@pytest.mark.parametrize("rule", [Adam, ScheduleFree(Adam)])
def test_a_compiled_climb_is_the_same(rule):
    rates = []
    for compile in (False, True):
        w = nn.Parameter(torch.ones(4))
        optimizer = Hyper(rule, lr=1e-8).stack(Adam).bind([w], compile=compile)
        rates.append([])
        for step in range(40):
            w.grad = torch.full_like(w, -1e3 if step != 20 else 1e3)
            optimizer.step()
            rates[-1].append(values(optimizer))
    assert rates[0] == pytest.approx(rates[1], rel=1e-3)
    assert rates[0][19] > 20 * 1.4 * rates[0][0]


def test_trust_none_switches_off():
    model, optimizer = bound(Hyper(Adam, lr=10.0, trust=None).stack(SGD), torch.float64)
    assert next(relative_changes(model, optimizer, range(1))) > 5


@pytest.mark.parametrize("tower", [Hyper(Adam, lr=10.0), Hyper(Adam, lr=10.0, learn="beta1").stack(SGD, lr=1e-30)], ids=str)
def test_trust_is_inactive_where_lr_is_not_learned(tower):
    (model, optimizer), twin = bound(tower, torch.float64), net(torch.float64)
    train(model, optimizer, range(3))
    train(twin, torch.optim.Adam(twin.parameters(), lr=10.0), range(3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9)


@pytest.mark.parametrize("rule", [Adam, SGD])
@pytest.mark.parametrize("lr", [1e-3, 1e2])
def test_a_zero_initialised_group_can_start(rule, lr):
    w = nn.Parameter(torch.zeros(50))
    target = torch.linspace(-1, 1, 50)
    optimizer = Hyper(rule, lr=lr).stack(Adam).bind([w])
    for step in range(200):
        optimizer.zero_grad()
        (w - target).square().sum().backward()
        optimizer.step()
        if step == 0:
            assert 0 < float(w.detach().norm()) <= Rule.trust * 0.01 * 50**0.5 * (1 + 1e-5)
    assert float((w.detach() - target).norm() / target.norm()) < 0.2


def test_each_group_has_a_trust_of_its_own():
    big, small = nn.Parameter(torch.full((4,), 100.0)), nn.Parameter(torch.full((4,), 1.0))
    optimizer = Hyper(SGD, lr=1.0, trust=0.1).stack(SGD).bind([{"params": [big]}, {"params": [small]}])
    big.grad, small.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    assert torch.allclose(big, torch.full((4,), 99.0))
    assert torch.allclose(small, torch.full((4,), 0.9))


@pytest.mark.parametrize("g", [1e-30, 1e18, 1e30])
def test_extreme_gradients_leave_finite_numbers(g):
    w = nn.Parameter(torch.ones(4))
    optimizer = Hyper(SGD, lr=1e-3).stack(Adam).bind([w])
    for _ in range(3):
        w.grad = torch.full_like(w, g)
        optimizer.step()
    assert w.isfinite().all()
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())
    w.grad = torch.ones_like(w)
    before = w.detach().clone()
    optimizer.step()
    assert w.isfinite().all()
    assert float((w.detach() - before).norm() / before.norm()) <= Rule.trust * (1 + 1e-5)


@pytest.mark.parametrize("tower", [Hyper(Adam), Hyper(Adam, trust=None).stack(Adam), Hyper(Adam).stack(Adam)], ids=str)
def test_squares_that_overflow_stop_a_coordinate_as_in_torch_and_make_no_nan(tower):
    # 1e20 is finite and its square is not: torch's second moment stays infinite, and the coordinate rests.
    w, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, reference = tower.bind([w]), torch.optim.Adam([q])
    for g in (1.0, 1e20, 1e20, 1.0, 1.0):
        for p, o in ((w, optimizer), (q, reference)):
            p.grad = torch.tensor([g, 1.0])
            o.step()
        assert q.isfinite().all()
        assert w.isfinite().all(), g
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())


# ---- trust above level 0


def raw_moves(model, optimizer, steps, domains):
    """The largest change of each raw value in each step."""
    raw = None
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        now = {key: domain.raw(optimizer.hyperparameters()[key]) for key, domain in domains.items()}
        if raw is not None:
            yield {key: float((now[key] - raw[key]).abs().max()) for key in now}
        raw = now


@pytest.mark.parametrize("strategy", ["tangents", "graph"])
@pytest.mark.parametrize("top", [SGD, Adam])
@pytest.mark.parametrize("height", [1, 2, 3])
def test_a_raw_value_moves_by_at_most_trust_in_a_step(height, top, strategy):
    options = {"horizon": 1, "strategy": strategy} if strategy == "graph" else {}
    tower = Hyper(SGD, lr=1e-3, trust=None, **options)
    for _ in range(height - 1):
        tower = tower.stack(SGD, lr=1e-3, trust=None, **options)
    model, optimizer = bound(tower.stack(top, lr=1e30), torch.float64)
    moved = f"{height - 1}.lr"
    seen = [move[moved] for move in raw_moves(model, optimizer, range(height + 3), {moved: Positive()})]
    # The bound is met, and so it is the guard that holds it.
    assert max(seen) == pytest.approx(TRUST_ABOVE, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"horizon": 1, "strategy": "graph"}], ids=["tangents", "graph"])
def test_level_0_is_never_moved_by_more_than_trust_whoever_is_wild_above(options):
    tower = Hyper(Adam, lr=1e-3, trust=None, **options).stack(Adam, lr=1e4, **options).stack(Adam, lr=1e4, **options).stack(Adam, lr=1e4)
    model, optimizer = bound(tower, torch.float64)
    seen = [move["0.lr"] for move in raw_moves(model, optimizer, range(12), {"0.lr": Positive()})]
    assert max(seen) <= TRUST_ABOVE * (1 + 1e-9)
    assert seen[0] == pytest.approx(TRUST_ABOVE, rel=1e-6)


def test_the_level_that_is_projected_keeps_the_lr_it_used():
    model, optimizer = bound(Hyper(SGD, lr=1e-2, horizon=1, trust=None).stack(SGD, lr=1e4).stack(SGD, lr=1e-12), torch.float64)
    train(model, optimizer, range(1))
    before = values(optimizer)
    train(model, optimizer, range(1, 2))
    q = float(optimizer.hypergradients()["0.lr"])
    assert abs(math.log(values(optimizer) / before)) == pytest.approx(TRUST_ABOVE, rel=1e-9)
    assert values(optimizer, "1.lr") == pytest.approx(TRUST_ABOVE / abs(q), rel=1e-9)


def test_trust_above_is_absolute_and_can_be_set_or_switched_off():
    moves = {}
    for trust in (0.125, None):
        model, optimizer = bound(Hyper(SGD, lr=1e-6, trust=None).stack(Adam, lr=3.0, trust=trust), torch.float64)
        moves[trust] = max(move["0.lr"] for move in raw_moves(model, optimizer, range(4), {"0.lr": Positive()}))
    assert moves[0.125] == pytest.approx(0.125, rel=1e-9)
    assert moves[None] > 2


def test_each_branch_of_a_tree_has_its_own_trust():
    tower = Hyper(Adam, lr=1e-3, trust=None).stack(lr=Hyper(Adam, lr=10.0, trust=0.25), beta1=Hyper(Adam, lr=10.0))
    model, optimizer = bound(tower, torch.float64)
    domains = {"0.lr": tower.domain("lr"), "0.beta1": tower.domain("beta1")}
    seen = list(raw_moves(model, optimizer, range(4), domains))
    assert max(move["0.lr"] for move in seen) == pytest.approx(0.25, rel=1e-6)
    assert max(move["0.beta1"] for move in seen) == pytest.approx(TRUST_ABOVE, rel=1e-6)


def test_the_structure_of_a_checkpoint_grows_with_the_height_and_not_faster():
    lengths = [len(Hyper.parse(" / ".join(["Adam"] * n)).structure()) for n in (3, 6, 12)]
    assert lengths[2] - lengths[1] < 3 * (lengths[1] - lengths[0])


@pytest.mark.parametrize("height", [1, 3, 30])
def test_towers_of_adam_stay_finite(height):
    tower = Hyper(Adam)
    for level in range(height):
        tower = tower.stack(Adam)
        assert len(tower.structure()) < 1000 * (level + 2)  # a text that doubles with every level fills the memory at 30
    model, optimizer = bound(tower)
    train(model, optimizer, range(40))
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())
    assert all(p.isfinite().all() for p in model.parameters())
    assert values(optimizer) != pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("last", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize(("name", "signs"), [("lr", [1]), ("momentum", [1, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_values_stop_where_their_values_would_leave_the_domain(dtype, name, signs, last):
    # A level above that is let loose takes them to the end of their domain in one step, and never out of it.
    tower = Hyper(SGD, lr=1e-3, momentum=0.9, learn=name, trust=None).stack(SGD, lr=1e9, trust=1e9)
    w = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = tower.bind([w])
    for sign in [*signs, last]:
        w.grad = torch.full_like(w, sign)
        optimizer.step()
    value = optimizer.hyperparameters()[f"0.{name}"]
    domain = tower.domain(name)
    low, high = domain.bounds()
    assert low < value < high
    assert domain.raw(value).isfinite()
    assert abs(float(domain.raw(value))) > 14
    assert w.isfinite().all()


# ---- the pieces


def test_finite_sees_every_kind():
    def finite(sums):
        return is_finite(combined(sums, torch.add, torch.sum))

    good = [torch.ones(3).sum(), torch.full((2,), 1e30).sum()]
    assert float(finite(good)) == 1
    for bad in BAD:
        assert float(finite([*good, torch.tensor([0.0, bad]).sum()])) == 0
    assert float(finite([torch.tensor([math.inf, -math.inf]).sum()])) == 0


@pytest.mark.parametrize("arithmetic", [OnHost, Selected])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e18, 1e30, 1e37])
def test_a_norm_does_not_overflow_before_it_has_to(arithmetic, size):
    x = torch.tensor([[3.0, 0.0], [0.0, -4.0]]) * size
    assert float(arithmetic.norm(x, 1.0)) == pytest.approx(5 * size, rel=1e-6)
    assert float(arithmetic.norm(x.t(), 0.25)) == pytest.approx(2.5 * size, rel=1e-6)
    assert float(length(x.abs().amax(1))) == pytest.approx(5 * size, rel=1e-6)


@pytest.mark.parametrize("arithmetic", [OnHost, Selected])
def test_a_gauge_is_finite_where_the_gradient_is(arithmetic):
    for good in ([], [0.0], [1.0, -1.0], [3e38, 3e38], [3e38, -3e38], [1e19] * 9):
        assert float(arithmetic.gauge(torch.tensor(good)).abs()) < 1e30
    for bad in BAD:
        for others in ([], [1.0], [3e38, -3e38], [-bad]):
            assert not arithmetic.gauge(torch.tensor([*others, bad])).isfinite()


@pytest.mark.parametrize("domain", [Positive(), Positive(0.1), Real(), UnitInterval()], ids=str)
def test_a_value_is_scaled_and_exact_where_the_factor_is_1(domain):
    raw = torch.linspace(-8, 8, 161, dtype=torch.float64)
    assert domain.scaled(raw, torch.ones((), dtype=torch.float64)).equal(raw)
    half = domain.value(domain.scaled(raw, torch.tensor(0.5, dtype=torch.float64)))
    torch.testing.assert_close(half, domain.value(raw) / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("above", [Hyper(Adam, lr=0.3), Hyper(SGD, lr=1e6)], ids=str)
@pytest.mark.parametrize("trust", [0.03, None])
def test_decays_go_at_their_own_pace(above, trust):
    """A logit moves by no more than PACE in a step, everything else as the level above has it; without trust so do decays."""
    model, optimizer = bound(Hyper(Adam, lr=1e-3, learn=("lr", "beta1"), trust=trust, prior=None).stack(above), torch.float64)
    moves = []
    for at in range(8):
        before = optimizer.hyperparameters()
        train(model, optimizer, range(at, at + 1))
        after = optimizer.hyperparameters()
        logit = after["0.beta1"].logit() - before["0.beta1"].logit()
        moves.append((abs(float(logit)), abs(float((after["0.lr"] / before["0.lr"]).log()))))
    decays, others = (max(column) for column in zip(*moves, strict=True))
    assert decays == pytest.approx(Pace.LIMIT) if trust else decays > 10 * Pace.LIMIT
    assert others > 10 * Pace.LIMIT


@pytest.mark.parametrize("trust", [0.5, None])
def test_what_a_level_above_learns_goes_at_that_pace_too(trust):
    """lr and eps of level 1; the lr of the weights goes on at the pace of level 1."""
    spec = Hyper(Adam, lr=1e-3).stack(Adam, lr=0.2, eps=1e-3, learn=("lr", "eps"), trust=trust, prior=None).stack(Adam)
    model, optimizer = bound(spec, torch.float64)
    moves = []
    for at in range(8):
        before = optimizer.hyperparameters()
        train(model, optimizer, range(at, at + 1))
        after = optimizer.hyperparameters()
        moves.append([abs(float((after[name] / before[name]).log())) for name in ("0.lr", "1.lr", "1.eps")])
    of_weights, *above = (max(column) for column in zip(*moves, strict=True))
    assert of_weights > 10 * Pace.LIMIT
    for move in above:
        assert move == pytest.approx(Pace.LIMIT) if trust else move > 10 * Pace.LIMIT


# ---- prior


def returns(spec, name, steps=12, **options):
    """The raw values of one learned hyperparameter after each step, where what is learned moves by next to nothing."""
    model, optimizer = bound(spec.stack(SGD, lr=1e-30, **options), torch.float64)
    raw = [spec.domain(name).raw(torch.tensor(spec.rule.value(name), dtype=torch.float64))]
    for at in range(steps):
        train(model, optimizer, range(at, at + 1))
        raw.append(spec.domain(name).raw(optimizer.hyperparameters()[f"0.{name}"]))
    return raw, optimizer


@pytest.mark.parametrize("prior", ["default", 30, 7, 1])
@pytest.mark.parametrize(
    ("spec", "name", "usual"),
    [
        (Hyper(Adam, beta1=0.1, eps=1e-3, learn="all"), "beta1", 0.9),
        (Hyper(Adam, eps=1.0, learn=("eps",)), "eps", 1e-8),
        (Hyper(SGD, momentum=0.1, learn=("lr", "momentum")), "momentum", 0.9),  # the default, 0, cannot be learned
        (Hyper(Adam, eps=1.0, domains={"eps": Interval(0, 2)}, learn=("lr", "eps")), "eps", 1e-8),
        (Hyper(Adam, beta1=0.5, domains={"beta1": Interval(0, 0.8)}, learn=("lr", "beta1")), "beta1", 0.5),  # .9 is not in there
        (Hyper(Muon, weight_decay=0.3, learn=("lr", "weight_decay")), "weight_decay", 0.3),  # the default, .1, is no more usual than this
        (Hyper(Adam, weight_decay=0.3, domains={"weight_decay": Real()}, learn=("weight_decay",)), "weight_decay", 0.3),
    ],
    ids=str,
)
def test_what_no_hypergradient_moves_returns_to_its_usual_value(spec, name, usual, prior):
    """By 1/steps of the distance that is left, from the first step on that learns: the second."""
    spec = spec if prior == "default" else Hyper(spec.rule, learn=spec.learn, domains=spec.domains, prior=prior)
    raw, _ = returns(spec, name)
    target = spec.domain(name).raw(torch.tensor(usual, dtype=torch.float64))
    factor = 1 - 1 / (30 if prior == "default" else prior)
    for t, found in enumerate(raw[1:], start=1):
        assert float(found) == pytest.approx(float(target + (raw[0] - target) * factor ** (t - 1)), rel=1e-6)


def test_lr_has_no_usual_value_and_what_has_none_stays_where_it_started():
    spec = Hyper(AdamW, lr=0.01, weight_decay=0.3, learn=("lr", "weight_decay"), trust=1)
    raw, optimizer = returns(spec, "weight_decay")
    assert max(abs(float(each - raw[0])) for each in raw) < 1e-12
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(0.01, rel=1e-12)
    # It is the first value also after another one was assigned, and in a copy.
    model, optimizer = bound(spec.stack(SGD, lr=1e-30), torch.float64)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["weight_decay"] = 0.6
    train(model, optimizer, range(2, 3))
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 5))
    expected = 0.3 * 2 ** ((29 / 30) ** 2)
    assert float(optimizer.hyperparameters()["0.weight_decay"]) == pytest.approx(expected, rel=1e-6)


def test_values_stay_where_a_checkpoint_may_hold_them():
    """The usual value of damping, 1e-8, is below what float32 can learn."""
    spec = Hyper(Unified(nesterov=0.01), learn=("lr", "damping", "nesterov"), prior=2).stack(SGD, lr=1e-30)
    model, optimizer = bound(spec)
    train(model, optimizer, range(20))
    low, _ = UnitInterval().raw_limits(torch.float32)
    assert float(optimizer.hyperparameters()["0.damping"].logit()) == pytest.approx(low, rel=1e-5)
    _, again = bound(spec)
    again.load_state_dict(optimizer.state_dict())
    assert differences(again.state_dict(), optimizer.state_dict()) == []


@pytest.mark.parametrize("options", [{"prior": None}, {"trust": None}], ids=str)
def test_without_a_prior_values_stay(options):
    raw, _ = returns(Hyper(Adam, beta1=0.1, learn=("lr", "beta1"), **options), "beta1")
    assert max(abs(float(each - raw[0])) for each in raw) < 1e-6


def test_a_prior_that_is_given_is_at_work_without_trust():
    raw, _ = returns(Hyper(Adam, beta1=0.1, learn=("lr", "beta1"), trust=None, prior=2), "beta1", steps=40)
    assert float(raw[-1]) == pytest.approx(math.log(9), rel=1e-6)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_held_out_loss_needs_no_prior(compile):
    model = net(torch.float32)
    optimizer = Hyper(Adam, beta1=0.1, learn=("lr", "beta1")).stack(SGD, lr=1e-30).bind(model.parameters(), compile=compile)
    for at in range(8):
        optimizer.hyper_backward(loss_at(model, 50 + at)) if at > 3 else None
        train(model, optimizer, range(at, at + 1))
        found = float(optimizer.hyperparameters()["0.beta1"].logit())
        assert found == pytest.approx(math.log(9) + (math.log(1 / 9) - math.log(9)) * (29 / 30) ** min(at, 3), rel=1e-5)


@dataclass(frozen=True)
class Damped(Rule):
    """A rule that has another default above level 0."""

    lr: float = hyper(0.1, Positive())
    damping: float = hyper(0.9, UnitInterval(), above=0.5)

    def init(self, x):
        return {}

    def direction(self, g, state, h, t):
        return h.one_minus("damping") * g, {}


def test_above_level_0_lr_returns_to_where_it_started():
    """With a prior of 1 step it is there after every step; another value than the default may be meant."""
    for prior, stays in ((1, True), (None, False)):
        model, optimizer = bound(Hyper(Adam, lr=0.01).stack(Adam, lr=0.02, prior=prior).stack(Adam), torch.float64)
        train(model, optimizer, range(6))
        found = optimizer.hyperparameters()
        assert (float(found["1.lr"]) == pytest.approx(0.02, rel=1e-12)) == stays
        assert float(found["0.lr"]) != pytest.approx(0.01, rel=1e-6)


def test_above_level_0_the_usual_value_is_the_default_there():
    model, optimizer = bound(Hyper(Adam).stack(Damped, damping=0.2, learn="all", prior=2).stack(SGD, lr=1e-30), torch.float64)
    train(model, optimizer, range(40))
    assert float(optimizer.hyperparameters()["1.damping"]) == pytest.approx(0.5, rel=1e-6)
    spec = Hyper(Adam).stack(RMSprop, alpha=0.3, eps=1e-3, learn="all", prior=2).stack(SGD, lr=1e-30)
    model, optimizer = bound(spec, torch.float64)
    train(model, optimizer, range(40))
    found = optimizer.hyperparameters()
    assert float(found["1.alpha"]) == pytest.approx(0.99, rel=1e-6)
    assert float(found["1.eps"]) == pytest.approx(1e-8, rel=1e-4)
    assert float(found["1.lr"]) == pytest.approx(0.01, rel=1e-6)


def test_a_hypergradient_that_is_not_finite_leaves_values_where_they_are():
    model, optimizer = bound(Hyper(Adam, beta1=0.1, learn=("lr", "beta1")).stack(Adam), torch.float64)
    train(model, optimizer, range(3))
    for p in model.parameters():
        optimizer.state[p]["Z.beta1"].fill_(math.nan)
    before = optimizer.hyperparameters()["0.beta1"].clone()
    train(model, optimizer, range(3, 4))
    assert optimizer.skipped["hypergradients"] == 1
    assert torch.equal(optimizer.hyperparameters()["0.beta1"], before)


def test_a_copy_of_a_guarded_run_is_guarded():
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    fresh, again = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in fresh.parameters()]
    spoil(fresh, 3, math.nan)
    again.step()
    assert differences(before, [p.detach() for p in fresh.parameters()]) == []
    assert again.skipped["gradients"] == 1
    assert optimizer.skipped["gradients"] == 0


@pytest.mark.parametrize("tower", [Hyper(SGD, lr=10.0), Hyper(SGD, lr=10.0, trust=None).stack(Adam), Hyper(Adam).stack(SGD)], ids=str)
@pytest.mark.parametrize("g", [(3e38, math.inf, 0.0), (-3e38, math.nan, 3e38)])
def test_a_step_left_out_keeps_every_bit_where_the_update_would_overflow(tower, g):
    w = nn.Parameter(torch.ones(3))
    optimizer = tower.bind([w])
    for _ in range(3):
        w.grad = torch.tensor([0.01, 0.02, 0.03])
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[w].items()} | {"w": w.detach().clone()}
    w.grad = torch.tensor(g)
    optimizer.step()
    assert optimizer.skipped["gradients"] == 1
    assert differences(before, {**optimizer.state[w], "w": w.detach()}) == []


def test_a_group_of_empty_tensors_keeps_its_lr():
    w = nn.Parameter(torch.ones(0, 3))
    optimizer = Hyper(SGD).stack(Adam).bind([w])
    for _ in range(3):
        w.grad = torch.ones(0, 3)
        optimizer.step()
    assert values(optimizer) == pytest.approx(1e-3)
