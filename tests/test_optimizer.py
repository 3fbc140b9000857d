"""The torch.optim face: names, groups, assignments, checkpoints, copies, absent gradients, and no waiting for the device."""

import copy
import io
import itertools
import pickle
from contextlib import contextmanager

import pytest
import torch
from small import backward, differences, loss_at, net, snapshot, through_distributed, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, ReduceLROnPlateau, StepLR

from hyperopt import SGD, Adam, AdamW, Hyper, HyperOptimizer, Interval, Real, ScheduleFree
from hyperopt.body.arithmetic import Selected

CHAIN = Hyper(Adam, lr=1e-3).stack(Adam).stack(SGD)
TREE = Hyper(Adam, lr=1e-3).stack(lr=Hyper(Adam).stack(SGD), beta1=Hyper(SGD, lr=0.1))
ALL = Hyper(Adam, learn="all", weight_decay=1e-2).stack(Adam)


def bound(tower, dtype=torch.float32, groups=None, **keywords):
    """A model and an optimizer of all its parameters, in one group or in as many as `groups` has values for."""
    model = net(dtype)
    params = list(model.parameters())
    if groups is not None:
        params = [{"params": params[i :: len(groups)], **values} for i, values in enumerate(groups)]
    return model, tower.bind(params, **keywords)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# ---- names


def test_it_is_a_torch_optimizer():
    model, optimizer = bound(CHAIN)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, HyperOptimizer)
    before = float(loss_at(model, 0).detach())
    train(model, optimizer, range(30))
    assert float(loss_at(model, 0).detach()) < before
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert "Adam / Adam / SGD" in repr(optimizer)


ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay")
STEEP = ("lr", "momentum", "dampening", "weight_decay")


def keys(*nodes, groups=("",)):
    return {f"{label}.{name}{group}" for label, names in nodes for name in names for group in groups}


CHAIN_KEYS = ("0", ADAM), ("1", ADAM), ("2", STEEP)
TREE_KEYS = ("0", ADAM), ("1[lr]", ADAM), ("2[lr]", STEEP), ("1[beta1]", STEEP)
CHAIN_LEARNS = ("0", ["lr"]), ("1", ["lr"])
TREE_LEARNS = ("0", ["lr", "beta1"]), ("1[lr]", ["lr"])
TWO = ("[0]", "[1]")


@pytest.mark.parametrize(
    ("tower", "groups", "values", "learned"),
    [
        (Hyper(Adam), None, keys(("0", ADAM)), set()),
        (CHAIN, None, keys(*CHAIN_KEYS), keys(*CHAIN_LEARNS)),
        (CHAIN, [{}, {}], keys(*CHAIN_KEYS, groups=TWO), keys(*CHAIN_LEARNS, groups=TWO)),
        (TREE, None, keys(*TREE_KEYS), keys(*TREE_LEARNS)),
        (TREE, [{}, {}], keys(*TREE_KEYS, groups=TWO), keys(*TREE_LEARNS, groups=TWO)),
        (ALL, None, keys(("0", ADAM), ("1", ADAM)), keys(("0", ADAM))),
    ],
)
def test_keys_of_hyperparameters_and_hypergradients(tower, groups, values, learned):
    model, optimizer = bound(tower, groups=groups)
    assert set(optimizer.hyperparameters()) == values
    train(model, optimizer, range(4))
    assert set(optimizer.hyperparameters()) == values
    assert set(optimizer.hypergradients()) == learned
    assert all(float(q) != 0 for q in optimizer.hypergradients().values())


def test_what_is_returned_is_detached_and_not_live():
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    before = snapshot(model, optimizer)
    for given in (optimizer.hyperparameters(), optimizer.hypergradients()):
        for value in given.values():
            assert isinstance(value, Tensor)
            assert not value.requires_grad
            value.fill_(7.0)
    assert differences(before, snapshot(model, optimizer)) == []
    kept = optimizer.hyperparameters()["0.lr"]
    seen = float(kept)
    train(model, optimizer, range(3, 6))
    assert float(kept) == seen != float(optimizer.hyperparameters()["0.lr"])


def test_hypergradients_are_in_raw_space_and_of_the_last_step():
    # q is d loss / d log lr: <g, x' - x>, at horizon 1 with the displacement of the step before.
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Hyper(SGD, lr=0.1, horizon=1, trust=None).stack(SGD, lr=1e-3).bind([w])
    for _ in range(2):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()
    x1 = torch.tensor([1.0, -2.0], dtype=torch.float64) * 0.8
    assert float(optimizer.hypergradients()["0.lr"]) == pytest.approx(float((2 * x1 * (-0.2 * x1 / 0.8)).sum()), rel=1e-12)


def test_param_groups_hold_live_values_under_their_names():
    model, optimizer = bound(ALL, groups=[{}, {"lr": 1e-4}])
    group = optimizer.param_groups[1]
    held = {name: group[name] for name in ADAM}
    assert all(isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad for value in held.values())
    assert float(held["lr"]) == pytest.approx(1e-4)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3)
    before = {name: float(value) for name, value in held.items()}
    train(model, optimizer, range(5))
    for name in ADAM:
        assert optimizer.param_groups[1][name] is held[name]
        assert float(held[name]) == float(optimizer.hyperparameters()[f"0.{name}[1]"]) != before[name]


@pytest.mark.parametrize("tower", [Hyper(Adam, lr=0.01), Hyper(Adam, lr=0.01).stack(Adam), TREE], ids=str)
@pytest.mark.parametrize("assigned", [1e-7, torch.tensor(1e-7)], ids=type)
def test_an_object_that_is_put_back_has_the_value_that_it_had(tower, assigned):
    model, optimizer = bound(tower)
    (group,) = optimizer.param_groups
    train(model, optimizer, range(4))
    was = {name: (group[name], group[name].item()) for name in ("lr", "beta2")}
    for step in range(4, 7):
        for name in was:
            group[name] = assigned if name == "lr" else 0.5
        train(model, optimizer, range(step, step + 1))
    assert all(object.item() == value for object, value in was.values())
    for name, (object, _) in was.items():
        group[name] = object
    train(model, optimizer, range(7, 8))
    assert {name: optimizer.hyperparameters()[f"0.{name}"].item() for name in was} == {name: value for name, (_, value) in was.items()}
    group["lr"].fill_(0.02)  # what stands there now is live again
    train(model, optimizer, range(8, 9))
    assert optimizer.hyperparameters()["0.lr"].item() == pytest.approx(0.02, rel=1e-6)


def test_groups_override_values_and_betas():
    groups = [{"lr": 0.25}, {"betas": (0.5, 0.75), "weight_decay": 0.125}, {}]
    _, optimizer = bound(CHAIN, torch.float64, groups)
    values = optimizer.hyperparameters()
    assert [values[f"0.lr[{i}]"].item() for i in range(3)] == [0.25, 1e-3, 1e-3]
    assert [values[f"0.beta1[{i}]"].item() for i in range(3)] == [0.9, 0.5, 0.9]
    assert [values[f"0.beta2[{i}]"].item() for i in range(3)] == [0.999, 0.75, 0.999]
    assert [values[f"0.weight_decay[{i}]"].item() for i in range(3)] == [0, 0.125, 0]
    assert [values[f"1.lr[{i}]"].item() for i in range(3)] == [0.1] * 3


def test_groups_with_values_follow_torch():
    groups = [{"lr": 0.02, "betas": (0.5, 0.75)}, {"weight_decay": 0.125}]
    model, optimizer = bound(Hyper(Adam), torch.float64, groups)
    twin = net(torch.float64)
    params = list(twin.parameters())
    reference = torch.optim.Adam([{"params": params[i::2], **values} for i, values in enumerate(groups)])
    train(model, optimizer, range(20))
    train(twin, reference, range(20))
    for p, q in zip(model.parameters(), params, strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)


def test_groups_learn_apart():
    model, optimizer = bound(CHAIN, groups=[{"lr": 1e-3}, {"lr": 1e-3}])
    train(model, optimizer, range(6))
    first, second = (float(group["lr"]) for group in optimizer.param_groups)
    assert first != second


def test_named_parameters():
    model = net()
    optimizer = CHAIN.bind(model.named_parameters())
    plain, same = bound(CHAIN)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, optimizer, range(4))
    train(plain, same, range(4))
    assert differences(weights(model), weights(plain)) == []


def test_a_single_tensor_in_a_group_and_a_generator():
    w = nn.Parameter(torch.ones(3))
    assert Hyper(SGD).bind([{"params": w}]).param_groups[0]["params"] == [w]
    model = net()
    assert len(Hyper(SGD).bind(p for p in model.parameters()).param_groups[0]["params"]) == 4


# ---- assignment


def assign_float(group, name, value):
    group[name] = value


def assign_tensor(group, name, value):
    group[name] = torch.tensor(value, dtype=torch.float64)


def assign_in_place(group, name, value):
    group[name].fill_(value)


ASSIGN = [assign_float, assign_tensor, assign_in_place]


@pytest.mark.parametrize("assign", ASSIGN)
@pytest.mark.parametrize("tower", [CHAIN, ALL, TREE], ids=str)
@pytest.mark.parametrize("value", [0.3, 1e-7, 0.0])
def test_the_step_uses_exactly_the_assigned_value(assign, tower, value):
    (model, optimizer), (twin, other) = (bound(tower, torch.float64) for _ in range(2))
    train(model, optimizer, range(5))
    train(twin, other, range(5))
    assign(optimizer.param_groups[0], "lr", value)
    assign(other.param_groups[0], "lr", 2 * value if value else 0.1)
    old = weights(model)
    train(model, optimizer, range(5, 6))
    train(twin, other, range(5, 6))
    assert optimizer.param_groups[0]["lr"].item() == optimizer.hyperparameters()["0.lr"].item() == value
    for p, q, x in zip(model.parameters(), twin.parameters(), old, strict=True):
        if value == 0:
            assert torch.equal(p, x)
            assert not torch.equal(q, x)
        else:
            # The displacement is linear in lr and no trust ratio has touched either: .3 moves these weights by far more than 10 %.
            assert torch.allclose(2 * (p - x), q - x, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("assign", ASSIGN)
def test_an_assigned_lr_is_what_torch_would_use(assign):
    model, optimizer = bound(Hyper(SGD, lr=1e-2).stack(SGD), torch.float64)
    train(model, optimizer, range(4))
    twin = net(torch.float64)
    twin.load_state_dict(model.state_dict())
    assign(optimizer.param_groups[0], "lr", 0.5)
    train(model, optimizer, range(4, 5))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.5), range(4, 5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("value", [0.3, 0.1, 0.05, 0.007, 3e-4, 1e-5])
def test_an_assigned_lr_is_used_to_the_last_bit(value):
    # exp(log(lr)) is not lr, and in float32 that shows.
    model, optimizer = bound(Hyper(SGD, lr=1e-2).stack(SGD))
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = value
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # so that nothing is rounded but the step
    train(model, optimizer, range(3, 4))
    lr = torch.tensor(value)
    assert any(p.any() for p in model.parameters())
    for p in model.parameters():
        assert torch.equal(p, -lr * p.grad)


@pytest.mark.parametrize("assign", ASSIGN)
def test_a_beta_that_was_assigned_and_learned_on_is_used_with_its_own_complement(assign):
    tower = Hyper(Adam, lr=1e-3, learn=("lr", "beta1"), trust=None).stack(Adam, lr=0.3, trust=None)
    model, optimizer = bound(tower, torch.float64)
    train(model, optimizer, range(3))
    assign(optimizer.param_groups[0], "beta1", 0.5)
    train(model, optimizer, range(3, 6))
    old = [optimizer.state[p]["m"].clone() for p in model.parameters()]
    train(model, optimizer, range(6, 7))
    beta1 = optimizer.hyperparameters()["0.beta1"]
    assert abs(float(beta1) - 0.5) > 0.01
    for p, m in zip(model.parameters(), old, strict=True):
        assert torch.allclose(optimizer.state[p]["m"], beta1 * m + (1 - beta1) * p.grad, rtol=1e-12)


def test_an_assigned_lr_is_untouched_by_trust_and_the_next_one_is_not():
    model, optimizer = bound(Hyper(SGD, lr=1e-2, trust=0.01).stack(SGD, lr=1e-3), torch.float64)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 50.0
    old = weights(model)
    train(model, optimizer, range(3, 4))
    moved = [float((p.detach() - x).norm() / x.norm()) for p, x in zip(model.parameters(), old, strict=True)]
    assert max(moved) > 0.5
    assert float(optimizer.param_groups[0]["lr"]) == 50.0
    train(model, optimizer, range(4, 5))
    assert float(optimizer.param_groups[0]["lr"]) < 50.0


@pytest.mark.parametrize("assign", ASSIGN)
def test_learning_goes_on_from_the_assigned_value(assign):
    model, optimizer = bound(Hyper(Adam, lr=1e-3, trust=None).stack(SGD, lr=0.01), torch.float64)
    train(model, optimizer, range(3))
    assign(optimizer.param_groups[0], "lr", 0.03125)
    train(model, optimizer, range(3, 4))
    assert float(optimizer.hyperparameters()["0.lr"]) == 0.03125
    train(model, optimizer, range(4, 5))
    expected = 0.03125 * torch.exp(-0.01 * optimizer.hypergradients()["0.lr"])
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(float(expected), rel=1e-12)
    assert float(optimizer.hyperparameters()["0.lr"]) != 0.03125


@pytest.mark.parametrize("assign", ASSIGN)
def test_a_boundary_value_is_held_for_one_step_and_leaves_the_raw_value(assign):
    model, optimizer = bound(Hyper(Adam, lr=1e-3).stack(SGD, lr=1e-9), torch.float64)
    train(model, optimizer, range(3))
    old = weights(model)
    assign(optimizer.param_groups[0], "lr", 0.0)
    train(model, optimizer, range(3, 4))
    assert float(optimizer.hyperparameters()["0.lr"]) == 0
    assert differences(weights(model), old) == []
    train(model, optimizer, range(4, 5))
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("boundary", [0.0, 1.0])
def test_a_boundary_value_of_a_learned_beta(boundary):
    tower = Hyper(Adam, lr=1e-3, learn=("lr", "beta1"), bias_correction=False).stack(SGD, lr=1e-9)
    model, optimizer = bound(tower, torch.float64)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["beta1"] = boundary
    backward(model, 3)
    grads = [p.grad.clone() for p in model.parameters()]
    old = [optimizer.state[p]["m"].clone() for p in model.parameters()]
    optimizer.step()
    for p, g, m in zip(model.parameters(), grads, old, strict=True):
        assert torch.allclose(optimizer.state[p]["m"], g if boundary == 0 else m, rtol=1e-12, atol=1e-300)
    train(model, optimizer, range(4, 5))
    assert float(optimizer.hyperparameters()["0.beta1"]) == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("strategy", ["tangents", "graph"])
@pytest.mark.parametrize("assign", ASSIGN)
def test_assigning_the_present_value_does_not_stop_learning(assign, strategy):
    tower = Hyper(Adam, lr=1e-3, horizon=1, strategy=strategy).stack(SGD, lr=0.01)
    (model, optimizer), (twin, other) = (bound(tower, torch.float64) for _ in range(2))
    for step in range(6):
        assign(optimizer.param_groups[0], "lr", optimizer.param_groups[0]["lr"].item())
        train(model, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
    first, second = (float(o.hyperparameters()["0.lr"]) for o in (optimizer, other))
    assert first == second != pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("assign", ASSIGN)
@pytest.mark.parametrize("strategy", ["tangents", "graph"])
def test_assigning_the_initial_value_after_it_was_learned(assign, strategy):
    model, optimizer = bound(Hyper(Adam, lr=0.125, horizon=1, strategy=strategy).stack(Adam), torch.float64)
    train(model, optimizer, range(6))
    assert float(optimizer.param_groups[0]["lr"]) != 0.125
    assign(optimizer.param_groups[0], "lr", 0.125)
    train(model, optimizer, range(6, 7))
    assert float(optimizer.hyperparameters()["0.lr"]) == 0.125


@pytest.mark.parametrize(
    ("tower", "reference"),
    [
        (Hyper(Adam, lr=1.0).stack(Adam).stack(SGD), lambda ps: torch.optim.Adam(ps, lr=1.0)),
        (Hyper(Adam, lr=1.0).stack(lr=Adam), lambda ps: torch.optim.Adam(ps, lr=1.0)),
        (Hyper(AdamW, lr=1.0, weight_decay=0.1).stack(Adam), lambda ps: torch.optim.AdamW(ps, lr=1.0, weight_decay=0.1)),
        (Hyper(Adam, lr=1.0, weight_decay=0.1).stack(Adam), lambda ps: torch.optim.Adam(ps, lr=1.0, weight_decay=0.1)),
        (Hyper(SGD, lr=1.0, momentum=0.9).stack(Adam), lambda ps: torch.optim.SGD(ps, lr=1.0, momentum=0.9)),
    ],
)
def test_a_schedule_of_absolute_values_is_followed_as_in_torch(tower, reference):
    # Warm-up from 0, then decay: every step has a new value, so learning never shows, and torch is reproduced.
    values = [0.0, 1e-2, 2e-2, 3e-2, 2.5e-2, 2e-2, 1e-3, 0.0, 1e-2]
    (model, optimizer), twin = bound(tower, torch.float64), net(torch.float64)
    pairs = [(m, o, LambdaLR(o, lambda step: values[step])) for m, o in ((model, optimizer), (twin, reference(twin.parameters())))]
    for step in range(len(values) - 1):
        for m, o, schedule in pairs:
            train(m, o, range(step, step + 1))
            schedule.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-13)


SCHEDULES = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=9),
    "linear": lambda o: LinearLR(o, start_factor=1e-3, total_iters=9),
    "step": lambda o: StepLR(o, step_size=1, gamma=0.7),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_recursive_schedules_are_followed_as_in_torch(schedule):
    tower = Hyper(Adam, lr=0.02, trust=None).stack(Adam).stack(SGD)
    (model, optimizer), twin = bound(tower, torch.float64), net(torch.float64)
    reference = torch.optim.Adam(twin.parameters(), lr=0.02)
    pairs = [(model, optimizer, schedule(optimizer)), (twin, reference, schedule(reference))]
    for step in range(8):
        for m, o, s in pairs:
            train(m, o, range(step, step + 1))
            s.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-13)


def test_between_the_drops_of_a_step_schedule_learning_goes_on():
    model, optimizer = bound(Hyper(Adam, lr=1e-3).stack(Adam), torch.float64)
    schedule = StepLR(optimizer, step_size=5, gamma=0.5)
    seen = []
    for step in range(11):
        train(model, optimizer, range(step, step + 1))
        seen.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step()
    moves = [b / a for a, b in itertools.pairwise(seen)]
    assert moves[4] == pytest.approx(0.5, rel=1e-12)
    assert moves[9] == pytest.approx(0.5, rel=1e-12)
    assert all(abs(move - 1) > 1e-3 for i, move in enumerate(moves) if i not in (0, 4, 9))


def test_reduce_on_plateau():
    model, optimizer = bound(Hyper(Adam, lr=1e-3).stack(SGD, lr=0.1), torch.float64)
    schedule = ReduceLROnPlateau(optimizer, factor=0.25, patience=1)
    seen = []
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        seen.append(float(optimizer.hyperparameters()["0.lr"]))
        schedule.step(1.0)  # the third bad epoch is the second in a row
    assert seen[3] == pytest.approx(seen[2] / 4, rel=1e-12)
    assert abs(seen[4] / seen[3] - 1) > 1e-6


HELD = [
    (Hyper(SGD, lr=0.1), torch.optim.SGD, {"lr": 0.1}, {"momentum": 0.9}),
    (Hyper(SGD, lr=0.1), torch.optim.SGD, {"lr": 0.1}, {"weight_decay": 0.1}),
    (Hyper(SGD, lr=0.1, momentum=0.5), torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}, {"momentum": 0.0}),
    (Hyper(SGD, lr=0.1, momentum=0.5, nesterov=True), torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "nesterov": True}, {"momentum": 0.25}),
    (Hyper(Adam, lr=0.1), torch.optim.Adam, {"lr": 0.1}, {"weight_decay": 0.1}),
    (Hyper(Adam, lr=0.1), torch.optim.Adam, {"lr": 0.1}, {"eps": 0.1}),
    (Hyper(Adam, lr=0.1), torch.optim.Adam, {"lr": 0.1}, {"lr": 0.2}),
    (Hyper(AdamW, lr=0.1), torch.optim.AdamW, {"lr": 0.1}, {"weight_decay": 0.5}),
    (Hyper(AdamW, lr=0.1), torch.optim.AdamW, {"lr": 0.1}, {"weight_decay": 0.0}),
]


@pytest.mark.parametrize("assign", ASSIGN)
@pytest.mark.parametrize("top", [False, True], ids=["height 0", "height 1"])
@pytest.mark.parametrize(("tower", "kind", "values", "later"), HELD, ids=lambda v: str(v) if isinstance(v, dict | Hyper) else "")
def test_a_held_value_assigned_later_is_followed_as_in_torch(tower, kind, values, later, top, assign):
    # A top of negligible step, so that lr stays.
    tower = Hyper(tower.rule, trust=None).stack(SGD, lr=1e-30) if top else tower
    (model, optimizer), twin = bound(tower, torch.float64), net(torch.float64)
    reference = kind(twin.parameters(), **values)
    back = (
        {} if later == {"momentum": 0.0} else {name: values.get(name, 0.25) for name in later}
    )  # torch then takes up a buffer of long ago
    for steps, change in ((range(4), later), (range(4, 8), back), (range(8, 12), {})):
        train(model, optimizer, steps)
        train(twin, reference, steps)
        for name, value in change.items():
            assign(optimizer.param_groups[0], name, value)
            reference.param_groups[0][name] = value
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-13)


def test_betas_assigned_later_are_followed_as_in_torch_also_in_float32():
    # 1 - 0.999 taken in float32 is off by 1e-5 of itself.
    (model, optimizer), twin = bound(Hyper(Adam, lr=0.01)), net()
    reference = torch.optim.Adam(twin.parameters(), lr=0.01)
    for start, betas in ((0, (0.9, 0.999)), (4, (0.8, 0.9999)), (8, (0.95, 0.99999))):
        optimizer.param_groups[0]["beta1"], optimizer.param_groups[0]["beta2"] = betas
        reference.param_groups[0]["betas"] = betas
        train(model, optimizer, range(start, start + 4))
        train(twin, reference, range(start, start + 4))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(optimizer.state[p]["v"], reference.state[q]["exp_avg_sq"], rtol=2e-6, atol=0)
            assert torch.allclose(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("tower", "name", "value"),
    [
        (CHAIN, "lr", -1e-3),
        (CHAIN, "lr", float("nan")),
        (CHAIN, "lr", float("inf")),
        (CHAIN, "beta1", 1.5),
        (ALL, "beta2", -0.1),
        (Hyper(SGD), "momentum", 2.0),
        (Hyper(SGD, lr=1e-2, domains={"lr": Interval(1e-3, 1)}).stack(SGD), "lr", 2.0),
    ],
)
def test_a_float_outside_its_domain_raises_before_anything_changes(tower, name, value):
    model, optimizer = bound(tower, groups=[{}, {}])
    train(model, optimizer, range(3))
    backward(model, 3)
    before = snapshot(model, optimizer)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"{name}'\] = {value} is outside its domain .*: give"):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    assert differences(before, snapshot(model, optimizer)) == []
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 6))
    train(twin, other, range(4, 6))
    assert differences(snapshot(model, optimizer), snapshot(twin, other)) == []


@pytest.mark.parametrize("value", ["fast", None, True])
def test_an_assigned_value_that_is_no_number_raises(value):
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(2))
    before = weights(model)
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises(TypeError, match=rf"'lr'\] must be a number, got {value!r}"):
        optimizer.step()
    assert differences(before, weights(model)) == []


def test_with_the_real_domain_any_finite_value_can_be_assigned():
    model, optimizer = bound(Hyper(SGD, domains={"lr": Real()}, trust=None).stack(SGD, lr=1e-6), torch.float64)
    optimizer.param_groups[0]["lr"] = -0.25
    old = weights(model)
    backward(model, 0)
    optimizer.step()
    for p, x in zip(model.parameters(), old, strict=True):
        assert torch.allclose(p, x + 0.25 * p.grad, rtol=1e-14)


def test_upper_levels_are_not_moved_by_the_step_that_an_assignment_overrides():
    # The level above steps as if nothing had been assigned; only level 0's value is replaced.
    (model, optimizer), (twin, other) = (bound(CHAIN, torch.float64) for _ in range(2))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(5))
    optimizer.param_groups[0]["lr"] = 0.3
    train(model, optimizer, range(5, 6))
    train(twin, other, range(5, 6))
    assert optimizer.hyperparameters()["1.lr"].equal(other.hyperparameters()["1.lr"])
    assert optimizer.hypergradients()["0.lr"].equal(other.hypergradients()["0.lr"])


# ---- closures, absent gradients, maximize


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    (model, optimizer), (twin, other) = (bound(CHAIN) for _ in range(2))
    for step in range(4):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            return loss

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss.equal(loss_at(twin, step))
        backward(twin, step)
        assert other.step() is None
    assert differences(snapshot(model, optimizer), snapshot(twin, other)) == []


PRESENCE = ["1101", "1100", "0111", "0000", "1111", "0110", "1001", "1111", "0011", "1111"]


def train_with_absent(model, optimizer, steps):
    """Steps in which only some parameters have a gradient."""
    for step in steps:
        backward(model, step)
        for p, present in zip(model.parameters(), PRESENCE[step], strict=True):
            if present == "0":
                p.grad = None
        optimizer.step()


@pytest.mark.parametrize(
    ("tower", "reference"),
    [
        (Hyper(Adam, lr=0.05), lambda ps: torch.optim.Adam(ps, lr=0.05)),
        (Hyper(SGD, lr=0.05, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9)),
        (Hyper(Adam, lr=0.05, trust=None).stack(SGD, lr=1e-30), lambda ps: torch.optim.Adam(ps, lr=0.05)),
    ],
)
def test_changing_presence_of_gradients_is_as_in_torch(tower, reference):
    (model, optimizer), twin = bound(tower, torch.float64), net(torch.float64)
    other = reference(twin.parameters())
    train_with_absent(model, optimizer, range(10))
    train_with_absent(twin, other, range(10))
    for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)
        assert float(optimizer.state[p]["t"]) == sum(row[i] == "1" for row in PRESENCE)


@pytest.mark.parametrize("tower", [CHAIN, ALL, TREE], ids=str)
def test_a_parameter_without_gradient_keeps_everything(tower):
    model, optimizer = bound(tower)
    train(model, optimizer, range(3))
    backward(model, 3)
    absent, present = model[0].weight, model[2].weight
    absent.grad = None
    before = copy.deepcopy((absent.detach(), optimizer.state[absent]))
    moved = present.detach().clone()
    optimizer.step()
    assert differences(before, (absent.detach(), dict(optimizer.state[absent]))) == []
    assert {"t", "m", "v", "Z.lr"} <= before[1].keys()
    assert not moved.equal(present)


def test_a_parameter_that_never_has_a_gradient_has_no_state():
    model, optimizer = bound(CHAIN)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, optimizer, range(3))
    assert model[0].weight.equal(before)
    assert not optimizer.state.get(model[0].weight)


def test_a_step_without_any_gradient_changes_nothing():
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    optimizer.step()
    assert differences(before, snapshot(model, optimizer)) == []


def test_learning_goes_on_with_changing_presence():
    # The hypergradient sums over those present; the levels above count their own steps.
    model, optimizer = bound(CHAIN, torch.float64)
    train_with_absent(model, optimizer, range(10))
    assert float(optimizer.hyperparameters()["0.lr"]) != 1e-3
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())


@pytest.mark.parametrize("level_0", [{"rule": Adam}, {"rule": Adam, "learn": "all"}, {"rule": SGD, "lr": 0.1, "momentum": 0.9}], ids=str)
def test_maximize_is_descent_of_the_negated_loss(level_0):
    model, optimizer = bound(Hyper(**level_0).stack(Adam).stack(SGD), torch.float64)
    twin, up = bound(Hyper(**level_0, maximize=True).stack(Adam).stack(SGD), torch.float64)
    for step in range(6):
        model.zero_grad()
        (-loss_at(model, step)).backward()
        optimizer.step()
        backward(twin, step)
        kept = [p.grad.clone() for p in twin.parameters()]
        up.step()
        assert differences(kept, [p.grad for p in twin.parameters()]) == []
    assert differences(weights(model), weights(twin)) == []
    assert differences(optimizer.hyperparameters(), up.hyperparameters()) == []


def test_gradients_are_left_alone():
    big = nn.Parameter(torch.linspace(-1, 1, 2**18 + 1))
    for params in ([big], list(net().parameters())):
        optimizer = CHAIN.bind(params)
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        kept = [p.grad for p in params]
        for _ in range(3):
            optimizer.step()
        assert all(p.grad is g and g.eq(0.5).all() for p, g in zip(params, kept, strict=True))


def test_accumulation_and_clipping_work_on_gradients_as_with_any_optimizer():
    (model, optimizer), (twin, other) = (bound(CHAIN, torch.float64) for _ in range(2))
    for step in range(4):
        model.zero_grad(set_to_none=False)
        (loss_at(model, step) + loss_at(model, step + 50)).backward()
        twin.zero_grad(set_to_none=True)
        loss_at(twin, step).backward()
        loss_at(twin, step + 50).backward()
        for m, o in ((model, optimizer), (twin, other)):
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)


def test_step_hooks_run():
    model, optimizer = bound(CHAIN)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, range(2))
    assert calls == ["pre", "post"] * 2


# ---- checkpoints and copies


PER_TENSOR = Hyper(Adam, per="tensor", learn=("lr", "beta1")).stack(Adam)
PER_COORDINATE = Hyper(SGD, lr=0.01, per="coordinate").stack(SGD)
STEPS_EACH = Hyper(Adam).stack(SGD, lr={"lr": 0.1, "beta1": 0.2}).stack(SGD)
HEAVY = Hyper(SGD, lr=0.01, momentum=0.9, learn="all", horizon=float("inf")).stack(Adam, learn="all").stack(SGD)
TOWERS = {
    "height 0": Hyper(Adam),
    "chain": CHAIN,
    "tree": TREE,
    "all": ALL,
    "per tensor": PER_TENSOR,
    "per coordinate": PER_COORDINATE,
    "steps for each": STEPS_EACH,
    "heavy": HEAVY,
    "paper": Hyper(SGD, lr=0.01, domains={"lr": Real()}, horizon=1, trust=None)
    .stack(SGD, lr=1e-4, domains={"lr": Real()})
    .stack(SGD, lr=1e-5),
    "decoupled": Hyper(AdamW, learn=("lr", "weight_decay")).stack(Adam),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def reload(model, optimizer, tower, groups=None, **keywords):
    """A fresh model and a fresh optimizer, of other values, after a round trip through a file that holds no code."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh, again = bound(tower.replace(lr=0.5), next(model.parameters()).dtype, groups and [{} for _ in groups], **keywords)
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    return fresh, again


def copied(model, optimizer, *_, **__):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer, *_, **__):
    return pickle.loads(pickle.dumps((model, optimizer)))


AGAIN = [reload, copied, pickled]


def assert_goes_on(model, optimizer, fresh, again, steps, trainer=train):
    assert differences(snapshot(model, optimizer), snapshot(fresh, again)) == []
    assert differences(optimizer.hyperparameters(), again.hyperparameters()) == []
    for step in steps:
        trainer(model, optimizer, range(step, step + 1))
        trainer(fresh, again, range(step, step + 1))
        assert differences(snapshot(model, optimizer), snapshot(fresh, again)) == [], step
    assert differences(optimizer.hyperparameters(), again.hyperparameters()) == []
    assert differences(optimizer.hypergradients(), again.hypergradients()) == []
    assert optimizer.skipped == again.skipped


@pytest.mark.parametrize(("remake", "dtype"), [*((reload, dtype) for dtype in DTYPES), (copied, torch.float32), (pickled, torch.bfloat16)])
@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_training_goes_on_bit_for_bit(remake, tower, dtype):
    model, optimizer = bound(tower, dtype)
    train(model, optimizer, range(5))
    assert_goes_on(model, optimizer, *remake(model, optimizer, tower), range(5, 8))


@pytest.mark.parametrize("tower", [CHAIN, TREE, PER_TENSOR], ids=str)
@pytest.mark.parametrize("remake", AGAIN)
def test_groups_go_on_bit_for_bit(remake, tower):
    groups = [{"lr": 0.02}, {"betas": (0.8, 0.95)}, {"weight_decay": 0.1}]
    model, optimizer = bound(tower, groups=groups)
    train(model, optimizer, range(5))
    assert_goes_on(model, optimizer, *remake(model, optimizer, tower, groups), range(5, 9))


@pytest.mark.parametrize("remake", AGAIN)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_young_optimizers_go_on_bit_for_bit(remake, steps):
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(steps))
    assert_goes_on(model, optimizer, *remake(model, optimizer, CHAIN), range(steps, steps + 4))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("remake", [reload, copied])
@pytest.mark.parametrize("saved_after", [3, 8])
@pytest.mark.parametrize("tower", [CHAIN, ALL], ids=str)
def test_changing_presence_goes_on_bit_for_bit(remake, tower, saved_after):
    # Parameters that were absent at different steps can have the same count again: they must not be added up in another order.
    model, optimizer = bound(tower)
    train_with_absent(model, optimizer, range(saved_after))
    assert_goes_on(model, optimizer, *remake(model, optimizer, tower), range(saved_after, 10), train_with_absent)


@pytest.mark.parametrize("remake", AGAIN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_late_first_gradient_goes_on_bit_for_bit(remake, dtype):
    model, optimizer = bound(CHAIN, dtype)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    train(model, optimizer, range(3))
    first.requires_grad_(True)
    train(model, optimizer, range(3, 6))
    assert_goes_on(model, optimizer, *remake(model, optimizer, CHAIN), range(6, 10))


ASSIGNED = [
    (CHAIN, "lr", 0.007),
    (CHAIN, "lr", 0.0),
    (CHAIN, "beta2", 0.9995),
    (CHAIN, "weight_decay", 0.1),
    (ALL, "beta2", 0.9995),
    (ALL, "eps", 1e-3),
    (Hyper(SGD, lr=0.01).stack(SGD), "momentum", 0.9),
    (Hyper(SGD, lr=0.01, momentum=0.9).stack(SGD), "momentum", 0.0),
    (Hyper(SGD, lr=0.01, momentum=0.9, nesterov=True).stack(SGD), "momentum", 0.0),
    (Hyper(Adam), "beta2", 0.5),
    (Hyper(Adam), "lr", 0.0),
]


def assert_behaves_alike(model, optimizer, fresh, again, steps):
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        train(fresh, again, range(step, step + 1))
        assert differences(weights(model), weights(fresh)) == [], step
        assert differences(optimizer.hyperparameters(), again.hyperparameters()) == [], step


@pytest.mark.parametrize("remake", [reload, copied])
@pytest.mark.parametrize(("tower", "name", "value"), ASSIGNED, ids=str)
def test_assigned_values_go_on_bit_for_bit(remake, tower, name, value):
    model, optimizer = bound(tower)
    train(model, optimizer, range(3))
    optimizer.param_groups[0][name] = value
    train(model, optimizer, range(3, 5))
    assert_behaves_alike(model, optimizer, *remake(model, optimizer, tower), range(5, 8))


@pytest.mark.parametrize("remake", [reload, copied])
@pytest.mark.parametrize("assign", [assign_float, assign_in_place])
@pytest.mark.parametrize(("tower", "name", "value"), ASSIGNED, ids=str)
def test_an_assignment_that_no_step_has_used_yet_is_not_lost(remake, tower, name, value, assign):
    # scheduler.step() before the checkpoint of an epoch leaves one behind.
    model, optimizer = bound(tower)
    train(model, optimizer, range(3))
    assign(optimizer.param_groups[0], name, value)
    assert_behaves_alike(model, optimizer, *remake(model, optimizer, tower), range(3, 6))


@pytest.mark.parametrize("remake", AGAIN)
@pytest.mark.parametrize("assign", ASSIGN)
@pytest.mark.parametrize(("tower", "name", "value"), [(CHAIN, "lr", 0.007), (CHAIN, "beta1", 0.5), (CHAIN, "weight_decay", 0.1)], ids=str)
def test_a_copy_notices_an_assignment_as_the_original_does(remake, tower, name, value, assign):
    model, optimizer = bound(tower)
    train(model, optimizer, range(3))
    fresh, again = remake(model, optimizer, tower)
    for o in (optimizer, again):
        assign(o.param_groups[0], name, value)
    assert_behaves_alike(model, optimizer, fresh, again, range(3, 6))


@pytest.mark.parametrize("remake", AGAIN)
def test_a_copy_refuses_a_value_outside_its_domain(remake):
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    fresh, again = remake(model, optimizer, CHAIN)
    again.param_groups[0]["lr"] = -1.0
    backward(fresh, 3)
    with pytest.raises(ValueError, match=r"-1.0 is outside its domain"):
        again.step()


@pytest.mark.parametrize("remake", AGAIN)
def test_a_value_assigned_back_goes_on_bit_for_bit(remake):
    tower = Hyper(SGD, lr=0.01, momentum=0.9).stack(SGD)
    model, optimizer = bound(tower)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["momentum"] = 0.0
    train(model, optimizer, range(3, 5))
    fresh, again = remake(model, optimizer, tower)
    for o in (optimizer, again):
        o.param_groups[0]["momentum"] = 0.9
    assert_behaves_alike(model, optimizer, fresh, again, range(5, 8))


@pytest.mark.parametrize("remake", AGAIN)
def test_the_pace_of_hyper_every_goes_on(remake):
    model, optimizer = bound(CHAIN, hyper_every=3)
    train(model, optimizer, range(4))
    fresh, again = remake(model, optimizer, CHAIN, hyper_every=3)
    for step in range(4, 10):
        train(model, optimizer, range(step, step + 1))
        train(fresh, again, range(step, step + 1))
        assert differences(optimizer.hyperparameters(), again.hyperparameters()) == [], step


@pytest.mark.parametrize("remake", AGAIN)
def test_what_was_skipped_stays_counted(remake):
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    backward(model, 3)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.step()
    for p in model.parameters():
        optimizer.state[p]["Z.lr"].fill_(float("nan"))
    train(model, optimizer, range(4, 6))
    assert optimizer.skipped == {"gradients": 1, "hypergradients": 1}
    fresh, again = remake(model, optimizer, CHAIN)
    assert again.skipped == {"gradients": 1, "hypergradients": 1}
    train(fresh, again, range(6, 8))
    assert again.skipped == {"gradients": 1, "hypergradients": 1}


@pytest.mark.parametrize("remake", AGAIN)
def test_a_schedule_goes_on_bit_for_bit(remake):
    model, optimizer = bound(CHAIN, torch.float64)
    schedule = CosineAnnealingLR(optimizer, T_max=10)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
    fresh, again = remake(model, optimizer, CHAIN)
    other = CosineAnnealingLR(again, T_max=10, last_epoch=schedule.last_epoch)
    other.load_state_dict(schedule.state_dict())
    for group, mine in zip(again.param_groups, optimizer.param_groups, strict=True):
        group["lr"] = mine["lr"].item()
    for step in range(4, 8):
        for m, o, s in ((model, optimizer, schedule), (fresh, again, other)):
            train(m, o, range(step, step + 1))
            s.step()
        assert differences(optimizer.hyperparameters(), again.hyperparameters()) == []
    assert differences(weights(model), weights(fresh)) == []


@pytest.mark.parametrize("later", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"lr": 0.5}], ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_held_values_come_from_the_checkpoint_at_every_level(level, later):
    levels = [Hyper(SGD, lr=0.01), Hyper(SGD, lr=0.1), Hyper(SGD, lr=0.1)]
    default = levels[0].stack(levels[1]).stack(levels[2])
    levels[level] = levels[level].replace(**later)
    model, optimizer = bound(levels[0].stack(levels[1]).stack(levels[2]))
    train(model, optimizer, range(5))
    fresh, again = bound(default)
    fresh.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_goes_on(model, optimizer, fresh, again, range(5, 9))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("assign", [None, "lr", "beta2"])
@pytest.mark.parametrize(
    "tower",
    [*TOWERS.values(), Hyper(ScheduleFree(Adam)).stack(Adam), Hyper(SGD, lr=0.01, momentum=0.5, weight_decay=0.1).stack(Adam).stack(SGD)],
    ids=str,
)
def test_a_distributed_checkpoint_goes_on_bit_for_bit(tower, assign, tmp_path):
    # It reads only those entries which an optimizer that has taken no step, and to which nothing was assigned, has too.
    model, optimizer = bound(tower)
    train(model, optimizer, range(5))
    if assign in optimizer.param_groups[0]:
        optimizer.param_groups[0][assign] = 0.02
        train(model, optimizer, range(5, 7))
    fresh, again = bound(tower)
    through_distributed((model, optimizer), (fresh, again), tmp_path)
    assert_goes_on(model, optimizer, fresh, again, range(7, 11))


def test_saving_before_the_first_step_changes_no_value():
    model, optimizer = bound(ALL)
    before = optimizer.hyperparameters()
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, range(1))
    assert all(torch.allclose(value, before[name]) for name, value in optimizer.hyperparameters().items() if name.endswith("lr"))


def test_a_copy_is_independent():
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    for remake in (copied, pickled, reload):
        fresh, again = remake(model, optimizer, CHAIN)
        before = snapshot(model, optimizer)
        train(fresh, again, range(3, 6))
        again.param_groups[0]["lr"].fill_(9)
        assert differences(before, snapshot(model, optimizer)) == []


def test_loading_leaves_the_checkpoint_alone():
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    fresh, again = bound(CHAIN)
    again.load_state_dict(saved)
    train(fresh, again, range(3))
    assert differences(saved, kept) == []


def test_loading_over_a_trained_optimizer_forgets_it():
    model, optimizer = bound(CHAIN)
    young = copy.deepcopy(optimizer.state_dict())
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(5))
    optimizer.load_state_dict(young)
    model.load_state_dict(start)
    train(model, optimizer, range(4))
    fresh, again = bound(CHAIN)
    train(fresh, again, range(4))
    assert differences(snapshot(model, optimizer), snapshot(fresh, again)) == []


def leaves(value, path=""):
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in [(f"{path}.key", key), *leaves(item, f"{path}.{key}")]]
    if isinstance(value, list | tuple):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{path}[{i}]")]
    return [(path, value)]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_state_dict_holds_tensors_and_plain_values_only(tower, dtype):
    model, optimizer = bound(tower, dtype)
    train(model, optimizer, range(4))
    for path, leaf in leaves(optimizer.state_dict()):
        assert type(leaf) in (Tensor, int, float, bool, str, type(None)), path
        assert not (isinstance(leaf, Tensor) and leaf.requires_grad), path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tower", [CHAIN, ALL, TREE, PER_TENSOR, HEAVY], ids=str)
@pytest.mark.parametrize("remake", [None, reload])
def test_state_is_shaped_like_the_parameter_and_never_in_half_precision(remake, tower, dtype):
    model, optimizer = bound(tower, dtype)
    train(model, optimizer, range(4))
    if remake is not None:
        model, optimizer = remake(model, optimizer, tower)
        train(model, optimizer, range(4, 5))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in model.parameters():
        assert p.dtype == dtype
        assert optimizer.state[p]["t"].shape == ()
        for key, value in optimizer.state[p].items():
            assert value.dtype == wide, key
            assert key == "t" or value.shape == p.shape, key
        assert not tower.above or all(f"Z.{name}" in optimizer.state[p] for name in tower.learned)
    assert all(value.dtype == wide for value in optimizer.hyperparameters().values())


def test_graph_cannot_be_saved_and_says_what_can():
    model, optimizer = bound(Hyper(SGD, horizon=1, strategy="graph").stack(SGD))
    train(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match="cannot be saved: strategy='tangents' computes the same"):
        optimizer.state_dict()


@pytest.mark.parametrize("remake", [copied, pickled])
def test_a_copy_of_a_graph_goes_on_bit_for_bit_or_says_that_it_cannot(remake):
    model, optimizer = bound(Hyper(Adam, lr=0.01, horizon=1, strategy="graph").stack(Adam))
    train(model, optimizer, range(3))
    try:
        fresh, again = remake(model, optimizer)
    except RuntimeError as error:
        assert "strategy='tangents'" in str(error)  # noqa: PT017
    else:
        assert_behaves_alike(model, optimizer, fresh, again, range(3, 6))


def test_a_checkpoint_of_one_dtype_is_loaded_into_a_model_of_two():
    model, optimizer = bound(CHAIN)
    train(model, optimizer, range(3))
    mixed = net()
    mixed[2].double()
    again = CHAIN.bind(mixed.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in mixed.parameters():
        p.grad = torch.full_like(p, 0.1)
    again.step()
    for p in mixed.parameters():
        assert again.state[p]["m"].dtype == p.dtype
        assert float(again.state[p]["t"]) == 4


# ---- more groups, granularity, pace


@pytest.mark.parametrize("given", [list, lambda made: made[0], lambda made: (p for p in made)], ids=["list", "tensor", "generator"])
def test_a_group_without_names_beside_those_of_a_module(given):
    """torch wants names in all groups or in none, and the user has given none."""
    optimizer = Hyper.parse("(Muon | Adam) / Adam").bind(nn.Linear(2, 3))
    added = given([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
    optimizer.add_param_group({"params": added, "lr": 0.1})
    group = optimizer.param_groups[1]
    assert group["param_names"] == [f"group 1, tensor {i}" for i in range(len(group["params"]))]
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool((p < 1).all()) for p in group["params"])


def test_add_param_group_later():
    model, optimizer = bound(CHAIN, torch.float64)
    train(model, optimizer, range(3))
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.25, "betas": (0.5, 0.75)})
    values = optimizer.hyperparameters()
    assert float(values["0.lr[1]"]) == 0.25
    assert float(values["0.beta1[1]"]) == 0.5
    for step in range(3, 8):
        optimizer.zero_grad()
        (loss_at(model, step) + extra.square().sum()).backward()
        optimizer.step()
    assert float(extra.detach().abs().max()) < 1
    assert float(optimizer.hyperparameters()["0.lr[1]"]) != 0.25
    assert set(optimizer.hypergradients()) == {"0.lr[0]", "0.lr[1]", "1.lr[0]", "1.lr[1]"}


def test_adding_a_group_does_not_disturb_the_others():
    (model, optimizer), (twin, other) = (bound(CHAIN) for _ in range(2))
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert differences(weights(model), weights(twin)) == []


@pytest.mark.parametrize(("per", "shape"), [("group", ()), ("tensor", (4,)), ("coordinate", (5 * 4 + 5 + 3 * 5 + 3,))])
@pytest.mark.parametrize("rule", [Hyper(Adam), Hyper(SGD, lr=0.1, momentum=0.9)], ids=str)
def test_granularity(rule, per, shape):
    names = ("lr", "beta1") if isinstance(rule.rule, Adam) else ("lr", "momentum")
    tower = Hyper(rule.rule, per=per, learn=names, trust=None).stack(SGD, lr=0.1).stack(SGD)
    model, optimizer = bound(tower, torch.float64)
    train(model, optimizer, range(5))
    values, gradients = optimizer.hyperparameters(), optimizer.hypergradients()
    for name in names:
        assert values[f"0.{name}"].shape == gradients[f"0.{name}"].shape == optimizer.param_groups[0][name].shape == shape
        assert values[f"0.{name}"].unique().numel() == max(1, *shape, 1) if per != "group" else True
    assert values["1.lr"].shape == ()
    held = [name for name in tower.rule.declared() if name not in names]
    assert all(values[f"0.{name}"].shape == () for name in held)


def test_the_hypergradient_of_a_group_is_the_sum_over_its_tensors_and_coordinates():
    sums = {}
    for per in ("group", "tensor", "coordinate"):
        # A top of negligible step keeps all three on one trajectory.
        tower = Hyper(Adam, per=per, learn=("lr", "beta1"), trust=None).stack(SGD, lr=1e-30)
        model, optimizer = bound(tower, torch.float64)
        train(model, optimizer, range(5))
        sums[per] = torch.stack([optimizer.hypergradients()[f"0.{name}"].sum() for name in ("lr", "beta1")])
    assert torch.allclose(sums["tensor"], sums["group"], rtol=1e-10)
    assert torch.allclose(sums["coordinate"], sums["group"], rtol=1e-10)


def test_each_tensor_moves_with_its_own_lr():
    model, optimizer = bound(Hyper(SGD, per="tensor", trust=None).stack(SGD, lr=1e-30), torch.float64)
    steps = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    optimizer.param_groups[0]["lr"].copy_(steps)
    old = weights(model)
    backward(model, 0)
    optimizer.step()
    for p, x, lr in zip(model.parameters(), old, steps, strict=True):
        assert torch.allclose(p, x - lr * p.grad, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("k", [2, 3])
def test_hyper_every_changes_hyperparameters_on_every_kth_step_only(k):
    model, optimizer = bound(CHAIN, torch.float64, hyper_every=k)
    seen = [optimizer.hyperparameters()]
    for step in range(4 * k):
        before = weights(model)
        train(model, optimizer, range(step, step + 1))
        seen.append(optimizer.hyperparameters())
        assert differences(before, weights(model)) != []
    changed = [step + 1 for step in range(4 * k) if abs(seen[step + 1]["0.lr"] / seen[step]["0.lr"] - 1) > 1e-9]
    assert changed == [step for step in range(2, 4 * k + 1) if step % k == 0]


# ---- no waiting for the device


SYNCS = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy", "__array__", "nonzero", "__iter__", "__len__")


@contextmanager
def no_host_sync(monkeypatch):
    """Whatever would read a tensor on the host raises."""
    with monkeypatch.context() as patch:
        for name in SYNCS:

            def refuse(self, *args, name=name, **kwargs):
                raise AssertionError(f"Tensor.{name} waits for the device")

            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize(
    "tower", [CHAIN, ALL, TREE, PER_TENSOR, HEAVY, Hyper(Adam), Hyper(Adam, trust=None, horizon=1).stack(SGD)], ids=str
)
def test_a_step_does_not_wait_for_the_device(tower, monkeypatch):
    monkeypatch.setattr("hyperopt.body.eager.OnHost", Selected)  # as on a GPU: a CPU waits for nothing
    model, optimizer = bound(tower)
    train(model, optimizer, range(3))
    lr = optimizer.hyperparameters()["0.lr"]
    for step in range(3, 6):
        backward(model, step)
        with no_host_sync(monkeypatch):
            optimizer.step()
            optimizer.hyperparameters()
            optimizer.hypergradients()
    assert not tower.above or not lr.equal(optimizer.hyperparameters()["0.lr"])


@pytest.mark.parametrize("tower", [CHAIN, ALL, Hyper(Adam)], ids=str)
def test_a_step_with_a_scheduler_does_not_wait_for_the_device(tower, monkeypatch):
    monkeypatch.setattr("hyperopt.body.eager.OnHost", Selected)  # as on a GPU: a CPU waits for nothing
    model, optimizer = bound(tower)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
    for step in range(3, 6):
        backward(model, step)
        with no_host_sync(monkeypatch):
            optimizer.step()
        schedule.step()


def test_the_guard_of_the_tests_above_guards(monkeypatch):
    with no_host_sync(monkeypatch), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(1))


# ---- models


def test_an_lstm_trains():
    torch.manual_seed(0)
    lstm, head = nn.LSTM(3, 6, num_layers=2, batch_first=True), nn.Linear(6, 1)
    params = [*lstm.parameters(), *head.parameters()]
    addresses = [p.data_ptr() for p in params]
    x = torch.randn(16, 7, 3)
    y = x.sum((1, 2), keepdim=False)[:, None].tanh()
    optimizer = Hyper(Adam, lr=1e-4).stack(Adam).bind(params)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (head(lstm(x)[0][:, -1]) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    # Never re-pointed into a flat buffer: cuDNN's weights, storage ties and `.to()` depend on it.
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("tower", [ALL, PER_TENSOR, PER_COORDINATE, None], ids=str)
def test_channels_last_convolutions_keep_their_format_and_equal_contiguous_ones(tower, large, monkeypatch):
    if large:  # these tensors are then stepped as they are, not gathered
        monkeypatch.setattr("hyperopt.body.choose.LARGE", 10)
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double().to(memory_format=memory_format)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
        # None: an optimizer without a rule here is driven.
        driven = Hyper(torch.optim.Rprop(model.parameters(), lr=1e-3)).stack(Adam) if tower is None else None
        optimizer = driven.bind() if driven else tower.bind(model.parameters())
        for step in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if step == 1:
                optimizer.hyper_backward(model(x + 1).square().mean())
        assert all(p.is_contiguous(memory_format=memory_format) for p in model.parameters() if p.dim() == 4)
        results.append((weights(model), optimizer.hyperparameters()))
    for p, q in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-12)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], rtol=1e-8), name


def test_channels_last_goes_on_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6)
    optimizer = CHAIN.bind(model.parameters())

    def go(m, o):
        for _ in range(3):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()

    go(model, optimizer)
    fresh, again = copy.deepcopy((model, optimizer))
    go(model, optimizer)
    go(fresh, again)
    assert differences(weights(model), weights(fresh)) == []


def test_parameters_of_several_dtypes_and_shapes_in_one_group():
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(s).to(d))
        for s, d in (((), torch.float32), ((3,), torch.bfloat16), ((2, 2), torch.float64), ((0,), torch.float32))
    ]
    optimizer = CHAIN.bind(params)
    first = float(params[2].detach().norm())
    for _ in range(5):
        optimizer.zero_grad()
        sum(p.double().square().sum() for p in params).backward()
        optimizer.step()
    assert [p.dtype for p in params] == [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    assert float(params[2].detach().norm()) < first
    assert all(value.isfinite() for value in optimizer.hyperparameters().values())


def test_tied_weights_are_stepped_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    optimizer = Hyper(SGD, lr=0.1).stack(SGD).bind(model.parameters())
    x = torch.randn(8, 4, dtype=torch.float64)
    old = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert model[2].weight is model[0].weight
    lr = optimizer.hyperparameters()["0.lr"]
    assert torch.allclose(model[0].weight, old - lr * model[0].weight.grad, rtol=1e-12)
