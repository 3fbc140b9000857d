from dataclasses import dataclass

from torch import Tensor, lerp, maximum

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper, root, square
from ..variant import Variant
from .moments import Moments


@dataclass(frozen=True)
class Adam(Moments):
    """Adam, with coupled or decoupled weight decay and optional AMSGrad, equal to `torch.optim.Adam` and `AdamW`.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·g²
        v_max = max(v_max, v)               (only with amsgrad; then v_max replaces v below)
        x = x − lr·m̂ / (√v̂ + eps),          m̂ = m / (1 − beta1^t),  v̂ = v / (1 − beta2^t)

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1), default 0.9 and 0.999.
        eps: added to the root after bias correction, as in torch, at least 0, default 1e-8.
        weight_decay: weight decay coefficient, at least 0, default 0.
        decoupled: apply weight decay to the weights (AdamW) and not to the gradient, default False.
        cautious: decoupled decay of those elements alone whose size the step does not increase, default False.
        amsgrad: divide by the largest second moment so far, taken before bias correction as in torch, default False.
        bias_correction: divide the moments by 1 − beta^t, default True; without it m̂ = m and v̂ = v.

    Raises:
        ValueError: a value outside its domain, a beta of 1 with bias correction, or cautious without decoupled.

    Source: Kingma and Ba 2015 (arXiv 1412.6980); Loshchilov and Hutter 2019 (arXiv 1711.05101); Reddi, Kale and Kumar 2018
    (arXiv 1904.09237) for AMSGrad; Chen et al. 2025 (arXiv 2510.12402) for cautious decay; torch.optim.Adam.

    >>> from hyperopt import SGD, Adam, Hyper
    >>> Hyper(Adam, lr=3e-3).stack(SGD)
    Hyper('Adam(lr=0.003) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=1)
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    decoupled: bool = False
    cautious: bool = False
    amsgrad: bool = False
    bias_correction: bool = True

    def init(self, x: Tensor) -> State:
        names = ["v"] + ["m"] * (self.beta1 != 0) + ["v_max"] * self.amsgrad
        return {name: x.new_zeros(x.shape) for name in names}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m, new = g, {"v": lerp(state["v"], square(g), h.one_minus("beta2"))}
        if self.amsgrad:
            new["v_max"] = maximum(state["v_max"], new["v"])
        if self.beta1 != 0:
            m = new["m"] = lerp(state["m"], g, h.one_minus("beta1"))
        if self.bias_correction:
            # m̂ / (√v̂ + eps) with both corrections in one scalar, which saves a pass over the weights; `metric` scales eps to match.
            scale = h.one_minus_power("beta2", t).sqrt()
            m = (scale if self.beta1 == 0 else scale / h.one_minus_power("beta1", t)) * m
        return m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        eps = h.eps * h.one_minus_power("beta2", t).sqrt() if self.bias_correction else h.eps
        return root(state["v_max" if self.amsgrad else "v"]) + eps


AdamW = Variant(Adam, weight_decay=1e-2, decoupled=True)
