"""The compiled step is the eager one, fused: equal to it, compiled once, and given up with one warning where no compiler works."""

import contextlib
import functools
import gc
import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from cases import CASES, Case
from fused import STEPS, assert_equal, bound, everything, fresh_compiler, step, train
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config

from hyperopt import SGD, Adam, Hyper, ScheduleFree
from hyperopt.body.blocks import blocks as cut
from hyperopt.body.compiled import Compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
__all__ = ["fresh_compiler"]


@pytest.fixture
def generic(monkeypatch):
    """No step by hand: what torch.compile makes of the rule, as everywhere but on a CPU."""
    monkeypatch.setattr("hyperopt.body.functions.built", lambda: None)


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


@pytest.mark.one_in(7)
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
    assert counters["stats"]["unique_graphs"] == len(turn.dtypes)


# ---- what is not a matter of rules


TOWERS = [
    "Adam / Adam",
    "AdamW(learn=(lr, beta1, weight_decay)) / Adam / SGD",
    "SGD(lr=0.1, momentum=0.9, weight_decay=0.1, learn=(lr, momentum), horizon=10) / Adam",
    "ScheduleFree(Adam) / Adam",
    'Adam(per="tensor") / Adam',
    "Adam",
    "Adam(learn=(lr, beta1, eps), horizon={lr: 10, beta1: 1, eps: 3}) / Adam",
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("text", "backend"), [*zip(TOWERS, (TRACE, GRAPH, TRACE, GRAPH, TRACE, TRACE, GRAPH), strict=True)])
@pytest.mark.usefixtures("generic")
def test_stage_by_stage(text, backend, monkeypatch):
    """As models with many large tensors are compiled: each stage once for all chunks that look alike."""
    monkeypatch.setattr("hyperopt.body.choose.PIECES", 0)
    monkeypatch.setattr("hyperopt.body.choose.LARGE", 1)
    monkeypatch.setattr("hyperopt.body.choose.LARGE_FUSED", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    eager, fused = (bound(text, compile=c) for c in (False, True))
    train(STEPS, eager, fused)
    assert_equal(eager, fused, torch.float32)
    assert len(fused[1]._groups()[0].buffers) == 3
    # A look, a measure and a write for each of three shapes, and learning, projecting and publishing.
    assert 0 < counters["stats"]["unique_graphs"] <= 12


@pytest.mark.parametrize("text", ["Adam(trust=None) / Adam", "Adam / Adam"])
@pytest.mark.usefixtures("generic")
def test_what_a_compiled_stage_is_given_does_not_share_memory_with_what_it_changes(text, monkeypatch):
    """torch 2.11 finds what it has compiled for arguments that do again for arguments that do not."""
    monkeypatch.setattr("hyperopt.body.choose.PIECES", 0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=TRACE))
    params, optimizer = bound(text, compile=True)
    node, stage, seen = optimizer._groups()[0].root, Compiled.stage, []

    def watched(self, also, function, *args):
        if function.__name__ == "publish":
            seen.append(args[0]["lr"].untyped_storage().data_ptr() == node.hypers.above[0][1].untyped_storage().data_ptr())
        return stage(self, also, function, *args)

    monkeypatch.setattr(Compiled, "stage", watched)
    train(8, (params, optimizer))
    assert seen
    assert not any(seen)


@pytest.mark.usefixtures("generic")
def test_chunks_that_look_alike_share_what_is_compiled(monkeypatch):
    monkeypatch.setattr("hyperopt.body.choose.PIECES", 0)
    monkeypatch.setattr("hyperopt.body.choose.LARGE", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=TRACE))
    found = []
    for count in (2, 9):
        counters.clear()
        params = [nn.Parameter(torch.randn(4, 3)) for _ in range(count)]
        optimizer = Hyper(Adam).stack(Adam).bind(params, compile=True)
        train(8, (params, optimizer))
        found.append((len(optimizer._groups()[0].buffers), counters["stats"]["unique_graphs"]))
    assert found == [(2, 6), (9, 6)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("text", TOWERS)
@pytest.mark.parametrize("direct", [False, True])
def test_block_by_block(text, direct, monkeypatch):
    """As large tensors are stepped eagerly: in blocks, with nothing else than rounding to show for it."""
    if direct:
        monkeypatch.setattr("hyperopt.body.choose.LARGE", 10)
    at_once = bound(text, compile=False)
    train(STEPS, at_once)
    monkeypatch.setattr("hyperopt.body.buffers.BLOCK", 8)
    blocks = bound(text, compile=False)
    train(STEPS, blocks)
    assert max(len(cut(buffer, buffer.x(), split=True)) for buffer in blocks[1]._groups()[0].buffers) > 4
    assert_equal(at_once, blocks, torch.float32)


@pytest.mark.parametrize("large", [10, 1000])
def test_parameters_of_more_elements_than_are_gathered(large, monkeypatch):
    reference = bound("Adam / Adam", compile=False)
    train(10, reference)
    monkeypatch.setattr("hyperopt.body.choose.CAPACITY", 20)
    monkeypatch.setattr("hyperopt.body.choose.LARGE", large)
    other = bound("Adam / Adam", compile=False)
    train(10, other)
    assert [[t.numel() for t in chunk.tensors] for chunk in other[1]._groups()[0].buffers] in ([[35], [7], [21]], [[35], [21], [7]])
    assert_equal(reference, other, torch.float32)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("text", ["Adam / Adam", "Adam(trust=None) / Adam", "AdamW / Adam", "Adam"])
def test_torchs_kernel_is_the_rules_update(text, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr("hyperopt.body.buffers.BLOCK", 8)
    kernel, rule = (bound(text, compile=False) for _ in range(2))
    nodes = rule[1]._groups()[0].nodes.values()
    assert all(node.body.kernel for node in nodes)
    for node in nodes:
        node.body.changed()
    train(STEPS, kernel, rule)
    assert_equal(rule, kernel, torch.float32)


@pytest.mark.parametrize("text", ["Adam / Adam", "Adam"])
@pytest.mark.parametrize("weights", [False, True])
def test_torchs_kernel_is_left_out_where_memory_lies_otherwise(text, weights, monkeypatch):
    monkeypatch.setattr("hyperopt.body.choose.LARGE", 10)
    pairs = [bound(text, compile=False) for _ in range(2)]
    for params, optimizer in pairs:
        if weights:
            params[0].data = params[0].data.t().contiguous().t()
        for at in range(20):
            generator = torch.Generator().manual_seed(at)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            params[2].grad = params[2].grad.t().contiguous().t()
            optimizer.step()
        for node in pairs[1][1]._groups()[0].nodes.values():
            node.body.changed()
    assert_equal(*pairs, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_torchs_kernel_with_gradients_that_are_not_finite_or_have_no_square(value):
    params, optimizer = bound("Adam / Adam", compile=False)
    train(4, (params, optimizer))
    before = everything(params, optimizer)
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad[0, 0] = value
    optimizer.step()
    after = everything(params, optimizer)
    if math.isfinite(value):
        assert all(v.isfinite().all() for v in after.values())
        assert optimizer.skipped["gradients"] == 0
        assert after["t[0]"] == 5
    else:
        assert optimizer.skipped["gradients"] == 1
        assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("q "))


@pytest.mark.parametrize("whole", [3, 0])
@pytest.mark.usefixtures("generic")
def test_two_optimizers_do_not_run_each_others_code(whole, monkeypatch):
    # What is compiled is found by a key and not by looking at everything that was read, so that keys have to tell all apart.
    monkeypatch.setattr("hyperopt.body.choose.PIECES", whole)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=TRACE))
    texts = ["Adam / Adam", "Adam(trust=None) / Adam", "Adam(lr=0.01, horizon=1) / SGD", "SGD(lr=0.1) / Adam"]
    pairs = [tuple(bound(text, compile=c) for c in (False, True)) for text in texts]
    train(20, *(one for pair in pairs for one in pair))
    for eager, fused in pairs:
        assert_equal(eager, fused, torch.float32)


# Kernels alone mind how memory lies, and ten of them take a minute. Stage by stage the same is traced for as long.
@pytest.mark.parametrize(
    ("whole", "backend"), [(3, TRACE), pytest.param(3, KERNELS, marks=pytest.mark.slow), pytest.param(0, TRACE, marks=pytest.mark.slow)]
)
def test_what_changes_between_steps(whole, backend, monkeypatch):
    """Levels above that step now and then, parameters without a gradient, weights and gradients that lie otherwise in memory."""
    monkeypatch.setattr("hyperopt.body.choose.PIECES", whole)
    monkeypatch.setattr("hyperopt.body.choose.LARGE", 1)
    monkeypatch.setattr("hyperopt.body.choose.LARGE_FUSED", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    pairs = []
    for c in (False, True):
        params = bound("Adam", compile=False)[0]
        tower = Hyper(SGD, lr=0.01, momentum=0.9, learn=("lr", "momentum")).stack(SGD, lr=0.1)  # compiled ten times, so short
        pairs.append((params, tower.bind(params, compile=c, hyper_every=3)))
    for at in range(STEPS):
        for params, optimizer in pairs:
            generator = torch.Generator().manual_seed(at)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if at % 7 == 3:
                params[1].grad = None
            if at > 20:
                params[0].grad = params[0].grad.t().contiguous().t()
            if at == 30:
                params[2].data = params[2].data.t().contiguous().t()
            if at == 40:
                params[2].grad[0, 0] = math.inf
            optimizer.step()
    assert_equal(*pairs, torch.float32)
    assert pairs[1][1].skipped == {"gradients": 1, "hypergradients": 0}


@pytest.mark.slow
@pytest.mark.usefixtures("generic")
@pytest.mark.parametrize("missing", [(3, 3), (0, 3)], ids=["one chunk less", "another chunk less"])
def test_stages_are_those_of_as_many_chunks_and_weights(missing, monkeypatch):
    """A parameter that loses its gradient for good, and then another in its place: what is compiled knows how many there are."""
    monkeypatch.setattr("hyperopt.body.choose.PIECES", 0)
    monkeypatch.setattr("hyperopt.body.choose.LARGE", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=TRACE))
    pairs = []
    for c in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(1e-3 * torch.randn(n, 3)) for n in (2, 3, 4, 500)]  # so small that trust goes by their number
        pairs.append((params, Hyper(SGD, lr=10.0, momentum=0.5, learn=("lr", "momentum")).stack(Adam).bind(params, compile=c)))
    for at in range(30):
        for params, optimizer in pairs:
            generator = torch.Generator().manual_seed(at)
            for i, p in enumerate(params):
                grad = 1.3**at * torch.randn(p.shape, generator=generator)  # so that trust has work in every step
                p.grad = None if at >= 10 and i == missing[at >= 20] else grad
            optimizer.step()
    assert_equal(*pairs, torch.float32)


def test_a_compiler_that_stops_working_is_given_up_too(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    pairs = [bound("Adam / Adam", compile=c) for c in (False, True)]
    train(8, *pairs)
    torch._dynamo.reset()
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.warns(RuntimeWarning, match="goes on without it"),
    ):
        train(8, *pairs)
    assert_equal(*pairs, torch.float32)


BRANCHES = "Adam(learn=(lr, beta1)) / {lr: Adam, beta1: SGD}"


@pytest.mark.parametrize("text", ["Adam / Adam", BRANCHES], ids=["chain", "tree"])
@pytest.mark.usefixtures("graphs")
def test_an_assigned_value_compiles_once_more(text):
    eager, fused = (bound(text, compile=c) for c in (False, True))
    train(20, eager, fused)
    for _, optimizer in (eager, fused):
        optimizer.param_groups[0]["weight_decay"].fill_(0.0)  # the value that is there: nothing changes
    train(STEPS, eager, fused)
    assert counters["stats"]["unique_graphs"] == 2
    assert_equal(eager, fused, torch.float32)


@pytest.mark.usefixtures("graphs")
def test_a_skipped_step_and_an_assigned_lr_do_not_compile_again():
    params, optimizer = bound("Adam / Adam", compile=True)
    for at in range(6):
        step(params, optimizer, at)
    for at, lr in enumerate((0.01, 0.015), start=6):
        optimizer.param_groups[0]["lr"] = lr
        step(params, optimizer, at)  # the first of its kind is eager
    before = counters["stats"]["unique_graphs"]
    for at, lr in enumerate((0.02, 0.03, 0.04), start=8):
        optimizer.param_groups[0]["lr"].fill_(lr)
        step(params, optimizer, at)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr)
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.skipped["gradients"] == 1
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(("dtype", "right"), [(torch.float64, False), (torch.float32, True)])
def test_where_torch_compiles_float64_wrongly_it_goes_on_eagerly(dtype, right, monkeypatch):
    monkeypatch.setattr("hyperopt.body.compiled.DOUBLES", "99.0")
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    with contextlib.nullcontext() if right else pytest.warns(RuntimeWarning, match="loses float64 numbers"):
        optimizer = Hyper(Adam).stack(Adam).bind([w], compile=True)
    assert optimizer._groups()[0].compile == right


def test_without_a_compiler_it_goes_on_eagerly_after_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (a, eager), (b, fused) = (bound("Adam / Adam", compile=c) for c in (False, True))
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}), pytest.warns(RuntimeWarning) as caught:
        train(8, (a, eager), (b, fused))
    ours = [str(w.message) for w in caught if "this optimizer goes on without it" in str(w.message)]
    assert len(ours) == 1
    torch.testing.assert_close(a, b)  # to rounding: alone the eager one has Adam's direction from a kernel of torch's own


@pytest.mark.usefixtures("operations_of_torch")
def test_other_tensors_with_a_gradient_in_every_step_compile_a_few_times(monkeypatch):
    """As in a mixture of experts: of six, two take part in a step, which is 15 sets."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=TRACE))
    runs = []
    for compile in (False, True):
        params = [nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(i))) for i in range(6)]
        optimizer = Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam).bind(params, compile=compile)
        generator = torch.Generator().manual_seed(0)
        for at in range(80):
            chosen = torch.randperm(6, generator=generator)[:2].tolist()
            for i, p in enumerate(params):
                p.grad = torch.randn(3, 4, generator=generator) if i in chosen or at < 2 else None
            optimizer.step()
        runs.append((params, optimizer))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-6)
    runner = runs[1][1]._groups()[0]._step
    pieces = [key for key, _ in runner.compiled.fused if key[0] == "whole"]
    stages = {key[0] for key, _ in runner.compiled.fused if key[0] != "whole"}
    assert len(pieces) == 3
    assert 1 <= len(stages) <= 3


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("tower", [Hyper(Adam).stack(Adam), Hyper(ScheduleFree(Adam), learn=("lr", "beta1")).stack(Adam)], ids=str)
def test_an_optimizer_is_freed_without_a_garbage_collection(tower, compile):
    gc.collect()
    gc.disable()
    try:
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
        optimizer = tower.bind(params, compile=compile)
        for _ in range(6):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        group = optimizer._groups()[0]
        assert not compile or group._step.compiled.fused
        held = optimizer, group, group.root, group.body, group.buffers[0], *group.buffers[0].state.values()
        found = [weakref.ref(each) for each in held]
        del optimizer, group, held, p
        assert [each() for each in found] == [None] * len(found)
    finally:
        gc.enable()
