"""The recursion: a node steps its tensors with hyperparameters that the nodes above it have just stepped."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .body.arithmetic import bound
from .guards import Guards, is_finite
from .hyperparameter import Hyperparameters, Raw, joined

if TYPE_CHECKING:
    from .body.eager import Eager


class Optimizable:
    """A node of the tree: tensors x, the rule that updates them, and the nodes above, whose x are this node's raw hyperparameters r.

    Args:
        level: 0 for the weights of the model, 1 for their hyperparameters, and so on.
        body: where x, the state and the tangents Z = ∂x/∂r live, and how the rule updates them.
        hypers: the hyperparameters of the rule, learned or held.
        guards: bound how far they move.
        above: for each node above, the names of the hyperparameters that it learns.
        skipped: counts steps for gradients, and hypergradients, that were not finite; shared by all nodes of a tower.
    """

    def __init__(
        self,
        level: int,
        body: "Eager",
        hypers: Hyperparameters,
        guards: Guards,
        above: Sequence[tuple[tuple[str, ...], "Optimizable"]],
        skipped: Sequence[Tensor],
    ) -> None:
        self.level, self.body, self.hypers, self.guards, self.above, self.skipped = level, body, hypers, guards, above, skipped
        self.q: Raw = {}  # the hypergradients of the last step

    def step(self, gs: list[Tensor], ok: Tensor, q: Raw | None = None, learn: bool = True) -> None:
        """One step of this node and of all above it, without waiting for the device.

            q  = Zᵀ g                                   the hypergradient: one number for each raw hyperparameter
            r' = above.step(q)                          the same recursion, one level up; at the top r is constant
            x', s' = update(x, g, s, domain(r'), t)
            Z' = how x' depends on r'                   kept for the next step

        Args:
            gs: the gradient of the loss with respect to x, one tensor for each buffer.
            ok: 0-d, 1. if the step counts; where it is 0. everything is computed, and nothing changes.
            q: hypergradients of another loss to learn from, whatever `learn` says.
            learn: let the levels above step too.
        """
        run = self.body.run  # as it is, or compiled
        finite, pulled = self.body.pull(gs, learn and q is None)  # first pass over x: is g finite? q = Zᵀg
        ok = ok if finite is None else ok * finite
        r, sound = run(self.learn, pulled if q is None else q, ok, q is not None)
        r = self.hypers.assigned(r)  # what a user wrote wins
        size = self.body.measure(r, ok)  # ‖Δ‖ relative to ‖x‖ at r
        r, keep = run(self.guards.sized, r, size, ok)  # trust, forgetting
        self.body.take(r, sound, keep, ok)  # second pass: x', s', Z'
        run(self.hypers.publish, r, ok)
        if not self.level:
            self.skipped[0].add_(1 - ok)

    def learn(self, q: Raw, ok: Tensor, held_out: bool) -> tuple[Raw, dict[str, Tensor]]:
        """Step the levels above: the raw hyperparameters of this step, and 1. for each hypergradient that is finite, 0. otherwise."""
        before = self.hypers.raw()
        if not q:
            return before, {}  # the top, or a step that does not learn
        sound = {name: is_finite(number.sum() if number.dim() else number) for name, number in q.items()}
        fine = ok
        for one in sound.values():
            fine = fine * one
        self.skipped[1].add_(ok - fine)
        fine = fine * self.body.steps().clamp(max=1)  # tangents say nothing before the first step that counts
        for names, node in self.above:
            node.step([side_by_side(q, names)], fine)
        self.q = q
        return self.guards.moved(before, self.hypers.raw(), q, fine, held_out=held_out), sound


def side_by_side(q: Raw, names: Sequence[str]) -> Tensor:
    """The hypergradients of `names` as the gradient of the node that learns them: bounded as any gradient, 0 where one is not finite."""
    gradient = joined(q, names).nan_to_num(0.0, 0.0, 0.0)
    return gradient.clamp(-bound(gradient.dtype), bound(gradient.dtype))
