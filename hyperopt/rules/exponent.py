from dataclasses import dataclass

from torch import Tensor, lerp, maximum

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper, power
from ..variant import Variant
from .moments import Moments


@dataclass(frozen=True)
class Exponent(Moments):
    """Adam with an exponent eta in place of 2: the step is divided by the eta-th root of an average of |g|^eta.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·|g|^eta
        x = x − lr·m̂ / (v̂^(1/eta) + eps)^(2p),          m̂ = m / (1 − beta1^t),  v̂ = v / (1 − beta2^t)

    eta = 2 and p = 1/2 give Adam. p < 1/2 gives Padam, and p = 0 SGD with momentum. `running_max` replaces v̂ by its maximum over all
    steps: AMSGrad, with the maximum taken after bias correction. In float32, |g|^eta is clamped to 1e-38 … 3e38; at eta = 4, |g| thus
    counts between 3e-10 and 4e9.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1), default 0.9 and 0.999.
        eps: added to the root, at least 0, default 1e-8.
        eta: exponent, above 0, default 2.
        p: half the power of the denominator, in [0, 1], default 1/2.
        weight_decay: weight decay coefficient, at least 0, default 0.
        running_max: divide by the maximum of v̂ over all steps, default False.
        decoupled: apply weight decay to the weights and not to the gradient, default False.
        bias_correction: divide the moments by 1 − beta^t, default True; without it m̂ = m and v̂ = v.

    Raises:
        ValueError: a value outside its domain, eta = 0, or a beta of 1 with bias correction.

    Source: a thesis on adaptive learning rates, which leaves the choice of eta open; Chen et al. 2018 (Padam, arXiv 1806.06763).

    >>> from hyperopt import Adam, Exponent, Hyper
    >>> Hyper(Exponent, eta=4, learn=("lr", "eta")).stack(Adam)
    Hyper('Exponent(eta=4, learn=(lr, eta)) / Adam')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=1)
    eps: float = hyper(1e-8, Positive())
    eta: float = hyper(2.0, Positive(scale=0.1), horizon=1)
    p: float = hyper(0.5, UnitInterval(), horizon=1)
    weight_decay: float = hyper(0.0, Positive())
    running_max: bool = False
    decoupled: bool = False
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0:
            raise ValueError("Exponent(eta = 0) has no root 1/eta: give an exponent above 0, such as 2")

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ["m"] * (self.beta1 != 0) + ["v"] + ["v_max"] * self.running_max}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m, new = g, {"v": lerp(state["v"], power(g.abs(), h.eta), h.one_minus("beta2"))}
        if self.beta1 != 0:
            new["m"] = lerp(state["m"], g, h.one_minus("beta1"))
            m = new["m"] / h.one_minus_power("beta1", t) if self.bias_correction else new["m"]
        if self.running_max:
            new["v_max"] = maximum(state["v_max"], self._corrected(new["v"], h, t))
        return m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        v_hat = state["v_max"] if self.running_max else self._corrected(state["v"], h, t)
        return power(power(v_hat, 1 / h.eta) + h.eps, 2 * h.p)

    def _corrected(self, v: Tensor, h: Values, t: Tensor) -> Tensor:
        return v / h.one_minus_power("beta2", t) if self.bias_correction else v


Padam = Variant(Exponent, lr=0.1, p=0.125, running_max=True, bias_correction=False)
