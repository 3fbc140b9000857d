"""Where the tensors of a node live: flattening, dtypes, devices, state and tangents."""

import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import Rule, State
from .edits import Edits
from .shards import is_shared, local, placed

# Elements that are stepped at once in eager mode, so that intermediates stay in the cache. Where kernels are launched, each block needs
# its own launches: on an H100 four blocks made the step of a GPT of 800,000 weights 2.9 times as long as torch's fused Adam, one 1.7
# times; with blocks of 2**22 a tower of 10 million weights held two more copies of them at its peak than on a CPU.
BLOCK, BLOCK_LAUNCHED = 2**18, 2**20

_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]

Record = MutableMapping[str, Tensor]
Tangent = dict[str, dict[str, Tensor]]  # hyperparameter -> "x" or the name of a state -> tangent; absent where it is zero

_serials = itertools.count()


class Buffer:
    """Tensors that are stepped as one: small ones gathered in a flat buffer, a large one in place.

    State and tangents are buffers too, changed in place and never replaced; `records` holds views of them, shaped like each tensor.
    Everything is computed in float32, in float64 for float64 tensors, whatever dtype the tensors have.

    Args:
        tensors: parameters of the model, or the raw hyperparameters of a node below; of one device and dtype. Of DTensors what this rank
            holds is stepped.
        records: for each tensor the mapping in which its state is kept; entries that are there already are taken over.
        rule: initialises the state where there is none.
        spread: for hyperparameters with a value per tensor or per coordinate, the position in that vector of each element, tensor
            by tensor, and the length of the vector.
        limits: the interval in which x must stay, for raw hyperparameters.
        share: the weight of sums over this buffer in sums over all ranks.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        records: Sequence[Record],
        rule: Rule,
        spread: Mapping[str, tuple[Tensor, int]] | None = None,
        limits: tuple[Tensor, Tensor] | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        self.tensors, self.records, self.limits, self.rule = list(tensors), list(records), limits, rule
        self.serial = next(_serials)
        self.shared, self.share = any(map(is_shared, self.tensors)), share
        self.shards = [local(t) for t in self.tensors]  # what this rank holds of each tensor
        like = self.shards[0]
        self.numel, self.total = sum(t.numel() for t in self.shards), sum(t.numel() for t in self.tensors)
        # Gathered in their own memory order, channels_last for example: a copy between orders needs a kernel for each tensor.
        places = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in self.shards]
        self.strides = [torch.empty_like(place).stride() for place in places]
        self.block = BLOCK if like.device.type == "cpu" else BLOCK_LAUNCHED
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.flat = len(self.tensors) > 1
        self.direct = not self.flat and like.dtype == self.dtype
        self._x = self._g = None
        self.scratch: Tensor | None = None  # a direction that lasts from one pass to the next
        self.positions = {name: (self._in_order(positions), size) for name, (positions, size) in (spread or {}).items()}
        # One number for all tensors, as they have taken every step together.
        self.numbers = {"t"}
        self.t = self.load("t") if "t" in self.records[0] else torch.zeros((), dtype=self.dtype, device=like.device)
        self.one = torch.ones_like(self.t)
        self.state: State = {}
        self.tangents: Tangent = {}
        self.edits = Edits(self) if rule.gapped else None
        for key, buffer in self._initial(rule).items():
            self.state[key] = self.load(key) if key in self.records[0] else buffer
        for key in list(self.records[0]):
            if key.startswith("Z."):
                self.tangents.setdefault(key.split(".")[1], {})[base_of(key)] = self.load(key)
        self.keep("t", self.t)
        for key, buffer in self.state.items():
            self.keep(key, buffer)
        for name, tangent in self.tangents.items():
            for of, buffer in tangent.items():
                self.keep(_key(name, of), buffer)

    def gather(self) -> None:
        """Copy the tensors into the flat buffer, where there is one."""
        if self.shared:
            self.shards = [local(t) for t in self.tensors]  # FSDP2 moves shards that it pads, before the first step
        if not self.direct:
            if self._x is None:
                self._x = self.empty()
                self._x_views = self.views(self._x)
            _copy(self._x_views, self.shards)
            if self.edits is not None:
                self.edits.gathered(self._x)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the state along with weights that are changed from outside again and again."""
        if self.edits is not None and self.edits.wanted():
            self.gather()
            self.edits.begin()

    def scatter(self) -> None:
        """Copy the flat buffer back to the tensors, rounding to their dtype."""
        if not self.direct:
            _copy(self.shards, self._x_views)
        if self.edits is not None:
            self.edits.finish()

    def x(self) -> Tensor:
        """The values of the tensors, as gathered last."""
        if self.direct:
            return self.shards[0].detach()
        if self._x is None:
            self.gather()
        assert self._x is not None
        return self._x

    def gradient(self, grads: Sequence[Tensor], maximize: bool) -> Tensor:
        """The gradients of the tensors, gathered; not to be changed where there is one tensor."""
        grads = self._held(grads)
        if self.direct:
            return -grads[0] if maximize else grads[0]
        if self._g is None:
            self._g = self.empty()
            self._g_views = self.views(self._g)
        _copy(self._g_views, list(grads))
        return self._g.neg_() if maximize else self._g

    def side_by_side(self, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor for each of this buffer's, in the shape and dtype in which the buffer is stepped."""
        tensors = self._held(tensors)
        if not self.flat:
            return tensors[0].to(self.dtype)
        whole = self.empty()
        _copy(self.views(whole), list(tensors))
        return whole

    def spread(self, name: str, value: Tensor, cut: slice | None = None) -> Tensor:
        """A hyperparameter for every coordinate of this buffer, or of a block of it, on its device and in its dtype."""
        if value.dtype != self.dtype or value.device != self.t.device:
            value = value.to(self.t)
        if name not in self.positions:
            return value
        positions = self.positions[name][0]
        return value[positions if cut is None else positions.view(-1)[cut]]

    def inner(self, name: str, g: Tensor, z: Tensor, cut: slice | None = None) -> Tensor:
        """⟨g, z⟩ over the buffer or a block of it, summed over the coordinates that share one value of the hyperparameter `name`."""
        if self.share != 1:
            z = z * self.share
        if name not in self.positions:
            return torch.dot(g.reshape(-1), z.reshape(-1))
        positions, size = self.positions[name]
        positions = positions.reshape(-1)[cut] if cut else positions.reshape(-1)
        return torch.zeros(size, dtype=g.dtype, device=g.device).index_add(0, positions, (g * z).reshape(-1))

    def tangent(self, name: str, of: str, like: Tensor) -> Tensor:
        """The tangent of x or of a state along a hyperparameter, zero where there was none."""
        mine = self.tangents.setdefault(name, {})
        if of not in mine:
            if not like.dim() and self.x().dim():
                self.numbers.add(of)
            mine[of] = torch.zeros_like(like if of in self.numbers else self.x())
            self.keep(_key(name, of), mine[of])
        return mine[of]

    def extend(self, rule: Rule) -> None:
        """Add the state that `rule` needs and that is not there yet."""
        self.rule = rule
        for key, buffer in self._initial(rule).items():
            if key not in self.state:
                self.state[key] = buffer
                self.keep(key, buffer)

    def layout(self) -> Any:
        """What buffers that look alike to compiled code have in common."""
        x = self.x()
        kept = tuple((name, *tangent) for name, tangent in self.tangents.items())
        names = tuple(self.state), kept, tuple(self.positions), tuple(sorted(self.numbers))
        return x.shape, x.stride(), x.dtype, x.device, self.share, self.rule.role, *names

    def empty(self) -> Tensor:
        """A new tensor in the shape in which the buffer is stepped."""
        like = self.shards[0]
        shape = (self.numel,) if self.flat else like.shape
        return torch.empty(shape, dtype=self.dtype, device=like.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The part of `buffer` that belongs to each tensor, in its shape."""
        if not self.flat:
            return [buffer]
        parts = buffer.split([t.numel() for t in self.shards])
        return [part.as_strided(t.shape, stride) for part, t, stride in zip(parts, self.shards, self.strides, strict=True)]

    def is_number(self, key: str) -> bool:
        """Whether a record's entry is one number for the whole buffer."""
        return (base_of(key) if key.startswith("Z.") else key) in self.numbers

    def load(self, key: str) -> Tensor:
        """What the records hold under a name, in a buffer of its own."""
        if self.is_number(key):
            return self.records[0][key].detach().to(self.shards[0].device, self.dtype, copy=True)
        buffer = self.empty()
        _copy(self.views(buffer), [record[key] for record in self.records])
        return buffer

    def keep(self, key: str, buffer: Tensor) -> None:
        """Show a buffer in the records, as views shaped like each tensor."""
        views = [buffer] * len(self.records) if self.is_number(key) else self.views(buffer)
        for record, view in zip(self.records, views, strict=True):
            record[key] = view

    def _initial(self, rule: Rule) -> State:
        x = self.x()
        state = rule.init(x)
        if self.positions:
            return {key: buffer.expand(x.shape).clone() for key, buffer in state.items()}
        if x.dim():
            self.numbers |= {key for key, buffer in state.items() if not buffer.dim()}
        return state

    def _held(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What this rank holds of tensors like this buffer's."""
        return [placed(a, t) for a, t in zip(tensors, self.tensors, strict=True)] if self.shared else tensors

    def _in_order(self, positions: Tensor) -> Tensor:
        """What is given for each element, tensor by tensor, in the order in which the buffer has them."""
        if not self.flat:
            return positions.view(self.shards[0].shape)
        ordered = torch.empty_like(positions)
        views = self.views(ordered)
        for view, part in zip(views, positions.split([view.numel() for view in views]), strict=True):
            view.copy_(part.view(view.shape))
        return ordered


def _key(name: str, of: str) -> str:
    return f"Z.{name}" if of == "x" else f"Z.{name}.{of}"


def base_of(key: str) -> str:
    """Of what `_key` names the tangent."""
    return key[2:].partition(".")[2] or "x"
