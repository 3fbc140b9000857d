"""`Level`: one level of a tower and the levels above it, as plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from typing_extensions import Self

from .. import horizons
from ..domains import Domain
from ..feasible import Feasible
from ..guards import Prior
from ..rule import Rule
from ..tangents import read_by_direction
from .arguments import PER, STRATEGIES, as_rule, check_domains, check_guards, named

# Largest change of a raw hyperparameter per step above level 0. Of the lr of the weights; what is learned above them moves at a pace of its
# own, see `guards.Pace`.
TRUST_ABOVE = 0.5
HIGHEST, DEEPEST = 1000, 150  # height of a tower, and branches on branches, whose text Python's parser still reads
MOST = 10_000  # levels that are printed or bound, where branches that share levels are written out
BOUND = 200  # height of a tower that is bound: a step recurses through three functions a level, and Python allows 1,000


class Level:
    """One level of a tower together with all levels above it; immutable. The optimizer reads levels; users build them with `Hyper`."""

    rule: Rule  # with its values
    given: frozenset[str]  # the hyperparameters whose values the user gave; the others have other defaults above level 0
    learn: tuple[str, ...] | str | None  # what the level above learns: names, "all", or None for lr alone
    horizon: float | str | dict[str, float]  # of all that is learned, of each of some, or "default"; see `horizon_of`
    trust: float | str | None  # the largest change per step, None for no limit, or "default"
    prior: float | str | None  # by 1/prior of the distance values return to usual ones in a step; None: never; or "default"
    domains: dict[str, Domain]  # the spaces in which hyperparameters are learned, where they are not the rule's own
    per: str  # one of PER: what has a learned value of its own
    strategy: str  # one of STRATEGIES
    project: Feasible | None  # the feasible set of the weights
    maximize: bool  # whether level 0 ascends
    source: Optimizer | None  # the live optimizer that level 0 was made from
    above: dict[tuple[str, ...], Self]  # the levels above, each by the names of the hyperparameters that it learns
    height: int  # the number of levels above this one
    depth: int  # how many of them branch, on the way to any top
    count: int  # the number of levels in all, each as often as it stands in the text

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the hyperparameters of this level that are learned once a level is stacked on it."""
        if self.learn is None:
            return ("lr",)
        if self.learn == "all":
            return tuple(name for name in self.rule.declared() if all(map(self.domain(name).inside, self.numbers(name))))
        return tuple(self.learn)

    @property
    def learning(self) -> tuple[str, ...]:
        """Names of the hyperparameters of this level that are being learned: none at the top."""
        return self.learned if self.above else ()

    def domain(self, name: str) -> Domain:
        """The space in which a hyperparameter of this level is learned."""
        return self.domains[name] if name in self.domains else self.rule.declared()[name].domain

    def horizon_of(self, name: str) -> float:
        """The number of past steps that a hyperparameter of this level is held responsible for."""
        given = self.horizon.get(name, "default") if isinstance(self.horizon, Mapping) else self.horizon
        declared = self.rule.declared()[name].horizon
        return given if not isinstance(given, str) else self.rule.horizon if declared is None else declared

    def numbers(self, name: str) -> list[float]:
        """The value of a hyperparameter, or its values where there is one for each hyperparameter below."""
        value = self.rule.value(name)
        return list(value.values()) if isinstance(value, Mapping) else [value]

    def mappings(self) -> list[Mapping[str, float]]:
        """The values of this level that were given separately for each hyperparameter below."""
        return [value for value in map(self.rule.value, self.rule.declared()) if isinstance(value, Mapping)]

    def is_tree(self) -> bool:
        """Whether learned hyperparameters of this level have separate optimizers."""
        return len(self.above) > 1 or any(names != self.learned for names in self.above)

    def nodes(self) -> list[Self]:
        """Every level above this one, then this one: each once, though branches may share it, and none before those above it."""
        found, left = {id(self): self}, [self]  # in a loop, as a chain may be higher than Python can recurse into
        while left:
            new = {id(node): node for node in left.pop().above.values() if id(node) not in found}
            found |= new
            left += new.values()
        return sorted(found.values(), key=lambda node: node.height)

    def check_count(self) -> None:
        """Raise ValueError if there are too many levels to print or bind."""
        if self.count > MOST:
            raise ValueError(
                f"a tower of {self.count:,} levels is too large to be printed or bound, there may be {MOST:,}: "
                "every level that is stacked on branches is added to each of them, stack it on one"
            )

    def check_bound(self) -> None:
        """Raise ValueError if there are too many levels to bind."""
        self.check_count()
        if self.height > BOUND:
            raise ValueError(f"a tower of height {self.height} is too high to be bound: stack at most {BOUND} levels")

    def trust_at(self, level: int) -> float | None:
        """The trust of this node when it stands at `level`."""
        if isinstance(self.trust, str):
            return TRUST_ABOVE if level else self.rule.trust
        return self.trust

    def prior_steps(self) -> float | None:
        """In every step what is learned of this level returns to its usual values by one over this; None: never."""
        return self.prior if not isinstance(self.prior, str) else None if self.trust is None else Prior.STEPS

    def rule_at(self, level: int) -> Rule:
        """The rule of this node when it stands at `level`: above level 0 a rule moves raw values and has other defaults."""
        if level == 0:
            return self.rule
        above = {n: d.above for n, d in self.rule.declared().items() if n not in self.given and self.rule.value(n) == d.default}
        return dataclasses.replace(self.rule, **above)

    def structure(self) -> str:
        """The tower's text without values: what a checkpoint and the tower that loads it must have in common."""
        self.check_count()
        parts, level, closing = [self._structure()], self, ""
        while len(level.above) == 1:  # in a loop, as in `nodes`
            ((names, level),) = level.above.items()
            parts.append(f" / {{{', '.join(names)}: {level._structure()}")
            closing += "}"
        parts += [f" / {{{', '.join(names)}: {node.structure()}}}" for names, node in level.above.items()]
        return "".join(parts) + closing

    def _structure(self) -> str:
        options = [f"{f.name}={getattr(self.rule, f.name)}" for f in dataclasses.fields(self.rule) if f.name not in self.rule.declared()]
        learned = [f"{name} in {self.domain(name)}" for name in self.learning]
        top = self.horizon if isinstance(self.horizon, (int, float)) else self.rule.horizon
        horizon = horizons.text({name: self.horizon_of(name) for name in self.learning} or {"": top})
        words = [*options, f"per {self.per}", f"horizon {horizon}", f"learned: {', '.join(learned) or 'nothing'}"]
        return f"{type(self.rule).__name__}({'; '.join(words)})"

    def replace(self, **hyperparameters: Any) -> Self:
        """The same tower with other values at level 0, which must be such as `Hyper` takes.

        >>> from hyperopt import Adam, Hyper
        >>> Hyper(Adam).stack(Adam).replace(lr=0.1)
        Hyper('Adam(lr=0.1) / Adam')
        """
        values = named(hyperparameters)
        new = self._but(rule=as_rule(self.rule, values), given=self.given.union(values))
        if new.above:
            new.check_learned(new.learned)
        return new

    def held(self, **hyperparameters: Any) -> Self:
        """Level 0 alone with these values and nothing learned: the start of a plain run with values learned before.

        >>> from hyperopt import Adam, Hyper
        >>> Hyper(Adam).stack(Adam).held(lr=0.1)
        Hyper('Adam(lr=0.1)')
        """
        return self.replace(**hyperparameters)._but(learn=None, source=None).under({})

    def under(self, above: Mapping[Any, Any]) -> Self:
        """The same level with these above it; ValueError if the tower would be too high to be read from its text."""
        new = self._but(above=dict(above))
        uppers = above.values()
        vars(new)["height"] = max((1 + node.height for node in uppers), default=0)
        vars(new)["depth"] = max((node.depth for node in uppers), default=0) + new.is_tree()
        vars(new)["count"] = 1 + sum(node.count for node in uppers)
        if new.height > HIGHEST:
            raise ValueError(f"a tower of {new.height} levels is too high: stack at most {HIGHEST}")
        if new.depth > DEEPEST:
            raise ValueError(f"a tower with branches on branches, {new.depth} deep, is too deep: branch at most {DEEPEST} times")
        return new

    def released(self) -> Self:
        """The same tower without a reference to the live optimizer that it was made from."""
        return self._but(source=None)

    def inside(self, project: Feasible) -> Self:
        """The same tower with the weights constrained to a set; TypeError unless it is one."""
        new = self._but(project=project)
        new.check()
        return new

    def check(self) -> None:
        """Raise ValueError or TypeError unless the options, which `Hyper` explains, are in bounds and fit together."""
        declared = self.rule.declared()
        check_domains(self.domains, tuple(declared), type(self.rule).__name__)
        horizons.check_given(self.horizon, tuple(declared), type(self.rule).__name__)
        check_guards(self.trust, self.prior)
        if not isinstance(self.maximize, bool):
            raise TypeError(f"maximize must be True or False, got {self.maximize!r}")
        if not isinstance(self.project, Feasible | None):
            raise TypeError(f"project = {self.project!r} must be a set of weights such as Box(-1, 1) or Ball(10), or None")
        for name, value, known in (("per", self.per, PER), ("strategy", self.strategy, STRATEGIES)):
            if value not in known:
                raise ValueError(f"{name} = {value!r} is none of {', '.join(known)}")
        if self.strategy == "graph":
            horizons.check_graph({name: self.horizon_of(name) for name in self.learned if name in declared})

    def check_learned(self, names: tuple[str, ...]) -> None:
        """Raise ValueError unless each of `names` can be learned, starting from its value."""
        declared, rule = self.rule.declared(), type(self.rule).__name__
        if not names:
            raise ValueError(f"nothing can be stacked on {rule}: learn={self.learn!r} leaves no hyperparameter to learn")
        for name in names:
            if name not in declared:
                raise ValueError(f"{rule} has no hyperparameter {name!r} to learn: it has {', '.join(declared)}")
            domain = self.domain(name)
            for value in self.numbers(name):
                if not domain.inside(value):
                    low, high = domain.bounds()
                    raise ValueError(
                        f"{name} = {value!r} of {rule} cannot be learned: it is on or beyond the bound {low if value <= low else high:g} "
                        f"of {domain!r}; start strictly inside, leave {name!r} out of learn, or give domains={{{name!r}: Real()}}"
                    )
        coupled = [] if self.per != "coordinate" or self.rule.elementwise else sorted(read_by_direction(self.rule).intersection(names))
        if coupled:
            raise ValueError(f"per='coordinate' cannot learn {', '.join(coupled)} of {rule}, which couples coordinates: give per='tensor'")
        if len(set(names)) < len(names):
            raise ValueError(f"learn={names} of {rule} names a hyperparameter twice: name each once")

        horizons.check_learned(self.horizon, names, rule)
        if self.strategy == "graph":
            horizons.check_graph({name: self.horizon_of(name) for name in names})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a tower is immutable, its {name} cannot be set: Hyper(…).replace({name}=…), or a new Hyper, makes another")

    def _but(self, **changes: Any) -> Self:
        new = object.__new__(type(self))
        vars(new).update(vars(self) | changes)  # past __setattr__
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        # A list of levels, for a chain may be higher than copy and pickle can recurse into.
        nodes = self.nodes()
        place = {id(node): i for i, node in enumerate(nodes)}
        uppers = [{names: place[id(upper)] for names, upper in node.above.items()} for node in nodes]
        return _copied, ([(type(node), vars(node) | {"above": above}) for node, above in zip(nodes, uppers, strict=True)],)


def _copied(records: list[tuple[type, dict[str, Any]]]) -> Any:
    nodes: list[Any] = []
    for kind, values in records:
        nodes.append(object.__new__(kind))
        vars(nodes[-1]).update(values, above={names: nodes[i] for names, i in values["above"].items()})
    return nodes[-1]
