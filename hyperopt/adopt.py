"""Taking over a live `torch.optim.Optimizer`: its rule, groups, values and state; or driving it, if it has no rule in this library."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .body.shards import local, placed
from .rule import Rule
from .rules import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from .rules.black_box import BlackBox


@dataclass(frozen=True)
class Counterpart:
    """How a torch optimizer maps to a rule of this library."""

    rule: Any
    state: Mapping[str, str]  # torch's name -> the rule's
    options: Mapping[str, str] = field(default_factory=dict)  # torch's name -> the rule's
    included: Mapping[str, str] = field(default_factory=dict)  # torch's state -> a hyperparameter that it includes and the rule's does not


MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}
ADAM = {**MOMENTS, "max_exp_avg_sq": "v_max"}
DECOUPLED = {"decoupled_weight_decay": "decoupled"}
COUNTERPARTS: dict[type[Optimizer], Counterpart] = {
    torch.optim.SGD: Counterpart(SGD, {"momentum_buffer": "b"}, {"nesterov": "nesterov"}),
    torch.optim.Adagrad: Counterpart(Adagrad, {"sum": "v"}, included={"sum": "initial_accumulator_value"}),
    torch.optim.RMSprop: Counterpart(RMSprop, {"square_avg": "v", "grad_avg": "m", "momentum_buffer": "b"}, {"centered": "centered"}),
    torch.optim.Adadelta: Counterpart(Adadelta, {"square_avg": "v", "acc_delta": "s"}),
    torch.optim.Adam: Counterpart(Adam, ADAM, {"amsgrad": "amsgrad", **DECOUPLED}),
    torch.optim.AdamW: Counterpart(AdamW, ADAM, {"amsgrad": "amsgrad"}),
    torch.optim.NAdam: Counterpart(NAdam, {**MOMENTS, "mu_product": "p"}, DECOUPLED),
    torch.optim.RAdam: Counterpart(RAdam, MOMENTS, DECOUPLED),
    torch.optim.Adamax: Counterpart(Adamax, {"exp_avg": "m", "exp_inf": "u"}),
}


def rule_of(optimizer: Optimizer) -> Rule:
    """The rule of this library that is equivalent to `optimizer`, with the values of its first group; a black box if there is none."""
    first, name = optimizer.param_groups[0], type(optimizer).__name__
    if type(optimizer) not in COUNTERPARTS:
        return _black_box(optimizer)
    counterpart = COUNTERPARTS[type(optimizer)]
    for group in optimizer.param_groups:
        if group.get("differentiable"):  # a step of this library is never part of an autograd graph
            raise ValueError(f"{name}(differentiable=True) has no rule here: only differentiable=False can be taken over")
        for option in (*counterpart.options, "maximize"):
            if group.get(option) != first.get(option):
                raise ValueError(f"the groups differ in {option}, which is one option of the whole tower: give each its own optimizer")
    options = {ours: first[theirs] for theirs, ours in counterpart.options.items() if theirs in first}
    return counterpart.rule(**_values(counterpart.rule(), first), **options)


def groups_of(optimizer: Optimizer, rule: Rule) -> list[dict[str, Any]]:
    """The parameter groups of `optimizer`, with their values for the hyperparameters of `rule`."""
    groups = []
    for group in optimizer.param_groups:
        params = list(zip(group["param_names"], group["params"], strict=True)) if "param_names" in group else group["params"]
        groups.append({"params": params, **_values(rule, group), **_others(optimizer, group)})
    return groups


def state_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """A copy of the state of `optimizer`, by parameter, under the names that its rule uses."""
    counterpart, out = COUNTERPARTS.get(type(optimizer)), {}
    if counterpart is None:
        return {}
    owners = {p: group for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)}
    for p, owner in owners.items():
        state, found = optimizer.state[p], {}
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        for theirs, ours in counterpart.state.items():
            if state.get(theirs) is not None:
                value = placed(state[theirs].detach(), p).to(p.device, dtype) - owner.get(counterpart.included.get(theirs, ""), 0)
                # State that torch has once per tensor, such as NAdam's product, is per coordinate in this library.
                found[ours] = value.expand_as(local(p)).clone()
        # torch.optim.SGD does not count its steps, and its rule only asks whether there was one.
        steps = float(state.get("step", 1.0 if found else 0.0))
        out[p] = {"t": torch.as_tensor(steps, dtype=dtype, device=p.device), **found}
    return out


def _black_box(optimizer: Optimizer) -> BlackBox:
    name = type(optimizer).__name__
    if hasattr(optimizer, "hyperparameters"):
        raise ValueError(f"{name} is a bound tower already: stack levels on the tower before bind(), Hyper(Adam).stack(Adam).stack(SGD)")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{name}.step needs a closure to evaluate the model and cannot be driven: give an optimizer that needs none")
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if not isinstance(lr, (float, int, Tensor)) or not float(lr) > 0:
            raise ValueError(f"{name} has a group with lr = {lr!r}: only an lr above 0 can be learned, set one in its param_groups")
        if bool(group.get("maximize")) != bool(optimizer.param_groups[0].get("maximize")):
            raise ValueError("the groups differ in maximize, which is one option of the whole tower: give each its own optimizer")
    return BlackBox(lr=float(optimizer.param_groups[0]["lr"]), optimizer=name)


# With a smaller lr the displacement of float32 weights near 0.1 loses digits; with 1e-8 it loses all of them.
RESOLVED = 1e-3


class Driven:
    """A live optimizer that computes displacements and leaves the weights unchanged.

    It steps with a constant lr of its own, so that the learned lr never has to be read on the host. With `resolve` that is at least 1e-3,
    so that displacements have enough digits; for optimizers that are linear in lr.

    Raises:
        TypeError: parameters in half precision, with `resolve`.
    """

    def __init__(self, optimizer: Optimizer, *, resolve: bool) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if resolve):
            if p.dtype in (torch.bfloat16, torch.float16):
                name, dtype = type(optimizer).__name__, str(p.dtype).removeprefix("torch.")
                raise TypeError(
                    f"{name} has parameters in {dtype}, which rounds small displacements to 0, and lr is learned from displacements: "
                    f"keep the parameters in float32 and compute in {dtype} under torch.autocast"
                )
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"] = max(float(group["lr"]), RESOLVED if resolve else 0.0)

    def directions(self) -> dict[Tensor, Tensor]:
        """(x − x₁)/lr₁ for every parameter with a gradient, where x₁ is what a step with lr₁ makes of x."""
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in params]
        self.optimizer.step()
        rates = {p: group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        found = {p: (x - p.detach()) / rates[p] for p, x in zip(params, before, strict=True)}
        torch._foreach_copy_(params, before)  # pyright: ignore[reportPrivateImportUsage]
        return found

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles only an optimizer's groups and state, not the attributes that a third-party class sets in its __init__.
        standard = vars(Optimizer([torch.zeros(())], {})).keys() | {"step"}  # "step": a scheduler's wrapper
        own = {name: value for name, value in vars(self.optimizer).items() if name not in standard}
        return {"optimizer": self.optimizer, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state["optimizer"]
        vars(self.optimizer).update(state["own"])


def _others(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a group that are the user's own, such as timm's lr_scale."""
    known = {"params", "param_names", "initial_lr", *optimizer.defaults}
    return {name: group[name] for name in group.keys() - known} if type(optimizer) in COUNTERPARTS else {}


def _values(rule: Rule, group: Mapping[str, Any]) -> dict[str, float]:
    given = {**group, **dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))}
    return {name: float(given[name]) for name in rule.declared() if name in given}
