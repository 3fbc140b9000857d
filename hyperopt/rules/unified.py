from dataclasses import dataclass

from torch import Tensor, lerp, maximum, ones_like, where

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, power


@dataclass(frozen=True)
class Unified(Rule):
    """A continuous family that contains SGD, Nesterov, RMSprop, Adam, AMSGrad, ADOPT and the exponent family.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        v = beta2·v + (1 − beta2)·|g|^eta
        s = (1 − amsgrad)·v + amsgrad·max(v of all steps)
        D(s) = (1 − damping)·(s / bias2)^(1/eta) + damping
        n = g / D(s of the step before)^adopt
        m = beta1·m + (1 − beta1)·n
        d = (1 − nesterov)·m + nesterov·(beta1·m + (1 − beta1)·n)
        x = x − lr·d / bias1 / D(s)^(1 − adopt)

    where bias1 = (1 − beta1^t)^correction and bias2 = (1 − (1 − adopt)·beta2^t)^correction. As in ADOPT, D of the step before is the
    larger of its two terms and not their sum; at the first step, v is interpolated towards |g|^eta by `adopt`, and n is scaled by
    1 − adopt.

    damping takes the place of eps: at 0 the step is divided by the root alone (sign-like), at 1 not at all (momentum). Adam's eps is
    damping / (1 − damping), so that the logit of damping is the logarithm of eps, and the scale of lr is the same throughout. These
    settings give the other rules; lr is that of the named rule times the factor shown, amsgrad = adopt = nesterov = correction = 0 and
    eta = 2 unless stated, and beta2 is arbitrary where damping = 1:

        SGD(momentum)               beta1 = momentum, damping = 1;  lr / (1 − momentum)
        SGD(momentum, nesterov)     the same, nesterov = 1
        RMSprop(alpha, eps)         beta1 = 0, beta2 = alpha, damping = eps / (1 + eps);  lr / (1 + eps)
        Adam(beta1, beta2, eps)     correction = 1, damping = eps / (1 + eps);  lr / (1 + eps)
        Adam(amsgrad)               the same, amsgrad = 1
        Exponent(eta)               as Adam, eta
        ADOPT(clipped=False)        adopt = 1, damping = eps / (1 + eps);  lr / (1 + eps)

    A coefficient on the boundary of its domain, as in the defaults (Adam), cannot be learned: start it inside, possibly close to the
    boundary.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1), default 0.9 and 0.999.
        damping: weight of 1 against the root in the denominator, in [0, 1], default 1e-8.
        eta: exponent, above 0, default 2.
        nesterov, amsgrad, adopt: degree of each, in [0, 1], default 0.
        correction: exponent of the bias correction, in [0, 1], default 1.
        weight_decay: weight decay coefficient, at least 0, default 0.
        decoupled: apply weight decay to the weights and not to the gradient, default False; at the first step too, unlike ADOPT.

    Raises:
        ValueError: a value outside its domain, eta = 0, or a beta of 1 with bias correction.

    Source: Choi et al. 2019 (arXiv 1910.05446) for rules that include others; Ozkara et al. 2024 (MADA, arXiv 2401.08893) for learning the
    interpolation by hypergradients.

    >>> from hyperopt import Adam, Hyper, Unified
    >>> rule = Unified(nesterov=0.1, amsgrad=0.1, adopt=0.1, correction=0.9)
    >>> Hyper(rule, learn=("lr", "damping", "nesterov", "adopt")).stack(Adam).learned
    ('lr', 'damping', 'nesterov', 'adopt')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=10)
    damping: float = hyper(1e-8, UnitInterval())
    eta: float = hyper(2.0, Positive(scale=0.1), horizon=1)
    nesterov: float = hyper(0.0, UnitInterval())
    amsgrad: float = hyper(0.0, UnitInterval())
    adopt: float = hyper(0.0, UnitInterval())
    correction: float = hyper(1.0, UnitInterval())
    weight_decay: float = hyper(0.0, Positive())
    decoupled: bool = False
    first_moment = ("beta1", "nesterov")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0:
            raise ValueError("Unified(eta = 0) has no root 1/eta: give an exponent above 0, such as 2")
        if self.correction != 0 and 1 in (self.beta1, self.beta2):
            raise ValueError("Unified(beta1 or beta2 = 1) divides by 1 - beta^t = 0: give a beta below 1, or correction=0")

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ["m"] * (self.beta1 != 0) + ["v"] + ["v_max"] * (self.amsgrad != 0)}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        first, u, d = t == 1, power(g.abs(), h.eta), g
        v = lerp(state["v"], u, h.one_minus("beta2"))
        if self.adopt != 0:
            v = where(first, lerp(v, u, h.adopt), v)
            before = where(first, u, self._blend(state, h))
            n = g / power(maximum(*self._terms(before, h, t - 1)), h.adopt)
            d = where(first, h.one_minus("adopt") * n, n)
        new = {"v": v}
        if self.amsgrad != 0:
            new["v_max"] = maximum(state["v_max"], v)
        if self.beta1 != 0:
            m = new["m"] = lerp(state["m"], d, h.one_minus("beta1"))
            d = m if self.nesterov == 0 else m + h.nesterov * h.one_minus("beta1") * (d - m)
            d = d if self.correction == 0 else d / h.one_minus_power("beta1", t).pow(h.correction)
        metric = self.metric(new, h, t)
        return d / (metric if self.adopt == 0 else power(metric, h.one_minus("adopt"))), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        scale, damping = self._terms(self._blend(state, h), h, t)
        return scale + damping

    def _blend(self, state: State, h: Values) -> Tensor:
        return state["v"] if self.amsgrad == 0 else lerp(state["v"], state["v_max"], h.amsgrad)

    def _terms(self, s: Tensor, h: Values, t: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of D after t steps; at t = 0, s is |g|^eta itself and has no bias."""
        if self.correction != 0:
            bias2 = h.one_minus_power("beta2", t)
            if self.adopt != 0:
                bias2 = where(t == 0, 1.0, lerp(bias2, ones_like(bias2), h.adopt))
            s = s / bias2.pow(h.correction)
        return h.one_minus("damping") * power(s, 1 / h.eta), h.damping
