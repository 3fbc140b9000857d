"""Feasible sets: constraints on the weights of a parameter group, with the projection that follows every step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from .domains import number
from .rule import constant

Metric = Tensor | float

# Newton's iteration on 1/‖x(λ)‖ converges quadratically: metrics that span 10 decades need 11 iterations to reach float64's rounding error.
ITERATIONS = 12
LARGE = 1e15  # weights above which squares are taken in another unit


@dataclass(frozen=True)
class Feasible(ABC):
    """A closed convex set of weights."""

    elementwise: ClassVar[bool] = False  # whether each weight is projected apart from the others

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(getattr(self, f.name)) for f in fields(self))})"

    @abstractmethod
    def project(self, ys: list[Tensor], metrics: list[Metric]) -> list[Tensor]:
        """The point x of the set that minimises (x − y)ᵀ H (x − y).

        Args:
            ys: the weights of a group: one vector, split into several tensors.
            metrics: the diagonal of H for each of them, positive, up to a common factor.
        """


@dataclass(frozen=True, repr=False)
class Box(Feasible):
    """Bounds on every weight: lo ≤ x ≤ hi.

        x = min(max(y, lo), hi)      the nearest point in every diagonal metric

    Args:
        lo, hi: the bounds of every weight, lo below hi; -math.inf or math.inf for no bound.

    Raises:
        ValueError: bounds in the wrong order, or NaN.
        TypeError: bounds that are not numbers.

    >>> import math
    >>> from hyperopt import Adam, Box, Hyper
    >>> Hyper(Adam, project=Box(0, math.inf)).stack(Adam)
    Hyper('Adam(project=Box(0.0, inf)) / Adam')
    """

    elementwise: ClassVar[bool] = True
    lo: float
    hi: float

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            object.__setattr__(self, name, _bound(f"Box({name})", getattr(self, name)))
        if not self.lo < self.hi:
            raise ValueError(f"Box({self.lo!r}, {self.hi!r}): give a lower bound that is below the upper one")

    def project(self, ys: list[Tensor], metrics: list[Metric]) -> list[Tensor]:
        return [y.clamp(self.lo, self.hi) for y in ys]


@dataclass(frozen=True, repr=False)
class Ball(Feasible):
    """A bound on the Euclidean norm of all weights of a group together: ‖x‖ ≤ radius.

        x = H (H + λ)⁻¹ y,      λ ≥ 0 such that ‖x‖ = radius (λ = 0 if ‖y‖ ≤ radius)

    The scalar λ is found by Newton's method on 1/‖x(λ)‖ − 1/radius, which increases from λ = 0 to the solution without overshooting.
    Only the last iteration is differentiated, which at the solution gives the implicit derivative of λ.

    Args:
        radius: the largest norm, above 0 and finite.

    Raises:
        ValueError: a radius that is not above 0, or not finite.
        TypeError: a radius that is not a number.

    Source: the iteration is that of trust-region methods, Moré and Sorensen 1983.

    >>> from hyperopt import SGD, Adam, Ball, Hyper
    >>> Hyper(SGD, project=Ball(3)).stack(Adam)
    Hyper('SGD(project=Ball(3.0)) / Adam')
    """

    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", _bound("Ball(radius)", self.radius))
        if not 0 < self.radius < math.inf:
            raise ValueError(f"Ball({self.radius!r}): give a finite radius above 0, as in Ball(10)")

    def project(self, ys: list[Tensor], metrics: list[Metric]) -> list[Tensor]:
        # A step may have taken weights to 1e20, which has no square. The nearest point goes with the unit that both are measured in.
        unit = _unit(ys)
        ys, radius = [y / unit.to(y) for y in ys], self.radius / unit
        plain = [constant(y) for y in ys], [constant(h) if isinstance(h, Tensor) else h for h in metrics]
        multiplier = ys[0].new_zeros(())
        for _ in range(ITERATIONS - 1):
            multiplier = _newton(*plain, multiplier, radius)
        multiplier = _newton(ys, metrics, multiplier, radius)
        xs = _nearest(ys, metrics, multiplier)
        # Rounding may leave the norm slightly too large.
        scale = (radius / _norm(xs).clamp_min(radius) * unit).to(multiplier)
        return [x * scale.to(x) for x in xs]


def _newton(ys: list[Tensor], metrics: Sequence[Metric], multiplier: Tensor, radius: Tensor) -> Tensor:
    xs = _nearest(ys, metrics, multiplier)
    norm = _norm(xs)
    slope = _sum([x * x / (h + multiplier.to(x)) for x, h in zip(xs, metrics, strict=True)])
    tiny = torch.finfo(norm.dtype).tiny
    return (multiplier + norm * norm / slope.clamp_min(tiny) * (norm / radius - 1)).clamp_min(0)


def _nearest(ys: list[Tensor], metrics: Sequence[Metric], multiplier: Tensor) -> list[Tensor]:
    return [y * (h / (h + multiplier.to(y))) for y, h in zip(ys, metrics, strict=True)]


def _unit(ys: list[Tensor]) -> Tensor:
    """The root of the largest element where that is large, so that the squares of weights and radius are numbers; 1 elsewhere."""
    largest = torch.stack([ys[0].new_ones(()), *[constant(y).abs().amax().to(ys[0]) for y in ys if y.numel()]]).amax()
    return torch.where(largest > LARGE, largest.clamp_max(torch.finfo(largest.dtype).max).sqrt(), 1.0)


def _norm(xs: list[Tensor]) -> Tensor:
    return _sum([x * x for x in xs]).clamp_min(torch.finfo(xs[0].dtype).tiny).sqrt()


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.sum().to(parts[0]) for part in parts]).sum()


def _bound(argument: str, value: object) -> float:
    bound = number(argument, value)
    if math.isnan(bound):
        raise ValueError(f"{argument} is not a number (nan): give a bound, or math.inf for no bound")
    return bound
