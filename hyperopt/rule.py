"""What a rule is: the mathematics of one optimizer, with its hyperparameters declared once."""

import dataclasses
import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .domains import Domain

State = dict[str, Tensor]
# kernel(move, g, state, t, skip) adds −d to `move` and writes the state in place, but does nothing where the 0-d `skip` is 1.
Kernel = Callable[[Tensor, Tensor, State, Tensor, Tensor], None]


@dataclass(frozen=True)
class Native:
    """A hand-made step of a rule on a CPU, for lr alone learned: two passes over the weights, as `native.Passes` calls them.

    Args:
        path: C++ with the functions `look` and `take`, which rules/adam.cpp explains.
        state: the names of the state that they read, in their order.
        complements: the names of the held hyperparameters whose 1 − value they read.
        values: the names of those that they read after them.
    """

    path: Path
    state: tuple[str, ...]
    complements: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Declared:
    """How a rule declares one hyperparameter: default value, domain, and the default used above level 0."""

    default: float
    domain: Domain
    above: float


def hyper(default: float, domain: Domain, *, above: float | None = None) -> Any:
    """Declare a hyperparameter as a dataclass field of a rule.

    Args:
        default: its value where the user gives none.
        domain: the set in which it lives.
        above: the default above level 0, where the rule moves raw hyperparameters and not weights (`default` if None).
    """
    declared = Declared(default, domain, default if above is None else above)
    return field(default=default, metadata={"hyper": declared})


class Values:
    """The hyperparameters of one update as attributes, and their complements without cancellation."""

    def __init__(self, value: Callable[[str], Tensor], complement: Callable[[str], Tensor]) -> None:
        self._value = value
        self._complement = complement

    def __getattr__(self, name: str) -> Tensor:
        # Each is made when the rule first asks for it, and kept.
        value = self.__dict__[name] = self._value(name)
        return value

    def one_minus(self, name: str) -> Tensor:
        """1 − value, exact also where the value is within rounding of 1."""
        key = "1 - " + name
        if key not in self.__dict__:
            self.__dict__[key] = self._complement(name)
        return self.__dict__[key]

    def one_minus_power(self, name: str, t: Tensor) -> Tensor:
        """1 − value**t, the bias of an exponential average after t steps."""
        return -torch.expm1(t * torch.log1p(-self.one_minus(name)))


@dataclass(frozen=True)
class Rule(ABC):
    """The mathematics of one optimizer and nothing else.

    A subclass is a frozen dataclass: fields made with `hyper` are hyperparameters, any other field is an option that is
    fixed for a run (nesterov, decoupled …). A hyperparameter whose value is 0 on the boundary of its domain may be
    left out of `init` and `update` altogether; the engine asks again if somebody assigns another value.

    Raises:
        ValueError: a value outside the closure of its domain.
        TypeError: a value that is not a number.
    """

    elementwise: ClassVar[bool] = True  # the update of a coordinate depends on that coordinate alone
    trust: ClassVar[float] = 0.03  # default at level 0; the flattest of .02 to .1 over initial lrs on MNIST validation data
    horizon: ClassVar[float] = 1000.0  # default, for how many past steps hyperparameters are held responsible
    warm: ClassVar[int] = 1  # the number of steps over which trust grows to its value at level 0
    first_moment: ClassVar[tuple[str, ...]] = ()  # what makes an average of gradients; with 0 for each there is none
    moves: ClassVar[str] = "x"  # what lr moves: x, or the state of this name
    average: ClassVar[str | None] = None  # the state that holds the weights to evaluate with, where that is not x
    # x as a function of the state that the same step left, where it is one. `update` does not read x then, and at level 0 and horizons
    # above 1 tangents of x are not kept; the hypergradient of a step is then that of `weights` with the tangent of `average`, where there
    # is one, in place of that of `moves`.
    weights: ClassVar[Callable[[State], Tensor] | None] = None

    @abstractmethod
    def init(self, x: Tensor) -> State:
        """The state before the first step: tensors shaped like `x`, by name."""

    @abstractmethod
    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """One step: new `x` and new state, in plain differentiable operations, nothing changed in place.

        Args:
            x: the weights (above level 0: raw hyperparameters).
            g: the gradient with respect to x.
            state: as `init` made it.
            h: the hyperparameters.
            t: the number of this step, from 1, a 0-d tensor.
        """

    def kernel(self, h: Mapping[str, float]) -> Kernel | None:
        """A kernel of torch's own that computes −d and the new state in one pass, for a rule that is linear in lr, if there is one.

        It is used in eager mode in place of a dozen operations of `update`, where lr alone is learned.

        Args:
            h: the values of all hyperparameters but lr, which are held.
        """
        return None

    def native(self) -> Native | None:
        """The hand-made step that `bind(…, compile=True)` takes on a CPU, for a rule that is linear in lr, if there is one."""
        return None

    def linear_in_lr(self) -> bool:
        """Whether x' = shrink(h)·x − lr·d(g, state, h) and the state never reads x; ∂x'/∂log lr is then x' − x."""
        return False

    def late(self) -> tuple[str, ...]:
        """The hyperparameters that only `follow` reads, lr among them, for a rule whose step is made in two halves."""
        return ()

    def ahead(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """The first half of such a step: how far that which lr moves goes at lr = 1, and the new state that lr has no part in."""
        raise NotImplementedError

    def follow(self, place: Tensor, state: State, h: Values) -> State:
        """The second half: the rest of the new state, with that which lr moves at `place`; x is the `weights` of it."""
        raise NotImplementedError

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor | float:
        """The diagonal H of a step −lr·H⁻¹·m, up to a common factor: the metric in which weights are projected onto a feasible set.

        Where the step divides by something older (ADOPT by the v before, Adadelta by the s before, RMSprop's momentum by every v
        so far), H is of the state after the step all the same.

        Args:
            state: as `update` left it.
            h, t: as `update` was given them.
        """
        return 1.0

    def ended_at(self, place: Tensor, x: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """What the step would have returned had that which lr moves ended at `place`, and not where `x` or `state` has it."""
        return place, state

    def shrink(self, h: Values) -> Tensor | float:
        """∂x'/∂x of a rule that is linear in lr: 1, or 1 − lr·weight_decay where the decay is decoupled."""
        return 1.0

    @classmethod
    def declared(cls) -> dict[str, Declared]:
        """The hyperparameters that the rule declares, by name."""
        return {f.name: f.metadata["hyper"] for f in dataclasses.fields(cls) if "hyper" in f.metadata}

    def value(self, name: str) -> float | Mapping[str, float]:
        """The value of a hyperparameter: a number, or a number for each hyperparameter that this rule moves."""
        return getattr(self, name)

    def __post_init__(self) -> None:
        for name, declared in self.declared().items():
            value = getattr(self, name)
            for number in value.values() if isinstance(value, Mapping) else (value,):
                check(f"{type(self).__name__}({name})", number, declared.domain)


class Variant(partial[Rule]):
    """A rule with other defaults, under a name of its own: `AdamW = Variant(Adam, …)`, a module's global."""

    @property
    def __name__(self) -> str:
        return next(name for name, value in vars(sys.modules[self.func.__module__]).items() if value is self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and pickled as classes are, by name, so that there is only one of it.
        return _named, (self.func.__module__, self.__name__)


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def check(argument: str, value: Any, domain: Domain) -> None:
    """Raise unless `value` is a number in the closure of `domain`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    if not domain.admits(value):
        low, high = domain.bounds()
        bounded = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}, and finite"
        inside = "a finite number" if low == -math.inf else bounded
        raise ValueError(f"{argument} = {value!r} is outside its domain {domain!r}: give {inside}")


def root(v: Tensor) -> Tensor:
    """√v with derivative 0 at 0, where √ has an infinite one that turns tangents into NaN.

    A pixel that is always black has v = 0. Clamping to the smallest normal number costs one operation and moves
    the value at 0 from 0 to 1e-19 (float32), far below any eps in use.
    """
    return v.clamp_min(torch.finfo(v.dtype).tiny).sqrt()


def square(g: Tensor) -> Tensor:
    """g², kept finite: 1e20 is finite in float32 and its square is not, and an infinite second moment would stay so for ever."""
    return (g * g).clamp_max(torch.finfo(g.dtype).max)


def power(a: Tensor, p: Tensor) -> Tensor:
    """a^p for a ≥ 0 and a learned p: finite, with finite derivatives at a = 0, where those of a^p are infinite or NaN.

    As in `root`, a is taken for the smallest normal number where it is less.
    """
    info = torch.finfo(a.dtype)
    return a.clamp_min(info.tiny).pow(p).clamp_max(info.max)
