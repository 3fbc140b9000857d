"""Lion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, square


@dataclass(frozen=True)
class Lion(Rule):
    """The sign of an interpolated momentum, with decoupled weight decay.

        c = beta1·m + (1 − beta1)·g
        x = x − lr·(sign(c) + weight_decay·x)           (eps > 0: c / √(c² + eps²) instead of the sign)
        m = beta2·m + (1 − beta2)·g

    A sign has no derivative, so the betas can be learned only where eps > 0 makes it soft, and beta2 only at a horizon
    above 1, as the weights see it one step late. Not for level 0 of a noisy model with a large lr: every step has the same size.

    Args:
        lr: step size, default 1e-4 (above level 0: 0.1, in raw space).
        beta1: the share of the old momentum in c, default 0.9.
        beta2: decay of the momentum, default 0.99.
        eps: softness of the sign, at least 0, default 0, the paper's sign.
        weight_decay: decoupled, at least 0, default 0.

    Raises:
        ValueError: a value outside its domain.

    Source: Chen et al. 2023 (arXiv 2302.06675); eps is ours.

    >>> from hyperopt import Hyper, Lion, SGD
    >>> Hyper(Lion, weight_decay=0.1).stack(SGD)
    Hyper('Lion(weight_decay=0.1) / SGD')
    """

    lr: float = hyper(1e-4, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.99, UnitInterval())
    eps: float = hyper(0.0, Positive())
    weight_decay: float = hyper(0.0, Positive())

    def init(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape)}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m = state["m"]
        c = torch.lerp(m, g, h.one_minus("beta1"))
        d = c.sign() if self.eps == 0 else c / (square(c) + h.eps**2).sqrt()
        return x * self.shrink(h) - h.lr * d, {"m": torch.lerp(m, g, h.one_minus("beta2"))}

    def linear_in_lr(self) -> bool:
        return True

    def shrink(self, h: Values) -> Tensor | float:
        return 1 - h.lr * h.weight_decay if self.weight_decay != 0 else 1.0
