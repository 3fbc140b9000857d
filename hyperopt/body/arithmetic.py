"""How a step writes: a step that does not count is computed like any other, and changes nothing."""

import math
from typing import Any

import torch
from torch import Tensor

ROOM = 1e30  # sums of squares up to which many of them have a finite sum, too


class OnHost:
    """Operation by operation on a CPU, where it costs nothing to look at a number: what a step that does not count made is not written."""

    @staticmethod
    def counts(ok: Tensor, like: Tensor) -> bool:
        """Whether the step counts, as what follows takes it."""
        return bool(ok)

    @staticmethod
    def gauge(g: Tensor) -> Tensor:
        """A number that is finite if all of `g` is, and small enough to be added up."""
        # A sum of squares is as fast as a sum, and also says whether an element is too large to be squared.
        square = _square(g)
        return square if square <= ROOM else (g - g).sum()

    @staticmethod
    def bounded(g: Tensor, gauge: Tensor) -> Tensor:
        """The gradient to compute with, as far as that is known before the step is taken."""
        return g if 0 < gauge <= ROOM else g.clamp(-bound(g.dtype), bound(g.dtype))

    @staticmethod
    def gradient(g: Tensor) -> Tensor:
        """The gradient to compute with."""
        return g

    @staticmethod
    def norm(x: Tensor, share: float) -> Tensor:
        """‖x‖, with squares weighted by `share`; finite if x is."""
        square = _square(x) * share
        if not square <= torch.finfo(x.dtype).max:  # squares overflow far earlier than norms
            x = x.abs()
            largest = x.amax().clamp_max(torch.finfo(x.dtype).max)
            return (largest * (_square(x / largest) * share).sqrt()).clamp_max(torch.finfo(x.dtype).max)
        return square.sqrt()

    @staticmethod
    def write(buffer: Tensor, new: Tensor, counts: Any) -> None:
        """buffer = new where the step counts."""
        if counts:
            buffer.copy_(new)

    @staticmethod
    def restart(z: Tensor, counts: Any) -> None:
        """Set the elements of a tangent that are not finite to zero."""
        if counts:
            z.nan_to_num_(0.0, 0.0, 0.0)

    @staticmethod
    def descend(x: Tensor, move: Tensor, counts: Any) -> None:
        """x −= move, in place."""
        if counts:
            x.sub_(move)

    @staticmethod
    def displace(x: Tensor, z: Tensor, step: Tensor, lr: Tensor, kept: Tensor, counts: Any) -> None:
        """x −= lr·step and z = kept·z − lr·step, in place; elements of z that are not finite count as zero."""
        if counts:
            z.nan_to_num_(0.0, 0.0, 0.0).mul_(kept).addcmul_(step, lr, value=-1)
            x.addcmul_(step, lr, value=-1)


class Selected:
    """For what is compiled, or runs where looking at a number means to wait: both are computed, and one of them is taken."""

    @staticmethod
    def counts(ok: Tensor, like: Tensor) -> Tensor:
        return ok.to(like) > 0

    @staticmethod
    def gauge(g: Tensor) -> Tensor:
        if g.is_cpu:  # compiled: nothing is as fast as a sum
            return torch.where(g.abs() <= torch.finfo(g.dtype).max, 0.0, math.nan).sum()
        return torch.linalg.vector_norm(g, math.inf) * 2.0**-64

    @staticmethod
    def bounded(g: Tensor, gauge: Tensor) -> Tensor:
        return g

    @staticmethod
    def gradient(g: Tensor) -> Tensor:
        return g.clamp(-bound(g.dtype), bound(g.dtype))

    @staticmethod
    def norm(x: Tensor, share: float) -> Tensor:
        square = _square(x) * share
        if not x.is_cpu:
            return square.sqrt()  # where that overflows, lr falls to the least that there is
        small = x * 2.0**-64
        large = (_square(small) * share).sqrt() * 2.0**64
        return torch.where(square <= torch.finfo(x.dtype).max, square.sqrt(), large)

    @staticmethod
    def write(buffer: Tensor, new: Tensor, counts: Any) -> None:
        buffer.copy_(torch.where(counts, new, buffer))

    @staticmethod
    def restart(z: Tensor, counts: Any) -> None:
        # Inductor does not vectorise nan_to_num.
        z.copy_(torch.where(counts & ~(z.abs() <= torch.finfo(z.dtype).max), 0.0, z))

    @staticmethod
    def descend(x: Tensor, move: Tensor, counts: Any) -> None:
        Selected.write(x, x - move, counts)

    @staticmethod
    def displace(x: Tensor, z: Tensor, step: Tensor, lr: Tensor, kept: Tensor, counts: Any) -> None:
        sound = torch.where(z.abs() <= torch.finfo(z.dtype).max, z, 0.0)
        Selected.write(z, torch.addcmul(kept * sound, step, -lr), counts)
        Selected.write(x, torch.addcmul(x, step, -lr), counts)


def bound(dtype: torch.dtype) -> float:
    """The size that an element of a gradient counts as at most: 2^63 in float32. Four of its squares have a finite sum, and the difference
    of two of them is far from where numbers end."""
    return torch.finfo(dtype).max ** 0.5 / 2


def _square(x: Tensor) -> Tensor:
    """‖x‖²; in half of the time that torch.linalg.vector_norm takes."""
    if x.is_contiguous():
        flat = x.view(-1)
        return torch.dot(flat, flat)
    return torch.linalg.vector_norm(x).square()
