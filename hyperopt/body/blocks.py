"""What is stepped at once: a buffer, or a block of a large one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rule import State
from ..tangents import Point
from .buffers import Buffer, Tangent

FEW = 4  # numbers up to which pairwise operations are used, which fuse into nothing


class Block:
    """A buffer, or a slice of a large one, during one step.

    Args:
        buffer: that it belongs to.
        x, g: weights and gradient.
        state, tangents: views of the buffer's; numbers that all blocks read are copies.
        t: the number of this step.
        cut: which elements of the flattened buffer these are, None for all.
    """

    made: Point | None = None  # direction and new state, where they are kept from `measure` to `take`

    def __init__(self, buffer: Buffer, x: Tensor, g: Tensor, state: State, tangents: Tangent, t: Tensor, cut: slice | None = None) -> None:
        self.buffer, self.x, self.g, self.state, self.tangents, self.t, self.cut = buffer, x, g, state, tangents, t, cut

    def spread(self, name: str, value: Tensor) -> Tensor:
        """A hyperparameter for every coordinate, on the device and in the dtype of the buffer."""
        return self.buffer.spread(name, value, self.cut)

    def factor(self, name: str, factor: Tensor, z: Tensor) -> Tensor:
        """A factor on a tangent: one number, or one for each value of the hyperparameter, spread over the coordinates."""
        return self.spread(name, factor) if factor.dim() and (z.dim() or not self.x.dim()) else factor.to(z)

    def tangent(self, name: str, of: str, like: Tensor) -> Tensor:
        """The buffer of a tangent, shaped like `like`, zero where there was none."""
        whole = self.buffer.tangent(name, of, like)
        return whole if self.cut is None or not like.dim() else whole.view(-1)[self.cut]


def blocks(buffer: Buffer, g: Tensor, *, split: bool) -> list[Block]:
    """The whole buffer, or blocks of a large one, so that intermediates are never larger than a block.

    Args:
        buffer: of x.
        g: its gradient.
        split: blocks may be stepped one after the other.
    """
    x, t, size = buffer.x(), buffer.t + 1, buffer.block
    # A little more than one block is not worth a second round of kernels.
    if not split or buffer.numel < 2 * size or not x.is_contiguous() or not g.is_contiguous():
        return [Block(buffer, x, g, buffer.state, buffer.tangents, t)]
    # A number is read by every block before the first of them writes it.
    numbers = {key: value.clone() for key, value in buffer.state.items() if key in buffer.numbers}
    found = []
    for i, (x_i, g_i) in enumerate(zip(x.view(-1).split(size), g.view(-1).split(size), strict=True)):
        cut = slice(i * size, (i + 1) * size)
        state = {key: numbers[key] if key in numbers else s.view(-1)[cut] for key, s in buffer.state.items()}
        tangents = {
            name: {of: z.clone() if of in buffer.numbers else z.view(-1)[cut] for of, z in tangent.items()}
            for name, tangent in buffer.tangents.items()
        }
        found.append(Block(buffer, x_i, g_i, state, tangents, t, cut))
    return found


def length(norms: Tensor) -> Tensor:
    """The norm of norms, the squares of which may overflow."""
    largest = norms.amax().clamp(torch.finfo(norms.dtype).tiny, torch.finfo(norms.dtype).max)
    return torch.linalg.vector_norm(norms / largest) * largest


def combined(numbers: Sequence[Tensor], pairwise: Callable[[Tensor, Tensor], Tensor], whole: Callable[[Tensor], Tensor]) -> Tensor:
    """Several 0-d tensors in one: a few pair by pair, which fuses into nothing, many side by side."""
    result = numbers[0]
    if len(numbers) > FEW:
        return whole(torch.stack([number.to(result) for number in numbers]))
    for number in numbers[1:]:
        result = pairwise(result, number.to(result))
    return result
