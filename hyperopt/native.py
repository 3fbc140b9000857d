"""A hand-made step on a CPU: two passes over the weights in C++, and between them the levels above, which are numbers."""

import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .hypergradients import Displacement
from .rule import Native

if TYPE_CHECKING:
    from .engine import Chunk
    from .optimizable import Optimizable

BLOCK = 2**13  # elements of a tensor that one thread takes at a time; few enough to share 100,000 out evenly
# torch forbids its own kernels loops of vectors that are not written out, and wants the errno of every root.
FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")


_loaded: dict[Path, ctypes.CDLL] = {}


def source(node: "Optimizable", tensors: Sequence[Tensor], *, maximize: bool) -> Native | None:
    """The hand-made step of a node with these weights, if there is one: on a CPU, in float32, for lr alone, one for all weights."""
    alone = isinstance(node.strategy, Displacement) and node.feasible is None and not node.raw["lr"].dim() and not maximize
    plain = all(type(t.data) is Tensor and t.is_cpu and t.dtype == torch.float32 for t in tensors)
    return node.rule.native() if alone and plain else None


def load(path: Path) -> ctypes.CDLL | None:
    """The functions of a source, compiled as torch.compile compiles its own; None where that fails: the step is left to it then."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if path in _loaded:
        return _loaded[path]
    try:
        functions = CppCodeCache.load(path.read_text(encoding="utf-8"), extra_flags=FLAGS)
    except (CppCompileError, InvalidCxxCompiler, OSError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    functions.look.argtypes = [number, number, number, pointer, number, pointer, pointer, pointer, pointer]
    functions.take.argtypes = [number, number, pointer, number, pointer, pointer, pointer]
    functions.look.restype = functions.take.restype = None
    _loaded[path] = functions
    return functions


class Passes:
    """The two passes over the weights of these chunks, where they lie.

    Args:
        functions: as `load` found it.
        made: what the rule says of it.
        node: whose weights they are.
        chunks: those that have a gradient, with the tangents of lr.
    """

    def __init__(self, functions: ctypes.CDLL, made: Native, node: "Optimizable", chunks: Sequence["Chunk"]) -> None:
        self.functions, self.tensors = functions, [t for chunk in chunks for t in chunk.tensors]
        self.sizes = [t.numel() for t in self.tensors]
        self.strides = [stride for chunk in chunks for stride in chunk.strides]
        count = len(self.tensors)
        self.read = [node.complements[name] for name in made.complements] + [node.live[name] for name in made.values]
        self.kept = [[*(chunk.state[key] for key in made.state), chunk.tangents["lr"]["x"], chunk.t] for chunk in chunks]
        self.plain = all(buffer.is_contiguous() for buffers in self.kept for buffer in buffers)
        self.places = self._places()
        rows = []
        for chunk, (*buffers, t) in zip(chunks, self.kept, strict=True):
            ends = list(itertools.accumulate((4 * size.numel() for size in chunk.tensors), initial=0))
            rows += [[*(buffer.data_ptr() + at for buffer in buffers), t.data_ptr()] for at in ends[:-1]]
        self.pointers = (ctypes.c_void_p * (2 * count + len(rows[0]) * count))()
        self.pointers[2 * count :] = [pointer for column in zip(*rows, strict=True) for pointer in column]
        self.values = (ctypes.c_void_p * len(self.read))(*(value.data_ptr() for value in self.read))
        blocks = [(i, at, min(BLOCK, size - at)) for i, size in enumerate(self.sizes) for at in range(0, size, BLOCK)]
        # Not of the dtype and on the device that a user may have made the default.
        self.blocks = torch.tensor(blocks, dtype=torch.int64, device="cpu")
        self.partial = torch.empty(4 * len(blocks), dtype=torch.float64, device="cpu")
        self.sums, self.orders = (torch.empty(size, dtype=torch.float32, device="cpu") for size in (4, 3))
        table = len(blocks), self.blocks.data_ptr(), count, ctypes.addressof(self.pointers)
        self.look_at = int(node.projects()), *table, ctypes.addressof(self.values), self.partial.data_ptr(), self.sums.data_ptr()
        self.take_at = *table, ctypes.addressof(self.values), self.orders.data_ptr()

    def stand(self) -> bool:
        """Whether state and hyperparameters are where they were: sharing a tensor with another process moves what it holds."""
        return self.places == self._places()

    def look(self, grads: Sequence[Tensor]) -> bool:
        """Put Σg, Σg·Z, and where trust needs them Σx² and Σd² at lr = 1 into `sums`; False where memory does not lie as it must."""
        for t, g, size, stride in zip(self.tensors, grads, self.sizes, self.strides, strict=True):
            same = t.numel() == g.numel() == size and t.is_cpu and g.is_cpu and t.dtype == g.dtype == torch.float32
            if not (same and _lies(t, stride) and _lies(g, stride) and type(g) is Tensor and not g.is_neg()):
                return False
        xs, gs = [t.data_ptr() for t in self.tensors], [g.data_ptr() for g in grads]
        if not (self.plain and all(xs) and all(gs)) or len(set(xs)) < len(xs):
            return False  # what is empty, all zeros without memory, or two parameters in one
        count = len(self.tensors)
        self.pointers[: 2 * count] = xs + gs
        self.functions.look(torch.get_num_threads(), *self.look_at)
        return True

    def take(self) -> None:
        """Take the step that `orders` say: whether it counts, lr, and the factor on tangents; the gradients are those of `look`."""
        self.functions.take(torch.get_num_threads(), *self.take_at)
        torch.autograd.graph.increment_version(self.tensors)  # as every operation of torch's own would

    def _places(self) -> list[int]:
        return [buffer.data_ptr() for buffers in (self.read, *self.kept) for buffer in buffers]


def _lies(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the elements of a tensor follow each other as the chunk has them. A stride along a single element says nothing."""
    mine = tensor.stride()
    return mine == stride or (
        len(mine) == len(stride) and all(a == b or n == 1 for a, b, n in zip(mine, stride, tensor.shape, strict=True))
    )
