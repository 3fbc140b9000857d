"""How a node knows what its next gradient says about its hyperparameters: Z = ∂x/∂r, made in four ways.

Each strategy is an object with the same methods. `pull` returns q = Zᵀg, `ends` says how far a step would go, and `advance`
takes it and makes Z' for the next. They agree with one another to rounding wherever more than one applies. Of a rule that averages
inside, such as ScheduleFree, q goes through the average: see `share`.

    Tangents        every rule, every hyperparameter, every horizon: forward derivatives carried from step to step
    Displacement    lr alone, for a rule whose displacement is linear in it: no differentiation at all
    Following       the same of a rule that averages: what follows from the displacement alone is differentiated
    Graph           the paper's way, horizon 1: keep the autograd graph of the last update; the reference for the others
"""

import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .rule import State

if TYPE_CHECKING:
    from .engine import Chunk
    from .optimizable import Optimizable
    from .part import Part

Raw = dict[str, Tensor]
Tangent = dict[str, dict[str, Tensor]]  # hyperparameter -> "x" or the name of a state -> tangent; absent where it is zero
End = tuple[Tensor, Tensor | None, Tensor]  # a move, a factor on it, and what it moves


@dataclass(frozen=True)
class Carried:
    """What the ways have in common that carry Z along with x, forgetting by γ = 1 − 1/horizon."""

    gamma: float

    def ready(self, node: "Optimizable") -> bool:
        return any(chunk.tangents for chunk in node.chunks)

    def pull(self, node: "Optimizable", gs: list[Tensor]) -> Raw:
        return combine(node, [share(node, chunk, g) for chunk, g in zip(node.chunks, gs, strict=True)])


@dataclass(frozen=True)
class Tangents(Carried):
    """(Z', S') = derivative of `update` at (x, s, r) along (γZ, γS, e), with g held constant."""

    def __post_init__(self) -> None:
        _silence()

    def ends(self, node: "Optimizable", batch: "list[Part]", raw: Raw) -> list[End]:
        return _ends(node, batch, raw)

    def advance(self, node: "Optimizable", batch: "list[Part]", raw: Raw, keep: Raw) -> None:
        news: list[tuple[Tensor, State]] = []
        out: list[Tangent] = [{} for _ in batch]
        for part in batch:
            part.clean_tangents()
        for name in raw:
            news, tangents = self._along(node, name, batch, raw, keep)
            for mine, new in zip(out, tangents, strict=True):
                mine[name] = new
        for part, new, tangent in zip(batch, news, out, strict=True):
            part.commit(*new, tangent)

    def _along(
        self, node: "Optimizable", name: str, batch: "list[Part]", raw: Raw, keep: Raw
    ) -> tuple[list[tuple[Tensor, State]], list[dict[str, Tensor]]]:
        """The updates and their derivative along one hyperparameter."""
        carried = [{k: z * _like(keep[name], p, name, z) for k, z in p.tangents.get(name, {}).items()} if self.gamma else {} for p in batch]
        news, tangents = [], []
        with forward_ad.dual_level():
            states = [_duals(part.state, z) for part, z in zip(batch, carried, strict=True)]
            duals = [_dual(part.x, z.get("x")) for part, z in zip(batch, carried, strict=True)]
            along = {**raw, name: _dual(raw[name], torch.ones_like(raw[name]))}
            for x1, s1 in node.updates(batch, duals, states, along):
                (x1, z), *rest = [forward_ad.unpack_dual(a) for a in (x1, *s1.values())]
                news.append((x1, {k: pair.primal for k, pair in zip(s1, rest, strict=True)}))
                # At horizon 1 nothing is carried, so the tangents of the state need not be kept.
                found = {"x": z} | ({k: pair.tangent for k, pair in zip(s1, rest, strict=True)} if self.gamma else {})
                tangents.append({k: z for k, z in found.items() if z is not None and not (k == "x" and node.implied())})
        return news, tangents


class Displacement(Carried):
    """Z' = γ·(∂x'/∂x)·Z + (x' − x): the tangent of log lr, for a rule whose displacement is linear in it.

    The displacement is lr times what the rule itself does at x = 0 and lr = 1, and not x' − x: at lr = 1e-8 a weight of 0.1
    does not change in float32, and the difference would be 0 where the derivative is not. It is added to x and Z in place.
    """

    def ends(self, node: "Optimizable", batch: "list[Part]", raw: Raw) -> list[End]:
        (part,) = batch
        made = direction(node, part, raw)
        if not part.chunk.lean or (node.kernel and not torch.compiler.is_compiling()):
            part.made = made
        return [(made[0], node.values(raw, part).lr, part.state.get(node.rule.moves, part.x))]

    def advance(self, node: "Optimizable", batch: "list[Part]", raw: Raw, keep: Raw) -> None:
        (part,) = batch
        along, state = part.made or direction(node, part, raw)
        h = node.values(raw, part)
        part.clean_tangents()
        kept, shrink = _like(keep["lr"], part, "lr", along), node.rule.shrink(h)
        part.displace("lr", along, h.lr, kept if isinstance(shrink, float) else kept * shrink)
        part.commit(None, state, {})


class Following(Tangents):
    """Tangents for a rule that makes its step in two halves, of which hyperparameters are learned that the second alone reads.

    The first, which has most of the operations, is taken once, for the size of the step and for the step.
    """

    def ends(self, node: "Optimizable", batch: "list[Part]", raw: Raw) -> list[End]:
        (part,) = batch
        made = self._ahead(node, part, raw)
        if not part.chunk.lean:
            part.made = made
        return [(made[0], node.values(raw, part).lr, part.state[node.rule.moves])]

    def advance(self, node: "Optimizable", batch: "list[Part]", raw: Raw, keep: Raw) -> None:
        (part,) = batch
        move, own = part.made or self._ahead(node, part, raw)
        part.clean_tangents()
        state: State = {}
        tangents: Tangent = {}
        for name in raw:
            carried = {k: z * _like(keep[name], part, name, z) for k, z in part.tangents.get(name, {}).items()}
            with forward_ad.dual_level():
                duals = _duals(part.state, carried)
                h = node.values({**raw, name: _dual(raw[name], torch.ones_like(raw[name]))}, part)
                made = node.rule.follow(duals[node.rule.moves] + h.lr * move, duals, h)
                pairs = {k: forward_ad.unpack_dual(s) for k, s in made.items()}
            state = {k: pair.primal for k, pair in pairs.items()}
            tangents[name] = {k: pair.tangent for k, pair in pairs.items() if pair.tangent is not None}
        assert node.rule.weights is not None
        part.commit(node.rule.weights(state), {**own, **state}, tangents)

    def _ahead(self, node: "Optimizable", part: "Part", raw: Raw) -> tuple[Tensor, State]:
        return node.rule.ahead(part.gradient(), part.state, node.values(raw, part, lr=part.chunk.one), part.t)


class Graph:
    """The autograd graph of the last update, with x, g and s detached: `q = grad(x', r, grad_outputs=g)`.

    The paper's selective detach, read literally. It looks at one flag on the host in every step and cannot be saved:
    `Tangents` at horizon 1 are the same numbers without either.
    """

    gamma = 0.0

    def __init__(self) -> None:
        self.leaves: Raw = {}
        self.outputs: dict[Chunk, Tensor] = {}

    def ready(self, node: "Optimizable") -> bool:
        return any(chunk in self.outputs for chunk in node.chunks)

    def pull(self, node: "Optimizable", gs: list[Tensor]) -> Raw:
        pairs = [(self.outputs[c], g) for c, g in zip(node.chunks, gs, strict=True) if c in self.outputs]
        outputs, grads = zip(*pairs, strict=True)
        qs = torch.autograd.grad(outputs, list(self.leaves.values()), grads, retain_graph=True, allow_unused=True)
        return {name: torch.zeros_like(leaf) if q is None else q for (name, leaf), q in zip(self.leaves.items(), qs, strict=True)}

    def ends(self, node: "Optimizable", batch: "list[Part]", raw: Raw) -> list[End]:
        return _ends(node, batch, raw)

    def advance(self, node: "Optimizable", batch: "list[Part]", raw: Raw, keep: Raw) -> None:
        leaves = {name: r.detach().clone().requires_grad_() for name, r in raw.items()}
        # Copies, because the graph keeps what it was made of and the chunks go on to change it in place.
        states = [{k: s.clone() for k, s in part.state.items()} for part in batch]
        with torch.enable_grad():
            news = node.updates(batch, [part.x.clone() for part in batch], states, leaves)
        if bool(batch[0].ok):
            self.leaves, self.outputs = leaves, {part.chunk: x1 for part, (x1, _) in zip(batch, news, strict=True)}
        for part, (x1, s1) in zip(batch, news, strict=True):
            part.commit(x1.detach(), {k: s.detach() for k, s in s1.items()}, {})


Strategy = Tangents | Displacement | Graph


def gamma(horizon: float) -> float:
    """γ = 1 − 1/horizon, by which tangents are multiplied at every step."""
    return 1.0 - 1.0 / horizon if horizon < math.inf else 1.0


def share(node: "Optimizable", chunk: "Chunk", g: Tensor, of: str | None = None) -> Raw:
    """What one chunk adds to Zᵀg.

    Args:
        node: whose x it is part of.
        chunk: the chunk.
        g: a gradient.
        of: where it was taken: "x" or the name of a state. None for the gradient of a step: taken at x, it stands for the one at the
            average of a rule that is evaluated there, and what lr moves then counts with the tangent of that average.
    """
    if of in (None, "x") and node.implied():
        shares = [_share(node, part, step=of is None) for part in chunk.parts(g, chunk.one, clean=True)]
        return combine(node, shares) if any(shares) else {}
    of = of or "x"
    found = {name: tangent[of] for name, tangent in chunk.tangents.items() if of in tangent}
    return {name: chunk.inner(name, g, z).to(node.raw[name]) for name, z in found.items()}


def _share(node: "Optimizable", part: "Part", *, step: bool) -> Raw:
    """What a part adds where tangents of x are made of those of the state."""
    assert node.rule.weights is not None
    stands = {node.rule.moves: node.rule.average} if step and node.rule.average else {}
    q: Raw = {}
    for name, kept in part.tangents.items():
        tangent = {key: kept[of] for key in part.state if (of := stands.get(key, key)) in kept}
        with forward_ad.dual_level():
            z = forward_ad.unpack_dual(node.rule.weights(_duals(part.state, tangent))).tangent
            if z is not None:
                q[name] = part.chunk.inner(name, part.g, z, part.cut).to(node.raw[name])
    return q


def look(node: "Optimizable", chunk: "Chunk", g: Tensor, pull: bool) -> tuple[Tensor, Raw]:
    """What a step has to know of a chunk's gradient before it is taken: Σg, which is finite if g is, and its share of Zᵀg."""
    return g.sum(), share(node, chunk, g) if pull else {}


def combine(node: "Optimizable", shares: Sequence[Raw]) -> Raw:
    """Zᵀg from the shares of all chunks."""
    q: Raw = {}
    for found in shares:
        q = {**q, **{name: q[name] + part if name in q else part for name, part in found.items()}}
    return {name: q[name] if name in q else torch.zeros_like(raw) for name, raw in node.raw.items()}


def direction(node: "Optimizable", part: "Part", raw: Raw) -> tuple[Tensor, State]:
    """(x' − x) / lr of a rule that is linear in lr, 0 where the step does not count, and the new state if that is not written yet."""
    h = node.values(raw, part, lr=part.chunk.one)
    # A kernel goes through memory as it lies.
    if node.kernel and not torch.compiler.is_compiling() and all(a.is_contiguous() for a in (part.x, part.g, *part.state.values())):
        move, state = part.scratch(lasting=node.projects()), {}
        node.kernel(move, part.g, part.state, part.t, part.skip)
    else:
        move, state = node.rule.update(torch.zeros_like(part.t), part.gradient(), part.state, h, part.t)
    shrink = node.rule.shrink(h)
    # In place, as a direction may be kept for all parts: `move` is the scratch, or the update's own.
    return (move.addcmul_(part.x, shrink - 1) if isinstance(shrink, Tensor) else move), state


def _ends(node: "Optimizable", batch: "list[Part]", raw: Raw) -> list[End]:
    """Of a plain update at `raw`."""
    found: list[End] = []
    for part in batch:
        x1, s1 = node.update(part, part.x, part.state, raw)
        place = part.state.get(node.rule.moves, part.x)
        found.append((s1.get(node.rule.moves, x1) - place, None, place))
    return found


def _like(factor: Tensor, part: "Part", name: str, z: Tensor) -> Tensor:
    """A factor on a tangent: one number, or one for each value of the hyperparameter, spread over the coordinates."""
    return part.spread(name, factor) if factor.dim() and z.dim() else factor.to(z)


def _duals(state: State, tangent: dict[str, Tensor]) -> State:
    return {key: _dual(s, tangent.get(key)) for key, s in state.items()}


def _dual(x: Tensor, tangent: Tensor | None) -> Tensor:
    if tangent is None:
        return x
    # Of a block torch would make zeros as large as the whole buffer, to hold the tangents of all that may share its memory.
    block = not torch.compiler.is_compiling() and x._base is not None and x._base.numel() > x.numel()
    return forward_ad.make_dual(x.clone() if block else x, tangent)


@cache
def _silence() -> None:
    # The first dual number makes torch import a module that warns of a deprecation of torch's own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")
