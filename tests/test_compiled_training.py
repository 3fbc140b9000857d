"""torch.compile around a whole training step, or around `optimizer.step`: the result is that of plain training, and it is compiled once."""

import pytest
import torch
from small import backward, loss_at, net, train
from test_optimizer import weights

from hyperopt import SGD, Adam, Averaged, Hyper, ScheduleFree

# Dynamo warns that it reads the .grad of a loss.
pytestmark = [pytest.mark.usefixtures("graphs"), pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")]
STEPS = range(8)
BINDINGS = {
    "learned": lambda m: Hyper(Adam).stack(Adam).bind(m.parameters()),
    "held": lambda m: Hyper(Adam).bind(m.parameters()),
    "compiled": lambda m: Hyper(ScheduleFree(Adam), learn=("lr", "beta1")).stack(SGD).bind(m.parameters(), compile=True),
    "native": lambda m: Hyper(Averaged(Adam)).stack(Adam).bind(m.parameters(), compile=True),
    "scheduled": lambda m: Hyper(Adam).stack(Adam).bind([{"params": list(m[i].parameters())} for i in (0, 2)], schedule=True),
    "driven": lambda m: Hyper(torch.optim.ASGD(m.parameters())).stack(Adam).bind(),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _once():
    """Code that is compiled a second time is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # pyright: ignore[reportPrivateImportUsage]
        yield
    torch.compiler.reset()


def whole(model, optimizer, x):
    optimizer.zero_grad()
    loss = (model(x) - x[:, :3].sin()).square().mean()
    loss.backward()
    optimizer.step()
    return loss, optimizer.hyperparameters()["0.lr" if len(optimizer.param_groups) == 1 else "0.lr[0]"]


def held_out(model, optimizer, x):
    loss, lr = whole(model, optimizer, x)
    if optimizer.tower.above:
        with optimizer.averaged():
            optimizer.hyper_backward((model(x) - x[:, :3].sin()).square().mean())
    return loss, lr


def assert_same(model, twin):
    for p, q in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("make", BINDINGS.values(), ids=BINDINGS)
@pytest.mark.parametrize("function", [whole, held_out])
def test_a_whole_training_step(make, function):
    model, twin = net(), net()
    optimizer, reference = make(model), make(twin)
    compiled = torch.compile(function)
    for step in STEPS:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        (loss, lr), (expected, used) = compiled(model, optimizer, x), function(twin, reference, x)
        torch.testing.assert_close((loss, lr), (expected, used), rtol=1e-4, atol=1e-7)
    assert_same(model, twin)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("make", BINDINGS.values(), ids=BINDINGS)
def test_the_step_alone(make):
    model, twin = net(), net()
    optimizer, reference = make(model), make(twin)
    compiled = torch.compile(optimizer.step)
    for step in STEPS:
        backward(model, step)
        compiled()
    train(twin, reference, STEPS)
    assert_same(model, twin)


def test_a_closure_may_call_a_compiled_model():
    model, twin = net(), net()
    optimizer, reference = (Hyper(Adam).stack(Adam).bind(m.parameters()) for m in (model, twin))
    fast, calls = torch.compile(model), []

    def closure(step):
        optimizer.zero_grad()
        loss = loss_at(fast, step)  # pyright: ignore[reportArgumentType]
        loss.backward()
        calls.append(step)
        return loss

    for step in STEPS:
        optimizer.step(lambda step=step: closure(step))
    train(twin, reference, STEPS)
    assert calls == list(STEPS)
    assert_same(model, twin)
