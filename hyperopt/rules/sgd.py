from dataclasses import dataclass

from torch import Tensor, where

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum, equal to `torch.optim.SGD`.

        g = g + weight_decay·x
        b = momentum·b + (1 − dampening)·g  (first step: b = g)
        x = x − lr·b                        (nesterov: x − lr·(g + momentum·b))

    Args:
        lr: learning rate, at least 0, default 1e-3; 1.0 above level 0, where it moves raw hyperparameters.
        momentum: momentum factor, in [0, 1], default 0, at which there is no buffer b.
        dampening: reduces the weight of every gradient in b but the first to 1 − dampening, in [0, 1], default 0.
        weight_decay: coupled weight decay (L2 penalty), at least 0, default 0.
        nesterov: Nesterov momentum, default False; needs momentum > 0 and dampening = 0.

    Raises:
        ValueError: a value outside its domain, or nesterov without momentum or with dampening.

    Source: Polyak 1964; Nesterov 1983 in the form of Sutskever et al. 2013; torch.optim.SGD.

    >>> from hyperopt import SGD, Hyper
    >>> Hyper(SGD, momentum=0.9)
    Hyper('SGD(momentum=0.9)')
    """

    lr: float = hyper(1e-3, Positive(), above=1.0)
    momentum: float = hyper(0.0, UnitInterval(), horizon=1, usual=0.9)
    dampening: float = hyper(0.0, UnitInterval(), horizon=1)
    weight_decay: float = hyper(0.0, Positive())
    nesterov: bool = False
    first_moment = ("momentum", "dampening")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD(nesterov=True) needs momentum > 0, got momentum = 0: give momentum=0.9, say")
        if self.nesterov and self.dampening != 0:
            raise ValueError(f"SGD(nesterov=True) needs dampening = 0, got dampening = {self.dampening!r}: leave one of them out")

    def init(self, x: Tensor) -> State:
        return {"b": x.new_zeros(x.shape)} if self.momentum != 0 else {}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.momentum == 0:
            return g, {}
        fresh = g if self.dampening == 0 else where(t == 1, 1.0, h.one_minus("dampening")) * g
        b = h.momentum * state["b"] + fresh
        return g + h.momentum * b if self.nesterov else b, {"b": b}
