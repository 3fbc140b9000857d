from dataclasses import dataclass

from torch import Tensor, lerp

from ..domains import Positive, UnitInterval
from ..rule import State, Values, hyper, root, square
from .moments import Moments


@dataclass(frozen=True)
class Yogi(Moments):
    """Adam with a second moment that changes by at most (1 − beta2)·g² at each step: it grows fast and shrinks slowly.

        m = beta1·m + (1 − beta1)·g
        v = v − (1 − beta2)·sign(v − g²)·g²
        x = x − lr·m / (√v + eps)           (bias_correction: m̂ and v̂ as in Adam)

    Args:
        lr: learning rate, at least 0, default 1e-2; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2: decay rates of the first and second moment, in [0, 1), default 0.9 and 0.999.
        eps: added to the root, after bias correction if there is one, at least 0, default 1e-3.
        v0: second moment before the first step, at least 0, default 0; an option, which is not learned.
        bias_correction: divide the moments by 1 − beta^t, default False, as in the paper.

    Raises:
        ValueError: a value outside its domain, or a beta of 1 with bias correction.

    Source: Zaheer et al. 2018, Adaptive Methods for Nonconvex Optimization (NeurIPS), Algorithm 2.

    >>> from hyperopt import Adam, Hyper, Yogi
    >>> Hyper(Yogi, v0=1e-6).stack(Adam)
    Hyper('Yogi(v0=1e-06) / Adam')
    """

    lr: float = hyper(1e-2, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval(), horizon=1)
    beta2: float = hyper(0.999, UnitInterval(), horizon=1)
    eps: float = hyper(1e-3, Positive())
    v0: float = 0.0
    bias_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.v0 >= 0:
            raise ValueError(f"Yogi(v0 = {self.v0!r}) is a second moment: give a number of at least 0")

    def init(self, x: Tensor) -> State:
        moment = {"m": x.new_zeros(x.shape)} if self.beta1 != 0 else {}
        return {**moment, "v": x.new_full(x.shape, self.v0)}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        u, m = square(g), g
        new = {"v": state["v"] - h.one_minus("beta2") * (state["v"] - u).sign() * u}
        if self.beta1 != 0:
            m = new["m"] = lerp(state["m"], g, h.one_minus("beta1"))
        if self.bias_correction:
            scale = h.one_minus_power("beta2", t).sqrt()
            m = (scale if self.beta1 == 0 else scale / h.one_minus_power("beta1", t)) * m
        return m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        return root(state["v"]) + (h.eps * h.one_minus_power("beta2", t).sqrt() if self.bias_correction else h.eps)
