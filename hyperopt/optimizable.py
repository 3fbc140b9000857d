"""The recursion: a node steps its tensors with hyperparameters that the nodes above it have just stepped."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import guards
from .domains import Domain, complement
from .feasible import Feasible
from .hypergradients import Raw, Strategy
from .rule import Rule, State, Values

if TYPE_CHECKING:
    from .engine import Chunk


class Assigned(NamedTuple):
    """A value that a user may have assigned, as far as it can be known without looking at it."""

    changed: Tensor  # whether it was
    boundary: Tensor  # whether it then lies outside the open domain: used for this step, raw left alone
    value: Tensor
    shift: Tensor  # what the round trip through raw loses, so that exactly `value` is used


class Optimizable:
    """A node of the tree: tensors x, the rule that updates them, and the nodes above whose x are this node's hyperparameters.

        q  = Zᵀ g                                   hypergradient: one number for each raw hyperparameter r
        r' = above.step(q)                          the same recursion, one level up; at the top r is constant
        x', s' = update(x, g, s, domain(r'), t)
        Z' = how x' depends on r'                   kept for the next step

    Nothing here waits for the device. A step that must not count is computed like any other and written with weight 0.

    Args:
        level: 0 for the weights of the model, 1 for their hyperparameters, and so on.
        rule: the mathematics of the update.
        chunks: where x, the state and the tangents live; one gradient for each is given to `step`.
        live: the value of every hyperparameter, learned or held; the learned ones are written here after every step.
        complements: 1 − value of the held hyperparameters.
        domains: the space in which each hyperparameter is learned.
        above: for each node above, the names of the hyperparameters it learns.
        strategy: how Z is made.
        trust: the largest relative change of x in one step at level 0, the largest change of a raw value above it; or None.
        feasible: the set in which x stays, if there is one.
        anchor: what `guards.fade` remembers of lr.
    """

    def __init__(
        self,
        level: int,
        rule: Rule,
        chunks: list["Chunk"],
        live: dict[str, Tensor],
        complements: dict[str, Tensor],
        domains: Mapping[str, Domain],
        above: Sequence[tuple[tuple[str, ...], "Optimizable"]],
        strategy: Strategy,
        trust: float | None,
        feasible: Feasible | None,
        anchor: Tensor,
    ) -> None:
        self.level, self.rule, self.chunks, self.live, self.complements = level, rule, chunks, live, complements
        self.domains, self.above, self.strategy = domains, above, strategy
        self.trust, self.feasible, self.anchor = trust, feasible, anchor
        self.raw: Raw = {}
        for names, node in above:
            parts = node.chunks[0].tensors[0].split([live[n].numel() for n in names])
            self.raw |= {n: part.view(live[n].shape) for n, part in zip(names, parts, strict=True)}
        self.q: Raw = {}
        self.resets = next(iter(live.values())).new_zeros(())
        self.ok = torch.ones_like(self.resets)
        self._assigned: dict[str, Assigned] = {}

    def step(
        self,
        gs: list[Tensor],
        ok: Tensor,
        written: Mapping[str, Tensor] | None = None,
        *,
        learn: bool = True,
        directions: list[Tensor] | None = None,
        held_out: Raw | None = None,
    ) -> None:
        """One step of this node and of all above it.

        Args:
            gs: the gradient of the loss with respect to x, finite, one tensor a chunk.
            ok: 0-d, 1. if the step counts, 0. if nothing may change.
            written: for hyperparameters that a user may have assigned, the value that was written last.
            learn: let the levels above step too.
            directions: what the update is given in place of `gs`, where another optimizer has made the step.
            held_out: hypergradients to learn from in place of Zᵀ g, whatever `learn` says.
        """
        self.ok = ok
        keep = {name: torch.full_like(ok, self.strategy.gamma) for name in self.raw}
        if self.raw and (learn or held_out is not None) and self.strategy.ready(self):
            q = self.strategy.pull(self, gs) if held_out is None else held_out
            healthy = {name: v.sum().isfinite().to(ok.dtype) for name, v in q.items()}
            all_healthy = torch.stack(list(healthy.values())).amin()
            started = torch.stack([chunk.t for chunk in self.chunks]).amax().clamp(max=1).to(ok)
            for names, node in self.above:
                flat = torch.cat([q[n].reshape(-1) for n in names])
                node.step([flat.nan_to_num(0.0, 0.0, 0.0)], ok * all_healthy * started)
            keep = {name: healthy[name] * self.strategy.gamma for name in q}
            self.resets += ok * (1 - all_healthy)
            self.q = q

        raw = self._settle(written or {})
        gs = gs if directions is None else directions
        xs = [chunk.x() for chunk in self.chunks]
        if self.raw:
            for chunk in self.chunks:
                chunk.clean()
            raw, news = self.strategy.advance(self, xs, gs, raw, keep)
        else:
            news = [(x1, s1, {}) for x1, s1 in self.updates(xs, gs, [chunk.state for chunk in self.chunks], raw)]
        for chunk, new in zip(self.chunks, news, strict=True):
            chunk.commit(*new, ok)
        self._publish(raw, ok)

    def updates(self, xs: list[Tensor], gs: list[Tensor], states: list[State], raw: Raw) -> list[tuple[Tensor, State]]:
        """The update of every chunk at raw hyperparameters `raw`, inside the feasible set, as a differentiable function."""
        news = [self.update(*each, raw) for each in zip(self.chunks, xs, gs, states, strict=True)]
        if self.feasible is None:
            return news
        times = [(self.values(raw, chunk), chunk.t + 1) for chunk in self.chunks]
        places = [s1.get(self.rule.moves, x1) for x1, s1 in news]
        metrics = [self.rule.metric(s1, *time) for (_, s1), time in zip(news, times, strict=True)]
        places = self.feasible.project(places, metrics)
        return [self.rule.ended_at(place, *new, *time) for place, new, time in zip(places, news, times, strict=True)]

    def update(self, chunk: "Chunk", x: Tensor, g: Tensor, state: State, raw: Raw) -> tuple[Tensor, State]:
        """The rule's update of one chunk."""
        x1, s1 = self.rule.update(x, g, state, self.values(raw, chunk), chunk.t + 1)
        if self.level and self.trust is not None and "lr" not in self.raw:
            x1 = x + (x1 - x).clamp(-self.trust, self.trust)
        return x1, s1

    def values(self, raw: Raw, chunk: "Chunk") -> Values:
        """The hyperparameters as the rule sees them, spread over the coordinates of a chunk where they differ there."""

        def value(name: str) -> Tensor:
            if name not in self.live:
                raise AttributeError(f"{type(self.rule).__name__} declares no hyperparameter {name!r}: it has {', '.join(self.live)}")
            v = self.domains[name].value(raw[name]) if name in raw else self.live[name]
            if name in self._assigned:
                a = self._assigned[name]
                v = torch.where(a.boundary, a.value, v + a.shift)
            return chunk.spread(name, v)

        def one_minus(name: str) -> Tensor:
            if name in self._assigned:
                return complement(value(name))
            return chunk.spread(name, self.domains[name].complement(raw[name]) if name in raw else self.complements[name])

        return Values(value, one_minus)

    def projects(self, raw: Raw) -> bool:
        """Whether lr is projected down where the step would be larger than trust allows."""
        return self.trust is not None and "lr" in raw

    def projected(self, xs: list[Tensor], gs: list[Tensor], states: list[State], raw: Raw) -> Raw:
        """Raw hyperparameters with lr projected down to what a step may move."""
        news = [self.update(*each, raw) for each in zip(self.chunks, xs, gs, states, strict=True)]
        places = self.moved(xs, states)
        ends = [s1.get(self.rule.moves, x1) for x1, s1 in news]
        return self.project(raw, [end - place for end, place in zip(ends, places, strict=True)], places)[0]

    def moved(self, xs: list[Tensor], states: list[State]) -> list[Tensor]:
        """What lr moves: the weights, or the sequence of the rule's state that stands for them."""
        return [state.get(self.rule.moves, x) for x, state in zip(xs, states, strict=True)]

    def project(self, raw: Raw, moves: list[Tensor], places: list[Tensor]) -> tuple[Raw, Tensor]:
        """Raw hyperparameters with lr projected down, and the factor by which it was."""
        like, trust = raw["lr"], self.trust or math.inf
        scale = guards.relative_scale(moves, places, trust, like) if self.level == 0 else guards.absolute_scale(moves, trust).to(like)
        if "lr" in self._assigned:
            scale = torch.where(self._assigned["lr"].changed, torch.ones_like(scale), scale)
        low, high = self.domains["lr"].raw_limits(like.dtype)
        return {**raw, "lr": guards.project(self.domains["lr"], like, scale).clamp(low, high)}, scale

    def forget(self, keep: Raw, raw: Raw) -> Raw:
        """By how much tangents are multiplied before the step at `raw`: by γ, and by less where lr has fallen and trust is on."""
        if not self.projects(raw):
            return keep
        factor, anchor = guards.fade(self.anchor, self.domains["lr"].value(raw["lr"]))
        self.anchor.lerp_(anchor, self.ok)
        return {**keep, "lr": keep["lr"] * factor}

    def _settle(self, written: Mapping[str, Tensor]) -> Raw:
        """Raw hyperparameters, with what a user assigned since the last step in place of what the level above chose."""
        self._assigned = {}
        raw = dict(self.raw)
        for name in written.keys() & raw.keys():
            domain, value, r = self.domains[name], self.live[name].clone(), raw[name]
            low, high = domain.bounds()
            changed = value != written[name]
            inside = changed & (value > low) & (value < high)
            taken = domain.raw(torch.where(inside, value, domain.value(r))).clamp(*domain.raw_limits(r.dtype))
            raw[name] = torch.where(inside, taken, r)
            shift = torch.where(inside, value - domain.value(taken), torch.zeros_like(r))
            self._assigned[name] = Assigned(changed, changed & ~inside, value, shift)
        return raw

    def _publish(self, raw: Raw, ok: Tensor) -> None:
        """Write the values that this step used where users read them, and keep raw values that were changed on the way."""
        for name, r in raw.items():
            kept = self.raw[name]
            if r is not kept:
                kept.copy_(torch.where(ok > 0, r, kept))
            value = self.domains[name].value(kept)
            if name in self._assigned:
                value = torch.where(self._assigned[name].changed, self._assigned[name].value, value)
            self.live[name].copy_(torch.where(ok > 0, value, self.live[name]))
