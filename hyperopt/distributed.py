"""What cannot be trained by several processes, because their ranks would learn different hyperparameters; with the remedy."""

import sys
from collections.abc import Sequence
from typing import Any

from .body.shards import Ranks, is_shared
from .rules.black_box import BlackBox
from .spec.level import Level


def check(params: Sequence[Any], tower: Level) -> None:
    """Raise for parameters of which this rank has a part and nothing says so, and for towers that need whole tensors and get shards.

    Args:
        params: of a group.
        tower: that trains them, with the group's feasible set.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise TypeError(
            "params are of FullyShardedDataParallel (FSDP1), whose shards are not marked as such, so that each rank would learn another "
            "lr: shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if _inside_zero():
        raise TypeError(
            "ZeroRedundancyOptimizer gives each rank parameters of its own, so that each would learn another lr: bind the tower to "
            "model.parameters() without it, and shard the model with torch.distributed.fsdp.fully_shard to share its state out"
        )
    for p in params:
        if is_shared(p) and any(placement.is_partial() for placement in p.placements):
            raise TypeError(f"a parameter of shape {tuple(p.shape)} is a sum over ranks, placements {p.placements}: redistribute it first")
    if not Ranks(params):
        return
    rule = tower.rule
    if isinstance(rule, BlackBox):
        raise ValueError(
            f"{rule} is driven as a black box and would see shards of the parameters (DTensors): give a rule of this library, "
            "or whole tensors, as DistributedDataParallel does"
        )
    if not rule.elementwise:
        raise ValueError(
            f"{rule} needs whole tensors (elementwise = False) and these are sharded (DTensors): give them to an elementwise rule such "
            "as Adam, or whole tensors to this one, as DistributedDataParallel does"
        )
    if tower.project is not None and not tower.project.elementwise:
        raise ValueError(f"project = {tower.project} couples weights that are on several ranks (DTensors): give a Box, or whole tensors")
    if tower.per == "coordinate" and tower.above:
        raise ValueError('per = "coordinate" would need values that are sharded like the parameters (DTensors): give "tensor" or "group"')
    if tower.strategy == "graph":
        raise ValueError('strategy = "graph" works with whole tensors and these are sharded (DTensors): "tangents" computes the same')


def _inside_zero() -> bool:
    """Whether this is called by a ZeroRedundancyOptimizer, which hands a rank its own parameters, indistinguishable from any others."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # pyright: ignore[reportOptionalMemberAccess]
            return True
        frame = frame.f_back
    return False
