"""Where the tensors of a node live: flattening, dtypes, devices, which parameters have a gradient, and torch.compile."""

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rule import Rule, State

LARGE = 2**18  # elements; from here on gathering costs more than one more round of kernels

_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]

Record = MutableMapping[str, Tensor]


class Chunk:
    """Tensors that are stepped as one: small ones side by side in a flat buffer, a large one as it is.

    State and tangents are buffers of the chunk, changed in place and never replaced; `records` holds views of them, shaped
    like each tensor. Everything is computed in float32, in float64 for float64 tensors, whatever dtype the tensors have.

    Args:
        tensors: parameters of the model, or the raw hyperparameters of a node below; of one device and dtype.
        records: for each tensor the mapping in which its state is kept; what is there already is taken over.
        rule: initialises the state where there is none.
        spread: for hyperparameters with a value per tensor or per coordinate, the position in that vector of each element,
            and the length of the vector.
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
        self.positions = dict(spread or {})
        like = self.tensors[0]
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.flat = len(self.tensors) > 1
        self.direct = not self.flat and like.dtype == self.dtype
        if not self.direct:
            self._x, self._g = self._empty(), self._empty()
            self._x_views, self._g_views = self._views(self._x), self._views(self._g)
        self.gather()
        # One number for all tensors of the chunk, as they have taken every step together.
        self.numbers = {"t"}
        self.t = self._load("t") if "t" in self.records[0] else torch.zeros((), dtype=self.dtype, device=like.device)
        self.state: State = {}
        self.tangents: dict[str, dict[str, Tensor]] = {}
        for key, buffer in self._init(rule).items():
            self.state[key] = self._load(key) if key in self.records[0] else buffer
        for key in list(self.records[0]):
            if key.startswith("Z."):
                name, _, of = key[2:].partition(".")
                self.tangents.setdefault(name, {})[of or "x"] = self._load(key)
        self._keep("t", self.t)
        for key, buffer in self.state.items():
            self._keep(key, buffer)
        for name, tangent in self.tangents.items():
            for of, buffer in tangent.items():
                self._keep(_key(name, of), buffer)

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
        """A copy of the gradients of the tensors, gathered."""
        if self.direct:
            return -grads[0] if maximize else grads[0].clone()
        _copy(self._g_views, list(grads))
        return self._g.neg_() if maximize else self._g

    def side_by_side(self, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor for each of this chunk's, in the shape and dtype in which the chunk is stepped."""
        whole = torch.cat([t.reshape(-1) for t in tensors]) if self.flat else tensors[0]
        return whole.to(self.dtype)

    def spread(self, name: str, value: Tensor) -> Tensor:
        """A hyperparameter for every coordinate of this chunk, on its device and in its dtype."""
        if value.dtype != self.dtype or value.device != self.t.device:
            value = value.to(self.t)
        return value[self.positions[name][0]] if name in self.positions else value

    def inner(self, name: str, g: Tensor, z: Tensor) -> Tensor:
        """<g, z>, summed over the coordinates that share one value of the hyperparameter `name`."""
        if name not in self.positions:
            return torch.dot(g.reshape(-1), z.reshape(-1))
        positions, size = self.positions[name]
        return torch.zeros(size, dtype=g.dtype, device=g.device).index_add(0, positions.reshape(-1), (g * z).reshape(-1))

    def clean(self) -> None:
        """Set the elements of tangents that are not finite to zero, so that they start again."""
        for tangent in self.tangents.values():
            for buffer in tangent.values():
                buffer.nan_to_num_(0.0, 0.0, 0.0)

    def commit(self, x: Tensor, state: State, tangents: dict[str, dict[str, Tensor]], ok: Tensor) -> None:
        """Write what a step made, where ok is 1.; where it is 0. everything keeps its bits."""
        ok = ok.to(self.t)
        if self.limits is not None:
            x = x.clamp(*self.limits)
        self.x().lerp_(x, ok)
        for key, new in state.items():
            self.state[key].lerp_(new, ok)
        for name, tangent in tangents.items():
            mine = self.tangents.setdefault(name, {})
            for of, new in tangent.items():
                if of in mine:
                    mine[of].lerp_(new, ok)
                else:
                    mine[of] = new * ok
                    self._keep(_key(name, of), mine[of])
        self.t += ok

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

    def _views(self, buffer: Tensor) -> list[Tensor]:
        if not self.flat:
            return [buffer]
        return [part.view(t.shape) for part, t in zip(buffer.split([t.numel() for t in self.tensors]), self.tensors, strict=True)]

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
        return (key.rpartition(".")[2] if key.startswith("Z.") else key) in self.numbers


def _key(name: str, of: str) -> str:
    return f"Z.{name}" if of == "x" else f"Z.{name}.{of}"


class Compiled:
    """A node's step fused by torch.compile, from the very same code; eager where no compiler works, after one warning.

    The first steps run eagerly: a level takes part once the one below has a hypergradient, and each such change of structure
    would be compiled for nothing. Gathering and scattering stay outside: compiling a list of 65 tensors took minutes.
    """

    def __init__(self, step: Callable[..., None], warm_up: int) -> None:
        # Imported here, since they take a second that users who do not compile need not wait.
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        self.errors = (TorchDynamoException, InductorError)
        self.eager, self.left = step, warm_up
        self.fused = torch.compile(step, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any, **keywords: Any) -> None:
        if self.left > 0:
            self.left -= 1
            return self.eager(*args, **keywords)
        try:
            return self.fused(*args, **keywords)
        except self.errors as error:
            # Compilation fails before anything has run, so the step can be taken again.
            warnings.warn(f"torch.compile does not work here, this optimizer goes on without it: {error}", RuntimeWarning, stacklevel=2)
            self.fused = self.eager
            return self.eager(*args, **keywords)
