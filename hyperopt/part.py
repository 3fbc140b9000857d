"""What is stepped at once: a chunk, or a block of a large one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rule import State

if TYPE_CHECKING:
    from .engine import Chunk


class Part:
    """A chunk, or a block of a large one, during one step.

    Args:
        chunk: that it belongs to.
        x, g: weights and gradient.
        state, tangents: views of the chunk's buffers; numbers that all blocks read are copies.
        t: the number of this step.
        ok, skip: 1. and 0. if the step counts, 0. and 1. if not.
        cut: which elements of the flattened chunk these are, None for all.
        clean: g is finite whatever `ok` is.
    """

    made: Any = None  # what was computed on the way, where that is small enough to keep

    def __init__(
        self,
        chunk: "Chunk",
        x: Tensor,
        g: Tensor,
        state: State,
        tangents: dict[str, dict[str, Tensor]],
        t: Tensor,
        ok: Tensor,
        skip: Tensor,
        cut: slice | None = None,
        *,
        clean: bool = False,
    ) -> None:
        self.chunk, self.x, self.g, self.state, self.tangents = chunk, x, g, state, tangents
        self.t, self.ok, self.skip, self.cut = t, ok, skip, cut
        self._clean = g if clean else None

    def gradient(self) -> Tensor:
        """The gradient, in eager mode 0 all over where the step does not count: see `_write`."""
        if torch.compiler.is_compiling():
            return self.g
        g = self._clean
        if g is None:
            g = self.g.nan_to_num(0.0, 0.0, 0.0).mul_(self.ok)
            if not self.chunk.lean:
                self._clean = g
        return g

    def scratch(self, *, lasting: bool) -> Tensor:
        """Zeros shaped like x, in a buffer of the chunk that lasts until the end of the step, or until the next part is taken."""
        return self.chunk.scratch(self.x, self.cut, lasting=lasting).zero_()

    def spread(self, name: str, value: Tensor) -> Tensor:
        """A hyperparameter for every coordinate, on the device and in the dtype of the chunk."""
        return self.chunk.spread(name, value, self.cut)

    def tangent(self, name: str, of: str, like: Tensor) -> Tensor:
        """The buffer of a tangent, shaped like `like`, zero where there was none."""
        buffer = self.chunk.tangent(name, of, like)
        return buffer if self.cut is None or not like.dim() else buffer.view(-1)[self.cut]

    def clean_tangents(self) -> None:
        """Set the elements of tangents that are not finite to zero, so that they start again."""
        for tangent in self.tangents.values():
            for z in tangent.values():
                if torch.compiler.is_compiling():
                    z.copy_(torch.where(z.abs() <= torch.finfo(z.dtype).max, z, 0.0))  # of nan_to_num it makes a loop without vectors
                else:
                    z.nan_to_num_(0.0, 0.0, 0.0)

    def displace(self, name: str, along: Tensor, size: Tensor, kept: Tensor) -> None:
        """x += size·along, and for the tangent of x along a hyperparameter z = kept·z + size·along."""
        z = self.tangent(name, "x", along)
        if torch.compiler.is_compiling():
            z.copy_(torch.where(self.ok > 0, torch.addcmul(kept * z, along, size), z))
            self.x.copy_(torch.where(self.ok > 0, torch.addcmul(self.x, along, size), self.x))
        else:
            size = size * self.ok
            z.mul_(torch.addcmul(self.skip, kept, self.ok)).addcmul_(along, size)
            self.x.addcmul_(along, size)

    def commit(self, x: Tensor | None, state: State, tangents: dict[str, dict[str, Tensor]]) -> None:
        """Write what a step made, where ok is 1.; where it is 0. everything keeps its bits. x is None if it is written already."""
        if x is not None:
            _write(self.x, x, self.ok)
        if self.chunk.limits is not None:
            self.x.clamp_(*self.chunk.limits)
        for key, new in state.items():
            # Numbers are written to the chunk itself, by every block the same.
            _write(self.state[key] if new.dim() else self.chunk.state[key], new, self.ok)
        for name, tangent in tangents.items():
            for of, new in tangent.items():
                _write(self.tangent(name, of, new), new, self.ok)


def _write(buffer: Tensor, new: Tensor, ok: Tensor) -> None:
    # Eagerly a weight of 0 or 1 takes a third of the time of `where`, but 0·inf would be no weight: gradients are cleaned for it.
    # Fused, `where` costs nothing, and cleaning is left out.
    if torch.compiler.is_compiling():
        buffer.copy_(torch.where(ok > 0, new, buffer))
    else:
        buffer.lerp_(new, ok)
