"""Z = ∂x/∂r of any update: forward derivatives, carried from step to step."""

import importlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .domains import Domain, Positive
from .rule import Rule, State, overrides

Raw = dict[str, Tensor]
Point = tuple[Tensor, State]  # x and the state

AT_AVERAGE = ("average", "gap", "mix")  # the states that say where an average is
DUALS = threading.RLock()  # torch has one level of dual numbers for all threads: whoever makes some holds this


class Tangents:
    """(Z', S') = the derivative of the update at (x, s, r) along (γZ, γS, e), with g held constant; γ is that of each hyperparameter.

    Which part of the update has to be differentiated depends on one question: does the direction depend on what is learned? If it does
    not (lr alone; beta1 of an average), it is computed once, and only what follows from it is differentiated; in closed form where
    nothing follows and lr alone is learned, as log lr:

        Z' = γ·(1 − lr·weight_decay)·Z − lr·(d + weight_decay·x)      weight_decay: 0 where its size does not depend on x

    Args:
        rule: whose update it is.
        domains: of the hyperparameters that are learned, by name.
        gamma: γ = 1 − 1/horizon of each of them; for one with γ = 0 nothing is carried.
        coupled: the weights are coupled to one another, as by a feasible set: then the whole update is differentiated.
    """

    def __init__(self, rule: Rule, domains: Mapping[str, Domain], gamma: Mapping[str, float], *, coupled: bool = False) -> None:
        self.names, self.gamma = tuple(domains), dict(gamma)
        whole = coupled or overrides(rule, "update") or bool(domains and rule._couples())
        self.fixed = not whole and not read_by_direction(rule) & domains.keys()
        self.alone = domains == {"lr": Positive()}  # lr alone is learned, through its logarithm
        self.closed = self.fixed and self.alone and not overrides(rule, "after")
        if self.names and not self.closed:
            _silence()

    def along(
        self,
        name: str,
        points: Sequence[Point],
        carried: Sequence[Mapping[str, Tensor]],
        r: Raw,
        update: Callable[[Sequence[Point], Raw], Sequence[Point]],
        *,
        views: bool = False,
    ) -> tuple[list[Point], list[dict[str, Tensor]]]:
        """The update at every point, and its derivative along one hyperparameter.

        Args:
            name: of the hyperparameter.
            points: x and state of each block.
            carried: for each the tangents of x ("x") and of its states, already multiplied by γ; absent where they are zero.
            r: the raw hyperparameters.
            update: the new points, as a differentiable function of the old ones and r.
            views: points are views of larger buffers.
        """
        news, tangents = [], []
        with forward_ad.dual_level():
            duals = [(_dual(x, z.get("x"), views), _duals(state, z, views)) for (x, state), z in zip(points, carried, strict=True)]
            for x1, s1 in update(duals, {**r, name: _dual(r[name], torch.ones_like(r[name]))}):
                (x1, z), *rest = [forward_ad.unpack_dual(a) for a in (x1, *s1.values())]
                news.append((x1, {key: pair.primal for key, pair in zip(s1, rest, strict=True)}))
                # At horizon 1 nothing is carried: of the state, only a loss at the average asks for tangents.
                kept = {key: pair.tangent for key, pair in zip(s1, rest, strict=True) if self.gamma[name] or key in AT_AVERAGE}
                found = {"x": z, **kept}
                tangents.append({key: tangent for key, tangent in found.items() if tangent is not None})
        return news, tangents


def read_by_direction(rule: Rule) -> frozenset[str]:
    """The hyperparameters that `direction` depends on, found by asking it once; all of them where it cannot be asked."""
    seen: set[str] = set()

    class Spy:
        def __getattr__(self, name: str) -> Tensor:
            seen.add(name)
            return torch.full((), 0.5)

        def one_minus(self, name: str) -> Tensor:
            return getattr(self, name)

        def one_minus_power(self, name: str, t: Tensor) -> Tensor:
            return getattr(self, name)

    spy: Any = Spy()
    try:
        for x in (torch.zeros(2, 2), *[torch.zeros(2)] * bool(rule.parts)):  # a split rule judges by the shape
            rule.direction(x, rule.init(x), spy, torch.ones(()))
    except Exception:  # a user's rule may need other shapes than these
        return frozenset(rule.declared())
    return frozenset(seen)


def _duals(state: State, tangents: Mapping[str, Tensor], views: bool) -> State:
    return {key: _dual(s, tangents.get(key), views) for key, s in state.items()}


def _dual(x: Tensor, tangent: Tensor | None, view: bool = False) -> Tensor:
    if tangent is None:
        return x
    # For a view torch allocates zeros as large as its base, to hold the tangents of everything that may share the memory.
    return forward_ad.make_dual(x.clone() if view else x, tangent)


@cache
def _silence() -> None:
    # The first dual number makes torch import a module that warns of a deprecation of torch's own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")
