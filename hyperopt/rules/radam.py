from dataclasses import dataclass

from torch import Tensor, expm1, lerp, log1p, where

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper, root, square
from .moments import Moments


@dataclass(frozen=True)
class RAdam(Moments):
    """Adam with a rectified variance of the step size in the first steps, equal to `torch.optim.RAdam`.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g,        m̂ = m / (1 − beta1^t)
        v = beta2·v + (1 − beta2)·g²
        ρ∞ = 2 / (1 − beta2) − 1,           ρ = ρ∞ − 2·t·beta2^t / (1 − beta2^t)
        x = x − lr·m̂                        while ρ ≤ 5, and from then on
        x = x − lr·r·m̂·√(1 − beta2^t) / (√v + eps),  r² = (ρ − 4)(ρ − 2)·ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)·ρ)

    At least the first five steps are not rectified (ρ ≤ t), and with beta2 ≤ 2/3 none is; beta2 and eps have no effect on these.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1), default 0.9 and 0.999.
        eps: added to the root before bias correction, as in torch, at least 0, default 1e-8.
        weight_decay: weight decay coefficient, at least 0, default 0.
        decoupled: apply weight decay to the weights and not to the gradient, default False (torch: decoupled_weight_decay).

    Raises:
        ValueError: a value outside its domain, or a beta of 1.

    Source: Liu et al. 2020 (arXiv 1908.03265), which rectifies where ρ > 4; torch.optim.RAdam.

    >>> from hyperopt import SGD, Hyper, RAdam
    >>> Hyper(RAdam, lr=3e-3).stack(SGD)
    Hyper('RAdam(lr=0.003) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=1)
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    decoupled: bool = False

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ["m"] * (self.beta1 != 0) + ["v"]}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m, new = g, {"v": lerp(state["v"], square(g), h.one_minus("beta2"))}
        rectified, r = self._rectification(h, t)
        scale = where(rectified, r.to(g) * h.one_minus_power("beta2", t).sqrt(), 1.0)
        if self.beta1 != 0:
            m = new["m"] = lerp(state["m"], g, h.one_minus("beta1"))
            scale = scale / h.one_minus_power("beta1", t)
        return scale * m / self._denominator(rectified, new, h), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return self._denominator(self._rectification(h, t)[0], state, h)

    def _denominator(self, rectified: Tensor, state: State, h: Values) -> Tensor:
        return where(rectified, root(state["v"]) + h.eps, 1.0)

    def _rectification(self, h: Values, t: Tensor) -> tuple[Tensor, Tensor]:
        # Near 5, ρ is the difference of two numbers near 2000 (beta2 = 0.999): float32 would keep three digits of it.
        rest, t = h.one_minus("beta2").double(), t.double()
        log_power = t * log1p(-rest)
        limit = 2 / rest - 1
        rho = limit + 2 * t * log_power.exp() / expm1(log_power)
        rectified = rho > 5
        rho, limit = where(rectified, rho, 5.0), where(rectified, limit, 5.0)
        return rectified, ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)).sqrt()
