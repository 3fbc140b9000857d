"""An exponential average of the weights beside any rule."""

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..domains import UnitInterval
from ..rule import Rule, State, Values, hyper
from .composition import Composed, compose


def Averaged(base: Any, *, decay: float | None = None) -> Any:
    """The rule `base`, and beside it an average of the weights that it passes through, to evaluate with.

        x' = base(x)
        a = decay·a + (1 − decay)·x',      divided by 1 − decay^t: the average is of x₁ … x_t, not of the initial weights

    Training is that of `base`, which never sees the average: the gradient of the training loss says nothing about `decay`.
    Its hypergradient is 0 and it stays what it is, unless it comes from gradients taken at the averaged weights, by
    `optimizer.hyper_backward(loss)` under `with optimizer.averaged():`. Evaluate there too.

    Args:
        base: a rule that does not average by itself; its class.
        decay: in [0, 1), for each step, default 0.98 (an average over the last 50 steps; 1 − 1/k is one over k steps).

    Raises:
        TypeError: what is no rule, or averages already.
        ValueError: a decay outside [0, 1).

    Source: Polyak and Juditsky 1992; the exponential form with its correction as in Adam.

    >>> from hyperopt import Adam, Averaged, Hyper
    >>> Hyper(Averaged(Adam, decay=0.9)).stack(Adam)
    Hyper('Averaged(Adam)(decay=0.9) / Adam')
    """
    rule = _averaged(base)
    return rule if decay is None else rule(decay=decay)  # pyright: ignore[reportCallIssue]


@cache
def _averaged(base: Any) -> type[Rule]:
    plain = base() if callable(base) else None
    if isinstance(plain, Rule) and plain.average:
        raise TypeError(f"Averaged takes a rule that does not average by itself, got {type(plain).__name__}")
    made = compose(_Averaged, _averaged, base, also=[("decay", hyper(0.98, UnitInterval()))])
    plain = base()
    for name in ("elementwise", "trust", "warm", "first_moment", "moves"):
        setattr(made, name, getattr(plain, name))
    return made


class _Averaged(Composed):
    average: ClassVar[str] = "average"
    if TYPE_CHECKING:
        decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay == 1:
            raise ValueError(f"{type(self).__name__}(decay = 1) divides by 1 - decay^t = 0: give a decay below 1")
        self.inner  # noqa: B018 - raises what `base` refuses

    def init(self, x: Tensor) -> State:
        return {**self.inner.init(x), "average": x.clone()}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        own = {key: state[key] for key in state if key != "average"}
        x1, own = self.inner.update(x, g, own, h, t)
        return x1, {**own, "average": torch.lerp(state["average"], x1, self._share(h, t))}

    def ended_at(self, place: Tensor, x: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return place, {**state, "average": state["average"] + self._share(h, t) * (place - x)}

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor | float:
        return self.inner.metric(state, h, t)

    def _share(self, h: Values, t: Tensor) -> Tensor:
        return h.one_minus("decay") / h.one_minus_power("decay", t)
