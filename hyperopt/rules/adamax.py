"""Adamax."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper


@dataclass(frozen=True)
class Adamax(Rule):
    """Adam with a decaying maximum in place of the second moment, as `torch.optim.Adamax`.

        g = g + weight_decay·x
        m = beta1·m + (1 − beta1)·g
        u = max(beta2·u, |g| + eps)
        x = x − lr·m̂ / u,                   m̂ = m / (1 − beta1^t)

    Args:
        lr: step size, default 2e-3 (above level 0: 0.1, in raw space).
        beta1: decay of the moment, in [0, 1), default 0.9.
        beta2: decay of the maximum, in [0, 1], default 0.999; it has a gradient where the old maximum is the larger.
        eps: added to |g|, where torch has it, default 1e-8; it has a gradient where |g| is the larger.
        weight_decay: coupled (L2), at least 0, default 0.

    Raises:
        ValueError: a value outside its domain, or a beta1 of 1.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), section 7.1; torch.optim.Adamax.

    >>> from hyperopt import SGD, Adamax, Hyper
    >>> Hyper(Adamax, learn=("lr", "beta2")).stack(SGD)
    Hyper('Adamax(learn=(lr, beta2)) / SGD')
    """

    lr: float = hyper(2e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.999, UnitInterval())
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta1 == 1:
            raise ValueError("Adamax(beta1 = 1) divides by 1 - beta1^t = 0: give a beta1 below 1")

    def init(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape), "u": x.new_zeros(x.shape)}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0:
            g = g + h.weight_decay * x
        m = torch.lerp(state["m"], g, h.one_minus("beta1"))
        u = torch.maximum(h.beta2 * state["u"], g.abs() + h.eps)
        step = h.lr / h.one_minus_power("beta1", t)
        new = {"m": m, "u": u}
        return x - step * m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        # u is 0 only where eps is: no gradient yet, and m is 0 as well.
        return state["u"].clamp_min(torch.finfo(state["u"].dtype).tiny)

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0
