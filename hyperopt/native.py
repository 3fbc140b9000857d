"""A hand-made step on a CPU: two passes over the weights in C++, and between them the levels above, which are numbers."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .hypergradients import Displacement
from .rule import Native

if TYPE_CHECKING:
    from .optimizable import Optimizable

BLOCK = 2**13  # elements of a tensor that one thread takes at a time; few enough to share 100,000 out evenly
# torch forbids its own kernels loops of vectors that are not written out, and wants the errno of every root.
FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")


def source(node: "Optimizable", tensors: Sequence[Tensor]) -> Native | None:
    """The hand-made step of a node with these weights, if there is one: on a CPU, in float32, for lr alone, one for all weights."""
    alone = isinstance(node.strategy, Displacement) and node.feasible is None and not node.raw["lr"].dim()
    plain = all(type(t.data) is Tensor and t.is_cpu and t.dtype == torch.float32 for t in tensors)
    return node.rule.native() if alone and plain else None


@functools.cache
def load(path: Path) -> ctypes.CDLL | None:
    """The functions of a source, compiled as torch.compile compiles its own; None where no compiler works, as it will say itself."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = CppCodeCache.load(path.read_text(), extra_flags=FLAGS)
    except (CppCompileError, InvalidCxxCompiler, OSError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.look.argtypes = [number, number, number, pointer, number, pointer, pointer, pointer, pointer]
    library.take.argtypes = [number, number, pointer, number, pointer, pointer, pointer]
    library.look.restype = library.take.restype = None
    return library


class Passes:
    """The two passes over these weights.

    Args:
        library: as `load` found it.
        made: what the rule says of it.
        node: whose weights they are.
        tensors: the weights.
        records: for each its state and tangents.
    """

    def __init__(self, library: ctypes.CDLL, made: Native, node: "Optimizable", tensors: Sequence[Tensor], records: Sequence[Any]) -> None:
        self.library, self.tensors = library, list(tensors)
        # What the pointers below point to has to stay.
        self.read = [node.complements[name] for name in made.complements] + [node.live[name] for name in made.values]
        self.kept = [[record[key] for record in records] for key in (*made.state, "Z.lr", "t")]
        count = len(self.tensors)
        self.pointers = (ctypes.c_void_p * ((2 + len(self.kept)) * count))()
        self.pointers[2 * count :] = [buffer.data_ptr() for buffers in self.kept for buffer in buffers]
        self.values = (ctypes.c_void_p * len(self.read))(*(value.data_ptr() for value in self.read))
        self.sizes = [t.numel() for t in self.tensors]
        blocks = [(i, at, min(BLOCK, size - at)) for i, size in enumerate(self.sizes) for at in range(0, size, BLOCK)]
        self.blocks = torch.tensor(blocks)
        self.partial = torch.empty(4 * len(blocks), dtype=torch.float64)
        self.sums, self.orders = torch.empty(4), torch.empty(3)
        table = len(blocks), self.blocks.data_ptr(), count, ctypes.addressof(self.pointers)
        self.look_at = int(node.projects()), *table, ctypes.addressof(self.values), self.partial.data_ptr(), self.sums.data_ptr()
        self.take_at = *table, ctypes.addressof(self.values), self.orders.data_ptr()

    def look(self, grads: Sequence[Tensor]) -> bool:
        """Put Σg, Σg·Z, and where trust needs them Σx² and Σd² at lr = 1 into `sums`; False where memory does not lie as it must."""
        count = len(self.tensors)
        for t, g, size in zip(self.tensors, grads, self.sizes, strict=True):
            same = t.numel() == size and t.is_cpu and t.dtype == g.dtype == torch.float32
            if not (same and t.is_contiguous() and g.is_contiguous() and not g.is_neg()):
                return False
        self.pointers[:count] = [t.data_ptr() for t in self.tensors]
        self.pointers[count : 2 * count] = [g.data_ptr() for g in grads]
        self.library.look(torch.get_num_threads(), *self.look_at)
        return True

    def take(self) -> None:
        """Take the step that `orders` say: whether it counts, lr, and the factor on tangents; the gradients are those of `look`."""
        self.library.take(torch.get_num_threads(), *self.take_at)
        torch.autograd.graph.increment_version(self.tensors)  # as every operation of torch's own would
