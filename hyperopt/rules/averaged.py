"""An exponential average of the weights, kept beside any rule."""

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, lerp

from ..domains import UnitInterval
from ..rule import Rule, State, Values, hyper, overrides
from .composition import Composed, compose


def Averaged(base: Any, *, decay: float | None = None) -> Any:
    """The rule `base` with an exponential moving average of the weights to evaluate with.

        x = base(x)
        a = decay·a + (1 − decay)·x,        â = a / (1 − decay^t)

    The correction makes â an average of the weights after steps 1 to t, without the initial ones. Training is exactly that of `base`,
    which never reads the average. The gradient of the training loss therefore does not depend on `decay`: its hypergradient is 0, unless
    it comes from gradients taken at the average, by `optimizer.hyper_backward(loss)` under `with optimizer.averaged():`. Evaluate under
    this context too.

    Args:
        base: the class of a rule that does not average by itself, or a variant of one.
        decay: decay of the average at each step, in [0, 1), default 0.98, which averages over about 50 steps (1 − 1/k: over k).

    Raises:
        TypeError: `base` is not a rule's class, or averages by itself.
        ValueError: a decay outside [0, 1), or a value that `base` rejects.

    Source: Polyak and Juditsky 1992; exponential, with the bias correction of Adam.

    >>> from hyperopt import Adam, Averaged, Hyper
    >>> Hyper(Averaged(Adam, decay=0.9)).stack(Adam)
    Hyper('Averaged(Adam)(decay=0.9) / Adam')
    """
    rule = _averaged(base)
    return rule if decay is None else rule(decay=decay)  # pyright: ignore[reportCallIssue]


@cache
def _averaged(base: Any) -> type[Rule]:
    plain = base() if callable(base) else None
    if isinstance(plain, Rule) and plain.averages:
        raise TypeError(f"Averaged takes a rule that does not average by itself, got {type(plain).__name__}")
    inherited = ("elementwise", "parts", "trust", "horizon", "first_moment", "decoupled")
    made = compose(_Averaged, _averaged, base, also={"decay": hyper(0.98, UnitInterval())}, inherited=inherited)
    if isinstance(plain, Rule) and overrides(plain, "update"):
        setattr(made, "update", _update)  # noqa: B010 - `update` is not a field
    return made


class _Averaged(Composed):
    averages = True
    own = ("average",)
    if TYPE_CHECKING:
        decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay == 1:
            raise ValueError(f"{type(self).__name__}(decay = 1) divides by 1 - decay^t = 0: give a decay below 1")

    def init(self, x: Tensor) -> State:
        return {**self.inner.init(x), "average": x.clone()}

    def after(self, place: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return self._averaging(*self.inner.after(place, state, h, t), state["average"], h, t)

    def _averaging(self, x: Tensor, own: State, average: Tensor, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return x, {**own, "average": lerp(average, x, h.one_minus("decay") / h.one_minus_power("decay", t))}


def _update(self: _Averaged, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
    """The step over a rule that defines `update` and not `direction`."""
    return self._averaging(*self.inner.update(x, g, self._inner_state(state), h, t), state["average"], h, t)
