"""From a specification to the tree of nodes that one parameter group is trained with."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .domains import Interval, Positive, complement
from .engine import Chunk
from .hypergradients import Displacement, Following, Graph, Strategy, Tangents, gamma
from .optimizable import Optimizable
from .rule import Kernel, Rule
from .tower import Hyper

Records = dict[str, dict[str, Any]]  # by label: "anchor" of each node, "climbing" where lr may


def grow(spec: Hyper, rule: Rule, live: dict[str, Tensor], records: Records) -> dict[str, Optimizable]:
    """The nodes by their labels: "0" for the root, "1", "2" … in a chain, "1[beta1]" in a tree by what a branch learns.

    Args:
        spec: the tower.
        rule: the rule of level 0.
        live: the values of its hyperparameters.
        records: where the nodes keep their tensors; what is there already is taken over.
    """
    nodes: dict[str, Optimizable] = {}
    _node(spec, rule, 0, "", live, [], records, nodes)
    return nodes


def _node(
    spec: Hyper,
    rule: Rule,
    level: int,
    branch: str,
    live: dict[str, Tensor],
    chunks: list[Chunk],
    records: Records,
    nodes: dict[str, Optimizable],
) -> Optimizable:
    above = []
    for names, upper in spec.above.items():
        path = ".".join(filter(None, [branch, names[0]])) if spec.is_tree() else branch
        values = {name: live[name] for name in names}
        above.append((names, _upper(upper, level + 1, path, values, [spec.domain(n) for n in names], records, nodes)))
    domains = {name: spec.domain(name) for name in live}
    complements = {name: complement(value) for name, value in live.items()}
    label = _label(level, branch)
    record = records.setdefault(label, {})
    lr = live["lr"] if "lr" in live else torch.ones_like(next(iter(live.values())))
    made, trust = strategy(spec, rule, level), spec.trust_at(level)
    climbing = record.pop("climbing", None)
    if level == 0 and trust is not None and domains.get("lr") == Positive() and any("lr" in names for names in spec.above):
        # A run that is under way without it does not begin to climb.
        climbing = torch.full_like(lr, "anchor" not in record) if climbing is None else climbing.to(lr)
        record["climbing"] = climbing
    else:
        climbing = None
    record["anchor"] = record["anchor"].to(lr) if "anchor" in record else lr.abs().clamp_min(torch.finfo(lr.dtype).tiny).log()
    paced = [name for names in spec.above for name in names if trust is not None and name != "lr" and isinstance(domains[name], Interval)]
    nodes[label] = Optimizable(
        level, rule, chunks, live, complements, domains, above, made, trust, spec.project, record["anchor"], paced, climbing
    )
    nodes[label].kernel = kernel(spec, nodes[label])
    return nodes[label]


def _upper(
    spec: Hyper,
    level: int,
    branch: str,
    below: Mapping[str, Tensor],
    domains: list[Any],
    records: Records,
    nodes: dict[str, Optimizable],
) -> Optimizable:
    """The node whose x are the raw values of the hyperparameters `below`, side by side in one vector."""
    record = records.setdefault(_label(level, branch), {"values": {}, "state": {}})
    like = next(iter(below.values()))
    for part in (record, record["values"], record["state"]):
        part |= {key: tensor.to(like) for key, tensor in part.items() if isinstance(tensor, Tensor)}
    if "x" not in record:
        record["x"] = torch.cat([domain.raw(value).reshape(-1) for domain, value in zip(domains, below.values(), strict=True)])
    size = record["x"].numel()
    rule = spec.rule_at(level)
    positions = {}
    live = {}
    for name in rule.declared():
        value = rule.value(name)
        if isinstance(value, Mapping):
            given = torch.cat([torch.full_like(v, value[n]).reshape(-1) for n, v in below.items()])
        else:
            given = torch.full_like(record["x"] if name in spec.learning and spec.per != "group" else record["x"][0], value)
        live[name] = record["values"].setdefault(name, given)
        if live[name].dim():
            positions[name] = torch.arange(size, device=like.device), size
    limits = [domain.raw_limits(like.dtype) for domain, value in zip(domains, below.values(), strict=True) for _ in range(value.numel())]
    low, high = (torch.tensor(ends, dtype=like.dtype, device=like.device) for ends in zip(*limits, strict=True))
    rule = with_zeros(rule, [name for name, value in live.items() if name not in spec.learning and not value.any()])
    chunk = Chunk([record["x"]], [record["state"]], rule, positions, (low, high))
    return _node(spec, rule, level, branch, live, [chunk], records, nodes)


def _label(level: int, branch: str) -> str:
    return f"{level}[{branch}]" if branch else str(level)


def strategy(spec: Hyper, rule: Rule, level: int) -> Strategy:
    """How a node of this specification makes its hypergradients: in the cheapest way that is exact."""
    if spec.strategy == "graph":
        return Graph()
    if spec.learning == ("lr",) and spec.project is None and rule.linear_in_lr() and spec.domain("lr") == Positive():
        return Displacement(gamma(spec.horizon))
    if spec.learning and spec.project is None and spec.horizon > 1 and level == 0 and set(spec.learning) <= set(rule.late()):
        return Following(gamma(spec.horizon))
    return Tangents(gamma(spec.horizon))


def kernel(spec: Hyper, node: Optimizable) -> Kernel | None:
    """The kernel with which a node steps in eager mode, if there is one; it looks at the values of held hyperparameters."""
    held = {name: value for name, value in node.live.items() if name != "lr"}
    wanted = isinstance(node.strategy, Displacement) or not spec.learning
    if not wanted or spec.project is not None or not node.rule.linear_in_lr() or any(value.dim() for value in held.values()):
        return None
    # Near 1 the complement has the digits.
    return node.rule.kernel({n: 1 - float(node.complements[n]) if 0.5 < float(v) < 1 else float(v) for n, v in held.items()})


def with_zeros(rule: Rule, zeros: Collection[str]) -> Rule:
    """The rule as it is asked for its state: 0 for what is left out of the update, any other number for the rest."""
    values = {name: rule.value(name) for name in rule.declared()}
    return dataclasses.replace(rule, **{n: 0.0 if n in zeros else (v if isinstance(v, float) and v else 0.5) for n, v in values.items()})
