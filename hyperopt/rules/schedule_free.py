"""Schedule-Free: averaging of the weights inside the rule, in place of a learning rate schedule."""

import dataclasses
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..domains import UnitInterval
from ..rule import Rule, State, Values, hyper
from .composition import Composed, compose


@cache
def ScheduleFree(base: Any) -> type[Rule]:
    """The rule that steps z with `base`, takes gradients at y and evaluates at x, the average of z.

        z = z − lr·(d(g) + weight_decay·y)       d: the displacement of `base`, its first moment off
        x = x + c·(z − x),                       c = lr² / (sum of lr² so far)
        y = beta1·x + (1 − beta1)·z              the model's parameters

    The hyperparameters are those of `base`, but for the first moment, whose place `beta1` takes (default 0.9); none of
    beta1 and weight_decay is learned unless named, as training gradients alone push them to their limits. Evaluate under
    `with optimizer.averaged():`. Where lr changes, x's weight is lr² here and the largest lr² so far in the authors' package.
    Where lr is learned, trust grows over the first 20 steps, and the gradient at y is taken for the one at x, where the model is evaluated:

        q = <g, ∂x/∂lr>                          not <g, ∂y/∂lr>, which holds against lr what the average makes good

    So it is for all that is learned at horizons above 1; beta1, which x hardly depends on, has <g, (x − z)·∂beta1> besides. What
    `optimizer.hyper_backward` is given goes through the weights that its loss was made from. Above level 0, where y is what the level
    below uses, q goes through y.

    Args:
        base: a rule that names the first moment to be left out (`Rule.first_moment`): Adam, AdamW, SGD; its class.

    Raises:
        TypeError: any other rule.

    Source: Defazio et al. 2024 (arXiv 2405.15682).

    >>> from hyperopt import Adam, Hyper, ScheduleFree
    >>> Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam)
    Hyper('ScheduleFree(Adam)(lr=0.01) / Adam')
    """
    plain = base() if callable(base) else None
    if not isinstance(plain, Rule) or not plain.first_moment or plain.average:
        raise TypeError(f"ScheduleFree takes a rule with a first moment that it can leave out, Adam, AdamW or SGD, got {base!r}")
    options = {f.name for f in dataclasses.fields(plain)} - plain.declared().keys()
    left_out = {"beta1", *plain.first_moment, *options}
    return compose(_ScheduleFree, ScheduleFree, base, without=left_out, also=[("beta1", hyper(0.9, UnitInterval()))])


class _ScheduleFree(Composed):
    # z moves farther than the weights y: on MNIST validation data 0.03 ends at 4.7 to 5.4 %, 0.1 at 2.3 to 2.8 %.
    trust: ClassVar[float] = 0.1
    # Through the average lr rises for longer. Validation error of MNIST (24 runs) and ResNet-20 (3, 2, 2): 2.65 and 27.5 % with 1000,
    # 2.57 and 27.5 with 500, 2.52 and 30.7 with 300.
    horizon: ClassVar[float] = 500.0
    # Ten percent in each of the first steps, whose directions are little more than signs, is damage that stays: from lr = .1 a small GPT
    # ends at 2.20 with 1, at 1.97 with 10 and 1.98 with 30 (validation loss, one seed). MNIST loses up to a tenth, with 100 two.
    warm: ClassVar[int] = 20
    moves: ClassVar[str] = "z"
    average: ClassVar[str] = "average"
    if TYPE_CHECKING:
        weight_decay: float

    @cached_property
    def inner(self) -> Rule:
        """`base` with this rule's values, no first moment and no weight decay, which is taken at y."""
        plain = super().inner
        return dataclasses.replace(plain, **dict.fromkeys((*plain.first_moment, "weight_decay"), 0.0))

    def init(self, x: Tensor) -> State:
        return {**self.inner.init(x), "z": x.clone(), "average": x.clone(), "weight": x.new_zeros(()), "mix": x.new_zeros(())}

    @staticmethod
    def weights(state: State) -> Tensor:
        return torch.lerp(state["z"], state["average"], state["mix"])

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        z, own = self.inner.update(state["z"], g, self._own(state), h, t)
        if self.weight_decay != 0:
            z = z - h.lr * h.weight_decay * self.weights(state)
        made = self.follow(z, state, h)
        return self.weights(made), {**own, **made}

    def late(self) -> tuple[str, ...]:
        return ("lr", "beta1") if self.weight_decay == 0 and self.inner.linear_in_lr() else ()

    def ahead(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return self.inner.update(torch.zeros_like(t), g, self._own(state), h, t)

    def follow(self, z: Tensor, state: State, h: Values) -> State:
        weight = state["weight"] + h.lr * h.lr
        average = torch.lerp(state["average"], z, self._share(weight, h))
        return {"z": z, "average": average, "weight": weight, "mix": h.beta1.expand_as(weight)}

    def ended_at(self, place: Tensor, x: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        average = state["average"] + self._share(state["weight"], h) * (place - state["z"])
        state = {**state, "z": place, "average": average}
        return self.weights(state), state

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor | float:
        return self.inner.metric(state, h, t)

    def _own(self, state: State) -> State:
        return {key: state[key] for key in state if key not in ("z", "average", "weight", "mix")}

    def _share(self, weight: Tensor, h: Values) -> Tensor:
        return h.lr * h.lr / weight.clamp_min(torch.finfo(weight.dtype).tiny)
