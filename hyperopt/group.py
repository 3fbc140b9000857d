"""One parameter group at work: which tensors are stepped as one, what a user assigned, what survives in a checkpoint."""

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import distributed, rebuild
from .body import choose
from .body.buffers import Buffer, Record
from .body.compiled import is_right
from .body.shards import local
from .checkpoint import FORMAT
from .hyperparameter import Hyperparameter
from .param_group import check_step, sizes
from .rebuild import Origin
from .roles import ENTRIES, Role, settle
from .rule import Rule
from .schedule import Overwritten, Schedule, expanded
from .spec import text
from .spec.level import Level
from .tangents import DUALS
from .tree import Tree, with_zeros


class Group:
    """One parameter group and the tower that trains it.

    Everything that must survive is kept in `group` and `state` as tensors and plain values; this object can be built again from them at
    any time.

    Args:
        spec: the tower.
        group: the parameter group of the optimizer; its "tower" entry holds the levels above 0.
        state: the optimizer's state, by parameter.
        compile: fuse the tower's step.
        schedule: the lr in `group` is a scheduler's, and scales the one that is learned.
    """

    def __init__(
        self, spec: Level, group: dict[str, Any], state: MutableMapping[Tensor, Record], *, compile: bool = False, schedule: bool = False
    ) -> None:
        self.set = group.setdefault("project", None)
        if self.set is not None:
            spec = spec.inside(text.read_set(str(self.set)))
        self.spec, self.group, self.state = spec, group, state
        self.params: list[Tensor] = list(group["params"])
        self.roles: dict[Tensor, Role] = {} if spec.rule.elementwise else settle(group, spec.rule.parts)
        self.said = {entry: group.get(entry) for entry in ENTRIES} if self.roles else {}
        self.device = self.params[0].device
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        self.names = list(spec.rule.declared())
        self.scheduled = schedule and "lr" in spec.learning  # a held lr is the scheduler's in any case
        self.sizes = sizes(spec, self.params)
        self.entries = {**self.sizes, "lr": None} if self.scheduled else self.sizes  # how many values are in `group`
        self.live: dict[str, Tensor] = {}  # what stands in `group`: another object for each value, with the same memory
        self.buffers: list[Buffer] = []
        self._young = False  # whether there are buffers that have not taken a step
        self.check()
        distributed.check(self.params, spec)
        fresh = {"format": FORMAT, "structure": spec.structure(), "calls": 0, "last": {}, "nodes": {}, "watched": []}
        self.tower: dict[str, Any] = group.setdefault("tower", fresh)
        self.tower["shapes"] = [list(p.shape) for p in self.params]
        self.tower["skipped"] = [self._to(count).clone() for count in self.tower.get("skipped", torch.zeros(2))]
        self.watch = Overwritten(self.tower["last"], self.device) if "lr" in spec.learning else None
        self.compile = compile and spec.strategy != "graph" and is_right(group["params"])
        self.one = torch.ones((), dtype=self.dtype, device=self.device)
        self._build()

    @torch.no_grad()
    def _build(self) -> None:
        last: dict[str, Tensor] = self.tower["last"]
        for name in self.names:
            if name not in self.live:
                value = self._to(torch.as_tensor(self.group[name], dtype=self.dtype)).detach().clone()
                self.live[name] = self.group[name] = expanded(value, self.entries[name])
            last[name] = self._to(last.get(name, self.live[name].clone()))
        learned = self.spec.learning
        values = {name: live.detach() for name, live in self.live.items()}
        rule, domain = self.spec.rule, self.spec.domain
        own = {n: Hyperparameter(domain(n), values[n], learned=n in learned, rule=rule, name=n, last_value=last[n]) for n in self.names}
        if self.scheduled:
            self.watch = Schedule(self.group, self.live["lr"], domain("lr"), self.sizes["lr"], rule)
            own["lr"] = self.watch.lr
        self.places, self.versions = values, {name: value._version for name, value in self.live.items()}
        # A hyperparameter that is held at 0 from the start is left out of state and update; once it was used it stays in.
        zeros = self.tower.get("zeros", [name for name in self.names if name not in learned])
        self.zeros = self.tower["zeros"] = [name for name in zeros if not self.live[name].any()]
        self.rule = with_zeros(self.spec.rule, self.zeros)
        self.tree = Tree(self.spec, self.rule, own, self.tower["nodes"], self.params, self.tower["skipped"], compile=self.compile)
        self.nodes, self.root = self.tree.nodes, self.tree.root
        self.body, self.hypers = self.root.body, self.root.hypers
        self.duals = nullcontext() if all(node.body.simple for node in self.nodes.values()) else DUALS
        self._step = choose.Runner(self.root.step, self.body, self.tree.tangents) if self.compile else self.root.step
        # Values assigned before a copy was made, or before a checkpoint was written, are still to be noticed.
        differ = {n for n, h in own.items() if h.last_value is not None and not torch.equal(self.live[n], last[n])}
        for name in differ | set(self.tower.get("watched", [])):
            self._changed(name)
        kept = [[self.params[i] for i in part] for part in self.tower.get("chunks", [])]
        # The checkpoint may be of a model whose tensors had other dtypes or were on other devices or ranks, and a live optimizer that
        # was taken over has state but no partition.
        mixed = [part for part in kept if len({(p.dtype, p.device, self.body.ranks.share(p)) for p in part}) > 1]
        known = {p for part in kept for p in part}
        loose = [p for part in mixed for p in part] + [p for p in self.params if "t" in self.state.get(p, {}) and p not in known]
        parts = [part for part in kept if not any(part is m for m in mixed)]
        parts += choose.parts(loose, self.state, self._serving, self.body.ranks, compile=self.compile)
        self._partition([self._buffer(part) for part in parts])

    def _to(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=self.dtype)

    def _buffer(self, params: list[Tensor]) -> Buffer:
        positions = choose.spread(params, self.params, self.spec)
        share, rule = self.body.ranks.share(params[0]), self._serving(params[0])
        return Buffer(params, [self.state[p] for p in params], rule, positions, share=share)

    def _serving(self, p: Tensor) -> Rule:
        """The rule as it steps one tensor, and those of the same role."""
        return self.rule.serving(self.roles[p]) if p in self.roles else self.rule

    def _partition(self, buffers: list[Buffer]) -> None:
        # Kept with the state, as sums over other buffers would differ in the last bit.
        self.buffers = buffers
        index = {p: i for i, p in enumerate(self.params)}
        self.tower["chunks"] = [[index[p] for p in buffer.tensors] for buffer in buffers]
        self.origin = Origin(self.group, self.state)

    def current(self, tower: Level, group: dict[str, Any], state: MutableMapping[Tensor, Record], **how: bool) -> "Group":
        """This group; if parameters or state were replaced since it was built, another one that goes on with them."""
        if self.origin.holds(group, state):
            return self
        return Group(tower, rebuild.fitting(self, group, state), state, **how)

    def check(self) -> None:
        """Raise if a step cannot be taken, before anything is changed."""
        if "momentum" in self.group and "momentum" not in self.names:  # written by a scheduler that cycles it
            self.group["beta1"] = self.group.pop("momentum")
        usual = self.group["project"] == self.set and "betas" not in self.group
        for p in self.params:
            usual = usual and (p.grad is None or p.grad.layout == torch.strided)
        for name, value in (*self.live.items(), *self.said.items()):
            usual = usual and self.group.get(name) is value
        if self.live and usual:
            return
        check_step(self.group, self.spec, self.entries, self.set, self.said, self.dtype)

    def collect(self, directions: Mapping[Tensor, Tensor] | None = None) -> bool:
        """Notice what was assigned, choose the buffers that have a gradient, and begin the step with them.

        Args:
            directions: for a black box, the displacement of each parameter at lr = 1, downwards.

        Returns:
            Whether there are any.
        """
        self._notice()
        fresh, mixed, active = [p for p in self.origin.stateless if p.grad is not None], [], []
        for buffer in self.buffers:
            missing = 0
            for p in buffer.tensors:
                missing += p.grad is None
            if not missing:
                active.append(buffer)
            elif missing < len(buffer.tensors):
                mixed.append(buffer)
        if fresh or mixed:
            active = self._split(fresh, mixed)
        self.body.buffers = active
        if not active:
            return False
        grads: Any = [[p.grad for p in buffer.tensors] for buffer in active]
        given = None if directions is None else [[directions[p] for p in buffer.tensors] for buffer in active]
        self._gs = self.body.begin(grads, given, maximize=self.spec.maximize)
        return True

    def _split(self, fresh: Sequence[Tensor], mixed: Sequence[Buffer]) -> list[Buffer]:
        """Make buffers of parameters that have a gradient for the first time, and two of each of which only a part has one now."""
        self._young = bool(fresh)
        for p in fresh:
            self.state[p] = {}
        # From now on the two halves of a mixed buffer have different step counts.
        halves = [[p for p in b.tensors if (p.grad is None) == absent] for b in mixed for absent in (True, False)]
        kept = [b for b in self.buffers if b not in mixed]
        new = [*halves, *choose.parts(fresh, self.state, self._serving, self.body.ranks, compile=self.compile)]
        self._partition(kept + [self._buffer(part) for part in new])
        return [b for b in self.buffers if b.tensors[0].grad is not None]

    def finite(self) -> Tensor:
        """1. if the gradients of this group are finite."""
        return self.body.finite(self._gs)

    def step(self, ok: Tensor | None, every: int) -> None:
        """Step the tower, with the gradients that `collect` found.

        Args:
            ok: 1. where the step counts as far as the other groups are concerned; None where there are none.
            every: the levels above 0 step on every `every`-th call.
        """
        self.tower["calls"] += 1
        learn, q = self.tower["calls"] % every == 0, self.tower.pop("held_out", None)
        gs, self._gs = self._gs, []  # not kept: the next backward pass needs their memory
        with self.duals:
            if self._young:
                self._young = False
                self.tree.make_tangents(gs, torch.zeros_like(self.one))
            self._step(gs, self.one if ok is None else ok.to(self.one), q, learn)
        self.body.finish()
        if self.tower["calls"] == 1:  # with tangents that are still 0 nothing was said of the values
            for node in self.nodes.values():
                node.q = {}
        self.versions |= {name: value._version for name, value in self.live.items()}
        self.origin.note()

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """The weights of each tensor with those to evaluate it with, where the rule averages."""
        for buffer in self.buffers:
            buffer.follow()
        self.origin.note()  # a buffer may have begun to keep a copy of its weights
        states = [(local(p).detach(), self.state.get(p, {})) for p in self.params if self.rule.averages]
        return [(x, self.rule.average(x + s["rest"] if "rest" in s else x, s)) for x, s in states if "t" in s]

    def _notice(self) -> None:
        """Find the values that a user, or a scheduler, may have assigned: Python can see that without looking at them."""
        for name, mine in self.live.items():
            value, watch = self.group[name], self.watch if name == "lr" else None
            if value is mine and mine._version == self.versions[name]:
                if watch is not None:
                    watch.unwritten()
                continue
            if value is not mine:
                mine.data = mine.clone()  # whoever has kept it can put it back: it is what it was
                mine = self.live[name] = self.places[name].detach()
                mine.copy_(value) if isinstance(value, Tensor) else mine.fill_(value)
                self.group[name] = mine
            if watch is not None and watch.written(mine):
                continue
            self._changed(name)
            if name in self.zeros and bool(mine != 0):
                # It had no place in the state (momentum), nor in the update. The one look at a value, when it is assigned.
                self._build()

    def _changed(self, name: str) -> None:
        """A value may have been assigned."""
        self.hypers.notice(name)
        self.tower["watched"] = list(self.hypers.watched)
        if name != "lr":
            self.body.changed()
