"""Adadelta."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class Adadelta(Rule):
    """Steps in the units of x, from the running sizes of past steps and gradients, as `torch.optim.Adadelta`.

        g = g + weight_decay·x
        v = rho·v + (1 − rho)·g²
        d = √(s + eps) / √(v + eps) · g
        s = rho·s + (1 − rho)·d²
        x = x − lr·d

    Args:
        lr: factor of the step, default 1.0 (above level 0: the same, in raw space); the paper has none.
        rho: decay of both averages, in [0, 1], default 0.9.
        eps: added under the roots, where torch has it, default 1e-6; the first steps are proportional to its root.
        weight_decay: coupled (L2), at least 0, default 0.

    Raises:
        ValueError: a value outside its domain.

    Source: Zeiler 2012 (arXiv 1212.5701); torch.optim.Adadelta.

    >>> from hyperopt import SGD, Adadelta, Hyper
    >>> Hyper(Adadelta, eps=1e-3, learn=("rho", "eps")).stack(SGD)
    Hyper('Adadelta(eps=0.001, learn=(rho, eps)) / SGD')
    """

    lr: float = hyper(1.0, Positive(), above=1.0)
    rho: float = hyper(0.9, UnitInterval())
    eps: float = hyper(1e-6, Positive())
    weight_decay: float = hyper(0.0, Positive())

    def init(self, x: Tensor) -> State:
        return {"v": x.new_zeros(x.shape), "s": x.new_zeros(x.shape)}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0:
            g = g + h.weight_decay * x
        v = torch.lerp(state["v"], square(g), h.one_minus("rho"))
        d = root(state["s"] + h.eps) / root(v + h.eps) * g
        s = torch.lerp(state["s"], square(d), h.one_minus("rho"))
        return x - h.lr * d, {"v": v, "s": s}

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["v"] + h.eps) / root(state["s"] + h.eps)

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0
