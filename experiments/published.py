"""What Gradient Descent: The Ultimate Optimizer published, to compare with: its model, its code, and the spaces in which it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gradient_descent_the_ultimate_optimizer import gdtuo
from torch import Tensor, nn

from experiments import models
from hyperopt import SGD, Adagrad, Adam, Domain, Real, RMSprop, Rule, UnitInterval


def mlp_tanh() -> nn.Sequential:
    """The model of the authors' example, with a tanh on the output."""
    return models.mlp().append(nn.Tanh())


@dataclass(frozen=True)
class Square(Domain):
    """Positive numbers, learned through their square root, as the paper learns RMSProp's alpha; a root may change its sign."""

    def value(self, raw: Tensor) -> Tensor:
        return raw * raw

    def raw(self, value: Tensor) -> Tensor:
        return value.sqrt()

    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        limit = torch.finfo(dtype).max ** 0.5 / 2
        return -limit, limit


@dataclass(frozen=True)
class Tanh(Domain):
    """(0, 1) through (tanh + 1) / 2, as the paper learns decays: the logit at twice the raw number."""

    def value(self, raw: Tensor) -> Tensor:
        return UnitInterval().value(2 * raw)

    def raw(self, value: Tensor) -> Tensor:
        return UnitInterval().raw(value) / 2

    def complement(self, raw: Tensor) -> Tensor:
        return UnitInterval().complement(2 * raw)

    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def raw_limits(self, dtype: torch.dtype) -> tuple[float, float]:
        low, high = UnitInterval().raw_limits(dtype)
        return low / 2, high / 2


DOMAINS: dict[type[Rule], dict[str, Domain]] = {
    SGD: {"lr": Real()},
    Adam: {"lr": Real(), "beta1": Tanh(), "beta2": Tanh()},
    Adagrad: {"lr": Real()},
    RMSprop: {"lr": Square(), "alpha": Tanh()},
}


class Authors:
    """The authors' published code, as something that is stepped after a plain backward.

    Their example calls backward with create_graph=True; without it not a bit of any weight or hyperparameter changes, as every gradient is
    detached before it is used.

    Args:
        model: what is trained.
        rule: SGD, Adam, Adagrad or RMSprop, at level 0.
        lr: where its alpha starts.
        learn: ("lr",), or that and the decays, which are beta1 and beta2 or alpha.
        above: the rule of level 1, or None.
        step: the alpha of level 1.
        beta2: of Adam, on both levels.
    """

    def __init__(
        self, model: nn.Module, rule: type[Rule], lr: float, learn: tuple[str, ...], above: type[Rule] | None, step: float, beta2: float
    ) -> None:
        top = _theirs(above, ("lr",), step, beta2, gdtuo.NoOpOptimizer()) if above else gdtuo.NoOpOptimizer()
        self.level0 = _theirs(rule, learn, lr, beta2, top)
        self.root = rule is RMSprop
        self.wrapper = gdtuo.ModuleWrapper(model, optimizer=self.level0)
        self.wrapper.initialize()
        self._begin()

    @property
    def param_groups(self) -> list[dict[str, float]]:
        """lr as it is now."""
        alpha = self.level0.parameters["alpha"].item()
        return [{"lr": alpha * alpha if self.root else alpha}]

    def step(self) -> None:
        """Update every level, and get ready for the next backward."""
        self.wrapper.step()
        self._begin()

    def _begin(self) -> None:
        self.wrapper.begin()
        self.wrapper.zero_grad()


def _theirs(rule: type[Rule], learn: tuple[str, ...], alpha: float, beta2: float, above: Any) -> Any:
    """Their optimizer; what it does not learn is a constant there."""
    only = learn == ("lr",)
    make = {SGD: gdtuo.SGD, Adagrad: gdtuo.AdaGrad, RMSprop: gdtuo.RMSPropAlpha if only else gdtuo.RMSProp}
    make |= {Adam: partial(gdtuo.AdamBaydin if only else gdtuo.Adam, beta2=beta2)}
    return make[rule](alpha=alpha, optimizer=above)
