"""Taking over a live `torch.optim.Optimizer`: its rule, its groups, its values and its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .rule import Rule
from .rules import SGD, Adam, AdamW


@dataclass(frozen=True)
class Counterpart:
    """How a torch optimizer is written as a rule of this library."""

    rule: Any
    state: Mapping[str, str]  # torch's name -> the rule's
    options: tuple[str, ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)  # entries of a group that the rule knows at this value alone


MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}
COUNTERPARTS: dict[type[Optimizer], Counterpart] = {
    torch.optim.SGD: Counterpart(SGD, {"momentum_buffer": "b"}, options=("nesterov",), only={"dampening": 0}),
    torch.optim.Adam: Counterpart(Adam, MOMENTS, only={"amsgrad": False}),
    torch.optim.AdamW: Counterpart(AdamW, MOMENTS, only={"amsgrad": False}),
}


def rule_of(optimizer: Optimizer) -> Rule:
    """The rule of this library that does what `optimizer` does, with the values of its first group.

    Raises:
        ValueError: no rule does.
    """
    counterpart = _counterpart(optimizer)
    first = optimizer.param_groups[0]
    for group in optimizer.param_groups:
        for name, value in counterpart.only.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"{type(optimizer).__name__}({name}={group[name]!r}) has no rule here: only {name}={value!r} can be taken over"
                )
        for name in (*counterpart.options, "maximize"):
            if group.get(name) != first.get(name):
                raise ValueError(f"the groups differ in {name}, which is one option for the whole tower here: give each its own optimizer")
    options = {name: first[name] for name in counterpart.options}
    return counterpart.rule(**_values(counterpart.rule(), first), **options)


def groups_of(optimizer: Optimizer, rule: Rule) -> list[dict[str, Any]]:
    """The parameter groups of `optimizer`, with the hyperparameters of `rule`."""
    groups = []
    for group in optimizer.param_groups:
        params = group["params"]
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        groups.append({"params": params, **_values(rule, group)})
    return groups


def state_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """A copy of the state of `optimizer`, by parameter and under the rule's names."""
    names = _counterpart(optimizer).state
    out: dict[Tensor, dict[str, Tensor]] = {}
    for p, state in optimizer.state.items():
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        kept = {names[key]: value.detach().to(dtype, copy=True) for key, value in state.items() if key in names and value is not None}
        if state:
            # torch.optim.SGD does not count its steps, and its rule does not ask for the count.
            out[p] = {"t": torch.as_tensor(float(state.get("step", 1.0)), dtype=dtype, device=p.device), **kept}
    return out


def _counterpart(optimizer: Optimizer) -> Counterpart:
    if type(optimizer) not in COUNTERPARTS:
        known = ", ".join(cls.__name__ for cls in COUNTERPARTS)
        raise ValueError(
            f"there is no rule for {type(optimizer).__module__}.{type(optimizer).__name__}: there are rules for torch's {known}"
        )
    return COUNTERPARTS[type(optimizer)]


def _values(rule: Rule, group: Mapping[str, Any]) -> dict[str, float]:
    given = dict(group)
    if "betas" in given:
        given["beta1"], given["beta2"] = given["betas"]
    return {name: float(given[name]) for name in rule.declared() if name in given}
