"""The body of a node in operations of torch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..guards import FLOOR, Size, is_finite
from ..hyperparameter import Raw
from ..rule import State, Values, overrides
from ..tangents import Point
from . import general
from .arithmetic import OnHost, Selected
from .blocks import Block, blocks, combined, length
from .buffers import Buffer, Tangent
from .hypergradient import Hypergradient
from .kernels import Kernel
from .part import EAGER, WHOLE, Part


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a stage of a step as it is."""
    return function(*arguments)


class Eager:
    """The passes over x that a step takes, for every rule and everything learned. Sums over sharded weights are over all ranks.

        pull        first pass: is g finite? q = Zᵀg
        measure     how large the step would be
        take        second pass: x', s', Z'

    Large buffers are stepped in blocks, and recompute directions instead of keeping them from `measure` to `take`.

    Args:
        part: what the node does.
        kernel: a fused kernel of the rule's direction, if there is one.
    """

    def __init__(self, part: Part, kernel: Kernel | None = None) -> None:
        self.level, self.rule, self.hypers, self.tangents, self.ranks = part.level, part.rule, part.hypers, part.tangents, part.ranks
        self.trust, self.feasible, self.arithmetic = (
            part.trust,
            part.feasible,
            Selected if part.compiled or not self.hypers.like.is_cpu else OnHost,
        )
        self.buffers: Sequence[Buffer] = ()  # those that have a gradient in this step
        self.blocks: list[Block] = []
        self.directions: list[Tensor] | None = None
        self.total: Tensor | None = None  # the number that the rule asks for of all weights
        self.arrange(EAGER)
        rule, learned = part.rule, self.tangents.names
        self.projects = part.trust is not None and "lr" in learned
        self.limit = part.trust if part.level and not self.projects else None  # on each move, where lr is not there to be projected
        self.updates, self.couples = overrides(rule, "update"), rule._couples()
        plain = not learned and not self.updates and not overrides(rule, "after") and part.feasible is None
        self.simple = self.tangents.closed or plain  # x and Z move in place
        self.kernel = kernel if self.simple and not part.compiled else None
        self.hypergradient = Hypergradient(rule, part.hypers, part.tangents.gamma, learned, part.level)

    def begin(self, grads: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]] | None, *, maximize: bool) -> list[Tensor]:
        """Gather the gradients of the tensors of each buffer, and the displacements at lr = 1 that another optimizer has made, if any."""
        self.directions = None
        if directions is not None:
            self.directions = [buffer.side_by_side(each) for buffer, each in zip(self.buffers, directions, strict=True)]
        for buffer in self.buffers:
            buffer.gather()
            if buffer.edits is not None:
                buffer.edits.begin()
        return [buffer.gradient(each, maximize) for buffer, each in zip(self.buffers, grads, strict=True)]

    def finite(self, gs: Sequence[Tensor]) -> Tensor:
        """1. if all gradients are finite, 0. otherwise."""
        return is_finite(*self.ranks.sum([combined([self.arithmetic.gauge(g).to(self.hypers.like) for g in gs], torch.add, torch.sum)]))

    def finish(self) -> None:
        """Copy the weights back to where they belong."""
        for buffer in self.buffers:
            buffer.scatter()
        self.directions = None

    def kind(self) -> Any:
        """What compiled code must know of this step beside the shapes of its arguments."""
        return self.directions is None

    def changed(self) -> None:
        """The value of a held hyperparameter was changed: the kernel was made for the one before."""
        self.kernel = None

    def arrange(self, mode: str, run: Callable[..., Any] = call) -> None:
        """How the next step is run: `mode` is EAGER, WHOLE or STAGES, and `run` calls each stage."""
        self.mode, self.run = mode, run

    def pull(self, gs: Sequence[Tensor], wanted: bool) -> tuple[Tensor | None, Raw]:
        """1. if all gradients are finite (None: they are known to be); the hypergradients, where they are wanted."""
        wanted = wanted and bool(self.tangents.names)
        if self.level:
            (buffer,), (g,) = self.buffers, gs
            x = buffer.tensors[0]
            if self.arithmetic is Selected or not self.blocks:
                self.blocks = [Block(buffer, x, g, buffer.state, buffer.tangents, buffer.t)]
            block = self.blocks[0]  # above level 0 it is always the same one
            block.g, block.t, block.made = g, buffer.t + 1, None
            self.total = self.rule.total(g, x, buffer.state) if self.rule.totals else None
            return None, self.hypergradient.combined([self.hypergradient.of(buffer, g)]) if wanted else {}
        looks = [self.run(self.look, buffer, g, wanted) for buffer, g in zip(self.buffers, gs, strict=True)]
        numbers, shares = zip(*looks, strict=True)
        self.blocks = self._blocks([self.arithmetic.bounded(g, first) for g, (first, *_) in zip(gs, numbers, strict=True)])
        sums = [combined([n.to(self.hypers.like) for n in each], torch.add, torch.sum) for each in zip(*numbers, strict=True)]
        q = self.hypergradient.combined(shares) if wanted else {}
        sums = self.ranks.sum([*sums, *q.values()])
        self.total = sums.pop(1) if self.rule.totals else None
        return is_finite(sums[0]), dict(zip(q, sums[1:], strict=True))

    def look(self, buffer: Buffer, g: Tensor, wanted: bool) -> tuple[list[Tensor], Raw]:
        """What a step has to know of a gradient before it is taken: whether it is finite, what the rule asks for, and Zᵀg."""
        numbers, split = [self.arithmetic.gauge(g)], self.mode == EAGER
        if self.rule.totals:
            found = [self.rule.total(block.g, block.x, block.state) for block in blocks(buffer, g, split=split)]
            numbers.append(buffer.share * combined(found, torch.add, torch.sum))
        return numbers, self.hypergradient.of(buffer, g, split=split) if wanted else {}

    def measure(self, r: Raw, ok: Tensor) -> Size | None:
        """How large the step at `r` would be; None where nobody asks."""
        if self.directions is not None:
            self.blocks = self._blocks(self.directions)
        if not self.projects:
            return None
        moves, places = zip(*[self.run(self.size, block, r, ok) for block in self.blocks], strict=True)
        if self.level:
            return Size(combined(moves, torch.maximum, torch.amax).to(self.hypers.like), self.steps())
        move, place = self.ranks.norms([combined(each, torch.hypot, length) for each in (moves, places)])
        return Size((move / place.clamp_min(self.floor())).to(self.hypers.like), self.steps())

    def size(self, block: Block, r: Raw, ok: Tensor) -> tuple[Tensor, Tensor]:
        """How far the step takes that which lr moves, and how large that is."""
        h, place = self.h(block, r), self.rule.place(block.x, block.state)
        if self.updates:
            x1, _ = block.buffer.rule.update(block.x, self.gradient(block), block.state, h, block.t)
            move, lr = x1 - place, None
        else:
            d, own = self.direction(block, h, ok, lasting=True)
            move, lr = block.buffer.rule._step(block.x, d, h, block.t), h.lr
            dear = self.kernel or self.mode == WHOLE or not block.buffer.rule.elementwise  # products of matrices, or at hand anyway
            if self.tangents.fixed and (dear or (self.mode == EAGER and block.buffer.numel < block.buffer.block)):
                block.made = d, own
        if lr is not None and lr.dim():
            move, lr = move * lr, None
        size = move.abs().amax() if self.level else self.arithmetic.norm(move, block.buffer.share)
        return size if lr is None else size * lr, place if self.level else self.arithmetic.norm(place, block.buffer.share)

    def take(self, r: Raw, sound: Raw, keep: Tensor | None, ok: Tensor) -> None:
        """Take the step at `r`: `sound` is 0. for tangents that start again, `keep` a factor on those of lr."""
        kept = {name: sound.get(name, torch.ones_like(ok)) * self.tangents.gamma[name] for name in r}
        if keep is not None:
            kept["lr"] = kept["lr"] * keep
        # Where nothing couples the weights they are stepped block by block, so that intermediates are never larger than one.
        for block in self.blocks if self.feasible is None else ():
            self.run(self.displace if self.simple else self.write, block, r, kept, ok)
        if self.feasible is not None:
            self.run(general.write, self, self.blocks, r, kept, ok)
        for buffer in self.buffers:
            buffer.t += ok
        self.blocks = self.blocks if self.level else []

    def write(self, block: Block, r: Raw, kept: Raw, ok: Tensor) -> None:
        """x', s' and Z' of one block."""
        general.write(self, [block], r, kept, ok)

    def displace(self, block: Block, r: Raw, kept: Raw, ok: Tensor) -> None:
        """x −= lr·step, in place, and in closed form the tangent of log lr, which moves along.

        The displacement is lr·step and not x' − x: at lr = 1e-8 a float32 weight of 0.1 does not change, and the difference would be 0
        where the derivative is not.
        """
        h, counts = self.h(block, r), self.arithmetic.counts(ok, block.t)
        d, own = block.made or self.direction(block, h, ok)
        rule = block.buffer.rule
        step = rule._step(block.x, d, h, block.t)
        if r:
            z, keep = block.tangent("lr", "x", step), block.factor("lr", kept["lr"], step)
            if rule._decays():
                decay = h.lr * rule._decay(h, block.t)
                decay = decay * (block.x.abs() <= most) if (most := rule._decay_bound()) < math.inf else decay
                keep = keep * (1 - (decay * (step * block.x >= 0) if rule.cautious else decay))
            self.arithmetic.displace(block.x, z, step, h.lr, keep, counts)
        else:
            move = step * h.lr
            move = move if self.limit is None else move.clamp(-self.limit, self.limit)
            self.arithmetic.descend(block.x, move, counts)
        self.commit(block, None, own, {}, ok)

    def direction(self, block: Block, h: Values, ok: Tensor, *, lasting: bool = False) -> Point:
        """The direction, and the new state, if that is not written yet."""
        g = self.gradient(block)
        # A kernel goes through memory as it lies.
        if self.kernel and all(a.is_contiguous() for a in (block.x, g, *block.state.values())):
            move = self.kernel.scratch(block.x, block.buffer, block.cut, lasting=lasting)
            self.kernel(move, g, block.state, block.t, 1 - ok)
            return move, {}
        if self.couples:
            g = g + self.rule._decay(h, block.t) * block.x
        return block.buffer.rule.direction(g, block.state, h, block.t)

    def gradient(self, block: Block) -> Tensor:
        """The gradient to compute with; above level 0 it is finite, and bounded."""
        return block.g if self.level else self.arithmetic.gradient(block.g)

    def commit(self, block: Block, x: Tensor | None, state: State, tangents: Tangent, ok: Tensor) -> None:
        """Write what a step made; x is None if it is written already."""
        write, counts = self.arithmetic.write, self.arithmetic.counts(ok, block.t)
        if x is not None:
            write(block.x, x, counts)
        if block.buffer.limits is not None:
            block.x.clamp_(*block.buffer.limits)
        for key, new in state.items():
            if key in block.state:
                # Numbers are written to the buffer itself, by every block the same.
                write(block.state[key] if new.dim() else block.buffer.state[key], new, counts)
        for name, tangent in tangents.items():
            for of, new in tangent.items():
                write(block.tangent(name, of, new), new, counts)

    def h(self, block: Block, r: Raw) -> Values:
        """The hyperparameters at `r`, spread over the coordinates of a block where they differ there."""
        t, known = block.t, self.hypers.like
        plain = not block.buffer.positions and t.dtype == known.dtype and t.device == known.device
        h = self.hypers.values(r, None if plain else block.spread)
        if self.total is not None:  # finite, since a step that does not count is written with weight 0
            vars(h)["total"] = self.total.nan_to_num(0.0, 0.0, 0.0).to(t)
        return h

    def steps(self) -> Tensor:
        """The largest number of steps that a buffer with a gradient has taken."""
        if len(self.buffers) == 1:
            return self.buffers[0].t.to(self.hypers.like)
        return combined([buffer.t for buffer in self.buffers], torch.maximum, torch.amax).to(self.hypers.like)

    def floor(self) -> float:
        """The least norm that the weights count as."""
        return FLOOR * max(1, sum(buffer.total for buffer in self.buffers)) ** 0.5

    def _blocks(self, gs: Sequence[Tensor]) -> list[Block]:
        split = self.mode == EAGER and self.feasible is None
        pairs = zip(self.buffers, gs, strict=True)
        return [block for buffer, g in pairs for block in blocks(buffer, g, split=split and buffer.rule.elementwise)]
