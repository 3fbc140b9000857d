"""The library against `twin.py`, its slow and readable reference: towers of every kind, all that a user can see, at each of 60 steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import twin

import hyperopt
from hyperopt import Real

STEPS = 60
# Relative. Weights and hyperparameters agree to 1e-13 in every case, also where the library takes torch's fused Adam. One thing limits
# hypergradients: the first one of beta1 or weight_decay is 0 but for rounding, 1e-18, which makes an Adam above it move by 1e-18 / eps.
# With Adam's own eps = 1e-8 hypergradients would differ by 1e-9 a few steps later; with eps = 1e-4, as here, all agree to 3e-11.
TOLERANCE = 1e-10
# Hypergradients are sums that may cancel; below this they are compared absolutely.
SMALL = 1e-6


# ---- what is compared


@dataclass
class Case:
    """A tower, and what happens to it."""

    build: Callable[[ModuleType], Any]  # makes the tower, of `hyperopt` or of `twin`
    shapes: Sequence[tuple[int, ...]] = ((2, 4),)  # of the parameters
    scale: float = 1.0  # of their initial values
    groups: Sequence[tuple[int, dict[str, float]]] = ()  # for each parameter group how many parameters, and values of its own
    hyper_every: int = 1
    bad: dict[int, tuple[int, float]] = field(default_factory=dict)  # by step: which parameter's gradient has this element
    absent: Callable[[int, int], bool] = lambda parameter, step: False  # whether a parameter has no gradient
    # Before a step: the step, the group, the name and the value that a user assigns. In place where the step is an odd one.
    assigned: Sequence[tuple[int, int, str, float]] = ()
    # Before a step, held-out losses: whether at the averaged weights, and by what they are multiplied.
    held_out: Callable[[int], Sequence[tuple[bool, float]]] = lambda step: ()


def forgetting(o: ModuleType, base: Any) -> Any:
    """ScheduleFree whose average forgets, with hypergradients that are taken through both ends."""
    return o.ScheduleFree(base, 0.2, 0.8) if o is twin else o.ScheduleFree(base)(forget=0.2, through=0.8)


TWO = ((3, 2), (4,))
CASES = {
    # ---- no guards
    "paper": Case(lambda o: o.Hyper(o.SGD, lr=0.1, horizon=1, trust=None, domains={"lr": Real()}).stack(o.SGD, lr=1e-3, trust=None)),
    "no trust": Case(lambda o: o.Hyper(o.Adam, lr=0.01, trust=None).stack(o.SGD)),
    "horizon 1": Case(lambda o: o.Hyper(o.SGD, lr=0.01, momentum=0.9, learn=("lr", "momentum"), horizon=1).stack(o.Adam, eps=1e-4)),
    "horizon 10": Case(lambda o: o.Hyper(o.Adam, lr=0.01, learn=("lr", "beta1"), horizon=10).stack(o.Adam, eps=1e-4)),
    "horizons": Case(
        lambda o: o.Hyper(o.Adam, lr=0.01, eps=0.1, learn=("lr", "beta1", "eps"), horizon={"lr": 10, "beta1": 3}).stack(o.Adam, eps=1e-4)
    ),
    "horizons above": Case(
        lambda o: (
            o.Hyper(o.SGD, lr=0.01, momentum=0.9, learn=("lr", "momentum"))
            .stack(o.Adam, eps=1e-4, learn=("lr", "beta2"), horizon={"lr": 5})
            .stack(o.Adam, eps=1e-4)
        )
    ),
    "horizon inf": Case(lambda o: o.Hyper(o.Adam, lr=0.01, horizon=math.inf).stack(o.Adam, horizon=math.inf).stack(o.Adam)),
    # The logit of momentum is thrown from one end of what float64 can hold to the other.
    "range": Case(
        lambda o: o.Hyper(o.SGD, lr=0.02, momentum=0.3, learn=("momentum",), horizon=1000, trust=None).stack(o.SGD, lr=1e5, trust=None)
    ),
    # ---- guards
    "climb from 1e-6": Case(lambda o: o.Hyper(o.Adam, lr=1e-6).stack(o.Adam)),
    "climb from 1e-8": Case(lambda o: o.Hyper(o.Adam, lr=1e-8).stack(o.Adam, lr=0.2)),
    "climb within trust above": Case(lambda o: o.Hyper(o.SGD, lr=1e-6).stack(o.Adam, trust=0.2)),
    "climb until a hypergradient says down": Case(
        lambda o: o.Hyper(o.Adam, lr=1e-8).stack(o.Adam), held_out=lambda step: [(False, -1.0)] if step == 5 else []
    ),
    "trust at 10": Case(lambda o: o.Hyper(o.Adam, lr=10.0).stack(o.Adam), TWO),
    "trust at 100": Case(lambda o: o.Hyper(o.Adam, lr=100.0, trust=0.1).stack(o.SGD)),
    "trust of a real lr": Case(lambda o: o.Hyper(o.SGD, lr=5.0, domains={"lr": Real()}).stack(o.Adam, lr=1e-3)),
    "trust from zero": Case(lambda o: o.Hyper(o.Adam, lr=0.1).stack(o.Adam), scale=0.0),
    "forget": Case(lambda o: o.Hyper(o.SGD, lr=0.9, trust=2.0).stack(o.Adam, lr=0.3)),
    "pace": Case(lambda o: o.Hyper(o.Adam, lr=0.01, learn=("lr", "beta1", "beta2")).stack(o.Adam, lr=1.0, eps=1e-4)),
    "pace of decays alone": Case(lambda o: o.Hyper(o.Adam, lr=0.01, eps=0.1, learn=("beta1", "eps")).stack(o.Adam, lr=0.3, eps=1e-4)),
    "pace above": Case(lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam, lr=0.05, learn=("lr", "eps"), eps=0.1).stack(o.Adam, eps=1e-4)),
    "pace above, real": Case(lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam, lr=0.05, domains={"lr": Real()}).stack(o.Adam, lr=0.02)),
    "trust above, lr learned": Case(lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam, lr=2.0).stack(o.Adam)),
    "trust above, lr held": Case(lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam, lr=2.0, trust=0.3)),
    "trust above, beta1 learned": Case(
        lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam, lr=0.6, learn=("beta1",), trust=0.3).stack(o.Adam, eps=1e-4)
    ),
    # ---- towers and trees
    "height 3": Case(lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam, horizon=10).stack(o.SGD, lr=0.5).stack(o.Adam)),
    "tree": Case(lambda o: o.Hyper(o.Adam, lr=0.01).stack(lr=o.Adam, beta1=o.SGD)),
    "high tree": Case(
        lambda o: (
            o.Hyper(o.SGD, lr=0.01, momentum=0.5)
            .stack(lr=o.Hyper(o.SGD, momentum=0.5).stack(lr=o.SGD, momentum=o.SGD), momentum=o.Hyper(o.SGD, trust=None).stack(o.SGD))
            .stack(o.Adam)
        )
    ),
    "step sizes": Case(lambda o: o.Hyper(o.Adam, lr=0.01, learn=("lr", "beta1")).stack(o.SGD, lr={"lr": 0.5, "beta1": 0.2})),
    "learned step sizes": Case(
        lambda o: o.Hyper(o.Adam, lr=0.01, learn=("lr", "beta1")).stack(o.SGD, lr={"lr": 2.0, "beta1": 0.2}).stack(o.SGD)
    ),
    # ---- rules
    "momentum": Case(
        lambda o: o.Hyper(o.SGD, lr=0.01, momentum=0.9, dampening=0.1, learn=("lr", "momentum", "dampening")).stack(o.SGD, momentum=0.5)
    ),
    "coupled decay": Case(lambda o: o.Hyper(o.Adam, lr=0.01, weight_decay=0.1, learn=("lr", "weight_decay")).stack(o.Adam, eps=1e-4)),
    "coupled decay of SGD": Case(lambda o: o.Hyper(o.SGD, lr=0.01, weight_decay=0.1).stack(o.Adam, weight_decay=0.01)),
    "decoupled decay": Case(lambda o: o.Hyper(o.AdamW, lr=0.1, weight_decay=0.5).stack(o.AdamW, weight_decay=0.01)),
    "decoupled decay, learned": Case(lambda o: o.Hyper(o.AdamW, lr=0.01, learn=("lr", "weight_decay")).stack(o.Adam)),
    # ---- averages
    "ScheduleFree": Case(lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.001).stack(o.Adam)),
    "ScheduleFree, warm-up of trust": Case(lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=10.0).stack(o.Adam)),
    "ScheduleFree, beta1": Case(lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.01, learn=("lr", "beta1")).stack(o.Adam, eps=1e-4)),
    "ScheduleFree of SGD, beta1": Case(lambda o: o.Hyper(o.ScheduleFree(o.SGD), lr=0.1, learn=("lr", "beta1")).stack(o.Adam, eps=1e-4)),
    "ScheduleFree, decay": Case(lambda o: o.Hyper(o.ScheduleFree(o.SGD), lr=0.01, weight_decay=0.1).stack(o.Adam)),
    "ScheduleFree of AdamW, decay learned": Case(
        lambda o: o.Hyper(o.ScheduleFree(o.AdamW), lr=0.01, learn=("lr", "weight_decay")).stack(o.Adam)
    ),
    "ScheduleFree, horizon 1": Case(lambda o: o.Hyper(o.ScheduleFree(o.SGD), lr=0.01, learn=("lr", "beta1"), horizon=1).stack(o.SGD)),
    "ScheduleFree that forgets": Case(
        lambda o: o.Hyper(forgetting(o, o.Adam), lr=0.001).stack(o.Adam), TWO, absent=lambda parameter, step: parameter == 1 and step < 9
    ),
    "ScheduleFree that forgets, beta1 and decay": Case(
        lambda o: o.Hyper(forgetting(o, o.AdamW), lr=0.01, learn=("lr", "beta1", "weight_decay")).stack(o.Adam, eps=1e-4),
        bad={9: (0, math.nan)},
    ),
    "ScheduleFree that forgets, above": Case(lambda o: o.Hyper(o.Adam, lr=10.0).stack(forgetting(o, o.Adam))),
    # Above level 0 the library limits the move of y, and in its size counts what a node below has shifted; the twin limits the move of z
    # alone. The two are the same where no limit is reached: moves of .1 against .5 here, and trust=None below.
    "ScheduleFree above": Case(lambda o: o.Hyper(o.Adam, lr=10.0).stack(o.ScheduleFree(o.Adam))),
    "ScheduleFree above, learned": Case(lambda o: o.Hyper(o.SGD, lr=10.0).stack(o.ScheduleFree(o.Adam), trust=None).stack(o.Adam)),
    "Averaged": Case(lambda o: o.Hyper(o.Averaged(o.Adam), lr=0.01).stack(o.Adam)),
    # ---- gradients that are missing or not finite
    "not finite": Case(lambda o: o.Hyper(o.Adam, lr=1e-4).stack(o.Adam).stack(o.Adam), bad={7: (0, math.nan), 8: (0, math.inf)}),
    "not finite at first": Case(lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.01).stack(o.Adam), bad={0: (0, -math.inf)}),
    "absent": Case(
        lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.1).stack(o.Adam),
        TWO,
        absent=lambda parameter, step: step < 4 if parameter else 20 <= step < 25,
    ),
    "groups": Case(
        lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam),
        TWO,
        groups=((1, {}), (1, {"lr": 1e-4, "beta1": 0.5})),
        hyper_every=2,
        bad={9: (1, math.nan)},
        absent=lambda parameter, step: parameter == 0 and 20 <= step < 25,
    ),
    # The gradient of the held-out loss is finite, q of lr is not, and that of momentum is.
    "hypergradient not finite": Case(
        lambda o: o.Hyper(o.SGD, lr=0.05, momentum=0.5, learn=("lr", "momentum")).stack(o.Adam, eps=1e-4),
        held_out=lambda step: [(False, 0.7e308)] if step == 24 else [],
    ),
    # ---- what a user does
    "assigned": Case(
        lambda o: o.Hyper(o.SGD, lr=0.01, momentum=0.9, trust=None, learn=("lr", "momentum")).stack(o.Adam, eps=1e-4),
        assigned=((10, 0, "lr", 0.02), (21, 0, "lr", 0.003), (30, 0, "momentum", 0.5), (41, 0, "weight_decay", 0.1)),
    ),
    # The second one comes before a step that does not count, and waits for the next; the third lies on the bound of the domain.
    "assigned beside trust": Case(
        lambda o: o.Hyper(o.Adam, lr=0.01).stack(o.Adam),
        assigned=((10, 0, "lr", 0.5), (21, 0, "lr", 0.001), (30, 0, "lr", 0.0), (41, 0, "eps", 0.1)),
        bad={21: (0, math.nan)},
    ),
    "every third": Case(lambda o: o.Hyper(o.Adam, lr=1e-3).stack(o.Adam), hyper_every=3, bad={9: (0, math.nan)}),
    "ascent": Case(
        lambda o: o.Hyper(o.Adam, lr=0.01, maximize=True).stack(o.Adam), held_out=lambda step: [(False, 1.0)] if step % 5 == 0 else []
    ),
    "held out at the average": Case(
        lambda o: o.Hyper(o.Averaged(o.Adam), lr=0.01, learn=("lr", "decay")).stack(o.Adam, lr=0.02),
        held_out=lambda step: [(True, 1.0)] if step else [],
    ),
    "held out at the average, at horizon 1": Case(
        lambda o: o.Hyper(o.Averaged(o.Adam), lr=0.01, learn=("lr", "beta1", "decay"), horizon=1).stack(o.Adam, lr=0.02, eps=1e-4),
        held_out=lambda step: [(True, 1.0)] if step else [],
    ),
    "held out at ScheduleFree's average, at horizon 1": Case(
        lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.01, learn=("lr", "beta1", "beta2"), horizon=1).stack(o.Adam, eps=1e-4),
        held_out=lambda step: [(True, 1.0)] if step % 2 else [],
    ),
    "held out at ScheduleFree's average": Case(
        lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.01).stack(o.Adam), held_out=lambda step: [(True, 1.0)] if step % 2 else []
    ),
    "held out twice, at y": Case(
        lambda o: o.Hyper(o.ScheduleFree(o.SGD), lr=0.01, learn=("lr", "beta1")).stack(o.Adam, eps=1e-4),
        held_out=lambda step: [(False, 1.0), (True, -0.5)] if step % 3 else [],
    ),
    # ---- feasible sets, and values for each tensor or coordinate
    "box": Case(lambda o: o.Hyper(o.Adam, lr=0.05, project=o.Box(0.2, 1.5)).stack(o.Adam)),
    "ball": Case(lambda o: o.Hyper(o.Adam, lr=0.05, project=o.Ball(1.5)).stack(o.Adam)),
    "ball of ScheduleFree": Case(lambda o: o.Hyper(o.ScheduleFree(o.Adam), lr=0.05, project=o.Ball(1.5)).stack(o.Adam)),
    "per tensor": Case(
        lambda o: o.Hyper(o.SGD, lr=1e-4, momentum=0.5, learn=("lr", "momentum"), per="tensor").stack(o.Adam, eps=1e-4), TWO
    ),
    "per coordinate": Case(lambda o: o.Hyper(o.Adam, lr=1.0, per="coordinate").stack(o.Adam)),
}


# ---- how it is compared


def curvature(x):
    """Of the loss along each coordinate. The first has none, nor noise: as the weight of a pixel that is always black."""
    return torch.linspace(0, 2, x.numel(), dtype=x.dtype)


def gradient(case, xs, step):
    """The gradient of a noisy quadratic loss for each flat parameter, or None."""
    generator = torch.Generator().manual_seed(step)
    gs = []
    for i, x in enumerate(xs):
        noise = torch.randn(x.numel(), generator=generator, dtype=x.dtype)
        g = curvature(x) * (x - 0.5) + curvature(x).sign() * noise / 2
        if case.bad.get(step, (None, 0))[0] == i:
            g[1] = case.bad[step][1]
        gs.append(None if case.absent(i, step) else g)
    return gs


def held_out(xs, scale):
    """The loss on other data."""
    return scale * sum((curvature(x) * (x.reshape(-1) - 0.3) ** 2).sum() for x in xs)


def flat(tensors):
    return [t.detach().reshape(-1).clone() for t in tensors]


class Deviations:
    """The worst relative deviations so far; fails at the first that is above the tolerance."""

    def __init__(self, tolerance):
        self.tolerance, self.worst, self.scale = tolerance, {}, {}

    def check(self, step, kind, library, reference):
        assert library.keys() == reference.keys(), kind
        for name, expected in reference.items():
            found = library[name].reshape(-1)
            assert found.dtype == torch.float64
            message = f"step {step}: {kind} {name} is {found.tolist()}, and {expected.tolist()} in the twin"
            assert torch.equal(found.isfinite(), expected.isfinite()), message
            deviation = (found - expected).nan_to_num(0, 0, 0).abs().max().item()
            scale = expected.nan_to_num(0, 0, 0).abs().max().item()
            if kind != "hyperparameters":
                scale = self.scale[kind, name] = max(scale, SMALL, self.scale.get((kind, name), 0))
            deviation /= max(scale, 1e-300)
            self.worst[kind] = max(self.worst.get(kind, 0.0), deviation)
            assert deviation <= self.tolerance, message


def compare(case, tolerance=TOLERANCE):
    """Train with the library and with the twin, and compare them at every step. Returns the worst deviations."""
    xs = [case.scale * torch.linspace(-1, 2, math.prod(shape), dtype=torch.float64) for shape in case.shapes]
    ps = [torch.nn.Parameter(x.view(shape).clone()) for x, shape in zip(xs, case.shapes, strict=True)]
    pairs, groups = iter(zip(ps, xs, strict=True)), []
    for count, values in case.groups or [(len(xs), {})]:
        own = [next(pairs) for _ in range(count)]
        groups.append(({"params": [p for p, _ in own], **values}, {"params": [x for _, x in own], **values}))
    text = str(case.build(hyperopt))
    library = hyperopt.Hyper.parse(text).bind([theirs for theirs, _ in groups], hyper_every=case.hyper_every)
    reference = case.build(twin).bind([mine for _, mine in groups], hyper_every=case.hyper_every)
    deviations = Deviations(tolerance)
    for step in range(STEPS):
        for _, group, name, value in [each for each in case.assigned if each[0] == step]:
            reference.assign(group, **{name: value})
            if step % 2:
                library.param_groups[group][name].fill_(value)
            else:
                library.param_groups[group][name] = value
        for averaged, scale in case.held_out(step):
            places = [x.clone().requires_grad_() for x in (reference.averaged if averaged else reference.weights)]
            reference.hyper_backward(torch.autograd.grad(held_out(places, scale), places), averaged)
            if averaged:
                with library.averaged():
                    library.hyper_backward(held_out(ps, scale))
            else:
                library.hyper_backward(held_out(ps, scale))
        for p, g in zip(ps, gradient(case, flat(ps), step), strict=True):
            p.grad = None if g is None else g.view_as(p)
        before = reference.hypergradients()
        library.step()
        reference.step(gradient(case, reference.weights, step))
        used = {f"0.{name}": value for at, _, name, value in case.assigned if at == step}
        assert used == {name: library.hyperparameters()[name].item() for name in used}  # exactly
        deviations.check(step, "weights", dict(enumerate(flat(ps))), dict(enumerate(reference.weights)))
        deviations.check(step, "hyperparameters", library.hyperparameters(), reference.hyperparameters())
        learned = {n: q for n, q in reference.hypergradients().items() if n.startswith("0.") and q is not before.get(n)}
        deviations.check(step, "hypergradients", {n: library.hypergradients()[n] for n in learned}, learned)
    with library.averaged():
        deviations.check(STEPS, "averaged weights", dict(enumerate(flat(ps))), dict(enumerate(reference.averaged)))
    assert library.skipped == reference.skipped
    return deviations.worst


@pytest.mark.parametrize("name", CASES)
def test_the_library_is_its_twin(name):
    worst = compare(CASES[name])
    assert worst.keys() == {"weights", "hyperparameters", "hypergradients", "averaged weights"}


# ---- that it is noticed when the two differ


def but(method, **changes):
    """A method of the twin, whatever it is given for some of its arguments."""
    names = method.__code__.co_varnames[1 : method.__code__.co_argcount]
    return lambda self, *given, **named: method(self, **{**dict(zip(names, given, strict=False)), **named, **changes})


def through_the_average(self, active, of=None):
    return pull(self, active, "a" if "a" in self.parts[0].s else of)


def paces_betas(self, names):
    self.names = [name for name in names if name.startswith("beta")]


pull, learn = twin.Node.pull, twin.Node.learn
# An error in the twin, by what it is: the case that notices, and what is replaced by what.
ERRORS = {
    "Climb: 4.9 times as fast": ("climb from 1e-6", twin.Climb, "times", 4.9),
    "Climb: by .49 at most": ("climb from 1e-8", twin.Climb, "most", 0.49),
    "Climb: whatever trust is above": ("climb within trust above", twin.Climb, "__init__", but(twin.Climb.__init__, trust_above=None)),
    "Climb: until steps are .011 of trust": ("climb from 1e-6", twin.Climb, "negligible", 0.011),
    "Climb: whatever hypergradients say": (
        "climb until a hypergradient says down",
        twin.Climb,
        "moved",
        but(twin.Climb.moved, q={"lr": twin.numbers(-1)}),
    ),
    "Pace: .0051": ("pace", twin.Pace, "most", 0.0051),
    "Pace: of eps as well": ("pace of decays alone", twin, "Interval", object),
    "Pace: of decays alone": ("pace above", twin.Pace, "__init__", paces_betas),
    "Pace: of a real lr above": ("pace above, real", twin, "Real", twin.Ball),
    "Trust: 1 % more": ("trust at 10", twin.Rule, "trust", 0.0303),
    "Trust: another floor": ("trust from zero", twin, "FLOOR", 0.0101),
    "Trust: no warm-up": ("ScheduleFree, warm-up of trust", twin.ScheduleFree, "trust_warmup", 1),
    "Trust: of what a user wrote": ("assigned beside trust", twin.Trust, "sized", but(twin.Trust.sized, written={})),
    "Trust: 1 % more above, lr learned": ("trust above, lr learned", twin.Hyper, "trust_at", lambda self, level: 0.505 if level else 0.03),
    "Trust: 1 % more above, lr held": ("trust above, lr held", twin.Hyper, "trust_at", lambda self, level: 0.303 if level else 0.03),
    "Prior: not of the lr above": ("trust above, lr learned", twin.Hyper, "priors", lambda self, level, values: []),
    "Forget: power 3.9": ("forget", twin.Forget, "power", 3.9),
    "Forget: band 1.1": ("forget", twin.Forget, "band", 1.1),
    "domains: raw values run on": ("range", twin.Node, "__init__", but(twin.Node.__init__, range=(-math.inf, math.inf))),
    "Z: another horizon": ("horizon 10", twin.Node, "γ", lambda self, name: 0.901),
    "Z: one horizon for all": ("horizons", twin.Node, "γ", lambda self, name: 0.9),
    "Z: whatever the rule declares": ("horizons above", twin.SGD, "horizons", {}),
    "Z: kept though q is not finite": ("hypergradient not finite", twin.Node, "learn", lambda self, q: (learn(self, q)[0], {})),
    "q: through y": ("ScheduleFree", twin.ScheduleFree, "pulled", twin.Rule.pulled),
    "q: without beta1": ("ScheduleFree, beta1", twin.ScheduleFree, "pulled", lambda self, Z, s: Z["a"]),
    "q: through the average at horizon 1": ("ScheduleFree, horizon 1", twin.Node, "pull", through_the_average),
    "q: through the average above level 0": ("ScheduleFree above, learned", twin.Node, "pull", through_the_average),
    "q: held out at x": ("held out at the average", twin.Twin, "hyper_backward", but(twin.Twin.hyper_backward, averaged=False)),
    "q: at every step": ("every third", twin.Node, "step", but(twin.Node.step, learn=True)),
    "q: through the share of an average that forgets": ("ScheduleFree that forgets", twin, "constant", lambda v: v),
    "x: moved without z": ("ScheduleFree above, learned", twin.ScheduleFree, "shifted", twin.Rule.shifted),
    "x: outside the box": ("box", twin.Box, "nearest", lambda self, y, H: y),
    "x: nearest in no metric": ("ball", twin.Ball, "nearest", but(twin.Ball.nearest, H=twin.numbers(1))),
    "x: one lr for all tensors": ("per tensor", twin.Hyper, "index", lambda self, i, sizes: slice(1)),
    "the average is x": ("Averaged", twin.Averaged, "average", "x"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_twin_is_noticed(error, monkeypatch):
    name, *planted = ERRORS[error]
    monkeypatch.setattr(*planted)
    with pytest.raises(AssertionError, match="in the twin"):
        compare(CASES[name])
