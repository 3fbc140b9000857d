"""Schedulers and a learned lr: with `schedule=True` they scale it, without they replace it, and the user is told if that is all they do."""

import copy
import warnings

import pytest
import torch
from small import backward, differences, net, train
from test_optimizer import AGAIN, assert_goes_on, copied, no_host_sync, pickled, weights
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from hyperopt import SGD, Adagrad, Adam, Averaged, Hyper, Muon, ScheduleFree
from hyperopt.body.arithmetic import Selected

LR = 1e-2
TOWER = Hyper(Adam, lr=LR).stack(Adam)
FREE = Hyper(Adam, lr=LR, trust=None).stack(Adam)
NEVER = 10**9  # for hyper_every: nothing is learned
SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.5**step),
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "linear, from almost 0": lambda o: LinearLR(o, 1e-3, total_iters=5),
    "warm-up, then cosine": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, T_max=6)], milestones=[3]),
    "cycle": lambda o: OneCycleLR(o, 4 * LR, total_steps=12, cycle_momentum=False),
    "triangles": lambda o: CyclicLR(o, LR, 3 * LR, step_size_up=3, cycle_momentum=False),
}


def run(make, scheduler, steps=9, dtype=torch.float64):
    """The model, the optimizer and its lr in each step, which a scheduler writes after it."""
    model = net(dtype)
    optimizer = make(model.parameters())
    schedule, used = scheduler(optimizer), []
    for step in range(steps):
        train(model, optimizer, range(step, step + 1))
        used.append(float(optimizer.hyperparameters()["0.lr"].mean()) if hasattr(optimizer, "tower") else optimizer.param_groups[0]["lr"])
        schedule.step()
    return model, optimizer, used


def assert_close(a, b, rtol=1e-10):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-12)


# ---- with schedule=True


@pytest.mark.parametrize("per", ["group", "tensor", "coordinate"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_step_is_taken_at_what_the_scheduler_wrote_times_the_learned_lr(scheduler, per):
    tower = Hyper(Adam, lr=LR, per=per, trust=None).stack(SGD)
    model, optimizer, used = run(lambda ps: tower.bind(ps, schedule=True, hyper_every=NEVER), scheduler)
    # Nothing is learned, so that the values are the scheduler's.
    twin, reference, expected = run(lambda ps: torch.optim.Adam(ps, lr=LR), scheduler)
    assert used == pytest.approx(expected, rel=1e-10)
    assert len(set(used)) > 5
    assert_close(model, twin)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-10)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "rule", [Adam, SGD(momentum=0.9), ScheduleFree(Adam), Averaged(Adam), Muon, Adam(weight_decay=0.1)], ids=lambda rule: str(Hyper(rule))
)
def test_every_body_scales(rule, compile, graphs):
    # A schedule of one value v, from the first step on, is the same as starting at v: trust is the same, and so is d/d log lr.
    runs = []
    for start, factor in ((LR, 0.25), (0.25 * LR, 1.0)):
        tower = Hyper(rule, lr=start).stack(Adam)
        make = lambda ps, tower=tower: tower.bind(ps, schedule=True, compile=compile)  # noqa: E731
        runs.append(run(make, lambda o, factor=factor: LambdaLR(o, lambda _: factor), 12, torch.float32))
    assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-4)
    assert len(set(runs[0][2])) > 6  # learned
    torch.testing.assert_close(runs[0][1].hypergradients(), runs[1][1].hypergradients(), rtol=1e-3, atol=1e-9)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tower", [TOWER, Hyper(ScheduleFree(Adam)).stack(Adam).stack(SGD), Hyper(SGD, per="tensor").stack(SGD)], ids=str)
def test_a_constant_schedule_changes_nothing(tower):
    model, optimizer, used = run(lambda ps: tower.bind(ps, schedule=True), lambda o: LambdaLR(o, lambda _: 1.0))
    plain, free = net(torch.float64), None
    free = tower.bind(plain.parameters())
    train(plain, free, range(9))
    assert differences(weights(model), weights(plain)) == []
    assert differences(optimizer.hyperparameters(), free.hyperparameters()) == []
    assert len(set(used)) > 6


@pytest.mark.parametrize("learn", ["lr", ("lr", "beta1")])
def test_the_hypergradient_is_that_of_the_scaled_step(learn):
    # The graph of the paper differentiates the step that was taken; horizon 1.
    found = []
    for strategy in ("graph", "tangents"):
        tower = Hyper(Adam, lr=LR, learn=learn, horizon=1, strategy=strategy).stack(Adam)
        _, optimizer, used = run(lambda ps, tower=tower: tower.bind(ps, schedule=True), SCHEDULERS["warm-up, then cosine"])
        found.append((optimizer.hypergradients(), used))
    torch.testing.assert_close(*[q for q, _ in found], rtol=1e-9, atol=1e-15)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)


@pytest.mark.parametrize("rule", [Adam, ScheduleFree(Adam), SGD])
def test_at_0_weights_stand_still_and_learning_goes_on_afterwards(rule):
    model = net()
    optimizer = Hyper(rule, lr=1e-3).stack(Adam).bind(model.parameters(), schedule=True)
    before = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(5))
    assert differences(weights(model), before) == []
    assert optimizer.hyperparameters()["0.lr"] == 0
    optimizer.param_groups[0]["lr"] = 1e-3
    seen = []
    for step in range(5, 10):
        train(model, optimizer, range(step, step + 1))
        seen.append(float(optimizer.hyperparameters()["0.lr"]))
    assert seen[0] == pytest.approx(1e-3)
    assert seen[-1] > 1.1e-3
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}


def test_what_a_scheduler_wrote_stands_until_it_writes_again():
    model = net()
    optimizer = TOWER.bind(model.parameters(), schedule=True)
    schedule = ReduceLROnPlateau(optimizer, factor=0.25, patience=1)
    group = optimizer.param_groups[0]
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        assert float(group["lr"]) == pytest.approx(LR)
        schedule.step(1.0)
    before = float(optimizer.hyperparameters()["0.lr"])
    train(model, optimizer, range(3, 4))
    assert float(group["lr"]) == pytest.approx(LR / 4)
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(before / 4, rel=0.15)  # and one step of learning


def test_a_loop_that_assigns_lr_scales_it_and_an_object_can_be_put_back():
    model = net()
    optimizer = FREE.bind(model.parameters(), schedule=True, hyper_every=NEVER)
    group = optimizer.param_groups[0]
    for step, lr in enumerate((LR, LR / 2, torch.tensor(LR / 4))):
        group["lr"] = lr
        train(model, optimizer, range(step, step + 1))
        assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(float(lr))
    kept = group["lr"]
    group["lr"] = 0.0
    train(model, optimizer, range(3, 4))
    group["lr"] = kept
    train(model, optimizer, range(4, 5))
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(LR / 4)


def test_trust_bounds_the_scaled_step():
    ends = []
    for factor in (1.0, 1e-3):
        model = net()
        start = weights(model)
        optimizer = Hyper(SGD, lr=1e3, trust=0.01).stack(SGD).bind(model.parameters(), schedule=True)
        optimizer.param_groups[0]["lr"] = 1e3 * factor
        train(model, optimizer, range(1))
        moved, whole = (torch.cat([t.flatten() for t in ts]) for ts in (weights(model), start))
        ends.append(float((moved - whole).norm() / whole.norm()))
    assert ends == pytest.approx([0.01, 0.01], rel=1e-4)


def test_each_group_has_a_schedule_of_its_own():
    model = net()
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 4 * LR}]
    optimizer = FREE.bind(groups, schedule=True, hyper_every=NEVER)
    LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.25])
    train(model, optimizer, range(2))
    assert [float(optimizer.hyperparameters()[f"0.lr[{i}]"]) for i in (0, 1)] == pytest.approx([LR / 2, LR])


def test_a_held_lr_is_the_schedulers():
    twin = net(torch.float64)
    for keywords in ({}, {"schedule": True}):
        for tower in (Hyper(Adam, lr=LR), Hyper(Adam, lr=LR, learn="beta1").stack(Adam)):
            model, _, used = run(lambda ps, tower=tower, keywords=keywords: tower.bind(ps, **keywords), SCHEDULERS["exponential"])
            assert used == pytest.approx([LR * 0.8**i for i in range(9)])
            if not tower.above:
                twin, *_ = run(lambda ps: torch.optim.Adam(ps, lr=LR), SCHEDULERS["exponential"])
                assert_close(model, twin)


def again(remake, model, optimizer, tower, groups):
    if remake in (copied, pickled):
        return remake(model, optimizer, tower)
    fresh = copy.deepcopy(model)
    params = list(fresh.parameters())
    other = tower.bind([{"params": params[i::groups]} for i in range(groups)], schedule=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh, other


@pytest.mark.parametrize("remake", AGAIN)
@pytest.mark.parametrize(
    ("tower", "groups"), [(TOWER, 1), (TOWER, 2), (Hyper(ScheduleFree(Adam), per="tensor").stack(Adam).stack(SGD), 1)], ids=str
)
def test_training_goes_on_bit_for_bit(tower, groups, remake):
    model = net()
    params = list(model.parameters())
    optimizer = tower.bind([{"params": params[i::groups]} for i in range(groups)], schedule=True)
    schedule = LambdaLR(optimizer, lambda step: 0.7**step)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
    fresh, other = again(remake, model, optimizer, tower, groups)
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr"] = 0.3 * LR
    assert_goes_on(model, optimizer, fresh, other, range(4, 8))


def test_a_checkpoint_of_the_other_kind_is_refused_and_changes_nothing():
    runs = [(model := net(), TOWER.bind(model.parameters(), schedule=schedule)) for schedule in (False, True)]
    for model, optimizer in runs:
        train(model, optimizer, range(3))
    saved = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in runs]
    for i, (_, optimizer) in enumerate(runs):
        with pytest.raises(ValueError, match=f"written with schedule={not i}: bind.*schedule={not i}. to load it"):
            optimizer.load_state_dict(saved[1 - i])
        assert differences(optimizer.state_dict(), saved[i]) == []


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    monkeypatch.setattr("hyperopt.body.eager.OnHost", Selected)  # as on a GPU: a CPU waits for nothing
    model = net()
    optimizer = TOWER.bind(model.parameters(), schedule=True)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    train(model, optimizer, range(3))  # the first steps make buffers
    for step in range(3, 9):
        backward(model, step)
        with no_host_sync(monkeypatch):
            optimizer.step()
        schedule.step()


# ---- without


def told(tower, scheduler, steps=60, **keywords):
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(lambda ps: tower.bind(ps, **keywords), scheduler, steps, torch.float32)
    return [str(each.message) for each in caught if each.category is UserWarning and "overwritten" in str(each.message)]


class Assigning:
    """A training loop that assigns lr on every step, as nanoGPT's."""

    def __init__(self, optimizer, last=10**9):
        self.optimizer, self.at, self.last = optimizer, 0, last

    def step(self):
        self.at += 1
        if self.at < self.last:
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 / self.at


@pytest.mark.parametrize(
    "scheduler", [lambda o: LambdaLR(o, lambda _: 1.0), Assigning, *SCHEDULERS.values()], ids=["constant", "assigned", *SCHEDULERS]
)
def test_a_learned_lr_that_is_overwritten_on_every_step_is_told_once(scheduler):
    steps = 11 if scheduler is SCHEDULERS["cycle"] else 60  # that one ends
    found = told(TOWER, scheduler, steps)
    assert len(found) == (steps > 20)
    assert all("overwritten on 20 steps in a row" in each and "bind(…, schedule=True)" in each for each in found)


@pytest.mark.parametrize(
    ("tower", "scheduler", "keywords"),
    [
        (TOWER, lambda o: StepLR(o, 10, 0.5), {}),
        (TOWER, lambda o: Assigning(o, last=19), {}),
        (TOWER, lambda o: LambdaLR(o, lambda _: 1.0), {"schedule": True}),
        (Hyper(Adam, lr=LR), lambda o: LambdaLR(o, lambda _: 1.0), {}),
        (Hyper(Adam, lr=LR, learn="beta1").stack(SGD), lambda o: LambdaLR(o, lambda step: 1 / (step + 1)), {}),
    ],
)
def test_nobody_is_told_where_lr_is_learned_or_held(tower, scheduler, keywords):
    assert told(tower, scheduler, **keywords) == []


def test_counting_does_not_wait_for_the_device(monkeypatch):
    monkeypatch.setattr("hyperopt.body.eager.OnHost", Selected)  # as on a GPU: a CPU waits for nothing
    model = net()
    optimizer = TOWER.bind(model.parameters())
    schedule = LambdaLR(optimizer, lambda _: 1.0)
    train(model, optimizer, range(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3, 30):
            backward(model, step)
            with no_host_sync(monkeypatch):
                optimizer.step()
            schedule.step()
    assert "overwritten" in str(caught[0].message)


# ---- errors


@pytest.mark.parametrize("scheduler", [lambda o: OneCycleLR(o, 0.1, total_steps=9), lambda o: CyclicLR(o, 0.01, 0.1)])
@pytest.mark.parametrize(("rule", "name"), [(SGD(momentum=0.9), "momentum"), (Adam, "beta1"), (ScheduleFree(Adam), "beta1")])
def test_momentum_is_cycled_as_in_torchs_own(rule, name, scheduler):
    model, twin = net(), net()
    optimizer = Hyper(rule, lr=0.01).stack(SGD).bind(model.parameters(), schedule=True)
    other = torch.optim.Adam(twin.parameters())
    schedule, reference, seen = scheduler(optimizer), scheduler(other), set()
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
        value = float(optimizer.hyperparameters()[f"0.{name}"])
        assert value == pytest.approx(other.param_groups[0]["betas"][0], rel=1e-6)
        seen.add(round(value, 5))
        schedule.step()
        reference.step()
    assert len(seen) == 5


@pytest.mark.parametrize("scheduler", [lambda o: OneCycleLR(o, 0.1, total_steps=9), lambda o: CyclicLR(o, 0.01, 0.1)])
def test_momentum_is_not_cycled_where_there_is_none(scheduler):
    with pytest.raises(ValueError, match="cycle_momentum"):
        scheduler(Hyper(Adagrad).stack(SGD).bind(net().parameters()))


@pytest.mark.parametrize("per", ["tensor", "coordinate"])
@pytest.mark.parametrize("scheduler", [ConstantLR, lambda o: LambdaLR(o, lambda _: 1.0)])
def test_a_scheduler_of_several_lrs_is_refused_with_the_remedy(per, scheduler):
    tower = Hyper(SGD, lr=LR, per=per).stack(SGD)
    with pytest.raises(ValueError, match=f"a scheduler sets one lr for a group, and per='{per}' learns several: bind.*schedule=True"):
        scheduler(tower.bind(net().parameters()))
    scheduler(Hyper(SGD, lr=LR, per=per, learn="momentum", momentum=0.5).stack(SGD).bind(net().parameters()))


def test_values_that_cannot_scale_are_refused_or_ignored():
    params = list(net().parameters())
    with pytest.raises(TypeError, match="schedule must be True or False, got 'cosine'"):
        TOWER.bind(params, schedule="cosine")  # pyright: ignore[reportArgumentType]
    model = net()
    optimizer = Hyper(Adam, lr=LR, per="tensor", trust=None).stack(Adam).bind(model.parameters(), schedule=True, hyper_every=NEVER)
    group = optimizer.param_groups[0]
    for wrong, message in ((-1.0, "outside its domain"), (torch.ones(4), "give one number")):
        kept, group["lr"] = group["lr"], wrong
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            train(model, optimizer, range(1))
        assert differences(weights(model), before) == []
        group["lr"] = kept
    group["lr"] = torch.tensor(float("nan"))
    train(model, optimizer, range(1))
    assert optimizer.hyperparameters()["0.lr"].tolist() == pytest.approx([LR] * 4)
