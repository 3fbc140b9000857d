"""The tree of one parameter group: built from the specification, fed with gradients, found again in a checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .domains import Positive
from .engine import LARGE, Chunk, Compiled, Record
from .hypergradients import Displacement, Graph, Strategy, Tangents, gamma
from .optimizable import Optimizable
from .rule import Rule, check
from .tower import Hyper

CAPACITY = 2**22  # elements gathered into one chunk at most


class Group:
    """One parameter group and the tower that trains it.

    Everything that must survive is kept in `group` and `state` as tensors and plain values; this object can be built again
    from them at any time.

    Args:
        spec: the tower.
        group: the parameter group of the optimizer; its "tower" entry holds the levels above 0.
        state: the optimizer's state, by parameter.
        compile: fuse the tower's step.
    """

    def __init__(self, spec: Hyper, group: dict[str, Any], state: MutableMapping[Tensor, Record], *, compile: bool = False) -> None:
        self.spec, self.group, self.state = spec, group, state
        self.params: list[Tensor] = group["params"]
        self.device = self.params[0].device
        wide = any(p.dtype == torch.float64 for p in self.params)
        self.dtype = torch.float64 if wide else torch.float32
        self.names = list(spec.rule.declared())
        self.tower: dict[str, Any] = group.setdefault("tower", {"structure": spec.structure(), "nodes": {}})
        self.tower.setdefault("skipped", torch.zeros(2))
        self.tower["skipped"] = self.tower["skipped"].to(device=self.device, dtype=self.dtype)
        self.nodes: dict[str, Optimizable] = {}
        self.chunks: list[Chunk] = []
        self._build()
        self._step = Compiled(self.root.step, spec.height + 2) if compile else self.root.step

    # ---- the tree

    @torch.no_grad()
    def _build(self) -> None:
        record = self.tower["nodes"].setdefault("0", {})
        for name in self.names:
            sizes = {"group": None, "tensor": len(self.params), "coordinate": sum(p.numel() for p in self.params)}
            size = sizes[self.spec.per] if self.spec.above and name in self.spec.learned else None
            value = torch.as_tensor(self.group[name], dtype=self.dtype, device=self.device).detach().clone()
            self.group[name] = value if size is None or value.dim() else value.expand(size).clone()
        live = {name: self.group[name] for name in self.names}
        values = {n: float(live[n].flatten()[0]) for n in self.names if not (self.spec.above and n in self.spec.learned)}
        self.rule = dataclasses.replace(self.spec.rule, **{n: _shortest(v, self.dtype) for n, v in values.items()})
        self.nodes = {}
        self.root = self._node(self.spec, self.rule, 0, "", live, [])
        self.last = {n: record["last." + n].to(v) if "last." + n in record else v.clone() for n, v in live.items()}
        self.watched = {n for n in self.names if "last." + n in record}
        self.versions = {n: v._version for n, v in live.items()}
        self.chunks = [Chunk(ps, [self.state[p] for p in ps], self.rule, self._spread(ps)) for ps in self._parts(self._stepped())]

    def _node(self, spec: Hyper, rule: Rule, level: int, branch: str, live: dict[str, Tensor], chunks: list[Chunk]) -> Optimizable:
        above = []
        domains = {name: spec.domain(name) for name in rule.declared()}
        for names, upper in spec.above.items():
            path = branch if len(spec.above) == 1 and names == spec.learned else ".".join(filter(None, [branch, names[0]]))
            above.append((names, self._upper(upper, level + 1, path, [(n, live[n], domains[n]) for n in names])))
        complements = {n: _complement(v) for n, v in live.items() if v.dim() == 0}
        node = Optimizable(level, rule, chunks, live, complements, domains, above, _strategy(spec, rule), spec.trust_at(level))
        self.nodes[_label(level, branch)] = node
        return node

    def _upper(self, spec: Hyper, level: int, branch: str, below: list[tuple[str, Tensor, Any]]) -> Optimizable:
        record = self.tower["nodes"].setdefault(_label(level, branch), {})
        for key, value in record.items():
            record[key] = value.to(device=self.device, dtype=self.dtype)
        if "x" not in record:
            record["x"] = torch.cat([domain.raw(value).reshape(-1) for _, value, domain in below])
        rule = spec.rule_at(level)
        positions: dict[str, tuple[Tensor, int]] = {}
        learned = spec.learned if spec.above else ()
        size = record["x"].numel()
        live = {}
        for name in rule.declared():
            value = rule.value(name)
            parts = [float(value[n]) if isinstance(value, Mapping) else value for n, v, _ in below for _ in range(v.numel())]
            if isinstance(value, Mapping) or (name in learned and spec.per != "group"):
                positions[name] = torch.arange(size, device=self.device), size
            initial = torch.tensor(parts if name in positions else parts[0], dtype=self.dtype, device=self.device)
            live[name] = record["h." + name] = record.get("h." + name, initial)
        limits = [domain.raw_limits(self.dtype) for _, value, domain in below for _ in range(value.numel())]
        low, high = (torch.tensor(ends, dtype=self.dtype, device=self.device) for ends in zip(*limits, strict=True))
        rule = dataclasses.replace(rule, **{n: next(iter(v.values())) for n in rule.declared() if isinstance(v := rule.value(n), Mapping)})
        chunk = Chunk([record["x"]], [_Prefixed(record)], rule, positions, (low, high))
        return self._node(spec, rule, level, branch, live, [chunk])

    def _spread(self, params: list[Tensor]) -> dict[str, tuple[Tensor, int]]:
        if self.spec.per == "group" or not self.spec.above:
            return {}
        starts, total = {}, 0
        for i, p in enumerate(self.params):
            starts[p] = i if self.spec.per == "tensor" else total
            total += p.numel()
        if self.spec.per == "tensor":
            parts = [torch.full((p.numel(),), starts[p], device=p.device) for p in params]
            total = len(self.params)
        else:
            parts = [torch.arange(starts[p], starts[p] + p.numel(), device=p.device) for p in params]
        positions = torch.cat(parts) if len(parts) > 1 else parts[0].view(params[0].shape)
        return dict.fromkeys(self.spec.learned, (positions, total))

    # ---- gradients

    def check(self) -> None:
        """Raise if a step cannot be taken, before anything is changed."""
        for p in self.params:
            if p.grad is not None and (p.grad.is_sparse or p.grad.layout != torch.strided):
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which has no hypergradient here: "
                    "make it dense (nn.Embedding(sparse=False)) or give that parameter to another optimizer"
                )
        for name in self.names:
            value = self.group[name]
            if value is not self.root.live[name] and not isinstance(value, Tensor):
                check(f"param_groups[…][{name!r}]", value, self.spec.domain(name))

    def collect(self) -> list[Tensor]:
        """Choose the chunks that have a gradient and return their gradients, gathered."""
        fresh = [p for p in self.params if p.grad is not None and "t" not in self.state.get(p, {})]
        if fresh:
            for p in fresh:
                self.state[p] = {}
            self.chunks += [Chunk(ps, [self.state[p] for p in ps], self.rule, self._spread(ps)) for ps in self._parts(fresh)]
        for chunk in list(self.chunks):
            absent = [p.grad is None for p in chunk.tensors]
            if any(absent) and not all(absent):
                # From now on the two halves have different step counts.
                self.chunks.remove(chunk)
                for half in ([p for p in chunk.tensors if p.grad is None], [p for p in chunk.tensors if p.grad is not None]):
                    self.chunks.append(Chunk(half, [self.state[p] for p in half], self.rule, self._spread(half)))
        self.root.chunks = [c for c in self.chunks if c.tensors[0].grad is not None]
        return [c.gradient([p.grad for p in c.tensors if p.grad is not None], self.spec.maximize) for c in self.root.chunks]

    def step(self, gs: list[Tensor], ok: Tensor, learn: bool) -> None:
        """Step the tower; `ok` is 1. where the step counts."""
        self._notice()
        ok = ok.to(self.root.ok)
        gs = [chunk.finite(g) for chunk, g in zip(self.root.chunks, gs, strict=True)]
        for chunk in self.root.chunks:
            chunk.gather()
        self._step(gs, ok, {n: self.last[n] for n in self.watched}, learn=learn)
        for chunk in self.root.chunks:
            chunk.scatter()
        self.tower["skipped"][0] += 1 - ok
        self.tower["skipped"][1] = sum(node.resets for node in self.nodes.values())
        record = self.tower["nodes"]["0"]
        for name in self.watched:
            live = self.root.live[name]
            self.last[name] = record["last." + name] = torch.where(ok > 0, live, self.last[name])
        self.versions = {n: v._version for n, v in self.root.live.items()}

    def _notice(self) -> None:
        """Find the values that a user, or a scheduler, may have assigned: Python can see that without looking at them."""
        for name in self.names:
            mine, value = self.root.live[name], self.group[name]
            if value is mine and mine._version == self.versions[name]:
                continue
            if name not in self.watched:
                self.watched.add(name)
                if name in self.root.raw and self.root.chunks and self.root.chunks[0].tangents:
                    self.last[name] = self.spec.domain(name).value(self.root.raw[name])
            if value is not mine:
                mine.copy_(torch.as_tensor(value))
                self.group[name] = mine
            self.root.complements.pop(name, None)
            if name not in self.root.raw and self.rule.value(name) == 0:
                self._reshape(name)

    def _reshape(self, name: str) -> None:
        # A hyperparameter that was 0 when the tree was built has no place in the state (momentum) or in the update.
        value = float(self.root.live[name])
        if value == 0:
            return
        self.rule = dataclasses.replace(self.rule, **{name: value})
        self.root.rule = self.rule
        self.root.strategy = _strategy(self.spec, self.rule)
        for chunk in self.chunks:
            chunk.extend(self.rule)

    def saves(self) -> bool:
        """Whether everything this tower needs to go on is held in tensors."""
        return not any(isinstance(node.strategy, Graph) for node in self.nodes.values() if node.above)

    def _stepped(self) -> list[Tensor]:
        return [p for p in self.params if "t" in self.state.get(p, {})]

    def _parts(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters that can be stepped as one: of one device, dtype and step count, with the same things kept for each."""
        parts: dict[Any, list[Tensor]] = {}
        for p in params:
            record = self.state[p]
            key = (p.device, p.dtype, float(record["t"]) if "t" in record else 0.0, tuple(record))
            if p.numel() >= LARGE or not self.rule.elementwise:
                key = (*key, p)
            part = parts.setdefault(key, [])
            if sum(q.numel() for q in part) + p.numel() > CAPACITY:
                yield parts.pop(key)
                part = parts.setdefault(key, [])
            part.append(p)
        yield from (part for part in parts.values() if part)


class _Prefixed(MutableMapping[str, Tensor]):
    """The part of a node's record that its chunk may see: state and tangents, without x and the values."""

    def __init__(self, record: dict[str, Tensor]) -> None:
        self.record = record

    def __getitem__(self, key: str) -> Tensor:
        return self.record["s." + key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.record["s." + key] = value

    def __delitem__(self, key: str) -> None:
        del self.record["s." + key]

    def __iter__(self) -> Iterator[str]:
        return (key[2:] for key in list(self.record) if key.startswith("s."))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _label(level: int, branch: str) -> str:
    return f"{level}[{branch}]" if branch else str(level)


def _strategy(spec: Hyper, rule: Rule) -> Strategy:
    if spec.strategy == "graph":
        return Graph()
    if spec.above and spec.learned == ("lr",) and rule.linear_in_lr() and isinstance(spec.domain("lr"), Positive):
        return Displacement(gamma(spec.horizon))
    return Tangents(gamma(spec.horizon))


def _shortest(value: float, dtype: torch.dtype) -> float:
    """The shortest decimal that rounds to `value` in `dtype`: 0.999 for the float32 nearest to it."""
    return float(str(np.float32(value))) if dtype == torch.float32 else value


def _complement(value: Tensor) -> Tensor:
    # 1 − 0.999 taken in float32 is off by 1e-5 of itself; from the decimal that was meant it is exact, also after a reload.
    return torch.full_like(value, 1 - _shortest(float(value), value.dtype))
