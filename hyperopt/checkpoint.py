"""Whether a checkpoint is one of this tower over these parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .body import shards
from .rule import check as check_value
from .spec.level import Level

FORMAT = 2  # of what a checkpoint holds


def check(state_dict: dict[str, Any], tower: Level, param_groups: list[dict[str, Any]], *, driven: bool) -> None:
    """Raise unless `state_dict` can be loaded into an optimizer.

    Args:
        state_dict: as `HyperOptimizer.state_dict` made it, or something else that a user gave.
        tower: the optimizer's tower.
        param_groups: its groups.
        driven: whether it drives another optimizer.

    Raises:
        ValueError: a checkpoint of another tower, of parameters of other shapes, without this group's feasible set, or with a value
            outside its domain.
    """
    try:
        _check(state_dict, tower, param_groups, driven=driven)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the checkpoint of a HyperOptimizer, or a part of it is missing: {error!r}") from error


def _check(state_dict: dict[str, Any], tower: Level, param_groups: list[dict[str, Any]], *, driven: bool) -> None:
    groups = state_dict.get("param_groups", [])
    if len(groups) != len(param_groups):
        mine = len(param_groups)
        raise ValueError(f"the checkpoint has {len(groups)} parameter groups and this optimizer {mine}: bind the same groups")
    if driven and "driven" not in state_dict:
        raise ValueError("the checkpoint has no state of the optimizer that is driven: load one that this kind of tower wrote")
    mine = tower.structure()
    for saved, group in zip(groups, param_groups, strict=True):
        if "tower" not in saved:
            raise ValueError("the checkpoint is not one of a HyperOptimizer: it has no tower; load it into the optimizer that wrote it")
        if saved["tower"].get("format") != FORMAT:
            raise ValueError(
                f"the checkpoint has format {saved['tower'].get('format', 1)} and this version of hyperopt reads {FORMAT}: go on from it "
                "with the version that wrote it, or load only the model's weights and bind a new optimizer at the lr it had learned"
            )
        if saved["tower"]["structure"] != mine:
            raise ValueError(f"the checkpoint is of another tower: {saved['tower']['structure']}; this one is {mine}")
        scheduled = "initial" in saved["tower"]
        if scheduled != ("initial" in group["tower"]):
            raise ValueError(f"the checkpoint was written with schedule={scheduled}: bind(…, schedule={scheduled}) to load it")
        shapes = saved["tower"]["shapes"]
        if len(shapes) != len(group["params"]):
            raise ValueError(f"the checkpoint's group has {len(shapes)} parameters and this one {len(group['params'])}")
        for shape, p in zip(shapes, group["params"], strict=True):
            if list(shape) != list(p.shape):
                pair = f"shape {tuple(shape)} for a parameter of shape {tuple(p.shape)}"
                raise ValueError(f"the checkpoint has {pair}: load it into the model that wrote it")
        for i, p in zip(saved["params"], group["params"], strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if value.dim() and value.shape != p.shape:
                    pair = f"shape {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}"
                    raise ValueError(f"the checkpoint's {key!r} has {pair}: load it into the model that wrote it")
        missing = tower.rule.declared().keys() - saved.keys()
        if missing:
            raise ValueError(f"the checkpoint's group has no {', '.join(sorted(missing))}: it was changed since it was written")
        for name in tower.rule.declared():
            for end in torch.as_tensor(saved[name]).aminmax():
                check_value(f"the checkpoint's {name}", end.item(), tower.domain(name))
        if group.get("project") is not None and saved.get("project") is None:
            raise ValueError(f"the checkpoint's group has no set and this one project={group['project']}: bind a group without one")


def mapping(state_dict: Any) -> dict[str, Any]:
    """The same; TypeError for what is no checkpoint at all."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"a checkpoint is a dictionary, as optimizer.state_dict() makes it, got {type(state_dict).__name__}")
    return state_dict


def whole(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint with the state of each DTensor as a DTensor, placed alike, and with a storage of its own for every tensor."""
    params = [p for group in param_groups for p in group["params"]]
    states = state_dict["state"].items()
    placed = {i: {key: shards.whole(value, params[i]) for key, value in state.items()} for i, state in states}
    return _separate(state_dict | {"state": placed}, set())


def _separate(saved: Any, seen: set[int]) -> Any:
    """The same, with copies of tensors that are parts of a buffer, or that were seen already: safetensors writes none of these."""
    if isinstance(saved, dict):
        return {key: _separate(value, seen) for key, value in saved.items()}
    if isinstance(saved, list):
        return [_separate(value, seen) for value in saved]
    if not isinstance(saved, Tensor):
        return saved
    storage = shards.local(saved).untyped_storage()
    if storage.data_ptr() in seen or storage.nbytes() > shards.local(saved).nbytes:
        return saved.detach().clone()
    seen.add(storage.data_ptr())
    return saved


def states(state_dict: dict[str, Any], params: Sequence[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """The state of each parameter in its own dtype: torch casts it to the parameter's, which would round float32 tangents to bfloat16."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    pairs = [(p, state_dict["state"][i]) for i, p in zip(ids, params, strict=True) if i in state_dict["state"]]
    return {p: {key: shards.placed(value, p).to(p.device, copy=True) for key, value in state.items()} for p, state in pairs}
