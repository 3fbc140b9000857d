"""Unified: the rule in which the choice of the optimizer is a hyperparameter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, power


@dataclass(frozen=True)
class Unified(Rule):
    """One rule that moves continuously through SGD, Nesterov, RMSprop, Adam, AMSGrad, ADOPT and the exponent family.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        v = beta2·v + (1 − beta2)·|g|^eta
        s = (1 − amsgrad)·v + amsgrad·max(v of all steps)
        D(s) = (1 − damping)·(s / bias2)^(1/eta) + damping
        n = g / D(s of the step before)^adopt
        m = beta1·m + (1 − beta1)·n
        d = (1 − nesterov)·m + nesterov·(beta1·m + (1 − beta1)·n)
        x = x − lr·d / bias1 / D(s)^(1 − adopt)

    bias1 = (1 − beta1^t)^correction, bias2 = (1 − (1 − adopt)·beta2^t)^correction. As in ADOPT, D of the step before is the
    larger of its two terms, not their sum, and the first step has v = |g|^eta by the share `adopt` and moves by the share 1 − adopt.

    damping is the place of eps: 0 divides by v alone (sign-like), 1 not at all (momentum). Adam's eps is damping / (1 − damping),
    so that the logit of damping is the log of eps, and lr keeps its meaning on the way. The corners, with lr as the named rule's
    times a factor, amsgrad = adopt = nesterov = correction = 0 and eta = 2 where nothing is said, and any beta2 where damping = 1:

        SGD(momentum)               beta1 = momentum, damping = 1;  lr / (1 − momentum)
        SGD(momentum, nesterov)     the same, nesterov = 1
        RMSprop(alpha, eps)         beta1 = 0, beta2 = alpha, damping = eps / (1 + eps);  lr / (1 + eps)
        Adam(beta1, beta2, eps)     correction = 1, damping = eps / (1 + eps);  lr / (1 + eps)
        Adam(amsgrad)               the same, amsgrad = 1
        Exponent(eta)               as Adam, eta
        ADOPT(clipped=False)        adopt = 1, damping = eps / (1 + eps);  lr / (1 + eps)

    A coefficient on the boundary, as the defaults are (Adam), is held: give it a value inside to learn it. It may start close.

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2: decays of the moments, in [0, 1), default 0.9 and 0.999.
        damping: from 0, sign-like, to 1, momentum-like, default 1e-8.
        eta: the exponent, above 0, default 2.
        nesterov, amsgrad, adopt: shares in [0, 1], default 0.
        correction: exponent of the bias correction, in [0, 1], default 1.
        weight_decay: at least 0, default 0.
        decoupled: decay the weights themselves instead of adding to the gradient; also at the first step, where ADOPT does not.

    Raises:
        ValueError: a value outside its domain, eta = 0, or a beta of 1 with bias correction.

    Source: inclusion as in Choi et al. 2019 (arXiv 1910.05446); interpolation learned by hypergradients as in Ozkara et al. 2024
    (MADA, arXiv 2401.08893).

    >>> from hyperopt import Adam, Hyper, Unified
    >>> rule = Unified(nesterov=0.1, amsgrad=0.1, adopt=0.1, correction=0.9)
    >>> Hyper(rule, learn=("lr", "damping", "nesterov", "adopt")).stack(Adam).learned
    ('lr', 'damping', 'nesterov', 'adopt')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.999, UnitInterval())
    damping: float = hyper(1e-8, UnitInterval())
    eta: float = hyper(2.0, Positive(scale=0.1))
    nesterov: float = hyper(0.0, UnitInterval())
    amsgrad: float = hyper(0.0, UnitInterval())
    adopt: float = hyper(0.0, UnitInterval())
    correction: float = hyper(1.0, UnitInterval())
    weight_decay: float = hyper(0.0, Positive())
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0:
            raise ValueError("Unified(eta = 0) has no root 1/eta: give an exponent above 0, such as 2")
        if self.correction != 0 and 1 in (self.beta1, self.beta2):
            raise ValueError("Unified(beta1 or beta2 = 1) divides by 1 - beta^t = 0: give a beta below 1, or correction=0")

    def init(self, x: Tensor) -> State:
        return {name: x.new_zeros(x.shape) for name in ("m", "v", *(["v_max"] if self.amsgrad != 0 else []))}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0 and not self.decoupled:
            g = g + h.weight_decay * x
        first, u, n = t == 1, power(g.abs(), h.eta), g
        v = torch.lerp(state["v"], u, h.one_minus("beta2"))
        if self.adopt != 0:
            v = torch.where(first, torch.lerp(v, u, h.adopt), v)
            before = torch.where(first, u, self._blend(state, h))
            n = g / power(torch.maximum(*self._terms(before, h, t - 1)), h.adopt)
            n = torch.where(first, h.one_minus("adopt") * n, n)
        new = {"m": torch.lerp(state["m"], n, h.one_minus("beta1")), "v": v}
        if self.amsgrad != 0:
            new["v_max"] = torch.maximum(state["v_max"], v)
        d = new["m"] if self.nesterov == 0 else new["m"] + h.nesterov * h.one_minus("beta1") * (n - new["m"])
        metric = self.metric(new, h, t)
        d = d / (metric if self.adopt == 0 else power(metric, h.one_minus("adopt")))
        step = h.lr if self.correction == 0 else h.lr / h.one_minus_power("beta1", t).pow(h.correction)
        if self.decoupled and self.weight_decay != 0:
            x = x * self.shrink(h)
        return x - step * d, new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        scale, damping = self._terms(self._blend(state, h), h, t)
        return scale + damping

    def _blend(self, state: State, h: Values) -> Tensor:
        return state["v"] if self.amsgrad == 0 else torch.lerp(state["v"], state["v_max"], h.amsgrad)

    def _terms(self, s: Tensor, h: Values, t: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of D after t steps; before the first, s is |g|^eta itself and has no bias."""
        if self.correction != 0:
            bias2 = h.one_minus_power("beta2", t)
            if self.adopt != 0:
                bias2 = torch.where(t == 0, 1.0, torch.lerp(bias2, torch.ones_like(bias2), h.adopt))
            s = s / bias2.pow(h.correction)
        return h.one_minus("damping") * power(s, 1 / h.eta), h.damping

    def linear_in_lr(self) -> bool:
        return self.decoupled or self.weight_decay == 0

    def shrink(self, h: Values) -> Tensor | float:
        return 1 - h.lr * h.weight_decay if self.decoupled and self.weight_decay != 0 else 1.0
