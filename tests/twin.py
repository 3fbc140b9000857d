"""The whole algorithm once more, slow and readable, in float64: what the library is tested against, and where to read how it works.

Each optimizer of a tower is a node. The node at level 0 steps the weights of a model, a node at level 1 the hyperparameters of level 0,
and so on. One step of a node with weights x, state s and raw hyperparameters r, given a gradient g, is

    q  = Zᵀg                                       hypergradient: what g says about the r of the steps so far
    r' = above.step(q)                             the same recursion, one level up; at the top r is constant
    x', s' = update(x, s, g, h)                    the rule's own step, with the hyperparameters h = domain(r')
    Z' = ∂update/∂(x, s)·γZ + ∂update/∂r           how x and s depend on r, carried forward with g held constant; γ = 1 − 1/horizon

`Node.step`, `Node.learn` and `Node.take` are this recursion. Before them come rules, feasible sets and guards, which keep r' and the step
within bounds; after them what a user writes, `Hyper(Adam, lr=0.01).stack(SGD).bind(groups)`, with the names and defaults of the library.

Speed is left out. Weights are flat tensors, nothing is changed in place, a step that must not count is not computed, and there is one way
to make Z, with dual numbers. Only the domains of hyperparameters are the library's.

Source: Chandra, Xie, Ragan-Kelley and Meijer, NeurIPS 2022 (arXiv 1909.13371) for the recursion at horizon 1. Other horizons and the
guards are the library's own; the measurements behind their constants stand there.
"""

import importlib
import math
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch.autograd import forward_ad

from hyperopt.domains import Interval, Positive, Real, UnitInterval

with warnings.catch_warnings():  # torch imports this with the first dual number, and warns of a deprecation of its own
    warnings.simplefilter("ignore")
    importlib.import_module("torch._decomp.decompositions_for_jvp")

TINY = torch.finfo(torch.float64).tiny
FLOOR = 0.01  # root mean square that weights count as at least, so that weights of zero can start


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- rules: a direction, and what follows once the step is taken


class Rule:
    """The mathematics of one optimizer: what it moves goes to place = moved − lr·d, with a direction d made of gradient and state.

    A state is a dictionary of tensors, which holds the weights too, as "x".
    """

    defaults: ClassVar = {}
    defaults_above: ClassVar = {}  # above level 0, where raw hyperparameters are moved and not weights
    decoupled = False  # weight decay is added to the direction, and not to the gradient
    trust, trust_warmup, horizon = 0.03, 1, 1000.0
    horizons: ClassVar = {}  # of the hyperparameters that have one of their own
    moved, average = "x", "x"  # what lr moves, and what the model is evaluated with

    def init(self, x):
        """The state before the first step."""
        return {"x": x}

    def direction(self, g, s, h, t):
        """The step downwards at lr = 1, and the new values of the rule's own state. Never reads x."""
        raise NotImplementedError

    def after(self, place, s, h, t):
        """The new state, once that which lr moves has arrived at `place`."""
        return {**s, "x": place}

    def metric(self, s, h, t):
        """The diagonal H, up to a common factor, in a step −lr·H⁻¹·m: the metric in which weights are projected onto a feasible set."""
        return torch.ones_like(s["x"])

    def total(self, g, s):
        """What a part adds to the number that `after` knows of all of them, as h.total."""
        return numbers(0)

    def pulled(self, Z, s):
        """The tangent that the gradient of a step is multiplied with."""
        return Z["x"]

    def shifted(self, s, by):
        """The state, when a node below has changed x."""
        return {**s, "x": s["x"] + by}


class SGD(Rule):
    """b = momentum·b + (1 − dampening)·g, at first b = g;   d = b."""

    defaults: ClassVar = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    defaults_above: ClassVar = {"lr": 1.0}
    horizons: ClassVar = {"momentum": 1, "dampening": 1}

    def init(self, x):
        return {"x": x, "b": torch.zeros_like(x)}

    def direction(self, g, s, h, t):
        b = h.momentum * s["b"] + (g if t == 1 else (1 - h.dampening) * g)
        return b, {"b": b}


class Adam(Rule):
    """m = beta1·m + (1 − beta1)·g,   v = beta2·v + (1 − beta2)·g²;   d = m̂ / (√v̂ + eps), m̂ and v̂ being m and v over 1 − beta^t."""

    defaults: ClassVar = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    defaults_above: ClassVar = {"lr": 0.1}
    horizons: ClassVar = {"beta1": 1, "beta2": 1}

    def init(self, x):
        return {"x": x, "m": torch.zeros_like(x), "v": torch.zeros_like(x)}

    def direction(self, g, s, h, t):
        m = s["m"] + (1 - h.beta1) * (g - s["m"])
        v = s["v"] + (1 - h.beta2) * (g * g - s["v"])
        m_hat = m / (1 - h.beta1**t)
        return m_hat / self.metric({"v": v}, h, t), {"m": m, "v": v}

    def metric(self, s, h, t):
        v_hat = s["v"] / (1 - h.beta2**t)
        return v_hat.clamp_min(TINY).sqrt() + h.eps  # the root's derivative is 0 at 0, and not infinite


class AdamW(Adam):
    defaults: ClassVar = {**Adam.defaults, "weight_decay": 1e-2}
    decoupled = True


class ScheduleFree(Rule):
    """Schedule-Free averaging, over the direction of `base` without its first moment (Defazio et al. 2024, arXiv 2405.15682).

    z = z − lr·(d + weight_decay·y),   a = a + c·(z − a), c = lr² / w, w = (1 − forget·behind)·w + lr²,   y = beta1·a + (1 − beta1)·z

    Gradients are taken at y, which is x here; the model is evaluated at the average a, which is x in the paper. How far the average lags
    behind is told by the means of gᵀ(z − a) and of its size: 1 where z always lies downhill. The paper has forget = 0.
    """

    decoupled = True
    trust, trust_warmup, horizon = 0.1, 20, 500.0
    moved, average = "z", "a"

    def __init__(self, base, forget=0.0, through=1.0):
        self.base, self.forget, self.through = base(), forget, through
        kept = {n: v for n, v in base.defaults.items() if n not in ("momentum", "dampening")}
        self.defaults, self.defaults_above = {**kept, "beta1": 0.9}, base.defaults_above
        self.horizons = {**base.horizons, "beta1": self.horizon}  # another beta1, of the average

    def init(self, x):
        return {**self.base.init(x), "z": x, "a": x, **dict.fromkeys(("beta1", "sum", "lag", "size"), numbers(0))}

    def direction(self, g, s, h, t):
        return self.base.direction(g, s, self.without_first_moment(h), t)

    def after(self, z, s, h, t):
        lag, size = (0.98 * s[n] + 0.02 * v for n, v in (("lag", h.total), ("size", h.total.abs())))
        behind = (-lag / size.clamp_min(TINY)).clamp_min(0)
        lr = constant(h.lr) if self.forget else h.lr
        w = (1 - self.forget * behind) * s["sum"] + lr**2
        a = s["a"] + lr**2 / w * (z - s["a"])
        return {**s, "z": z, "a": a, "x": z + h.beta1 * (a - z), "beta1": h.beta1, "sum": w, "lag": lag, "size": size}

    def total(self, g, s):
        return (g * (s["z"] - s["a"])).sum()[None]

    def metric(self, s, h, t):
        return self.base.metric(s, self.without_first_moment(h), t)

    def pulled(self, Z, s):
        # As if the gradient had been taken at a, where the model is evaluated: the tangent of y with that of a in place of that of z.
        # With through < 1 a part of it is that of z.
        return self.through * Z["a"] + (1 - self.through) * Z["z"] + (s["a"] - s["z"]) * Z["beta1"]

    def shifted(self, s, by):
        return {**s, "x": s["x"] + by, "z": s["z"] + by, "a": s["a"] + by}

    def without_first_moment(self, h):
        return SimpleNamespace(**{**vars(h), **dict.fromkeys(("beta1", "momentum", "dampening"), h.beta1 - h.beta1)})


class Averaged(Rule):
    """`base`, and beside it an average of its weights: a = a + c·(x − a), c = (1 − decay) / (1 − decay^t)."""

    average = "a"

    def __init__(self, base):
        self.base, self.decoupled = base(), base.decoupled
        self.defaults, self.defaults_above = {**base.defaults, "decay": 0.98}, base.defaults_above
        self.horizons = base.horizons

    def init(self, x):
        return {**self.base.init(x), "a": x}

    def direction(self, g, s, h, t):
        return self.base.direction(g, s, h, t)

    def after(self, x, s, h, t):
        c = (1 - h.decay) / (1 - h.decay**t)
        return {**s, "x": x, "a": s["a"] + c * (x - s["a"])}

    def metric(self, s, h, t):
        return self.base.metric(s, h, t)


# ---------------------------------------------------------------- feasible sets: the x nearest to y, by (x − y)ᵀH(x − y)


@dataclass
class Box:
    """lo ≤ x ≤ hi; the nearest point is the same for every diagonal H."""

    lo: float
    hi: float

    def nearest(self, y, H):
        return y.clamp(self.lo, self.hi)


@dataclass
class Ball:
    """‖x‖ ≤ radius: x = H(H + λ)⁻¹y, where λ ≥ 0 follows from ‖x‖ = radius by Newton's method on 1/‖x‖. Of one tensor here."""

    radius: float

    def nearest(self, y, H):
        y, λ = y / self.radius, H.sum() - H.sum()
        for _ in range(12):  # of dual numbers too: their tangents converge one iteration later
            x = y * H / (H + λ)
            norm = (x * x).sum().clamp_min(TINY).sqrt()
            λ = (λ - norm**2 / (x * x / (H + λ)).sum().clamp_min(TINY) * (1 - norm)).clamp_min(0)
        return self.radius * y * H / (H + λ)


# ---------------------------------------------------------------- guards: two moments, each the identity unless overridden


class Guard:
    def moved(self, before, r, q):
        """The level above has moved the raw hyperparameters from `before` to r, given hypergradients q. Returns r."""
        return r

    def sized(self, r, size, t, written):
        """The step at r is about to be taken. Returns r, and a factor on what past steps say about lr.

        Args:
            r: raw hyperparameters.
            size: how large the step would be, at level 0 relative to the weights, above it the largest change of a raw hyperparameter.
            t: the number of this step, from 1.
            written: the hyperparameters that a user has assigned since the last step.
        """
        return r, 1.0


class Climb(Guard):
    """From far too low, lr climbs five times as fast: until a hypergradient says down, or a step is a hundredth of what trust allows."""

    times, most, negligible = 5.0, 0.5, 0.01

    def __init__(self, trust, trust_above):
        self.trust, self.climbing = trust, True
        self.most = self.most if trust_above is None else min(self.most, trust_above)

    def moved(self, before, r, q):
        self.climbing = self.climbing & (q["lr"] <= 0)
        move = r["lr"] - before["lr"]
        more = torch.minimum((self.times - 1) * move, self.most - move).clamp_min(0)
        return {**r, "lr": r["lr"] + self.climbing * more}

    def sized(self, r, size, t, written):
        self.climbing = self.climbing & (size <= self.negligible * self.trust)
        return r, 1.0


class Pace(Guard):
    """A decay's logit moves by no more than .005 a step, as what it does shows only after the steps that it averages over.

    So does every raw value above level 0, where hypergradients of one step and the next are made of the same past and agree.
    """

    most = 0.005

    def __init__(self, names):
        self.names = names

    def moved(self, before, r, q):
        return r | {n: r[n].clamp(before[n] - self.most, before[n] + self.most) for n in self.names}


class Prior(Guard):
    """Everything but the lr of level 0 returns to its usual value by a thirtieth of the distance, unless what moved it was held-out."""

    def __init__(self, usual, steps):
        self.usual, self.steps = usual, steps

    def moved(self, before, r, q):
        return r | {n: r[n] + (raw - r[n]) / self.steps for n, raw in self.usual.items()}


class Trust(Guard):
    """lr is scaled down until the step is as large as trust allows, and learned on from there. A value that a user wrote is left alone."""

    def __init__(self, trust, warmup, domain):
        self.trust, self.warmup, self.domain = trust, warmup, domain

    def sized(self, r, size, t, written):
        if "lr" in written:
            return r, 1.0
        scale = (self.trust * min(1, t / self.warmup) / size).clamp_max(1)
        return {**r, "lr": self.domain.raw(scale * self.domain.value(r["lr"]))}, 1.0


class Forget(Guard):
    """Once lr has fallen to 1/e of what it was, past steps are forgotten by the fourth power of a further fall.

    Steps that went too far keep saying so for a whole horizon, and the smaller lr becomes, the more they outweigh new ones: without this
    guard lr falls without end.
    """

    band, power = 1.0, 4.0

    def __init__(self, lr, domain):
        self.domain, self.anchor = domain, lr.abs().log()

    def sized(self, r, size, t, written):
        low = self.domain.value(r["lr"]).abs().log()
        high = low + self.band
        keep = (self.power * (high - self.anchor)).clamp_max(0).exp()
        self.anchor = self.anchor.clamp(low, high)
        return r, keep


# ---------------------------------------------------------------- the recursion


class Part:
    """A tensor that a node moves: its state s, the tangents Z of s by hyperparameter, and the number t of its steps.

    Every hyperparameter is a vector: one number for all parts, or one for each tensor or coordinate; `index` says which are this part's.
    """

    def __init__(self, s, index):
        self.s, self.index, self.Z, self.t = s, index, {}, 0

    def own(self, value):
        return value if value.numel() == 1 else value[self.index]

    def inner(self, g, z, like):
        """gᵀz, shaped like a hyperparameter: summed over the elements that share a number of it."""
        q = torch.zeros_like(like)
        own = self.own(q)
        own += (g * z).reshape(own.numel(), -1).sum(1)
        return q


@dataclass
class Node:
    """An optimizer of the tower."""

    level: int  # 0 for the weights of the model
    rule: Rule
    parts: list  # what it moves; one part above level 0
    held: dict  # the hyperparameters that are not learned, by name
    learned: dict  # how many numbers each hyperparameter has that is learned
    domains: dict  # of the hyperparameters
    above: list  # (names, node): the x of `node` is the r of these hyperparameters, side by side
    horizons: dict  # for each learned hyperparameter the number of past steps that it is held responsible for
    guards: list
    limit: float  # the largest move, in a coordinate, of what lr moves: above level 0, where no lr is learned that Trust could scale
    inside: object  # the feasible set, or None
    range: tuple  # of x, for hyperparameters to stay strictly inside their domains
    written: dict = field(default_factory=dict)  # what a user has assigned since the last step
    bound: dict = field(default_factory=dict)  # what a user had assigned to the last step on the bound of a domain
    held_out: dict = field(default_factory=dict)  # hypergradients of another loss, for the next step
    q: dict = field(default_factory=dict)  # as of the last step
    resets: int = 0  # how many hypergradients were not finite

    def step(self, gs, learn=True):
        """One step of this node and of all above it.

        Args:
            gs: for each part the gradient, or None: a part without one keeps x, s, Z and t.
            learn: whether the levels above step too.
        """
        active = [(part, g) for part, g in zip(self.parts, gs, strict=True) if g is not None]
        self.total = sum(self.rule.total(g, part.s) for part, g in active)
        t = 1 + max(part.t for part, _ in active)
        q = self.held_out or (self.pull(active) if learn else {})
        r, finite = self.learn(q if t > 1 else {})  # the same recursion, one level up
        r = self.settle(r)  # what a user wrote wins
        size, keep = self.measure(active, r) if self.guards else None, 1.0
        for guard in self.guards:
            r, factor = guard.sized(r, size, t, self.written)
            keep = keep * factor
        for part, g in active:
            self.take(part, g, r, {n: self.γ(n) * finite.get(n, True) * (keep if n == "lr" else 1.0) for n in r})
        self.publish(r)

    def learn(self, q):
        """Let the levels above step with hypergradients q. Returns r, and which of q are finite."""
        before = self.r
        if not q:
            return before, {}
        self.q, finite = q, {n: bool(v.isfinite().all()) for n, v in q.items()}
        if not all(finite.values()):  # nothing is learned, and the tangents that made it start again
            self.resets += 1
            return before, finite
        for names, node in self.above:
            node.step([torch.cat([q[n] for n in names])])
        r = self.r
        for guard in self.guards:
            if not (self.held_out and isinstance(guard, Prior)):
                r = guard.moved(before, r, q)
        return r, finite

    def take(self, part, g, r, keep):
        """x', s' and Z', the derivative of the update along (keep·Z, e) for each hyperparameter."""
        new, Z = self.update(part, part.s, g, self.h(part, r)), {}
        for name in r:
            factor = part.own(keep[name] * torch.ones_like(r[name]))
            past = {k: torch.where(factor > 0, factor * z, 0.0) for k, z in part.Z.get(name, {}).items()}  # 0·∞ is 0
            with forward_ad.dual_level():
                s = {k: dual(v, past.get(k)) for k, v in part.s.items()}
                h = self.h(part, {n: dual(v, torch.ones_like(v) if n == name else None) for n, v in r.items()}, constant=dual)
                Z[name] = {k: forward_ad.unpack_dual(v).tangent for k, v in self.update(part, s, dual(g), h).items()}
        part.s, part.Z, part.t = {**new, "x": new["x"].clamp(*self.range)}, Z, part.t + 1

    # ---- what they call

    def γ(self, name):
        return 1 - 1 / self.horizons[name]

    @property
    def r(self):
        """The raw hyperparameters that are learned."""
        r = {}
        for names, node in self.above:
            r |= zip(names, node.parts[0].s["x"].split([self.learned[n] for n in names]), strict=True)
        return r

    def pull(self, active, of=None):
        """q = Zᵀg, where `of` is the state at which g was taken; None for a step's own gradient."""
        q = {}
        for part, g in active:
            for name, Z in part.Z.items():
                # Above level 0 an averaging rule goes by the y that the level below uses, and so it does at the paper's horizon of 1.
                z = Z[of] if of else self.rule.pulled(Z, part.s) if self.level == 0 and self.γ(name) else Z["x"]
                q[name] = q.get(name, 0) + part.inner(g, z, self.r[name])
        return q

    def settle(self, r):
        """What a user wrote, exactly, in place of what the level above chose. On the bound, such as lr = 0, it is used once and r stays."""
        learned = {n: v for n, v in self.written.items() if n in r}
        inside = {n: v for n, v in learned.items() if self.domains[n].inside(v.item())}
        self.bound = {n: v for n, v in learned.items() if n not in inside}
        self.held = self.held | {n: v for n, v in self.written.items() if n not in r}
        return r | {n: self.domains[n].raw(v).expand_as(r[n]) for n, v in inside.items()}

    def measure(self, active, r):
        """The size of the step at r, as the guards want it."""
        moves, places = [], []
        for part, g in active:
            h = self.h(part, r)
            moves.append(h.lr * self.displacement(part, part.s, g, h)[0])
            places.append(part.s[self.rule.moved])
        move, place = torch.cat(moves), torch.cat(places)
        if self.level:
            return move.abs().max()
        return move.norm() / place.norm().clamp_min(FLOOR * math.sqrt(place.numel()))

    def displacement(self, part, s, g, h):
        """The direction with weight decay, and the new values of the rule's own state."""
        decay = h.weight_decay * s["x"]
        if self.rule.decoupled:
            d, own = self.rule.direction(g, s, h, part.t + 1)
            return d + decay, own
        return self.rule.direction(g + decay, s, h, part.t + 1)

    def update(self, part, s, g, h):
        """The state after a step, the same for all rules."""
        d, own = self.displacement(part, s, g, h)
        place = s[self.rule.moved] - (h.lr * d).clamp(-self.limit, self.limit)
        if self.inside is not None:
            place = self.inside.nearest(place, self.rule.metric({**s, **own}, h, part.t + 1))
        return self.rule.after(place, {**s, **own}, h, part.t + 1)

    def h(self, part, r, constant=lambda v: v):
        """A part's hyperparameters at r, by name."""
        learned = {n: self.domains[n].value(v) for n, v in r.items()}
        held = {n: constant(v) for n, v in (self.held | self.bound).items()} | {"total": constant(self.total)}
        return SimpleNamespace(**{n: part.own(v) for n, v in (learned | held).items()})

    def publish(self, r):
        """Tell the nodes above where guards and users have put their x."""
        for names, node in self.above:
            part = node.parts[0]
            part.s = node.rule.shifted(part.s, torch.cat([r[n] for n in names]).clamp(*node.range) - part.s["x"])
        self.written = {}

    def hyperparameters(self):
        return self.held | {n: self.domains[n].value(v) for n, v in self.r.items()} | self.bound | self.written


def constant(v):
    """v without its tangent."""
    return forward_ad.unpack_dual(v).primal


def dual(v, z=None):
    """v + εz; a constant with z = 0, as torch takes twenty times as long over numbers of which some have no tangent."""
    return forward_ad.make_dual(v, torch.zeros_like(v) if z is None else z)


# ---------------------------------------------------------------- what a user writes


class Hyper:
    """A tower, with the keywords of `hyperopt.Hyper`."""

    def __init__(
        self,
        rule,
        *,
        learn=("lr",),
        horizon=None,
        trust="default",
        prior="default",
        domains=None,
        per="group",
        project=None,
        maximize=False,
        **given,
    ):
        self.rule = rule() if isinstance(rule, type) else rule
        self.learn, self.horizon, self.trust, self.prior = learn, horizon, trust, prior
        self.domains, self.per, self.project, self.maximize, self.given = domains or {}, per, project, maximize, given
        self.above = {}

    def stack(self, rule=None, **keywords):
        """One level more, on every branch: `rule`, or for each hyperparameter a rule of its own."""
        if self.above:
            for tower in self.above.values():
                tower.stack(rule, **keywords)
        elif rule is None:
            self.learn = tuple(keywords)
            self.above = {(n,): tower if isinstance(tower, Hyper) else Hyper(tower) for n, tower in keywords.items()}
        else:
            self.above = {self.learn: Hyper(rule, **keywords)}
        return self

    def bind(self, groups, hyper_every=1):
        return Twin(self, groups, hyper_every)

    def domain(self, name):
        unit = name in ("beta1", "beta2", "momentum", "dampening", "decay")
        return self.domains.get(name, UnitInterval() if unit else Positive())

    def trust_at(self, level):
        return self.trust if self.trust != "default" else 0.5 if level else self.rule.trust

    def horizon_of(self, name):
        given = self.horizon.get(name) if isinstance(self.horizon, dict) else self.horizon
        return given or self.rule.horizons.get(name, self.rule.horizon)

    def priors(self, level, values):
        """The guard that goes back to usual values: the rule's defaults, or what a run started from where these cannot be learned."""
        steps = self.prior if self.prior != "default" else None if self.trust is None else 30
        usual = {**self.rule.defaults, **(self.rule.defaults_above if level else {}), "momentum": 0.9}
        learned = [n for n in self.learn if level or n != "lr"] if self.above and steps else []
        usual = {n: numbers(usual[n]) if n not in ("lr", "weight_decay") and usual[n] > 0 else values[n] for n in learned}
        return [Prior({n: self.domain(n).raw(value) for n, value in usual.items()}, steps)] if usual else []

    def guards(self, level, lr, trust_above):
        """What limits this level, in the order in which it is asked; nothing with trust=None."""
        trust, domain = self.trust_at(level), self.domain("lr")
        if trust is None or not self.above:
            return []
        decays = [n for n in self.learn if n != "lr" and isinstance(self.domain(n), Interval)]
        guards = [Pace([n for n in self.learn if not isinstance(self.domain(n), Real)] if level else decays)]
        if "lr" in self.learn and level == 0 and domain == Positive():
            guards.append(Climb(trust, trust_above))
        if "lr" in self.learn:
            guards += [Trust(trust, 1 if level else self.rule.trust_warmup, domain), Forget(lr, domain)]
        return guards

    def grow(self, nodes, xs, level=0, branch="", below=None, **given):
        """Make the node of this tower at a level, and all above it, and enter them into `nodes`. Returns the node.

        Args:
            nodes: by label, which is "0", "1" … in a chain and "1[beta1]" in a tree.
            xs: what it moves.
            level, branch: where it stands.
            below: for each hyperparameter that it moves, the domain and how many numbers there are.
            given: values of a parameter group's own.
        """
        learn, sizes = self.learn if self.above else (), [len(x) for x in xs]
        values = {}
        for name, value in {**self.rule.defaults, **(self.rule.defaults_above if level else {}), **self.given, **given}.items():
            if isinstance(value, dict):
                values[name] = torch.cat([numbers(value[n]).expand(amount) for n, (_, amount) in below.items()])
            else:
                amount = {"group": 1, "tensor": len(xs), "coordinate": sum(sizes)}[self.per] if name in learn else 1
                values[name] = numbers(value).expand(amount)
        above, trust_above = [], None
        for names, tower in self.above.items():
            raw = torch.cat([self.domain(n).raw(values[n]) for n in names])
            path = ".".join(filter(None, [branch, names[0]])) if len(self.above) > 1 else branch
            above.append((names, tower.grow(nodes, [raw], level + 1, path, {n: (self.domain(n), len(values[n])) for n in names})))
            trust_above = tower.trust_at(level + 1) if "lr" in names else trust_above
        limits = [domain.raw_limits(torch.float64) for domain, amount in (below or {}).values() for _ in range(amount)]
        limited = level and "lr" not in learn and self.trust_at(level) is not None
        nodes[f"{level}[{branch}]" if branch else str(level)] = node = Node(
            level,
            self.rule,
            [Part(self.rule.init(x), self.index(i, sizes)) for i, x in enumerate(xs)],
            {n: v for n, v in values.items() if n not in learn},
            {n: len(values[n]) for n in learn},
            {n: self.domain(n) for n in values},
            above,
            {n: self.horizon_of(n) for n in learn},
            self.guards(level, values["lr"], trust_above) + self.priors(level, values),
            self.trust_at(level) if limited else math.inf,
            self.project,
            numbers(*limits).unbind(1) if level else (-math.inf, math.inf),
        )
        return node

    def index(self, i, sizes):
        """Where the numbers of a part stand in a hyperparameter that has more than one."""
        return slice(i, i + 1) if self.per == "tensor" else slice(sum(sizes[:i]), sum(sizes[: i + 1]))


class Twin:
    """A bound tower. Each parameter group has nodes of its own; all groups step, or none.

    Args:
        tower: a `Hyper`.
        groups: dictionaries of "params", flat float64 tensors, and values of the group's own.
        hyper_every: the levels above 0 step on every so many steps.
    """

    def __init__(self, tower, groups, hyper_every=1):
        self.hyper_every, self.sign, self.calls, self.bad, self.nodes = hyper_every, -1 if tower.maximize else 1, [0] * len(groups), 0, []
        for group in groups:
            self.nodes.append({})
            tower.grow(self.nodes[-1], group["params"], **{n: v for n, v in group.items() if n != "params"})
        self.roots = [nodes["0"] for nodes in self.nodes]

    def step(self, gs):
        """One step, given a gradient or None for each parameter. If one is not finite nothing changes."""
        finite = all(g is None or g.isfinite().all() for g in gs)
        self.bad += not finite
        for i, (root, own) in enumerate(zip(self.roots, self.by_group(gs), strict=True)):
            if all(g is None for g in own):
                continue
            self.calls[i] += 1
            if finite:
                root.step([None if g is None else self.sign * g for g in own], learn=self.calls[i] % self.hyper_every == 0)
            root.held_out = {}

    def hyper_backward(self, gs, averaged):
        """Let the next step learn from another loss, whose gradients were taken at the weights, or at the averaged ones."""
        for root, own in zip(self.roots, self.by_group(gs), strict=True):
            pairs = [(part, self.sign * g) for part, g in zip(root.parts, own, strict=True)]
            q = root.pull(pairs, root.rule.average if averaged else "x")
            root.held_out = {n: v + root.held_out.get(n, 0) for n, v in q.items()}

    def assign(self, group, **values):
        """As `optimizer.param_groups[group][name] = value`."""
        self.roots[group].written |= {n: numbers(v) for n, v in values.items()}

    @property
    def weights(self):
        return [part.s["x"] for root in self.roots for part in root.parts]

    @property
    def averaged(self):
        return [part.s[root.rule.average] for root in self.roots for part in root.parts]

    @property
    def skipped(self):
        return {"gradients": self.bad, "hypergradients": sum(node.resets for nodes in self.nodes for node in nodes.values())}

    def hyperparameters(self):
        return self.named(lambda node: node.hyperparameters())

    def hypergradients(self):
        return self.named(lambda node: node.q)

    def named(self, of):
        suffixes = [f"[{i}]" if len(self.nodes) > 1 else "" for i in range(len(self.nodes))]
        return {
            f"{label}.{name}{suffix}": value
            for nodes, suffix in zip(self.nodes, suffixes, strict=True)
            for label, node in nodes.items()
            for name, value in of(node).items()
        }

    def by_group(self, gs):
        gs = iter(gs)
        return [[next(gs) for _ in root.parts] for root in self.roots]
