"""How a node knows what its next gradient says about its hyperparameters: Z = ∂x/∂r, made in three ways.

Each strategy is an object with the same two methods. `advance` takes one step of the node and makes Z' for the next;
`pull` returns q = Zᵀg. They agree with one another to rounding wherever more than one applies.

    Tangents        every rule, every hyperparameter, every horizon: forward derivatives carried from step to step
    Displacement    lr alone, for a rule whose displacement is linear in it: no differentiation at all
    Graph           the paper's way, horizon 1: keep the autograd graph of the last update; the reference for the others
"""

import importlib
import math
import warnings
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

Raw = dict[str, Tensor]
Tangent = dict[str, dict[str, Tensor]]  # hyperparameter -> "x" or the name of a state -> tangent; absent where it is zero
Advance = tuple[Raw, list[tuple[Tensor, State, Tangent]]]


@dataclass(frozen=True)
class Tangents:
    """(Z', S') = derivative of `update` at (x, s, r) along (γZ, γS, e), with g held constant and γ = 1 − 1/horizon."""

    gamma: float

    def __post_init__(self) -> None:
        _silence()

    def ready(self, node: "Optimizable") -> bool:
        return any(chunk.tangents for chunk in node.chunks)

    def pull(self, node: "Optimizable", gs: list[Tensor]) -> Raw:
        return _inner(node, gs)

    def advance(self, node: "Optimizable", xs: list[Tensor], gs: list[Tensor], raw: Raw, keep: Raw) -> Advance:
        if node.projects(raw):
            raw = node.projected(xs, gs, [chunk.state for chunk in node.chunks], raw)
            keep = node.forget(keep, raw)
        news: list[tuple[Tensor, State]] = []
        out: list[Tangent] = [{} for _ in node.chunks]
        for name in raw:
            news, tangents = self._along(node, name, xs, gs, raw, keep)
            for mine, new in zip(out, tangents, strict=True):
                mine[name] = new
        return raw, [(*new, tangent) for new, tangent in zip(news, out, strict=True)]

    def _along(
        self, node: "Optimizable", name: str, xs: list[Tensor], gs: list[Tensor], raw: Raw, keep: Raw
    ) -> tuple[list[tuple[Tensor, State]], list[dict[str, Tensor]]]:
        """The updates and their derivative along one hyperparameter."""
        carried = [
            {k: z * _like(keep[name], c, name, z) for k, z in c.tangents.get(name, {}).items()} if self.gamma else {} for c in node.chunks
        ]
        news, tangents = [], []
        with forward_ad.dual_level():
            duals = [_dual(x, z.get("x")) for x, z in zip(xs, carried, strict=True)]
            states = [{k: _dual(s, z.get(k)) for k, s in c.state.items()} for c, z in zip(node.chunks, carried, strict=True)]
            along = {**raw, name: _dual(raw[name], torch.ones_like(raw[name]))}
            for x1, s1 in node.updates(duals, gs, states, along):
                (x1, z), *rest = [forward_ad.unpack_dual(a) for a in (x1, *s1.values())]
                news.append((x1, {k: pair.primal for k, pair in zip(s1, rest, strict=True)}))
                # At horizon 1 nothing is carried, so the tangents of the state need not be kept.
                found = {"x": z} | ({k: pair.tangent for k, pair in zip(s1, rest, strict=True)} if self.gamma else {})
                tangents.append({k: z for k, z in found.items() if z is not None})
        return news, tangents


@dataclass(frozen=True)
class Displacement:
    """Z' = γ·(∂x'/∂x)·Z + (x' − x): the tangent of log lr, for a rule whose displacement is linear in lr.

    The displacement comes from the rule itself, evaluated at x = 0, and not from x' − x: at lr = 1e-8 a weight of 0.1
    does not change in float32, and the difference would be 0 where the derivative is not.
    """

    gamma: float

    def ready(self, node: "Optimizable") -> bool:
        return any(chunk.tangents for chunk in node.chunks)

    def pull(self, node: "Optimizable", gs: list[Tensor]) -> Raw:
        return _inner(node, gs)

    def advance(self, node: "Optimizable", xs: list[Tensor], gs: list[Tensor], raw: Raw, keep: Raw) -> Advance:
        moves, states, shrinks = [], [], []
        for chunk, x, g in zip(node.chunks, xs, gs, strict=True):
            h = node.values(raw, chunk)
            move, state = node.rule.update(x.new_zeros(()), g, chunk.state, h, chunk.t + 1)
            decay = node.rule.shrink(h)
            shrinks.append(decay)
            moves.append(move if isinstance(decay, float) else move + (decay - 1) * x)
            states.append(state)
        scale = None
        if node.projects(raw):
            raw, scale = node.project(raw, moves, node.moved(xs, [chunk.state for chunk in node.chunks]))
            keep = node.forget(keep, raw)
        out = []
        for chunk, x, move, state, decay in zip(node.chunks, xs, moves, states, shrinks, strict=True):
            if scale is not None:
                move = move * scale.to(move)
                decay = decay if isinstance(decay, float) else 1 + (decay - 1) * scale.to(move)
            z = move
            if self.gamma and chunk.tangents:
                z = torch.addcmul(move, chunk.tangents["lr"]["x"], _like(keep["lr"], chunk, "lr", move) * decay)
            out.append((x + move, state, {"lr": {"x": z}}))
        return raw, out


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

    def advance(self, node: "Optimizable", xs: list[Tensor], gs: list[Tensor], raw: Raw, keep: Raw) -> Advance:
        if node.projects(raw):
            raw = node.projected(xs, gs, [chunk.state for chunk in node.chunks], raw)
        leaves = {name: r.detach().clone().requires_grad_() for name, r in raw.items()}
        # Copies, because the graph keeps what it was made of and the chunks go on to change it in place.
        states = [{k: s.clone() for k, s in chunk.state.items()} for chunk in node.chunks]
        with torch.enable_grad():
            news = node.updates([x.clone() for x in xs], [g.clone() for g in gs], states, leaves)
        if bool(node.ok):
            self.leaves, self.outputs = leaves, {c: x1 for c, (x1, _) in zip(node.chunks, news, strict=True)}
        return raw, [(x1.detach(), {k: s.detach() for k, s in s1.items()}, {}) for x1, s1 in news]


Strategy = Tangents | Displacement | Graph


def gamma(horizon: float) -> float:
    """γ = 1 − 1/horizon, by which tangents are multiplied at every step."""
    return 1.0 - 1.0 / horizon if horizon < math.inf else 1.0


def _inner(node: "Optimizable", gs: list[Tensor]) -> Raw:
    q: Raw = {}
    for chunk, g in zip(node.chunks, gs, strict=True):
        for name, tangent in chunk.tangents.items():
            if "x" in tangent:
                part = chunk.inner(name, g, tangent["x"]).to(node.raw[name])
                q[name] = q[name] + part if name in q else part
    return {name: q.get(name, torch.zeros_like(raw)) for name, raw in node.raw.items()}


def _like(factor: Tensor, chunk: "Chunk", name: str, z: Tensor) -> Tensor:
    """A factor on a tangent: one number, or one for each value of the hyperparameter, spread over the coordinates."""
    return chunk.spread(name, factor) if factor.dim() and z.dim() else factor.to(z)


def _dual(x: Tensor, tangent: Tensor | None) -> Tensor:
    return x if tangent is None else forward_ad.make_dual(x, tangent)


@cache
def _silence() -> None:
    # The first dual number makes torch import a module that warns of a deprecation of torch's own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")
