"""The model, the code and the parametrisations published with Gradient Descent: The Ultimate Optimizer, for comparison."""

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
    """Positive numbers, learned through their square root, as the paper learns RMSProp's alpha; the root may change sign."""

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
    """(0, 1), learned through (tanh(r) + 1) / 2, as the paper learns decays; this is the sigmoid of 2r."""

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
    """The authors' published code behind the interface of an optimizer, stepped after a plain backward pass.

    Their example calls backward with create_graph=True. Without it all weights and hyperparameters are the same to the bit, as their code
    detaches every gradient before it is used.

    Args:
        model: the model to train.
        rule: the rule of level 0: SGD, Adam, Adagrad or RMSprop.
        lr: initial alpha of level 0.
        learn: ("lr",), or that with the decays of the rule: beta1 and beta2, or alpha.
        above: the rule of level 1, or None.
        step: alpha of level 1.
        beta2: beta2 of Adam on both levels.
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
        """The present lr, as in an optimizer of torch."""
        alpha = self.level0.parameters["alpha"].item()
        return [{"lr": alpha * alpha if self.root else alpha}]

    def step(self) -> None:
        """Update every level, and prepare the next backward pass."""
        self.wrapper.step()
        self._begin()

    def _begin(self) -> None:
        self.wrapper.begin()
        self.wrapper.zero_grad()


def _theirs(rule: type[Rule], learn: tuple[str, ...], alpha: float, beta2: float, above: Any) -> Any:
    """Their optimizer that learns these hyperparameters; the others are constants in it."""
    only = learn == ("lr",)
    make = {SGD: gdtuo.SGD, Adagrad: gdtuo.AdaGrad, RMSprop: gdtuo.RMSPropAlpha if only else gdtuo.RMSProp}
    make |= {Adam: partial(gdtuo.AdamBaydin if only else gdtuo.Adam, beta2=beta2)}
    return make[rule](alpha=alpha, optimizer=above)
