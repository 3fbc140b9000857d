"""The paper's way of making hypergradients: keep the autograd graph of the last update. The reference for the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tangents import Raw
from . import general
from .buffers import Buffer
from .eager import Eager


class Graph(Eager):
    """The graph of the last update, with x, g and s detached: `q = grad(x', r, grad_outputs=g)`; horizon 1.

    This is the paper's selective detach, read literally. It looks at one flag on the host in every step and cannot be saved; tangents at
    horizon 1 are the same numbers without either.
    """

    leaves: Raw = {}  # noqa: RUF012 - replaced, never changed
    outputs: dict[Buffer, Tensor] = {}  # noqa: RUF012

    def pull(self, gs: Sequence[Tensor], wanted: bool) -> tuple[Tensor | None, Raw]:
        finite, _ = super().pull(gs, False)
        for block in self.blocks:
            block.g = block.g.clone()  # as below
        pairs = [(self.outputs[c], g) for c, g in zip(self.buffers, gs, strict=True) if c in self.outputs] if wanted else []
        if not pairs:
            return finite, {}
        outputs, grads = zip(*pairs, strict=True)
        qs = torch.autograd.grad(outputs, list(self.leaves.values()), grads, retain_graph=True, allow_unused=True)
        return finite, {n: torch.zeros_like(leaf) if q is None else q for (n, leaf), q in zip(self.leaves.items(), qs, strict=True)}

    def take(self, r: Raw, sound: Raw, keep: Tensor | None, ok: Tensor) -> None:
        leaves = {name: raw.detach().clone().requires_grad_() for name, raw in r.items()}
        # Copies, because the graph keeps what it was made of and the buffers go on to change in place.
        points = [(block.x.clone(), {k: s.clone() for k, s in block.state.items()}) for block in self.blocks]
        with torch.enable_grad():
            news = general.update(self, self.blocks, points, leaves)
        if bool(ok):
            self.leaves, self.outputs = leaves, {block.buffer: x1 for block, (x1, _) in zip(self.blocks, news, strict=True)}
        for block, (x1, s1) in zip(self.blocks, news, strict=True):
            self.commit(block, x1.detach(), {k: s.detach() for k, s in s1.items()}, {}, ok)
        for buffer in self.buffers:
            buffer.t += ok
        self.blocks = []
