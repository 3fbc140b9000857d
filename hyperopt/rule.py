"""What a rule is: the mathematics of one optimizer, with its hyperparameters declared once."""

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Self

from . import horizons
from .domains import Domain
from .roles import Role
from .values import Values

State = dict[str, Tensor]


@dataclass(frozen=True)
class Declared:
    """How a rule declares one hyperparameter: default value, domain, default above level 0, default horizon, and usual value."""

    default: float
    domain: Domain
    above: float
    horizon: float | None  # None: that of the rule
    usual: float | None  # None: the default


def hyper(default: float, domain: Domain, *, above: float | None = None, horizon: float | None = None, usual: float | None = None) -> Any:
    """Declare a hyperparameter as a dataclass field of a rule.

    Args:
        default: the value if the user gives none.
        domain: the set in which the hyperparameter lives, and the space in which it is learned.
        above: the default above level 0, where the rule moves raw hyperparameters and not weights; `default` if None.
        horizon: the number of past steps that it is held responsible for, from 1 to math.inf; that of the rule, `Rule.horizon`, if None.
            The effect of lr on the weights stays for ever; that of a decay shows within the steps that it averages over.
        usual: the value that it returns to where hypergradients do not hold it elsewhere, see `guards.Prior`; the default if None. Where
            that cannot be learned, and for weight decay, it is the value that the user gives.

    Raises:
        ValueError: a horizon below 1, or a usual value that cannot be learned.

    >>> from hyperopt import UnitInterval, hyper
    >>> beta = hyper(0.9, UnitInterval(), horizon=1)
    """
    if horizon is not None:
        horizons.check("hyper(horizon)", horizon)
    if usual is not None and not domain.inside(usual):
        raise ValueError(f"hyper(usual) = {usual!r} cannot be learned in {domain!r}: give a value strictly inside")
    declared = Declared(default, domain, default if above is None else above, horizon, usual)
    return field(default=default, metadata={"hyper": declared})


@dataclass(frozen=True)
class Rule(ABC):
    """The mathematics of one optimizer and nothing else.

    A rule says in which direction a step goes; everything else follows from that:

        g = g + weight_decay·x                                  coupled decay, unless the rule has `decoupled = True`
        d, s' = direction(g, s, h, t)
        place' = place − lr·(d + weight_decay·x)                decoupled decay; place is x, unless the rule averages by itself
        x', s' = after(place', s', h, t)                        the identity, unless the rule averages

    A subclass is a frozen dataclass: fields made with `hyper` are hyperparameters, any other field is an option that is fixed for a run
    (nesterov, decoupled …). A hyperparameter whose value is 0 on the boundary of its domain may be left out of `init` and `direction`
    altogether: if another value is assigned later, the state is extended.

    With the option `cautious`, only elements decay whose size the direction does not increase, d·x ≥ 0 (Chen et al., arXiv 2510.12402).

    Raises:
        ValueError: a value outside the closure of its domain; `cautious` without decoupled decay.
        TypeError: a value that is not a number; a subclass that defines neither `direction` nor `update`.
    """

    elementwise: ClassVar[bool] = True  # the update of a coordinate depends on that coordinate alone
    trust: ClassVar[float] = 0.03  # default at level 0; of .02 to .1 the flattest over initial lrs on MNIST validation data
    horizon: ClassVar[float] = 1000.0  # for how many past steps a hyperparameter is held responsible that declares no horizon of its own
    first_moment: ClassVar[tuple[str, ...]] = ()  # the hyperparameters that average gradients; at 0 they do not
    averages: ClassVar[bool] = False  # the weights to evaluate with are an average: the state "average", or see `gapped`
    # lr moves not x but x + mix·gap, and the average is x − (1 − mix)·gap, with a state "gap" between the two and a number "mix". They are
    # kept relative to x so that they move along with weights that are changed from outside.
    gapped: ClassVar[bool] = False
    totals: ClassVar[bool] = False  # `after` reads h.total
    cautious = False  # decoupled decay of elements with d·x ≥ 0 alone; no annotation, since rules have fields of this name
    through = 1.0  # the share of the average in the hypergradient of a step; likewise
    parts: ClassVar[tuple[str, ...]] = ()  # the names of the directions, where there are two (Muon | Adam)
    role: ClassVar[Role] = Role()  # of the tensors that it is to step

    @abstractmethod
    def init(self, x: Tensor) -> State:
        """The state before the first step: tensors shaped like `x`, or 0-d numbers, by name."""

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """The step at lr = 1, to be subtracted, and the new state; it never reads x. Pure, differentiable, nothing in place.

        Args:
            g: the gradient with respect to x.
            state: as `init` made it.
            h: the hyperparameters.
            t: the number of this step, from 1, a 0-d tensor.
        """
        raise NotImplementedError(type(self).__name__)

    def after(self, place: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """The new x and the rest of the new state, once that which lr moves has arrived at `place`.

        Args:
            place: where that has arrived.
            state: what `direction` returned; in it, the entries that `direction` does not return are those of the step before, and "gap"
                reaches from the average before to `place`.
            h, t: as in `direction`.
        """
        return place, state

    def total(self, g: Tensor, x: Tensor, state: State) -> Tensor:
        """What some of the weights add to a number that `after` is to know of all of them, as `h.total`, if `totals` is true.

        Args:
            g, x, state: gradient, weights and state before the step.
        """
        raise NotImplementedError(type(self).__name__)

    def place(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """What lr moves."""
        return torch.addcmul(x, state["mix"], state["gap"]) if self.gapped else x

    def average(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The weights to evaluate with."""
        if self.gapped:
            return x - (1 - state["mix"]) * state["gap"]
        return state["average"] if self.averages else x

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor | float:
        """The diagonal H of a step −lr·H⁻¹·m, up to a common factor: the metric in which weights are projected onto a feasible set.

        Where the step divides by an older quantity (ADOPT by the previous v, Adadelta by the previous s, RMSprop's momentum by every
        v so far), H is nevertheless that of the state after the step.

        Args:
            state: as `direction` returned it.
            h, t: as in `direction`.
        """
        return 1.0

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """One step: new x and new state. Written once for all rules; one that overrides it is differentiated as a whole."""
        return self.after(*self._arrive(x, g, state, h, t), h, t)

    @classmethod
    def declared(cls) -> dict[str, Declared]:
        """The hyperparameters that the rule declares, by name."""
        return {f.name: f.metadata["hyper"] for f in dataclasses.fields(cls) if "hyper" in f.metadata}

    def serving(self, role: Role) -> Self:
        """This rule for tensors of one role."""
        new = copy.copy(self)
        vars(new)["role"] = role
        return new

    def value(self, name: str) -> float | Mapping[str, float]:
        """The value of a hyperparameter: a number, or a number for each hyperparameter that this rule moves."""
        return getattr(self, name)

    def __post_init__(self) -> None:
        if not overrides(self, "direction") and not overrides(self, "update"):
            raise TypeError(f"{type(self).__name__} says nothing about its step: define direction(self, g, state, h, t), or update")
        for name, declared in self.declared().items():
            value = getattr(self, name)
            for number in value.values() if isinstance(value, Mapping) else (value,):
                check(f"{type(self).__name__}({name})", number, declared.domain)
        if self.cautious and self._couples():
            raise ValueError(f"{type(self).__name__}(cautious=True) is for decay that is decoupled: give decoupled=True too")

    def _arrive(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        """Where the step takes that which lr moves, and the state on the way to `after`."""
        d, own = self.direction(g + self._decay(h, t) * x if self._couples() else g, state, h, t)
        return self._moved(x, {**state, **own}, h.lr * self._step(x, d, h, t))

    def _moved(self, x: Tensor, state: State, move: Tensor) -> tuple[Tensor, State]:
        """What lr moves, after a move downwards, and the state on the way to `after`."""
        return self.place(x, state) - move, {**state, "gap": state["gap"] - move} if self.gapped else state

    def _step(self, x: Tensor, d: Tensor, h: Values, t: Tensor) -> Tensor:
        """The direction with decoupled weight decay."""
        most = self._decay_bound() if self._decays() and not self._couples() else 0.0
        shrunk = x.clamp(-most, most) if 0 < most < math.inf else x
        return d + self._decay(h, t) * (shrunk.where(d * x >= 0, 0.0) if self.cautious else shrunk) if most else d

    def _decays(self) -> bool:
        return getattr(self, "weight_decay", 0) != 0 and self._decay_bound() > 0

    def _decay_bound(self) -> float:
        """The size above which the weights that this rule serves decay as if they were no larger; 0 where they do not decay at all."""
        return math.inf

    def _couples(self) -> bool:
        """Whether weight decay is added to the gradient, so that the direction depends on x."""
        return self._decays() and not getattr(self, "decoupled", False)

    def _decay(self, h: Values, t: Tensor) -> Tensor:
        return h.weight_decay


def overrides(rule: Rule, name: str) -> bool:
    """Whether the class of a rule defines the method `name` itself."""
    return getattr(type(rule), name) is not getattr(Rule, name)


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


def constant(a: Tensor) -> Tensor:
    """a, as a constant in derivatives."""
    return forward_ad.unpack_dual(a).primal.detach()


def power(a: Tensor, p: Tensor) -> Tensor:
    """a^p for a ≥ 0 and a learned p, with finite derivatives: as in `root`, a is taken for the smallest normal number where it is less."""
    info = torch.finfo(a.dtype)
    return a.clamp_min(info.tiny).pow(p).clamp_max(info.max)
