"""The optimizer in one call is the tower that it says it is, with every value a user may give."""

import pytest
import torch
from small import net, train

from hyperopt import Adam, Hyper, ScheduleFree, auto

N = sum(p.numel() for p in net().parameters())
EPS, EPS_OF_TWO = (float(f"{0.05 / (k * N) ** 0.5:.1e}") for k in (1, 2))  # a twentieth of 1/√n, to two digits


@pytest.mark.parametrize("lr", [None, 1e-6])
@pytest.mark.parametrize("given", ["module", "parameters", "named", "groups"])
def test_it_trains_as_the_tower_does(given, lr):
    model, twin = net(), net()
    ways = {
        "module": model,
        "parameters": model.parameters(),
        "named": model.named_parameters(),
        "groups": [{"params": model.parameters()}],
    }
    params = ways[given]
    values = {} if lr is None else {"lr": lr}
    optimizer = auto(params, lr=lr)
    other = Hyper(ScheduleFree(Adam), eps=EPS, **values).stack(Adam).bind(twin.parameters())
    train(model, optimizer, range(8))
    train(twin, other, range(8))
    assert float(optimizer.hyperparameters()["0.lr"]) != (lr or 1e-3)
    with optimizer.averaged(), other.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_group_keeps_its_own_values():
    first, last = net().parameters(), net().parameters()
    optimizer = auto([{"params": first, "eps": 1e-3, "lr": 0.01}, {"params": last}])
    assert [float(f"{float(group[name]):.3g}") for group in optimizer.param_groups for name in ("eps", "lr")] == [
        1e-3,
        0.01,
        EPS_OF_TWO,
        1e-3,
    ]


def test_weights_that_are_frozen_do_not_count():
    model, trained = net(), net()
    model[0].requires_grad_(False)
    given = float(auto(model).param_groups[0]["eps"])
    assert given == float(auto(trained[2:]).param_groups[0]["eps"]) != float(auto(trained).param_groups[0]["eps"])


def test_what_was_given_is_left_as_it_was(monkeypatch):
    model, step = net(), torch.optim.Optimizer.step
    monkeypatch.delattr(step, "hooked", raising=False)  # torch marks what it has patched, which a test before this one may have made it do
    group = {"params": list(model.parameters()), "eps": 1e-3}
    before = dict(group)
    auto([group])
    assert group.keys() == before.keys()
    assert group["params"] is before["params"]
    assert torch.optim.Optimizer.step is step


def test_compile_is_handed_on():
    assert auto(net(), compile=True).compile
    assert not auto(net()).compile


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [(-1.0, ValueError, "give at least 0"), (0.0, ValueError, "leave it out for 1e-3"), ("fast", TypeError, "must be a number")],
)
def test_an_lr_that_is_none_is_refused(lr, error, message):
    with pytest.raises(error, match=message):
        auto(net(), lr=lr)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.nn.ReLU(), ValueError, "empty parameter list"),
        (None, TypeError, r"pass model\.parameters\(\)"),
        (torch.nn.Linear, TypeError, r"got type: pass model\.parameters\(\)"),
        ("abc", TypeError, r"got str: pass model\.parameters\(\)"),
        ([{"lr": 1.0}], ValueError, "needs an entry 'params', got only 'lr'"),
        ([{"params": iter(())}], ValueError, "empty parameter list"),
        ([torch.nn.Parameter(torch.ones(2))] * 2, ValueError, "the same parameter twice"),
    ],
    ids=["none", "no module with any", "nothing", "class", "text", "group without", "group of none", "twice"],
)
def test_what_are_no_parameters_is_refused(params, error, message):
    with pytest.raises(error, match=message):
        auto(params)
