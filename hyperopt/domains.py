"""The sets in which hyperparameters live, and the unconstrained number through which each is learned."""

import math
import numbers
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def complement(value: Tensor) -> Tensor:
    """1 − value, for the decimal that was meant.

    float32 holds 0.99900001 for 0.999, so that 1 − value is off by 1e-5 of itself. Where a decimal of seven digits rounds to
    the same float32, it is taken instead; the derivative stays −1.
    """
    exact = 1 - value
    if value.dtype == torch.float64:
        return exact
    decimal = (exact * 1e7).round() / 1e7
    # Added, as rounding has the derivative 0; the difference of two numbers so close is exact, and so is the sum.
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
    """An open set of numbers and a smooth bijection between it and the real line.

    `value(raw)` is the hyperparameter, `raw(value)` the number that is learned; both are differentiable torch operations.
    Values on the boundary of the set may be held, but not learned.
    """

    @abstractmethod
    def value(self, raw: Tensor) -> Tensor:
        """The hyperparameter that belongs to `raw`."""

    @abstractmethod
    def raw(self, value: Tensor) -> Tensor:
        """The unconstrained number that belongs to `value`, which lies strictly inside."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The end points of the set."""

    @abstractmethod
    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """The interval of raw numbers whose values stay strictly inside the set when rounded to `dtype`."""

    def complement(self, raw: Tensor) -> Tensor:
        """1 − value."""
        return 1 - self.value(raw)

    def scaled(self, raw: Tensor, factor: Tensor) -> Tensor:
        """The raw number of `factor` times the value, exactly `raw` where factor is 1."""
        value = self.value(raw)
        return raw + (self.raw(value * factor) - self.raw(value))

    def log_size(self, raw: Tensor) -> Tensor:
        """log |value|, finite also where the value is 0."""
        value = self.value(raw).abs()
        return value.clamp_min(torch.finfo(value.dtype).tiny).log()

    def inside(self, value: float) -> bool:
        """Whether `value` lies strictly inside, where it can be learned."""
        low, high = self.bounds()
        return low < value < high

    def admits(self, value: float) -> bool:
        """Whether `value` lies inside or on the boundary, where it can be held."""
        low, high = self.bounds()
        return low <= value <= high and abs(value) <= sys.float_info.max  # an integer may be too large for math.isfinite


@dataclass(frozen=True)
class Positive(Domain):
    """Positive numbers, learned through their logarithm: value = exp(scale·raw).

    Args:
        scale: how far log value moves for a move of 1 of the raw number, above 0; default 1, as it suits lr, whose good values
            spread over decades. Exponents, which spread over factors, are learned with 0.1.

    Raises:
        ValueError: a scale that is not above 0, or not finite.
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
        # exp(89) is infinite in float32, and a subnormal is flushed to zero by some devices.
        info = torch.finfo(dtype)
        return (math.log(info.tiny) + 1) / self.scale, (math.log(info.max) - 1) / self.scale

    def _log(self, raw: Tensor) -> Tensor:
        return raw if self.scale == 1 else raw * self.scale

    def __repr__(self) -> str:
        return "Positive()" if self.scale == 1 else f"Positive({float(self.scale)!r})"


@dataclass(frozen=True)
class Interval(Domain):
    """The open interval (low, high), learned through the logit: value = low + (high − low)·sigmoid(raw)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, number(f"Interval({name})", getattr(self, name)))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Interval({self.low!r}, {self.high!r}): both ends must be finite and low below high")

    def value(self, raw: Tensor) -> Tensor:
        if self.bounds() == (0, 1):
            return raw.sigmoid()
        return self.low + (self.high - self.low) * raw.sigmoid()

    def raw(self, value: Tensor) -> Tensor:
        rest = complement(value) if self.high == 1 else self.high - value
        return ((value - self.low) / rest).log()

    def complement(self, raw: Tensor) -> Tensor:
        # sigmoid(−raw) keeps every digit where 1 − sigmoid(raw) cancels: betas near 1 are the common case.
        if self.bounds() == (0, 1):
            return (-raw).sigmoid()
        return (1 - self.high) + (self.high - self.low) * (-raw).sigmoid()

    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        # The smallest share of the interval that still moves a value off either end after rounding. For (0, 1) in float32 raw
        # stays within ±16.4, where sigmoid(17) would round to 1; elsewhere the ends themselves are rounded, which takes more.
        margin = 0.6 if self.bounds() == (0, 1) else 2.0
        share = margin * torch.finfo(dtype).eps * max(abs(self.low), abs(self.high)) / (self.high - self.low)
        limit = math.log(1 / share - 1) if share < 0.5 else 0.0
        return -limit, limit


def UnitInterval() -> Interval:
    """The open interval (0, 1), learned through the logit."""
    return Interval(0.0, 1.0)


@dataclass(frozen=True)
class Real(Domain):
    """Every real number, learned as it is; for lr this is what the paper does, and nothing then keeps lr positive."""

    def value(self, raw: Tensor) -> Tensor:
        return raw

    def raw(self, value: Tensor) -> Tensor:
        return value

    def bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        return -math.inf, math.inf
