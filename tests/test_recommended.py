"""The optimizer in one call is the tower that it says it is, with every value a user may give."""

import copy
import pickle

import pytest
import torch
from small import loss_at, net, train

from hyperopt import Adam, Hyper, Muon, Recorder, ScheduleFree, SpikeAwareAdam, auto

STEPS = 20


@pytest.mark.parametrize("lr", [None, 1e-6])
@pytest.mark.parametrize("given", ["module", "parameters", "named", "groups"])
def test_it_trains_as_the_tower_does(given, lr):
    model, twin = net(), net()
    ways = {
        "module": lambda m: m,
        "parameters": lambda m: m.parameters(),
        "named": lambda m: m.named_parameters(),
        "groups": lambda m: [{"params": m.parameters()}],
    }
    values = {} if lr is None else {"lr": lr}
    optimizer = auto(ways[given](model), lr=lr)
    muon = {"rows": 64, "norm_decays": (0.9, 0.999), "smoothing": 0.5, "weight_decay": 0.1, "decayed": "matrices", "cautious": True}
    rule = ScheduleFree(Muon | Adam)(**muon, forget=0.05, through=0.99, beta2=0.99, eps=1e-15)
    other = Hyper(rule, **values).stack(SpikeAwareAdam, eps=1e-15, decay_after=50).bind(ways[given](twin))
    train(model, optimizer, range(8))
    train(twin, other, range(8))
    assert float(optimizer.hyperparameters()["0.lr"]) != (lr or 1e-3)
    with optimizer.averaged(), other.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_group_keeps_its_own_values():
    first, last = net().parameters(), net().parameters()
    optimizer = auto([{"params": first, "eps": 1e-3, "lr": 0.01}, {"params": last}])
    found = [float(f"{float(group[name]):.3g}") for group in optimizer.param_groups for name in ("eps", "lr")]
    assert found == [1e-3, 0.01, 1e-15, 1e-3]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_the_loss_is_no_matter(scale):
    model, twin = net(), net()
    optimizer, other = auto(model, lr=1e-5), auto(twin, lr=1e-5)
    for step in range(40):
        for m, o, factor in ((model, optimizer, 1.0), (twin, other, scale)):
            o.zero_grad()
            (factor * loss_at(m, step)).backward()
            o.step()
    lrs = [float(o.hyperparameters()["0.lr"]) for o in (optimizer, other)]
    assert lrs[0] > 1e-3, "lr was not learned: the comparison says nothing"
    assert lrs[1] == pytest.approx(lrs[0], rel=1e-2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_hidden_matrices_and_filters_are_served_by_muon():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 6), torch.nn.Linear(6, 2))
    for optimizer in (auto(model), auto(model, steps=9)):
        group = optimizer.param_groups[0]
        assert dict(zip(group["param_names"], group["rule"], strict=True)) == {
            "0.weight": "Muon",
            "0.bias": "Adam",
            "2.weight": "Muon",
            "2.bias": "Adam",
            "3.weight": "Adam",
            "3.bias": "Adam",
        }


def test_the_learned_lr_settles():
    """With a constant step size of the top, lr goes on wandering: over the last 1,000 of these steps by a factor of three."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    w = torch.randn(10) / 10**0.5
    optimizer = auto(model)
    with Recorder(optimizer) as recorder:
        for _ in range(2000):
            x = torch.randn(16, 10)
            y = torch.sin(2 * x @ w) + 0.3 * torch.randn(16)
            optimizer.zero_grad()
            (model(x)[:, 0] - y).square().mean().backward()
            optimizer.step()
    lr = recorder.values["0.lr"]
    assert lr[-1] > 1e-2, "lr was not learned: the comparison says nothing"
    assert max(lr[1000:]) < 1.5 * min(lr[1000:])


# ---- a known number of steps


def test_after_the_last_step_the_weights_are_those_to_evaluate_with():
    model = net()
    optimizer = auto(model, steps=STEPS)
    for step in range(STEPS):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, [step])
        with optimizer.averaged():
            averages = [p.detach().clone() for p in model.parameters()]
        same = all(torch.allclose(p, a, rtol=1e-6, atol=1e-7) for p, a in zip(model.parameters(), averages, strict=True))
        assert same == (step >= 18 or step == 0), f"step {step}"  # 90 % of 20, and the first step, after which there is one point
    moved = max((p - b).abs().max() for p, b in zip(model.parameters(), before, strict=True))
    assert moved > 0
    train(model, optimizer, range(3))  # later steps have lr = 0
    assert all(torch.allclose(p, a, rtol=1e-6, atol=1e-7) for p, a in zip(model.parameters(), averages, strict=True))


def test_the_learned_lr_is_scaled_to_0_over_the_last_steps():
    model, twin = net(), net()
    optimizer, other = auto(model, steps=STEPS), auto(twin)
    for step in range(STEPS):
        train(model, optimizer, [step])
        train(twin, other, [step])
        ratio = float(optimizer.hyperparameters()["0.lr"] / other.hyperparameters()["0.lr"])
        if step <= 14:
            assert ratio == pytest.approx(1, rel=1e-5)
        elif step == 15:  # lr is still learned alike
            assert ratio == pytest.approx((1 - 15 / STEPS) / 0.3, rel=1e-4)
    assert ratio < 0.3


@pytest.mark.parametrize("way", ["checkpoint", "copy", "pickle"])
def test_a_run_of_known_length_goes_on_bit_for_bit(way):
    model = net()
    optimizer = auto(model, steps=STEPS)
    train(model, optimizer, range(17))
    if way == "checkpoint":
        twin = copy.deepcopy(model)
        other = auto(twin, steps=STEPS)
        other.load_state_dict(optimizer.state_dict())
    else:
        both = (model, optimizer)
        twin, other = copy.deepcopy(both) if way == "copy" else pickle.loads(pickle.dumps(both))
    train(model, optimizer, range(17, STEPS))
    train(twin, other, range(17, STEPS))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "many"])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match="must be the number of all steps"):
        auto(net(), steps=steps)


# ---- arguments


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
        (None, TypeError, r"auto\(\) needs the model, or parameters: pass the model itself"),
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
