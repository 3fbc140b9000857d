"""Domains: round trips, values that cannot leave, complements without cancellation."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperopt import Interval, Positive, Real, UnitInterval
from hyperopt.domains import complement

seeded = settings(derandomize=True, deadline=None, max_examples=200)

DTYPES = (torch.float32, torch.float64)
FIXED = [
    Positive(),
    Positive(0.1),
    UnitInterval(),
    Interval(100, 101),
    Interval(-3, 0.1),
    Interval(0.9, 1),
    Interval(-1e-3, 1e3),
    Interval(1e-8, 1e-2),
]
ends = st.floats(-1e6, 1e6).map(lambda x: round(x, 4))
# An interval narrower than a thousandth of its ends has too few float32 numbers inside to learn among.
intervals = st.tuples(ends, ends).filter(lambda e: e[1] - e[0] > 1e-3 * max(abs(e[0]), abs(e[1]))).map(lambda e: Interval(*e))
raws = st.floats(allow_nan=False, width=64)


def clamped(domain, raw, dtype):
    low, high = domain.raw_limits(dtype)
    return torch.tensor(raw, dtype=dtype).clamp(low, high)


def assert_strictly_inside(domain, raw, dtype):
    value = domain.value(clamped(domain, raw, dtype))
    low, high = domain.bounds()
    assert value.dtype == dtype
    assert low < float(value) < high, (domain, raw, float(value))
    # And in its own precision, where the ends are rounded too: raw(value) must stay finite.
    assert torch.tensor(low, dtype=dtype) < value < torch.tensor(high, dtype=dtype), (domain, raw, float(value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", FIXED, ids=repr)
@pytest.mark.parametrize("raw", [-math.inf, -1e300, -1e4, -89.0, -17.0, 0.0, 17.0, 89.0, 1e4, 1e300, math.inf])
def test_a_value_stays_strictly_inside_for_extreme_raw(domain, raw, dtype):
    assert_strictly_inside(domain, raw, dtype)


@seeded
@given(domain=st.one_of(st.sampled_from(FIXED), intervals), raw=raws, dtype=st.sampled_from(DTYPES))
def test_a_value_never_leaves_its_domain(domain, raw, dtype):
    assert_strictly_inside(domain, raw, dtype)


@seeded
@given(share=st.floats(1e-3, 1 - 1e-3), domain=st.one_of(st.sampled_from(FIXED[1:]), intervals))
def test_value_to_raw_to_value(share, domain):
    low, high = domain.bounds()
    value = torch.tensor(low + (high - low) * share, dtype=torch.float64)
    back = domain.value(domain.raw(value))
    assert math.isclose(float(back), float(value), rel_tol=1e-9, abs_tol=1e-12 * max(abs(low), abs(high)))


@seeded
@given(value=st.floats(1e-300, 1e300))
def test_positive_value_to_raw_to_value(value):
    back = Positive().value(Positive().raw(torch.tensor(value, dtype=torch.float64)))
    assert math.isclose(float(back), value, rel_tol=1e-12)


@seeded
@given(raw=st.floats(-12, 12), domain=st.sampled_from([Positive(), Positive(0.1), UnitInterval(), Interval(0, 3), Interval(-1, 1), Real()]))
def test_raw_to_value_to_raw(raw, domain):
    back = domain.raw(domain.value(torch.tensor(raw, dtype=torch.float64)))
    assert math.isclose(float(back), raw, rel_tol=1e-9, abs_tol=1e-9)


@seeded
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_real_is_the_identity(value):
    x = torch.tensor(value, dtype=torch.float64)
    assert Real().value(x).equal(x)
    assert Real().raw(x).equal(x)
    assert Real().raw_limits(torch.float32) == (-math.inf, math.inf)


@pytest.mark.parametrize("domain", [*FIXED, Real()], ids=repr)
def test_value_and_raw_are_increasing_and_differentiable(domain):
    raw = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(domain.value(raw).sum(), raw)
    assert (slope > 0).all()
    value = domain.value(raw.detach()).requires_grad_()
    (inverse,) = torch.autograd.grad(domain.raw(value).sum(), value)
    assert torch.allclose(slope * inverse, torch.ones(7, dtype=torch.float64), rtol=1e-6)


def exact_value(domain, raw):
    """The value of a raw number in 50 digits."""
    raw = mpmath.mpf(raw)
    if isinstance(domain, Positive):
        return mpmath.exp(domain.scale * raw)
    low, high = (mpmath.mpf(e) for e in domain.bounds())
    return low + (high - low) / (1 + mpmath.exp(-raw))


@seeded
@given(raw=st.floats(-16, 16, width=32), dtype=st.sampled_from(DTYPES))
def test_complement_of_the_unit_interval_is_exact(raw, dtype):
    with mpmath.workdps(50):
        exact = 1 - exact_value(UnitInterval(), raw)
        error = abs(mpmath.mpf(float(UnitInterval().complement(torch.tensor(raw, dtype=dtype)))) / exact - 1)
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("domain", "raw"),
    [
        (Interval(0.5, 1), 9.0),
        (Interval(0.0, 1.0), 15.0),
        (Positive(), -1e-6),
        (Positive(), 1e-5),
        (Positive(), -3.0),
        (Interval(-1, 1), 9.0),
    ],
)
def test_complement_keeps_its_digits_near_1(domain, raw, dtype):
    with mpmath.workdps(50):
        at = torch.tensor(raw, dtype=dtype)
        exact = 1 - exact_value(domain, float(at))
        error = abs(mpmath.mpf(float(domain.complement(at))) / exact - 1)
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("domain", [UnitInterval(), Interval(0.5, 1)], ids=repr)
@pytest.mark.parametrize("beta", ["0.6", "0.9", "0.99", "0.999", "0.9999", "0.99999", "0.999999"])
def test_a_learned_beta_starts_where_a_held_one_does(domain, beta):
    """float32 holds 0.99900001 for 0.999: its complement is that of the decimal, held as well as learned."""
    value = torch.tensor(float(beta))
    exact = float(1 - mpmath.mpf(beta))
    assert float(complement(value)) == pytest.approx(exact, rel=1e-7)
    assert float(domain.complement(domain.raw(value))) == pytest.approx(exact, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, at the first dual number
@pytest.mark.parametrize("dtype", DTYPES)
def test_taking_the_decimal_leaves_the_derivative_alone(dtype):
    """Most numbers of float32 near 1 are the nearest to some decimal, and rounding to it has no derivative of its own."""
    value = torch.tensor([0.3, 0.9, 0.999, 0.9999999, 2 / 3], dtype=dtype)
    for function, slope in ((complement, -torch.ones_like(value)), (UnitInterval().raw, 1 / (value * complement(value)))):
        _, forward = torch.func.jvp(function, (value,), (torch.ones_like(value),))
        (backward,) = torch.autograd.grad(function(leaf := value.clone().requires_grad_()).sum(), leaf)
        torch.testing.assert_close(forward, slope)
        torch.testing.assert_close(backward, slope)


def test_interval_far_from_zero():
    domain = Interval(100, 101)
    value = torch.tensor(100.25, dtype=torch.float64)
    assert float(domain.raw(value)) == pytest.approx(math.log(1 / 3), rel=1e-12)
    assert float(domain.value(domain.raw(value))) == pytest.approx(100.25, rel=1e-14)
    assert domain.inside(100.5)
    assert not domain.inside(100)
    assert domain.admits(100)
    assert not domain.admits(99.999)
    assert not domain.admits(math.nan)


@pytest.mark.parametrize("bad", [(1, 1), (2, 1), (-math.inf, 0), (0, math.inf), (math.nan, 1), (0, math.nan)])
def test_a_bad_interval_raises(bad):
    with pytest.raises(ValueError, match=r"Interval\(.*both ends must be finite and low below high"):
        Interval(*bad)


@pytest.mark.parametrize(("domain", "boundary"), [(Positive(), 0.0), (UnitInterval(), 0.0), (UnitInterval(), 1.0), (Interval(2, 3), 3.0)])
def test_the_boundary_is_held_but_not_learned(domain, boundary):
    assert domain.admits(boundary)
    assert not domain.inside(boundary)


def test_infinity_is_never_admitted():
    assert not any(domain.admits(value) for domain in (Positive(), Real()) for value in (math.inf, -math.inf, math.nan))


def test_domains_are_equal_by_value_and_frozen():
    assert UnitInterval() == Interval(0.0, 1.0) != Interval(0.0, 2.0)
    with pytest.raises(AttributeError):
        UnitInterval().low = 3.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", [*FIXED, Real()], ids=repr)
def test_a_scaled_value_stays_inside(domain, dtype):
    """An interval may begin above 0, or hold negative numbers, so that a multiple of a value is outside of it."""
    for start in (-20.0, -3.0, 0.0, 2.0, 20.0):
        raw = clamped(domain, start, dtype)
        for factor in (1e-30, 0.01, 0.5, 2.0, 1e30):
            scaled = domain.scaled(raw, torch.tensor(factor, dtype=dtype)).clamp(*domain.raw_limits(dtype))
            assert_strictly_inside(domain, float(scaled), dtype)
            exact = float(domain.value(raw)) * factor
            low, high = (float(domain.value(torch.tensor(limit, dtype=dtype))) for limit in domain.raw_limits(dtype))
            if low < exact < high and 0.01 <= factor <= 2:
                assert float(domain.value(scaled)) == pytest.approx(exact, rel=1e-3)
        assert domain.scaled(raw, torch.ones((), dtype=dtype)).equal(raw)


def test_a_real_number_keeps_its_digits_when_it_is_scaled():
    tiny = torch.tensor(1e-10)
    assert Real().scaled(torch.ones(()), tiny).equal(tiny)


@pytest.mark.parametrize("make", [lambda: Interval("0", 1), lambda: Interval(0, None), lambda: Interval(True, 2), lambda: Positive("1")])
def test_a_bound_that_is_no_number_is_named(make):
    with pytest.raises(TypeError, match=r"(Interval\((low|high)\)|Positive\(scale\)) must be a number, got"):
        make()


def test_bounds_are_floats_whatever_was_given():
    assert repr(Interval(-1, np.int64(5))) == "Interval(low=-1.0, high=5.0)"
    assert repr(Positive(np.float32(2))) == "Positive(2.0)"
    assert not Positive().admits(10**400)
    assert not Real().admits(-(10**400))
