"""One parameter group at work: which tensors are stepped as one, what a user assigned, what survives in a checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import guards, text, tree
from .domains import complement
from .engine import BLOCK, LARGE, LARGE_FUSED, Chunk, Compiled, Record, Scratch
from .hypergradients import Graph, Raw, combine, look
from .optimizable import call
from .rule import check
from .tower import Hyper

CAPACITY = 2**22  # elements gathered into one chunk at most
WHOLE = (
    3  # chunks up to which a step is compiled in one piece: 12 take half a minute, and what is made for all of them is in memory at once
)


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
        self.set = group.setdefault("project", None)
        if self.set is not None:
            spec = spec.inside(text.read_set(str(self.set)))
        self.spec, self.group, self.state = spec, group, state
        self.params: list[Tensor] = group["params"]
        self.device = self.params[0].device
        wide = any(p.dtype == torch.float64 for p in self.params)
        self.dtype = torch.float64 if wide else torch.float32
        self.names = list(spec.rule.declared())
        self.check()
        self.tower: dict[str, Any] = group.setdefault("tower", {"structure": spec.structure(), "calls": 0, "last": {}, "nodes": {}})
        self.tower["shapes"] = [list(p.shape) for p in self.params]
        self.tower["skipped"] = [self._to(count).clone() for count in self.tower.get("skipped", torch.zeros(2))]
        self._compiled = Compiled() if compile and spec.strategy != "graph" else None
        self._scratch: Scratch = {}
        self._steady: dict[Any, int] = {}  # kinds of steps that add no tangents where there are this many
        self._build()

    @torch.no_grad()
    def _build(self) -> None:
        self.last: dict[str, Tensor] = self.tower["last"]
        self.live: dict[str, Tensor] = {}
        for name in self.names:
            value = self._to(torch.as_tensor(self.group[name], dtype=self.dtype)).detach().clone()
            size = self._size(name)
            self.live[name] = self.group[name] = value if size is None or value.dim() else value.expand(size).clone()
            self.last[name] = self._to(self.last.get(name, self.live[name].clone()))
        # Values assigned before a copy was made, or before a checkpoint was written, are still to be noticed.
        self.watched = {name for name in self.names if not torch.equal(self.live[name], self.last[name])}
        self.watched |= set(self.tower.get("watched", []))
        self.versions = {name: value._version for name, value in self.live.items()}
        # A hyperparameter that is held at 0 from the start is left out of state and update; once it was used it stays in.
        zeros = self.tower.get("zeros", [name for name in self.names if name not in self.spec.learning])
        self.zeros = self.tower["zeros"] = [name for name in zeros if not self.live[name].any()]
        self.rule = tree.with_zeros(self.spec.rule, self.zeros)
        self.nodes = tree.grow(self.spec, self.rule, self.live, self.tower["nodes"])
        self.root = self.nodes["0"]
        if self._compiled or self.watched - {"lr"}:
            self.root.kernel = None  # as in `_notice`, so that training goes on bit for bit; fused, no eager step needs its buffer
        for node in self.nodes.values():
            node.resets = self.tower["skipped"][1]
        kept = [[self.params[i] for i in part] for part in self.tower.get("chunks", [])]
        # The checkpoint may be of a model whose tensors had other dtypes or were on other devices, and a live optimizer that was
        # taken over has state but no partition.
        mixed = [part for part in kept if len({(p.dtype, p.device) for p in part}) > 1]
        known = {p for part in kept for p in part}
        loose = [p for part in mixed for p in part] + [p for p in self.params if "t" in self.state.get(p, {}) and p not in known]
        parts = [part for part in kept if not any(part is m for m in mixed)]
        parts += self._parts(loose)
        self._partition([self._chunk(part) for part in parts])

    def _to(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=self.dtype)

    def _size(self, name: str) -> int | None:
        """How many values a hyperparameter of level 0 has; None for one."""
        if name not in self.spec.learning or self.spec.per == "group":
            return None
        return len(self.params) if self.spec.per == "tensor" else sum(p.numel() for p in self.params)

    def _chunk(self, params: list[Tensor]) -> Chunk:
        chunk = Chunk(params, [self.state[p] for p in params], self.rule, self._spread(params))
        chunk.shared = self._scratch
        chunk.separable = chunk.split = self.rule.elementwise and self.root.separable()
        return chunk

    def _partition(self, chunks: list[Chunk]) -> None:
        # Kept with the state, as sums over other chunks would differ in the last bit.
        self.chunks = chunks
        index = {p: i for i, p in enumerate(self.params)}
        self.tower["chunks"] = [[index[p] for p in chunk.tensors] for chunk in chunks]

    def _spread(self, params: list[Tensor]) -> dict[str, tuple[Tensor, int]]:
        """For each element of `params` the position of its value, where a hyperparameter has several."""
        if self.spec.per == "group" or not self.spec.learning:
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
        return dict.fromkeys(self.spec.learning, (positions, total))

    def check(self) -> None:
        """Raise if a step cannot be taken, before anything is changed."""
        for p in self.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which has no hypergradient here: "
                    "make it dense (nn.Embedding(sparse=False)) or give that parameter to another optimizer"
                )
        if "betas" in self.group:
            raise ValueError("param_groups[…]['betas'] is read nowhere: assign 'beta1' and 'beta2'")
        if self.group["project"] != self.set:
            raise ValueError(f"param_groups[…]['project'] was changed from {self.set} to {self.group['project']}: give it when binding")
        for name in self.names:
            value, size = self.group[name], self._size(name)
            if not isinstance(value, Tensor):
                self._check_number(name, value)
            elif value.dim() and value.shape != (size,):
                wanted = "one number" if size is None else f"one number, or a tensor of shape ({size},)"
                raise ValueError(f"param_groups[…][{name!r}] was given a tensor of shape {tuple(value.shape)}: give {wanted}")

    def _check_number(self, name: str, value: Any) -> None:
        domain = self.spec.domain(name)
        check(f"param_groups[…][{name!r}]", value, domain)
        if value and self.spec.rule.declared()[name].domain.admits(value):
            # What the rule itself refuses, such as a beta of 1; 0 only switches a part of the update off.
            dataclasses.replace(self.spec.rule, **{name: value})
        rounded = float(torch.tensor(value, dtype=self.dtype))
        if domain.inside(value) and not domain.inside(rounded):
            raise ValueError(f"{name} = {value!r} is {rounded:g} in {self.dtype}, on the bound of {domain!r}: give a value farther inside")

    def collect(self) -> list[Tensor]:
        """Choose the chunks that have a gradient and return their gradients, gathered."""
        fresh = [p for p in self.params if p.grad is not None and "t" not in self.state.get(p, {})]
        mixed = [c for c in self.chunks if len({p.grad is None for p in c.tensors}) > 1]
        if fresh or mixed:
            for p in fresh:
                self.state[p] = {}
            # From now on the two halves of a mixed chunk have different step counts.
            halves = [[p for p in c.tensors if (p.grad is None) == absent] for c in mixed for absent in (True, False)]
            kept = [c for c in self.chunks if c not in mixed]
            self._partition(kept + [self._chunk(part) for part in (*halves, *self._parts(fresh))])
        self.root.chunks = [c for c in self.chunks if c.tensors[0].grad is not None]
        return [c.gradient([p.grad for p in c.tensors if p.grad is not None], self.spec.maximize) for c in self.root.chunks]

    def hold_out(self, grads: Mapping[Tensor, Tensor | None], key: str) -> None:
        """Keep the hypergradients of another loss for the next step, added to those that are kept already.

        Args:
            grads: its gradient, by parameter; None where it does not depend on one.
            key: where the gradient was taken: "x" for the weights, or the name of the state that stood in their place.
        """
        kept = self.tower.get("held_out")
        for name, raw in self.root.raw.items():
            q = torch.zeros_like(raw)
            for chunk in self.chunks:
                tangent = chunk.tangents.get(name, {}).get(key)
                if tangent is not None:
                    found = [torch.zeros_like(p) if grads[p] is None else grads[p] for p in chunk.tensors]
                    g = chunk.side_by_side([-a if self.spec.maximize else a for a in found if a is not None])
                    q = q + chunk.inner(name, g, tangent).to(q)
            kept = {**(kept or {}), name: q + (kept or {}).get(name, 0)}
        self.tower["held_out"] = kept

    def step(self, gs: list[Tensor], ok: Tensor | None, every: int, directions: Mapping[Tensor, Tensor] | None = None) -> None:
        """Step the tower.

        Args:
            gs: as `collect` returned them.
            ok: 1. where the step counts; None where these gradients alone decide it.
            every: the levels above 0 step on every `every`-th call.
            directions: for a black box, the displacement of each parameter at lr = 1, downwards.
        """
        self._notice()
        self.tower["calls"] += 1
        for chunk in self.root.chunks:
            chunk.gather()
        steps = None if directions is None else [c.side_by_side([directions[p] for p in c.tensors]) for c in self.root.chunks]
        watched, learn, q = tuple(sorted(self.watched)), self.tower["calls"] % every == 0, self.tower.pop("held_out", None)
        args = gs, ok, watched, learn, q, steps
        self._run((watched, learn, q is None, ok is None), args) if self._compiled else self._advance(*args)
        for chunk in self.root.chunks:
            chunk.scatter()
        self.versions = {name: value._version for name, value in self.live.items()}

    def _run(self, kind: Any, args: tuple[Any, ...]) -> None:
        """`_advance` with what can be fused of it: all for a few chunks, else stage by stage."""
        chunks, compiled = self.root.chunks, self._compiled
        assert compiled is not None
        whole = len(chunks) <= WHOLE and sum(chunk.numel for chunk in chunks) <= CAPACITY
        kind = kind, tuple(_memory(chunk, g) for chunk, g in zip(chunks, args[0], strict=True)) if whole else None
        tangents = self._tangents()
        fused = self._steady.get(kind) == tangents
        for chunk in chunks:
            chunk.split = chunk.separable and not fused
            chunk.lean = chunk.numel >= BLOCK if not fused else not whole
        if fused and whole:
            compiled(kind, self._advance, *args)
            return
        self.root.run = partial(compiled.stage, kind) if fused else call
        self._advance(*args)
        # Tangents appear step by step, a level takes part once the one below has a hypergradient. To compile each such change of structure
        # would be for nothing: a step is compiled when one of its kind has added nothing.
        if self._tangents() == tangents:
            self._steady[kind] = tangents

    def _tangents(self) -> int:
        return sum(len(tangent) for node in self.nodes.values() for chunk in node.chunks for tangent in chunk.tangents.values())

    def _advance(
        self, gs: list[Tensor], ok: Tensor | None, watched: tuple[str, ...], learn: bool, q: Raw | None, directions: list[Tensor] | None
    ) -> None:
        """The step between gathering and scattering."""
        root = self.root
        if ok is None:
            looks = [root.run(look, root, chunk, g, learn and q is None) for chunk, g in zip(root.chunks, gs, strict=True)]
            ok = guards.finite([total for total, _ in looks], root.resets)
            shares = [share for _, share in looks if share]
            q = combine(root, shares) if shares else q
        ok = ok.to(root.resets)
        root.step(gs, ok, {name: self.last[name] for name in watched}, q=q, learn=learn, directions=directions)
        self.tower["skipped"][0].add_(1 - ok)
        for name, last in self.last.items():
            if name in watched:
                last.lerp_(self.live[name], ok)
            elif name in root.raw:
                last.copy_(self.live[name])

    def _notice(self) -> None:
        """Find the values that a user, or a scheduler, may have assigned: Python can see that without looking at them."""
        for name in self.names:
            mine, value = self.live[name], self.group[name]
            if value is mine and mine._version == self.versions[name]:
                continue
            if name != "lr":
                self.root.kernel = None  # made for values that were known
            if value is not mine:
                mine.copy_(value) if isinstance(value, Tensor) else mine.fill_(value)
                self.group[name] = mine
            # A number outside the domain raises in `check`; a tensor that holds one is not looked at, and ignored.
            low, high = self.spec.domain(name).bounds()
            valid = (mine >= low) & (mine <= high) & mine.isfinite()
            mine.copy_(torch.where(valid, mine, self.last[name]))
            self.watched.add(name)
            self.tower["watched"] = sorted(self.watched)
            self.root.complements[name] = complement(mine)
            if name in self.zeros and bool(mine != 0):
                # It had no place in the state (momentum), nor in the update. The one look at a value, when it is assigned.
                self.zeros.remove(name)
                self.rule = self.root.rule = tree.with_zeros(self.spec.rule, self.zeros)
                self.root.strategy = tree.strategy(self.spec, self.rule)
                self._compiled = self._compiled and Compiled()
                for chunk in self.chunks:
                    chunk.extend(self.rule)

    def saves(self) -> bool:
        """Whether everything this tower needs to go on is held in tensors."""
        return not any(isinstance(node.strategy, Graph) and node.strategy.outputs for node in self.nodes.values())

    def _parts(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters that can be stepped as one: of one device, dtype and step count, with the same things kept for each."""
        parts: dict[Any, list[Tensor]] = {}
        few = self._compiled and sum(p.numel() >= LARGE_FUSED for p in params) < WHOLE
        for p in params:
            record = self.state[p]
            key = (p.device, p.dtype, float(record["t"]) if "t" in record else 0.0, tuple(record))
            if p.numel() >= (LARGE_FUSED if few else LARGE) or not self.rule.elementwise:
                key = (*key, p)
            part = parts.setdefault(key, [])
            if part and sum(q.numel() for q in part) + p.numel() > CAPACITY:
                yield parts.pop(key)
                part = parts.setdefault(key, [])
            part.append(p)
        yield from (part for part in parts.values() if part)


def _memory(chunk: Chunk, g: Tensor) -> Any:
    """Which chunk this is, and how tensors that are not the engine's own lie in memory."""
    return chunk.serial, chunk.direct and (chunk.x().stride(), chunk.x().dtype, g.stride())
