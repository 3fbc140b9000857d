"""The compiled step is the eager one, fused: equal to it, compiled once, and given up with one warning where no compiler works."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from cases import CASES, Case
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config

from hyperopt import SGD, Adam, Hyper, ScheduleFree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

STEPS = 50
# Fused kernels contract a·b + c to one rounding and add in another order: an ulp a step, and 50 steps of it. Nothing makes more of
# it, as the gradients are given and the hyperparameters move by 5 %. A weight in bfloat16 that lay between two numbers may become
# either, 1/256 apart; few do, and what is computed from weights that are not the same is not the same either.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def bound(tower, dtype=torch.float32, *, compile):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(7, 5), (7,), (3, 7)]]
    tower = Hyper.parse(tower) if isinstance(tower, str) else tower
    return params, tower.bind(params, compile=compile)


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


def everything(params, optimizer):
    """All that a step changes, by name: weights, state with tangents, hyperparameters, hypergradients."""
    kept = {f"{key}[{i}]": value for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    weights = {f"x[{i}]": p.detach() for i, p in enumerate(params)}
    return weights | kept | optimizer.hyperparameters() | {f"q {key}": value for key, value in optimizer.hypergradients().items()}


def assert_equal(eager, fused, dtype):
    expected, actual = everything(*eager), everything(*fused)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        error, size = (actual[key].double() - value.double()).norm(), value.double().norm()
        assert error <= TOLERANCE[dtype] * size, f"{key}: off by {float(error / size):.1e}"


# ---- every rule, in combinations of everything else


TRACE, GRAPH, KERNELS = "eager", "aot_eager", "inductor"
HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Turn:
    """What a row is compiled with.

    Args:
        height: levels above.
        horizon: of level 0.
        alone: learn lr alone, and everything in the row's `learnable` otherwise.
        backend: "inductor" makes kernels. What it makes them of is less than a fifth of its time: "aot_eager" runs that graph, in which
            derivatives are taken and nothing is changed in place, operation by operation; "eager" runs what was traced of the code.
        dtypes: of the weights. The compiled code is the same, as weights are gathered before and scattered after it.
    """

    height: int
    horizon: int
    alone: bool
    backend: str
    dtypes: tuple[torch.dtype, ...]

    def tower(self, case):
        tower = Hyper(case.rule, learn="lr" if self.alone else case.learnable, horizon=self.horizon)
        for above in (Hyper(Adam, lr=1e-3), Hyper(SGD, lr=1e-3), Hyper(SGD, lr=1e-3))[: self.height]:
            tower = tower.stack(above)
        return tower


# The rows of a rule take them in turn, until each was taken and each row had one.
TURNS = (
    Turn(2, 1000, False, GRAPH, (SINGLE,)),
    Turn(1, 1000, True, KERNELS, (SINGLE, HALF)),
    Turn(3, 1, True, TRACE, (SINGLE,)),
    Turn(0, 1, True, GRAPH, (SINGLE, HALF)),
)
AVERAGING = [
    Case("schedule-free-adam", ScheduleFree(Adam)(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.05), ("lr", "beta1", "beta2"), None),
    Case("schedule-free-sgd", ScheduleFree(SGD)(lr=0.1, weight_decay=0.05), ("lr", "beta1", "weight_decay"), None),
]


def combinations():
    rules = {}
    for case in (*CASES, *AVERAGING):
        rules.setdefault(type(case.rule), []).append(case)
    for cases in rules.values():
        for i in range(max(len(cases), len(TURNS))):
            case, turn = cases[i % len(cases)], TURNS[i % len(TURNS)]
            yield pytest.param(case, turn, id=f"{case.name}-{turn.height}")


@pytest.mark.parametrize(("case", "turn"), list(combinations()))
def test_every_rule(case, turn, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=turn.backend))
    tower = turn.tower(case)
    for dtype in turn.dtypes:
        eager, fused = (bound(tower, dtype, compile=c) for c in (False, True))
        start = eager[1].hyperparameters()
        train(STEPS, eager, fused)
        assert_equal(eager, fused, dtype)
        end = eager[1].hyperparameters()
        for name in tower.learning:
            assert end[f"0.{name}"] != start[f"0.{name}"], f"{name} did not move"
    assert counters["stats"]["unique_graphs"] == 1


# ---- what is not a matter of rules


BRANCHES = "Adam(learn=(lr, beta1)) / {lr: Adam, beta1: SGD}"


@pytest.mark.parametrize("text", ["Adam / Adam", BRANCHES], ids=["chain", "tree"])
def test_an_assigned_value_compiles_once_more(text):
    eager, fused = (bound(text, compile=c) for c in (False, True))
    train(20, eager, fused)
    for _, optimizer in (eager, fused):
        optimizer.param_groups[0]["weight_decay"].fill_(0.0)  # the value that is there: nothing changes
    train(STEPS, eager, fused)
    assert counters["stats"]["unique_graphs"] == 2
    assert_equal(eager, fused, torch.float32)


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


def test_without_a_compiler_it_goes_on_eagerly_after_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (a, eager), (b, fused) = (bound("Adam / Adam", compile=c) for c in (False, True))
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}), pytest.warns(RuntimeWarning) as caught:
        train(8, (a, eager), (b, fused))
    ours = [str(w.message) for w in caught if "this optimizer goes on without it" in str(w.message)]
    assert len(ours) == 1
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
