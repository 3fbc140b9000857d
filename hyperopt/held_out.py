"""The gradient of a loss other than the one that the weights descend."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .body.shards import is_shared
from .group import Group
from .spec.level import Level


def learn(loss: Tensor, groups: Sequence[Group], *, averaged: bool) -> None:
    """Let the next step of each group learn from `loss`, which was made with the averaged weights, or with the weights themselves."""
    grads = gradients(loss, [p for group in groups for p in group.params], groups[0].spec)
    for group in groups:
        keep(group, grads, "average" if averaged and group.rule.averages else "x")


def gradients(loss: Tensor, params: Sequence[Tensor], tower: Level) -> dict[Tensor, Tensor | None]:
    """The gradient of `loss` by parameter, None where it does not depend on one; raises where a tower cannot learn from it."""
    if not tower.above:
        raise RuntimeError(f"{tower} learns nothing: stack an optimizer on it, .stack(Adam)")
    if tower.strategy == "graph":
        raise RuntimeError("strategy='graph' has no tangents for another loss: give strategy='tangents'")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}, requires_grad {loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"hyper_backward needs a loss of one number that depends on the parameters, got {got}")
    trained = [p for p in params if p.requires_grad]
    grads: dict[Tensor, Tensor | None] = dict.fromkeys(params)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        grads |= _averaged(loss, trained)
    else:
        grads |= dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
    if all(g is None for g in grads.values()):
        raise ValueError("hyper_backward was given a loss that depends on none of the parameters: make it from the model as it is now")
    return grads


@torch.no_grad()
def keep(group: Group, grads: Mapping[Tensor, Tensor | None], at: str) -> None:
    """Keep the hypergradients of another loss for the next step of a group, added to those that are kept already.

    Args:
        group: whose weights the loss was made with.
        grads: its gradient, by parameter; None where it does not depend on one.
        at: where the gradient was taken: "x" for the weights, "average" for the average that stood in their place.
    """
    hypergradient, shares = group.body.hypergradient, []
    for buffer in group.buffers:
        found = [torch.zeros_like(p) if grads[p] is None else grads[p] for p in buffer.tensors]
        g = buffer.side_by_side([-a if group.spec.maximize else a for a in found if a is not None])
        buffer.gather()
        shares.append(hypergradient.of(buffer, g, at))
    q = hypergradient.combined(shares)
    q = dict(zip(q, group.body.ranks.sum(list(q.values())), strict=True))
    kept = group.tower.get("held_out")
    group.tower["held_out"] = hypergradient.combined([kept, q]) if kept else q


def _averaged(loss: Tensor, params: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
    """The gradient that a backward pass leaves in .grad: DDP and FSDP average over ranks only on the way there."""
    kept = [p.grad if p.grad is None or p.grad._base is None else p.grad.clone() for p in params]  # DDP may reuse what it has a view of
    for p in params:
        p.grad = None
    try:
        # The parameters of FSDP2 are no part of the graph, the whole ones that it gathers are.
        loss.backward(inputs=None if any(map(is_shared, params)) else list(params))
        return {p: p.grad for p in params}
    finally:
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
