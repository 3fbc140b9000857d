"""The body of a node in operations of torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..feasible import Feasible
from ..guards import FLOOR, Size, is_finite
from ..hyperparameter import Hyperparameters
from ..rule import Rule, interpolated
from ..tangents import Raw, Tangents
from .blocks import Block, blocks, combined
from .buffers import Buffer
from .hypergradient import Hypergradient
from .kernels import Kernel
from .step import EAGER, BlockStep


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a stage of a step as it is."""
    return function(*arguments)


class Eager:
    """The passes over x that a step takes, for every rule and everything learned.

        pull        first pass: is g finite? q = Zᵀg
        measure     how large the step would be
        take        second pass: x', s', Z'

    Large buffers are stepped in blocks, and recompute directions instead of keeping them from `measure` to `take`.

    Args:
        level: of the node.
        rule: of the node.
        hypers: of the node.
        tangents: how Z' is made.
        trust: of the node; None for no limit.
        feasible: the set in which x stays, if there is one.
        kernel: a fused kernel of the rule's direction, if there is one.
        compiled: its code is compiled.
    """

    def __init__(
        self,
        level: int,
        rule: Rule,
        hypers: Hyperparameters,
        tangents: Tangents,
        trust: float | None = None,
        feasible: Feasible | None = None,
        *,
        kernel: Kernel | None = None,
        compiled: bool = False,
    ) -> None:
        self.level, self.rule, self.hypers, self.tangents, self.trust, self.feasible = level, rule, hypers, tangents, trust, feasible
        self.buffers: Sequence[Buffer] = ()  # those that have a gradient in this step
        self.blocks: list[Block] = []
        self.directions: list[Tensor] | None = None
        self.projects = trust is not None and "lr" in tangents.names
        self.block = BlockStep(level, rule, hypers, tangents, trust, feasible, kernel, compiled=compiled)
        self.hypergradient = Hypergradient(rule, hypers, tangents.names, implied=self.block.implied)
        self.arrange(EAGER)

    # ---- at level 0 a step begins and ends with the tensors of the model

    def begin(self, grads: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]] | None, *, maximize: bool) -> list[Tensor]:
        """Gather the gradients of each buffer.

        Args:
            grads: for each buffer those of its tensors.
            directions: for each buffer the displacements of its tensors at lr = 1, downwards, that another optimizer has made.
            maximize: ascend.
        """
        gathered = None
        if directions is not None:
            gathered = [buffer.side_by_side(each) for buffer, each in zip(self.buffers, directions, strict=True)]
        self.directions = gathered
        for buffer in self.buffers:
            buffer.gather()
        return [buffer.gradient(each, maximize) for buffer, each in zip(self.buffers, grads, strict=True)]

    def finite(self, gs: Sequence[Tensor]) -> Tensor:
        """1. if all gradients are finite, 0. otherwise."""
        return is_finite(combined([g.sum().to(self.hypers.like) for g in gs], torch.add, torch.sum))

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
        self.block.kernel = None

    def arrange(self, mode: str, run: Callable[..., Any] = call) -> None:
        """How the next step is run: `mode` is EAGER, WHOLE or STAGES, and `run` calls each stage."""
        self.mode = self.block.mode = mode
        self.run = run

    # ---- the three passes

    def pull(self, gs: Sequence[Tensor], wanted: bool) -> tuple[Tensor | float, Raw]:
        """Whether all gradients are finite, and the hypergradients, if they are wanted and there are tangents."""
        wanted = wanted and self.ready()
        if self.level:
            (buffer,), (g,) = self.buffers, gs
            if self.rule.moved != "x" and self.rule.average:  # what x was cut to, or assigned, the states that it is made of follow
                shift = buffer.tensors[0] - interpolated(self.rule, buffer.state)
                for name in (self.rule.moved, self.rule.average):
                    buffer.state[name].add_(shift)
            self.blocks = [Block(buffer, buffer.tensors[0], g, buffer.state, buffer.tangents, buffer.t + 1)]
            return 1.0, self.hypergradient.combined([self.hypergradient.of(buffer, g)]) if wanted else {}
        looks = [self.run(self.look, buffer, g, wanted) for buffer, g in zip(self.buffers, gs, strict=True)]
        self.blocks = self._blocks(gs)
        total = combined([total.to(self.hypers.like) for total, _ in looks], torch.add, torch.sum)
        shares = [share for _, share in looks if share]
        return is_finite(total), self.hypergradient.combined(shares) if shares else {}

    def look(self, buffer: Buffer, g: Tensor, wanted: bool) -> tuple[Tensor, Raw]:
        """What a step has to know of a gradient before it is taken: Σg, which is finite if g is, and its share of Zᵀg.

        That finite elements near 1e38 can add up to infinity is accepted; the sum is four times as fast as the largest |element|.
        """
        return g.sum(), self.hypergradient.of(buffer, g, split=self.mode == EAGER) if wanted else {}

    def measure(self, r: Raw, ok: Tensor) -> Size | None:
        """How large the step at `r` would be; None where nobody asks."""
        if self.directions is not None:
            self.blocks = self._blocks(self.directions)
        if not self.projects:
            return None
        moves, places = zip(*[self.run(self.block.size, block, r, ok) for block in self.blocks], strict=True)
        like = self.hypers.like
        if self.level:
            return Size(combined(moves, torch.maximum, torch.amax).to(like), self.steps())
        numel = sum(buffer.numel for buffer in self.buffers)
        place = combined(places, torch.hypot, torch.linalg.vector_norm).clamp_min(FLOOR * max(1, numel) ** 0.5)
        return Size((combined(moves, torch.hypot, torch.linalg.vector_norm) / place).to(like), self.steps())

    def take(self, r: Raw, sound: dict[str, Tensor], keep: Tensor, ok: Tensor) -> None:
        """Take the step at `r`: `sound` is 0. for tangents that start again, `keep` a factor on those of lr."""
        if r:
            kept = {name: sound[name] * self.tangents.gamma if name in sound else torch.full_like(ok, self.tangents.gamma) for name in r}
            if "lr" in kept:
                kept["lr"] = kept["lr"] * keep
        else:
            kept = r
        # Where nothing couples the weights they are stepped block by block, so that intermediates are never larger than one.
        if self.feasible is None:
            for block in self.blocks:
                self.run(self.block.write, [block], r, kept, ok)
        else:
            self.run(self.block.write, self.blocks, r, kept, ok)
        for buffer in self.buffers:
            buffer.t += ok
        self.blocks = []

    def ready(self) -> bool:
        """Whether there are tangents."""
        for buffer in self.buffers:
            if buffer.tangents:
                return True
        return False

    def steps(self) -> Tensor:
        """The largest number of steps that a buffer with a gradient has taken."""
        return combined([buffer.t for buffer in self.buffers], torch.maximum, torch.amax).to(self.hypers.like)

    def _blocks(self, gs: Sequence[Tensor]) -> list[Block]:
        split = self.mode == EAGER and self.rule.elementwise and self.feasible is None
        return [block for buffer, g in zip(self.buffers, gs, strict=True) for block in blocks(buffer, g, split=split)]
