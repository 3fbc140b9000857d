"""Two directions in one tower with one lr: matrices by one rule, and the rest by another."""

import dataclasses
import math
from abc import ABCMeta
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from ..roles import Role
from ..rule import Rule, State, Values, overrides
from .composition import again


class Splits(ABCMeta):
    """The class of a rule that `|` puts beside another: `Muon | Adam` is `Split(Muon, Adam)`."""

    def __or__(cls, other: Any) -> Any:
        return Split(cls, other) if callable(other) and isinstance(other(), Rule) else super().__or__(other)


MATRICES = "matrices"  # what decays, if it is not what one of the two serves
# Elements of matrices that are larger decay as if they were this large: three standard deviations of torch's embeddings, the largest
# initial weights in use. Where targets are 150,000, lr·weight_decay passes 1: without this, housing prices of the zoo end at 1.67 times
# the best peer, with 10, 3, 1 at 1.13, 1.00, .91. With 1, embeddings that overfit hardly decay: rare words 1.50 in place of 1.23.
LARGEST = 3.0


@cache
def Split(first: Any, second: Any) -> type[Rule]:
    """One rule with two directions: `Muon | Adam` serves hidden matrices by Muon and everything else by Adam.

        x = x − lr·(d(g) + weight_decay·x)       d: the direction of `first` or of `second`

    Which of them serves a tensor is settled when a tower is bound, kept in checkpoints, and printed with the optimizer. A module says it
    best, `bind(model)`: embeddings, output head, norms and biases go to `second`. Given parameters alone, those with two or more
    dimensions go to `first`. A parameter group's entry `"rule": "Adam"` names one of the two for all of its tensors, a list one for each.

    The hyperparameters are those of both. What both have is one hyperparameter, with the default and domain of `second`: lr above all,
    which must therefore mean the same to `first`, as it does to Muon. Above level 0, where vectors are stepped, `second` serves.
    `ScheduleFree(Muon | Adam)` leaves out the first moments of both.

    Weight decay is decoupled. The option `decayed` says what decays: by default everything; the tensors that one of the two serves, if it
    names one, `decayed="Muon"`; with `decayed="matrices"` all tensors of two or more dimensions, of a parameter group that has several of
    them: neither biases and the gains of norms, nor the weights of a linear or logistic regression, nor bare vectors and numbers. Elements
    larger than 3, that is weights that have to be large because targets are, then decay as if they were 3:

        x = x − lr·(d(g) + weight_decay·clamp(x, −3, 3))

    Args:
        first: the class of a rule for matrices, or a variant of one.
        second: the class of the rule for the rest, or a variant of one.

    Raises:
        TypeError: not two different rules' classes, or one that averages, defines `update` or `after`, or names an option as the other
            names a hyperparameter.
        ValueError: a `decayed` that is none of these.

    >>> from hyperopt import Adam, Hyper, Muon, ScheduleFree
    >>> Hyper(ScheduleFree(Muon | Adam), eps=1e-4).stack(Adam)
    Hyper('ScheduleFree(Muon | Adam)(eps=0.0001) / Adam')
    """
    parts = tuple(_plain(base) for base in (first, second))
    names = tuple(getattr(base, "__name__", type(part).__name__) for base, part in zip((first, second), parts, strict=True))
    if names[0] == names[1]:
        raise TypeError(f"{names[0]} | {names[1]} is one rule: give two, as in Muon | Adam")
    found: dict[str, Any] = {}
    for part in parts:
        for f in dataclasses.fields(part):
            if f.name in found and ("hyper" in f.metadata) != ("hyper" in found[f.name].metadata):
                raise TypeError(f"{' | '.join(names)}: {f.name!r} is a hyperparameter of one of them and an option of the other")
            found[f.name] = dataclasses.field(default=getattr(part, f.name), metadata=f.metadata)
    found.pop("decoupled", None)
    found["decayed"] = dataclasses.field(default=None)
    namespace = {
        "bases": (first, second),
        "made_by": staticmethod(Split),
        "parts": names,
        "trust": min(part.trust for part in parts),
        "horizon": min(part.horizon for part in parts),
        "first_moment": tuple(dict.fromkeys(name for part in parts for name in part.first_moment)),
        "__module__": __name__,
    }
    fields = [(name, Any, field) for name, field in found.items()]
    return dataclasses.make_dataclass(" | ".join(names), fields, bases=(_Split,), frozen=True, namespace=namespace)


def _plain(base: Any) -> Rule:
    """A rule that can be one of two: a direction and no more."""
    plain = base() if callable(base) else None
    if not isinstance(plain, Rule):
        raise TypeError(f"Split takes two rules, such as Muon and Adam, by their classes, got {base!r}: values go behind it")
    if plain.averages or plain.parts or any(overrides(plain, name) for name in ("update", "after")):
        raise TypeError(f"Split takes rules that give a direction alone, got {type(plain).__name__}: an average goes around both")
    return plain


class _Split(Rule):
    bases: ClassVar[tuple[Any, Any]]
    made_by: ClassVar[Any]
    elementwise = False
    decoupled = True
    if TYPE_CHECKING:
        decayed: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.directions  # noqa: B018 - raises for values that one of them rejects
        if self.decayed not in (None, MATRICES, *self.parts):
            known = ", ".join((*self.parts, MATRICES))
            raise ValueError(f"{type(self).__name__}(decayed={self.decayed!r}) must be None, for everything, or one of {known}")

    @cached_property
    def directions(self) -> tuple[Rule, ...]:
        """An instance of each of the two rules with the values of this one."""
        made = []
        for base in self.bases:
            names = {f.name for f in dataclasses.fields(base())}
            values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
            made.append(dataclasses.replace(base(), **values, **dict.fromkeys(names & {"decoupled"}, True)))
        return tuple(made)

    def serving(self, role: Role) -> Self:
        new = super().serving(role)
        mine = new.by(None)
        vars(new).update(directions=tuple(rule.serving(role) for rule in self.directions), elementwise=mine.elementwise)
        return new

    def by(self, x: Tensor | None) -> Rule:
        """The rule that serves a tensor."""
        chosen = self.role.direction
        return self.directions[x is not None and x.dim() < 2 if chosen is None else chosen]

    def init(self, x: Tensor) -> State:
        return self.by(x).init(x)

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return self.by(g).direction(g, state, h, t)

    def _decay_bound(self) -> float:
        most, served = LARGEST if self.decayed == MATRICES else math.inf, self.role.direction
        if self.decayed is None or served is None:  # not settled yet: the answer is one for all tensors together
            return most
        decays = self.role.matrix if self.decayed == MATRICES else self.parts[served] == self.decayed
        return most if decays else 0.0

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor | float:
        return self.by(next(iter(state.values()), None)).metric(state, h, t)

    def __reduce__(self) -> tuple[Any, ...]:
        return again(self, self.made_by, self.bases)
