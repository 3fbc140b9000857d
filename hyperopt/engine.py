"""Where the tensors of a node live: flattening, dtypes, devices, and which parameters have a gradient."""

import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .part import Part
from .rule import Rule, State

# Elements from which on a tensor is stepped where it is: gathering costs more than one more round of kernels then. A few rounds
# that are fused are cheap, and half of what one core has gathered has to travel to the other.
LARGE, LARGE_FUSED = 2**17, 2**16
BLOCK = 2**18  # elements that are stepped at once, so that what is made on the way stays in the cache
# The same where kernels are launched, of which every block needs its own: on an H100 `ScheduleFree(Adam) / Adam` made the step of a
# GPT of 800,000 weights 2.9 times as long in four blocks, 1.7 times in one. In blocks of 2**22 a tower of 10 million weights held two
# copies of them more at its peak than on a CPU.
LARGE_LAUNCHED, BLOCK_LAUNCHED = 2**18, 2**20

_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]

Record = MutableMapping[str, Tensor]

Scratch = dict[tuple[torch.dtype, torch.device], Tensor]

_serials = itertools.count()


class Chunk:
    """Tensors that are stepped as one: small ones side by side in a flat buffer, a large one as it is.

    State and tangents are buffers of the chunk, changed in place and never replaced; `records` holds views of them, shaped
    like each tensor. Everything is computed in float32, in float64 for float64 tensors, whatever dtype the tensors have.

    Args:
        tensors: parameters of the model, or the raw hyperparameters of a node below; of one device and dtype.
        records: for each tensor the mapping in which its state is kept; what is there already is taken over.
        rule: initialises the state where there is none.
        spread: for hyperparameters with a value per tensor or per coordinate, the position in that vector of each element, tensor
            by tensor, and the length of the vector.
        limits: the interval in which x must stay, for raw hyperparameters.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        records: Sequence[Record],
        rule: Rule,
        spread: Mapping[str, tuple[Tensor, int]] | None = None,
        limits: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.tensors, self.records, self.limits = list(tensors), list(records), limits
        self.serial = next(_serials)
        # A chunk that is split is stepped block by block, where it may be; what is made of a lean one on the way is not kept.
        self.separable = self.split = False
        self.lasting: Scratch = {}
        self.shared: Scratch = {}
        like = self.tensors[0]
        self.numel = sum(t.numel() for t in self.tensors)
        # Gathered in their own order in memory, channels_last say: from one order to another a copy is a kernel for each tensor.
        places = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in self.tensors]
        self.strides = [torch.empty_like(place).stride() for place in places]
        self.lean = self.numel >= self.block
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.flat = len(self.tensors) > 1
        self.direct = not self.flat and like.dtype == self.dtype
        if not self.direct:
            self._x, self._g = self._empty(), self._empty()
            self._x_views, self._g_views = self._views(self._x), self._views(self._g)
        self.gather()
        self.positions = {name: (self._in_order(positions), size) for name, (positions, size) in (spread or {}).items()}
        # One number for all tensors of the chunk, as they have taken every step together.
        self.numbers = {"t"}
        self.t = self._load("t") if "t" in self.records[0] else torch.zeros((), dtype=self.dtype, device=like.device)
        self.one = torch.ones_like(self.t)
        self.state: State = {}
        self.tangents: dict[str, dict[str, Tensor]] = {}
        for key, buffer in self._init(rule).items():
            self.state[key] = self._load(key) if key in self.records[0] else buffer
        for key in list(self.records[0]):
            if key.startswith("Z."):
                self.tangents.setdefault(key.split(".")[1], {})[_of(key)] = self._load(key)
        self._keep("t", self.t)
        for key, buffer in self.state.items():
            self._keep(key, buffer)
        for name, tangent in self.tangents.items():
            for of, buffer in tangent.items():
                self._keep(_key(name, of), buffer)

    @property
    def block(self) -> int:
        """Elements that are stepped at once."""
        return BLOCK if self.tensors[0].device.type == "cpu" else BLOCK_LAUNCHED

    def gather(self) -> None:
        """Copy the tensors into the chunk's own buffer, where it has one."""
        if not self.direct:
            _copy(self._x_views, self.tensors)

    def scatter(self) -> None:
        """Copy the chunk's own buffer back to the tensors, rounding to their dtype."""
        if not self.direct:
            _copy(self.tensors, self._x_views)

    def x(self) -> Tensor:
        """The values of the tensors, as gathered last."""
        return self.tensors[0].detach() if self.direct else self._x

    def gradient(self, grads: Sequence[Tensor], maximize: bool) -> Tensor:
        """The gradients of the tensors, gathered; not to be changed where there is one."""
        if self.direct:
            return -grads[0] if maximize else grads[0]
        _copy(self._g_views, list(grads))
        return self._g.neg_() if maximize else self._g

    def parts(self, g: Tensor, ok: Tensor, *, clean: bool) -> "list[Part]":
        """What is stepped at once: the whole chunk, or blocks of a large one.

        Args:
            g: as `gradient` made it.
            ok: 1. if the step counts.
            clean: g is finite whatever `ok` is.
        """
        x, t, ok = self.x(), self.t + 1, ok.to(self.t)
        skip = 1 - ok
        cuts = self._cuts(x, g)
        if cuts is None:
            return [Part(self, x, g, self.state, self.tangents, t, ok, skip, clean=clean)]
        xs, gs = x.view(-1).split(self.block), g.view(-1).split(self.block)
        # A number is read by every block before the first of them writes it.
        numbers = {key: value.clone() for key, value in self.state.items() if self._is_number(key)}
        return [
            Part(
                self,
                x,
                g,
                {key: numbers[key] if key in numbers else buffer.view(-1)[cut] for key, buffer in self.state.items()},
                {name: {of: self._cut(of, z, cut) for of, z in tangent.items()} for name, tangent in self.tangents.items()},
                t,
                ok,
                skip,
                cut,
                clean=clean,
            )
            for x, g, cut in zip(xs, gs, cuts, strict=True)
        ]

    def side_by_side(self, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor for each of this chunk's, in the shape and dtype in which the chunk is stepped."""
        if not self.flat:
            return tensors[0].to(self.dtype)
        whole = self._empty()
        _copy(self._views(whole), list(tensors))
        return whole

    def spread(self, name: str, value: Tensor, cut: slice | None = None) -> Tensor:
        """A hyperparameter for every coordinate of this chunk, or of a part of it, on its device and in its dtype."""
        if value.dtype != self.dtype or value.device != self.t.device:
            value = value.to(self.t)
        if name not in self.positions:
            return value
        positions = self.positions[name][0]
        return value[positions if cut is None else positions.view(-1)[cut]]

    def inner(self, name: str, g: Tensor, z: Tensor, cut: slice | None = None) -> Tensor:
        """<g, z> over the chunk or a part of it, summed over the coordinates that share one value of the hyperparameter `name`."""
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
            self._keep(_key(name, of), mine[of])
        return mine[of]

    def extend(self, rule: Rule) -> None:
        """Add the state that `rule` needs and that is not there yet."""
        for key, buffer in self._init(rule).items():
            if key not in self.state:
                self.state[key] = buffer
                self._keep(key, buffer)

    def _init(self, rule: Rule) -> State:
        x = self.x()
        state = rule.init(x)
        if self.positions:
            return {key: buffer.expand(x.shape).clone() for key, buffer in state.items()}
        if x.dim():
            self.numbers |= {key for key, buffer in state.items() if not buffer.dim()}
        return state

    def _empty(self) -> Tensor:
        like = self.tensors[0]
        shape = (sum(t.numel() for t in self.tensors),) if self.flat else like.shape
        return torch.empty(shape, dtype=self.dtype, device=like.device)

    def layout(self) -> Any:
        """What is the same for chunks that look alike to compiled code."""
        x = self.x()
        kept = tuple((name, *tangent) for name, tangent in self.tangents.items())
        return x.shape, x.stride(), x.dtype, x.device, tuple(self.state), kept, tuple(self.positions), tuple(sorted(self.numbers))

    def scratch(self, like: Tensor, cut: slice | None, *, lasting: bool) -> Tensor:
        """A buffer shaped like the chunk or a block of it; one that need not last is shared by all chunks of a group."""
        kept = self.lasting if lasting else self.shared
        size = self.numel if lasting or cut is None else self.block
        key = self.dtype, like.device
        if key not in kept or kept[key].numel() < size:
            kept[key] = torch.empty(size, dtype=self.dtype, device=like.device)
        start = cut.start if lasting and cut is not None else 0
        return kept[key][start : start + like.numel()].view(like.shape)

    def _cuts(self, x: Tensor, g: Tensor) -> list[slice] | None:
        # A little more than one block is not worth a second round of kernels.
        if not self.split or self.numel < 2 * self.block or not x.is_contiguous() or not g.is_contiguous():
            return None
        return [slice(start, start + self.block) for start in range(0, self.numel, self.block)]

    def _cut(self, of: str, z: Tensor, cut: slice) -> Tensor:
        return z.clone() if of in self.numbers else z.view(-1)[cut]

    def _views(self, buffer: Tensor) -> list[Tensor]:
        if not self.flat:
            return [buffer]
        parts = buffer.split([t.numel() for t in self.tensors])
        return [part.as_strided(t.shape, stride) for part, t, stride in zip(parts, self.tensors, self.strides, strict=True)]

    def _in_order(self, positions: Tensor) -> Tensor:
        """What is given for each element, tensor by tensor, in the order in which the chunk has them."""
        if not self.flat:
            return positions.view(self.tensors[0].shape)
        ordered = torch.empty_like(positions)
        views = self._views(ordered)
        for view, part in zip(views, positions.split([view.numel() for view in views]), strict=True):
            view.copy_(part.view(view.shape))
        return ordered

    def _load(self, key: str) -> Tensor:
        if self._is_number(key):
            return self.records[0][key].detach().clone()
        buffer = self._empty()
        _copy(self._views(buffer), [record[key] for record in self.records])
        return buffer

    def _keep(self, key: str, buffer: Tensor) -> None:
        views = [buffer] * len(self.records) if self._is_number(key) else self._views(buffer)
        for record, view in zip(self.records, views, strict=True):
            record[key] = view

    def _is_number(self, key: str) -> bool:
        return (_of(key) if key.startswith("Z.") else key) in self.numbers


def _key(name: str, of: str) -> str:
    return f"Z.{name}" if of == "x" else f"Z.{name}.{of}"


def _of(key: str) -> str:
    """Of what `_key` names the tangent."""
    return key[2:].partition(".")[2] or "x"
