"""Tensors that several processes share (DTensors, as FSDP2 and tensor parallelism make them): what this rank holds, and sums over ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_shared(p: Any) -> bool:
    """Whether a tensor is a DTensor. Its class is not imported, which takes a second."""
    return hasattr(p, "to_local")


def local(p: Any) -> Tensor:
    """What this rank holds of a tensor, in the tensor's own memory: all of it, unless it is a DTensor."""
    if not is_shared(p):
        return p
    with torch.no_grad():  # to_local() returns a new tensor otherwise
        return p.to_local()


def placed(value: Any, p: Any) -> Tensor:
    """What this rank holds of a tensor that is shaped like `p`, once it is placed on the ranks as `p` is; numbers are on all of them."""
    if not is_shared(p):
        return value.full_tensor() if is_shared(value) else value
    if not is_shared(value):
        if not value.dim():
            return value
        from torch.distributed.tensor import DTensor, Replicate

        value = DTensor.from_local(value, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    elif value.device_mesh != p.device_mesh:
        return placed(value.full_tensor(), p)
    return local(value if value.placements == p.placements else value.redistribute(placements=p.placements))


def whole(value: Tensor, p: Any) -> Tensor:
    """A state of `p` of which this rank holds `value`, as a DTensor if `p` is one: torch.distributed.checkpoint reshards it then."""
    if not is_shared(p) or not value.dim():
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def elements(p: Any) -> int:
    """How many elements of a tensor a rank holds, about; the same number on all ranks."""
    return p.numel() // math.prod(group.size() for group in _sharding(p).values())


class Ranks:
    """The ranks over which the parameters of a group are sharded. They step their shards alone, at hyperparameters that all learn alike:
    of what a step has to know, only sums over all weights concern other ranks, and these take a small all-reduce.

    Args:
        params: of the group. Those that are sharded along fewer dimensions of the mesh than others, or not at all, are on several ranks
            and count once.

    Raises:
        ValueError: parameters that are sharded over different meshes.
    """

    def __init__(self, params: Sequence[Any] = ()) -> None:
        shared = [p for p in params if is_shared(p)]
        self.groups: dict[str, Any] = {}  # one for each dimension of a mesh along which something is sharded
        for p in shared:
            self.groups |= _sharding(p)
        self.device = shared[0].device_mesh.device_type if self.groups else "cpu"
        if len(self.groups) > 1 and not any(self.groups.keys() <= _names(p) for p in shared):
            meshes = ", ".join(sorted({str(p.device_mesh) for p in shared}))
            raise ValueError(
                f"the parameters of a group are sharded over meshes that are not parts of one: {meshes}; slice them from one "
                "init_device_mesh(…, mesh_dim_names=…), or give the parameters of each mesh a parameter group"
            )

    def __bool__(self) -> bool:
        return bool(self.groups)

    def share(self, p: Any) -> float:
        """The weight of a tensor in a sum over all ranks: 1 divided by the number of ranks that hold the same part of it."""
        mine = _sharding(p)
        return 1 / math.prod(group.size() for name, group in self.groups.items() if name not in mine)

    def sum(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each number, or vector, over all ranks: the same bits on each of them."""
        if not self.groups:
            return list(numbers)
        # Where the processes communicate, which is not where the weights are if those are offloaded.
        vector = torch.cat([number.reshape(-1) for number in numbers]).to(self.device)
        for group in self.groups.values():
            torch.distributed.all_reduce(vector, group=group)
        parts = vector.to(numbers[0]).split([number.numel() for number in numbers])
        return [part.view(number.shape) for part, number in zip(parts, numbers, strict=True)]

    def norms(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """The norm over all ranks of what each of these is the norm of on this rank."""
        if not self.groups:
            return list(norms)
        squares = self.sum([norm.double().square() for norm in norms])  # of float32, which has no square of 1e20
        return [square.sqrt().to(norm).clamp_max(torch.finfo(norm.dtype).max) for square, norm in zip(squares, norms, strict=True)]


def _sharding(p: Any) -> dict[str, Any]:
    """By name the groups of processes over which a tensor is sharded, one for each such dimension of its mesh."""
    if not is_shared(p):
        return {}
    sharded = [i for i, placement in enumerate(p.placements) if not placement.is_replicate() and p.device_mesh.size(i) > 1]
    groups = [p.device_mesh.get_group(i) for i in sharded]
    return {group.group_name: group for group in groups}


def _names(p: Any) -> set[str]:
    return {p.device_mesh.get_group(i).group_name for i in range(p.device_mesh.ndim)}
