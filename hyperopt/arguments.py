"""What a user may write for a rule and its values, made into one rule with plain numbers."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import rules
from .domains import Domain
from .feasible import Feasible
from .rule import Rule

if TYPE_CHECKING:
    from .tower import Hyper

PER = ("group", "tensor", "coordinate")
STRATEGIES = ("tangents", "graph")


def as_rule(rule: Any, hyperparameters: Mapping[str, Any]) -> Rule:
    """The rule that `rule` means (an instance, a class, or torch.optim's class of the same name), with these values."""
    values = {name: plain(value) for name, value in hyperparameters.items()}
    if "betas" in values:
        if "beta1" in values or "beta2" in values:
            raise ValueError("betas was given beside beta1 or beta2, of which it is the pair: give either")
        if not isinstance(values["betas"], (tuple, list)) or len(values["betas"]) != 2:
            raise ValueError(f"betas = {values['betas']!r} must be a pair: give betas=(0.9, 0.999), or beta1 and beta2")
        values["beta1"], values["beta2"] = map(plain, values.pop("betas"))
    if isinstance(rule, type) and issubclass(rule, torch.optim.Optimizer):
        name = rule.__name__
        if not hasattr(rules, name):
            known = ", ".join(rules.__all__)
            raise ValueError(
                f"there is no rule for {name}: there are {known}; or give a live one, Hyper({name}(params, lr=…)), to learn its lr"
            )
        rule = getattr(rules, name)
    template = rule() if callable(rule) else rule
    if not isinstance(template, Rule):
        hint = f"; Hyper.parse({rule!r}) reads text" if isinstance(rule, str) else ""
        raise TypeError(f"a tower is built from rules such as Adam or SGD, got {rule!r}{hint}")
    known = [f.name for f in dataclasses.fields(template)]
    for name in values:
        if name not in known:
            raise ValueError(f"{type(template).__name__} has no hyperparameter or option {name!r}: it has {', '.join(known)}")
        if isinstance(getattr(template, name), bool) and not isinstance(values[name], bool):
            raise TypeError(f"{type(template).__name__}({name}) must be True or False, got {values[name]!r}")
    return dataclasses.replace(template, **values)


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's, mappings as copies that nobody else can change."""
    if isinstance(value, Mapping):
        return {name: plain(number) for name, number in value.items()}
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)) else value


def check_options(tower: "Hyper") -> None:
    """Raise unless the options of one level make sense."""
    rule = type(tower.rule).__name__
    for name, domain in tower.domains.items():
        if name not in tower.rule.declared():
            raise ValueError(f"domains names {name!r}, which {rule} does not have: it has {', '.join(tower.rule.declared())}")
        if not isinstance(domain, Domain):
            raise TypeError(f"domains[{name!r}] must be a Domain such as Positive() or Real(), got {domain!r}")
    if isinstance(tower.learn, tuple) and tower.learn:
        check_learned(tower, tower.learn)
    if isinstance(tower.horizon, bool) or not isinstance(tower.horizon, (int, float)) or not tower.horizon >= 1:
        raise ValueError(f"horizon = {tower.horizon!r} is outside [1, inf]: give a number of steps, 1 for the paper, or math.inf")
    trust = tower.trust
    fits = isinstance(trust, (int, float)) and not isinstance(trust, bool) and 0 < trust < math.inf
    if trust is not None and trust != "default" and not fits:
        raise ValueError(f"trust = {trust!r} must be a positive number, or None for no limit")
    if not isinstance(tower.maximize, bool):
        raise TypeError(f"maximize must be True or False, got {tower.maximize!r}")
    if tower.project is not None and not isinstance(tower.project, Feasible):
        raise TypeError(f"project = {tower.project!r} must be a set of weights such as Box(-1, 1) or Ball(10), or None")
    if tower.per not in PER:
        raise ValueError(f"per = {tower.per!r} is none of {', '.join(PER)}")
    if tower.strategy not in STRATEGIES:
        raise ValueError(f"strategy = {tower.strategy!r} is none of {', '.join(STRATEGIES)}")
    if tower.strategy == "graph" and tower.horizon != 1:
        raise ValueError(
            f"strategy='graph' keeps the graph of one update, got horizon = {tower.horizon!r}: give horizon=1, or strategy='tangents'"
        )


def names_of(learn: Any) -> tuple[str, ...] | str | None:
    """What `learn` names."""
    if learn is None or learn == "all":
        return learn
    names = (learn,) if isinstance(learn, str) else tuple(learn) if isinstance(learn, Iterable) else (learn,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"learn = {learn!r} must be a name, names, or 'all', as in learn=('lr', 'beta1')")
    return names


def domains_of(domains: Any) -> dict[str, Domain]:
    """A copy of `domains` that nobody else can change."""
    if not isinstance(domains, Mapping | None):
        raise TypeError(f"domains = {domains!r} must be a mapping from names to domains, as in domains={{'lr': Real()}}")
    return dict(domains or {})


def check_learned(tower: "Hyper", names: tuple[str, ...]) -> None:
    """Raise unless every one of `names` can be learned from the value that it has."""
    declared = tower.rule.declared()
    rule = type(tower.rule).__name__
    if not names:
        raise ValueError(f"nothing can be stacked on {rule}: learn={tower.learn!r} leaves no hyperparameter to learn")
    for name in names:
        if name not in declared:
            raise ValueError(f"{rule} has no hyperparameter {name!r} to learn: it has {', '.join(declared)}")
        for value in numbers_in(tower.rule.value(name)):
            domain = tower.domain(name)
            if not domain.inside(value):
                low, high = domain.bounds()
                end = low if value <= low else high
                raise ValueError(
                    f"{name} = {value!r} of {rule} cannot be learned: it lies on or beyond the bound {end:g} of {domain!r}; "
                    f"start strictly inside, leave {name!r} out of learn, or give domains={{{name!r}: Real()}}"
                )
    if len(set(names)) < len(names):
        raise ValueError(f"learn={names} of {rule} names a hyperparameter twice")


def numbers_in(value: float | Mapping[str, float]) -> list[float]:
    """The numbers of a value that may be one for each hyperparameter below."""
    return list(value.values()) if isinstance(value, Mapping) else [value]
