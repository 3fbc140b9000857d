from dataclasses import dataclass

from torch import Tensor, lerp, where

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper, root, square
from .moments import Moments


@dataclass(frozen=True)
class Adan(Moments):
    """Adaptive Nesterov momentum from differences of gradients, with decoupled weight decay.

        d = g − g_{t−1}                     (first step: 0)
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·d
        n = beta3·n + (1 − beta3)·(g + beta2·d)²
        x = x − lr·weight_decay·x
        x = x − lr·(m̂ + beta2·v̂) / (√n̂ + eps)

    with m̂ = m / (1 − beta1^t), v̂ and n̂ likewise. The betas are those of the authors' code, which are 1 − β in the paper. Weight decay is
    that of no_prox=True in the code: the proximal form divides by 1 + lr·weight_decay, which makes the step nonlinear in lr, and the trust
    ratio bounds linear steps only.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2, beta3: decay rates of m, v and n, in [0, 1), default 0.98, 0.92 and 0.99.
        eps: added to the root after bias correction, at least 0, default 1e-8.
        weight_decay: decoupled weight decay, at least 0, default 0.
        bias_correction: divide the averages by 1 − beta^t as in the authors' code, default True.

    Raises:
        ValueError: a value outside its domain, or a beta of 1 with bias correction.

    Source: Xie et al. 2022 (arXiv 2208.06677) and the authors' code.

    >>> from hyperopt import Adan, Hyper, SGD
    >>> Hyper(Adan, weight_decay=0.02).stack(SGD)
    Hyper('Adan(weight_decay=0.02) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.98, UnitInterval(), horizon=1)
    beta2: float = hyper(0.92, UnitInterval(), horizon=1)
    beta3: float = hyper(0.99, UnitInterval(), horizon=1)
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    bias_correction: bool = True
    first_moment, corrected = ("beta1", "beta2"), ("beta1", "beta2", "beta3")
    decoupled = True

    def init(self, x: Tensor) -> State:
        names = ["m"] * (self.beta1 != 0) + ["v", "g"] * (self.beta2 != 0) + ["n"]
        return {name: x.new_zeros(x.shape) for name in names}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m, ahead, new = g, g, {}
        if self.beta1 != 0:
            new["m"] = lerp(state["m"], g, h.one_minus("beta1"))
            m = new["m"] / h.one_minus_power("beta1", t) if self.bias_correction else new["m"]
        if self.beta2 != 0:
            change = where(t == 1, 0.0, g - state["g"])
            ahead = g + h.beta2 * change
            new |= {"v": lerp(state["v"], change, h.one_minus("beta2")), "g": g}
            m = m + (h.beta2 / h.one_minus_power("beta2", t) if self.bias_correction else h.beta2) * new["v"]
        new["n"] = lerp(state["n"], square(ahead), h.one_minus("beta3"))
        d = m / self.metric(new, h, t)
        return d * h.one_minus_power("beta3", t).sqrt() if self.bias_correction else d, new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["n"]) + (h.eps * h.one_minus_power("beta3", t).sqrt() if self.bias_correction else h.eps)
