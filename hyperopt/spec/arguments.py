"""Validation of what a user gives for a level: each function takes the plain values that it checks."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import rules
from ..domains import number
from ..rule import Rule

PER = ("group", "tensor", "coordinate")
STRATEGIES = ("tangents", "graph")


def named(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The given hyperparameters in Python's numbers, and `betas`, which must be a pair, as `beta1` and `beta2`."""
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
    """The rule that a user means by an instance, a class, or the torch.optim class of the same name, with these values.

    Raises:
        ValueError: a torch.optim class without a rule, or a name that the rule does not have.
        TypeError: not a rule, or an option that must be True or False.
    """
    if isinstance(rule, type) and issubclass(rule, torch.optim.Optimizer):
        name = rule.__name__
        if not hasattr(rules, name):
            known = ", ".join(rules.__all__)
            live = f"Hyper({name}(params, lr=…))"
            raise ValueError(f"there is no rule for {name}: there are {known}; to learn its lr, give a live one, {live}")
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
    """What `learn` names: a tuple of names, "all", or None for the default; TypeError for anything else."""
    if learn is None or (isinstance(learn, str) and learn == "all"):
        return learn
    names = tuple(learn) if isinstance(learn, Iterable) and not isinstance(learn, str) else (learn,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"learn = {learn!r} must be a name, names, or 'all', as in learn=('lr', 'beta1')")
    return names
