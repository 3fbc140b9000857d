"""What the tests of the compiled step share: the same small tensors for two optimizers, and the comparison of all that they change."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hyperopt import Hyper

STEPS = 50
# Fused kernels contract a·b + c to one rounding and add in another order: an ulp a step, and 50 steps of it. Nothing makes more of
# it, as the gradients are given and the hyperparameters move by 5 %. A weight in bfloat16 that lay between two numbers may become
# either, 1/256 apart; few do, and what is computed from weights that are not the same is not the same either.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def bound(tower, dtype=torch.float32, *, compile, device="cpu", native=None):
    """Parameters and their optimizer; what is not compiled is stepped in operations of torch, unless `native` says otherwise."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in [(7, 5), (7,), (3, 7)]]
    tower = Hyper.parse(tower) if isinstance(tower, str) else tower
    native = compile if native is None else native
    with contextlib.nullcontext() if native else mock.patch("hyperopt.body.functions.installed", return_value=None):
        return params, tower.bind(params, compile=compile)


def step(params, optimizer, at):
    generator = torch.Generator().manual_seed(at)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()


def train(steps, *pairs):
    for at in range(steps):
        for params, optimizer in pairs:
            step(params, optimizer, at)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def everything(params, optimizer):
    """All that a step changes, by name: weights, state with tangents, hyperparameters, hypergradients."""
    kept = {f"{key}[{i}]": value for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    weights = {f"x[{i}]": p.detach() for i, p in enumerate(params)}
    return weights | kept | optimizer.hyperparameters() | {f"q {key}": value for key, value in optimizer.hypergradients().items()}


def assert_equal(eager, fused, dtype, tolerance=None):
    expected, actual = everything(*eager), everything(*fused)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        error, size = (actual[key].double() - value.double()).norm(), value.double().norm()
        assert error <= (tolerance or TOLERANCE[dtype]) * size, f"{key}: off by {float(error / size):.1e}"
