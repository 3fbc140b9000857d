"""The exponent family, and Padam."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, Variant, hyper, power


@dataclass(frozen=True)
class Exponent(Rule):
    """Adam with another exponent than 2: |g|^eta is averaged, and its eta-th root divides.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·|g|^eta
        x = x − lr·m̂ / (v̂^(1/eta) + eps)^(2p),          m̂ = m / (1 − beta1^t),  v̂ = v / (1 − beta2^t)

    eta = 2 and p = 1/2 are Adam; `running_max` replaces v̂ by its maximum over all steps (AMSGrad, with the maximum after
    the correction); p < 1/2 is Padam, momentum at p = 0. In float32 |g|^eta is held within 1e-38 … 3e38: |g| from 3e-10 to 4e9 at eta = 4.

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2: decays of the moments, in [0, 1), default 0.9 and 0.999.
        eps: added to the root, default 1e-8.
        eta: the exponent, above 0, default 2.
        p: how far the step is adaptive, in [0, 1], default 1/2.
        weight_decay: at least 0, default 0.
        running_max: divide by the maximum of v̂ over all steps.
        decoupled: decay the weights themselves instead of adding to the gradient.
        bias_correction: divide the moments by 1 − beta^t; without it m̂ = m and v̂ = v.

    Raises:
        ValueError: a value outside its domain, eta = 0, or a beta of 1 with bias correction.

    Source: a thesis on adaptive learning rates, which leaves open how to choose eta; Chen et al. 2018 (Padam, arXiv 1806.06763).

    >>> from hyperopt import Adam, Exponent, Hyper
    >>> Hyper(Exponent, eta=4, learn=("lr", "eta")).stack(Adam)
    Hyper('Exponent(eta=4, learn=(lr, eta)) / Adam')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.999, UnitInterval())
    eps: float = hyper(1e-8, Positive())
    eta: float = hyper(2.0, Positive(scale=0.1))
    p: float = hyper(0.5, UnitInterval())
    weight_decay: float = hyper(0.0, Positive())
    running_max: bool = False
    decoupled: bool = False
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0:
            raise ValueError("Exponent(eta = 0) has no root 1/eta: give an exponent above 0, such as 2")
        if self.bias_correction and 1 in (self.beta1, self.beta2):
            raise ValueError("Exponent(beta1 or beta2 = 1) divides by 1 - beta^t = 0: give a beta below 1, or bias_correction=False")

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ("m", "v", *(["v_max"] if self.running_max else []))}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0 and not self.decoupled:
            g = g + h.weight_decay * x
        m = torch.lerp(state["m"], g, h.one_minus("beta1"))
        new = {"m": m, "v": torch.lerp(state["v"], power(g.abs(), h.eta), h.one_minus("beta2"))}
        step = h.lr / h.one_minus_power("beta1", t) if self.bias_correction else h.lr
        if self.running_max:
            new["v_max"] = torch.maximum(state["v_max"], self._corrected(new["v"], h, t))
        if self.decoupled and self.weight_decay != 0:
            x = x * self.shrink(h)
        return x - step * m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        v_hat = state["v_max"] if self.running_max else self._corrected(state["v"], h, t)
        return power(power(v_hat, 1 / h.eta) + h.eps, 2 * h.p)

    def _corrected(self, v: Tensor, h: Values, t: Tensor) -> Tensor:
        return v / h.one_minus_power("beta2", t) if self.bias_correction else v

    def linear_in_lr(self) -> bool:
        return self.decoupled or self.weight_decay == 0

    def shrink(self, h: Values) -> Tensor | float:
        return 1 - h.lr * h.weight_decay if self.decoupled and self.weight_decay != 0 else 1.0


Padam = Variant(Exponent, lr=0.1, p=0.125, running_max=True, bias_correction=False)
