"""RAdam."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class RAdam(Rule):
    """Adam that rectifies the variance of its step size, with coupled or decoupled weight decay, as `torch.optim.RAdam`.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g,        m̂ = m / (1 − beta1^t)
        v = beta2·v + (1 − beta2)·g²
        ρ∞ = 2 / (1 − beta2) − 1,           ρ = ρ∞ − 2·t·beta2^t / (1 − beta2^t)
        x = x − lr·m̂                        while ρ ≤ 5, and from then on
        x = x − lr·r·m̂·√(1 − beta2^t) / (√v + eps),  r² = (ρ − 4)(ρ − 2)·ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)·ρ)

    The first five steps at least are not rectified (ρ ≤ t), and for beta2 ≤ 2/3 none is: beta2 and eps then do nothing.

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2: decays of the moments, in [0, 1), default 0.9 and 0.999.
        eps: added to the root before the correction, where torch has it, default 1e-8.
        weight_decay: at least 0, default 0.
        decoupled: decay the weights themselves instead of adding to the gradient; torch's decoupled_weight_decay.

    Raises:
        ValueError: a value outside its domain, or a beta of 1.

    Source: Liu et al. 2020 (arXiv 1908.03265), which rectifies where ρ > 4; torch.optim.RAdam.

    >>> from hyperopt import SGD, Hyper, RAdam
    >>> Hyper(RAdam, lr=3e-3).stack(SGD)
    Hyper('RAdam(lr=0.003) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.999, UnitInterval())
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 in (self.beta1, self.beta2):
            raise ValueError("RAdam(beta1 or beta2 = 1) divides by 1 - beta^t = 0: give a beta below 1")

    def init(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape), "v": x.new_zeros(x.shape)}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0 and not self.decoupled:
            g = g + h.weight_decay * x
        m = torch.lerp(state["m"], g, h.one_minus("beta1"))
        v = torch.lerp(state["v"], square(g), h.one_minus("beta2"))
        rectified, r = self._rectification(h, t)
        scale = torch.where(rectified, r.to(m) * h.one_minus_power("beta2", t).sqrt(), 1.0)
        new = {"m": m, "v": v}
        if self.decoupled and self.weight_decay != 0:
            x = x * self.shrink(h)
        return x - h.lr * scale / h.one_minus_power("beta1", t) * m / self._denominator(rectified, new, h), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return self._denominator(self._rectification(h, t)[0], state, h)

    def _denominator(self, rectified: Tensor, state: State, h: Values) -> Tensor:
        return torch.where(rectified, root(state["v"]) + h.eps, 1.0)

    def _rectification(self, h: Values, t: Tensor) -> tuple[Tensor, Tensor]:
        # ρ near 5 is the difference of two numbers near 2000 at beta2 = 0.999: three digits are left of it in float32.
        rest, t = h.one_minus("beta2").double(), t.double()
        log_power = t * torch.log1p(-rest)
        limit = 2 / rest - 1
        rho = limit + 2 * t * log_power.exp() / torch.expm1(log_power)
        rectified = rho > 5
        rho, limit = torch.where(rectified, rho, 5.0), torch.where(rectified, limit, 5.0)
        return rectified, ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)).sqrt()

    def linear_in_lr(self) -> bool:
        return self.decoupled or self.weight_decay == 0

    def shrink(self, h: Values) -> Tensor | float:
        return 1 - h.lr * h.weight_decay if self.decoupled and self.weight_decay != 0 else 1.0
