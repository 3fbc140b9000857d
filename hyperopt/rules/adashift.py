"""AdaShift."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class AdaShift(Rule):
    """Adam whose second moment is made of gradients n steps old, and so is independent of the gradient it divides.

        m = Σ beta1^i·g_{t−i} / Σ beta1^i,   i = 0 … n − 1
        v = beta2·v + (1 − beta2)·g_{t−n}²
        x = x − lr·m / (√v̂ + eps),           v̂ = v / (1 − beta2^(t−n));  the first n steps move nothing

    The state holds n gradients. The paper also takes the largest g² of a tensor for all its elements; here each has its own.

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2: decays of the moments, default 0.9 and 0.999.
        eps: added to the root, default 1e-10.
        n: the delay in steps, at least 1, default 10.

    Raises:
        ValueError: a value outside its domain, or n that is not a positive integer.

    Source: Zhou et al. 2019 (arXiv 1810.00143).

    >>> from hyperopt import SGD, AdaShift, Hyper
    >>> Hyper(AdaShift, n=2).stack(SGD)
    Hyper('AdaShift(n=2) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.999, UnitInterval())
    eps: float = hyper(1e-10, Positive())
    n: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"AdaShift(n = {self.n!r}) keeps n gradients: give an integer of at least 1")

    def init(self, x: Tensor) -> State:
        # Oldest first: the engine writes them in this order and in place, each from the one after it.
        return {name: x.new_zeros(x.shape) for name in (*(f"g{i}" for i in range(self.n)), "v")}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        oldest, *rest = [*(state[f"g{i}"] for i in range(self.n)), g]
        m, total = torch.zeros_like(g), torch.zeros_like(t)
        for one in rest:
            m, total = h.beta1 * m + one, h.beta1 * total + 1
        v = torch.lerp(state["v"], square(oldest), h.one_minus("beta2"))
        new = {**{f"g{i}": one for i, one in enumerate(rest)}, "v": v}
        # Over an infinite denominator the first n steps move nothing, and neither do their derivatives.
        return x - h.lr * (m / total) / torch.where(t > self.n, self.metric(new, h, t), math.inf), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["v"] / h.one_minus_power("beta2", (t - self.n).clamp_min(1))) + h.eps

    def linear_in_lr(self) -> bool:
        return True
