from dataclasses import dataclass

from torch import Tensor, finfo, lerp, maximum

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper
from .moments import Moments


@dataclass(frozen=True)
class Adamax(Moments):
    """Adam with the infinity norm in place of the second moment, equal to `torch.optim.Adamax`.

        g = g + weight_decay·x
        m = beta1·m + (1 − beta1)·g
        u = max(beta2·u, |g| + eps)
        x = x − lr·m̂ / u,                   m̂ = m / (1 − beta1^t)

    Args:
        lr: learning rate, at least 0, default 2e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1: decay rate of the first moment, in [0, 1), default 0.9.
        beta2: decay rate of the maximum, in [0, 1], default 0.999; its gradient is nonzero where the decayed maximum is the larger.
        eps: added to |g|, as in torch, at least 0, default 1e-8; its gradient is nonzero where |g| + eps is the larger.
        weight_decay: coupled weight decay (L2 penalty), at least 0, default 0.

    Raises:
        ValueError: a value outside its domain, or a beta1 of 1.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), section 7.1; torch.optim.Adamax.

    >>> from hyperopt import SGD, Adamax, Hyper
    >>> Hyper(Adamax, learn=("lr", "beta2")).stack(SGD)
    Hyper('Adamax(learn=(lr, beta2)) / SGD')
    """

    lr: float = hyper(2e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=10)  # of a maximum, which shows it only where it is an old one
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    corrected = ("beta1",)

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ["m"] * (self.beta1 != 0) + ["u"]}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m, new = g, {"u": maximum(h.beta2 * state["u"], g.abs() + h.eps)}
        if self.beta1 != 0:
            new["m"] = lerp(state["m"], g, h.one_minus("beta1"))
            m = new["m"] / h.one_minus_power("beta1", t)
        return m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        # u is 0 only where eps is 0 and no gradient has arrived yet; m is 0 there as well.
        return state["u"].clamp_min(finfo(state["u"].dtype).tiny)
