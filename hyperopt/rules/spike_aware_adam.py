import math
from dataclasses import dataclass

from torch import Tensor, where

from ..domains import Positive
from ..rule import State, Values, hyper, root
from .adam import Adam


@dataclass(frozen=True)
class SpikeAwareAdam(Adam):
    """Adam whose gradients are clipped, element by element, at a multiple of their root mean square so far.

        g = g + weight_decay·x                      (decoupled: see Adam)
        c = clip·√v̂,  v̂ = v / (1 − beta2^(t − 1))   of the steps before, whatever bias_correction is; ∞ where v = 0
        g = clamp(g, −c, c)                         and then a step of Adam, with lr·min(1, decay_after / t)

    A spike, a gradient that is much larger than those before it, otherwise takes part in v for 1 / (1 − beta2) steps, in which x moves
    less. On top of a tower such spikes are the hypergradients of a step that went too far. SPAM clips alike, with v in place of v̂ and
    clip² = 5000, and also resets m now and then, which this rule does not.

    On top of a tower hypergradients answer for steps that are long past, so that a constant step size carries a value past where it should
    stay, back, and past it again. With decay_after = n the step size is constant for n steps and then falls as 1/t, as in stochastic
    approximation: how far a value may go while t doubles is the same at every t.

    It is not for gradients that are mostly 0, as those of rare words: what is clipped counts less in v, which shrinks without end where
    fewer than one gradient in clip² is not 0.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.1 above level 0, where it moves raw hyperparameters.
        beta1, beta2, eps, weight_decay, decoupled, cautious, amsgrad, bias_correction: as in `Adam`.
        clip: where gradients are clipped, in units of their root mean square, at least 0, default 5. Its hypergradient is that of the
            clipped elements alone.
        decay_after: number of steps after which lr decays as 1/t, at least 1, or None, default: never. Decoupled weight decay
            does not follow.

    Raises:
        ValueError: as in `Adam`, and a decay_after that is not a whole number of at least 1.

    Source: Huang et al. 2025, SPAM: Spike-Aware Adam with Momentum Reset (arXiv 2501.06842), for the clipping; Robbins &
    Monro 1951 for steps that fall as 1/t.

    >>> from hyperopt import Adam, Hyper, SpikeAwareAdam
    >>> Hyper(Adam).stack(SpikeAwareAdam, clip=3, decay_after=50)
    Hyper('Adam / SpikeAwareAdam(clip=3, decay_after=50)')
    """

    clip: float = hyper(5.0, Positive(), horizon=1)
    decay_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        after = self.decay_after
        if after is not None and (type(after) is not int or after < 1):
            raise ValueError(f"SpikeAwareAdam(decay_after={after!r}) must be None or a whole number of steps, at least 1")

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        v = state["v"] / h.one_minus_power("beta2", (t - 1).clamp_min(1))
        c = where(v > 0, h.clip * root(v), math.inf)
        d, new = super().direction(g.clamp(-c, c), state, h, t)
        return (d if self.decay_after is None else d * (self.decay_after / t).clamp_max(1.0)), new
