"""Search spaces: the ranges in which the hyperparameters of each rule are tuned, and the points at which they are tried.

    space = SPACES["Adam"]
    at = points(space.all, seed=0, count=16)        # 16 points of a scrambled Sobol sequence
    tower = space.tower(at[0])                      # Adam with these values

The name of an axis says what is searched: `1 - beta1` in place of beta1, whose good values crowd below 1, and `lr/eps` in place of lr where
a good lr is proportional to eps (Choi et al. 2019, arXiv 1910.05446).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import QMCSampler

from hyperopt import Hyper

optuna.logging.set_verbosity(optuna.logging.WARNING)
MARGIN = 0.1  # an optimum within this share of the range from its end is on the border
COMPLEMENT = "1 - "


@dataclass(frozen=True)
class Axis:
    """A range that is searched uniformly, in the number itself or in its logarithm."""

    low: float
    high: float
    log: bool = True

    @property
    def distribution(self) -> FloatDistribution:
        """The same for Optuna."""
        return FloatDistribution(self.low, self.high, log=self.log)

    def share(self, x: float) -> float:
        """How far along the range x is, from 0 to 1."""
        if self.log:
            return math.log(x / self.low) / math.log(self.high / self.low)
        return (x - self.low) / (self.high - self.low)

    def beyond(self) -> tuple[float, float]:
        """A number below the range and one above it: a decade away on a log scale, a tenth of the range otherwise."""
        if self.log:
            return self.low / 10, self.high * 10
        step = (self.high - self.low) / 10
        return self.low - step, self.high + step


Axes = Mapping[str, Axis]


@dataclass(frozen=True)
class Space:
    """Where a rule is tuned.

    Args:
        text: the rule, with the values of what is not searched.
        lr: where lr alone is searched.
        all: where everything is.
    """

    text: str
    lr: Axis
    all: Axes

    @cached_property
    def base(self) -> Hyper:
        """The rule without the values that are searched."""
        return Hyper.parse(self.text)

    def axes(self, only: Collection[str] = ()) -> Axes:
        """The axes of these hyperparameters, of all by default. Of lr without eps, lr itself is searched and not lr/eps.

        Raises:
            ValueError: a hyperparameter that the space does not have.
        """
        found = {"lr": self.lr, **{searched(name): axis for name, axis in self.all.items()}}
        if missing := [name for name in only if name not in found]:
            raise ValueError(f"{missing[0]!r} is not searched for {self.text}: give some of {', '.join(found)}")
        chosen = {name: axis for name, axis in self.all.items() if not only or set(name.removeprefix(COMPLEMENT).split("/")) <= set(only)}
        return chosen if not only or "lr" not in only or "lr" in map(searched, chosen) else {"lr": self.lr, **chosen}

    def tower(self, point: Mapping[str, float]) -> Hyper:
        """The rule with the values of a point; ValueError if one is outside its domain."""
        return self.base.replace(**values(point))

    def admits(self, name: str, x: float) -> bool:
        """Whether the domain of the axis's hyperparameter admits the value that x on this axis stands for."""
        value = 1 - x if name.startswith(COMPLEMENT) else x
        return self.base.rule.declared()[searched(name)].domain.admits(value)

    def borders(self, axes: Axes, point: Mapping[str, float]) -> list[str]:
        """Which ranges the point is at an end of, and how to widen them; an end at which the domain ends too is none."""
        found = []
        for name, axis in axes.items():
            share, (below, above) = axis.share(point[name]), axis.beyond()
            for near, beyond, side, way in ((share < MARGIN, below, "lower", "down"), (share > 1 - MARGIN, above, "upper", "up")):
                if near and self.admits(name, beyond):
                    ends = f"{axis.low:g} … {axis.high:g}"
                    found.append(f"{name} = {point[name]:.3g} is at the {side} end of {ends}: widen it {way} to {beyond:g}")
        return found


def searched(name: str) -> str:
    """The hyperparameter that an axis stands for."""
    return name.removeprefix(COMPLEMENT).partition("/")[0]


def values(point: Mapping[str, float]) -> dict[str, float]:
    """The hyperparameters at a point."""
    found = {searched(name): 1 - x if name.startswith(COMPLEMENT) else x for name, x in point.items()}
    for name in point:
        if "/" in name:
            own, other = name.split("/")
            found[own] *= found[other]
    return found


def points(axes: Axes, seed: int, count: int) -> list[dict[str, float]]:
    """The first points of the scrambled Sobol sequence of this seed. The first 2^m put one into each 2^m-th part of every axis."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = QMCSampler(qmc_type="sobol", scramble=True, seed=seed)
    # Optuna's own loop takes its first point from another sampler, and the others in the order in which workers ask.
    study = optuna.create_study(sampler=sampler)
    space: dict[str, BaseDistribution] = {name: axis.distribution for name, axis in axes.items()}
    none = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    return [sampler.sample_relative(study, none, space) for _ in range(count)]


# ---- the spaces


def log(low: float, high: float) -> Axis:
    """A range on a log scale."""
    return Axis(low, high)


def linear(low: float, high: float) -> Axis:
    """A range on its own scale."""
    return Axis(low, high, log=False)


DECAYS = {"1 - beta1": log(1e-2, 1), "1 - beta2": log(1e-4, 1)}
# From an eps of 1e-3 downwards the square root of v is the larger term for most weights, so that nothing changes any more. The range of
# lr/eps was .01 to 10 at first, and SGD's of lr .001 to 10: on the char-RNN the best trials were at their upper ends.
COUPLED = {"lr/eps": log(1e-1, 100), "eps": log(1e-3, 10)}
# Weight decay is off and not searched: after a few hundred steps it makes no difference.
SPACES = {
    "SGD": Space("SGD", log(1e-2, 100), {"lr": log(1e-2, 100)}),
    "Momentum": Space("SGD(momentum=0.9)", log(1e-3, 10), {"lr": log(1e-3, 10), "1 - momentum": log(1e-2, 1)}),
    "Nesterov": Space("SGD(momentum=0.9, nesterov=True)", log(1e-3, 10), {"lr": log(1e-3, 10), "1 - momentum": log(1e-2, 1)}),
    "RMSprop": Space("RMSprop", log(1e-5, 1e-1), {**COUPLED, "1 - alpha": log(1e-4, 1), "1 - momentum": log(1e-2, 1)}),
    "Adam": Space("Adam", log(1e-5, 1e-1), {**COUPLED, **DECAYS}),
    "NAdam": Space("NAdam", log(1e-5, 1e-1), {**COUPLED, **DECAYS, "momentum_decay": log(1e-3, 10)}),
    "ADOPT": Space("ADOPT", log(1e-5, 1e-1), {**COUPLED, **DECAYS, "clip": log(1e-1, 100)}),
    "Muon": Space(
        "(Muon | Adam)(weight_decay=0, rows=64)",
        log(1e-4, 1),
        {"lr": log(1e-4, 1), "1 - momentum": log(1e-2, 1), **DECAYS, "eps": log(1e-10, 1e-2)},
    ),
    "Unified": Space(
        "Unified",
        log(1e-5, 1e-1),
        {
            "lr/damping": log(1e-1, 100),
            "damping": log(1e-3, 1),
            **DECAYS,
            "eta": log(1, 4),
            **{name: linear(0, 1) for name in ("nesterov", "amsgrad", "adopt", "correction")},
        },
    ),
}


def derived(text: str) -> Space:
    """The space of a rule that has none of its own: two decades about each default on a log scale; of decays, one about 1 - default.

    Hyperparameters whose default is on the boundary of their domain, such as a weight decay of 0, are not searched.

    Raises:
        ValueError: not a rule, or a tower, whose values are learned and not tuned.
    """
    tower = Hyper.parse(text)
    if tower.above:
        raise ValueError(f"{text} learns its hyperparameters: give its rule alone, {tower.held()}")
    axes: dict[str, Axis] = {}
    for name, declared in tower.rule.declared().items():
        value = tower.rule.value(name)
        if not isinstance(value, float) or not declared.domain.inside(value):
            continue
        if declared.domain.bounds() != (0, 1):
            axes[name] = log(value / 100, value * 100)
        else:  # 1 - .9 is not .1
            key, about = (name, value) if value < 0.5 else (COMPLEMENT + name, round(1 - value, 12))
            axes[key] = log(about / 10, min(1, about * 10))
    if "lr" not in axes:
        raise ValueError(f"{text} has no lr above 0 to search around")
    return Space(text, axes["lr"], axes)


def named(text: str) -> Space:
    """The space of this name, or of this rule; ValueError if there is none."""
    return SPACES[text] if text in SPACES else derived(text)
