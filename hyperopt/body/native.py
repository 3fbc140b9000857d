"""The body of a node in two hand-written C++ passes over the weights, where they lie in memory."""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..guards import Size
from ..rule import State
from ..tangents import Raw
from .arithmetic import OnHost
from .buffers import Buffer
from .eager import Eager
from .functions import Column, Value, block
from .part import Part
from .tables import columns, computed, values

SETS = 8  # sets of parameters that have a gradient together, of which the tables of pointers are kept
# Elements up to which directions that are not computed in C++ are kept from the first pass to the second, with the new state beside them.
GIVEN = 2**22


class Native(Eager):
    """The passes of passes.cpp, for every rule of which lr alone is learned, or nothing, and does not enter the direction.

    The first pass runs in `begin` and the second in `finish`, so that what lies between them is numbers, which can be compiled. A step for
    which memory does not lie as it has to, or in which a sum of squares overflows, is taken by the eager body.

    Args:
        part: as for `Eager`.
        functions: of passes.cpp.
    """

    def __init__(self, part: Part, functions: ctypes.CDLL) -> None:
        super().__init__(part)
        self.functions = functions
        self.kept: dict[Any, Passes] = {}
        self.passes: Passes | None = None  # of this step
        self.left: tuple[Passes, float] | None = None  # those of the step before, and the sum of x that they have left
        self.sums = torch.zeros(6, dtype=torch.float32, device="cpu")
        self.told = self.sums.numpy()  # the same memory
        self.orders = torch.zeros(4, dtype=torch.float32, device="cpu")

    def begin(self, grads: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]] | None, *, maximize: bool) -> list[Tensor]:
        """Take the first pass."""
        self.passes = None if maximize else self._passes()
        left, self.left = self.left, None
        if self.passes is not None and self.passes.look(grads, directions, self):
            if left is not None and left[0] is self.passes and left[1] != float(self.told[5]):
                for edits in self.passes.edits:
                    edits.changed.fill_(True)
            return []
        self.passes = None
        if left is not None:
            for edits in left[0].edits:
                edits.sum = None
        return super().begin(grads, directions, maximize=maximize)

    def finite(self, gs: Sequence[Tensor]) -> Tensor:
        return super().finite(gs) if self.passes is None else self.sums[0].clone()

    def kind(self) -> Any:
        return super().kind() if self.passes is None else "native"

    def pull(self, gs: Sequence[Tensor], wanted: bool) -> tuple[Tensor | None, Raw]:
        if self.passes is None:
            return super().pull(gs, wanted)
        finite, q, _, _, self.total, _ = self.sums.clone().unbind()
        return finite, {"lr": q} if wanted and self.tangents.names else {}

    def measure(self, r: Raw, ok: Tensor) -> Size | None:
        if self.passes is None:
            return super().measure(r, ok)
        if not self.projects:
            return None
        _, _, place, move, _, _ = self.sums.unbind()
        return Size(move * self.hypers["lr"].at(r["lr"]) / place.clamp_min(self.floor()), self.steps())

    def take(self, r: Raw, sound: Raw, keep: Tensor | None, ok: Tensor) -> None:
        """As in `Eager`: say what the second pass is to do."""
        if self.passes is None:
            super().take(r, sound, keep, ok)
            return
        lr = self.hypers["lr"].at(r["lr"]) if r else self.hypers["lr"].value
        kept = self.tangents.gamma.get("lr", 0.0) * (sound["lr"] if sound else torch.ones_like(ok))
        assert self.total is not None
        self.orders.copy_(torch.stack([ok, lr, kept if keep is None else kept * keep, self.total]))

    def finish(self) -> None:
        """Take the second pass."""
        if self.passes is None:
            super().finish()
        else:
            self.passes.take(self)
            if self.passes.edits:
                self.left = self.passes, float(self.told[5])

    def changed(self) -> None:
        super().changed()
        self.kept.clear()

    def _passes(self) -> "Passes | None":
        """The tables for the buffers of this step; None where directions would take too much memory."""
        large = sum(buffer.numel for buffer in self.buffers) > GIVEN
        if large and sum(buffer.numel for buffer in self.buffers if not computed(buffer)) > GIVEN:
            return None
        for buffer in self.buffers if self.tangents.names else ():
            if "lr" not in buffer.tangents:
                self._make_tangents(buffer)
        key = tuple(buffer.serial for buffer in self.buffers)
        passes = self.kept.get(key)
        if passes is None or not passes.pointers_valid():
            if len(self.kept) >= SETS:
                self.kept.clear()
            passes = self.kept[key] = Passes(self)
        return passes

    def _make_tangents(self, buffer: Buffer) -> None:
        names = ("gap",) if self.rule.gapped else ("average",) if self.rule.averages else ()
        for of in ("x", *names):
            buffer.tangent("lr", of, buffer.x())
        if self.rule.gapped and not self.rule.totals:  # where the average forgets, its weight is a constant
            buffer.tangent("lr", "weight", buffer.t)


class Passes:
    """The two passes over the weights of these buffers.

    Args:
        body: the `Native` whose buffers they are.
    """

    def __init__(self, body: Any) -> None:
        self.functions, self.buffers = body.functions, list(body.buffers)
        self.tensors = [t for buffer in self.buffers for t in buffer.tensors]
        self.sizes = [t.numel() for t in self.tensors]
        self.strides = [stride for buffer in self.buffers for stride in buffer.strides]
        self.given: list[tuple[Buffer, Tensor, State]] = []  # direction and new state of a buffer, where they are not computed in C++
        self.edits = [buffer.edits for buffer in self.buffers if buffer.edits is not None]
        self.told = [not computed(buffer) for buffer in self.buffers]
        count = self.count = len(self.tensors)
        self.columns = [columns(body, buffer) for buffer in self.buffers]
        self.values = values(body)
        self.contiguous = all(kept.is_contiguous() for found in self.columns for kept in found.values())
        self.kept = [kept for found in self.columns for kept in found.values()] + [v for v in self.values if v is not None]
        self.places = self._places()
        self.pointers = (ctypes.c_void_p * (len(Column) * count))()
        at = 0
        for buffer, found in zip(self.buffers, self.columns, strict=True):
            ends = list(itertools.accumulate((4 * t.numel() for t in buffer.tensors), initial=0))
            for i in range(len(buffer.tensors)):
                for column, kept in found.items():
                    self.pointers[column * count + at + i] = kept.data_ptr() + (0 if column >= Column.T else ends[i])
            at += len(buffer.tensors)
        self.numbers = (ctypes.c_void_p * len(Value))(*(None if v is None else v.data_ptr() for v in self.values))
        length = block(sum(self.sizes))
        blocks = [(i, start, min(length, size - start)) for i, size in enumerate(self.sizes) for start in range(0, size, length)]
        # Not of the dtype and on the device that a user may have made the default.
        self.blocks = torch.tensor(blocks, dtype=torch.int64, device="cpu")
        self.heads = torch.tensor(
            list(itertools.accumulate((len(b.tensors) for b in self.buffers[:-1]), initial=0)), dtype=torch.int64, device="cpu"
        )
        self.partial = torch.empty(6 * len(blocks), dtype=torch.float64, device="cpu")
        table = len(blocks), self.blocks.data_ptr(), count, ctypes.addressof(self.pointers), ctypes.addressof(self.numbers)
        results = self.partial.data_ptr(), body.sums.data_ptr()
        self.look_at = int(body.projects), *table, *results
        self.take_at = *table, len(self.heads), self.heads.data_ptr(), body.orders.data_ptr(), *results

    def pointers_valid(self) -> bool:
        """Whether state and hyperparameters are where they were: sharing a tensor with another process moves its storage."""
        return self.places == self._places()

    def look(self, grads: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]] | None, body: Any) -> bool:
        """Write to `sums` what is known before the step; False where memory does not lie as it must, or a sum overflows."""
        gs = [g for each in grads for g in each]
        for t, g, size, stride in zip(self.tensors, gs, self.sizes, self.strides, strict=True):
            same = t.numel() == g.numel() == size and t.is_cpu and g.is_cpu and t.dtype == g.dtype == torch.float32
            lies = (t.stride() == stride or _lies(t, stride)) and (g.stride() == stride or _lies(g, stride))
            if not (same and lies and type(g) is Tensor and not g.is_neg()):
                return False
        x_pointers, g_pointers = [t.data_ptr() for t in self.tensors], [g.data_ptr() for g in gs]
        if not (self.contiguous and all(x_pointers) and all(g_pointers)) or len(set(x_pointers)) < len(x_pointers):
            return False  # what is empty, all zeros without memory, or two parameters in one
        self.pointers[: 2 * self.count] = x_pointers + g_pointers
        for buffer in self.buffers:
            buffer.follow()
        if any(self.told):
            self._give(grads, directions, body)
        if self.functions.look(torch.get_num_threads(), *self.look_at):
            self.given = []
            return False
        return True

    def take(self, body: Any) -> None:
        """Take the step that `orders` say: whether it counts, lr, and the factor on tangents; the gradients are those of `look`."""
        self.functions.take(torch.get_num_threads(), *self.take_at)
        torch.autograd.graph.increment_version(self.tensors)  # as every operation of torch's own would
        for edits in self.edits:
            if edits.wanted():
                edits.buffer.gather()
                edits.finish()
        for buffer, _, own in self.given:
            for key, new in own.items():
                OnHost.write(buffer.state[key], new, bool(body.orders[0] > 0))
        self.given = []

    def _give(self, grads: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]] | None, body: Any) -> None:
        """Compute the directions in operations of torch."""
        h = body.hypers.values({})
        pointers: list[int | None] = []
        for i, buffer in enumerate(self.buffers):
            if not self.told[i]:
                pointers += [None] * len(buffer.tensors)
                continue
            if directions is not None:
                d, own = buffer.side_by_side(directions[i]), {}
            else:
                d, own = buffer.rule.direction(buffer.gradient(grads[i], maximize=False), buffer.state, h, buffer.t + 1)
            strides = (1,) if buffer.flat else buffer.strides[0]
            if d.stride() != strides or d.dtype != torch.float32 or d.shape != buffer.x().shape:  # as the weights lie, element by element
                d = torch.empty_strided(buffer.x().shape, strides, dtype=torch.float32, device="cpu").copy_(d)
            self.given.append((buffer, d, own))
            ends = itertools.accumulate((4 * t.numel() for t in buffer.tensors[:-1]), initial=0)
            pointers += [d.data_ptr() + end for end in ends]
        self.pointers[Column.D * self.count : (Column.D + 1) * self.count] = pointers

    def _places(self) -> list[int]:
        return [kept.data_ptr() for kept in self.kept]


def _lies(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the elements of a tensor follow each other as the buffer has them. A stride along a single element says nothing."""
    mine = tensor.stride()
    return mine == stride or (
        len(mine) == len(stride) and all(a == b or n == 1 for a, b, n in zip(mine, stride, tensor.shape, strict=True))
    )
