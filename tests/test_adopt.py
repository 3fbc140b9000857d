"""Taking over a live torch optimizer: every class that has a rule, each flag, its groups, its values and its state."""

import copy

import pytest
import torch
from small import backward, net, train
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

import hyperopt
from hyperopt import Hyper, rules
from hyperopt.adopt import COUNTERPARTS, rule_of

LIVE = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    (Adagrad, {"lr": 0.1}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 0.01}),
    (RMSprop, {"lr": 0.01}),
    (RMSprop, {"lr": 0.01, "momentum": 0.9, "alpha": 0.9}),
    (RMSprop, {"lr": 0.01, "momentum": 0.5, "alpha": 0.9, "weight_decay": 0.1, "centered": True}),
    (Adadelta, {"rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    (Adam, {"lr": 0.05, "betas": (0.8, 0.5), "amsgrad": True}),
    (Adam, {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.05, "betas": (0.8, 0.5), "amsgrad": True}),
    (NAdam, {"lr": 0.05, "momentum_decay": 0.1, "weight_decay": 0.1}),
    (NAdam, {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    (RAdam, {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    (RAdam, {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (Adamax, {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}),
]

every_class = pytest.mark.parametrize("kind", COUNTERPARTS, ids=lambda kind: kind.__name__)
every_live = pytest.mark.parametrize(
    ("kind", "values"), LIVE, ids=[f"{kind.__name__}-{'-'.join(n for n in values if n not in ('lr', 'betas'))}" for kind, values in LIVE]
)


@pytest.fixture(autouse=True)
def _double():
    """torch keeps NAdam's product in the default dtype, whatever the parameters have."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def live(make, steps=5, dtype=torch.float64):
    """A torch optimizer after some steps, and a twin that nobody takes over."""
    model = net(dtype)
    optimizer = make(model.parameters())
    train(model, optimizer, range(steps))
    twin = copy.deepcopy(model)
    other = make(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, optimizer, twin, other


def equal(model, twin):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_every_class_with_a_rule_is_tested():
    assert {kind for kind, _ in LIVE} == set(COUNTERPARTS)
    flags = {(kind, flag) for kind, counterpart in COUNTERPARTS.items() for flag in counterpart.options}
    assert flags == {(kind, flag) for kind, values in LIVE for flag in values if (kind, flag) in flags}


@every_class
def test_defaults_are_those_of_torch(kind):
    assert rule_of(kind([torch.ones(2)])) == getattr(rules, kind.__name__)()
    assert getattr(hyperopt, kind.__name__) is getattr(rules, kind.__name__)
    assert Hyper(kind) == Hyper(getattr(rules, kind.__name__))


@pytest.mark.parametrize("steps", [0, 5])
@every_live
def test_it_goes_on_as_it_would_have(kind, values, steps):
    model, optimizer, twin, other = live(lambda params: kind(params, **values), steps)
    before = copy.deepcopy(optimizer.state_dict())
    taken = Hyper(optimizer).bind()
    for chosen, theirs in ((model, taken), (twin, other)):
        train(chosen, theirs, range(5, 15))
    equal(model, twin)
    assert (model[0].weight - net(torch.float64)[0].weight).norm() > 0.01
    for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old), "the state was changed under the old optimizer"


@pytest.mark.parametrize("height", [0, 1])
@every_class
def test_groups_with_values_of_their_own(kind, height):
    def make(params):
        first, *rest = params
        own = {"lr": 0.01, "weight_decay": 0.2}
        own |= {"initial_accumulator_value": 0.3} if kind is Adagrad else {"momentum": 0.5} if kind in (SGD, RMSprop) else {}
        return kind([{"params": [first], **own}, {"params": rest}], lr=0.03, weight_decay=0.1)

    model, optimizer, twin, other = live(make)
    tower = Hyper(optimizer, trust=None)
    taken = (tower.stack(hyperopt.SGD, lr=1e-30) if height else tower).bind()
    assert [float(group["weight_decay"]) for group in taken.param_groups] == [0.2, 0.1]
    for chosen, theirs in ((model, taken), (twin, other)):
        train(chosen, theirs, range(5, 15))
    equal(model, twin)


@every_live
def test_a_level_on_top_learns_its_lr(kind, values):
    model, optimizer, *_ = live(lambda params: kind(params, **values))
    taken = Hyper(optimizer, trust=None).stack(hyperopt.Adam).bind()  # trust moves lr too
    before = float(taken.hyperparameters()["0.lr"])
    train(model, taken, range(5, 10))
    assert float(taken.hypergradients()["0.lr"]) != 0
    assert abs(float(taken.hyperparameters()["0.lr"]) / before - 1) > 1e-3


@every_class
def test_bfloat16_and_absent_gradients(kind):
    model, optimizer, _, _ = live(kind, dtype=torch.bfloat16)
    taken = Hyper(optimizer).bind()
    backward(model, 5)
    for p in list(model.parameters())[1:]:
        p.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    taken.step()
    moved = [not p.equal(q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved[1:] == [False, False, False]
    assert all(value.dtype == torch.float32 for value in taken.state[model[0].weight].values())


def test_dampening_of_an_optimizer_that_had_no_momentum_yet():
    model, optimizer, twin, other = live(lambda params: SGD(params, lr=0.1))
    for theirs in (optimizer, other):
        theirs.param_groups[0].update(momentum=0.9, dampening=0.4)
    taken = Hyper(optimizer).bind()
    for chosen, theirs in ((model, taken), (twin, other)):
        train(chosen, theirs, range(5, 15))
    equal(model, twin)


@every_class
def test_refused(kind):
    model = net()
    with pytest.raises(ValueError, match=r"differentiable=True\) has no rule here"):
        Hyper(kind(model.parameters(), differentiable=True))
    with pytest.raises(TypeError, match="it has its own"):
        Hyper(kind(model.parameters())).bind(model.parameters())
    for flag in (*COUNTERPARTS[kind].options, "maximize"):
        first, *rest = model.parameters()
        optimizer = kind([{"params": [first]}, {"params": rest}])
        optimizer.param_groups[1][flag] = not optimizer.param_groups[1][flag]
        with pytest.raises(ValueError, match=f"the groups differ in {flag}"):
            Hyper(optimizer)


def test_an_optimizer_that_evaluates_the_model_itself_is_refused():
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure"):
        Hyper(torch.optim.LBFGS(net().parameters()))
