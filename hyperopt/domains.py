"""The sets that hyperparameters live in, and the unconstrained numbers through which they are learned."""

import math
import numbers
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def complement(value: Tensor) -> Tensor:
    """1 − value, computed from the decimal number that was meant.

    float32 stores 0.999 as 0.99900001, which puts 1 − value off by a relative 1e-5. If a decimal with seven digits rounds to the same
    float32, the complement of that decimal is returned. The derivative is −1 in either case.
    """
    exact = 1 - value
    if value.dtype == torch.float64:
        return exact
    decimal = (exact * 1e7).round() / 1e7
    # A detached correction, because rounding has derivative 0. Numbers this close have an exact difference and an exact sum.
    return exact + torch.where(1 - decimal == value, decimal - exact, 0.0).detach()


def number(argument: str, value: object) -> float:
    """`value` as a float, infinite for an integer that is too large for one.

    Raises:
        TypeError: not a real number, naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


@dataclass(frozen=True)
class Domain(ABC):
    """An open set of real numbers with a smooth bijection to the real line.

    `value(raw)` is the hyperparameter and `raw(value)` the unconstrained number that is learned; both are differentiable torch
    operations. A value on the boundary of the set can be held constant, but not learned.
    """

    @abstractmethod
    def value(self, raw: Tensor) -> Tensor:
        """The hyperparameter for a raw number."""

    @abstractmethod
    def raw(self, value: Tensor) -> Tensor:
        """The raw number for a value strictly inside the set."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The lower and the upper bound of the set."""

    @abstractmethod
    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """The bounds between which a raw number has a value strictly inside the set, also after rounding to `dtype`."""

    def complement(self, raw: Tensor) -> Tensor:
        """1 − value(raw), without cancellation where that is possible."""
        return 1 - self.value(raw)

    def scaled(self, raw: Tensor, factor: Tensor) -> Tensor:
        """The raw number for `factor` times the value, or for the bound if that is outside the set; exactly `raw` if factor is 1."""
        low, high = (self.value(raw.new_full((), limit)) for limit in self.raw_limits(raw.dtype))
        # Not a difference of raw numbers added to `raw`: near a bound, and for Real near 0, it cancels.
        return torch.where(factor == 1, raw, self.raw((self.value(raw) * factor).clamp(low, high)))

    def log_size(self, raw: Tensor) -> Tensor:
        """log |value|; finite also if the value is 0."""
        value = self.value(raw).abs()
        return value.clamp_min(torch.finfo(value.dtype).tiny).log()

    def inside(self, value: float) -> bool:
        """Whether `value` is strictly inside the set, so that it can be learned."""
        low, high = self.bounds()
        return low < value < high

    def admits(self, value: float) -> bool:
        """Whether `value` is inside the set or on its boundary, so that it can be held constant."""
        low, high = self.bounds()
        return low <= value <= high and abs(value) <= sys.float_info.max  # an integer may be too large for math.isfinite


@dataclass(frozen=True)
class Positive(Domain):
    """The positive numbers, learned through their logarithm.

        value = exp(scale·raw)

    Args:
        scale: change of log value per unit change of the raw number, above 0. The default, 1, suits lr, whose good values span decades;
            exponents, whose good values span a factor of a few, use 0.1.

    Raises:
        ValueError: a scale that is not above 0, or not finite.
        TypeError: a scale that is not a number.

    >>> import torch
    >>> from hyperopt import Positive
    >>> Positive().value(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3679, 1.0000, 2.7183])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", number("Positive(scale)", self.scale))
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Positive({self.scale!r}): give a finite scale above 0")

    def value(self, raw: Tensor) -> Tensor:
        return self._log(raw).exp()

    def raw(self, value: Tensor) -> Tensor:
        return value.log() if self.scale == 1 else value.log() / self.scale

    def complement(self, raw: Tensor) -> Tensor:
        return -self._log(raw).expm1()

    def scaled(self, raw: Tensor, factor: Tensor) -> Tensor:
        return raw + self.raw(factor)

    def log_size(self, raw: Tensor) -> Tensor:
        return self._log(raw)

    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        # exp(89) overflows float32, and some devices flush subnormal numbers to zero.
        info = torch.finfo(dtype)
        return (math.log(info.tiny) + 1) / self.scale, (math.log(info.max) - 1) / self.scale

    def _log(self, raw: Tensor) -> Tensor:
        return raw if self.scale == 1 else raw * self.scale

    def __repr__(self) -> str:
        return "Positive()" if self.scale == 1 else f"Positive({float(self.scale)!r})"


@dataclass(frozen=True)
class Interval(Domain):
    """The open interval (low, high), learned through the logit.

        value = low + (high − low)·sigmoid(raw)

    Args:
        low, high: the bounds, finite, low below high.

    Raises:
        ValueError: bounds that are not finite, or in the wrong order.
        TypeError: bounds that are not numbers.

    >>> import torch
    >>> from hyperopt import Interval
    >>> Interval(0, 10).value(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([2.6894, 5.0000, 7.3106])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, number(f"Interval({name})", getattr(self, name)))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Interval({self.low!r}, {self.high!r}): both ends must be finite and low below high, as in Interval(0, 1)")

    def value(self, raw: Tensor) -> Tensor:
        return self._from(self.low, raw.sigmoid())

    def raw(self, value: Tensor) -> Tensor:
        rest = complement(value) if self.high == 1 else self.high - value
        return ((value - self.low) / rest).log()

    def complement(self, raw: Tensor) -> Tensor:
        # sigmoid(−raw) keeps all digits where 1 − sigmoid(raw) cancels, which is the common case: betas are close to 1.
        return self._from(1 - self.high, (-raw).sigmoid())

    def _from(self, start: float, fraction: Tensor) -> Tensor:
        return fraction if self.bounds() == (0, 1) else start + (self.high - self.low) * fraction

    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        # The smallest fraction of the interval that keeps a value off either end after rounding. For (0, 1) in float32 it bounds raw by
        # ±16.4; sigmoid(17) would round to 1. In other intervals the ends are rounded too, which needs a larger margin.
        margin = 0.6 if self.bounds() == (0, 1) else 2.0
        fraction = margin * torch.finfo(dtype).eps * max(abs(self.low), abs(self.high)) / (self.high - self.low)
        limit = math.log(1 / fraction - 1) if fraction < 0.5 else 0.0
        return -limit, limit


def UnitInterval() -> Interval:
    """The open interval (0, 1), learned through the logit: the domain of betas and other decays.

    >>> from hyperopt import UnitInterval
    >>> UnitInterval()
    Interval(low=0.0, high=1.0)
    """
    return Interval(0.0, 1.0)


@dataclass(frozen=True)
class Real(Domain):
    """All real numbers, learned directly: value = raw.

    The paper learns lr like this; nothing then keeps lr positive.

    >>> from hyperopt import SGD, Hyper, Real
    >>> Hyper(SGD, domains={"lr": Real()}, horizon=1, trust=None).stack(SGD)
    Hyper('SGD(horizon=1, trust=None, domains={lr: Real}) / SGD')
    """

    def value(self, raw: Tensor) -> Tensor:
        return raw

    def raw(self, value: Tensor) -> Tensor:
        return value

    def bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        return -math.inf, math.inf
