from dataclasses import dataclass

from torch import Tensor, lerp

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class Adadelta(Rule):
    """Steps in the units of x, from running mean squares of steps and gradients, equal to `torch.optim.Adadelta`.

        g = g + weight_decay·x
        v = rho·v + (1 − rho)·g²
        d = √(s + eps) / √(v + eps) · g
        s = rho·s + (1 − rho)·d²
        x = x − lr·d

    Args:
        lr: factor of the step, at least 0, default 1.0; the paper has none.
        rho: decay rate of both averages, in [0, 1], default 0.9.
        eps: added under the roots, as in torch, at least 0, default 1e-6; the first steps are proportional to √eps.
        weight_decay: coupled weight decay (L2 penalty), at least 0, default 0.

    Raises:
        ValueError: a value outside its domain.

    Source: Zeiler 2012 (arXiv 1212.5701); torch.optim.Adadelta.

    >>> from hyperopt import SGD, Adadelta, Hyper
    >>> Hyper(Adadelta, eps=1e-3, learn=("rho", "eps")).stack(SGD)
    Hyper('Adadelta(eps=0.001, learn=(rho, eps)) / SGD')
    """

    lr: float = hyper(1.0, Positive(), above=1.0)
    rho: float = hyper(0.9, UnitInterval(), horizon=1)
    eps: float = hyper(1e-6, Positive())
    weight_decay: float = hyper(0.0, Positive())

    def init(self, x: Tensor) -> State:
        return {"v": x.new_zeros(x.shape), "s": x.new_zeros(x.shape)}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        v = lerp(state["v"], square(g), h.one_minus("rho"))
        d = root(state["s"] + h.eps) / root(v + h.eps) * g
        return d, {"v": v, "s": lerp(state["s"], square(d), h.one_minus("rho"))}

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["v"] + h.eps) / root(state["s"] + h.eps)
