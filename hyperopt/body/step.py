"""One block's step: how large it would be, x', s' and Z'."""

from collections.abc import Sequence

from torch import Tensor

from ..feasible import Feasible
from ..hyperparameter import Hyperparameters
from ..rule import Rule, State, Values, interpolated, overrides
from ..tangents import Point, Raw, Tangents
from .arithmetic import Selected, Weighted
from .blocks import Block, norm
from .hypergradient import average_too
from .kernels import Kernel

EAGER, WHOLE, STAGES = "eager", "whole", "stages"  # not compiled; compiled in one piece; each stage compiled for itself


class BlockStep:
    """The step of a node, for one block, or for several that a feasible set couples.

    Args:
        level, rule, hypers, tangents, trust, feasible, kernel, compiled: as for `Eager`.
    """

    def __init__(
        self,
        level: int,
        rule: Rule,
        hypers: Hyperparameters,
        tangents: Tangents,
        trust: float | None,
        feasible: Feasible | None,
        kernel: Kernel | None,
        *,
        compiled: bool,
    ) -> None:
        self.level, self.rule, self.hypers, self.tangents, self.feasible = level, rule, hypers, tangents, feasible
        self.arithmetic = Selected if compiled else Weighted
        self.mode = EAGER
        self.limit = trust if level and "lr" not in tangents.names else None  # on each move, where lr is not there to be projected
        self.updates = overrides(rule, "update")
        self.decays = rule._decays() and not rule._couples()
        plain = not tangents.names and not self.updates and not overrides(rule, "after") and feasible is None
        self.simple = tangents.closed or plain
        self.kernel = kernel if self.simple and not compiled else None
        # At horizon 1 the tangents of the state, which imply those of x, are not kept.
        self.implied = level == 0 and rule.moved != "x" and rule.average is not None and tangents.gamma > 0

    def size(self, block: Block, r: Raw, ok: Tensor) -> tuple[Tensor, Tensor]:
        """How far the step takes that which lr moves, and how large that is."""
        h, place = self.h(block, r), block.state.get(self.rule.moved, block.x)
        if self.updates:
            x1, s1 = self.rule.update(block.x, self.gradient(block, ok), block.state, h, block.t)
            move, lr = s1.get(self.rule.moved, x1) - place, None
        else:
            d, own = self.direction(block, h, ok, lasting=True)
            move, lr = self.rule._step(block.x, d, h, block.t) if self.decays else d, h.lr
            small = self.mode == WHOLE or (self.mode == EAGER and block.buffer.numel < block.buffer.block)
            if self.tangents.fixed and (self.kernel or small):
                block.made = d, own
        if lr is not None and lr.dim():
            move, lr = move * lr, None
        size = move.abs().amax() if self.level else norm(move)
        return size if lr is None else size * lr, place if self.level else norm(place)

    def write(self, batch: list[Block], r: Raw, kept: Raw, ok: Tensor) -> None:
        """x', s' and Z' of some blocks."""
        if self.simple:
            self.displace(batch[0], r, kept, ok)
            return
        for block in batch:
            for tangent in block.tangents.values():
                for z in tangent.values():
                    self.arithmetic.restart(z)
            if self.tangents.fixed and not block.made:
                block.made = self.direction(block, self.h(block, r), ok)

        points = [(block.x, average_too(self.rule, block)) for block in batch]
        views, news = batch[0].cut is not None, []
        found: list[dict[str, dict[str, Tensor]]] = [{} for _ in batch]
        for name in r:
            carried: list[dict[str, Tensor]] = [{} for _ in batch]
            if self.tangents.gamma:
                carried = [{k: z * block.factor(name, kept[name], z) for k, z in block.tangents.get(name, {}).items()} for block in batch]
            news, tangents = self.tangents.along(name, points, carried, r, lambda p, r: self.update(batch, p, r, ok), views=views)
            for mine, new in zip(found, tangents, strict=True):
                mine[name] = new
        for block, new, tangent in zip(batch, news if r else self.update(batch, points, r, ok), found, strict=True):
            self.commit(block, *new, tangent, ok)

    def displace(self, block: Block, r: Raw, kept: Raw, ok: Tensor) -> None:
        """x −= lr·step, in place, and in closed form the tangent of log lr, which moves along.

        The displacement is lr·step and not x' − x: at lr = 1e-8 a float32 weight of 0.1 does not change, and the difference would be 0
        where the derivative is not.
        """
        h = self.h(block, r)
        d, own = block.made or self.direction(block, h, ok)
        step = self.rule._step(block.x, d, h, block.t) if self.decays else d
        x = None
        if r:
            z, keep = block.tangent("lr", "x", step), block.factor("lr", kept["lr"], step)
            self.arithmetic.restart(z)
            if self.decays:
                keep = keep * (1 - h.lr * self.rule._decay(h, block.t))
            self.arithmetic.displace(block.x, z, step, h.lr, keep, ok.to(block.t))
        else:
            move = step * -h.lr
            move = move if self.limit is None else move.clamp(-self.limit, self.limit)
            if self.arithmetic is Weighted:
                block.x.add_(move * ok.to(block.t))  # at lr = 1e-8 too
            else:
                x = block.x + move
        self.commit(block, x, own, {}, ok)

    def update(self, batch: Sequence[Block], points: Sequence[Point], r: Raw, ok: Tensor) -> list[Point]:
        """The new points, as a differentiable function; inside the feasible set."""
        hs = [self.h(block, r) for block in batch]
        arrived = [self.arrive(block, *point, h, ok) for block, point, h in zip(batch, points, hs, strict=True)]
        if self.feasible is not None:
            metrics = [self.rule.metric(state, h, block.t) for block, (_, state), h in zip(batch, arrived, hs, strict=True)]
            places = self.feasible.project([place for place, _ in arrived], metrics)
            arrived = [(place, state) for place, (_, state) in zip(places, arrived, strict=True)]
        if self.updates:
            return arrived
        return [self.rule.after(*each, h, block.t) for block, each, h in zip(batch, arrived, hs, strict=True)]

    def arrive(self, block: Block, x: Tensor, state: State, h: Values, ok: Tensor) -> Point:
        """Where the step takes that which lr moves, and the state on the way."""
        start = state.get(self.rule.moved, x)
        if self.updates:
            place, state = self.rule.update(x, self.gradient(block, ok), state, h, block.t)
            place = state.get(self.rule.moved, place)
        else:
            if self.implied and self.decays:
                x = interpolated(self.rule, state)  # with its tangents
            if block.made:
                d, own = block.made
                place, state = start - h.lr * self.rule._step(x, d, h, block.t), {**state, **own}
            else:
                place, state = self.rule._arrive(x, self.gradient(block, ok), state, h, block.t)
        return (place if self.limit is None else start + (place - start).clamp(-self.limit, self.limit)), state

    def direction(self, block: Block, h: Values, ok: Tensor, *, lasting: bool = False) -> Point:
        """The direction, finite where the step does not count, and the new state, if that is not written yet."""
        # A kernel goes through memory as it lies.
        if self.kernel and all(a.is_contiguous() for a in (block.x, block.g, *block.state.values())):
            move = self.kernel.scratch(block.x, block.buffer, block.cut, lasting=lasting)
            self.kernel(move, block.g, block.state, block.t, 1 - ok)
            return move, {}
        g = self.gradient(block, ok)
        if self.rule._couples():
            g = g + self.rule._decay(h, block.t) * block.x
        return self.rule.direction(g, block.state, h, block.t)

    def gradient(self, block: Block, ok: Tensor) -> Tensor:
        """The gradient to compute with; above level 0 it is finite."""
        return block.g if self.level else self.arithmetic.gradient(block.g, ok)

    def commit(self, block: Block, x: Tensor | None, state: State, tangents: dict[str, dict[str, Tensor]], ok: Tensor) -> None:
        """Write what a step made; x is None if it is written already."""
        write, ok = self.arithmetic.write, ok.to(block.t)
        if x is not None:
            write(block.x, x, ok)
        if block.buffer.limits is not None:
            block.x.clamp_(*block.buffer.limits)
        for key, new in state.items():
            if key in block.state:
                # Numbers are written to the buffer itself, by every block the same.
                write(block.state[key] if new.dim() else block.buffer.state[key], new, ok)
        for name, tangent in tangents.items():
            for of, new in tangent.items():
                if of != "x" or not self.implied:
                    write(block.tangent(name, of, new), new, ok)

    def h(self, block: Block, r: Raw) -> Values:
        """The hyperparameters at `r`, spread over the coordinates of a block where they differ there."""
        t, known = block.t, self.hypers.like
        plain = not block.buffer.positions and t.dtype == known.dtype and t.device == known.device
        return self.hypers.values(r, None if plain else block.spread)
