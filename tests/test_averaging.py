"""Schedule-Free against its authors' package, Averaged against torch's, their tangents, and the context that evaluates."""

import copy
import dataclasses
import math
import pickle
from functools import partial

import pytest
import schedulefree
import torch
from cases import CASES
from small import differences, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hyperopt
from hyperopt import SGD, Adam, AdamW, Averaged, Hyper, Rule, ScheduleFree
from hyperopt.variant import Variant


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model, at):
    generator = torch.Generator().manual_seed(at)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    model.zero_grad()
    (model(x) - x[:, :3].sin()).square().mean().backward()


PEERS = {
    "adam": (Hyper(ScheduleFree(Adam), lr=0.01, trust=None), lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, foreach=False)),
    "adamw": (
        Hyper(ScheduleFree(AdamW), lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.99, trust=None),
        lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), foreach=False),
    ),
    "sgd": (Hyper(ScheduleFree(SGD), lr=0.5, trust=None), lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, foreach=False)),
    "sgd, decay": (
        Hyper(ScheduleFree(SGD), lr=0.5, weight_decay=0.01, beta1=0.7, trust=None),
        lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, weight_decay=0.01, momentum=0.7, foreach=False),
    ),
}


@pytest.mark.parametrize("held", [False, True], ids=["alone", "held by a top"])
@pytest.mark.parametrize("name", PEERS)
def test_equal_to_the_authors_package_over_100_steps(name, held):
    tower, peer = PEERS[name]
    model, twin = net(), net()
    if held:
        tower = tower.stack(SGD, lr=1e-30)
    optimizer, reference = tower.bind(model.parameters()), peer(twin.parameters())
    reference.train()
    for at in range(100):
        for m, o in ((model, optimizer), (twin, reference)):
            backward(m, at)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    reference.eval()
    with optimizer.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "learn", "extra"),
    [(Adam, "lr", 1), (ScheduleFree(Adam), "lr", 2), (ScheduleFree(SGD), "lr", 2), (ScheduleFree(SGD), "lr, beta1", 3)],
)
def test_learning_keeps_a_tangent_of_each_sequence_that_is_free(rule, learn, extra):
    sizes = []
    for tower in (Hyper(rule), Hyper(rule, learn=learn.split(", ")).stack(Adam)):
        model = net()
        optimizer = tower.bind(model.parameters())
        for at in range(3):
            backward(model, at)
            optimizer.step()
        sizes.append(sum(value.numel() for p in model.parameters() for value in optimizer.state[p].values() if value.shape == p.shape))
    assert sizes[1] - sizes[0] == extra * flat(model).numel()


@pytest.mark.parametrize("per", ["group", "tensor", "coordinate"])
@pytest.mark.parametrize("learn", [("lr",), ("lr", "beta1")], ids=["lr", "two"])
@pytest.mark.parametrize("base", [Adam, SGD])
def test_a_step_in_two_halves_is_that_in_one(base, learn, per, monkeypatch):
    found = []
    for fixed in (True, False):
        if not fixed:  # nothing is known of what the direction depends on
            monkeypatch.setattr("hyperopt.tangents.read_by_direction", lambda rule: rule.declared().keys())
        model = net()
        # From 10. lr is projected down.
        tower = Hyper(ScheduleFree(base), lr=10.0, learn=learn, per=per, horizon=20).stack(Adam)
        optimizer = tower.bind(model.parameters())
        assert optimizer._groups()[0].body.tangents.fixed is fixed
        qs = []
        for at in range(12):
            backward(model, at)
            if at == 6:
                optimizer.param_groups[0]["lr"] = 0.02
            if at == 8:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()
            qs += optimizer.hypergradients().values()
        assert optimizer.skipped["gradients"] == 1
        found.append([flat(model), *qs, *optimizer.hyperparameters().values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, equal_nan=True)  # of the step that does not count


def test_a_weight_decay_that_is_assigned_decays():
    model = net()
    optimizer = Hyper(ScheduleFree(Adam)).stack(Adam).bind(model.parameters())
    group = optimizer._groups()[0]
    for decays, at in ((False, 0), (True, 4)):
        if at:
            optimizer.param_groups[0]["weight_decay"] = 5.0
        norms = [flat(model).norm()]
        for step in range(at, at + 4):
            backward(model, step)
            optimizer.step()
            norms.append(flat(model).norm())
        assert group.body.rule._decays() is decays
    assert norms[-1] < 0.99 * norms[0]


@pytest.mark.parametrize("horizon", [1, 10])
def test_saved_and_loaded_with_everything_learned_and_a_gradient_missing(horizon):
    tower = Hyper(ScheduleFree(Adam), learn=("lr", "beta1", "beta2"), horizon=horizon).stack(Adam)

    def run(model, optimizer, steps):
        for at in steps:
            backward(model, at)
            if at == 2:
                model[0].bias.grad = None
            optimizer.step()

    model, twin = net(), net()
    optimizer, resumed = tower.bind(model.parameters()), tower.bind(twin.parameters())
    assert optimizer.hypergradients() == {}
    run(model, optimizer, range(4))
    for p in model.parameters():
        assert {value.shape for key, value in optimizer.state[p].items()} <= {p.shape, torch.Size()}
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for each in (model, optimizer), (twin, resumed):
        run(*each, range(4, 8))
    assert torch.equal(flat(model), flat(twin))
    assert optimizer.hyperparameters() == resumed.hyperparameters()


@pytest.mark.filterwarnings("ignore:torch .* loses float64 numbers:RuntimeWarning")  # torch 2.11 steps eagerly
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_above_level_0_what_was_assigned_is_gone_on_from(compile):
    model = net()
    optimizer = Hyper(Adam, lr=0.01, trust=None).stack(ScheduleFree(Adam)).bind(model.parameters(), compile=compile)
    moves = []
    for at in range(8):
        if at == 4:
            optimizer.param_groups[0]["lr"] = 0.5
        backward(model, at)
        before = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        moves.append(abs(math.log(float(optimizer.param_groups[0]["lr"]) / before)))
    assert moves[4] < 1e-6
    assert 0 < max(moves) < 0.2, "a step of Adam above level 0 is .1"
    assert max(moves[5:]) > 0


def test_nothing_is_said_of_values_before_there_is_a_tangent():
    model = net()
    optimizer = Hyper(ScheduleFree(Adam)).stack(Adam).bind(model.parameters())
    for at, names in ((0, set()), (1, {"0.lr"})):
        backward(model, at)
        optimizer.step()
        assert optimizer.hypergradients().keys() == names


@pytest.mark.one_in(4)
@pytest.mark.filterwarnings("ignore:torch .* loses float64 numbers:RuntimeWarning")  # torch 2.11 steps eagerly
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("per", ["group", "tensor", "coordinate"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_what_a_large_model_learns_is_summed_over_blocks(per, compile, monkeypatch):
    """Tangents of y are made block by block."""
    learned = []
    for block in (10, 2**18):
        monkeypatch.setattr("hyperopt.body.buffers.BLOCK", block)
        monkeypatch.setattr("hyperopt.body.choose.LARGE", 20)
        model = net()
        optimizer = Hyper(ScheduleFree(Adam), learn=("lr", "beta1"), per=per).stack(Adam).bind(model.parameters(), compile=compile)
        for at in range(8):
            backward(model, at)
            optimizer.step()
        learned.append(optimizer.hypergradients())
        assert all(q.abs().max() > 0 for q in learned[-1].values())
    torch.testing.assert_close(*learned, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["lr", "beta1"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("base", [Adam, SGD])
def test_the_hypergradient_runs_through_the_average(base, decay, name):
    # horizon inf with lr moved once, at the start, for all steps: q is the derivative of the whole run with gradients held, of the average
    # and of the place of y between it and z, whose distance from it is held. Raw values are log lr and the logit of beta1.
    rule = ScheduleFree(base)(lr=0.01, beta1=0.8, weight_decay=decay)
    tower = Hyper(rule, learn=("lr", "beta1"), horizon=math.inf, trust=None).stack(SGD, lr=1e-30)
    model = net()
    optimizer = tower.bind(model.parameters())
    held = []
    for at in range(6):
        if at == 5:
            away = {i: optimizer.state[p]["gap"].clone() for i, p in enumerate(model.parameters())}
        backward(model, at)
        held.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    q = float(optimizer.hypergradients()[f"0.{name}"])

    def inner(shift):
        twin = net()
        values = {"lr": 0.01 * math.exp(shift)} if name == "lr" else {"beta1": 1 / (1 + math.exp(-math.log(0.8 / 0.2) - shift))}
        run = Hyper(rule).replace(**values).bind(twin.parameters())
        for grads in held[:-1]:
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.grad = g.clone()
            run.step()
        with run.averaged():
            weights = [p.detach() + (1 - values.get("beta1", 0.8)) * away[i] for i, p in enumerate(twin.parameters())]
            return sum(float((w * g).sum()) for w, g in zip(weights, held[-1], strict=True))

    eps = 1e-4
    assert q == pytest.approx((inner(eps) - inner(-eps)) / (2 * eps), rel=1e-6)


@pytest.mark.parametrize("rule", [ScheduleFree(Adam), Averaged(Adam)], ids=["free", "beside"])
def test_the_context_nests_survives_exceptions_and_returns_every_bit(rule):
    model = net(torch.bfloat16)
    optimizer = Hyper(rule, lr=0.05).stack(Adam).bind(model.parameters())
    with optimizer.averaged():
        pass  # nothing to swap before the first step
    for at in range(5):
        backward(model, at)
        optimizer.step()
    before = copy.deepcopy(model.state_dict())

    def evaluate():
        with optimizer.averaged():
            inside = copy.deepcopy(model.state_dict())
            with optimizer.averaged():
                pass
            assert all(torch.equal(inside[k], v) for k, v in model.state_dict().items())
            kept = [optimizer.state[p].get("average") for p in model.parameters()]
            assert all(a is None or torch.equal(p, a.bfloat16()) for p, a in zip(model.parameters(), kept, strict=True))
            assert not torch.equal(inside["0.weight"], before["0.weight"])
            optimizer.step()

    with pytest.raises(RuntimeError, match="inside averaged"):
        evaluate()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_without_averaging_the_context_changes_nothing():
    model = net()
    optimizer = Hyper(Adam).bind(model.parameters())
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged():
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("way", ["checkpoint", "deepcopy", "pickle"])
@pytest.mark.parametrize("rule", [ScheduleFree(Adam), Averaged(Adam)], ids=["free", "beside"])
def test_goes_on_bit_for_bit(rule, way):
    tower = Hyper(rule, lr=0.01).stack(Adam)
    model = net(torch.float32)
    optimizer = tower.bind(model.parameters())
    for at in range(5):
        backward(model, at)
        optimizer.step()
    if way == "checkpoint":
        twin = copy.deepcopy(model)
        other = tower.bind(twin.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        make = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        twin, other = make((model, optimizer))
    for at in range(5, 10):
        for m, o in ((model, optimizer), (twin, other)):
            backward(m, at)
            o.step()
    with optimizer.averaged(), other.averaged():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(optimizer.hyperparameters()["0.lr"], other.hyperparameters()["0.lr"])


def test_per_coordinate_and_text():
    tower = Hyper.parse("ScheduleFree(Adam)(lr=0.01, per=coordinate) / Adam")
    assert Hyper.parse(str(tower)) == tower
    model = net()
    optimizer = tower.bind(model.parameters())
    for at in range(5):
        backward(model, at)
        optimizer.step()
    assert optimizer.hyperparameters()["0.lr"].shape == (sum(p.numel() for p in model.parameters()),)
    with pytest.raises(ValueError, match="values go behind it"):
        Hyper.parse("ScheduleFree(Adam, lr=0.1)")
    with pytest.raises(TypeError, match="a rule with a first moment"):
        ScheduleFree(int)


# ---- Averaged


DECAY = 0.9
RULES = {name: found for name, found in vars(hyperopt).items() if isinstance(found, Variant)}
RULES |= {
    name: found for name, found in vars(hyperopt).items() if isinstance(found, type) and issubclass(found, Rule) and found is not Rule
}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_rule = pytest.mark.parametrize("base", RULES.values(), ids=RULES)


def averaged(rule, decay=DECAY):
    """`rule` with its values and options, and an average beside it."""
    return Averaged(type(rule))(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}, decay=decay)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(tower, gradients, seen=None):
    """The small model and its optimizer after a step with each of `gradients`, taken from `seen` if they are numbers."""
    model = net()
    optimizer = tower.bind(model.parameters())
    for gs in gradients:
        if isinstance(gs, int):
            backward(model, gs)
        else:
            for p, g in zip(model.parameters(), gs, strict=True):
                p.grad = g.clone()
        if seen is not None:
            seen.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return model, optimizer


def test_every_rule_of_the_catalogue_has_a_row():
    assert {type(case.rule) for case in CASES} == {type(base()) for base in RULES.values()}
    assert len(RULES) > 15


@every_case
def test_the_average_is_torchs_started_from_nothing_and_training_is_that_of_the_rule(case):
    model, twin = net(), net()
    reference = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    reference.n_averaged.fill_(1)  # torch would start from the initial weights
    for p in reference.parameters():
        p.detach().zero_()
    pairs = (model, Hyper(averaged(case.rule)).bind(model.parameters())), (twin, Hyper(case.rule).bind(twin.parameters()))
    for at in range(100):
        for m, optimizer in pairs:
            backward(m, at)
            optimizer.step()
        reference.update_parameters(twin)
    # Adam alone steps with a kernel of torch's own, which rounds differently.
    atol = 1e-12 if pairs[1][1]._groups()[0].body.kernel else 0
    torch.testing.assert_close(flat(model), flat(twin), rtol=0, atol=atol)
    assert (flat(model) - flat(net())).norm() > 0.01
    expected = flat(reference) / (1 - DECAY**100)
    with pairs[0][1].averaged():
        torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flat(model), flat(twin), rtol=0, atol=atol)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("alone", [False, True], ids=["all", "lr"])
@every_case
def test_learning_is_that_of_the_rule(case, alone):
    # Where lr alone is learned the bare rule may make its tangents in another way, and rounds differently.
    learn = ("lr",) if alone else case.learnable
    (model, ours), (twin, theirs) = (
        trained(Hyper(rule, learn=learn, horizon=10).stack(Adam), range(10)) for rule in (averaged(case.rule), case.rule)
    )
    values, expected = ours.hyperparameters(), theirs.hyperparameters()
    if len(learn) > 1:
        assert torch.equal(flat(model), flat(twin))
        assert all(torch.equal(values[name], value) for name, value in expected.items())
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close({name: values[name] for name in expected}, expected, rtol=1e-10, atol=1e-10)
    assert abs(float(values["0.lr"]) / case.rule.lr - 1) > 1e-3


@every_rule
def test_training_gradients_say_nothing_about_the_decay(base):
    spec = Hyper(Averaged(base, decay=DECAY), learn=("lr", "decay"), prior=None)  # a prior would move it
    model, optimizer = trained(spec.stack(Adam), range(10))
    before = optimizer.hyperparameters()["0.decay"]
    for at in range(10, 20):
        backward(model, at)
        optimizer.step()
    assert float(optimizer.hypergradients()["0.decay"]) == 0
    assert float(optimizer.hypergradients()["0.lr"]) != 0
    assert torch.equal(optimizer.hyperparameters()["0.decay"], before)
    assert float(before) == pytest.approx(DECAY, rel=1e-15)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["lr", "decay"])
@every_case
def test_the_tangent_of_the_average_is_a_finite_difference(case, name):
    # horizon inf and raw values moved once, at the start, for all steps: the derivative of the whole run with gradients held.
    held = []
    tower = Hyper(averaged(case.rule), learn=("lr", "decay"), horizon=math.inf, trust=None).stack(SGD, lr=1e-30)
    model, optimizer = trained(tower, range(case.steps), seen=held)
    found = torch.cat([optimizer.state[p][f"Z.{name}.average"].flatten() for p in model.parameters()])

    def average(shift):
        if name == "lr":
            values = {"lr": case.rule.lr * math.exp(shift)}
        else:
            values = {"decay": 1 / (1 + math.exp(-math.log(DECAY / (1 - DECAY)) - shift))}
        twin, run = trained(Hyper(averaged(case.rule), **values), held)
        with run.averaged():
            return flat(twin)

    h = 1e-3
    stencil = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    expected = sum(w * (average(k * h) - average(-k * h)) for k, w in stencil.items()) / h
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert found.norm() > 1e-4


def test_bfloat16_weights_are_averaged_in_float32():
    weights = [nn.Parameter(torch.linspace(-1, 1, 6).bfloat16().to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizers = [Hyper(Averaged(Adam, decay=DECAY), lr=0.01).stack(Adam).bind([w]) for w in weights]
    for i in range(7):
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = torch.linspace(0, 1 + i % 2, 6).bfloat16().to(w.dtype)
            optimizer.step()
        half, single = (w.data for w in weights)
        single.copy_(half)
    kept = [optimizer.state[w]["average"] for w, optimizer in zip(weights, optimizers, strict=True)]
    assert kept[0].dtype == torch.float32
    assert torch.equal(*kept)
    assert not torch.equal(kept[0], kept[0].bfloat16().float())
    with optimizers[0].averaged():
        assert torch.equal(weights[0], kept[0].bfloat16())


def test_a_decay_of_0_keeps_the_last_weights_and_one_may_be_assigned():
    model, optimizer = trained(Hyper(Averaged(Adam, decay=0.0), lr=0.01), range(3))
    last = flat(model)
    with optimizer.averaged():
        assert torch.equal(flat(model), last)
    optimizer.param_groups[0]["decay"] = 0.5
    share, expected = 0.5 / (1 - 0.5**4), last
    backward(model, 3)
    optimizer.step()
    expected = last + share * (flat(model) - last)
    with optimizer.averaged():
        torch.testing.assert_close(flat(model), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tower", [Hyper(Averaged(Adam)).stack(Adam), Hyper(ScheduleFree(Adam)).stack(Adam)], ids=str)
def test_nothing_is_saved_loaded_or_copied_while_the_parameters_hold_the_average(tower):
    model, optimizer = trained(tower, range(3))
    kept = optimizer.state_dict()
    before = snapshot(model, optimizer)
    inside = [
        optimizer.state_dict,
        partial(optimizer.load_state_dict, kept),
        partial(copy.deepcopy, (model, optimizer)),
        partial(pickle.dumps, optimizer),
    ]
    for act in inside:
        with optimizer.averaged(), pytest.raises(RuntimeError, match=r"inside averaged\(\): .*leave the context first"):
            act()
        assert differences(before, snapshot(model, optimizer)) == []
        act()  # outside all are well


@pytest.mark.parametrize("composed", [Averaged, ScheduleFree])
@every_rule
def test_a_composition_is_read_from_its_text_and_copied(base, composed):
    if composed is ScheduleFree and not base().first_moment:
        with pytest.raises(TypeError, match="a rule with a first moment"):
            composed(base)
        return
    for given in ({}, {"lr": 0.07}):
        tower = Hyper(composed(base), **given).stack(Adam)
        for again in (Hyper.parse(str(tower)), copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
            assert again == tower
            assert again.rule == tower.rule
            assert type(again.rule) is type(tower.rule)
    plain = base()
    assert all(
        getattr(tower.rule, f.name) == getattr(plain, f.name) for f in dataclasses.fields(tower.rule) if f.name in ("eps", "weight_decay")
    )


def test_a_variant_keeps_its_own_defaults_through_text():
    for composed in (ScheduleFree, Averaged):
        tower = Hyper(composed(AdamW))
        assert tower.rule.weight_decay == Hyper.parse(str(tower)).rule.weight_decay == AdamW().weight_decay == 0.01
        without = Hyper(composed(AdamW), weight_decay=0.0)
        assert Hyper.parse(str(without)).rule.weight_decay == 0
        assert str(without) != str(tower)
    tower = Hyper(Averaged(AdamW, decay=0.75), lr=0.3, learn=("lr", "decay")).stack(Averaged(SGD))
    assert str(tower) == "Averaged(AdamW)(lr=0.3, decay=0.75, learn=(lr, decay)) / Averaged(SGD)"
    assert Hyper.parse(str(tower)).rule == tower.rule


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Averaged(int), TypeError, "Averaged takes a rule, such as Adam or SGD, by its class"),
        (lambda: Averaged(Adam(lr=0.1)), TypeError, r"by its class, got Adam\(.*Averaged\(Adam\)\(lr=0.01\)"),
        (lambda: Averaged(ScheduleFree(Adam)), TypeError, r"does not average by itself, got ScheduleFree\(Adam\)"),
        (lambda: Averaged(Averaged(Adam)), TypeError, r"does not average by itself, got Averaged\(Adam\)"),
        (lambda: ScheduleFree(Averaged(Adam)), TypeError, "ScheduleFree takes a rule with a first moment"),
        (lambda: Averaged(Adam, decay=1.0), ValueError, r"Averaged\(Adam\)\(decay = 1\) divides by .* give a decay below 1"),
        (lambda: Averaged(Adam, decay=-0.1), ValueError, "decay.* = -0.1 is outside its domain"),
        (lambda: Averaged(Adam, decay=math.nan), ValueError, "decay.* = nan is outside its domain"),
        (lambda: Averaged(Adam, decay="long"), TypeError, "decay.* must be a number, got 'long'"),
        (lambda: Averaged(Adam)(beta1=1.0), ValueError, "beta1 or beta2 = 1"),
        (lambda: Averaged(Adam)(momentum=0.9), TypeError, "momentum"),
        (lambda: Hyper(Averaged(Adam), momentum=0.9), ValueError, r"Averaged\(Adam\) has no hyperparameter or option 'momentum'"),
        (lambda: Hyper(Averaged(SGD), nesterov=True), ValueError, "needs momentum > 0"),
        (lambda: Hyper(Averaged(Adam, decay=0.0), learn="decay").stack(SGD), ValueError, "decay = 0.0 of .* cannot be learned"),
        (lambda: Hyper.parse("Averaged(Adam, decay=0.5)"), ValueError, "values go behind it"),
        (lambda: Hyper.parse("Averaged(Averaged(Adam))"), ValueError, "does not average by itself"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_assigned_decay_of_1_raises_as_at_construction():
    model, optimizer = trained(Hyper(Averaged(Adam), lr=0.01), range(3))
    optimizer.param_groups[0]["decay"] = 1.0
    backward(model, 3)
    with pytest.raises(ValueError, match="give a decay below 1"):
        optimizer.step()


# ---- an average and what lr moves are kept relative to the weights


def test_an_assigned_beta1_goes_on_from_the_average_that_there_is():
    def mixed(beta1):
        model, optimizer = trained(Hyper(ScheduleFree(SGD), lr=0.01), range(10))
        optimizer.param_groups[0]["beta1"] = beta1
        backward(model, 10)
        optimizer.step()
        away = torch.cat([optimizer.state[p]["gap"].flatten() for p in model.parameters()])
        with optimizer.averaged():
            return flat(model), away, flat(model) + (1 - beta1) * away

    (average, away, _), (other, gap, _) = mixed(0.9), mixed(0.1)
    torch.testing.assert_close(average, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(away, gap, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.2, 0.9])
def test_the_average_is_that_of_what_lr_moves(beta1, dtype):
    """By its definition: with weights lr², at a constant lr the mean of all z."""
    model = net(dtype)
    optimizer = Hyper(ScheduleFree(SGD), lr=0.1, beta1=beta1).bind(model.parameters())
    zs = []
    for at in range(20):
        backward(model, at)
        optimizer.step()
        states = [optimizer.state[p] for p in model.parameters()]
        xs = [p.detach() + state.get("rest", 0) for p, state in zip(model.parameters(), states, strict=True)]
        zs.append(torch.cat([(x + beta1 * state["gap"]).flatten() for x, state in zip(xs, states, strict=True)]))
    with optimizer.averaged():
        torch.testing.assert_close(flat(model), torch.stack(zs).mean(0).to(dtype), rtol=1e-4, atol=1e-6)


def test_what_bfloat16_weights_are_rounded_by_is_kept():
    # A thousandth of a weight of 1 is less than bfloat16 can add to it.
    weights = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizers = [Hyper(ScheduleFree(SGD), lr=1e-3).bind([w]) for w in weights]
    for _ in range(50):
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = torch.ones_like(w)
            optimizer.step()
    assert 0.96 < weights[1][0].item() < 0.98
    assert torch.equal(weights[0], weights[1].bfloat16())
    with torch.no_grad():
        weights[0].zero_()  # what was cut off belongs to weights that are no more
        optimizers[0].state[weights[0]]["gap"].zero_()
    weights[0].grad = torch.zeros_like(weights[0])
    optimizers[0].step()
    assert weights[0].abs().max() < 1e-30


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["down", "up"])
def test_a_checkpoint_is_loaded_into_weights_of_another_dtype(dtypes):
    model, other_model = map(net, dtypes)
    optimizer, other = (Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam).bind(m.parameters()) for m in (model, other_model))
    for at in range(10):
        backward(model, at)
        optimizer.step()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    with optimizer.averaged(), other.averaged():
        torch.testing.assert_close(flat(other_model).float(), flat(model).float(), rtol=0.02, atol=0.02)
    backward(other_model, 10)
    other.step()
    assert {"rest" in other.state[p] for p in other_model.parameters()} == {dtypes[1] == torch.bfloat16}


def test_before_the_first_step_that_counts_the_average_is_the_weights():
    model = net(torch.float32)
    optimizer = Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam).bind(model.parameters())
    backward(model, 0)
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    with optimizer.averaged():
        assert torch.equal(flat(model), flat(net(torch.float32)))
