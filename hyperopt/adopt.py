"""Taking over a live `torch.optim.Optimizer`: its rule, its groups, its values and its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .rule import Rule
from .rules import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop


@dataclass(frozen=True)
class Counterpart:
    """How a torch optimizer is written as a rule of this library."""

    rule: Any
    state: Mapping[str, str]  # torch's name -> the rule's
    options: Mapping[str, str] = field(default_factory=dict)  # torch's name -> the rule's
    apart: Mapping[str, str] = field(default_factory=dict)  # torch's state -> the hyperparameter in it that the rule keeps apart


# Entries of a group with only one value that can be taken over: a step here is never part of an autograd graph.
ONLY = {"differentiable": False}
MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}
ADAM = {**MOMENTS, "max_exp_avg_sq": "v_max"}
DECOUPLED = {"decoupled_weight_decay": "decoupled"}
COUNTERPARTS: dict[type[Optimizer], Counterpart] = {
    torch.optim.SGD: Counterpart(SGD, {"momentum_buffer": "b"}, {"nesterov": "nesterov"}),
    torch.optim.Adagrad: Counterpart(Adagrad, {"sum": "v"}, apart={"sum": "initial_accumulator_value"}),
    torch.optim.RMSprop: Counterpart(RMSprop, {"square_avg": "v", "grad_avg": "m", "momentum_buffer": "b"}, {"centered": "centered"}),
    torch.optim.Adadelta: Counterpart(Adadelta, {"square_avg": "v", "acc_delta": "s"}),
    torch.optim.Adam: Counterpart(Adam, ADAM, {"amsgrad": "amsgrad", **DECOUPLED}),
    torch.optim.AdamW: Counterpart(AdamW, ADAM, {"amsgrad": "amsgrad"}),
    torch.optim.NAdam: Counterpart(NAdam, {**MOMENTS, "mu_product": "p"}, DECOUPLED),
    torch.optim.RAdam: Counterpart(RAdam, MOMENTS, DECOUPLED),
    torch.optim.Adamax: Counterpart(Adamax, {"exp_avg": "m", "exp_inf": "u"}),
}


def rule_of(optimizer: Optimizer) -> Rule:
    """The rule of this library that does what `optimizer` does, with the values of its first group.

    Raises:
        ValueError: no rule does.
    """
    counterpart = _counterpart(optimizer)
    first = optimizer.param_groups[0]
    for group in optimizer.param_groups:
        for name, value in ONLY.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"{type(optimizer).__name__}({name}={group[name]!r}) has no rule here: only {name}={value!r} can be taken over"
                )
        for name in (*counterpart.options, "maximize"):
            if group.get(name) != first.get(name):
                raise ValueError(f"the groups differ in {name}, which is one option for the whole tower here: give each its own optimizer")
    options = {ours: first[theirs] for theirs, ours in counterpart.options.items() if theirs in first}
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
    counterpart = _counterpart(optimizer)
    out: dict[Tensor, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            kept = {}
            for theirs, ours in counterpart.state.items():
                if state.get(theirs) is None:
                    continue
                value = state[theirs].detach().to(p.device, dtype, copy=True)
                if theirs in counterpart.apart:
                    value -= group[counterpart.apart[theirs]]
                # One number for a whole tensor, as NAdam's product, has a value per coordinate here.
                kept[ours] = value if value.shape == p.shape else value.expand_as(p).clone()
            if state:
                # torch.optim.SGD does not count its steps; its rule asks only whether there was one.
                steps = float(state.get("step", 1.0 if kept else 0.0))
                out[p] = {"t": torch.as_tensor(steps, dtype=dtype, device=p.device), **kept}
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
