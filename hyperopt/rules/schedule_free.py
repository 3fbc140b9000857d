"""Schedule-Free: averaging of the weights inside the rule, in place of a learning rate schedule."""

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, dot, finfo, lerp

from ..domains import UnitInterval
from ..rule import Rule, State, Values, constant, hyper, overrides
from .composition import Composed, compose

MEMORY = 0.98  # of the mean that says whether the average lags behind


@cache
def ScheduleFree(base: Any) -> type[Rule]:
    """Schedule-Free learning over any rule with a first moment: the average of the weights replaces learning rate schedule and momentum.

        z = z − lr·(d(g) + weight_decay·y)       d: the direction of `base`, with its first moment at 0
        x = x + c·(z − x),                       c = lr² / w,  w = (1 − forget·behind)·w + lr²
        y = beta1·x + (1 − beta1)·z

    Gradients are taken at y, which the model's parameters hold during training. Evaluate at the average x, under
    `with optimizer.averaged():`.

    The hyperparameters are those of `base`, except that `beta1` replaces those of its first moment (`Rule.first_moment`). Options that are
    True or False keep the values that they have in `base`; others, such as Muon's rows, can be set. Weight decay is decoupled and taken at
    y. beta1 and weight_decay are learned only if they are named: training gradients alone push both to the ends of their domains.

    With forget = 0, w is the sum of lr² so far, and x the average over the whole run, which never leaves a start that is long past. With
    forget > 0 the average forgets where it lags behind, and there alone:

        behind = max(0, −M[<g, z − x>] / M[|<g, z − x>|])                   M: the mean over about the last 50 steps

    is 1 where the loss falls from x towards z in every step, and 0 where z lies as often uphill, as it does once noise or oscillations are
    what the average removes.

    The hypergradient of a training gradient g, which is taken at y, runs through the average, at which the model is evaluated:

        q = <g, ∂x/∂lr>,                         not <g, ∂y/∂lr>, which penalises lr for noise that the average removes

    With through < 1 the rest is taken through z: q = through·<g, ∂x/∂lr> + (1 − through)·<g, ∂z/∂lr>. This keeps lr from rising without end
    where z flies about so far that the average hides it.

    This holds for everything that is learned at horizons above 1. x hardly depends on beta1, which therefore gets <g, (x − z)·∂beta1>
    in addition. A loss given to `optimizer.hyper_backward` is differentiated through the weights at which it was computed. Above level 0,
    where the level below uses y, q runs through y.

    With forget > 0, c is a constant in the derivatives. It does not change if all lr so far change by the same factor. Differentiated, a
    larger lr would also mean a larger c, by as much as the horizon has forgotten of the past, and move x all the way towards z.

    The authors' package weights x by the square of the largest lr so far, and this rule by that of the current one; at constant lr they
    are equal.

    Args:
        base: the class of a rule with a first moment, or a variant of one: Adam, AdamW, SGD, RMSprop, Lion …
        lr: learning rate, at least 0, default that of `base`.
        beta1: position of y between z (0) and x (1), in [0, 1], default 0.9.
        weight_decay: decoupled weight decay, at least 0, default that of `base`.
        cautious: decay of those elements alone whose size the step does not increase (Chen et al. 2025, arXiv 2510.12402), default False.
        forget: how much of its past the average forgets in a step at which it is wholly behind, in [0, 1], default 0.
        through: the share of the average in the hypergradient, in [0, 1], default 1.

    Raises:
        TypeError: `base` is not a rule's class, has no first moment, averages by itself, or overrides `update`.
        ValueError: a value outside its domain, or one that `base` rejects; forget or through outside [0, 1].

    Source: Defazio et al. 2024 (arXiv 2405.15682).

    >>> from hyperopt import Adam, Hyper, ScheduleFree
    >>> Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam)
    Hyper('ScheduleFree(Adam)(lr=0.01) / Adam')
    """
    plain = base() if callable(base) else None
    if not isinstance(plain, Rule) or not plain.first_moment or plain.averages:
        raise TypeError(f"ScheduleFree takes a rule with a first moment that it can leave out, such as Adam or SGD, got {base!r}")
    if overrides(plain, "update"):
        raise TypeError(f"ScheduleFree takes the direction of a rule, and {type(plain).__name__} defines update: define direction instead")
    options = {f.name for f in dataclasses.fields(plain) if isinstance(f.default, bool)}
    off = {*plain.first_moment, "weight_decay"} & plain.declared().keys()
    without = {"beta1", *plain.first_moment, *options}
    also = {"beta1": hyper(0.9, UnitInterval()), "forget": 0.0, "through": 1.0, "cautious": False}
    return compose(_ScheduleFree, ScheduleFree, base, also=also, without=without, off=sorted(off))


class _ScheduleFree(Composed):
    # z moves farther than the weights y: validation error on MNIST is 4.7 to 5.4 % with 0.03, and 2.3 to 2.8 % with 0.1.
    trust = 0.1
    # Through the average lr rises for longer. Validation error of MNIST (24 runs) and ResNet-20 (3, 2, 2): 2.65 and 27.5 % with 1000,
    # 2.57 and 27.5 with 500, 2.52 and 30.7 with 300.
    horizon = 500.0
    averages = gapped = True
    decoupled = True
    own = ("gap", "weight", "mix", "lag", "lag_size")
    if TYPE_CHECKING:
        forget: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("forget", "through"):
            value = getattr(self, option)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ValueError(f"ScheduleFree({option}={value!r}) must be a number between 0 and 1")

    def init(self, x: Tensor) -> State:
        numbers = ("weight", "mix", *(("lag", "lag_size") if self.forget else ()))
        return {**self.inner.init(x), "gap": torch.zeros_like(x), **{name: x.new_zeros(()) for name in numbers}}

    @property
    def totals(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.forget > 0

    def total(self, g: Tensor, x: Tensor, state: State) -> Tensor:
        return dot(g.reshape(-1), state["gap"].reshape(-1))

    def after(self, place: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        z, state = self.inner.after(place, state, self._seen(h), t)
        gap = state["gap"] if z is place else state["gap"] + (z - place)
        past, lr = state["weight"], h.lr
        if self.forget:
            past, lr = constant(past), constant(lr)
            lag = lerp(state["lag"], h.total, 1 - MEMORY)
            size = lerp(state["lag_size"], h.total.abs(), 1 - MEMORY)
            past = past * (1 - self.forget * (-lag / size.clamp_min(finfo(size.dtype).tiny)).clamp_min(0))
            state = {**state, "lag": lag, "lag_size": size}
        weight = past + lr * lr
        gap = gap * (1 - lr * lr / weight.clamp_min(finfo(weight.dtype).tiny))
        return z - h.beta1 * gap, {**state, "gap": gap, "weight": weight, "mix": h.beta1.expand_as(weight)}
