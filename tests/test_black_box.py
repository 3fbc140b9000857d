"""A live optimizer without a rule here goes on as it is, and its lr is learned from how far it moves the weights."""

import copy
import io
import math
import pickle

import pytest
import pytorch_optimizer
import torch
from small import backward, differences, train
from torch import nn

import hyperopt
from hyperopt import Adam, Ball, Hyper
from hyperopt.adopt import COUNTERPARTS, RESOLVED
from hyperopt.rules.black_box import BlackBox


class Mine(torch.optim.SGD):
    """A class that nobody here knows, of which the rule is known."""


OTHERS = {
    "lamb": (pytorch_optimizer.Lamb, {}),
    "soap": (pytorch_optimizer.SOAP, {"weight_decay": 0.0}),
    "adabelief": (pytorch_optimizer.AdaBelief, {}),
    "rprop": (torch.optim.Rprop, {}),
    "mine": (Mine, {"momentum": 0.9}),
}
MUON = hasattr(torch.optim, "Muon")
if MUON:
    OTHERS["muon"] = (torch.optim.Muon, {"weight_decay": 0.0})
LINEAR = [name for name in OTHERS if name not in ("lamb", "rprop")]  # for held gradients the step is lr·d with a d that reads no weights
NO_MUON = pytest.param("muon", marks=pytest.mark.skip(reason="this torch has no Muon"))
every_other = pytest.mark.parametrize("name", [*OTHERS, *[NO_MUON] * (not MUON)])
every_linear = pytest.mark.parametrize("name", [*LINEAR, *[NO_MUON] * (not MUON)])


def net(dtype=torch.float64):
    """Matrices alone, as Muon takes nothing else."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(dtype)


def live(name, model, lr=0.01, **values):
    kind, own = OTHERS[name]
    return kind(model.parameters(), lr=lr, **own, **values)


def pair(name, *above, lr=0.01, dtype=torch.float64, **options):
    """A model and the tower over a live optimizer that trains it."""
    model = net(dtype)
    tower = Hyper(live(name, model, lr), **options)
    for rule in above:
        tower = tower.stack(rule)
    return model, tower.bind()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def snapshot(model, optimizer):
    """Copies of everything that a step may change, in the driven optimizer too."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parts = model.state_dict(), groups, list(optimizer.state.values()), optimizer.driven.optimizer.state_dict()
    return copy.deepcopy(parts)


# ---- alone


@every_other
def test_held_it_is_the_optimizer_alone(name):
    assert OTHERS[name][0] not in COUNTERPARTS
    model, optimizer = pair(name)
    twin = net()
    train(model, optimizer, range(50))
    train(twin, live(name, twin), range(50))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-9)
    assert (flat(model) - flat(net())).norm() > 0.1


def test_maximize_is_the_optimizers_own():
    model, twin = net(), net()
    optimizer = Hyper(live("mine", model, 1e-3, maximize=True)).stack(Adam).bind()
    known = Hyper(torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9, maximize=True)).stack(Adam).bind()
    train(model, optimizer, range(10))
    train(twin, known, range(10))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-12)
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(float(known.hyperparameters()["0.lr"]), rel=1e-10)


# ---- lr


@pytest.mark.parametrize("horizon", [1, 10])
@every_linear
def test_the_hypergradient_of_lr_is_a_finite_difference(name, horizon):
    # The other optimizer alone, with the gradients held and the logarithm of its lr shifted at one step.
    model, optimizer = pair(name, Adam, lr=0.02, horizon=horizon, trust=None)
    grads, rates, found = [], [], []
    for at in range(6):
        backward(model, at)
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        rates.append(float(optimizer.hyperparameters()["0.lr"]))
        found.append(float(optimizer.hypergradients().get("0.lr", 0)))

    def run(shifted, shift):
        twin, ends = net(), []
        alone = live(name, twin)
        for at, gs in enumerate(grads):
            for p, g in zip(twin.parameters(), gs, strict=True):
                p.grad = g.clone()
            alone.param_groups[0]["lr"] = rates[at] * math.exp(shift if at == shifted else 0)
            alone.step()
            ends.append(flat(twin))
        return torch.stack(ends)

    torch.testing.assert_close(run(0, 0)[-1], flat(model), rtol=1e-9, atol=1e-12)
    expected, h, gamma = [0.0] * 6, 1e-3, 1 - 1 / horizon
    for at in range(5):
        dx = (8 * (run(at, h) - run(at, -h)) - (run(at, 2 * h) - run(at, -2 * h))) / (12 * h)
        for later in range(at + 1, 6):
            weight = gamma ** (later - 1 - at) if later > at + 1 else 1
            expected[later] += weight * float(torch.dot(dx[later - 1], torch.cat([g.flatten() for g in grads[later]])))
    assert found[2:] == pytest.approx(expected[2:], rel=1e-6)
    assert all(found[2:])


@pytest.mark.parametrize(("lr", "tolerance"), [(1e-3, 1e-10), (0.05, 1e-10), (1e-6, 1e-6)])
def test_equal_to_the_rule_where_there_is_one(lr, tolerance):
    model, optimizer = pair("mine", Adam, lr=lr)
    twin = net()
    known = Hyper(hyperopt.SGD, lr=lr, momentum=0.9).stack(Adam).bind(twin.parameters())
    for at in range(30):
        train(model, optimizer, range(at, at + 1))
        train(twin, known, range(at, at + 1))
        ours, theirs = optimizer.hyperparameters()["0.lr"], known.hyperparameters()["0.lr"]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
        torch.testing.assert_close(flat(model), flat(twin), rtol=tolerance, atol=tolerance)
    assert abs(float(ours) / lr - 1) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_linear
def test_an_lr_that_is_far_too_small_climbs(name, dtype):
    model, optimizer = pair(name, Adam, lr=1e-6, dtype=dtype)
    train(model, optimizer, range(60))
    assert float(optimizer.param_groups[0]["lr"]) > 1e-5
    assert optimizer.driven.optimizer.param_groups[0]["lr"] == RESOLVED
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}


@pytest.mark.parametrize("height", [0, 1])
@every_linear
def test_an_assigned_lr_is_used(name, height):
    model, optimizer = pair(name, *([hyperopt.SGD(lr=1e-30)] * height), trust=None)
    twin = net()
    alone = live(name, twin)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, alone)]
    for at in range(12):
        if at == 6:
            optimizer.param_groups[0]["lr"] = alone.param_groups[0]["lr"] = 0.003
        train(model, optimizer, range(at, at + 1))
        train(twin, alone, range(at, at + 1))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(alone.param_groups[0]["lr"], rel=1e-12)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)
        for schedule in schedules:
            schedule.step()


@pytest.mark.parametrize("height", [0, 1])
def test_groups_with_an_lr_each(height):
    model, twin = net(), net()
    first, second = ([{"params": [p], "lr": lr} for p, lr in zip(m.parameters(), (0.1, 0.004), strict=True)] for m in (model, twin))
    tower = Hyper(Mine(first, momentum=0.9), trust=None)
    optimizer = (tower.stack(hyperopt.SGD, lr=1e-30) if height else tower).bind()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1, 0.004]
    train(model, optimizer, range(20))
    train(twin, torch.optim.SGD(second, lr=1.0, momentum=0.9), range(20))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-12)


def test_groups_learn_an_lr_each():
    model = net()
    optimizer = Hyper(Mine([{"params": [p], "lr": 1e-3} for p in model.parameters()])).stack(Adam).bind()
    train(model, optimizer, range(20))
    values = optimizer.hyperparameters()
    assert min(float(values[name]) for name in ("0.lr[0]", "0.lr[1]")) > 2e-3
    assert float(values["0.lr[0]"]) != float(values["0.lr[1]"])


# ---- gradients


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_other
def test_a_gradient_that_is_not_finite_leaves_everything(name, value):
    model, optimizer = pair(name, Adam, dtype=torch.float32)
    train(model, optimizer, range(4))
    twin, other = copy.deepcopy((model, optimizer))
    backward(model, 4)
    model[0].weight.grad[1, 2] = value
    before = snapshot(model, optimizer)
    optimizer.step()
    after = snapshot(model, optimizer)
    assert set(differences(before, after)) <= {"[1][0].tower.calls: 4 != 5", "[1][0].tower.skipped[0]"}
    assert optimizer.skipped["gradients"] == 1
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(5, 8))
    assert torch.equal(flat(model), flat(twin))


@every_other
def test_a_parameter_without_a_gradient_stays(name):
    model, optimizer = pair(name, Adam)
    start = flat(model)
    for at in range(8):
        backward(model, at)
        if at % 3 != 2:
            model[2].weight.grad = None
        before = model[2].weight.detach().clone()
        optimizer.step()
        assert torch.equal(model[2].weight, before) == (at % 3 != 2)
    assert (flat(model) - start)[:20].all()
    model[0].weight.grad = model[2].weight.grad = None
    before = snapshot(model, optimizer)
    optimizer.step()
    assert differences(before, snapshot(model, optimizer)) == []


def test_weights_stay_in_a_set():
    model, optimizer = pair("mine", Adam, lr=0.05, project=Ball(1))
    norms = []
    for at in range(20):
        train(model, optimizer, range(at, at + 1))
        norms.append(float(flat(model).norm()))
    assert norms[0] == pytest.approx(1, rel=1e-12)
    assert max(norms) < 1 + 1e-12


# ---- copies


@pytest.mark.parametrize("way", ["checkpoint", "deepcopy", "pickle"])
@every_other
def test_goes_on_bit_for_bit(name, way):
    model, optimizer = pair(name, Adam, dtype=torch.float32)
    train(model, optimizer, range(6))
    if way == "checkpoint":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin, other = pair(name, Adam, lr=0.5, dtype=torch.float32)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin, other = copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
        assert other.driven.optimizer.param_groups[0]["params"][0] is twin[0].weight
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(6, 14))
    assert differences(snapshot(model, optimizer), snapshot(twin, other)) == []
    assert not torch.equal(flat(model), flat(net(torch.float32)))


def test_a_checkpoint_without_the_driven_optimizer():
    model, optimizer = pair("mine", Adam)
    train(model, optimizer, range(3))
    given, before = copy.deepcopy(optimizer.state_dict()), snapshot(model, optimizer)
    del given["driven"]
    with pytest.raises(ValueError, match="no state of the optimizer that is driven"):
        optimizer.load_state_dict(given)
    assert differences(before, snapshot(model, optimizer)) == []


def test_a_checkpoint_of_another_driven_optimizer():
    model, optimizer = pair("mine", Adam)
    train(model, optimizer, range(3))
    other_model, other = pair("rprop", Adam)
    before = snapshot(other_model, other)
    with pytest.raises(ValueError, match=r"is of another tower: .*optimizer=Mine.*this one is .*optimizer=Rprop"):
        other.load_state_dict(optimizer.state_dict())
    assert differences(before, snapshot(other_model, other)) == []


def test_text():
    model = net()
    tower = Hyper(live("mine", model)).stack(Adam)
    assert str(tower) == "BlackBox(lr=0.01, optimizer=Mine) / Adam"
    again = Hyper.parse(str(tower))
    assert again == tower
    assert again.rule == tower.rule == BlackBox(lr=0.01, optimizer="Mine")
    with pytest.raises(ValueError, match="live Mine"):
        again.bind(model.parameters())


# ---- refused


def group_without_lr(model):
    optimizer = live("mine", model)
    del optimizer.param_groups[0]["lr"]
    return optimizer


def groups_that_differ(model):
    first, second = model.parameters()
    return Mine([{"params": [first]}, {"params": [second], "maximize": True}], lr=0.1)


BAD = [
    (lambda model: Hyper(torch.optim.LBFGS(model.parameters())), ValueError, "LBFGS.step needs a closure .* cannot be driven"),
    (
        lambda model: Hyper(pytorch_optimizer.Lamb),
        ValueError,
        r"there is no rule for Lamb: .* give a live one, Hyper\(Lamb\(params, lr=…\)\)",
    ),
    (lambda model: Hyper(Adam).stack(pytorch_optimizer.Lamb), ValueError, "there is no rule for Lamb"),
    (lambda model: Hyper(Hyper(Adam).bind(model.parameters())), ValueError, "is a bound tower already: stack levels on the tower"),
    (lambda model: Hyper(live("mine", model), lr=0.1), ValueError, "lr was given for a live optimizer, which brings its own values"),
    (lambda model: Hyper(live("mine", model), learn="momentum"), ValueError, "has no hyperparameter 'momentum' to learn: it has lr"),
    (lambda model: Hyper(live("mine", model)).stack(lr=Adam, momentum=Adam), ValueError, "has no hyperparameter 'momentum' to learn"),
    (lambda model: Hyper(live("mine", model)).bind(model.parameters()), TypeError, "it has its own"),
    (lambda model: Hyper(Adam).stack(live("mine", model)), ValueError, "a live optimizer .* can only be level 0"),
    (lambda model: Hyper(live("mine", model, 0.0)), ValueError, "lr = 0.0: only an lr above 0 can be learned"),
    (lambda model: Hyper(group_without_lr(model)), ValueError, "lr = None: only an lr above 0"),
    (lambda model: Hyper(groups_that_differ(model)), ValueError, "the groups differ in maximize"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(net())


def test_a_group_cannot_be_added_later():
    model, optimizer = pair("mine", Adam)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"is driven as a whole: add the parameters to it before"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert differences(before, snapshot(model, optimizer)) == []
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_where_lr_is_learned_and_changes_nothing(dtype):
    """Most displacements at lr = 1e-3 are below the resolution of a bfloat16 weight of 0.5, which is 2e-3."""
    other = live("mine", net(dtype), 1e-5)
    kept = copy.deepcopy(other.state_dict())
    message = (
        f"Mine has parameters in {str(dtype)[6:]}, .* keep the parameters in float32 and compute in {str(dtype)[6:]} under torch.autocast"
    )
    with pytest.raises(TypeError, match=message):
        Hyper(other).stack(Adam).bind()
    assert differences(other.state_dict(), kept) == []
    Hyper(other).bind()  # a held lr: the displacements are the other optimizer's own
