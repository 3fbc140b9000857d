"""Replay: plain torch.optim with what a tower learned is the tower; resuming, groups, gaps, and errors that say what to do."""

import copy

import numpy as np
import pytest
import torch
from small import backward, differences, net, snapshot, train

from hyperopt import SGD, Adagrad, Adam, AdamW, Hyper, NAdam, RAdam, Recorder, Replay, RMSprop, ScheduleFree

STEPS = 60
PRECISION = 1e-6  # relative, float32
# 1 − beta2 is known to 6e-5 of itself once a beta2 near .999 is rounded to float32, as a recording of float32 has it.
WAYS = [("recorder", torch.float32, PRECISION), ("csv", torch.float32, PRECISION), ("mapping", torch.float32, PRECISION)]
WAYS += [("recorder", torch.float64, 1e-10), ("mapping", torch.float64, 1e-10)]
ROUNDED = {("beta2", torch.float32): 5e-6}
TOWERS = [
    (Hyper(Adam, lr=1e-3, eps=1e-3, learn=("lr", "beta1", "beta2", "eps")), torch.optim.Adam),
    (Hyper(AdamW, lr=1e-3, learn=("lr", "beta1", "weight_decay")), torch.optim.AdamW),
    (Hyper(SGD, lr=1e-2, momentum=0.5, weight_decay=1e-3, learn=("lr", "momentum", "weight_decay")), torch.optim.SGD),
    (Hyper(RMSprop, lr=1e-3, alpha=0.9, learn=("lr", "alpha")), torch.optim.RMSprop),
    (Hyper(Adagrad, lr=1e-3, initial_accumulator_value=0.1), torch.optim.Adagrad),
    (Hyper(NAdam, lr=1e-3, learn=("lr", "momentum_decay")), torch.optim.NAdam),
    (Hyper(RAdam, lr=1e-3, learn=("lr", "beta2")), torch.optim.RAdam),
]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def learned(tower, groups=1, every=1, dtype=torch.float32):
    """A tower that trained: its model and what was recorded."""
    model = net(dtype)
    params = list(model.parameters())
    optimizer = tower.stack(Adam, lr=0.05).bind([{"params": params[i::groups]} for i in range(groups)])
    with Recorder(optimizer, every) as recorder:
        train(model, optimizer, range(STEPS))
    return model, recorder


def replay(model, optimizer, source, steps=range(STEPS), **options):
    schedule = Replay(optimizer, source, **options)
    for step in steps:
        backward(model, step)
        optimizer.step()
        schedule.step()
    return schedule


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("tower", "make"), TOWERS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize(("way", "dtype", "precision"), WAYS)
def test_plain_torch_with_what_was_learned_is_the_tower(tower, make, way, dtype, precision, tmp_path):
    expected, recorder = learned(tower, dtype=dtype)
    recorder.to_csv(tmp_path / "schedule.csv")
    source = {"recorder": recorder, "csv": tmp_path / "schedule.csv", "mapping": dict(recorder.values)}[way]
    for name in tower.learned:
        precision = max(precision, ROUNDED.get((name, dtype), 0))
        column = recorder.values[f"0.{name}"]
        moved = max(column.max() / column.min(), (1 - column.min()) / (1 - column.max()))  # a decay by its distance from 1
        assert moved > 1.05, f"{name} was not learned: the comparison below says nothing"
    start, model = weights(net(dtype)), net(dtype)
    extra = {"initial_accumulator_value": 0.1} if make is torch.optim.Adagrad else {}  # used when it is made
    replay(model, make(model.parameters(), **extra), source)
    assert (weights(model) - weights(expected)).norm() <= precision * weights(expected).norm()
    assert (weights(model) - start).norm() > 0.1 * start.norm()


def test_a_rule_that_torch_lacks_is_replayed_on_ours():
    expected, recorder = learned(Hyper(ScheduleFree(Adam), lr=1e-3))
    model = net()
    optimizer = Hyper(ScheduleFree(Adam)).bind(model.parameters())
    replay(model, optimizer, recorder)
    assert (weights(model) - weights(expected)).norm() <= PRECISION * weights(expected).norm()


def test_each_parameter_group_has_its_own():
    expected, recorder = learned(Hyper(Adam, lr=1e-3), groups=2)
    assert not np.array_equal(recorder.values["0.lr[0]"], recorder.values["0.lr[1]"])
    model = net()
    params = list(model.parameters())
    replay(model, torch.optim.Adam([{"params": params[i::2]} for i in range(2)]), recorder)
    assert (weights(model) - weights(expected)).norm() <= PRECISION * weights(expected).norm()


def test_only_what_is_named():
    _, recorder = learned(Hyper(Adam, lr=1e-3, learn=("lr", "beta1")))
    optimizer = torch.optim.Adam(net().parameters(), betas=(0.3, 0.4))
    schedule = Replay(optimizer, recorder, names="lr")
    for value in recorder.values["0.lr"]:
        assert schedule.get_last_lr() == [pytest.approx(value, rel=1e-7)]
        schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.3, 0.4)
    Replay(optimizer, recorder, names=("beta1",))
    assert optimizer.param_groups[0]["betas"] == (pytest.approx(recorder.values["0.beta1"][0]), 0.4)


def test_between_samples_by_a_line_and_beyond_them_the_last():
    optimizer = torch.optim.SGD(net().parameters())
    schedule = Replay(optimizer, {"step": [2, 4], "lr": [1.0, 3.0]})
    seen = []
    for _ in range(6):
        seen += schedule.get_last_lr()
        schedule.step()
    assert seen == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_thinned_recording():
    _, recorder = learned(Hyper(Adam, lr=1e-3), every=7)
    optimizer = torch.optim.Adam(net().parameters())
    schedule = Replay(optimizer, recorder)
    for step in range(1, STEPS + 1):
        if step in recorder.steps:
            assert schedule.get_last_lr()[0] == pytest.approx(recorder.values["0.lr"][step // 7 - 1], rel=1e-7)
        schedule.step()


def test_the_decimal_that_was_meant():
    optimizer = torch.optim.Adam(net().parameters())
    Replay(optimizer, {"beta2": torch.tensor([0.999]), "lr": np.array([1 / 3])})
    assert optimizer.param_groups[0]["betas"][1] == 0.999
    assert optimizer.param_groups[0]["lr"] == 1 / 3  # a float64 that float32 does not hold is left as it is


def test_a_tensor_lr_is_filled_in_place():
    lr = torch.tensor(1.0)
    optimizer = torch.optim.Adam(net().parameters(), lr=lr, foreach=False)
    Replay(optimizer, {"lr": [0.25]})
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.25


def test_resumes_bit_for_bit():
    _, recorder = learned(Hyper(Adam, lr=1e-3, learn=("lr", "beta1")))
    whole = net()
    optimizer = torch.optim.Adam(whole.parameters())
    replay(whole, optimizer, recorder)
    model = net()
    first = torch.optim.Adam(model.parameters())
    schedule = replay(model, first, recorder, range(20))
    kept = copy.deepcopy((first.state_dict(), schedule.state_dict()))
    second = torch.optim.Adam(model.parameters())
    second.load_state_dict(kept[0])
    resumed = Replay(second, recorder)
    resumed.load_state_dict(kept[1])
    for step in range(20, STEPS):
        backward(model, step)
        second.step()
        resumed.step()
    assert differences(snapshot(model, second), snapshot(whole, optimizer)) == []
    assert resumed.last_step == STEPS


@pytest.mark.parametrize(
    ("make", "source", "names", "error", "message"),
    [
        (torch.optim.SGD, {}, None, ValueError, "a schedule cannot be replayed: nothing of level 0 was recorded"),
        (torch.optim.SGD, {"1.lr": [0.1]}, None, ValueError, "nothing of level 0 was recorded"),
        (torch.optim.SGD, {"lr": []}, None, ValueError, "a schedule without a step cannot be replayed: record at least one"),
        (torch.optim.SGD, {"lr": [0.1]}, ("lr", "mu"), ValueError, "mu cannot be replayed: lr was recorded"),
        (torch.optim.SGD, {"beta1": [0.1]}, None, ValueError, "SGD has no hyperparameter 'beta1': it has lr, .*leave 'beta1' out of names"),
        (torch.optim.Adam, {"beta3": [0.1]}, None, ValueError, "Adam has no hyperparameter 'beta3': it has .*beta1, beta2"),
        (torch.optim.SGD, {"lr[1]": [0.1]}, None, ValueError, r"lr\[1\] was recorded, and SGD has 1 parameter groups"),
        (torch.optim.SGD, {"lr": [0.1, float("nan")]}, None, ValueError, "lr needs one finite number for each of 2 steps"),
        (torch.optim.SGD, {"lr": [0.1, 0.2], "momentum": [0.1]}, None, ValueError, "momentum needs one finite number for each of 2 steps"),
        (torch.optim.SGD, {"step": [2, 1], "lr": [0.1, 0.2]}, None, ValueError, "steps of a schedule must increase"),
        (torch.optim.SGD, [0.1, 0.2], None, TypeError, "Recorder, the path of its CSV or a mapping, got list"),
    ],
)
def test_errors_name_the_remedy_and_change_nothing(make, source, names, error, message):
    optimizer = make(net().parameters(), lr=0.7)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        Replay(optimizer, source, names)
    assert differences(optimizer.state_dict(), before) == []


def test_no_optimizer_and_a_foreign_state():
    with pytest.raises(TypeError, match=r"needs an optimizer of torch, got Linear: give torch.optim.Adam"):
        Replay(torch.nn.Linear(1, 1), {"lr": [0.1]})  # pyright: ignore[reportArgumentType]
    schedule = Replay(torch.optim.SGD(net().parameters()), {"lr": [0.1]})
    with pytest.raises(ValueError, match="not the state of a Replay: it has base_lrs, and needs last_step"):
        schedule.load_state_dict({"base_lrs": [0.1]})
