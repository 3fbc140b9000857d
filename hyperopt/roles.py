"""Which tensor of a model is what: how each is stepped by a rule for matrices, and by one that has two directions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
GATES = {"LSTM": 4, "GRU": 3}  # matrices one below the other in weight_ih and weight_hh; 1 for a plain RNN


class Role(NamedTuple):
    """What one tensor is to a rule.

    Args:
        direction: which of the directions of a split rule serves it; None where the rule is to judge by its shape.
        blocks: the number of matrices that lie in it one below the other, such as the three of a fused QKV projection.
        matrix: whether it is one of several tensors of its group that have two or more dimensions.
    """

    direction: int | None = None
    blocks: int = 1
    matrix: bool = False


HIDDEN, REST = Role(0), Role(1)
ENTRIES = ("rule", "blocks")  # of a parameter group


def read(module: nn.Module) -> dict[Tensor, Role]:
    """The role of each parameter of a module: hidden matrices, with their blocks, and the rest.

    Hidden matrices are the weights of linear layers, convolutions (a block for each of their groups), attention (three blocks where query,
    key and value are fused) and recurrent layers (a block for each gate), and a matrix that a layer of the user's own holds. To the rest
    belong embeddings, the output head, which is the linear layer or convolution that was registered last, norms, biases, and parameters
    whose names say that they are embeddings. A tensor with several owners, such as a head tied to an embedding, belongs to the rest if one
    of them says so.
    """
    layers = [m for m in module.modules() if isinstance(m, LAYERS)]
    roles: dict[Tensor, Role] = {}
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            role = REST if layers and owner is layers[-1] else _role(owner, name, p)
            if roles.get(p) != REST:
                roles[p] = role
    return roles


def _role(owner: nn.Module, name: str, p: Tensor) -> Role:
    if p.dim() < 2 or "bias" in name or "embed" in name.lower() or isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return REST
    if isinstance(owner, nn.modules.conv._ConvNd):
        return Role(0, 1 if owner.transposed else owner.groups)
    if isinstance(owner, nn.MultiheadAttention):
        return Role(0, 3 if name == "in_proj_weight" else 1)
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        kind = getattr(owner, "mode", type(owner).__name__.removesuffix("Cell"))
        return Role(0, 1 if name.startswith("weight_hr") else GATES.get(kind, 1))
    return HIDDEN if p.dim() == 2 else REST  # a norm over several dimensions, experts, a bilinear layer


def group_of(module: nn.Module, parts: Sequence[str], *, elementwise: bool) -> dict[str, Any]:
    """A parameter group of all parameters of a module, with the roles that the rule asks for.

    Args:
        module: whose parameters they are.
        parts: the names of the directions of the rule, if it is split.
        elementwise: whether it has no use for matrices.
    """
    if elementwise:
        return {"params": list(module.parameters())}
    group: dict[str, Any] = {"params": list(module.named_parameters())}
    found = read(module)
    roles = [found[p] for _, p in group["params"]]
    if parts:
        group["rule"] = [parts[role.direction or 0] for role in roles]
    return {**group, "blocks": [role.blocks for role in roles]}


def settle(group: dict[str, Any], parts: Sequence[str]) -> dict[Tensor, Role]:
    """The role of each parameter of a group, which is written into the group as plain values.

    Args:
        group: with its parameters; its entries "rule" and "blocks" hold a value for all of them, or a list with one for each.
        parts: the names of the directions of the rule, if it is split.

    Raises:
        ValueError: a rule that is none of `parts`, a number of blocks that does not divide a tensor, or a list of another length.
    """
    params: Sequence[Tensor] = group["params"]
    names = _each(group, "rule", [parts[p.dim() < 2] for p in params]) if parts else []
    counts = _each(group, "blocks", [1] * len(params))
    for name in names:
        if name not in parts:
            raise ValueError(f"a parameter group's rule = {name!r} is none of those that serve it: give {' or '.join(map(repr, parts))}")
    for count, p in zip(counts, params, strict=True):
        if type(count) is not int or count < 1 or (count > 1 and (p.dim() < 2 or p.shape[0] % count)):
            shape = tuple(p.shape)
            raise ValueError(f"a parameter group's blocks = {count!r} must be a number that divides the rows of a matrix, here {shape}")
    several = sum(p.dim() >= 2 for p in params) > 1
    return {p: Role(parts.index(names[i]) if parts else None, counts[i], several and p.dim() >= 2) for i, p in enumerate(params)}


def _each(group: dict[str, Any], entry: str, default: list[Any]) -> list[Any]:
    """An entry of a group with a value for each parameter."""
    given = group.get(entry, default)
    values = list(given) if isinstance(given, (list, tuple)) else [given] * len(group["params"])
    values = [getattr(value, "__name__", value) for value in values]  # a rule, or its name
    if len(values) != len(group["params"]):
        raise ValueError(
            f"a parameter group's {entry} has {len(values)} values for {len(group['params'])} parameters: give one, or one each"
        )
    group[entry] = values
    return values


def shown(group: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """A line for each direction of a split rule, with the tensors that it serves, by name where they have one."""
    params: Sequence[torch.Tensor] = group["params"]
    names = group.get("param_names") or [str(tuple(p.shape)) for p in params]
    lines = []
    for part in parts:
        served = [i for i in range(len(params)) if group["rule"][i] == part]
        words = [names[i] + (f" in {n} blocks" if (n := group["blocks"][i]) > 1 else "") for i in served]
        lines.append(f"    {part}: {', '.join(words) or 'nothing'}")
    return lines
