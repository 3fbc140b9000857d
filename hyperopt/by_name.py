"""A checkpoint of named parameters, in the order in which they are bound now."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .roles import ENTRIES
from .spec.level import Level
from .tree import above, label


def in_order(state_dict: dict[str, Any], tower: Level, param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The checkpoint with its groups, and everything in them that is stored by position, in the order of these groups.

    Unlike in torch.optim, where names are only kept, tensors are matched by name where both sides have names for all of them; by
    position otherwise.

    Args:
        state_dict: as `HyperOptimizer.state_dict` made it.
        tower: of the optimizer that is to go on from it.
        param_groups: of that optimizer, as many as in the checkpoint.

    Raises:
        ValueError: a name that only one side has, or that belongs to different groups.
    """
    saved = state_dict["param_groups"]
    if not all("param_names" in group for group in (*saved, *param_groups)):
        return state_dict
    before, now = ([list(group["param_names"]) for group in groups] for groups in (saved, param_groups))
    if before == now:
        return state_dict
    for names, others, whose in ((before, now, "the checkpoint has"), (now, before, "this optimizer has")):
        if missing := sorted({n for group in names for n in group} - {n for group in others for n in group}):
            raise ValueError(f"only {whose} a parameter named {', '.join(missing)}: bind the parameters of the model that wrote it")
    pairs = [_match(names, before) for names in now]
    if sorted(i for i, _ in pairs) != list(range(len(before))):
        raise ValueError(f"the checkpoint's groups have the parameters {before} and this optimizer's {now}: give each group a match")
    new = {**state_dict, "param_groups": [_group(saved[i], order, tower) for i, order in pairs]}
    if "driven" in state_dict:
        groups = state_dict["driven"]["param_groups"]
        new["driven"] = {**state_dict["driven"], "param_groups": [_listed(groups[i], order) for i, order in pairs]}
    return new


def _match(names: list[str], before: list[list[str]]) -> tuple[int, list[int]]:
    """Which group of the checkpoint has these parameters, and the place in it of each."""
    for i, group in enumerate(before):
        if sorted(group) == sorted(names):
            if len(set(names)) < len(names) and group != names:
                raise ValueError(f"two parameters of a group have one name, of {names}: give each its own")
            return i, [group.index(name) for name in names] if group != names else list(range(len(names)))
    raise ValueError(f"no parameter group of the checkpoint has exactly the parameters {', '.join(names)}: bind the groups that it has")


def _listed(group: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The entries of a group that are lists with a value for each parameter."""
    new = dict(group)
    for entry in ("params", "param_names", *ENTRIES):
        # torch.distributed.checkpoint identifies parameters by names, and has brought these in the order of this optimizer.
        if isinstance(new.get(entry), list) and not (entry == "params" and isinstance(new[entry][0], str)):
            new[entry] = [new[entry][i] for i in order]
    return new


def _group(group: Mapping[str, Any], order: Sequence[int], tower: Level) -> dict[str, Any]:
    """A group with its i-th parameter in place of the `order[i]`-th."""
    new, saved = _listed(group, order), group["tower"]
    now = {before: i for i, before in enumerate(order)}
    chunks = [[now[i] for i in part] for part in saved["chunks"]]
    kept: dict[str, Any] = {**saved, "shapes": [saved["shapes"][i] for i in order], "chunks": chunks}
    if tower.per != "group":
        each = [1 if tower.per == "tensor" else torch.Size(shape).numel() for shape in saved["shapes"]]
        spans = torch.arange(sum(each)).split(each)
        places = torch.cat([spans[i] for i in order])
        own = {name: places if value.dim() else torch.zeros(1, dtype=torch.long) for name, value in saved["last"].items()}
        new |= {name: _moved(group[name], places) for name in own}
        kept |= {entry: _moved(saved[entry], places) for entry in ("last", "held_out") if entry in saved}
        kept["nodes"] = {"0": _moved(saved["nodes"]["0"], places), **dict(_above(tower, 0, "", own, saved["nodes"]))}
    return {**new, "tower": kept}


def _above(
    spec: Level, level: int, branch: str, own: Mapping[str, Tensor], records: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of the nodes above one, by label.

    Args:
        spec: of the node below.
        level, branch: where it stands.
        own: for each of its hyperparameters, the place in the checkpoint of each of its values.
        records: of all nodes.
    """
    for names, upper, path in above(spec, branch):
        ends = [0, *accumulate(own[name].numel() for name in names)]
        places = torch.cat([start + own[name] for start, name in zip(ends, names, strict=False)])
        record = records[label(level + 1, path)]
        yield label(level + 1, path), _moved(record, places)
        one = torch.zeros(1, dtype=torch.long)
        yield from _above(upper, level + 1, path, {n: places if v.dim() else one for n, v in record["values"].items()}, records)


def _moved(kept: Any, places: Tensor) -> Any:
    """Each vector among these tensors, taken from these places; single numbers are for all of them."""
    if isinstance(kept, dict):
        return {key: _moved(value, places) for key, value in kept.items()}
    return kept[places.to(kept.device)] if isinstance(kept, Tensor) and kept.dim() else kept
