"""Weights that are changed from outside between steps: where they are put is where the next step begins."""

import copy
import threading

import pytest
import torch
from torch import nn

import hyperopt
from hyperopt import SGD, Adam, Averaged, Hyper, Muon, ScheduleFree

TOWERS = {
    "auto": hyperopt.auto,
    "free": lambda m: Hyper(ScheduleFree(Adam), lr=0.01).bind(m.parameters()),
    "free, learned": lambda m: Hyper(ScheduleFree(SGD), lr=0.01).stack(Adam).bind(m.parameters()),
    "free, beta1": lambda m: Hyper(ScheduleFree(Adam), lr=0.01, learn=("lr", "beta1")).stack(Adam).bind(m.parameters()),
    "free, muon": lambda m: Hyper(ScheduleFree(Muon), lr=0.01).stack(Adam).bind([p for p in m.parameters() if p.dim() == 2]),
    "free, compiled": lambda m: Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam).bind(m.parameters(), compile=True),
    "averaged": lambda m: Hyper(Averaged(Adam), lr=0.01).stack(Adam).bind(m.parameters()),
    "adam": lambda m: Hyper(Adam, lr=0.01).stack(Adam).bind(m.parameters()),
}
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = torch.sin(3 * X[:, :1]) * 2 + X[:, 1:2]

every_tower = pytest.mark.parametrize("name", TOWERS)
# The C++ passes, the same in operations of torch, and weights that are gathered and rounded.
BODIES = ["C++", "torch", "float64", "bfloat16"]
every_case = pytest.mark.parametrize(("name", "body"), [(n, b) for n in TOWERS for b in BODIES if b == "C++" or n in ("auto", "free")])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler of torch 2.11


def made(name, body, monkeypatch):
    if body == "torch":
        monkeypatch.setattr("hyperopt.body.functions.installed", lambda: None)
        monkeypatch.setattr("hyperopt.body.functions.built", lambda: None)
    torch.manual_seed(0)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(body, torch.float32)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    return model, TOWERS[name](model)


def step(model, optimizer):
    dtype = model[0].weight.dtype
    optimizer.zero_grad()
    (model(X.to(dtype)) - Y.to(dtype)).square().mean().backward()
    optimizer.step()


def largest(params):
    return max(p.detach().abs().max().item() for p in params)


@pytest.mark.one_in(3)
@every_case
def test_weights_clamped_after_every_step_are_evaluated_inside(name, body, monkeypatch):
    model, optimizer = made(name, body, monkeypatch)
    for _ in range(150):
        step(model, optimizer)
        for p in optimizer.param_groups[0]["params"]:
            p.data.clamp_(-0.02, 0.02)
    with optimizer.averaged():
        # An average beside a rule has seen the weights before they were clamped, and one of Schedule-Free the last step.
        assert largest(optimizer.param_groups[0]["params"]) <= (0.025 if name == "averaged" else 0.0201)
    # Nor is lr driven up by steps that were never taken.
    assert optimizer.hyperparameters()["0.lr"] < (0.5 if "learned" in name else 0.05)  # of SGD, and of Adam and Muon


@every_case
def test_masked_weights_stay_masked_where_the_model_is_evaluated(name, body, monkeypatch):
    model, optimizer = made(name, body, monkeypatch)
    for _ in range(100):
        step(model, optimizer)
        with torch.no_grad():
            model[0].weight[::2] = 0
    with optimizer.averaged():
        assert largest([model[0].weight[::2]]) < (0.05 if name == "averaged" else 1e-4)
        assert largest([model[0].weight[1::2]]) > 0.1


@every_tower
def test_weights_loaded_in_mid_run_are_where_the_next_step_begins(name, monkeypatch):
    model, optimizer = made(name, "C++", monkeypatch)
    for _ in range(60):
        step(model, optimizer)
    given = {key: value + 3 for key, value in model.state_dict().items()}
    model.load_state_dict(given)
    step(model, optimizer)
    moved = (model[0].weight.detach() - given["0.weight"]).norm()
    assert moved < 0.05 * given["0.weight"].norm()
    if name != "averaged":  # whose average goes on from the weights before
        with optimizer.averaged():
            assert (model[0].weight - given["0.weight"]).norm() < 0.1 * given["0.weight"].norm()


def test_one_change_moves_what_lr_moves_and_the_average_along(monkeypatch):
    (model, optimizer), (twin, other) = (made("free", "float64", monkeypatch) for _ in range(2))
    for _ in range(5):
        step(model, optimizer)
        step(twin, other)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad.clone()
    optimizer.step()
    other.step()
    with optimizer.averaged(), other.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q + 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("body", ["C++", "torch"])
def test_weights_that_come_back_but_for_rounding_lose_nothing(body, monkeypatch):
    """As sharpness-aware minimisation leaves them."""
    made("free", body, monkeypatch)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 1))
        runs.append((model, Hyper(ScheduleFree(SGD), lr=0.1).stack(Adam).bind(model.parameters())))
    for _ in range(100):
        for model, optimizer in runs:
            step(model, optimizer)
        with torch.no_grad():
            for p in runs[0][0].parameters():
                p.add_(0.37).sub_(0.37)
    (model, optimizer), (twin, other) = runs
    assert "seen" in optimizer.state[model[0].weight]
    assert "seen" not in other.state[twin[0].weight]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(optimizer.state[p]["gap"], other.state[q]["gap"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("body", ["C++", "torch", "bfloat16"])
def test_a_run_without_changes_keeps_no_copy(body, monkeypatch):
    model, optimizer = made("free, learned", body, monkeypatch)
    for at in range(12):
        step(model, optimizer)
        with optimizer.averaged():
            pass
        model[0].bias.requires_grad_(at % 3 > 0)  # another set of tensors has a gradient
        if at == 6:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any("seen" in optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize("body", ["C++", "torch"])
def test_clamped_runs_resume_bit_for_bit(body, monkeypatch):
    def clamped(model, optimizer, steps):
        for _ in range(steps):
            step(model, optimizer)
            for p in model.parameters():
                p.data.clamp_(-0.02, 0.02)

    model, optimizer = made("auto", body, monkeypatch)
    clamped(model, optimizer, 10)
    twin, other = made("auto", body, monkeypatch)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((model, optimizer), (twin, other)):
        clamped(*run, 10)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert torch.equal(optimizer.hyperparameters()["0.lr"], other.hyperparameters()["0.lr"])


def test_threads_that_train_one_model_without_a_lock_get_somewhere():
    """Hogwild: what the others do to the weights are changes from outside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    loss = [(model(X) - Y).square().mean().item()]

    def train():
        replica = copy.deepcopy(model)
        for p, q in zip(replica.parameters(), model.parameters(), strict=True):
            p.data = q.data  # the same memory
        optimizer = Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam).bind(replica.parameters())
        for _ in range(200):
            step(replica, optimizer)

    workers = [threading.Thread(target=train) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    loss.append((model(X) - Y).square().mean().item())
    assert loss[1] < 0.3 * loss[0]


def test_a_copy_that_is_begun_while_evaluating_rebuilds_nothing(monkeypatch):
    model, optimizer = made("free, learned", "C++", monkeypatch)
    step(model, optimizer)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    step(model, optimizer)
    group = optimizer._groups()[0]
    with optimizer.averaged():
        assert "seen" in optimizer.state[model[0].weight]
    assert optimizer._groups()[0] is group
