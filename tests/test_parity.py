"""Every rule against torch.optim, or pytorch-optimizer, or its paper, alone and held by a level above that moves nothing."""

import copy
from contextlib import contextmanager

import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn.functional import cross_entropy

from hyperopt import SGD, Hyper, RAdam, Values

PRECISION = {torch.float32: 1e-6, torch.float64: 1e-10}
FLAT, MIXED = 2**18, 100  # from how many elements on a tensor is stepped where it is: none of them, or the two largest


def alone(case):
    return Hyper(case.rule)


def lr_held(case):
    return Hyper(case.rule, trust=None).stack(SGD, lr=1e-30)


def all_held(case):
    return Hyper(case.rule, learn=case.learnable, trust=None).stack(SGD, lr=1e-30)


def held_by_graph(case):
    return Hyper(case.rule, learn=case.learnable, trust=None, horizon=1, strategy="graph").stack(SGD, lr=1e-30)


WAYS = [(alone, FLAT), (alone, MIXED), (lr_held, FLAT), (all_held, MIXED), (held_by_graph, MIXED)]


def network(dtype):
    """A convolution in channels_last, of which one input channel is always black, and two linear layers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
    return model.to(dtype).to(memory_format=torch.channels_last)


@contextmanager
def scalars_in(dtype):
    """torch keeps NAdam's product in the default dtype, whatever the parameters have: in float32 it is off by 1e-7."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(model, optimizer, dtype, steps):
    batches = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.rand(16, 3, 6, 6, generator=batches, dtype=dtype)
        x[:, 1] = 0
        y = torch.randint(5, (16,), generator=batches)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("tower", "large"), WAYS, ids=lambda way: getattr(way, "__name__", way))
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES if case.torch for dtype in PRECISION if case.float32 or dtype == torch.float64],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_equal_to_torch(case, dtype, tower, large, monkeypatch):
    monkeypatch.setattr("hyperopt.body.choose.LARGE", large)
    start = network(dtype)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    assert not ours[0].weight.is_contiguous()
    steps = 100 if tower is alone and dtype == torch.float64 else 50
    train(ours, tower(case).bind(ours.parameters()), dtype, steps)
    with scalars_in(dtype):
        train(theirs, case.peer(theirs.parameters()), dtype, steps)
    p0, p, q = (torch.cat([w.detach().flatten() for w in model.parameters()]) for model in (start, ours, theirs))
    assert (p - q).norm() <= PRECISION[dtype] * q.norm()
    assert (q - p0).norm() > 0.1 * p0.norm(), "too little moved for the comparison to mean anything"
    assert ours[0].weight.stride() == start[0].weight.stride()


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999])
def test_rectification_keeps_its_digits_in_float32(beta2):
    """RAdam's ρ is the difference of two numbers near 2 / (1 − beta2), of which float32 leaves three digits."""
    h = Values({"beta2": torch.tensor(beta2)}, lambda _: torch.tensor(1 - beta2))
    limit = 2 / (1 - beta2) - 1
    for t in (1, 5, 6, 7, 20, 1000):
        rho = limit - 2 * t * beta2**t / (1 - beta2**t)
        rectified, r = RAdam()._rectification(h, torch.tensor(float(t)))
        assert bool(rectified) == (rho > 5)
        if rectified:
            assert float(r) == pytest.approx(((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5, rel=1e-6)
