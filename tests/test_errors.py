"""Bad input to a bound optimizer: a typed error that says what to do, and nothing changed."""

import contextlib
import copy
import math

import pytest
import torch
from small import backward, differences, net, snapshot, train
from torch import nn

from hyperopt import SGD, Adam, Averaged, Box, Hyper, Interval, Real

CHAIN = Hyper(Adam, lr=1e-3).stack(Adam).stack(SGD)


def trained(tower=CHAIN, groups=1, steps=3, model=None):
    model = model or net()
    params = list(model.parameters())
    optimizer = tower.bind([{"params": params[i::groups]} for i in range(groups)])
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_goes_on_as(model, optimizer, twin, other):
    """Nothing was changed, also nothing that only the next steps would show."""
    assert differences(snapshot(model, optimizer), snapshot(twin, other)) == []
    assert len(optimizer.param_groups) == len(other.param_groups)
    train(model, optimizer, range(20, 23))
    train(twin, other, range(20, 23))
    assert differences(snapshot(model, optimizer), snapshot(twin, other)) == []
    assert differences(optimizer.hyperparameters(), other.hyperparameters()) == []


# ---- parameters


@pytest.mark.parametrize("value", ["no", 1, None])
def test_compile_is_true_or_false(value):
    with pytest.raises(TypeError, match=f"compile must be True or False, got {value!r}"):
        CHAIN.bind(net().parameters(), compile=value)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda p: [], ValueError, "empty parameter list"),
        (lambda p: iter([]), ValueError, "empty parameter list"),
        (lambda p: [{"params": []}], ValueError, "empty parameter list.*give at least one tensor"),
        (lambda p: [{"params": [p]}, {"params": []}], ValueError, "empty parameter list.*give at least one tensor"),
        (lambda p: [p, p], ValueError, "same parameter twice: give each tensor once"),
        (lambda p: [{"params": [p, p]}], ValueError, "same parameter twice: give each tensor once"),
        (lambda p: [("a", p), ("b", p)], ValueError, "same parameter twice"),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
        (lambda p: [{"params": [p], "momentum": 0.9}], ValueError, "unknown entry 'momentum': Adam has lr, beta1, beta2"),
        (lambda p: [{"params": [p], "learning_rate": 0.9}], ValueError, "unknown entry 'learning_rate': Adam has lr"),
        (lambda p: [{"params": [p], "Lr": 0.9}], ValueError, "unknown entry 'Lr': write 'lr'"),
        (
            lambda p: [nn.Parameter(torch.ones(2, device="meta"))],
            ValueError,
            r"on the meta device, where it has no values: move the model with to_empty\(device=…\)",
        ),
        (lambda p: [{"params": [p], "lr": -1.0}], ValueError, "lr = -1.0 is outside its domain .*give at least 0"),
        (lambda p: [{"params": [p], "beta1": 1.5}], ValueError, "beta1 = 1.5 is outside its domain .*give between 0 and 1"),
        (lambda p: [{"params": [p], "betas": (0.9, 7.0)}], ValueError, "beta2 = 7.0 is outside its domain"),
        (lambda p: [{"params": [p], "lr": 0.0}], ValueError, "lr = 0.0 of Adam cannot be learned"),
        (lambda p: [{"params": [p], "lr": "fast"}], TypeError, "lr must be a number, got 'fast'"),
        (lambda p: [{"params": [p], "lr": True}], TypeError, "lr must be a number, got True"),
        (lambda p: [{"lr": 1e-3}], (ValueError, KeyError), "params"),
        (lambda p: p, TypeError, "iterable of Tensors"),
        (lambda p: [1.0], TypeError, "Tensor"),
        (lambda p: [{"params": {p, nn.Parameter(torch.ones(3))}}], TypeError, "ordered"),
        (lambda p: [nn.Parameter(torch.ones(2, dtype=torch.complex64))], TypeError, "complex64.*real floating-point"),
        (lambda p: [p, nn.Parameter(torch.ones(2, dtype=torch.complex64))], TypeError, "complex64.*real floating-point"),
        (lambda p: [p, nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)], TypeError, "int32.*real floating-point"),
        (lambda p: [p * 2], ValueError, "non-leaf"),
    ],
)
def test_bad_parameters(params, error, message):
    with pytest.raises(error, match=message):
        CHAIN.bind(params(nn.Parameter(torch.ones(2))))


def test_values_on_other_domains_are_checked_per_group():
    w = nn.Parameter(torch.ones(2))
    narrow = Hyper(SGD, lr=0.01, domains={"lr": Interval(1e-3, 0.1)}).stack(SGD)
    with pytest.raises(ValueError, match=r"lr = 0.5 is outside its domain Interval\(low=0.001, high=0.1\): give between 0.001 and 0.1"):
        narrow.bind([{"params": [w], "lr": 0.5}])
    assert float(Hyper(SGD, domains={"lr": Real()}).stack(SGD).bind([{"params": [w], "lr": 0.5}]).param_groups[0]["lr"]) == 0.5


BAD_GROUPS = [
    (lambda model: {"params": []}, ValueError),
    (lambda model: [("params", list(model.parameters()))], TypeError),
    (lambda model: {"params": list(model.parameters())[:1]}, ValueError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2))] * 2}, ValueError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2))], "momentum": 0.9}, ValueError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}, ValueError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": 0.0}, ValueError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": "fast"}, TypeError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, TypeError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2)), 3.0]}, TypeError),
    (lambda model: {"params": [nn.Parameter(torch.ones(2)) * 2]}, ValueError),
]


@pytest.mark.parametrize(("group", "error"), BAD_GROUPS, ids=range(len(BAD_GROUPS)))
def test_a_failing_add_param_group_leaves_the_optimizer_as_it_was(group, error):
    model, optimizer = trained()
    twin, other = copy.deepcopy((model, optimizer))
    given = group(model)
    kept = list(given)
    with pytest.raises(error):
        optimizer.add_param_group(given)
    assert list(given) == kept
    assert_goes_on_as(model, optimizer, twin, other)
    good = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [good]})
    good.grad = torch.ones(2)
    optimizer.step()
    assert float(good.detach().max()) < 1


def test_add_param_group_does_not_change_the_dict_it_is_given():
    group = {"params": [nn.Parameter(torch.ones(2))], "betas": (0.5, 0.6)}
    Hyper(Adam).bind([group])
    assert group.keys() == {"params", "betas"}
    assert group["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_a_value_for_each_of_no_elements_is_refused(shape):
    w = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"per = 'coordinate' learns a value for each element, .* have none: give per = 'tensor'"):
        Hyper(Adam, per="coordinate").stack(Adam).bind([w])
    assert Hyper(Adam, per="coordinate").bind([w]).param_groups[0]["lr"] == pytest.approx(1e-3)  # nothing is learned


# ---- gradients


def sparse_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("tower", [Hyper(SGD), CHAIN], ids=str)
def test_a_sparse_gradient_raises_and_changes_nothing(tower, after, groups):
    model = sparse_model()
    params = list(model.parameters())
    optimizer = tower.bind([{"params": params[i::groups]} for i in range(groups)])

    def fill(dense):
        optimizer.zero_grad()
        model(torch.tensor([1, 2, 2])).square().sum().backward()
        if dense:
            params[0].grad = params[0].grad.to_dense()

    for _ in range(after):
        fill(dense=True)
        optimizer.step()
    fill(dense=False)
    before, calls = snapshot(model, optimizer), optimizer.skipped
    with pytest.raises(TypeError, match=r"shape \(5, 4\) has a sparse gradient.*make it dense \(nn.Embedding\(sparse=False\)\)"):
        optimizer.step()
    assert differences(before, snapshot(model, optimizer)) == []
    assert optimizer.skipped == calls
    fill(dense=True)
    optimizer.step()
    assert differences(before, snapshot(model, optimizer)) != []


def test_an_error_in_a_closure_changes_nothing():
    model, optimizer = trained()
    twin, other = copy.deepcopy((model, optimizer))

    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert_goes_on_as(model, optimizer, twin, other)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("tower", [Hyper(Adam), CHAIN, Hyper(Adam, learn=("lr", "beta1", "beta2")).stack(Adam)], ids=str)
def test_a_beta_of_1_assigned_with_bias_correction_raises_as_at_construction(tower, name):
    # 1 - beta^t = 0: the weights would be divided by it and never come back.
    model, optimizer = trained(tower)
    twin, other = copy.deepcopy((model, optimizer))
    good = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = 1.0
    backward(model, 9)
    with pytest.raises(ValueError, match=f"{name}.* below 1, or bias_correction=False"):
        optimizer.step()
    optimizer.param_groups[0][name] = good
    assert_goes_on_as(model, optimizer, twin, other)


def test_a_beta_that_float32_cannot_tell_from_1_trains_or_is_named():
    model = net()
    try:
        optimizer = Hyper(Adam, beta2=1 - 1e-8).bind(model.parameters())
    except ValueError as error:
        assert "0.99999999" in str(error)  # noqa: PT017
    else:
        train(model, optimizer, range(3))
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 2)])
def test_an_assigned_tensor_of_another_shape_raises_and_changes_nothing(value):
    model, optimizer = trained(groups=2)
    twin, other = copy.deepcopy((model, optimizer))
    good = optimizer.param_groups[1]["lr"]
    optimizer.param_groups[1]["lr"] = value
    backward(model, 9)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"lr|shape"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = good
    assert_goes_on_as(model, optimizer, twin, other)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("tower", [Hyper(Adam), CHAIN], ids=str)
def test_a_tensor_outside_the_domain_is_ignored(tower, value):
    model, optimizer = trained(tower)
    twin, other = copy.deepcopy((model, optimizer))
    optimizer.param_groups[0]["lr"].fill_(value)
    other.param_groups[0]["lr"].fill_(float(other.param_groups[0]["lr"]))
    for m, o in ((model, optimizer), (twin, other)):
        backward(m, 5)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert float(optimizer.param_groups[0]["lr"]) == float(other.param_groups[0]["lr"]) > 0


REFUSED = [
    (Hyper(Adam), "beta1", 1.0),
    (Hyper(Adam), "beta2", 1.0),
    (CHAIN, "beta2", 1.0),
    (Hyper(Adam, learn=("lr", "beta1", "beta2")).stack(Adam), "beta1", 1.0),
    (Hyper(Adam, per="tensor", learn=("lr", "beta2")).stack(Adam), "beta2", 1.0),
    (Hyper(Averaged(Adam), learn=("lr", "decay")).stack(Adam), "decay", 1.0),
    (Hyper(SGD, lr=0.01, domains={"lr": Interval(1e-3, 0.1)}).stack(SGD), "lr", 0.5),
    (Hyper(SGD, lr=0.01, domains={"lr": Interval(1e-3, 0.1)}, per="tensor").stack(SGD), "lr", 1e-4),
    (Hyper(SGD, lr=0.01, domains={"lr": Real()}, per="coordinate").stack(SGD), "lr", math.inf),
    (Hyper(SGD, lr=0.01, momentum=0.9, learn="all").stack(SGD), "momentum", -0.1),
]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("tower", "name", "value"), REFUSED, ids=str)
def test_a_tensor_with_what_a_number_may_not_be_is_ignored_where_it_is(tower, name, value, bad, in_place):
    model, optimizer = trained(tower)
    twin, other = trained(tower)
    live = optimizer.param_groups[0][name]
    given = live.clone()
    given.view(-1)[-1] = value if bad is None else bad  # of several values only the one
    if in_place:
        live.copy_(given)
    else:
        optimizer.param_groups[0][name] = given
    other.param_groups[0][name].add_(0)  # assigned too, as it is
    for step in range(5, 7):
        for m, o in ((model, optimizer), (twin, other)):
            backward(m, step)
            o.step()
    assert differences(model.state_dict(), twin.state_dict()) == []
    assert differences(optimizer.hyperparameters(), other.hyperparameters()) == []


def test_betas_assigned_to_a_group_name_the_remedy():
    model, optimizer = trained()
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    backward(model, 9)
    with pytest.raises(ValueError, match="assign 'beta1' and 'beta2'"):
        optimizer.step()


# ---- checkpoints


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda given: given["state"][0].update(m=torch.ones(5, 7)), r"'m' has shape \(5, 7\) for a parameter"),
        (lambda given: given["param_groups"][0].pop("lr"), "has no lr"),
        (lambda given: given["param_groups"][0]["tower"].pop("shapes"), "a part of it is missing"),
        (lambda given: given.pop("state"), "a part of it is missing"),
        (lambda given: given["param_groups"][0].update(lr=torch.tensor(math.nan)), "checkpoint's lr = nan is outside its domain"),
        (
            lambda given: given["param_groups"][0].update(lr=torch.tensor([1.0, -1.0])),
            "checkpoint's lr = -1.0 is outside .*at least 0, and",
        ),
        (lambda given: given["param_groups"][0].update(beta1=1.5), "checkpoint's beta1 = 1.5 is outside its domain"),
    ],
)
def test_a_spoiled_checkpoint_raises_and_changes_nothing(spoil, message):
    model, optimizer = trained()
    given = copy.deepcopy(optimizer.state_dict())
    spoil(given)
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(given)
    assert_goes_on_as(model, optimizer, twin, other)


def test_a_checkpoint_without_the_set_of_a_group_raises_and_changes_nothing():
    given = trained()[1].state_dict()
    model = net()
    optimizer = CHAIN.bind([{"params": model.parameters(), "project": Box(-0.5, 0.5)}])
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=r"no set and this one project=Box\(-0.5, 0.5\): bind a group without one"):
        optimizer.load_state_dict(given)
    assert_goes_on_as(model, optimizer, twin, other)


def wider():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def deeper():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))


def saved_by_torch(kind, **values):
    model = net()
    optimizer = kind(model.parameters(), **values)
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def cut(state_dict, *path):
    """A checkpoint without one of its entries."""
    state_dict = copy.deepcopy(state_dict)
    inner = state_dict
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return state_dict


OTHER_TOWERS = [
    Hyper(Adam),
    Hyper(Adam).stack(Adam),
    Hyper(Adam).stack(Adam).stack(Adam),
    Hyper(Adam).stack(Adam).stack(SGD).stack(SGD),
    Hyper(SGD).stack(Adam).stack(SGD),
    Hyper(Adam, learn=("lr", "beta1")).stack(Adam).stack(SGD),
    Hyper(Adam, learn="beta1").stack(Adam).stack(SGD),
    Hyper(Adam).stack(lr=Hyper(Adam).stack(SGD), beta1=SGD),
    Hyper(Adam, per="tensor").stack(Adam).stack(SGD),
    Hyper(Adam, horizon=1).stack(Adam).stack(SGD),
    Hyper(Adam, domains={"lr": Real()}).stack(Adam).stack(SGD),
    Hyper(Adam, decoupled=True).stack(Adam).stack(SGD),
    Hyper(Adam).stack(Adam, learn=("lr", "beta1")).stack(SGD),
]
CHECKPOINTS = {
    "torch Adam": (lambda: saved_by_torch(torch.optim.Adam), "not one of a HyperOptimizer"),
    "torch SGD": (lambda: saved_by_torch(torch.optim.SGD, momentum=0.9), "not one of a HyperOptimizer"),
    "two groups": (lambda: trained(groups=2)[1].state_dict(), "has 2 parameter groups and this optimizer 1: bind the same groups"),
    "other widths": (lambda: trained(model=wider())[1].state_dict(), r"shape \(6, 4\) for a parameter of shape \(5, 4\)"),
    "more parameters": (lambda: trained(model=deeper())[1].state_dict(), "has 6 parameters and this one 4"),
    "nothing": (dict, "not the checkpoint of a HyperOptimizer, or a part of it is missing: KeyError\\('param_groups'\\)"),
    "something else": (lambda: {"weight": torch.ones(3)}, "not the checkpoint of a HyperOptimizer"),
    "no groups": (lambda: {"state": {}, "param_groups": []}, "has 0 parameter groups and this optimizer 1"),
    "no state": (lambda: cut(trained()[1].state_dict(), "state"), "state"),
} | {str(tower): (lambda tower=tower: trained(tower)[1].state_dict(), "is of another tower: .*; this one is") for tower in OTHER_TOWERS}


@pytest.mark.parametrize(("checkpoint", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_something_else_raises_and_changes_nothing(checkpoint, message):
    model, optimizer = trained()
    given = checkpoint()
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises((ValueError, KeyError), match=message):
        optimizer.load_state_dict(given)
    assert_goes_on_as(model, optimizer, twin, other)


def test_a_checkpoint_without_a_step_is_checked_too():
    # Nothing in it is shaped like a parameter, and yet its vector of learning rates belongs to another model.
    tower = Hyper(SGD, per="coordinate").stack(SGD)
    model, optimizer = trained(tower)
    given = trained(tower, steps=0, model=wider())[1].state_dict()
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict(given)
    assert_goes_on_as(model, optimizer, twin, other)


def test_a_height_0_checkpoint_of_torch_raises_too():
    model, optimizer = trained(Hyper(Adam))
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match="not one of a HyperOptimizer"):
        optimizer.load_state_dict(saved_by_torch(torch.optim.Adam))
    assert_goes_on_as(model, optimizer, twin, other)


def test_loading_with_other_values_but_the_same_tower_is_no_error():
    _, optimizer = trained()
    again = Hyper(Adam, lr=0.3, betas=(0.5, 0.6)).stack(Adam, lr=0.7).stack(SGD, lr=0.2).bind(net().parameters())
    again.load_state_dict(optimizer.state_dict())
    assert differences(again.hyperparameters(), optimizer.hyperparameters()) == []


def test_the_pre_hooks_of_loading_are_given_back():
    model, optimizer = trained()
    before = len(optimizer._optimizer_load_state_dict_pre_hooks)
    for given in ({}, copy.deepcopy(optimizer.state_dict())):
        with contextlib.suppress(ValueError, KeyError):
            optimizer.load_state_dict(given)
        assert len(optimizer._optimizer_load_state_dict_pre_hooks) == before
    train(model, optimizer, range(3, 5))
