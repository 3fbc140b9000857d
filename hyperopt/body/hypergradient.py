"""q = Zᵀg from the tangents of buffers, one after the other."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..hyperparameter import Hyperparameters, Raw
from ..rule import Rule
from .blocks import Block, blocks
from .buffers import Buffer


class Hypergradient:
    """Pulls gradients of x through the tangents of a node.

    Args:
        rule: of the node.
        hypers: its hyperparameters.
        gamma: γ of those that are learned; a step knows nothing of a gap whose tangent was not carried.
        names: those that are learned.
        level: of the node.
    """

    def __init__(self, rule: Rule, hypers: Hyperparameters, gamma: Mapping[str, float], names: Sequence[str], level: int) -> None:
        self.rule, self.hypers, self.gamma, self.names, self.level = rule, hypers, gamma, names, level

    def of(self, buffer: Buffer, g: Tensor, at: str | None = None, *, split: bool = False) -> Raw:
        """What one buffer adds to Zᵀg.

        Args:
            buffer: of x.
            g: a gradient.
            at: where it was taken: "x" or "average". None for the gradient of a step, which at level 0 stands for the one at an average
                that the rule keeps by itself.
            split: large buffers may be taken block by block.
        """
        if self.rule.gapped and (at == "average" or (at is None and self.level == 0)):
            shares = [self._beside(block, step=at is None) for block in blocks(buffer, g, split=split)]
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

    def _beside(self, block: Block, *, step: bool) -> Raw:
        """⟨g, ∂(x + w·gap)⟩: with w = mix − 1 through the average, with w = mix through that which lr moves. For a step, w = mix − through,
        and mix is held, as neither depends on it in this step."""
        q: Raw = {}
        mix = block.state["mix"]
        for name, kept in block.tangents.items():
            z = kept.get("x")
            if z is None:
                continue
            if "gap" in kept and (self.gamma[name] or not step):
                z = z + (mix - (self.rule.through if step else 1)) * kept["gap"]
            if "mix" in kept and not step:
                z = z + kept["mix"] * block.state["gap"]
            q[name] = block.buffer.inner(name, block.g, z, block.cut).to(self.hypers.like)
        return q
