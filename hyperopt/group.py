"""One parameter group at work: which tensors are stepped as one, what a user assigned, what survives in a checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from . import compiled, hypergradients, native, step, text, tree
from .domains import complement
from .engine import LARGE, LARGE_FUSED, LARGE_LAUNCHED, Chunk, Record, Scratch
from .hypergradients import Graph
from .rule import check
from .tower import Hyper

FEW = 8  # sets of parameters that have a gradient together, of which the passes are kept


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
        self.compile = compile and spec.strategy != "graph" and compiled.is_right(group["params"])
        self.passes: native.Passes | None = None
        self._scratch: Scratch = {}
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
        if self.compile or self.watched - {"lr"}:
            self.root.kernel = None  # as in `_notice`, so that training goes on bit for bit; fused, no eager step needs its buffer
        for node in self.nodes.values():
            node.resets = self.tower["skipped"][1]
        self._prepare()
        kept = [[self.params[i] for i in part] for part in self.tower.get("chunks", [])]
        # The checkpoint may be of a model whose tensors had other dtypes or were on other devices, and a live optimizer that was
        # taken over has state but no partition.
        mixed = [part for part in kept if len({(p.dtype, p.device) for p in part}) > 1]
        known = {p for part in kept for p in part}
        loose = [p for part in mixed for p in part] + [p for p in self.params if "t" in self.state.get(p, {}) and p not in known]
        parts = [part for part in kept if not any(part is m for m in mixed)]
        parts += self._parts(loose)
        self._partition([self._chunk(part) for part in parts])

    def _prepare(self) -> None:
        """What takes the steps, made anew where the rule has changed."""
        self._stepper = step.Step(self.nodes, self.last, self.tower["skipped"][0], compile=self.compile)
        for node in self.nodes.values() if self.compile else ():
            if node.level:  # not watched for assignment as those of level 0 are, and arguments of compiled code are dear
                held = {n: v for n, v in node.live.items() if n not in node.raw and not v.dim()}
                node.constants = {n: (float(v), float(node.complements[n])) for n, v in held.items()}
        self._native = native.source(self.root, self.params, maximize=self.spec.maximize) if self.compile else None
        self._passes: dict[Any, native.Passes] = {}

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
        return dict.fromkeys(self.spec.learning, (torch.cat(parts), total))

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

    def collect(self) -> bool:
        """Notice what was assigned, choose the chunks that have a gradient, and gather those or take the first pass of a step by hand.

        Returns whether there are any.
        """
        self._notice()
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
        grads = [[p.grad for p in c.tensors if p.grad is not None] for c in self.root.chunks]
        self.passes = self._by_hand([g for gs in grads for g in gs])
        self._gs = [] if self.passes else [c.gradient(gs, self.spec.maximize) for c, gs in zip(self.root.chunks, grads, strict=True)]
        return bool(self.root.chunks)

    def totals(self) -> list[Tensor]:
        """The sums of the gradients, which are finite if those are."""
        return [self.passes.sums[0]] if self.passes else [g.sum() for g in self._gs]

    def _by_hand(self, grads: list[Tensor]) -> native.Passes | None:
        """The passes of a step by hand, of which the first is taken; None where these chunks have none."""
        chunks = self.root.chunks
        if self._native is None or not chunks or not all("lr" in chunk.tangents for chunk in chunks):
            return None
        key = tuple(chunk.serial for chunk in chunks)
        passes = self._passes.get(key)
        if passes is None or not passes.stand():
            functions = native.load(self._native.path)
            if functions is None:
                self._native = None
                return None
            if len(self._passes) >= FEW:
                self._passes.clear()
            passes = self._passes[key] = native.Passes(functions, self._native, self.root, chunks)
        return passes if passes.look(grads) else None

    def hold_out(self, grads: Mapping[Tensor, Tensor | None], key: str) -> None:
        """Keep the hypergradients of another loss for the next step, added to those that are kept already.

        Args:
            grads: its gradient, by parameter; None where it does not depend on one.
            key: where the gradient was taken: "x" for the weights, or the name of the state that stood in their place.
        """
        kept = self.tower.get("held_out")
        shares = [kept] if kept else []
        for chunk in self.chunks:
            found = [torch.zeros_like(p) if grads[p] is None else grads[p] for p in chunk.tensors]
            g = chunk.side_by_side([-a if self.spec.maximize else a for a in found if a is not None])
            shares.append(hypergradients.share(self.root, chunk, g, key))
        self.tower["held_out"] = hypergradients.combine(self.root, shares)

    def step(self, ok: Tensor | None, every: int, directions: Mapping[Tensor, Tensor] | None = None) -> None:
        """Step the tower, with the gradients that `collect` found.

        Args:
            ok: 1. where the step counts; None where these gradients alone decide it.
            every: the levels above 0 step on every `every`-th call.
            directions: for a black box, the displacement of each parameter at lr = 1, downwards.
        """
        self.tower["calls"] += 1
        chunks = [] if self.passes else self.root.chunks
        for chunk in chunks:
            chunk.gather()
        steps = None if directions is None else [c.side_by_side([directions[p] for p in c.tensors]) for c in chunks]
        learn, q = self.tower["calls"] % every == 0, self.tower.pop("held_out", None)
        gs, self._gs = self._gs, []  # not kept: the next backward pass wants their memory
        self._stepper(gs, ok, tuple(sorted(self.watched)), learn, q, steps, self.passes)
        for chunk in chunks:
            chunk.scatter()
        self.versions = {name: value._version for name, value in self.live.items()}

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
            if name != "lr":
                self._passes.clear()
            if name in self.zeros and bool(mine != 0):
                # It had no place in the state (momentum), nor in the update. The one look at a value, when it is assigned.
                self.zeros.remove(name)
                self.rule = self.root.rule = tree.with_zeros(self.spec.rule, self.zeros)
                self.root.strategy = tree.strategy(self.spec, self.rule, 0)
                self._prepare()
                for chunk in self.chunks:
                    chunk.extend(self.rule)

    def saves(self) -> bool:
        """Whether everything this tower needs to go on is held in tensors."""
        return not any(isinstance(node.strategy, Graph) and node.strategy.outputs for node in self.nodes.values())

    def _parts(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters that can be stepped as one: of one device, dtype and step count, with the same things kept for each."""
        parts: dict[Any, list[Tensor]] = {}
        few = self.compile and sum(p.numel() >= LARGE_FUSED for p in params) < step.WHOLE
        for p in params:
            record = self.state[p]
            key = (p.device, p.dtype, float(record["t"]) if "t" in record else 0.0, tuple(record))
            large = LARGE_LAUNCHED if p.device.type != "cpu" else LARGE_FUSED if few else LARGE
            if p.numel() >= large or not self.rule.elementwise:
                key = (*key, p)
            part = parts.setdefault(key, [])
            if part and sum(q.numel() for q in part) + p.numel() > step.CAPACITY:
                yield parts.pop(key)
                part = parts.setdefault(key, [])
            part.append(p)
        yield from (part for part in parts.values() if part)
