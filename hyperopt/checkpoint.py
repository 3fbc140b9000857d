"""Whether a checkpoint is one of this tower over these parameters."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .body import shards
from .by_name import in_order
from .damage import WRITTEN, check_nodes, check_states, check_values
from .spec.level import Level

FORMAT = 3  # of what a checkpoint holds


def fitted(state_dict: dict[str, Any], tower: Level, groups: Sequence[Any], driven: Optimizer | None) -> dict[str, Any]:
    """The checkpoint, with named parameters in the order of an optimizer's; raises unless the optimizer can go on from it.

    Args:
        state_dict: as `HyperOptimizer.state_dict` made it, or something else that a user gave.
        tower: the optimizer's tower.
        groups: its `Group`s.
        driven: the other optimizer that it drives.

    Raises:
        ValueError: a checkpoint of another tower, of parameters of other shapes or names, or without this group's feasible set; a part
            that is missing or is not such as this optimizer would write; a value outside its domain, or one that is not finite.
    """
    try:
        return _fitted(state_dict, tower, groups, driven)
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"this is not the checkpoint of a HyperOptimizer, or a part of it is missing: {error!r}") from error


def _fitted(state_dict: dict[str, Any], tower: Level, groups: Sequence[Any], driven: Optimizer | None) -> dict[str, Any]:
    found, mine = state_dict["param_groups"], tower.structure()
    if len(found) != len(groups):
        raise ValueError(f"the checkpoint has {len(found)} parameter groups and this optimizer {len(groups)}: bind the same groups")
    for saved in found:
        if "tower" not in saved:
            raise ValueError("the checkpoint is not one of a HyperOptimizer: it has no tower; load it into the optimizer that wrote it")
        if saved["tower"].get("format") != FORMAT:
            raise ValueError(
                f"the checkpoint has format {saved['tower'].get('format', 1)} and this version of hyperopt reads {FORMAT}: go on from it "
                "with the version that wrote it, or load only the model's weights and bind a new optimizer at the lr it had learned"
            )
        if saved["tower"]["structure"] != mine:
            raise ValueError(f"the checkpoint is of another tower: {saved['tower']['structure']}; this one is {mine}")
    if driven:
        _check_driven(state_dict, driven)
    state_dict = in_order(state_dict, tower, [group.group for group in groups])
    found, states = state_dict["param_groups"], state_dict["state"]
    if unknown := states.keys() - {i for saved in found for i in saved["params"]}:
        raise ValueError(f"the checkpoint's state of {sorted(unknown, key=str)} belongs to none of its parameters: {WRITTEN}")
    for saved, group in zip(found, groups, strict=True):
        if ("initial" in saved["tower"]) != group.scheduled:
            wanted = f"schedule={not group.scheduled}"
            raise ValueError(f"the checkpoint was written with {wanted}: bind(…, {wanted}) to load it")
        _check_shapes(saved, group)
        records = [states.get(i, {}) for i in saved["params"]]
        _check_entries(saved, group, records)
        check_values(saved, group)
        check_nodes(saved["tower"], group)
        check_states(saved, group, records)
    towers = [{key: value for key, value in saved["tower"].items() if key != "entries"} for saved in found]
    # A copy, as torch's optimizers go on in the very tensors that they are given.
    other = {"driven": copy.deepcopy({n: kept for n, kept in state_dict["driven"].items() if n != "entries"})} if driven else {}
    return state_dict | {"param_groups": [saved | {"tower": tower} for saved, tower in zip(found, towers, strict=True)]} | other


def entries(tower: dict[str, Any], records: Sequence[dict[str, Tensor]]) -> list[str]:
    """What a checkpoint holds of a group, as paths: what is missing later was lost on the way."""
    chunks = {i: records[part[0]] for i, part in enumerate(tower["chunks"])}
    return sorted(_paths({"nodes": tower["nodes"], "last": tower["last"], "held out": tower.get("held_out", {}), "state": chunks}))


def _paths(kept: Any, path: str = "", *, shapes: bool = False) -> Iterator[str]:
    """The path of each leaf, on request with its type and shape."""
    if isinstance(kept, dict):
        for key, value in kept.items():
            yield from _paths(value, f"{path}.{key}", shapes=shapes)
    else:
        yield f"{path} {type(kept).__name__}{[*getattr(kept, 'shape', ())]}" if shapes else path


def _check_driven(state_dict: dict[str, Any], driven: Optimizer) -> None:
    if "driven" not in state_dict:
        raise ValueError("the checkpoint has no state of the optimizer that is driven: load one that this kind of tower wrote")
    given = state_dict["driven"]
    found = set(_paths(given["state"], shapes=True))
    if lost := found ^ set(given.get("entries", found)):
        raise ValueError(f"the checkpoint's optimizer that is driven was written with other entries, {', '.join(sorted(lost))}: {WRITTEN}")
    for saved, group in zip(given["param_groups"], driven.param_groups, strict=True):
        kinds = {name: (bool,) if type(value) is bool else (int, float) for name, value in group.items() if isinstance(value, (int, float))}
        if missing := group.keys() - saved.keys() - {"param_names", "initial_lr"}:
            raise ValueError(f"the checkpoint's optimizer that is driven has no {', '.join(sorted(missing))}: {WRITTEN}")
        if wrong := [name for name, kind in kinds.items() if type(saved[name]) not in kind or not math.isfinite(saved[name])]:
            raise ValueError(f"the checkpoint's optimizer that is driven has no finite number {', '.join(wrong)}: {WRITTEN}")
    ids = [i for saved in given["param_groups"] for i in saved["params"]]
    if {type(i) for i in ids} != {int} or len(set(ids)) < len(ids) or given["state"].keys() - set(ids):
        raise ValueError(f"the checkpoint's optimizer that is driven has the parameters {ids}: {WRITTEN}")
    for state in given["state"].values():
        for key, kept in state.items():
            if isinstance(kept, Tensor) and (kept.is_complex() or kept.isnan().any()):
                raise ValueError(f"the checkpoint's optimizer that is driven has {key!r} with values that are no numbers: {WRITTEN}")


def _check_shapes(saved: dict[str, Any], group: Any) -> None:
    shapes, params, ids = saved["tower"]["shapes"], group.params, saved["params"]
    if not len(shapes) == len(ids) == len(set(ids)) == len(params):
        raise ValueError(f"the checkpoint's group has {len(shapes)} parameters and this one {len(params)}")
    names = group.group.get("param_names", ["a parameter"] * len(params))
    for shape, p, name in zip(shapes, params, names, strict=True):
        if list(shape) != list(p.shape):
            pair = f"shape {tuple(shape)} for {name} of shape {tuple(p.shape)}"
            raise ValueError(f"the checkpoint has {pair}: load it into the model that wrote it")


def _check_entries(saved: dict[str, Any], group: Any, records: Sequence[dict[str, Tensor]]) -> None:
    """Raise unless everything is there, and the partition is one of the parameters that have a state."""
    tower, names, roles = saved["tower"], group.names, {entry for entry, given in group.said.items() if given is not None}
    missing = {*names, *roles} - saved.keys()
    if missing:
        raise ValueError(f"the checkpoint's group has no {', '.join(sorted(missing))}: it was changed since it was written")
    if group.set is not None and saved.get("project") is None:
        raise ValueError(f"the checkpoint's group has no set and this one project={group.set}: bind a group without one")
    if missing := group.tower.keys() - tower.keys() - {"held_out"}:
        raise ValueError(f"the checkpoint's tower has no {', '.join(sorted(missing))}: {WRITTEN}")
    members = [i for part in tower["chunks"] for i in part]
    if {type(i) for i in members} - {int} or sorted(members) != [i for i, record in enumerate(records) if record]:
        raise ValueError(f"the checkpoint's chunks {tower['chunks']} are no partition of the parameters that have a state: {WRITTEN}")
    if any(records[i].keys() != records[part[0]].keys() for part in tower["chunks"] for i in part):
        raise ValueError(f"the checkpoint's parameters that are stepped as one have unlike states: {WRITTEN}")
    if lost := set(entries(tower, records)) ^ set(tower.get("entries", entries(tower, records))):
        raise ValueError(f"the checkpoint was written with other entries, {', '.join(sorted(lost))}: {WRITTEN}")
    for entry in ("zeros", "watched"):
        if not isinstance(tower[entry], list) or not set(tower[entry]) <= set(names):
            raise ValueError(f"the checkpoint's {entry} = {tower[entry]!r} must be a list of hyperparameters: {WRITTEN}")
    if type(tower["calls"]) is not int or tower["calls"] < 0:
        raise ValueError(f"the checkpoint's calls = {tower['calls']!r} must be a number of steps: {WRITTEN}")


def mapping(state_dict: Any) -> dict[str, Any]:
    """The same; TypeError for what is no checkpoint at all."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"a checkpoint is a dictionary, as optimizer.state_dict() makes it, got {type(state_dict).__name__}")
    return state_dict


def whole(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint with the state of each DTensor as a DTensor, placed alike, and with a storage of its own for every tensor."""
    params = [p for group in param_groups for p in group["params"]]
    states, groups = state_dict["state"], []
    placed = {i: {key: shards.whole(value, params[i]) for key, value in state.items()} for i, state in states.items()}
    for group in state_dict["param_groups"]:
        found = entries(group["tower"], [states.get(i, {}) for i in group["params"]])
        groups.append(group | {"tower": group["tower"] | {"entries": found}})
    if "driven" in state_dict:
        state_dict["driven"]["entries"] = list(_paths(state_dict["driven"]["state"], shapes=True))
    return _separate(state_dict | {"state": placed, "param_groups": groups}, set())


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
