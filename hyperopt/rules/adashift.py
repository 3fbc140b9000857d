import math
from dataclasses import dataclass

from torch import Tensor, lerp, where, zeros_like

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class AdaShift(Rule):
    """Adam with a second moment of gradients n steps old, which is independent of the gradient that it divides.

        m = Σ beta1^i·g_{t−i} / Σ beta1^i,   i = 0 … n − 1
        v = beta2·v + (1 − beta2)·g_{t−n}²
        x = x − lr·m / (√v̂ + eps),           v̂ = v / (1 − beta2^(t−n)), only where t > n

    The state holds the last n gradients. The paper also offers the largest g² of a tensor for all of its elements; this rule is
    elementwise.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1] and [0, 1), default 0.9 and 0.999.
        eps: added to the root, at least 0, default 1e-10.
        n: delay of the second moment, in steps, at least 1, default 10.

    Raises:
        ValueError: a value outside its domain, or an n that is not a positive integer.

    Source: Zhou et al. 2019 (arXiv 1810.00143).

    >>> from hyperopt import SGD, AdaShift, Hyper
    >>> Hyper(AdaShift, n=2).stack(SGD)
    Hyper('AdaShift(n=2) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=1)
    eps: float = hyper(1e-10, Positive())
    n: int = 10
    first_moment = ("beta1",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"AdaShift(n = {self.n!r}) keeps n gradients: give an integer of at least 1")

    def init(self, x: Tensor) -> State:
        # Oldest first: each is overwritten in place, in this order, by the one after it.
        return {name: x.new_zeros(x.shape) for name in (*(f"g{i}" for i in range(self.n)), "v")}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        oldest, *rest = [*(state[f"g{i}"] for i in range(self.n)), g]
        new = {f"g{i}": one for i, one in enumerate(rest)}
        new["v"] = lerp(state["v"], square(oldest), h.one_minus("beta2"))
        m = g
        if self.beta1 != 0:
            m, total = zeros_like(g), zeros_like(t)
            for one in rest:
                m, total = h.beta1 * m + one, h.beta1 * total + 1
            m = m / total
        # An infinite denominator makes the first n steps 0, and their derivatives too.
        return m / where(t > self.n, self.metric(new, h, t), math.inf), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["v"] / h.one_minus_power("beta2", (t - self.n).clamp_min(1))) + h.eps
