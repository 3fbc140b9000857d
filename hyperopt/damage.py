"""Whether the tensors and values in a checkpoint are such as this optimizer would write: ValueError if not, or torch's own errors."""

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .body import shards
from .body.buffers import base_of
from .rule import check
from .tree import with_zeros

if TYPE_CHECKING:
    from .optimizable import Optimizable

WRITTEN = "it was changed since it was written, load an earlier one"


def check_values(saved: dict[str, Any], group: Any) -> None:
    """Raise unless the hyperparameters of level 0 are such as could be assigned."""
    tower = saved["tower"]
    for name, live in group.live.items():
        _check_value(name, saved[name], group.root, name, {live.shape, torch.Size()})
        shape = group.hypers[name].value.shape
        _check_tensor(f"last {name}", tower["last"][name], {shape})
        _check_value(f"last {name}", tower["last"][name], group.root, name, {shape})
    gradients, hypergradients = tower["skipped"]
    for count in (gradients, hypergradients):
        _check_tensor("skipped", count, {torch.Size()}, 0.0)
    for name, q in tower.get("held_out", {}).items():
        _check_tensor(f"held_out {name}", q, {group.hypers[name].value.shape}, -math.inf, math.inf, finite=False)


def check_nodes(tower: dict[str, Any], group: Any) -> None:
    """Raise unless the levels above are such as this tower has."""
    labels = {node: label for label, node in group.nodes.items()}
    for label, node in group.nodes.items():
        record, own = tower["nodes"][label], group.tower["nodes"][label]
        shapes = {own["anchor"].shape} if not node.level else {record["x"].shape, torch.Size()}
        _check_tensor(f"{label}.anchor", record["anchor"], shapes)
        if "climbing" in record:
            _check_tensor(f"{label}.climbing", record["climbing"], shapes, 0.0, 1.0)
        for name, raw in record.get("start", {}).items():
            mine = node.hypers[name]
            _check_tensor(f"{label}.start.{name}", raw, {mine.value.shape}, *mine.domain.raw_limits(mine.value.dtype))
        for names, upper in node.above:
            kept, above = tower["nodes"][labels[upper]], group.tower["nodes"][labels[upper]]
            _check_tensor(f"{labels[upper]}.x", kept["x"], {above["x"].shape})
            for name, raw in zip(names, kept["x"].split(node.hypers.sizes[names]), strict=True):
                _check_tensor(f"raw {label}.{name}", raw, {raw.shape}, *node.hypers[name].domain.raw_limits(raw.dtype))
        if node.level:
            for name, h in node.hypers.own.items():
                shapes = {h.value.shape} if h.learned else {record["x"].shape, torch.Size()}
                _check_tensor(f"{label}.{name}", record["values"][name], shapes)
                _check_value(f"{label}.{name}", record["values"][name], node, name, shapes)
            buffer = node.body.buffers[0]
            _check_record(label, record["state"], record["x"].shape, buffer.numbers)


def check_states(saved: dict[str, Any], group: Any, records: Sequence[dict[str, Tensor]]) -> None:
    """Raise unless the state of each parameter is such as its rule keeps."""
    numbers = {"t"}
    if not any(size for size in group.sizes.values()):  # with values per tensor or coordinate, states are too
        every = with_zeros(group.spec.rule, [name for name in saved["tower"]["zeros"] if not torch.as_tensor(saved[name]).any()])
        rules = [every.serving(role) for role in set(group.roles.values())] or [every]
        numbers |= {key for rule in rules for key, kept in rule.init(torch.zeros(1, 1, device="cpu")).items() if not kept.dim()}
    for part in saved["tower"]["chunks"]:
        for i in part:
            _check_record("", records[i], group.params[i].shape, numbers)
            if records[i]["t"] != records[part[0]]["t"]:
                raise ValueError(f"the checkpoint's parameters that are stepped as one have unlike numbers of steps: {WRITTEN}")


def _check_record(what: str, record: dict[str, Tensor], shape: torch.Size, numbers: Set[str]) -> None:
    for key, value in record.items():
        number = (base_of(key) if key.startswith("Z.") else key) in numbers
        # A tangent that is not finite starts again, and is counted.
        _check_tensor(f"{what} {key!r}".strip(), value, {torch.Size() if number else shape}, finite=not key.startswith("Z."))
    if not 0 <= record["t"] == record["t"].round():
        raise ValueError(f"the checkpoint's {what} t = {record['t']} must be a number of steps: {WRITTEN}")


def _check_tensor(
    what: str, value: Any, shapes: Set[torch.Size], low: float = -math.inf, high: float = math.inf, *, finite: bool = True
) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the checkpoint's {what} must be a tensor of float32 or float64, got {got}: {WRITTEN}")
    if value.shape not in shapes:
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"the checkpoint's {what} has shape {tuple(value.shape)} for a parameter of shape {wanted}: {WRITTEN}")
    if finite and value.numel() and (mine := shards.local(value)).numel():
        least, most = (float(end) for end in mine.aminmax())
        low, high = (float(torch.tensor(end, dtype=value.dtype)) for end in (low, high))  # as what is clamped there is rounded
        if not (low <= least and most <= high and math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"the checkpoint's {what} has values from {least:g} to {most:g}, outside [{low:g}, {high:g}]: {WRITTEN}")


def _check_value(what: str, value: Any, node: "Optimizable", name: str, shapes: Set[torch.Size]) -> None:
    """Raise unless a hyperparameter of a node is in the closure of its domain, and its rule takes it."""
    mine = node.hypers[name]
    given = torch.as_tensor(value)
    for end in given.aminmax():
        check(f"the checkpoint's {what}", end.item(), mine.domain)
        low, high = mine.admitted
        if not low <= (rounded := end.to(mine.value).item()) <= high:
            raise ValueError(f"the checkpoint's {what} = {rounded:g} is a value that {type(node.body.rule).__name__} refuses: {WRITTEN}")
    if given.shape not in shapes:
        raise ValueError(f"the checkpoint's {what} has shape {tuple(given.shape)} and here {tuple(mine.value.shape)}: {WRITTEN}")
