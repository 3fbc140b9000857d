"""Stochastic gradient descent with momentum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper


@dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent, with heavy-ball or Nesterov momentum, dampening and coupled weight decay, as `torch.optim.SGD`.

        g = g + weight_decay·x
        b = momentum·b + (1 − dampening)·g  (the first time b = g)
        x = x − lr·b                        (nesterov: x − lr·(g + momentum·b))

    Args:
        lr: step size, default 1e-3, as in torch (above level 0: 1.0, in raw space).
        momentum: in [0, 1), default 0, which keeps no buffer.
        dampening: the part of later gradients that is left out of the buffer, in [0, 1], default 0.
        weight_decay: coupled (L2), at least 0, default 0.
        nesterov: look ahead; needs momentum, and no dampening.

    Raises:
        ValueError: a value outside its domain, nesterov without momentum or with dampening.

    Source: Polyak 1964; Nesterov 1983 in the form of Sutskever et al. 2013; torch.optim.SGD.

    >>> from hyperopt import SGD, Hyper
    >>> Hyper(SGD, momentum=0.9)
    Hyper('SGD(momentum=0.9)')
    """

    lr: float = hyper(1e-3, Positive(), above=1.0)
    momentum: float = hyper(0.0, UnitInterval())
    dampening: float = hyper(0.0, UnitInterval())
    weight_decay: float = hyper(0.0, Positive())
    nesterov: bool = False
    first_moment: ClassVar[tuple[str, ...]] = ("momentum", "dampening")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD(nesterov=True) needs momentum > 0, got momentum = 0: give momentum=0.9, say")
        if self.nesterov and self.dampening != 0:
            raise ValueError(f"SGD(nesterov=True) needs dampening = 0, got dampening = {self.dampening!r}: leave one of them out")

    def init(self, x: Tensor) -> State:
        return {"b": x.new_zeros(x.shape)} if self.momentum != 0 else {}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0:
            g = g + h.weight_decay * x
        if self.momentum == 0:
            return x - h.lr * g, {}
        fresh = g if self.dampening == 0 else torch.where(t == 1, 1.0, h.one_minus("dampening")) * g
        b = h.momentum * state["b"] + fresh
        d = g + h.momentum * b if self.nesterov else b
        return x - h.lr * d, {"b": b}

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0
