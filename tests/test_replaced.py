"""Parameters, and state, that a user replaces between steps: the next step goes on with them, or is refused and takes nothing."""

import copy
from collections import defaultdict

import pytest
import torch
from small import differences, snapshot
from torch import nn

from hyperopt import SGD, Adam, Averaged, Hyper, Muon, ScheduleFree
from hyperopt.body.eager import Eager
from hyperopt.body.native import Native

TOWERS = {
    "native": Hyper(Adam).stack(Adam),
    "eager": Hyper(Adam, learn="all", weight_decay=1e-2).stack(Adam).stack(SGD),
    "per tensor": Hyper(Adam, per="tensor").stack(SGD),
    "schedule-free": Hyper(ScheduleFree(Adam)).stack(Adam),
    "averaged": Hyper(Averaged(Adam), learn=("lr", "decay")).stack(Adam),
    "muon": Hyper(Muon | Adam).stack(Adam),
    "height 0": Hyper(Adam),
    "paper": Hyper(SGD, horizon=1, strategy="graph").stack(SGD),
}
BETAS = Hyper(SGD, lr=0.01, momentum=0.9, learn=("lr", "momentum")).stack(SGD)  # not in C++, and compiled in a few seconds
every_tower = pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)


def made(tower, steps=4, groups=1, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(10, 3))]
    optimizer = tower.bind([{"params": params[i::groups]} for i in range(groups)], **options)
    descend(optimizer, steps)
    return params, optimizer


def descend(optimizer, steps):
    """Steps on the square of all weights that the optimizer has."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach().clone()
        optimizer.step()


def weights(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def replace(optimizer, rows=slice(None), at=0, moves=True):
    """As in Gaussian splatting: another parameter, of some of the rows, with the state of these rows."""
    old = optimizer.param_groups[0]["params"][at]
    new = nn.Parameter(old.detach()[rows].clone())
    record = optimizer.state.pop(old)
    if moves:
        optimizer.state[new] = {key: kept[rows].clone() if kept.dim() else kept for key, kept in record.items()}
    optimizer.param_groups[0]["params"][at] = new
    return new


@every_tower
def test_a_copy_in_the_place_of_a_parameter_changes_nothing(tower):
    _, optimizer = made(tower)
    _, other = made(tower)
    for at in (0, 2):
        replace(optimizer, at=at)
    descend(optimizer, 3)
    descend(other, 3)
    exact = tower.strategy == "tangents"  # a graph begins again
    for mine, theirs in zip(weights(optimizer), weights(other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5 if exact else 1e-3, atol=1e-6)


@every_tower
@pytest.mark.parametrize("rows", [[0, 2, 5], [*range(10), 1, 2]], ids=["pruned", "cloned"])
def test_the_rows_that_stay_go_on_with_their_state(tower, rows):
    _, optimizer = made(tower)
    new = replace(optimizer, rows)
    counts = optimizer.state[new].get("t")
    before = weights(optimizer)
    descend(optimizer, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(optimizer), strict=True))
    assert float(optimizer.state[new]["t"]) == float(counts) + 2 == 6
    assert all(kept.shape == new.shape for key, kept in optimizer.state[new].items() if kept.dim())
    if tower.strategy == "tangents":
        other = tower.bind([nn.Parameter(w) for w in weights(optimizer)])
        other.load_state_dict(optimizer.state_dict())
        descend(optimizer, 2)
        descend(other, 2)
        assert differences(weights(optimizer), weights(other)) == []


@every_tower
def test_a_parameter_without_its_state_starts_again(tower):
    _, optimizer = made(tower)
    new = replace(optimizer, moves=False)
    descend(optimizer, 2)
    assert float(optimizer.state[new]["t"]) == 2
    assert float(optimizer.state[optimizer.param_groups[0]["params"][2]]["t"]) == 6


@every_tower
@pytest.mark.parametrize(
    "empty", [lambda o: setattr(o, "state", defaultdict(dict)), lambda o: o.state.clear(), lambda o: o.state.popitem()]
)
def test_a_state_that_was_emptied_starts_again_and_is_saved(tower, empty):
    params, optimizer = made(tower)
    learned = optimizer.hyperparameters()
    empty(optimizer)
    left = len(optimizer.state)
    assert left in (0, 2)
    before = weights(optimizer)
    descend(optimizer, 1)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(optimizer), strict=True))
    assert sorted(float(optimizer.state[p]["t"]) for p in params) == [1.0] * (3 - left) + [5.0] * left
    assert all(torch.allclose(value, learned[name], rtol=1, atol=0.5) for name, value in optimizer.hyperparameters().items())
    if tower.strategy == "tangents":
        assert len(optimizer.state_dict()["state"]) == 3


@every_tower
def test_a_tensor_in_the_place_of_one_of_the_state_is_the_state(tower):
    """As one that was changed where it is."""
    params, optimizer = made(tower)
    _, other = made(tower)
    names = [key for key, kept in optimizer.state[params[0]].items() if kept.dim() and "Z" not in key and key not in ("average", "z")]
    for key in names:
        record = optimizer.state[params[0]]
        record[key] = record[key] / 4
        other.state[other.param_groups[0]["params"][0]][key].div_(4)
    descend(optimizer, 3)
    descend(other, 3)
    exact = tower.strategy == "tangents"  # a graph begins again
    for mine, theirs in zip(weights(optimizer), weights(other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5 if exact else 1e-3, atol=1e-6)
    assert all(optimizer.state[params[0]][key].shape == params[0].shape for key in names)
    if exact:
        saved = optimizer.state_dict()["state"][0]
        assert all(torch.equal(saved[key], optimizer.state[params[0]][key]) for key in saved)


def test_a_state_of_the_users_own_changes_nothing():
    params, optimizer = made(TOWERS["native"])
    _, other = made(TOWERS["native"])
    optimizer.state[params[1]]["seen"] = 3
    descend(optimizer, 2)
    descend(other, 2)
    assert optimizer.state[params[1]]["seen"] == 3
    assert all(map(torch.equal, weights(optimizer), weights(other)))


def test_a_part_of_the_state_that_was_removed_starts_again():
    params, optimizer = made(TOWERS["native"])
    del optimizer.state[params[0]]["m"]
    descend(optimizer, 1)
    torch.testing.assert_close(optimizer.state[params[0]]["m"], 0.1 * params[0].grad)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("m", torch.ones(4)),
        ("m", torch.tensor(1.0)),
        ("m", None),
        ("v", 0.5),
        ("t", torch.tensor(-1.0)),
        ("t", torch.tensor(float("nan"))),
        ("t", torch.ones(10, 3)),
        ("t", 3),
        ("Z.lr", torch.ones(3)),
    ],
)
def test_a_state_that_no_step_can_go_on_from_is_refused_and_nothing_is_taken(key, value):
    params, optimizer = made(TOWERS["native"])
    _, other = made(TOWERS["native"])
    good = optimizer.state[params[0]][key]
    optimizer.state[params[0]][key] = value
    before = weights(optimizer), optimizer.hyperparameters()
    with pytest.raises(ValueError, match=rf"a parameter of shape \(10, 3\) has a state '{key}' .*optimizer.state.pop\(p\)"):
        optimizer.step()
    assert differences(before, (weights(optimizer), optimizer.hyperparameters())) == []
    optimizer.state[params[0]][key] = good
    descend(optimizer, 2)
    descend(other, 2)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights(optimizer), weights(other), strict=True))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tower", [TOWERS["native"], BETAS, TOWERS["schedule-free"]], ids=str)
def test_a_compiled_step_goes_on_with_a_replaced_parameter(tower):
    _, optimizer = made(tower, compile=True)
    _, other = made(tower)
    new = replace(optimizer, [0, 2, 5])
    replace(other, [0, 2, 5])
    descend(optimizer, 3)
    descend(other, 3)
    assert float(optimizer.state[new]["t"]) == 7
    for mine, theirs in zip(weights(optimizer), weights(other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_bodies_are_those_that_the_ids_say():
    kinds = {name: type(made(TOWERS[name])[1]._groups()[0].body) for name in ("native", "eager")}
    assert kinds == {"native": Native, "eager": Eager}


# ---- a step that cannot be taken


CHANGES = {
    "shape": lambda p: setattr(p, "data", torch.ones(5)),
    "rows": lambda p: setattr(p, "data", p.data[:2].clone()),
    "rank": lambda p: setattr(p, "data", p.data[None].clone()),
}


@every_tower
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_shape_is_refused_and_nothing_is_taken(tower, groups, change):
    if tower.rule is SGD or tower.strategy == "graph" or not tower.rule.init(torch.ones(1)):
        return  # no state that has a shape
    params, optimizer = made(tower, groups=groups)
    good = params[1].data
    change(params[1])
    for p in params:
        p.grad = None
        p.grad = torch.ones_like(p)
    before = snapshot(nn.ParameterList(params), optimizer), optimizer.hyperparameters(), optimizer.skipped
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of shape .* has a state .* of shape \(3,\): .*optimizer.state.pop\(p\)"):
            optimizer.step()
    assert differences(before, (snapshot(nn.ParameterList(params), optimizer), optimizer.hyperparameters(), optimizer.skipped)) == []
    params[1].grad = None
    params[1].data = good
    _, other = made(tower, groups=groups)
    descend(optimizer, 2)
    descend(other, 2)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights(optimizer), weights(other), strict=True))


@every_tower
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_changed_dtype_goes_on_in_the_new_one(tower, groups, dtype):
    params, optimizer = made(tower, groups=groups)
    _, other = made(tower, groups=groups)
    params[1].grad = None
    params[1].data = params[1].data.to(dtype)
    descend(optimizer, 2)
    descend(other, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert params[1].dtype == dtype
    assert all(kept.dtype == wide for kept in optimizer.state[params[1]].values())
    for mine, theirs in zip(weights(optimizer), weights(other), strict=True):
        assert torch.allclose(mine.float(), theirs, rtol=0.02, atol=0.02)


def test_a_frozen_parameter_may_be_converted():
    params, optimizer = made(TOWERS["native"])
    params[2].requires_grad_(False)
    params[2].grad = None
    params[2].data = params[2].data.bfloat16()
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [float(optimizer.state[p]["t"]) for p in params] == [5, 5, 4]


@pytest.mark.parametrize("per", ["tensor", "coordinate"])
def test_another_number_of_values_is_refused(per):
    _, optimizer = made(Hyper(SGD, lr=0.01, per=per).stack(SGD))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=rf"per='{per}' had .* values of each hyperparameter and would need .*: bind a new optimizer"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    assert differences(before, optimizer.state_dict()) == []


def test_a_parameter_of_an_optimizer_that_is_driven_cannot_be_replaced():
    class Foreign(torch.optim.SGD):
        pass

    p = nn.Parameter(torch.ones(3))
    optimizer = Hyper(Foreign([p], lr=0.1)).stack(Adam).bind()
    descend(optimizer, 3)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="driven as a whole and has other parameters: replace them in it"):
        descend(optimizer, 1)


# ---- parameters of one number


@pytest.mark.parametrize("per", ["tensor", "coordinate"])
@pytest.mark.parametrize("rule", [Adam, SGD, ScheduleFree(Adam)])
def test_a_single_number_may_have_a_value_of_its_own(rule, per):
    number, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
    optimizers = [Hyper(rule, lr=0.01, per=per).stack(Adam).bind([p]) for p in (number, vector)]
    for optimizer in optimizers:
        descend(optimizer, 6)
    assert torch.allclose(number, vector[0], rtol=1e-5)
    assert float(number.detach()) < 2
