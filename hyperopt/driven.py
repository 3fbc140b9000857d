"""A step of all groups, in directions of their own or in those that another optimizer makes."""

from collections.abc import Sequence

import torch

from .adopt import Driven
from .group import Group
from .guards import every


def step(driven: Driven | None, groups: Sequence[Group], every_call: int) -> None:
    """Step every group that has a gradient; a gradient of one of them that is not finite leaves all of them as they were.

    Args:
        driven: the other optimizer that makes the directions, if there is one.
        groups: all parameter groups.
        every_call: the levels above 0 step on every `every_call`-th call.
    """
    for group in groups:
        group.check()
    if driven is not None:
        _drive(driven, groups, every_call)
        return
    active = [group for group in groups if group.collect()]
    ok = every(group.finite() for group in active) if len(active) > 1 else None
    for group in active:
        group.step(ok, every_call)


def _drive(driven: Driven, groups: Sequence[Group], every_call: int) -> None:
    """Let the other optimizer step, and take the step in its direction."""
    grads = [p.grad for group in groups for p in group.params if p.grad is not None]
    if not grads:
        return
    # The one wait for the device: the other optimizer must not see a gradient that is not finite.
    finite = all(bool(g.isfinite().all()) for g in grads)
    directions = {p: torch.zeros_like(p) for group in groups for p in group.params} | (driven.directions() if finite else {})
    active = [group for group in groups if group.collect(directions)]
    fine = float(finite and all(bool(d.isfinite().all()) for d in directions.values()))
    ok = every(group.finite() for group in active) * fine
    for group in active:
        group.step(ok, every_call)
