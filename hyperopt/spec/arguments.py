"""Validation of what a user gives for a level: each function takes the plain values that it checks."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import rules
from ..domains import Domain, number
from ..feasible import Feasible
from ..rule import Rule

PER = ("group", "tensor", "coordinate")
STRATEGIES = ("tangents", "graph")


def named(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The given hyperparameters by their own names, `betas` as `beta1` and `beta2`, in Python's numbers.

    Raises:
        ValueError: `betas` is not a pair, or is given beside beta1 or beta2.
    """
    values = {name: plain(value) for name, value in hyperparameters.items()}
    if "betas" in values:
        betas = values.pop("betas")
        if "beta1" in values or "beta2" in values:
            raise ValueError(f"betas was given beside beta1 or beta2: give either betas={betas!r}, or beta1 and beta2")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas = {betas!r} must be a pair: give betas=(0.9, 0.999), or beta1 and beta2")
        values["beta1"], values["beta2"] = map(plain, betas)
    return values


def as_rule(rule: Any, values: Mapping[str, Any]) -> Rule:
    """The rule that a user means, with these values.

    Args:
        rule: an instance, a class, or the torch.optim class of the same name.
        values: hyperparameters and options, by name.

    Raises:
        ValueError: a torch.optim class without a rule, or a name that the rule does not have.
        TypeError: not a rule, or an option that must be True or False.
    """
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
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{type(template).__name__} has no hyperparameter or option {name!r}: it has {', '.join(known)}")
        if isinstance(getattr(template, name), bool) and not isinstance(value, bool):
            raise TypeError(f"{type(template).__name__}({name}) must be True or False, got {value!r}")
    return dataclasses.replace(template, **{name: plain(template.value(name)) for name in template.declared()} | dict(values))


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, and mappings as copies that nobody else can change."""
    if isinstance(value, Mapping):
        return {name: plain(number) for name, number in value.items()}
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    as_float = number("a value", value)
    return int(value) if isinstance(value, numbers.Integral) and math.isfinite(as_float) else as_float


def names_of(learn: Any) -> tuple[str, ...] | str | None:
    """What `learn` names: a tuple of names, "all", or None for the default.

    Raises:
        TypeError: anything other than names.
    """
    if learn is None or (isinstance(learn, str) and learn == "all"):
        return learn
    names = (learn,) if isinstance(learn, str) else tuple(learn) if isinstance(learn, Iterable) else (learn,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"learn = {learn!r} must be a name, names, or 'all', as in learn=('lr', 'beta1')")
    return names


def domains_of(domains: Any) -> dict[str, Domain]:
    """A copy of `domains` that nobody else can change.

    Raises:
        TypeError: not a mapping.
    """
    if not isinstance(domains, Mapping | None):
        raise TypeError(f"domains = {domains!r} must be a mapping from names to domains, as in domains={{'lr': Real()}}")
    return dict(domains or {})


def check_options(
    rule: Rule, *, horizon: Any, trust: Any, domains: Mapping[str, Any], per: Any, strategy: Any, project: Any, maximize: Any
) -> None:
    """Check the options of one level, which `Hyper` explains.

    Raises:
        ValueError: an option out of bounds, or one that contradicts another.
        TypeError: an option of the wrong type.
    """
    for name, domain in domains.items():
        if name not in rule.declared():
            known = ", ".join(rule.declared())
            raise ValueError(f"domains names {name!r}, which {type(rule).__name__} does not have: it has {known}")
        if not isinstance(domain, Domain):
            raise TypeError(f"domains[{name!r}] must be a Domain such as Positive() or Real(), got {domain!r}")
    if isinstance(horizon, bool) or not isinstance(horizon, (int, float)) or not horizon >= 1:
        raise ValueError(f"horizon = {horizon!r} is outside [1, inf]: give a number of steps, 1 for the paper's method, or math.inf")
    is_number = isinstance(trust, (int, float)) and not isinstance(trust, bool)
    if trust is not None and trust != "default" and not (is_number and 0 < trust < math.inf):
        raise ValueError(f"trust = {trust!r} must be a positive number, or None for no limit")
    if not isinstance(maximize, bool):
        raise TypeError(f"maximize must be True or False, got {maximize!r}")
    check_project(project)
    if per not in PER:
        raise ValueError(f"per = {per!r} is none of {', '.join(PER)}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy = {strategy!r} is none of {', '.join(STRATEGIES)}")
    if strategy == "graph" and horizon != 1:
        raise ValueError(
            f"strategy='graph' keeps the graph of one update only, got horizon = {horizon!r}: give horizon=1, or strategy='tangents'"
        )


def check_project(project: Any) -> None:
    """Raise TypeError unless `project` is a feasible set or None."""
    if project is not None and not isinstance(project, Feasible):
        raise TypeError(f"project = {project!r} must be a set of weights such as Box(-1, 1) or Ball(10), or None")
