"""How good is the best of K trials? Estimated from N ≥ K trials by resampling, after Choi et al. (2019, arXiv 1910.05446)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 100


class Curve(NamedTuple):
    """Mean, 5th and 95th percentile of the best of K trials, for K = 1, 2, …"""

    mean: list[float]
    low: list[float]
    high: list[float]


def best_of(chosen_by: Sequence[float], reported: Sequence[float] | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Curve:
    """The best of the first K of N trials drawn with replacement, over many draws.

    The expectation has a closed form. Where v_1 ≤ … ≤ v_N are the trials, the best of K is above v_i with probability ((N − i)/N)^K:

        E[best of K] = Σ_i v_i·(((N − i + 1)/N)^K − ((N − i)/N)^K)

    Args:
        chosen_by: the metric of each trial by which the best is chosen, lower is better: on validation data.
        reported: the metric of each trial that is reported of the best: on test data. Default: `chosen_by`.
        resamples: number of draws.
        seed: of the draws.
    """
    chosen = np.asarray(chosen_by, dtype=float)
    shown = chosen if reported is None else np.asarray(reported, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(chosen), size=(resamples, len(chosen)))
    picked = chosen[drawn]
    best = np.minimum.accumulate(picked, axis=1)
    # The place of the best so far: where it is new, this one, and otherwise that of before.
    new = np.concatenate([np.ones((resamples, 1), dtype=bool), picked[:, 1:] < best[:, :-1]], axis=1)
    place = np.maximum.accumulate(np.where(new, np.arange(len(chosen)), 0), axis=1)
    found = shown[np.take_along_axis(drawn, place, axis=1)]
    return Curve(found.mean(0).tolist(), *(np.percentile(found, share, axis=0).tolist() for share in (5, 95)))


def equal_trials(curve: Curve, metric: float) -> int | None:
    """The smallest K whose best is as good as this metric on average; None if it is more than all that were run."""
    return next((k for k, mean in enumerate(curve.mean, 1) if mean <= metric), None)
