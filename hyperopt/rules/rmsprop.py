"""RMSprop."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class RMSprop(Rule):
    """Gradients divided by their running root mean square, or standard deviation, as `torch.optim.RMSprop`.

        g = g + weight_decay·x
        v = alpha·v + (1 − alpha)·g²
        m = alpha·m + (1 − alpha)·g         (centered alone, and v − m² in place of v below)
        b = momentum·b + g / (√v + eps)
        x = x − lr·b

    Args:
        lr: step size, default 1e-2 (above level 0: the same, in raw space).
        alpha: decay of the averages, in [0, 1], default 0.99.
        eps: added to the root, where torch has it, default 1e-8.
        weight_decay: coupled (L2), at least 0, default 0.
        momentum: in [0, 1], default 0, which keeps no buffer.
        centered: divide by the standard deviation of the gradient instead of its root mean square.

    Raises:
        ValueError: a value outside its domain.

    Source: Hinton's lecture 6e, 2012; Graves 2013 (arXiv 1308.0850) for the centered one; torch.optim.RMSprop.

    >>> from hyperopt import SGD, Hyper, RMSprop
    >>> Hyper(RMSprop, momentum=0.9, centered=True, learn="all").stack(SGD)
    Hyper('RMSprop(momentum=0.9, centered=True, learn=all) / SGD')
    """

    lr: float = hyper(1e-2, Positive(), above=1e-2)
    alpha: float = hyper(0.99, UnitInterval())
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    momentum: float = hyper(0.0, UnitInterval())
    centered: bool = False

    def init(self, x: Tensor) -> State:
        names = ["v", *(["m"] if self.centered else []), *(["b"] if self.momentum != 0 else [])]
        return {name: x.new_zeros(x.shape) for name in names}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0:
            g = g + h.weight_decay * x
        new = {"v": torch.lerp(state["v"], square(g), h.one_minus("alpha"))}
        if self.centered:
            new["m"] = torch.lerp(state["m"], g, h.one_minus("alpha"))
        d = g / self.metric(new, h, t)
        if self.momentum != 0:
            d = new["b"] = h.momentum * state["b"] + d
        return x - h.lr * d, new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        variance = state["v"] - square(state["m"]) if self.centered else state["v"]
        return root(variance) + h.eps

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0
