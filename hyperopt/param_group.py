"""What a parameter group may hold: when it is added, and before each step."""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from . import rules
from .roles import ENTRIES
from .rule import Rule, check
from .spec.arguments import FLAGS, check_flag, named
from .spec.level import Level
from .variant import Variant

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What an entry of a group cannot be called unless it has its effect.
LEVEL = ("learn", "horizon", "trust", "prior", "domains", "per", "strategy", "maximize", "tower", "learning_rate", "decoupled_weight_decay")


def check_arguments(params: Any, compile: Any, hyper_every: Any, schedule: Any) -> None:
    """Raise for what `bind` cannot take."""
    is_module, missing = isinstance(params, torch.nn.Module), params is None  # missing where a live optimizer has them
    if isinstance(params, (str, Mapping)) or not (is_module or missing or (isinstance(params, Iterable) and not callable(params))):
        groups = ", or a list of groups, [{'params': parameters}]" if isinstance(params, Mapping) else ""
        raise TypeError(f"params must be a module or parameters, got {type(params).__name__}: pass model.parameters(){groups}")
    if isinstance(hyper_every, bool) or not isinstance(hyper_every, int) or hyper_every < 1:
        raise ValueError(f"hyper_every = {hyper_every!r} must be a whole number of steps, at least 1")
    for name, value in (("compile", compile), ("schedule", schedule)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def defaults(rule: Rule) -> dict[str, Any]:
    """What torch's schedulers look at: the hyperparameters, and a momentum, in place of which they are given beta1 where there is none."""
    values: dict[str, Any] = {name: rule.value(name) for name in rule.declared()}
    return ({"momentum": values["beta1"]} if "beta1" in values else {}) | values


def prepared(param_group: Any, tower: Level) -> dict[str, Any]:
    """A copy of a group that a user gave, as torch.optim takes it; raises for what cannot be what the user meant."""
    if not isinstance(param_group, dict):
        raise TypeError(f"a parameter group is a dictionary, {{'params': parameters}}, got {type(param_group).__name__}")
    if "params" not in param_group:
        raise ValueError(f"a parameter group needs an entry 'params', got only {', '.join(map(repr, param_group))}")
    known = tower.rule.declared()
    group = {name: value for name, value in param_group.items() if name not in known and name != "betas"}
    roles = () if tower.rule.elementwise else ENTRIES if tower.rule.parts else ("blocks",)
    for name in group.keys() - {"params", "project", *roles}:
        _check_other(name, group[name], tower)
    if not isinstance(group["params"], Iterable):
        raise TypeError(f"a parameter group's params must be parameters, got {type(group['params']).__name__}: give a list of tensors")
    values = named({name: value for name, value in param_group.items() if name not in group})
    group |= values
    for name, value in values.items():
        check(f"a parameter group's {name}", value, tower.domain(name))
    tower.replace(**values)
    if group.get("project") is not None:
        tower.inside(group["project"])
        group["project"] = str(group["project"])  # plain, so that a checkpoint is read with weights_only=True
    if not isinstance(group["params"], (Tensor, Set)):  # torch makes a list of one tensor, and refuses a set, which has no order
        group["params"] = list(group["params"])
        if len({id(p[1] if isinstance(p, tuple) else p) for p in group["params"]}) < len(group["params"]):
            raise ValueError("a parameter group holds the same parameter twice: give each tensor once, as model.parameters() does")
    return group


def with_names(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The group with names for its parameters, if it has none and the groups before it do: torch wants them for all or for none, and a user
    who gave a module has not given any."""
    tensors = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    bare = isinstance(tensors, list) and all(isinstance(p, Tensor) for p in tensors)
    if not (bare and groups and "param_names" in groups[0]):
        return group
    return group | {"params": [(f"group {len(groups)}, tensor {i}", p) for i, p in enumerate(tensors)]}


def _check_other(name: str, value: Any, tower: Level) -> None:
    """Raise unless an entry that is not a hyperparameter of the tower can be kept, as torch keeps it: for the user's own use."""
    known = tower.rule.declared()
    if name in FLAGS:
        check_flag(name, value)
        return
    option = {"decoupled_weight_decay": "decoupled"}.get(name, name)
    mine = tower.maximize if name == "maximize" else getattr(tower.rule, option, None)
    if name in LEVEL + ENTRIES or option in _words():
        same = isinstance(value, (bool, int, float, str)) and value == (mine or 0)  # as in the groups of torch's own optimizers
        if not same and value is not None:
            remedy = f"the whole tower has {mine}" if mine is not None else f"{type(tower.rule).__name__} has {', '.join(known)}"
            raise ValueError(f"a parameter group has an unknown entry {name!r}: {remedy}")
    elif close := difflib.get_close_matches(name.lower(), known, 1, 0.85):
        raise ValueError(f"a parameter group has an unknown entry {name!r}: write {close[0]!r}, or give it another name")


@functools.cache
def _words() -> set[str]:
    """The names of all hyperparameters and options of all rules."""
    made = [rule() for name in rules.__all__ if isinstance(rule := getattr(rules, name), (type, Variant)) and rule is not Rule]
    return {f.name for rule in made for f in dataclasses.fields(rule)}


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raise unless there are parameters, and all of them can be trained."""
    if not params:
        raise ValueError("a parameter group has an empty parameter list: give at least one tensor")
    for p in params:
        if p.is_meta:
            raise ValueError(
                "a parameter is on the meta device, where it has no values: move the model with to_empty(device=…) and fill it first"
            )
        if p.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"a parameter of dtype {p.dtype} cannot be trained here: give real floating-point tensors, {names}")


def check_scheduler(spec: Level, schedule: bool) -> None:
    """Raise for a scheduler that would assign one number to an lr that has several."""
    if spec.per != "group" and "lr" in spec.learning and not schedule:
        remedy = "bind(…, schedule=True) scales them all"
        raise ValueError(f"a scheduler sets one lr for a group, and per={spec.per!r} learns several: {remedy}")


def sizes(spec: Level, params: Sequence[Tensor]) -> dict[str, int | None]:
    """How many values each hyperparameter of level 0 has, None for one; raises where it would have none."""
    several = None if spec.per == "group" else len(params) if spec.per == "tensor" else sum(p.numel() for p in params)
    if several == 0 and spec.learning:
        raise ValueError("per = 'coordinate' learns a value for each element, and the parameters of a group have none: give per = 'tensor'")
    return {name: several if name in spec.learning else None for name in spec.rule.declared()}


def check_step(
    group: Mapping[str, Any], spec: Level, sizes: Mapping[str, int | None], project: Any, said: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Raise if a step cannot be taken, before anything is changed.

    Args:
        group: the parameter group.
        spec: its tower.
        sizes: how many values each entry has; None for one.
        project: the set that it was bound with.
        said: the entries that say which tensor is what, as they were then.
        dtype: of its hyperparameters.
    """
    for p in group["params"]:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which has no hypergradient here: "
                "make it dense (nn.Embedding(sparse=False)) or give that parameter to another optimizer"
            )
    if "betas" in group:
        raise ValueError("param_groups[…]['betas'] is read nowhere: assign 'beta1' and 'beta2'")
    if group["project"] != project:
        raise ValueError(f"param_groups[…]['project'] was changed from {project} to {group['project']}: give it when binding")
    for entry, mine in said.items():
        if group.get(entry) is not mine:
            raise ValueError(f"param_groups[…][{entry!r}] was changed: say which tensor is what when binding")
    for name, size in sizes.items():
        value = group[name]
        if not isinstance(value, Tensor):
            _check_number(name, value, spec, dtype)
        elif value.dim() and value.shape != (size,):
            wanted = "one number" if size is None else f"one number, or a tensor of shape ({size},)"
            raise ValueError(f"param_groups[…][{name!r}] was given a tensor of shape {tuple(value.shape)}: give {wanted}")


def _check_number(name: str, value: Any, spec: Level, dtype: torch.dtype) -> None:
    domain = spec.domain(name)
    check(f"param_groups[…][{name!r}]", value, domain)
    if value and spec.rule.declared()[name].domain.admits(value):
        # What the rule itself refuses, such as a beta of 1; 0 only switches a part of the update off.
        dataclasses.replace(spec.rule, **{name: value})
    rounded = float(torch.tensor(value, dtype=dtype))
    if domain.inside(value) and not domain.inside(rounded):
        raise ValueError(f"{name} = {value!r} is {rounded:g} in {dtype}, on the bound of {domain!r}: give a value farther inside")
