"""ADOPT."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class ADOPT(Rule):
    """Adam that converges for every beta2: the gradient is divided by the second moment of the steps before, then averaged.

        first call: v = g², and nothing else
        n = g / max(√v, eps)                (clipped: held within ±c,  c = clip·(t − 1)^clip_power)
        x = x − lr·weight_decay·x
        m = beta1·m + (1 − beta1)·n
        x = x − lr·m
        v = beta2·v + (1 − beta2)·g²

    The weights see beta2 one step late: at horizon 1 its hypergradient is 0. eps and the clip have one where they are at work.

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2: decays of the moments, default 0.9 and 0.9999.
        eps: the least denominator, default 1e-6.
        clip, clip_power: the bound on n and how it grows, default 1 and 0.25; only if `clipped`.
        weight_decay: decoupled, at least 0, default 0.
        clipped: Algorithm 2 of the paper; False is Algorithm 1.

    Raises:
        ValueError: a value outside its domain.

    Source: Taniguchi et al. 2024 (arXiv 2411.02853).

    >>> from hyperopt import ADOPT, Adam, Hyper
    >>> Hyper(ADOPT, learn=("lr", "beta2")).stack(Adam)
    Hyper('ADOPT(learn=(lr, beta2)) / Adam')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.9999, UnitInterval())
    eps: float = hyper(1e-6, Positive())
    clip: float = hyper(1.0, Positive())
    clip_power: float = hyper(0.25, Positive())
    weight_decay: float = hyper(0.0, Positive())
    clipped: bool = True

    def init(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape), "v": x.new_zeros(x.shape)}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        first, v, u = t == 1, state["v"], square(g)
        # Over an infinite denominator n is 0 at the first call, and so are its derivatives.
        n = g / torch.where(first, math.inf, torch.maximum(root(v), h.eps))
        if self.clipped:
            c = h.clip * (t - 1).clamp_min(1).pow(h.clip_power)
            n = n.clamp(-c, c)
        m = torch.lerp(state["m"], n, h.one_minus("beta1"))
        if self.weight_decay != 0:
            x = x * torch.where(first, 1.0, 1 - h.lr * h.weight_decay)
        return x - h.lr * m, {"m": m, "v": torch.where(first, u, torch.lerp(v, u, h.one_minus("beta2")))}

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return torch.maximum(root(state["v"]), h.eps)

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0  # there is no decay at the first call, so ∂x'/∂x depends on t
