"""Which body a node has, which tensors are stepped as one, and how a step is run: chosen once, when a tower is bound."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..rule import Rule
from ..spec.level import Level
from ..tangents import Raw
from . import functions
from .buffers import Buffer, Record
from .compiled import Compiled
from .eager import Eager, call
from .graph import Graph
from .kernels import kernel
from .native import Native
from .part import EAGER, STAGES, WHOLE, Part
from .shards import Ranks, elements, local
from .tables import serves

# Elements from which on a tensor is stepped in place: gathering then costs more than one more round of kernels. A few fused rounds are
# cheap, and half of what one core has gathered has to travel to the other.
LARGE, LARGE_FUSED, LARGE_LAUNCHED = 2**17, 2**16, 2**18
CAPACITY = 2**22  # elements gathered into one buffer at most
# Buffers up to which a step is compiled in one piece: 12 take half a minute, and the intermediates of all of them are in memory at once.
PIECES = 3


def body(part: Part, params: Sequence[Tensor], *, graph: bool) -> Eager:
    """The body of a node.

    Args:
        part: what it does.
        params: the weights that the tower trains.
        graph: keep the autograd graph of the last update, as the paper does.
    """
    if graph:
        return Graph(part)
    if part.level == 0 and serves(part, params):
        passes = functions.built() if part.compiled else functions.installed()
        if passes is not None:
            return Native(part, passes)
    held = {name: h for name, h in part.hypers.own.items() if name != "lr"}
    if part.compiled or any(h.learned for h in held.values()):
        return Eager(part)
    return Eager(part, kernel(part.rule, {n: h.value for n, h in held.items()}, {n: h.rest for n, h in held.items()}))


def parts(
    params: Sequence[Tensor], state: Mapping[Tensor, Record], serving: Callable[[Tensor], Rule], ranks: Ranks, *, compile: bool
) -> Iterator[list[Tensor]]:
    """Parameters that can be stepped as one: of one device, dtype, role and step count, with the same things kept for each, and on as
    many ranks. All ranks find the same."""
    found: dict[Any, list[Tensor]] = {}
    few = compile and sum(elements(p) >= LARGE_FUSED for p in params) < PIECES
    for p in params:
        record = state[p]
        rule = serving(p)
        served = rule.role.direction, rule._decay_bound() > 0
        key = (p.device, p.dtype, ranks.share(p), *served, float(record["t"]) if "t" in record else 0.0, tuple(record))
        large = LARGE_LAUNCHED if p.device.type != "cpu" else LARGE_FUSED if few else LARGE
        if elements(p) >= large or not rule.elementwise:
            key = (*key, p)
        part = found.setdefault(key, [])
        if part and sum(map(elements, part)) + elements(p) > CAPACITY:
            yield found.pop(key)
            part = found.setdefault(key, [])
        part.append(p)
    yield from (part for part in found.values() if part)


def spread(params: Sequence[Tensor], every: Sequence[Tensor], spec: Level) -> dict[str, tuple[Tensor, int]]:
    """For each element of `params`, among `every` parameter of a group, the position of its value where a hyperparameter has several."""
    if spec.per == "group" or not spec.learning:
        return {}
    ends = list(itertools.accumulate((1 if spec.per == "tensor" else p.numel() for p in every), initial=0))
    starts = dict(zip(every, ends, strict=False))
    if spec.per == "tensor":
        found = [torch.full((local(p).numel(),), starts[p], device=p.device) for p in params]
    else:
        found = [torch.arange(starts[p], starts[p] + p.numel(), device=p.device) for p in params]
    return dict.fromkeys(spec.learning, (torch.cat(found), ends[-1]))


class Runner:
    """Runs the steps of a tower that is compiled: in one piece or stage by stage once they have settled.

    Tangents appear step by step, as a level takes part once the one below has a hypergradient. Each change of structure would be compiled
    for nothing: a step is compiled when one of its kind has added nothing. Code for a step in one piece fits one set of buffers, and stages
    fit all sets with as many elements in as many buffers. Where other tensors have a gradient in every step, as in a mixture of
    experts, there are hundreds of sets, each of which would be compiled for seconds: only the first few are.

    Args:
        step: of level 0.
        body: of level 0.
        tangents: counts the tangents that there are at all levels.
    """

    SETS = 3  # of tensors with a gradient, for which steps are compiled in one piece; and stage by stage

    def __init__(self, step: Callable[..., None], body: Eager, tangents: Callable[[], int]) -> None:
        self.step, self.body, self.tangents = step, body, tangents
        self.compiled = Compiled()
        self.settled: dict[Any, int] = {}  # kinds of steps that add no tangents where there are this many
        self.sets: dict[Any, set[Any]] = {}  # for each way to step, the sets that are compiled

    def __call__(self, gs: list[Tensor], ok: Tensor, q: Raw | None, learn: bool) -> None:
        """Take a step."""
        buffers = self.body.buffers
        numel = sum(buffer.numel for buffer in buffers)
        native = not gs
        way, sizes = (self.body.kind(), self.body.hypers.watched, learn, q is None), (len(buffers), numel)
        kinds = [(WHOLE if native else STAGES, way, sizes)]
        # What ranks tell each other is not compiled, and stands between stages.
        if not native and len(buffers) <= PIECES and numel <= CAPACITY and not self.body.ranks:
            memory = (_memory(buffer, g) for buffer, g in zip(buffers, gs, strict=True))
            kinds.insert(0, (WHOLE, way, (*sizes, *memory)))
        kind = next((kind for kind in kinds if self._admits(*kind)), None)
        before = self.tangents()
        fused = kind is not None and self.settled.get(kind) == before
        if kind is not None and fused:
            mode, way, which = kind
            self.sets.setdefault((mode, way), set()).add(which)
            if mode == WHOLE:
                self.body.arrange(WHOLE)
                self.compiled(kind, self.step, gs, ok, q, learn)
                return
        self.body.arrange(*((STAGES, partial(self.compiled.stage, kind)) if fused else (EAGER, call)))
        self.step(gs, ok, q, learn)
        after = self.tangents()
        if kind is not None and after == before:
            self.settled[kind] = after

    def _admits(self, mode: str, way: Any, which: Any) -> bool:
        """Whether steps of this kind are compiled, or may still be."""
        known = self.sets.get((mode, way), set())
        return which in known or len(known) < self.SETS


def _memory(buffer: Buffer, g: Tensor) -> Any:
    """Which buffer this is, and how tensors that it does not own lie in memory."""
    return buffer.serial, buffer.direct and (buffer.x().stride(), buffer.x().dtype, g.stride())
