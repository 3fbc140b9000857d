"""How a rule is made of another rule: what `ScheduleFree` and `Averaged` have in common."""

import dataclasses
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, ClassVar

from ..rule import Rule


def compose(
    kind: type["Composed"],
    made_by: Callable[[Any], type[Rule]],
    base: Any,
    *,
    without: Collection[str] = (),
    also: Collection[tuple[str, Any]] = (),
) -> type[Rule]:
    """The class of rules that are `kind` over `base`.

    Args:
        kind: what the class derives from.
        made_by: the function of `base` that makes the class, by which a pickle finds it again.
        base: the class of a rule, or a variant of it.
        without: fields of `base` that the composition does not have.
        also: fields that it has beside them.

    Raises:
        TypeError: a base that is no rule.
    """
    plain = base() if callable(base) else None
    if not isinstance(plain, Rule):
        word = kind.__name__.strip("_")
        raise TypeError(f"{word} takes a rule, such as Adam or SGD, by its class, got {base!r}: values go behind it, {word}(Adam)(lr=0.01)")
    fields: list[Any] = [
        (f.name, f.type, dataclasses.field(default=getattr(plain, f.name), metadata=f.metadata))
        for f in dataclasses.fields(plain)
        if f.name not in without
    ]
    fields += [(name, float, field) for name, field in also]
    name = f"{kind.__name__.strip('_')}({getattr(base, '__name__', type(plain).__name__)})"
    namespace = {"base": base, "made_by": staticmethod(made_by), "__module__": kind.__module__}
    return dataclasses.make_dataclass(name, fields, bases=(kind,), frozen=True, namespace=namespace)


class Composed(Rule):
    """A rule over another one, `base`, whose hyperparameters are its own too."""

    base: ClassVar[Any]
    made_by: ClassVar[Any]

    @cached_property
    def inner(self) -> Rule:
        """`base` with this rule's values."""
        plain = self.base()
        return dataclasses.replace(plain, **{f.name: getattr(self, f.name) for f in dataclasses.fields(plain) if hasattr(self, f.name)})

    def __reduce__(self) -> tuple[Any, ...]:
        # The class was made by a call, and is found again by the same call.
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _again, (self.made_by, self.base, values)


def _again(make: Callable[[Any], type[Rule]], base: Any, values: dict[str, Any]) -> Rule:
    return make(base)(**values)
