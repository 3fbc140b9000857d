"""From a specification to the tree of nodes that one parameter group is trained with."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .body import choose
from .body.buffers import Buffer
from .body.graph import Graph
from .body.part import EAGER, Part
from .body.shards import Ranks
from .domains import Domain, Interval, Positive, Real
from .guards import Climb, Forget, Guard, Guards, Pace, Prior, Trust
from .horizons import gamma
from .hyperparameter import Hyperparameter, Hyperparameters
from .optimizable import Optimizable
from .rule import Rule
from .spec.level import Level
from .tangents import Tangents

Records = dict[str, dict[str, Any]]  # by label: "anchor" of each node, "climbing" where lr may, "start" of what has no usual value


class Tree:
    """The nodes by their labels: "0" for the root, "1", "2" … in a chain, "1[beta1]" in a tree by what a branch learns.

    Args:
        spec: the tower.
        rule: the rule of level 0.
        own: the hyperparameters of level 0.
        records: where the nodes keep their tensors; what is there already is taken over.
        params: the weights.
        skipped: counts steps, and hypergradients, that were left out.
        compile: the steps are compiled.
    """

    def __init__(
        self,
        spec: Level,
        rule: Rule,
        own: dict[str, Hyperparameter],
        records: Records,
        params: Sequence[Tensor],
        skipped: Sequence[Tensor],
        *,
        compile: bool,
    ) -> None:
        self.records, self.params, self.skipped, self.compile = records, params, skipped, compile
        self.nodes: dict[str, Optimizable] = {}
        self.root = self._node(spec, rule, 0, "", own, ())

    def tangents(self) -> int:
        """How many tangents there are."""
        return sum(len(z) for node in self.nodes.values() for buffer in node.body.buffers for z in buffer.tangents.values())

    def make_tangents(self, gs: list[Tensor], zero: Tensor) -> None:
        """Make all tangents that there will be, as zeros, by steps that do not count: what a checkpoint holds is known from the start."""
        if not self.saves():
            return
        skipped, before = self.skipped[0].clone(), -1
        self.root.body.arrange(EAGER)
        while before < (before := self.tangents()):  # one of a state may only follow from one of x
            self.root.step(gs, zero)
        self.skipped[0].copy_(skipped)

    def saves(self) -> bool:
        """Whether everything this tower needs to go on is held in tensors."""
        return not any(isinstance(node.body, Graph) and node.body.outputs for node in self.nodes.values())

    def _node(
        self, spec: Level, rule: Rule, level: int, branch: str, own: dict[str, Hyperparameter], buffers: Sequence[Buffer]
    ) -> Optimizable:
        nodes = []
        for names, upper, path in above(spec, branch):
            nodes.append((names, self._upper(upper, level + 1, path, {name: own[name] for name in names})))
        vectors = [(names, node.body.buffers[0].tensors[0]) for names, node in nodes]
        hypers = Hyperparameters(own, vectors, constant=level > 0 and self.compile)
        domains = {name: own[name].domain for names, _ in nodes for name in names}
        gammas = {name: gamma(spec.horizon_of(name)) for name in domains}
        tangents = Tangents(rule, domains, gammas, coupled=spec.project is not None)
        trust = spec.trust_at(level)
        graph = spec.strategy == "graph"
        ranks = Ranks(() if level else self.params)
        part = Part(level, rule, hypers, tangents, trust, spec.project, compiled=self.compile and not graph, ranks=ranks)
        chosen = choose.body(part, self.params, graph=graph)
        chosen.buffers = buffers
        record = self.records.setdefault(label(level, branch), {})
        guards = [*self._guards(level, rule, own, domains, trust, nodes, record), *_prior(spec, level, own, domains, record)]
        node = self.nodes[label(level, branch)] = Optimizable(level, chosen, hypers, Guards(guards), nodes, self.skipped)
        return node

    def _guards(
        self,
        level: int,
        rule: Rule,
        own: dict[str, Hyperparameter],
        domains: Mapping[str, Any],
        trust: float | None,
        above: Sequence[tuple[tuple[str, ...], Optimizable]],
        record: dict[str, Any],
    ) -> list[Guard]:
        """The guards of a node, with their state taken over from its record; none without trust."""
        climbing = record.pop("climbing", None)
        lr = own["lr"].value if "lr" in own else torch.ones_like(next(iter(own.values())).value)
        started = "anchor" in record
        record["anchor"] = record["anchor"].to(lr) if started else lr.abs().clamp_min(torch.finfo(lr.dtype).tiny).log()
        if trust is None:
            return []
        guards: list[Guard] = []
        paced = [name for name, domain in domains.items() if (not isinstance(domain, Real) if level else is_decay(name, domain))]
        if paced:
            guards.append(Pace(paced))
        if "lr" not in domains:
            return guards
        if level == 0 and domains["lr"] == Positive():
            # A run that is under way without it does not begin to climb.
            record["climbing"] = torch.full_like(lr, not started) if climbing is None else climbing.to(lr)
            limits = [node.body.trust for names, node in above if "lr" in names and node.body.trust is not None]
            guards.append(Climb(record["climbing"], trust, min(limits, default=math.inf)))
        guards.append(Trust(own["lr"], trust, Trust.WARMUP if level == 0 and rule.gapped else 1))
        return [*guards, Forget(own["lr"], record["anchor"])]

    def _upper(self, spec: Level, level: int, branch: str, below: Mapping[str, Hyperparameter]) -> Optimizable:
        """The node whose x are the raw values of the hyperparameters `below`, side by side in one vector."""
        record = self.records.setdefault(label(level, branch), {"values": {}, "state": {}})
        like = next(iter(below.values())).value
        for part in (record, record["values"], record["state"]):
            part |= {key: tensor.to(like) for key, tensor in part.items() if isinstance(tensor, Tensor)}
        if "x" not in record:
            record["x"] = torch.cat([h.domain.raw(h.value).reshape(-1) for h in below.values()])
        x = record["x"]
        rule = spec.rule_at(level)
        own, positions = {}, {}
        for name in rule.declared():
            value = rule.value(name)
            if isinstance(value, Mapping):
                given = torch.cat([torch.full_like(h.value, value[n]).reshape(-1) for n, h in below.items()])
            else:
                given = torch.full_like(x if name in spec.learning and spec.per != "group" else x[0], value)
            live = record["values"].setdefault(name, given)
            own[name] = Hyperparameter(spec.domain(name), live, learned=name in spec.learning, rule=rule, name=name)
            if live.dim():
                positions[name] = torch.arange(x.numel(), device=like.device), x.numel()
        limits = [h.domain.raw_limits(like.dtype) for h in below.values() for _ in range(h.value.numel())]
        low, high = (torch.tensor(ends, dtype=like.dtype, device=like.device) for ends in zip(*limits, strict=True))
        rule = with_zeros(rule, [name for name, h in own.items() if name not in spec.learning and not h.value.any()])
        buffer = Buffer([x], [record["state"]], rule, positions, (low, high))
        return self._node(spec, rule, level, branch, own, [buffer])


def _prior(spec: Level, level: int, own: Mapping[str, Hyperparameter], learned: Collection[str], record: dict[str, Any]) -> list[Guard]:
    """The guard that takes what is learned back to its usual value, but for the lr of the weights, which has none. Where none is usual, as
    for weight decay and lr, or the domain does not have it, that is the value which it was bound with."""
    steps, names = spec.prior_steps(), [name for name in learned if level or name != "lr"]
    if steps is None or not names:
        return []
    raw = {}
    for name in names:
        declared, mine = spec.rule.declared()[name], own[name]
        usual = declared.usual if declared.usual is not None else declared.above if level else declared.default
        known = name not in ("lr", "weight_decay") and mine.domain.inside(usual)
        value = torch.full_like(mine.value.reshape(-1)[0], usual) if known else mine.value
        raw[name] = mine.domain.raw(value).clamp(*mine.limits)  # float32 may not reach the default: a damping of 1e-8
        if not known:
            raw[name] = record.setdefault("start", {}).setdefault(name, raw[name]).to(mine.value)
    return [Prior(raw, steps)]


def above(spec: Level, branch: str) -> Iterator[tuple[tuple[str, ...], Level, str]]:
    """The levels directly above one that stands on `branch`: what each of them learns, and the branch that it stands on."""
    for names, upper in spec.above.items():
        yield names, upper, ".".join(filter(None, [branch, names[0]])) if spec.is_tree() else branch


def is_decay(name: str, domain: Domain) -> bool:
    """Whether a hyperparameter is the decay of an average, or lives in an interval as they do."""
    return name != "lr" and isinstance(domain, Interval)


def label(level: int, branch: str) -> str:
    """The label of a node."""
    return f"{level}[{branch}]" if branch else str(level)


def with_zeros(rule: Rule, zeros: Collection[str]) -> Rule:
    """The rule as it is asked for its state: 0 for what is left out of the update, any other number for the rest."""
    values = {name: rule.value(name) for name in rule.declared()}
    return dataclasses.replace(rule, **{n: 0.0 if n in zeros else (v if isinstance(v, float) and v else 0.5) for n, v in values.items()})
