from dataclasses import dataclass

from torch import Tensor, lerp

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper, root, square
from .moments import Moments


@dataclass(frozen=True)
class NAdam(Moments):
    """Adam with Nesterov momentum that warms up, equal to `torch.optim.NAdam`.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·g²
        μ_t = beta1·(1 − 0.96^(t·momentum_decay) / 2),  p = μ_1·…·μ_t
        m̂ = μ_{t+1}·m / (1 − p·μ_{t+1}) + (1 − μ_t)·g / (1 − p)
        x = x − lr·m̂ / (√v̂ + eps),          v̂ = v / (1 − beta2^t)

    Args:
        lr: learning rate, at least 0, default 2e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1), default 0.9 and 0.999.
        eps: added to the root after bias correction, as in torch, at least 0, default 1e-8.
        weight_decay: weight decay coefficient, at least 0, default 0.
        momentum_decay: rate at which μ rises from beta1/2 to beta1, at least 0, default 4e-3.
        decoupled: apply weight decay to the weights and not to the gradient, default False (torch: decoupled_weight_decay).

    Raises:
        ValueError: a value outside its domain, or a beta of 1.

    Source: Dozat 2016; torch.optim.NAdam.

    >>> from hyperopt import SGD, Hyper, NAdam
    >>> Hyper(NAdam, learn=("lr", "momentum_decay")).stack(SGD)
    Hyper('NAdam(learn=(lr, momentum_decay)) / SGD')
    """

    lr: float = hyper(2e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=1)
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    momentum_decay: float = hyper(4e-3, Positive())
    decoupled: bool = False

    def init(self, x: Tensor) -> State:
        # p has no closed form while beta1 changes; where beta1 has a value for each coordinate, p has one too.
        moment = {"m": x.new_zeros(x.shape), "p": x.new_ones(x.shape)} if self.beta1 != 0 else {}
        return {**moment, "v": x.new_zeros(x.shape)}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        m_hat, new = g, {"v": lerp(state["v"], square(g), h.one_minus("beta2"))}
        if self.beta1 != 0:
            m = lerp(state["m"], g, h.one_minus("beta1"))
            mu, mu_next = (h.beta1 * (1 - 0.5 * 0.96 ** (s * h.momentum_decay)) for s in (t, t + 1))
            p = state["p"] * mu
            m_hat = mu_next / (1 - p * mu_next) * m + (1 - mu) / (1 - p) * g
            new |= {"m": m, "p": p}
        return m_hat / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["v"]) / h.one_minus_power("beta2", t).sqrt() + h.eps
