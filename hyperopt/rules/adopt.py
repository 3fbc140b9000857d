import math
from dataclasses import dataclass

from torch import Tensor, lerp, maximum, where

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class ADOPT(Rule):
    """Adam that converges for every beta2: the gradient is divided by the previous second moment and averaged afterwards.

        first step: v = g², and nothing else; from then on
        n = g / max(√v, eps)                (clipped: clamped to ±c,  c = clip·(t − 1)^clip_power)
        x = x − lr·weight_decay·x
        m = beta1·m + (1 − beta1)·n
        x = x − lr·m
        v = beta2·v + (1 − beta2)·g²

    beta2 affects the weights one step later, so that its hypergradient is 0 at horizon 1. That of eps is nonzero where eps exceeds √v,
    and those of clip and clip_power where n is clipped.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1], default 0.9 and 0.9999.
        eps: lower bound of the denominator, at least 0, default 1e-6.
        clip, clip_power: bound on |n| and the power of t with which it grows, at least 0, default 1 and 0.25; used only if `clipped`.
        weight_decay: decoupled weight decay, at least 0, default 0.
        clipped: clip n, default True. Algorithm 1 of the paper does not.

    Raises:
        ValueError: a value outside its domain.

    Source: Taniguchi et al. 2024 (arXiv 2411.02853).

    >>> from hyperopt import ADOPT, Adam, Hyper
    >>> Hyper(ADOPT, learn=("lr", "beta2")).stack(Adam)
    Hyper('ADOPT(learn=(lr, beta2)) / Adam')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.9999, UnitInterval(), horizon=10)
    eps: float = hyper(1e-6, Positive())
    clip: float = hyper(1.0, Positive(), horizon=10)
    clip_power: float = hyper(0.25, Positive())
    weight_decay: float = hyper(0.0, Positive())
    clipped: bool = True
    first_moment = ("beta1",)
    decoupled = True

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ["m"] * (self.beta1 != 0) + ["v"]}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        first, v, u = t == 1, state["v"], square(g)
        new = {"v": where(first, u, lerp(v, u, h.one_minus("beta2")))}
        # An infinite denominator makes n 0 at the first call, and its derivatives too.
        d = g / where(first, math.inf, maximum(root(v), h.eps))
        if self.clipped:
            c = h.clip * (t - 1).clamp_min(1).pow(h.clip_power)
            d = d.clamp(-c, c)
        if self.beta1 != 0:
            d = new["m"] = lerp(state["m"], d, h.one_minus("beta1"))
        return d, new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return maximum(root(state["v"]), h.eps)

    def _decay(self, h: Values, t: Tensor) -> Tensor:
        return where(t == 1, 0.0, h.weight_decay)  # the first call sets v and leaves x as it is
