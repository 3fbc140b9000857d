"""Adan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class Adan(Rule):
    """Adaptive Nesterov momentum from differences of gradients, with decoupled weight decay.

        d = g − g_{t−1},   0 at the first step
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·d
        n = beta3·n + (1 − beta3)·(g + beta2·d)²
        x = x − lr·weight_decay·x
        x = x − lr·(m̂ + beta2·v̂) / (√n̂ + eps)

    with m̂ = m / (1 − beta1^t) and so on. The betas are those of the authors' code, 1 − β in the paper. The decay is that of the
    code's no_prox=True: the proximal one divides by 1 + lr·weight_decay, and a step that is not linear in lr cannot be held by trust.

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2, beta3: decays of the gradient, its difference and the square, in [0, 1), default 0.98, 0.92, 0.99.
        eps: added to the root, default 1e-8.
        weight_decay: decoupled, at least 0, default 0.
        bias_correction: divide the averages by 1 − beta^t, as the authors' code does.

    Raises:
        ValueError: a value outside its domain, or a beta of 1 with bias correction.

    Source: Xie et al. 2022 (arXiv 2208.06677) and the authors' code.

    >>> from hyperopt import Adan, Hyper, SGD
    >>> Hyper(Adan, weight_decay=0.02).stack(SGD)
    Hyper('Adan(weight_decay=0.02) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.98, UnitInterval())
    beta2: float = hyper(0.92, UnitInterval())
    beta3: float = hyper(0.99, UnitInterval())
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias_correction and 1 in (self.beta1, self.beta2, self.beta3):
            raise ValueError("Adan(beta = 1) divides by 1 - beta^t = 0: give betas below 1, or bias_correction=False")

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ("m", "v", "n", "g")}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        d = torch.where(t == 1, 0.0, g - state["g"])
        m = torch.lerp(state["m"], g, h.one_minus("beta1"))
        v = torch.lerp(state["v"], d, h.one_minus("beta2"))
        n = torch.lerp(state["n"], square(g + h.beta2 * d), h.one_minus("beta3"))
        look, step, new = h.beta2, h.lr, {"m": m, "v": v, "n": n, "g": g}
        if self.bias_correction:
            bias1, bias2 = h.one_minus_power("beta1", t), h.one_minus_power("beta2", t)
            look, step = h.beta2 * bias1 / bias2, h.lr * h.one_minus_power("beta3", t).sqrt() / bias1
        return x * self.shrink(h) - step * (m + look * v) / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["n"]) + (h.eps * h.one_minus_power("beta3", t).sqrt() if self.bias_correction else h.eps)

    def linear_in_lr(self) -> bool:
        return True

    def shrink(self, h: Values) -> Tensor | float:
        return 1 - h.lr * h.weight_decay if self.weight_decay != 0 else 1.0
