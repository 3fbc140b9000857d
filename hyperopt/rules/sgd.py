"""Stochastic gradient descent with momentum."""

from dataclasses import dataclass

from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper


@dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent, with heavy-ball or Nesterov momentum and coupled weight decay, as `torch.optim.SGD`.

        g = g + weight_decay·x
        b = momentum·b + g
        x = x − lr·b                        (nesterov: x − lr·(g + momentum·b))

    Args:
        lr: step size, default 1e-3, as in torch (above level 0: 1.0, in raw space).
        momentum: in [0, 1), default 0, which keeps no buffer.
        weight_decay: coupled (L2), at least 0, default 0.
        nesterov: look ahead; needs momentum.

    Raises:
        ValueError: a value outside its domain, or nesterov without momentum.

    Source: Polyak 1964; Nesterov 1983 in the form of Sutskever et al. 2013; torch.optim.SGD.

    >>> from hyperopt import SGD, Hyper
    >>> Hyper(SGD, momentum=0.9)
    Hyper('SGD(momentum=0.9)')
    """

    lr: float = hyper(1e-3, Positive(), above=1.0)
    momentum: float = hyper(0.0, UnitInterval())
    weight_decay: float = hyper(0.0, Positive())
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD(nesterov=True) needs momentum > 0, got momentum = 0: give momentum=0.9, say")

    def init(self, x: Tensor) -> State:
        return {"b": x.new_zeros(x.shape)} if self.momentum != 0 else {}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0:
            g = g + h.weight_decay * x
        if self.momentum == 0:
            return x - h.lr * g, {}
        b = h.momentum * state["b"] + g
        d = g + h.momentum * b if self.nesterov else b
        return x - h.lr * d, {"b": b}

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0
