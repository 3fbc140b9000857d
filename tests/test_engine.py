"""The compiled step is the eager one, fused: equal to it, compiled once, and given up with one warning where no compiler works."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config

from hyperopt import Hyper

TOWERS = [
    "Adam / Adam",
    "SGD(momentum=0.9) / Adam / SGD",
    "Adam(learn=(lr, beta1, beta2, eps)) / {lr: Adam, beta1: SGD, beta2: SGD, eps: SGD}",
]


def bound(text, dtype=torch.float32, *, compile):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(7, 5), (7,), (3, 7)]]
    return params, Hyper.parse(text).bind(params, compile=compile)


def step(params, optimizer, at):
    generator = torch.Generator().manual_seed(at)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def train(steps, *pairs):
    for at in range(steps):
        for params, optimizer in pairs:
            step(params, optimizer, at)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("text", TOWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_over_50_steps_and_is_compiled_once(text, dtype):
    (a, eager), (b, fused) = (bound(text, dtype, compile=c) for c in (False, True))
    for at in range(50):
        step(a, eager, at)
        step(b, fused, at)
        if at == 20:
            for optimizer in (eager, fused):
                optimizer.param_groups[0]["weight_decay"].fill_(0.0)  # the value that is there: nothing changes
    assert counters["stats"]["unique_graphs"] in (1, 2)  # once, and once more since somebody assigns to a hyperparameter
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        assert eager.state[p].keys() == fused.state[q].keys()
        for key, value in eager.state[p].items():
            torch.testing.assert_close(value, fused.state[q][key], rtol=1e-3, atol=1e-5)
    for key, value in eager.hyperparameters().items():
        torch.testing.assert_close(value, fused.hyperparameters()[key], rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_skipped_step_and_an_assigned_lr_do_not_compile_again():
    params, optimizer = bound("Adam / Adam", compile=True)
    for at in range(6):
        step(params, optimizer, at)
    optimizer.param_groups[0]["lr"] = 0.01
    step(params, optimizer, 6)
    before = counters["stats"]["unique_graphs"]
    for at, lr in enumerate((0.02, 0.03, 0.04), start=7):
        optimizer.param_groups[0]["lr"].fill_(lr)
        step(params, optimizer, at)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr)
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.skipped["gradients"] == 1
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_without_a_compiler_it_goes_on_eagerly_after_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (a, eager), (b, fused) = (bound("Adam / Adam", compile=c) for c in (False, True))
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}), pytest.warns(RuntimeWarning) as caught:
        train(8, (a, eager), (b, fused))
    ours = [str(w.message) for w in caught if "this optimizer goes on without it" in str(w.message)]
    assert len(ours) == 1
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
