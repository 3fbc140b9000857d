"""Compositions as rules, without an optimizer: every base of `ScheduleFree` against a plain recursion, and what a base hands on."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hyperopt import (
    ADOPT,
    SGD,
    Adam,
    AdamW,
    Adan,
    Averaged,
    Lion,
    Padam,
    Positive,
    RMSprop,
    Rule,
    ScheduleFree,
    UnitInterval,
    Values,
    hyper,
    rules,
)
from hyperopt.rules.composition import Zeroed

CATALOGUE = {name: getattr(rules, name) for name in rules.__all__ if name not in ("ScheduleFree", "Averaged")}
BASES = {name: base for name, base in CATALOGUE.items() if base().first_moment}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
duals = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, at the first dual number


class Plain:
    """Hyperparameters in plain arithmetic; a rule that reads one which is not there gets a KeyError."""

    def __init__(self, values):
        self.values = values

    def __getattr__(self, name):
        return self.values[name]

    def one_minus(self, name):
        return 1 - self.values[name]

    def one_minus_power(self, name, t):
        return 1 - self.values[name] ** t


@dataclass(frozen=True)
class Reads(Rule):
    """A user's Adam-like rule that reads its first moment also where it is 0."""

    lr: float = hyper(1e-3, Positive())
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.99, UnitInterval())
    weight_decay: float = hyper(0.0, Positive())
    first_moment: ClassVar[tuple[str, ...]] = ("beta1",)

    def init(self, x):
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x)}

    def direction(self, g, state, h, t):
        m, v = h.beta1 * state["m"] + h.one_minus("beta1") * g, h.beta2 * state["v"] + h.one_minus("beta2") * g * g
        return m / h.one_minus_power("beta1", t) / (v.sqrt() + 1e-8), {"m": m, "v": v}


@dataclass(frozen=True)
class Matrix(Rule):
    """A user's rule that divides a matrix by its norm."""

    lr: float = hyper(1e-3, Positive())
    momentum: float = hyper(0.9, UnitInterval())
    elementwise: ClassVar[bool] = False
    trust: ClassVar[float] = 0.07
    horizon: ClassVar[float] = 70.0
    first_moment: ClassVar[tuple[str, ...]] = ("momentum",)

    def init(self, x):
        return {"b": torch.zeros_like(x)} if self.momentum != 0 else {}

    def direction(self, g, state, h, t):
        assert g.dim() == 2
        b = g if self.momentum == 0 else h.momentum * state["b"] + g
        return b / torch.linalg.matrix_norm(b, 2), {"b": b} if self.momentum != 0 else {}


@dataclass(frozen=True)
class Whole(Rule):
    """A user's rule that defines `update` and no direction: implicit weight decay."""

    lr: float = hyper(1e-3, Positive())
    beta1: float = hyper(0.5, UnitInterval())
    first_moment: ClassVar[tuple[str, ...]] = ("beta1",)

    def init(self, x):
        return {"m": torch.zeros_like(x)}

    def update(self, x, g, state, h, t):
        m = h.beta1 * state["m"] + h.one_minus("beta1") * g
        return (x - h.lr * m) / (1 + h.lr), {"m": m}


@dataclass(frozen=True)
class Clamped(SGD):
    """A user's rule with an `after` of its own."""

    def after(self, place, state, h, t):
        return place.clamp(-0.5, 0.5), state


def steps(rule, *, values=None, zeros=True, n=12):
    """x after each of n steps with random gradients, some of them 0, and an lr that changes; and the last state."""
    generator = torch.Generator().manual_seed(0)
    x, *gs = torch.randn(n + 1, 3, 4, dtype=torch.float64, generator=generator)
    for at, g in enumerate(gs):
        g[0, : at % 3 * zeros] = 0
    values = values or {name: torch.tensor(rule.value(name), dtype=torch.float64) for name in rule.declared()}
    state, xs = rule.init(x), [x]
    for at, g in enumerate(gs):
        h = Plain({**values, "lr": values["lr"] * (1 + at % 3)})
        x, state = rule.update(x, g, state, h, torch.tensor(at + 1.0, dtype=torch.float64))
        xs.append(x)
    return torch.stack(xs), state


@dataclass(frozen=True)
class Recursion(Rule):
    """Schedule-Free in the letters of the paper, with y for the weights; `inner` steps z by its `update`."""

    lr: float = hyper(1e-3, Positive())
    inner: Rule = SGD()  # noqa: RUF009 - immutable
    beta: float = 0.9
    decay: float = 0.0

    def init(self, x):
        return {**self.inner.init(x), "z": x, "x": x, "sum": x.new_zeros(())}

    def update(self, x, g, state, h, t):
        y, values = x, {name: torch.tensor(self.inner.value(name), dtype=x.dtype) for name in self.inner.declared()}
        h = Plain({**values, "lr": h.lr})
        own = {key: value for key, value in state.items() if key not in ("z", "x", "sum")}
        z, own = self.inner.update(state["z"], g, own, h, t)
        if not (isinstance(self.inner, ADOPT) and t == 1):
            z = z - h.lr * self.decay * y
        total = state["sum"] + h.lr**2
        c = h.lr**2 / total
        average = (1 - c) * state["x"] + c * z
        return self.beta * average + (1 - self.beta) * z, {**own, "z": z, "x": average, "sum": total}


def off(rule, value=0.0):
    """`rule` with this value for its first moment."""
    return dataclasses.replace(rule, **dict.fromkeys(rule.first_moment, value))


def test_the_rules_without_a_first_moment_are_these():
    assert CATALOGUE.keys() - BASES.keys() == {"Adagrad", "Adadelta"}


@every_base
@pytest.mark.parametrize(("beta", "decay"), [(0.9, 0.0), (0.6, 0.3), (0.0, 0.3), (1.0, 0.0)])
def test_every_base_steps_as_the_plain_recursion(base, beta, decay):
    given = {"weight_decay": decay} if "weight_decay" in base().declared() else {}
    found, state = steps(ScheduleFree(base)(lr=0.05, beta1=beta, **given))
    inner = off(dataclasses.replace(base(), **dict.fromkeys(given, 0.0)))
    expected, reference = steps(Recursion(lr=0.05, inner=inner, beta=beta, decay=given.get("weight_decay", 0.0)))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[-1] - (1 - beta) * state["gap"], reference["x"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[-1] + beta * state["gap"], reference["z"], rtol=1e-11, atol=1e-11)
    assert found.diff(dim=0).abs().max() > 1e-4
    assert {key for key, value in state.items() if value.shape} == inner.init(found[0]).keys() | {"gap"}


@every_base
def test_a_first_moment_of_0_is_neither_kept_nor_read_and_is_the_limit(base):
    rule = off(base(lr=0.05))
    values = {name: torch.tensor(rule.value(name), dtype=torch.float64) for name in rule.declared() if name not in rule.first_moment}
    # No gradient of 0, at which a sign is not continuous.
    found, state = steps(rule, values=values, zeros=False)
    assert not {"m", "b", "p"} & state.keys()
    assert rule.init(found[0]).keys() == state.keys()
    near, _ = steps(off(rule, 1e-12), zeros=False)
    torch.testing.assert_close(found, near, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("base", "kept"), [(Adan, {"n"}), (Lion, set()), (SGD, set()), (RMSprop, {"v"}), (Adam, {"v"})])
def test_what_is_left_of_the_state(base, kept):
    assert off(base()).init(torch.zeros(2)).keys() == kept
    averaging = {"gap", "weight", "mix"}
    assert ScheduleFree(base)().init(torch.zeros(2)).keys() == kept | averaging


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_users_rule_that_reads_its_first_moment_does_not_see_beta1(beta):
    found, _ = steps(ScheduleFree(Reads)(lr=0.05, beta1=beta, weight_decay=0.1))
    expected, _ = steps(Recursion(lr=0.05, inner=Reads(beta1=0.0), beta=beta, decay=0.1))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@duals
@pytest.mark.parametrize("kind", ["plain", "values"])
def test_the_view_holds_the_first_moment_at_0_and_the_rest_as_it_is(kind):
    lr, beta1, beta2, t = (torch.tensor(v, dtype=torch.float64) for v in (0.1, 0.9, 0.99, 3.0))

    def made(lr, beta1, beta2):
        values = {"lr": lr, "beta1": beta1, "beta2": beta2}
        return Plain(values) if kind == "plain" else Values(values, lambda name: 1 - values[name])

    def read(*given):
        h = made(*given)
        seen = Zeroed(h, ("beta1", "momentum"))
        zeros = seen.beta1, seen.momentum
        ones = seen.one_minus("beta1"), seen.one_minus("momentum"), seen.one_minus_power("beta1", t), seen.one_minus_power("momentum", t)
        rest = seen.lr, seen.beta2, seen.one_minus("beta2"), seen.one_minus_power("beta2", t)
        same = h.lr, h.beta2, h.one_minus("beta2"), h.one_minus_power("beta2", t)
        return zeros, ones, rest, same

    given = (lr, beta1, beta2)
    (zeros, ones, rest, same), (dzeros, dones, drest, dsame) = torch.func.jvp(read, given, tuple(map(torch.ones_like, given)))
    assert all(float(v) == 0 for v in (*zeros, *dzeros, *dones))
    assert all(float(v) == 1 for v in ones)
    assert all(v.dtype == torch.float64 and v.shape == () for v in (*zeros, *ones))
    assert rest == same
    assert drest == dsame
    assert all(v != 0 for v in drest)
    with pytest.raises((AttributeError, KeyError)):
        Zeroed(made(*given), ("beta1",)).eps  # noqa: B018


@duals
@every_base
def test_derivatives_with_gradients_of_0_are_finite(base):
    rule = ScheduleFree(base)()
    x, names = torch.randn(5), list(rule.declared())
    values = [torch.tensor(rule.value(name)) for name in names]
    state = rule.init(x)
    for at in range(8):
        g, t = torch.zeros(5), torch.tensor(at + 1.0)

        def step(*given, x=x, state=state, g=g, t=t):
            return rule.update(x, g, state, Plain(dict(zip(names, given, strict=True))), t)

        (x, state), (dx, moved) = torch.func.jvp(step, tuple(values), tuple(map(torch.ones_like, values)))
        assert x.isfinite().all()
        assert all(v.isfinite().all() for v in (dx, *moved.values()))


def test_a_rule_of_whole_matrices_stays_one():
    for composed in (ScheduleFree(Matrix), Averaged(Matrix)):
        assert composed.elementwise is False
        found, _ = steps(composed(lr=0.1))
        assert found.isfinite().all()
    assert ScheduleFree(Adam).elementwise is Averaged(Adam).elementwise is True
    expected, _ = steps(Recursion(lr=0.1, inner=Matrix(momentum=0.0)))
    torch.testing.assert_close(steps(ScheduleFree(Matrix)(lr=0.1))[0], expected, rtol=1e-11, atol=1e-11)


def test_what_an_average_beside_a_rule_takes_from_it():
    assert (Averaged(Matrix).trust, Averaged(Matrix).horizon, Averaged(Matrix).first_moment) == (0.07, 70.0, ("momentum",))
    assert (ScheduleFree(Matrix).trust, ScheduleFree(Matrix).horizon, ScheduleFree(Matrix).first_moment) == (0.1, 500.0, ())


@pytest.mark.parametrize("name", [name for name in CATALOGUE if "weight_decay" in CATALOGUE[name]().declared()])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_under_an_average_is_that_of_the_rule(name, decoupled):
    base = CATALOGUE[name]
    option = {"decoupled": decoupled} if "decoupled" in {f.name for f in dataclasses.fields(base())} else {}
    (found, _), (expected, _) = (steps(kind(lr=0.05, weight_decay=0.3, **option)) for kind in (Averaged(base), base))
    assert torch.equal(found, expected)
    assert (found - steps(base(lr=0.05, weight_decay=0.0, **option))[0]).abs().max() > 1e-4


def test_adopt_does_not_decay_at_its_first_call():
    for rule in (ADOPT(weight_decay=0.3), Averaged(ADOPT)(weight_decay=0.3), ScheduleFree(ADOPT)(weight_decay=0.3)):
        xs, _ = steps(rule)
        assert torch.equal(xs[1], xs[0])
        assert not torch.equal(xs[2], xs[1])


def test_options_of_the_base_are_those_of_its_variant():
    assert ScheduleFree(Padam)().inner.running_max
    assert not hasattr(ScheduleFree(Padam)(), "running_max")
    assert Averaged(AdamW)().inner == AdamW()
    assert ScheduleFree(AdamW)().inner == Adam(beta1=0.0, decoupled=True)


def test_a_rule_that_defines_update_can_be_averaged_beside_and_not_within():
    found, state = steps(Averaged(Whole)(lr=0.1, decay=0.5))
    expected, _ = steps(Whole(lr=0.1))
    assert torch.equal(found, expected)
    weights = 0.5 ** torch.arange(11, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(state["average"], torch.einsum("n,nij->ij", weights / weights.sum(), expected[1:]))
    with pytest.raises(TypeError, match="Whole defines update: define direction instead"):
        ScheduleFree(Whole)


@pytest.mark.parametrize("composed", [ScheduleFree, Averaged])
def test_a_composition_raises_at_construction_what_its_base_rejects(composed):
    with pytest.raises(ValueError, match="beta1 or beta2 = 1"):
        composed(Adam)(beta2=1.0)


def test_the_position_between_z_and_the_average_may_be_1():
    rule = ScheduleFree(Adam)(beta1=1.0)
    xs, state = steps(rule)
    assert torch.equal(xs[-1], rule.average(xs[-1], state))
    assert state["gap"].abs().max() > 0


@pytest.mark.parametrize("composed", [ScheduleFree, Averaged])
def test_what_follows_a_step_of_the_base_follows_it_in_a_composition(composed):
    rule = composed(Clamped)(lr=0.2)
    xs, state = steps(rule)
    assert rule.average(xs[-1], state).abs().max() <= 0.5
    expected = steps(Recursion(lr=0.2, inner=Clamped()) if composed is ScheduleFree else Clamped(lr=0.2))[0]
    torch.testing.assert_close(xs, expected, rtol=1e-11, atol=1e-11)
