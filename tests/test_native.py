"""The step by hand is the eager one in two passes: equal to it in all that is changed, and left out where it does not fit."""

import contextlib
import copy
import math

import pytest
import torch
from cases import CASES, Case
from fused import STEPS, assert_equal, bound, everything, fresh_compiler, step, train
from test_averaging import averaged
from torch import nn

from hyperopt import ADOPT, SGD, Adam, AdamW, Hyper, Lion, RMSprop, ScheduleFree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
__all__ = ["fresh_compiler"]

TOWERS = [
    "Adam(lr=0.01) / Adam",
    "Adam(lr=0.01, trust=None) / Adam",
    "AdamW(lr=0.01, weight_decay=0.3) / SGD",
    "Adam(lr=10.0, beta1=0.5, beta2=0.9, eps=0.1) / Adam / Adam",  # trust is at work in every step
    "Adam(lr=0.01, horizon=1) / Adam",
    "Adam(lr=0.01, beta2=0.0, eps=0.001) / Adam",
]


def by_hand(optimizer):
    return [getattr(group.body, "passes", None) is not None for group in optimizer._groups()]


@pytest.mark.parametrize("text", TOWERS)
def test_is_the_eager_step(text):
    eager, fused = (bound(text, compile=c) for c in (False, True))
    train(STEPS, eager, fused)
    assert by_hand(fused[1]) == [True]
    assert_equal(eager, fused, torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_that_of_its_numbers(default):
    eager, fused = (bound("Adam(lr=0.01) / SGD", compile=c) for c in (False, True))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for at in range(12):
            for params, optimizer in (eager, fused):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(at), dtype=torch.float32)
                optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert by_hand(fused[1]) == [True]
    assert_equal(eager, fused, torch.float32)


def test_a_second_moment_is_not_cancelled():
    """With beta2 = 0 the second moment is the last gradient's square, also where the one before was a million times as large."""
    runs = [bound("Adam(lr=0.01, beta2=0.0, trust=None) / Adam", compile=c) for c in (False, True)]
    for params, optimizer in runs:
        for at in range(8):
            for p in params:
                p.grad = torch.full_like(p, 1.0 if at < 7 else 1e-5)
            optimizer.step()
        torch.testing.assert_close(optimizer.state[params[0]]["v"], torch.full((7, 5), 1e-10))
    assert_equal(*runs, torch.float32)


def test_a_weight_that_is_infinite_stays_so():
    runs = [bound(TOWERS[1], compile=c) for c in (False, True)]
    for params, optimizer in runs:
        train(4, (params, optimizer))
        params[0].data[0, 0] = -math.inf
        for p in params:
            p.grad = torch.ones_like(p)
        params[0].grad[0, 0] = 0.0
        optimizer.step()
        assert params[0][0, 0] == -math.inf
    torch.testing.assert_close(*(params for params, _ in runs))


def test_state_that_was_moved_in_memory_is_found():
    """Sharing a tensor with another process moves its storage, under the same tensor."""
    runs = [bound(TOWERS[2], compile=c) for c in (False, True)]
    train(6, *runs)
    for value in (*runs[1][1].state_dict()["state"][0].values(), *runs[1][1].param_groups[0].values()):
        if isinstance(value, torch.Tensor):
            value.share_memory_()
    train(6, *runs)
    assert by_hand(runs[1][1]) == [True]
    assert_equal(*runs, torch.float32)


@pytest.mark.usefixtures("graphs")
def test_tangents_that_lie_otherwise_are_left_to_torch():
    runs = []
    for c in (False, True):
        w = nn.Parameter(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last))
        runs.append(([w], Hyper.parse(TOWERS[0]).bind([w], compile=c)))
    train(4, *runs)
    for params, _ in runs:
        params[0].data = params[0].data.contiguous()
    train(4, *runs)
    assert by_hand(runs[1][1]) == [False]
    assert_equal(*runs, torch.float32)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("compile", [False, True])
def test_channels_last_tensors_side_by_side_are_stepped_in_their_own_order(compile):
    def made(memory_format, compile):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)).to(memory_format=memory_format)
        return model, Hyper.parse(TOWERS[0]).bind(model.parameters(), compile=compile)

    def go(steps, *runs):
        for x in torch.randn(steps, 2, 3, 6, 6):
            for model, optimizer in runs:
                model.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()

    run, reference = made(torch.channels_last, compile), made(torch.contiguous_format, False)
    go(6, run, reference)
    model, optimizer = run
    assert by_hand(optimizer) == [True]
    assert optimizer.state[model[0].weight]["m"].is_contiguous(memory_format=torch.channels_last)
    kept = copy.deepcopy(model[0].weight)
    for p in model.parameters():  # now state and weights do not lie alike any more
        p.data = p.data.contiguous()
    assert kept.equal(model[0].weight)
    go(6, run, reference)
    assert by_hand(optimizer) == [False]
    for p, q in zip(model.parameters(), reference[0].parameters(), strict=True):
        assert (p - q).norm() <= 1e-5 * q.norm()


def test_a_gradient_without_memory_is_left_to_torch():
    fused = bound(TOWERS[0], compile=True)
    train(4, fused)
    for p in fused[0]:
        p.grad = torch._efficientzerotensor(p.shape)
    with contextlib.suppress(RuntimeError):  # it may say that it cannot write there
        fused[1].step()
    assert by_hand(fused[1]) == [False]


@pytest.mark.usefixtures("graphs")
def test_one_memory_for_two_parameters_is_left_to_torch():
    runs = []
    for c in (False, True):
        w = nn.Parameter(torch.ones(5))
        params = [w, nn.Parameter(w.data)]
        runs.append((params, Hyper.parse(TOWERS[0]).bind(params, compile=c)))
    train(6, *runs)
    assert by_hand(runs[1][1]) == [False]
    torch.testing.assert_close(*(params for params, _ in runs))


@pytest.mark.usefixtures("graphs")
def test_a_scheduler_and_changing_sets_of_gradients_compile_a_few_times():
    params = [nn.Parameter(torch.randn(5)) for _ in range(6)]
    optimizer = Hyper.parse(TOWERS[0]).bind(params, compile=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    generator = torch.Generator().manual_seed(0)
    for at in range(80):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) if at < 2 or torch.rand((), generator=generator) < 0.5 else None
        optimizer.step()
        schedule.step()
    group = optimizer._groups()[0]
    assert len(group.body.kept) <= 8
    assert len(group._step.compiled.fused) == 3  # for the first numbers of parameters


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_are_not_seen(threads, monkeypatch):
    """A block is smaller than a tensor here, and what is summed block by block does not depend on who was first."""
    whole = bound(TOWERS[0], compile=True)
    train(STEPS, whole)
    monkeypatch.setattr("hyperopt.body.functions.BLOCK", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [bound(TOWERS[0], compile=True) for _ in range(2)]
        train(STEPS, *runs)
    finally:
        torch.set_num_threads(before)
    assert len(runs[0][1]._groups()[0].body.passes.blocks) == 12 + 3 + 7
    assert_equal(whole, runs[0], torch.float32)
    first, second = (everything(*run) for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_gradients_that_are_not_finite_or_have_no_square(value):
    params, optimizer = bound(TOWERS[0], compile=True)
    train(6, (params, optimizer))
    before = {key: kept.clone() for key, kept in everything(params, optimizer).items()}
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad[0, 0] = value
    optimizer.step()
    after = everything(params, optimizer)
    assert by_hand(optimizer) == [not math.isfinite(value)]  # where squares overflow, more care is needed
    if math.isfinite(value):
        assert all(v.isfinite().all() for v in after.values())
        assert optimizer.skipped["gradients"] == 0
        assert after["t[0]"] == 7
    else:
        assert optimizer.skipped["gradients"] == 1
        assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("q "))


def test_a_tangent_that_is_not_finite_starts_again():
    runs = [bound(TOWERS[0], compile=c) for c in (False, True)]
    train(6, *runs)
    for params, optimizer in runs:
        optimizer.state[params[0]]["Z.lr"][0, 0] = math.inf
    train(6, *runs)
    assert by_hand(runs[1][1]) == [True]
    for params, optimizer in runs:
        assert optimizer.skipped["hypergradients"] == 1
        assert optimizer.state[params[0]]["Z.lr"].isfinite().all()
    assert_equal(*runs, torch.float32)


@pytest.mark.usefixtures("graphs")
def test_what_users_change():
    """Values are assigned, a parameter has no gradient, the level above rests, memory lies otherwise."""
    pairs, taken = [], []
    for c in (False, True):
        params = bound("Adam", compile=False)[0]
        pairs.append((params, Hyper(Adam, lr=0.01, weight_decay=0.1, decoupled=True).stack(Adam).bind(params, compile=c, hyper_every=2)))
    for at in range(STEPS):
        for params, optimizer in pairs:
            group = optimizer.param_groups[0]
            if at == 10:
                group["beta1"] = 0.7
            if at in (15, 16):
                group["lr"] = 0.02
            if at == 20:
                group["weight_decay"].fill_(0.2)
            if at == 25:
                group["lr"].fill_(0.0)
            generator = torch.Generator().manual_seed(at)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if 30 <= at < 35:
                params[1].grad = None
            if at == 40:
                params[0].grad = params[0].grad.t().contiguous().t()
            if at == 45:
                params[2].data = params[2].data.clone()
            optimizer.step()
        taken += by_hand(pairs[1][1])
    assert_equal(*pairs, torch.float32)
    # A parameter leaves its buffer, which gives two buffers that have tangents too.
    assert [at for at, hand in enumerate(taken) if not hand] == [40]


@pytest.mark.usefixtures("graphs")
def test_groups_count_a_step_together():
    """A gradient that is not finite in one group is a step that counts in none."""
    runs = []
    for c in (False, True):
        params = bound("Adam", compile=False)[0]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
        runs.append((params, Hyper.parse(TOWERS[0]).bind(groups, compile=c)))
    train(10, *runs)
    for params, optimizer in runs:
        params[0].grad[0, 0] = math.nan
        optimizer.step()
        assert optimizer.skipped["gradients"] == 1
    train(10, *runs)
    assert by_hand(runs[1][1]) == [True, True]
    assert_equal(*runs, torch.float32)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "text", ["Adam(weight_decay=0.1) / Adam", "Adam(learn=(lr, beta1)) / Adam", "SGD(project=Box(-9, 9)) / Adam", "Adam(per=tensor) / Adam"]
)
def test_another_update_is_left_to_torch(text):
    fused = bound(text, compile=True)
    train(6, fused)
    assert by_hand(fused[1]) == [False]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_torch(dtype):
    fused = bound(TOWERS[0], dtype, compile=True)
    train(6, fused)
    assert by_hand(fused[1]) == [False]


def test_weights_that_moved_to_another_dtype_are_left_alone():
    """Raw memory is read: what is no longer float32 must never be taken for it."""
    runs = [bound(TOWERS[0], compile=c) for c in (False, True)]
    train(6, *runs)
    for params, _ in runs:
        for p in params:
            p.grad = None
            p.data = p.data.bfloat16()
    train(1, *runs)
    assert by_hand(runs[1][1]) == [False]
    for eager, fused in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(eager, fused)


def test_autograd_sees_that_weights_were_changed():
    w = nn.Parameter(torch.ones(4))
    optimizer = Hyper(Adam).stack(Adam).bind([w], compile=True)
    for _ in range(3):
        w.grad = torch.ones(4)
        optimizer.step()
    assert by_hand(optimizer) == [True]
    loss = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_and_a_checkpoint_go_on():
    params, optimizer = bound(TOWERS[0], compile=True)
    train(10, (params, optimizer))
    copied_params, copied = copy.deepcopy((params, optimizer))
    other_params, other = bound(TOWERS[0], compile=True)
    for p, q in zip(other_params, params, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(optimizer.state_dict())
    for at in range(10, 20):
        for run in ((params, optimizer), (copied_params, copied), (other_params, other)):
            step(*run, at)
    assert by_hand(copied) == by_hand(other) == [True]
    assert_equal((params, optimizer), (copied_params, copied), torch.float32)
    assert_equal((params, optimizer), (other_params, other), torch.float32)


# ---- every rule, in eager mode


RULES = [*CASES, *(Case(f"averaged-{case.name}", averaged(case.rule), ("lr",), None) for case in CASES[:12:3])]
RULES += [Case(f"schedule-free-{base.__name__}", ScheduleFree(base)(lr=0.01), ("lr",), None) for base in (Adam, AdamW, SGD, RMSprop, Lion)]


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "alone"])
@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_every_rule(case, learned):
    """Whose direction depends on neither the weights nor lr; of ADOPT no decay, which begins with its second step."""
    rule = case.rule
    tower = Hyper(rule).stack(Adam) if learned else Hyper(rule)
    torchs, native = (bound(tower, compile=False, native=n) for n in (False, True))
    train(20, torchs, native)
    coupled = rule._couples()
    assert by_hand(native[1]) == [not coupled and not (isinstance(rule, ADOPT) and rule.weight_decay != 0)]
    assert by_hand(torchs[1]) == [False]
    assert_equal(torchs, native, torch.float32)


def test_large_tensors_of_a_rule_without_a_direction_in_cpp_are_stepped_block_by_block(monkeypatch):
    monkeypatch.setattr("hyperopt.body.native.GIVEN", 62)
    fused = bound("SGD / Adam", compile=False, native=True)
    train(4, fused)
    assert by_hand(fused[1]) == [False]
