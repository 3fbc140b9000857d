"""q = Zᵀg from the tangents of buffers, one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..hyperparameter import Hyperparameters, Raw
from ..rule import Rule, State, recovered
from .blocks import Block, blocks
from .buffers import Buffer


class Hypergradient:
    """Pulls gradients of x through the tangents of a node.

    Args:
        rule: of the node.
        hypers: its hyperparameters.
        names: those that are learned.
        implied: x is an interpolation of the state of its rule, and its tangents, which are not kept, are those of the state, interpolated.
    """

    def __init__(self, rule: Rule, hypers: Hyperparameters, names: Sequence[str], *, implied: bool) -> None:
        self.rule, self.hypers, self.names, self.implied = rule, hypers, names, implied

    def of(self, buffer: Buffer, g: Tensor, at: str | None = None, *, split: bool = False) -> Raw:
        """What one buffer adds to Zᵀg.

        Args:
            buffer: of x.
            g: a gradient.
            at: where it was taken: "x" or the name of a state. None for the gradient of a step: that of a rule which is evaluated at an
                average stands for the one at the average, so that the tangent of that which lr moves is replaced by the average's.
            split: large buffers may be taken block by block.
        """
        if self.implied and at in (None, "x"):
            shares = [self._interpolated(block, step=at is None) for block in blocks(buffer, g, split=split)]
            return self.combined(shares) if any(shares) else {}
        q: Raw = {}
        for name, tangent in buffer.tangents.items():
            if (at or "x") in tangent:
                q[name] = buffer.inner(name, g, tangent[at or "x"]).to(self.hypers.like)
        return q

    def combined(self, shares: Sequence[Raw]) -> Raw:
        """Zᵀg from the shares of all buffers."""
        q: Raw = {}
        for name in self.names:
            for share in shares:
                if name in share:
                    q[name] = q[name] + share[name] if name in q else share[name]
            if name not in q:
                q[name] = torch.zeros_like(self.hypers[name].value)
        return q

    def _interpolated(self, block: Block, *, step: bool) -> Raw:
        q: Raw = {}
        average = str(self.rule.average)
        for name, kept in block.tangents.items():
            if step and "mix" not in kept:  # both ends of the interpolation move alike
                z = self._through(kept) if average in kept else None
            else:
                tangents = {key: kept[key] for key in ("mix", average, self.rule.moved) if key in kept}
                if step:
                    tangents = {key: z for key, z in tangents.items() if key != self.rule.moved}
                    tangents |= dict.fromkeys((average, self.rule.moved), self._through(kept)) if average in kept else {}
                z = self._pushed(block, tangents)
            if z is not None:
                q[name] = block.buffer.inner(name, block.g, z, block.cut).to(self.hypers.like)
        return q

    def _through(self, kept: State) -> Tensor:
        """The tangent of the point through which the hypergradient of a step is taken."""
        average, moved = kept[str(self.rule.average)], kept.get(self.rule.moved)
        return average if self.rule.through == 1 or moved is None else torch.lerp(moved, average, self.rule.through)

    def _pushed(self, block: Block, tangents: State) -> Tensor:
        """The tangent of the interpolation."""
        state = average_too(self.rule, block)
        zero = torch.zeros((), dtype=block.x.dtype, device=block.x.device)
        moved, average = self.rule.moved, str(self.rule.average)
        along = torch.lerp(tangents.get(moved, zero).expand_as(block.x), tangents.get(average, zero).expand_as(block.x), state["mix"])
        return along + tangents["mix"] * (state[average] - state[moved]) if "mix" in tangents else along


def average_too(rule: Rule, block: Block) -> State:
    """The state with the average, which may be recomputed instead of stored."""
    if not block.buffer.derived:
        return block.state
    return {**block.state, str(rule.average): recovered(rule, block.x, block.state)}
