"""Which rules the C++ passes serve, and where they find what they read and write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import overrides
from ..rules.averaged import _Averaged
from ..rules.schedule_free import _ScheduleFree
from .buffers import Buffer
from .functions import Column, Value
from .kernels import inner, textbook
from .part import Part


def serves(part: Part, tensors: Sequence[Tensor]) -> bool:
    """Whether the passes serve a rule, with what is learned of it, and these weights: on a CPU, in float32."""
    rule, hypers, tangents, feasible = part.rule, part.hypers, part.tangents, part.feasible
    follows = not overrides(rule, "after")
    if not follows and type(rule).after in (_ScheduleFree.after, _Averaged.after):
        follows = not overrides(inner(rule), "after") and all(tangents.gamma.values())
    decay = not rule._decays() or (not rule._couples() and not overrides(inner(rule), "_decay"))
    mine = tangents.fixed and (tangents.alone or not tangents.names) and not overrides(rule, "update") and feasible is None
    single = "lr" in hypers.own and not any(hyperparameter.value.dim() for hyperparameter in hypers.own.values())
    numbers = hypers.like.is_cpu and hypers.like.dtype == torch.float32
    return follows and decay and mine and single and numbers and all(_plain(t) for t in tensors)


def computed(buffer: Buffer) -> bool:
    """Whether the direction of a buffer is computed in C++."""
    return textbook(inner(buffer.rule))


def _plain(t: Tensor) -> bool:
    return type(t.data) is Tensor and t.is_cpu and t.dtype == torch.float32


def columns(body: Any, buffer: Buffer) -> dict[Column, Tensor]:
    """What passes.cpp reads and writes of a buffer, beside weights, gradient and direction."""
    rule, state = body.rule, buffer.state
    found = {Column.M: state.get("m"), Column.V: state.get("v")} if computed(buffer) else {}
    if isinstance(rule, _ScheduleFree):
        found |= {Column.GAP: state["gap"], Column.WEIGHT: state["weight"], Column.MIX: state["mix"]}
        found |= {Column.LAG: state.get("lag"), Column.LAG_SIZE: state.get("lag_size")}
    found[Column.AVERAGE] = state.get("average")
    if body.tangents.names:
        z = buffer.tangents["lr"]
        found |= {Column.ZX: z["x"], Column.ZA: z.get("gap", z.get("average")), Column.ZWEIGHT: None if rule.totals else z.get("weight")}
    found[Column.T] = buffer.t
    if buffer.rule._decays():
        found[Column.DECAY] = body.hypers.own["weight_decay"].value
    return {column: kept for column, kept in found.items() if kept is not None}


def values(body: Any) -> list[Tensor | None]:
    """The hyperparameters that passes.cpp reads."""
    own, rule = body.hypers.own, body.rule
    found: list[Tensor | None] = [None] * len(Value)
    adams = [inner(buffer.rule) for buffer in body.buffers if computed(buffer)]
    if adams:
        first = adams[0].value("beta1") != 0
        found[Value.REST1] = own["beta1"].rest if first else None
        found[Value.REST2], found[Value.EPS] = own["beta2"].rest, own["eps"].value
    found[Value.CAUTIOUS] = torch.full_like(body.hypers.like, rule.cautious)
    found[Value.LARGEST] = torch.full_like(body.hypers.like, rule._decay_bound())
    if isinstance(rule, _ScheduleFree):
        found[Value.BETA] = own["beta1"].value
        found[Value.FORGET] = torch.full_like(body.hypers.like, vars(rule)["forget"])
        if rule.through != 1:
            found[Value.THROUGH] = torch.full_like(body.hypers.like, rule.through)
    if isinstance(rule, _Averaged):
        found[Value.REST_DECAY] = own["decay"].rest
    return found
