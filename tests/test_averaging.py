"""Schedule-Free against its authors' package, its tangents against differences, and the context that evaluates."""

import copy
import math
import pickle

import pytest
import schedulefree
import torch
from torch import nn

from hyperopt import SGD, Adam, AdamW, Hyper, ScheduleFree


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model, at):
    generator = torch.Generator().manual_seed(at)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    model.zero_grad()
    (model(x) - x[:, :3].sin()).square().mean().backward()


PEERS = {
    "adam": (Hyper(ScheduleFree(Adam), lr=0.01, trust=None), lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, foreach=False)),
    "adamw": (
        Hyper(ScheduleFree(AdamW), lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.99, trust=None),
        lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), foreach=False),
    ),
    "sgd": (Hyper(ScheduleFree(SGD), lr=0.5, trust=None), lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, foreach=False)),
    "sgd, decay": (
        Hyper(ScheduleFree(SGD), lr=0.5, weight_decay=0.01, beta1=0.7, trust=None),
        lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, weight_decay=0.01, momentum=0.7, foreach=False),
    ),
}


@pytest.mark.parametrize("held", [False, True], ids=["alone", "held by a top"])
@pytest.mark.parametrize("name", PEERS)
def test_equal_to_the_authors_package_over_100_steps(name, held):
    tower, peer = PEERS[name]
    model, twin = net(), net()
    if held:
        tower = tower.stack(SGD, lr=1e-30)
    optimizer, reference = tower.bind(model.parameters()), peer(twin.parameters())
    reference.train()
    for at in range(100):
        for m, o in ((model, optimizer), (twin, reference)):
            backward(m, at)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    reference.eval()
    with optimizer.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("base", [Adam, SGD])
def test_the_hypergradient_runs_through_z_x_and_y(base):
    # horizon inf with lr moved once, at the start, for all steps: q is the derivative of the whole run with gradients held.
    tower = Hyper(ScheduleFree(base), lr=0.01, horizon=math.inf, trust=None).stack(SGD, lr=1e-30)
    model = net()
    optimizer = tower.bind(model.parameters())
    held = []
    for at in range(6):
        backward(model, at)
        held.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    q = float(optimizer.hypergradients()["0.lr"])

    def inner(shift):
        twin = net()
        run = Hyper(ScheduleFree(base), lr=0.01 * math.exp(shift)).bind(twin.parameters())
        for grads in held[:-1]:
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.grad = g.clone()
            run.step()
        return sum(float((p.detach() * g).sum()) for p, g in zip(twin.parameters(), held[-1], strict=True))

    eps = 1e-4
    assert q == pytest.approx((inner(eps) - inner(-eps)) / (2 * eps), rel=1e-6)


def test_the_context_nests_survives_exceptions_and_returns_every_bit():
    model = net(torch.bfloat16)
    optimizer = Hyper(ScheduleFree(Adam), lr=0.05).stack(Adam).bind(model.parameters())
    with optimizer.averaged():
        pass  # nothing to swap before the first step
    for at in range(5):
        backward(model, at)
        optimizer.step()
    before = copy.deepcopy(model.state_dict())

    def evaluate():
        with optimizer.averaged():
            inside = copy.deepcopy(model.state_dict())
            with optimizer.averaged():
                pass
            assert all(torch.equal(inside[k], v) for k, v in model.state_dict().items())
            assert not torch.equal(inside["0.weight"], before["0.weight"])
            optimizer.step()

    with pytest.raises(RuntimeError, match="inside averaged"):
        evaluate()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_without_averaging_the_context_changes_nothing():
    model = net()
    optimizer = Hyper(Adam).bind(model.parameters())
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged():
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("way", ["checkpoint", "deepcopy", "pickle"])
def test_goes_on_bit_for_bit(way):
    tower = Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam)
    model = net(torch.float32)
    optimizer = tower.bind(model.parameters())
    for at in range(5):
        backward(model, at)
        optimizer.step()
    if way == "checkpoint":
        twin = copy.deepcopy(model)
        other = tower.bind(twin.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        make = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        twin, other = make((model, optimizer))
    for at in range(5, 10):
        for m, o in ((model, optimizer), (twin, other)):
            backward(m, at)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(optimizer.hyperparameters()["0.lr"], other.hyperparameters()["0.lr"])


def test_per_coordinate_and_text():
    tower = Hyper.parse("ScheduleFree(Adam)(lr=0.01, per=coordinate) / Adam")
    assert Hyper.parse(str(tower)) == tower
    model = net()
    optimizer = tower.bind(model.parameters())
    for at in range(5):
        backward(model, at)
        optimizer.step()
    assert optimizer.hyperparameters()["0.lr"].shape == (sum(p.numel() for p in model.parameters()),)
    with pytest.raises(ValueError, match="values go behind it"):
        Hyper.parse("ScheduleFree(Adam, lr=0.1)")
    with pytest.raises(TypeError, match="a rule with a first moment"):
        ScheduleFree(int)
