"""What a user may write for a rule and its values, made into one rule with plain numbers."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from . import rules
from .rule import Rule


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
            raise ValueError(f"there is no rule for torch.optim.{name}; there are {', '.join(rules.__all__)}")
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
