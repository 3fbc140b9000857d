"""The recursion: a node steps its tensors with hyperparameters that the nodes above it have just stepped."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import guards
from .domains import Domain, complement
from .feasible import Feasible
from .hypergradients import Graph, Raw, Strategy, direction
from .rule import Kernel, Rule, State, Values

if TYPE_CHECKING:
    from .engine import Chunk
    from .part import Part

Run = Callable[..., Any]  # calls one stage of a step: run(stage, *arguments)


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
    A step is a few stages, each a method that `run` calls: the engine may have them compiled.

    Args:
        level: 0 for the weights of the model, 1 for their hyperparameters, and so on.
        rule: the mathematics of the update.
        chunks: where x, the state and the tangents live; one gradient for each is given to `step`.
        live: the value of every hyperparameter, learned or held; the learned ones are written here after every step.
        complements: 1 − value of the held hyperparameters.
        domains: the space in which each hyperparameter is learned.
        above: for each node above, the names of the hyperparameters it learns.
        strategy: how Z is made.
        trust: the largest relative change of x in one step at level 0 (less in the first `rule.warm` of them), the largest change
            of a raw value above it; or None.
        feasible: the set in which x stays, if there is one.
        anchor: what `guards.fade` remembers of lr.
        paced: the learned hyperparameters whose raw value moves by no more than `guards.PACE` in a step.
        climbing: 1. as long as no hypergradient of lr said down and steps were negligible; lr goes up `guards.CLIMB` times as fast
            then. None where it never does.
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
        paced: Sequence[str],
        climbing: Tensor | None,
    ) -> None:
        self.level, self.rule, self.chunks, self.live, self.complements = level, rule, chunks, live, complements
        self.domains, self.above, self.strategy = domains, above, strategy
        self.trust, self.feasible, self.anchor, self.paced, self.climbing = trust, feasible, anchor, paced, climbing
        trusts = [node.trust for names, node in above if "lr" in names and node.trust is not None]
        self.leap = min([guards.LEAP, *trusts])  # the largest move of lr in a step of a climb
        self._raw = self._split()
        self.kernel: Kernel | None = None
        self.constants: dict[str, tuple[float, float]] = {}  # in compiled code, of held hyperparameters: value and 1 − value
        self.q: Raw = {}
        self.resets = next(iter(live.values())).new_zeros(())
        self.run: Run = call
        self._assigned: dict[str, Assigned] = {}

    @property
    def raw(self) -> Raw:
        """The raw hyperparameters that are learned, as views of the x above."""
        # An argument of compiled code that is a view of another one is dear.
        return self._split() if torch.compiler.is_compiling() else self._raw

    def _split(self) -> Raw:
        raw: Raw = {}
        for names, node in self.above:
            parts = node.chunks[0].tensors[0].split([self.live[n].numel() for n in names])
            raw |= {n: part.view(self.live[n].shape) for n, part in zip(names, parts, strict=True)}
        return raw

    def step(
        self,
        gs: list[Tensor],
        ok: Tensor,
        written: Mapping[str, Tensor] | None = None,
        *,
        q: Raw | None = None,
        learn: bool = True,
        directions: list[Tensor] | None = None,
    ) -> None:
        """One step of this node and of all above it.

        Args:
            gs: the gradient of the loss with respect to x, one tensor a chunk.
            ok: 0-d, 1. if the step counts, 0. if nothing may change.
            written: for hyperparameters that a user may have assigned, the value that was written last.
            q: hypergradients to learn from in place of Zᵀ g, whatever `learn` says.
            learn: let the levels above step too.
            directions: what the update is given in place of `gs`, where another optimizer has made the step.
        """
        if q is None and learn and self.raw and self.strategy.ready(self):
            q = self.strategy.pull(self, gs)
        raw, keep = self.run(self.learn, q, ok, written or {})
        gs = gs if directions is None else directions
        parts = [part for chunk, g in zip(self.chunks, gs, strict=True) for part in chunk.parts(g, ok, clean=self.level > 0)]
        # Where nothing couples the weights they are taken part by part, so that what is made on the way is never larger than one.
        batches = [[part] for part in parts] if self.separable() else [parts]
        if self.projects():
            sizes = [self.run(self.measure, batch, raw) for batch in batches]
            raw, keep = self.run(self.project, raw, keep, sizes, ok)
        for batch in batches:
            self.run(self.write, batch, raw, keep)
        for chunk in self.chunks:
            chunk.t += ok
        self.run(self.publish, raw, ok)

    def learn(self, q: Raw | None, ok: Tensor, written: Mapping[str, Tensor]) -> tuple[Raw, Raw]:
        """Step the levels above; the raw hyperparameters of this step, and the factor with which tangents go into it."""
        gamma = self.strategy.gamma
        if q is None:
            keep = {name: torch.full_like(ok, gamma) for name in self.raw}
        else:
            healthy = {name: guards.is_finite(v.sum() if v.dim() else v) for name, v in q.items()}
            fine = ok
            for h in healthy.values():
                fine = fine * h
            self.resets.add_(ok - fine)
            counts = fine * self.taken().to(ok).clamp(max=1)
            before = {name: self.raw[name].clone() for name in (*self.paced, *(("lr",) if self.climbing is not None else ()))}
            for names, node in self.above:
                flat = q[names[0]].reshape(-1) if len(names) == 1 else torch.cat([q[n].reshape(-1) for n in names])
                node.step([flat.nan_to_num(0.0, 0.0, 0.0)], counts)
            for name in self.paced:
                self.raw[name].clamp_(before[name] - guards.PACE, before[name] + guards.PACE)
            if self.climbing is not None:
                self.climbing.mul_((counts == 0) | (q["lr"] <= 0))
                moved = self.raw["lr"] - before["lr"]
                more = torch.minimum((guards.CLIMB - 1) * moved, self.leap - moved)
                self.raw["lr"].add_(more.clamp_min(0) * self.climbing)
            keep = {name: h * gamma for name, h in healthy.items()}
            self.q = q
        return self._settle(written), keep

    def measure(self, batch: "list[Part]", raw: Raw) -> list[tuple[Tensor, Tensor]]:
        """For every part how far the step at `raw` would take what lr moves, and how large that is."""
        return [self._sizes(*ends) for ends in self.strategy.ends(self, batch, raw)]

    def project(self, raw: Raw, keep: Raw, sizes: list[list[tuple[Tensor, Tensor]]], ok: Tensor) -> tuple[Raw, Raw]:
        """Raw hyperparameters with lr projected down to what trust allows, and what past steps may say about it then."""
        moves, places = zip(*[size for batch in sizes for size in batch], strict=True)
        like, domain = raw["lr"], self.domains["lr"]
        numel = sum(chunk.numel for chunk in self.chunks)
        trust = math.inf if self.trust is None else self.trust
        if self.level:
            scale = guards.absolute_scale(moves, trust)
        else:
            small = guards.relative_scale(moves, places, numel, trust * guards.NEGLIGIBLE).to(like)
            grown = ((self.taken().to(like) + 1) / self.rule.warm).clamp(guards.NEGLIGIBLE, 1) if self.rule.warm > 1 else 1.0
            scale = (small * (grown / guards.NEGLIGIBLE)).clamp(max=1)
            if self.climbing is not None:
                self.climbing.lerp_(self.climbing * (small == 1), ok)
        scale = scale.to(like)
        if "lr" in self._assigned:
            scale = torch.where(self._assigned["lr"].changed, torch.ones_like(scale), scale)
        raw = {**raw, "lr": domain.scaled(like, scale).clamp(*domain.raw_limits(like.dtype))}
        factor, anchor = guards.fade(self.anchor, domain.log_size(raw["lr"]))
        self.anchor.lerp_(anchor, ok)
        return raw, {**keep, "lr": keep["lr"] * factor}

    def write(self, batch: "list[Part]", raw: Raw, keep: Raw) -> None:
        """Take the step."""
        if self.raw:
            self.strategy.advance(self, batch, raw, keep)
        elif self.kernel and not torch.compiler.is_compiling():
            for part in batch:
                along, state = direction(self, part, raw)
                move = along * (self.values(raw, part).lr * part.ok)
                part.x.add_(self.limit(move) if self.limited() else move)
                part.commit(None, state, {})
        else:
            for part, new in zip(batch, self.updates(batch, [part.x for part in batch], [part.state for part in batch], raw), strict=True):
                part.commit(*new, {})

    def publish(self, raw: Raw, ok: Tensor) -> None:
        """Write the values that this step used where users read them, and keep raw values that were changed on the way."""
        for name, r in raw.items():
            kept = self.raw[name]
            if r is not kept:
                kept.lerp_(r, ok)
            value = self.domains[name].value(kept)
            if name in self._assigned:
                value = torch.where(self._assigned[name].changed, self._assigned[name].value, value)
            self.live[name].lerp_(value, ok)

    def updates(self, batch: "list[Part]", xs: list[Tensor], states: list[State], raw: Raw) -> list[tuple[Tensor, State]]:
        """The update of every part at raw hyperparameters `raw`, inside the feasible set, as a differentiable function."""
        news = [self.update(*each, raw) for each in zip(batch, xs, states, strict=True)]
        if self.feasible is None:
            return news
        times = [(self.values(raw, part), part.t) for part in batch]
        places = [s1.get(self.rule.moves, x1) for x1, s1 in news]
        metrics = [self.rule.metric(s1, *time) for (_, s1), time in zip(news, times, strict=True)]
        places = self.feasible.project(places, metrics)
        return [self.rule.ended_at(place, *new, *time) for place, new, time in zip(places, news, times, strict=True)]

    def update(self, part: "Part", x: Tensor, state: State, raw: Raw) -> tuple[Tensor, State]:
        """The rule's update of one part."""
        if self.level and self.rule.weights:  # x may have been cut or assigned: what it is made of goes along
            along = x - self.rule.weights(state)
            state = {key: s + along if key in (self.rule.moves, self.rule.average) else s for key, s in state.items()}
        x1, s1 = self.rule.update(x, part.gradient(), state, self.values(raw, part), part.t)
        return (x + self.limit(x1 - x) if self.limited() else x1), s1

    def limited(self) -> bool:
        """Whether moves are cut to what trust allows: above level 0, where lr is not learned and thus not projected."""
        return self.level > 0 and self.trust is not None and "lr" not in self.raw

    def limit(self, move: Tensor) -> Tensor:
        """A move, cut."""
        return move if self.trust is None else move.clamp(-self.trust, self.trust)

    def values(self, raw: Raw, part: "Part | Chunk", **given: Tensor) -> Values:
        """The hyperparameters as the rule sees them, spread over the coordinates of a part where they differ there.

        Args:
            raw: the raw ones.
            part: of x.
            given: values to use in place of the node's own.
        """

        def value(name: str) -> Tensor:
            if name in given:
                return given[name]
            if name not in self.live:
                raise AttributeError(f"{type(self.rule).__name__} declares no hyperparameter {name!r}: it has {', '.join(self.live)}")
            v = self.domains[name].value(raw[name]) if name in raw else self._held(name)[0]
            if name in self._assigned:
                a = self._assigned[name]
                v = torch.where(a.boundary, a.value, v + a.shift)
            return part.spread(name, v)

        def one_minus(name: str) -> Tensor:
            if name in self._assigned:
                return complement(value(name))
            return part.spread(name, self.domains[name].complement(raw[name]) if name in raw else self._held(name)[1])

        return Values(value, one_minus)

    def taken(self) -> Tensor:
        """The largest number of steps that a chunk with a gradient has taken."""
        return guards.combined([chunk.t for chunk in self.chunks], torch.maximum, torch.amax)

    def _held(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self.constants and torch.compiler.is_compiling():
            value, complement = (torch.full((), v, dtype=self.resets.dtype, device=self.resets.device) for v in self.constants[name])
            return value, complement
        return self.live[name], self.complements[name]

    def separable(self) -> bool:
        """Whether parts of x can be stepped one after the other."""
        return self.feasible is None and not isinstance(self.strategy, Graph)

    def implied(self) -> bool:
        """Whether the tangents of x are those of the state, combined, and not kept; at horizon 1 those of the state are not."""
        return self.level == 0 and self.rule.weights is not None and self.strategy.gamma > 0

    def projects(self) -> bool:
        """Whether lr is projected down where the step would be larger than trust allows."""
        return self.trust is not None and "lr" in self.raw

    def _sizes(self, move: Tensor, factor: Tensor | None, place: Tensor) -> tuple[Tensor, Tensor]:
        if factor is not None and factor.dim():
            move, factor = move * factor, None
        size = move.abs().amax() if self.level else guards.norm(move)
        size = size if factor is None else size * factor
        return size, place if self.level else guards.norm(place)

    def _settle(self, written: Mapping[str, Tensor]) -> Raw:
        """Raw hyperparameters, with what a user assigned since the last step in place of what the level above chose."""
        self._assigned = {}
        # A stage is compiled once for towers in which trust makes new raw values and for those in which it does not: torch 2.11 finds what
        # it compiled for arguments that share memory (these with the x above) again for arguments that do not, and fails there.
        raw = {name: r.clone() for name, r in self.raw.items()} if torch.compiler.is_compiling() else dict(self.raw)
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


def call(stage: Callable[..., Any], *arguments: Any) -> Any:
    """Run a stage as it is."""
    return stage(*arguments)
