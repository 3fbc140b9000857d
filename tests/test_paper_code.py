"""Equal to the authors' published package, which differentiates through the loss with create_graph=True."""

import copy

import pytest
import torch
from gradient_descent_the_ultimate_optimizer import gdtuo
from torch import nn
from torch.nn.functional import cross_entropy

from hyperopt import SGD, Hyper, Real

STEPS, BATCH = 100, 256
PRECISION = 1e-5  # relative, float32
LRS = (0.01, 0.01, 0.1, 1.0)  # of level 0, 1, 2 and 3: all but the top's are learned
PAPER = {"horizon": 1, "trust": None, "domains": {"lr": Real(), "momentum": Real()}}


def ours(model, batches, height, momentum):
    tower = Hyper(SGD, lr=LRS[0], momentum=momentum, learn=("lr", "momentum") if momentum else "lr", **PAPER)
    for lr in LRS[1 : height + 1]:
        tower = tower.stack(SGD, lr=lr, **PAPER)
    optimizer = tower.bind(model.parameters())
    values = []
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        now = optimizer.hyperparameters()
        values.append(torch.stack([*(now[f"{level}.lr"] for level in range(height + 1)), now["0.momentum"]]))
    return list(model.parameters()), torch.stack(values)


def theirs(model, batches, height, momentum):
    levels = [gdtuo.SGD(LRS[height])]
    for level in reversed(range(height)):
        levels.insert(0, gdtuo.SGD(LRS[level], 0.0 if level else momentum, optimizer=levels[0]))
    wrapper = gdtuo.ModuleWrapper(model, optimizer=levels[0])
    wrapper.initialize()
    values = []
    for x, y in batches:
        wrapper.begin()
        loss = cross_entropy(wrapper.forward(x), y)
        wrapper.zero_grad()
        loss.backward(create_graph=True)
        wrapper.step()
        values.append(torch.stack([*(level.parameters["alpha"] for level in levels), levels[0].parameters["mu"]]).detach())
    return [p.detach() for p in wrapper.parameters.values()], torch.stack(values)


@pytest.mark.needs_mnist
@pytest.mark.parametrize(("height", "momentum"), [(1, 0.0), (2, 0.0), (3, 0.0), (2, 0.5)])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")  # theirs, not ours
def test_equal_to_the_authors_code(mnist, height, momentum):
    batches = [(mnist.train_x[i], mnist.train_y[i]) for i in torch.randperm(len(mnist.train_x)).split(BATCH)[:STEPS]]
    model = nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))
    weights, values = ours(copy.deepcopy(model), batches, height, momentum)
    expected_weights, expected = theirs(copy.deepcopy(model), batches, height, momentum)
    for p, q in zip(weights, expected_weights, strict=True):
        assert (p - q).norm() <= PRECISION * q.norm()
    torch.testing.assert_close(values, expected, rtol=PRECISION, atol=0)  # of every level, at every step
    for level in range(height):
        assert abs(values[-1, level] / LRS[level] - 1) > 0.5, f"the lr of level {level} hardly moved"
    assert values[-1, height] == torch.tensor(LRS[height])
    assert (momentum == 0) == bool(values[-1, -1] == momentum)
