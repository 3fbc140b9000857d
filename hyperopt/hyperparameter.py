"""A hyperparameter, and those of one node: value, raw value, 1 − value, what a user assigned, publication."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .domains import Domain, Positive, complement
from .rule import Rule, Values

Raw = dict[str, Tensor]


class Assignment(NamedTuple):
    """What a user may have assigned since the last step, as far as it can be known without reading the value on the host."""

    changed: Tensor  # whether a value was assigned
    boundary: Tensor  # whether it lies outside the open domain: it is used for this step, the raw value stays
    value: Tensor
    shift: Tensor  # what the round trip through the raw value loses, so that exactly `value` is used


class Hyperparameter:
    """One hyperparameter of a node.

    Args:
        domain: the space in which it is learned.
        value: the published value, which users read and may assign to.
        learned: whether a node above learns it.
        last_value: the value that was published last; None above level 0, where nobody assigns.
        rule: that has it, and may refuse a bound of the domain.
        name: in that rule.
        factor: of a scheduler, by which the learned value is multiplied; None without one.
    """

    def __init__(
        self,
        domain: Domain,
        value: Tensor,
        *,
        learned: bool,
        rule: Rule,
        name: str,
        last_value: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        self.domain, self.value, self.learned, self.last_value, self.factor = domain, value, learned, last_value, factor
        self.admitted = admitted(rule, name, domain, value.dtype)
        self.rest = complement(value)  # 1 − value, while it is held
        self.logarithmic = domain == Positive()  # the usual lr: torch's own functions save 11 of 95 calls of a step
        self.limits = domain.raw_limits(value.dtype)
        self.assignment: Assignment | None = None

    def at(self, raw: Tensor) -> Tensor:
        """The value at `raw`, as a scheduler scales it; the one that was assigned, if the step is the first one after that."""
        value = raw.exp() if self.logarithmic else self.domain.value(raw)
        if self.factor is not None:
            return value * self.factor
        if self.assignment is None:
            return value
        return torch.where(self.assignment.boundary, self.assignment.value, value + self.assignment.shift)

    def rest_at(self, raw: Tensor) -> Tensor:
        """1 − value at `raw`."""
        plain = self.assignment is None and self.factor is None
        return self.domain.complement(raw) if plain else complement(self.at(raw))

    def scaled(self, raw: Tensor, factor: Tensor) -> Tensor:
        """The raw value of `factor` times the value, exactly `raw` where factor is 1."""
        return (raw + factor.log() if self.logarithmic else self.domain.scaled(raw, factor)).clamp(*self.limits)

    def log_size(self, raw: Tensor) -> Tensor:
        """log |value|, finite also where the value is 0."""
        return raw if self.logarithmic else self.domain.log_size(raw)

    def assigned(self, raw: Tensor) -> Tensor:
        """The raw value of this step: that of an assigned value, or else the one that the level above chose."""
        assert self.last_value is not None
        value = self.value.clone()
        low, high = self.domain.bounds()
        changed = value != self.last_value
        inside = changed & (value > low) & (value < high)
        taken = self.domain.raw(torch.where(inside, value, self.domain.value(raw))).clamp(*self.limits)
        shift = torch.where(inside, value - self.domain.value(taken), torch.zeros_like(raw))
        self.assignment = Assignment(changed, changed & ~inside, value, shift)
        return torch.where(inside, taken, raw)

    def notice(self) -> None:
        """A user may have written the value: what a number may not be is ignored, as nobody waits to look at it."""
        low, high = self.admitted
        valid = (self.value >= low) & (self.value <= high) & self.value.isfinite()
        assert self.last_value is not None
        self.value.copy_(torch.where(valid, self.value, self.last_value))
        self.rest = complement(self.value)


class Hyperparameters:
    """The hyperparameters of one node, by name.

    Args:
        own: each of them.
        above: for each node above, the names of the hyperparameters that it learns and the vector of their raw values, side by side.
        constant: give held values to the rule as constants; for compiled code, in which an argument is slow.
    """

    def __init__(self, own: dict[str, Hyperparameter], above: Sequence[tuple[tuple[str, ...], Tensor]], *, constant: bool = False) -> None:
        self.own, self.above = own, above
        self.like = next(iter(own.values())).value if own else torch.zeros(())
        self.sizes = {names: [own[name].value.numel() for name in names] for names, _ in above}
        held = {name: h for name, h in own.items() if constant and not h.learned and not h.value.dim()}
        self.constants = {name: (float(h.value), float(h.rest)) for name, h in held.items()}
        self._held: Values | None = None  # at the top nothing changes from step to step
        self.watched: tuple[str, ...] = ()  # those that a user has assigned, or may have

    def __getitem__(self, name: str) -> Hyperparameter:
        return self.own[name]

    def notice(self, name: str) -> None:
        """A user may have written a value."""
        self.own[name].notice()
        self.watched = tuple(sorted({*self.watched, name}))

    def raw(self) -> Raw:
        """A copy of the raw values of what is learned."""
        raw: Raw = {}
        for names, x in self.above:
            if len(names) == x.numel() and not self.own[names[0]].value.dim():
                raw.update(zip(names, x.clone().unbind(), strict=True))
            else:
                parts = x.clone().split(self.sizes[names])
                raw.update((name, part.view(self.own[name].value.shape)) for name, part in zip(names, parts, strict=True))
        return raw

    def assigned(self, r: Raw) -> Raw:
        """`r`, with what a user assigned since the last step in place of what the level above chose."""
        for name in r:
            self.own[name].assignment = None
        if not self.watched:
            return r
        return {name: self.own[name].assigned(raw) if name in self.watched else raw for name, raw in r.items()}

    def values(self, r: Raw, spread: Callable[[str, Tensor], Tensor] | None = None) -> Values:
        """The hyperparameters as the rule sees them.

        Args:
            r: the raw values of those that are learned.
            spread: called with name and value, spreads a value over the coordinates where it differs there.
        """

        if not r and spread is None and not self.constants:
            if self._held is None:
                self._held = Values({name: h.value for name, h in self.own.items()}, lambda name: self.own[name].rest)
            return self._held

        def rest(name: str) -> Tensor:
            found = self.own[name].rest_at(r[name]) if name in r else constants[name][1] if name in constants else self.own[name].rest
            return found if spread is None else spread(name, found)

        constants = {name: tuple(torch.full_like(self.like, v) for v in pair) for name, pair in self.constants.items()}
        values: dict[str, Tensor] = {}
        for name, mine in self.own.items():
            value = mine.at(r[name]) if name in r else constants[name][0] if name in constants else mine.value
            values[name] = value if spread is None else spread(name, value)
        return Values(values, rest)

    def publish(self, r: Raw, ok: Tensor) -> None:
        """Write the raw values that this step used where the nodes above keep them, and the values where users read them."""
        for names, x in self.above:
            x.lerp_(joined(r, names), ok)
        for name, raw in r.items():
            mine = self.own[name]
            mine.value.lerp_(mine.at(raw), ok)
            if mine.last_value is not None and name not in self.watched:
                mine.last_value.copy_(mine.value)
        for name in self.watched:
            mine = self.own[name]
            assert mine.last_value is not None
            mine.last_value.lerp_(mine.value, ok)


def admitted(rule: Rule, name: str, domain: Domain, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest value that a hyperparameter may be given: the bounds of its domain, or the number of `dtype` next to an
    upper bound that the rule refuses, such as a decay of 1 where the bias is corrected."""
    low, high = domain.bounds()
    if high < math.inf and rule.declared()[name].domain.admits(high):
        try:
            dataclasses.replace(rule, **{name: high})
        except ValueError:
            high = float(torch.nextafter(torch.tensor(high, dtype=dtype, device="cpu"), torch.tensor(low, dtype=dtype, device="cpu")))
    return low, high


def joined(numbers: Raw, names: Sequence[str]) -> Tensor:
    """The numbers of these names side by side in one vector."""
    vectors = [numbers[name].reshape(-1) for name in names]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)  # lr alone: one copy less
