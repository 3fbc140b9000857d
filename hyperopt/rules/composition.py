"""Rules made from another rule: what `ScheduleFree` and `Averaged` have in common."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from ..roles import Role
from ..rule import Rule, State, Values


def compose(
    kind: type["Composed"],  # the parent of the new class
    made_by: Callable[[Any], type[Rule]],  # the function that returns this class for `base`; unpickling calls it
    base: Any,  # a rule's class, or a variant of one
    *,
    also: Mapping[str, Any],  # the fields that `kind` adds: declarations of hyperparameters, defaults of options
    without: Collection[str] = (),  # the fields of `base` that the new class does not have
    off: Collection[str] = (),  # the hyperparameters of `base` that are held at 0
    inherited: Collection[str] = ("elementwise", "parts"),  # the class attributes that are taken from `base`
) -> type[Rule]:
    """The class of rules that are `kind` over `base`; TypeError unless that is a rule's class."""
    plain, word = base() if callable(base) else None, kind.__name__.strip("_")
    if not isinstance(plain, Rule):
        raise TypeError(f"{word} takes a rule, such as Adam or SGD, by its class, got {base!r}: values go behind it, {word}(Adam)(lr=0.01)")
    kept = [f for f in dataclasses.fields(plain) if f.name not in without]
    fields: list[Any] = [(f.name, f.type, dataclasses.field(default=getattr(plain, f.name), metadata=f.metadata)) for f in kept]
    namespace = {"base": base, "made_by": staticmethod(made_by), "off": tuple(off), "__module__": kind.__module__}
    # An option of `base` is a field already, with the same name and default.
    taken = set(inherited) - {f.name for f in dataclasses.fields(plain)}
    namespace |= {name: getattr(plain, name) for name in taken if hasattr(plain, name)}
    name = f"{word}({getattr(base, '__name__', type(plain).__name__)})"
    return dataclasses.make_dataclass(
        name, [*fields, *((field, Any, value) for field, value in also.items())], bases=(kind,), frozen=True, namespace=namespace
    )


class Composed(Rule):
    """A rule that takes its direction from another rule, `base`, whose hyperparameters are its own too."""

    base: ClassVar[Any]
    made_by: ClassVar[Any]
    off: ClassVar[tuple[str, ...]] = ()  # the hyperparameters of `base` that are 0 here
    own: ClassVar[tuple[str, ...]] = ()  # the names of the state that `base` does not have

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner  # noqa: B018 - raises for values that `base` rejects

    @cached_property
    def inner(self) -> Rule:
        """An instance of `base` with the values of this rule, and 0 for what is off."""
        plain = self.base()
        names = {f.name for f in dataclasses.fields(plain)} & {f.name for f in dataclasses.fields(self)}
        return dataclasses.replace(plain, **{name: getattr(self, name) for name in names - {*self.off}}, **dict.fromkeys(self.off, 0.0))

    def serving(self, role: Role) -> Self:
        new, inner = super().serving(role), self.inner.serving(role)
        vars(new).update(inner=inner, elementwise=inner.elementwise)
        return new

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return self.inner.direction(g, self._inner_state(state), self._seen(h), t)

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor | float:
        return self.inner.metric(state, self._seen(h), t)

    def _inner_state(self, state: State) -> State:
        return {key: value for key, value in state.items() if key not in self.own}

    def _decay_bound(self) -> float:
        return self.inner._decay_bound()

    def _decay(self, h: Values, t: Tensor) -> Tensor:
        return self.inner._decay(h, t)

    def _seen(self, h: Values) -> Values:
        """The hyperparameters as `base` reads them."""
        return Zeroed(h, self.off) if self.off else h

    def __reduce__(self) -> tuple[Any, ...]:
        return again(self, self.made_by, (self.base,))


class Zeroed(Values):
    """A view of hyperparameters in which some are 0, whether or not the viewed object has them.

    A rule of the library skips a hyperparameter that is 0; a user's rule may read it nevertheless, and must then not see the
    composition's own hyperparameter of the same name.
    """

    def __init__(self, h: Values, names: Collection[str]) -> None:
        self._h, self._names = h, names

    def __getattr__(self, name: str) -> Tensor:
        return self._h.lr.new_zeros(()) if name in self._names else getattr(self._h, name)

    def one_minus(self, name: str) -> Tensor:
        return self._h.lr.new_ones(()) if name in self._names else self._h.one_minus(name)

    def one_minus_power(self, name: str, t: Tensor) -> Tensor:
        return self._h.lr.new_ones(()) if name in self._names else self._h.one_minus_power(name, t)


def again(rule: Rule, make: Callable[..., type[Rule]], bases: Iterable[Any]) -> tuple[Any, ...]:
    """What pickle needs of a rule whose class comes from a function call and not from a module, where it would be found by name."""
    values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    return _made, (_recipe(make, bases), values)


def _recipe(make: Callable[..., type[Rule]], bases: Iterable[Any]) -> tuple[Any, ...]:
    return make, tuple(_recipe(base.made_by, base.bases) if getattr(base, "made_by", None) else base for base in bases)


def _cooked(make: Callable[..., type[Rule]], bases: Iterable[Any]) -> type[Rule]:
    return make(*(_cooked(*base) if isinstance(base, tuple) else base for base in bases))


def _made(recipe: tuple[Any, ...], values: dict[str, Any]) -> Rule:
    return _cooked(*recipe)(**values)
