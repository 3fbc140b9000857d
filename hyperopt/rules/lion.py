from dataclasses import dataclass

from torch import Tensor, lerp

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, square


@dataclass(frozen=True)
class Lion(Rule):
    """Steps along the sign of an interpolated momentum, with decoupled weight decay.

        c = beta1·m + (1 − beta1)·g
        x = x − lr·(sign(c) + weight_decay·x)           (eps > 0: c / √(c² + eps²) in place of the sign)
        m = beta2·m + (1 − beta2)·g

    The derivative of a sign is 0, so the betas can be learned only with eps > 0, which smooths it, and beta2 only at horizons above 1,
    as it affects the weights one step later. All steps have the same size: noisy gradients need a small lr.

    Args:
        lr: learning rate, at least 0, default 1e-4; 0.1 above level 0, where it moves raw hyperparameters.
        beta1: weight of the momentum in c, in [0, 1], default 0.9.
        beta2: decay rate of the momentum, in [0, 1], default 0.99; without effect where beta1 = 0.
        eps: smoothing of the sign, at least 0, default 0, as in the paper.
        weight_decay: decoupled weight decay, at least 0, default 0.

    Raises:
        ValueError: a value outside its domain.

    Source: Chen et al. 2023 (arXiv 2302.06675); eps is an addition.

    >>> from hyperopt import Hyper, Lion, SGD
    >>> Hyper(Lion, weight_decay=0.1).stack(SGD)
    Hyper('Lion(weight_decay=0.1) / SGD')
    """

    lr: float = hyper(1e-4, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.99, UnitInterval(), horizon=10)
    eps: float = hyper(0.0, Positive())
    weight_decay: float = hyper(0.0, Positive())
    first_moment = ("beta1", "beta2")
    decoupled = True

    def init(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape)} if self.beta1 != 0 else {}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        c, new = g, {}
        if self.beta1 != 0:
            c = lerp(state["m"], g, h.one_minus("beta1"))
            new["m"] = lerp(state["m"], g, h.one_minus("beta2"))
        return c.sign() if self.eps == 0 else c / (square(c) + h.eps**2).sqrt(), new
