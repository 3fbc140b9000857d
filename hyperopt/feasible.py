"""Sets in which the weights of a group must stay, and the projection onto them after every step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .domains import number

Metric = Tensor | float

# Newton's iteration on 1/‖x(λ)‖ doubles its digits once it is near: metrics that spread over 10 decades need 11 for float64's rounding.
ITERATIONS = 12


@dataclass(frozen=True)
class Feasible(ABC):
    """A closed convex set of weights."""

    @abstractmethod
    def project(self, ys: list[Tensor], metrics: list[Metric]) -> list[Tensor]:
        """The point x of the set that is nearest to y, by (x − y)ᵀ H (x − y).

        Args:
            ys: the weights of a group as one vector, in several tensors.
            metrics: the diagonal of H for each, up to a common factor: positive.
        """


@dataclass(frozen=True)
class Box(Feasible):
    """Every weight between two bounds: lo ≤ x ≤ hi.

    The nearest point is the same in every diagonal metric: x = min(max(y, lo), hi).

    Args:
        lo: the lower bound, a number or -math.inf.
        hi: the upper bound, a number or math.inf; above lo.

    Raises:
        ValueError: bounds in the wrong order, or NaN.
        TypeError: bounds that are not numbers.

    >>> import math
    >>> from hyperopt import Adam, Box, Hyper
    >>> Hyper(Adam, project=Box(0, math.inf)).stack(Adam)
    Hyper('Adam(project=Box(0.0, inf)) / Adam')
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            object.__setattr__(self, name, _bound(f"Box({name})", getattr(self, name)))
        if not self.lo < self.hi:
            raise ValueError(f"Box({self.lo!r}, {self.hi!r}): give a lower bound that is below the upper one")

    def project(self, ys: list[Tensor], metrics: list[Metric]) -> list[Tensor]:
        return [y.clamp(self.lo, self.hi) for y in ys]

    def __repr__(self) -> str:
        return f"Box({self.lo!r}, {self.hi!r})"


@dataclass(frozen=True)
class Ball(Feasible):
    """All weights of a group within a distance of the origin: ‖x‖ ≤ radius.

        x = H (H + λ)⁻¹ y,      λ ≥ 0 so that ‖x‖ = radius (0 where ‖y‖ is not above it)

    λ is one number, found by Newton's method on 1/‖x(λ)‖ − 1/radius, which from λ = 0 rises to the solution without
    overshooting. Only the last iteration is differentiated: at the solution that is the implicit derivative of λ.

    Args:
        radius: the largest norm, above 0.

    Raises:
        ValueError: a radius that is not above 0, or not finite.
        TypeError: a radius that is not a number.

    Source: the iteration is that of trust regions, Moré and Sorensen 1983.

    >>> from hyperopt import SGD, Adam, Ball, Hyper
    >>> Hyper(SGD, project=Ball(3)).stack(Adam)
    Hyper('SGD(project=Ball(3.0)) / Adam')
    """

    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", _bound("Ball(radius)", self.radius))
        if not 0 < self.radius < math.inf:
            raise ValueError(f"Ball({self.radius!r}): give a finite radius above 0")

    def project(self, ys: list[Tensor], metrics: list[Metric]) -> list[Tensor]:
        plain = [_primal(y) for y in ys], [_primal(h) if isinstance(h, Tensor) else h for h in metrics]
        multiplier = ys[0].new_zeros(())
        for _ in range(ITERATIONS - 1):
            multiplier = self._newton(*plain, multiplier)
        multiplier = self._newton(ys, metrics, multiplier)
        xs = _nearest(ys, metrics, multiplier)
        # What rounding leaves.
        shrink = (self.radius / _norm(xs).clamp_min(self.radius)).to(multiplier)
        return [x * shrink.to(x) for x in xs]

    def _newton(self, ys: list[Tensor], metrics: Sequence[Metric], multiplier: Tensor) -> Tensor:
        xs = _nearest(ys, metrics, multiplier)
        norm = _norm(xs)
        slope = _sum([x * x / (h + multiplier.to(x)) for x, h in zip(xs, metrics, strict=True)])
        tiny = torch.finfo(norm.dtype).tiny
        return (multiplier + norm * norm / slope.clamp_min(tiny) * (norm / self.radius - 1)).clamp_min(0)

    def __repr__(self) -> str:
        return f"Ball({self.radius!r})"


def _nearest(ys: list[Tensor], metrics: Sequence[Metric], multiplier: Tensor) -> list[Tensor]:
    return [y * (h / (h + multiplier.to(y))) for y, h in zip(ys, metrics, strict=True)]


def _norm(xs: list[Tensor]) -> Tensor:
    return _sum([x * x for x in xs]).clamp_min(torch.finfo(xs[0].dtype).tiny).sqrt()


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.sum().to(parts[0]) for part in parts]).sum()


def _primal(a: Tensor) -> Tensor:
    return forward_ad.unpack_dual(a).primal.detach()


def _bound(argument: str, value: object) -> float:
    bound = number(argument, value)
    if math.isnan(bound):
        raise ValueError(f"{argument} is not a number (nan): give a bound, or math.inf for none")
    return bound
