from dataclasses import dataclass

from torch import Tensor, lerp

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class RMSprop(Rule):
    """Gradients divided by a running root mean square or standard deviation, equal to `torch.optim.RMSprop`.

        g = g + weight_decay·x
        v = alpha·v + (1 − alpha)·g²
        m = alpha·m + (1 − alpha)·g         (only with centered; then v − m² replaces v below)
        b = momentum·b + g / (√v + eps)
        x = x − lr·b

    Args:
        lr: learning rate, at least 0, default 1e-2.
        alpha: decay rate of both averages, in [0, 1], default 0.99.
        eps: added to the root, as in torch, at least 0, default 1e-8.
        weight_decay: coupled weight decay (L2 penalty), at least 0, default 0.
        momentum: momentum factor, in [0, 1], default 0, at which there is no buffer b.
        centered: divide by the standard deviation of the gradient and not by its root mean square, default False.

    Raises:
        ValueError: a value outside its domain.

    Source: Hinton's lecture 6e, 2012; Graves 2013 (arXiv 1308.0850) for the centered form; torch.optim.RMSprop.

    >>> from hyperopt import SGD, Hyper, RMSprop
    >>> Hyper(RMSprop, momentum=0.9, centered=True, learn="all").stack(SGD)
    Hyper('RMSprop(momentum=0.9, centered=True, learn=all) / SGD')
    """

    lr: float = hyper(1e-2, Positive(), above=1e-2)
    alpha: float = hyper(0.99, UnitInterval(), horizon=1)
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    momentum: float = hyper(0.0, UnitInterval(), horizon=1, usual=0.9)
    centered: bool = False
    first_moment = ("momentum",)

    def init(self, x: Tensor) -> State:
        names = ["v"] + ["m"] * self.centered + ["b"] * (self.momentum != 0)
        return {name: x.new_zeros(x.shape) for name in names}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        new = {"v": lerp(state["v"], square(g), h.one_minus("alpha"))}
        if self.centered:
            new["m"] = lerp(state["m"], g, h.one_minus("alpha"))
        d = g / self.metric(new, h, t)
        if self.momentum != 0:
            d = new["b"] = h.momentum * state["b"] + d
        return d, new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        variance = state["v"] - square(state["m"]) if self.centered else state["v"]
        return root(variance) + h.eps
