"""How a step writes: a step that does not count is computed like any other, and changes nothing."""

import torch
from torch import Tensor


class Weighted:
    """Operation by operation: new values are written with weight 1 or 0, in a third of the time of `torch.where`.

    0·inf is not 0, so gradients are set to zero where the step does not count.
    """

    @staticmethod
    def gradient(g: Tensor, ok: Tensor) -> Tensor:
        """The gradient to compute with."""
        return torch.where(ok > 0, g, 0.0)

    @staticmethod
    def write(buffer: Tensor, new: Tensor, ok: Tensor) -> None:
        """buffer = new where the step counts."""
        buffer.lerp_(new, ok)

    @staticmethod
    def restart(z: Tensor) -> None:
        """Set the elements of a tangent that are not finite to zero."""
        z.nan_to_num_(0.0, 0.0, 0.0)

    @staticmethod
    def displace(x: Tensor, z: Tensor, step: Tensor, lr: Tensor, kept: Tensor, ok: Tensor) -> None:
        """x −= lr·step and z = kept·z − lr·step, in place."""
        size = lr * -ok
        z.mul_(torch.lerp(torch.ones_like(ok), kept, ok)).addcmul_(step, size)
        x.addcmul_(step, size)


class Selected:
    """For code that is compiled: `torch.where` costs nothing in a fused kernel, and gradients need no cleaning."""

    @staticmethod
    def gradient(g: Tensor, ok: Tensor) -> Tensor:
        return g

    @staticmethod
    def write(buffer: Tensor, new: Tensor, ok: Tensor) -> None:
        buffer.copy_(torch.where(ok > 0, new, buffer))

    @staticmethod
    def restart(z: Tensor) -> None:
        # Inductor does not vectorise nan_to_num.
        z.copy_(torch.where(z.abs() <= torch.finfo(z.dtype).max, z, 0.0))

    @staticmethod
    def displace(x: Tensor, z: Tensor, step: Tensor, lr: Tensor, kept: Tensor, ok: Tensor) -> None:
        z.copy_(torch.where(ok > 0, torch.addcmul(kept * z, step, -lr), z))
        x.copy_(torch.where(ok > 0, torch.addcmul(x, step, -lr), x))
