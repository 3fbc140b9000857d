"""Validation of what a user gives for a level: each function takes the plain values that it checks."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import rules
from ..domains import Domain, number
from ..rule import Rule

PER = ("group", "tensor", "coordinate")
STRATEGIES = ("tangents", "graph")
# Of torch.optim: how a step is computed, which is not for the user to choose here.
FLAGS = ("foreach", "fused", "capturable", "differentiable")


def named(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The given hyperparameters in Python's numbers, under this library's names: `betas`, which must be a pair, are `beta1` and `beta2`."""
    values = {name: plain(value, name) for name, value in hyperparameters.items()}
    if "decoupled_weight_decay" in values:
        values["decoupled"] = values.pop("decoupled_weight_decay")
    if "betas" in values:
        betas = values.pop("betas")
        if "beta1" in values or "beta2" in values:
            raise ValueError(f"betas was given beside beta1 or beta2: give either betas={betas!r}, or beta1 and beta2")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas = {betas!r} must be a pair: give betas=(0.9, 0.999), or beta1 and beta2")
        values["beta1"], values["beta2"] = (plain(beta, "betas") for beta in betas)
    return values


def as_rule(rule: Any, values: Mapping[str, Any]) -> Rule:
    """The rule that a user means by an instance, a class, or the torch.optim class of the same name, with these values.

    Raises:
        ValueError: a torch.optim class without a rule, or a name that the rule does not have.
        TypeError: not a rule, or an option that must be True or False.

    The flags of torch.optim are left out of the values.
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
    for name in values.keys() & set(FLAGS) - set(known):
        check_flag(name, values[name])
    values = {name: value for name, value in values.items() if name in known or name not in FLAGS}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{type(template).__name__} has no hyperparameter or option {name!r}: it has {', '.join(known)}")
        if isinstance(getattr(template, name), bool) and not isinstance(value, bool):
            raise TypeError(f"{type(template).__name__}({name}) must be True or False, got {value!r}")
    return dataclasses.replace(template, **{name: plain(template.value(name)) for name in template.declared()} | values)


def check_guards(trust: Any, prior: Any) -> None:
    """Raise ValueError unless these are numbers in bounds, None or "default"."""
    if trust not in (None, "default") and (type(trust) not in (int, float) or not 0 < trust < math.inf):
        raise ValueError(f"trust = {trust!r} must be a positive number, or None for no limit")
    if prior not in (None, "default") and (type(prior) not in (int, float) or not 1 <= prior < math.inf):
        raise ValueError(f"prior = {prior!r} must be a number of steps, at least 1, or None for no prior")


def check_domains(domains: Any, known: Sequence[str], rule: str) -> None:
    """Raise unless `domains` maps names of hyperparameters of a rule, which are `known`, to domains."""
    if not isinstance(domains, Mapping):
        raise TypeError(f"domains = {domains!r} must be a mapping from names to domains, as in domains={{'lr': Real()}}")
    for name, domain in domains.items():
        if name not in known:
            raise ValueError(f"domains names {name!r}, which {rule} does not have: it has {', '.join(known)}")
        if not isinstance(domain, Domain):
            raise TypeError(f"domains[{name!r}] must be a Domain such as Positive() or Real(), got {domain!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless a flag of torch.optim can be ignored: all of them but differentiable=True."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")
    if name == "differentiable" and value:
        raise ValueError("differentiable=True: a step is not part of an autograd graph here; stack() learns hyperparameters without one")


def plain(value: Any, name: str = "a value") -> Any:
    """NumPy's numbers and tensors of one element as Python's numbers, and mappings as copies that nobody else can change."""
    if isinstance(value, Mapping):
        return {key: plain(number, name) for key, number in value.items()}
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: give a number, or a tensor of one element")
        return value.item()
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
