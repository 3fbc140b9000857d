"""One step of a parameter group: by hand, fused in one piece, fused stage by stage, or as it is."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import guards
from .compiled import Compiled
from .engine import Chunk
from .hypergradients import Raw, combine, look
from .native import Passes
from .optimizable import Optimizable, call

CAPACITY = 2**22  # elements gathered into one chunk at most
# Chunks up to which a step is compiled in one piece: 12 take half a minute, and what is made for all of them is in memory at once.
WHOLE = 3


class Step:
    """Takes the steps of a tower whose tensors and gradients are gathered, or looked at by the first pass of a step by hand.

    Args:
        nodes: of the tower, by their labels.
        last: the values of level 0 that were written last.
        skipped: how many steps did not count.
        compile: fuse them.
    """

    def __init__(self, nodes: dict[str, Optimizable], last: dict[str, Tensor], skipped: Tensor, *, compile: bool) -> None:
        self.root, self.nodes, self.last, self.skipped = nodes["0"], nodes, last, skipped
        self.compiled = Compiled() if compile else None
        self._steady: dict[Any, int] = {}  # kinds of steps that add no tangents where there are this many

    def __call__(
        self,
        gs: list[Tensor],
        ok: Tensor | None,
        watched: tuple[str, ...],
        learn: bool,
        q: Raw | None,
        directions: list[Tensor] | None,
        passes: Passes | None,
    ) -> None:
        """Take one.

        Args:
            gs: the gradient of each chunk of the root; not looked at where there are `passes`.
            ok: 1. where the step counts; None where these gradients alone decide it.
            watched: the hyperparameters that a user may have assigned.
            learn: let the levels above step too.
            q: hypergradients to learn from in place of those of this gradient.
            directions: for a black box, the displacement of each chunk at lr = 1, downwards.
            passes: what takes the step by hand, after its first pass.
        """
        chunks = self.root.chunks
        numel = sum(chunk.numel for chunk in chunks)
        kind = watched, learn, q is None, ok is None, len(chunks), numel
        if passes is not None:
            kind = "by hand", kind
            self._run(kind, self._between, passes.sums, passes.orders, ok, watched, learn, q)
            passes.take()
            return
        whole = len(chunks) <= WHOLE and numel <= CAPACITY
        kind = kind, tuple(_memory(chunk, g) for chunk, g in zip(chunks, gs, strict=True)) if whole else None
        fused = self._steady.get(kind) == self._tangents()
        for chunk in chunks:
            chunk.split = chunk.separable and not fused
            chunk.lean = chunk.numel >= chunk.block if not fused else not whole
        self.root.run = partial(self.compiled.stage, kind) if self.compiled is not None and fused and not whole else call
        self._run(kind, self._advance, gs, ok, watched, learn, q, directions, whole=whole)

    def _run(self, kind: Any, function: Any, *args: Any, whole: bool = True) -> None:
        """Fuse what has settled.

        Tangents appear step by step, a level takes part once the one below has a hypergradient. To compile each such change of structure
        would be for nothing: a step is compiled when one of its kind has added nothing.
        """
        tangents = self._tangents()
        if whole and self.compiled is not None and self._steady.get(kind) == tangents:
            self.compiled(kind, function, *args)
            return
        function(*args)
        if self.compiled is not None and self._tangents() == tangents:
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
        self._close(ok, watched)

    def _between(self, sums: Tensor, orders: Tensor, ok: Tensor | None, watched: tuple[str, ...], learn: bool, q: Raw | None) -> None:
        """What lies between the passes of a step by hand, of which the weights need to know three numbers: `orders`."""
        root, chunk = self.root, self.root.chunks[0]
        total, inner, weights, moves = sums.clone().unbind()
        ok = guards.is_finite(total) if ok is None else ok.to(root.resets)
        raw, keep = root.learn({"lr": inner} if q is None and learn else q, ok, {name: self.last[name] for name in watched})
        if root.projects():
            raw, keep = root.project(raw, keep, [[(moves.sqrt() * root.values(raw, chunk).lr, weights.sqrt())]], ok)
        h = root.values(raw, chunk)
        orders.copy_(torch.stack([ok, h.lr, keep["lr"] * root.rule.shrink(h)]))
        for chunk in root.chunks:
            chunk.t += ok
        root.publish(raw, ok)
        self._close(ok, watched)

    def _close(self, ok: Tensor, watched: Sequence[str]) -> None:
        self.skipped.add_(1 - ok)
        for name, last in self.last.items():
            if name in watched:
                last.lerp_(self.root.live[name], ok)
            elif name in self.root.raw:
                last.copy_(self.root.live[name])


def _memory(chunk: Chunk, g: Tensor) -> Any:
    """Which chunk this is, and how tensors that are not the engine's own lie in memory."""
    return chunk.serial, chunk.direct and (chunk.x().stride(), chunk.x().dtype, g.stride())
