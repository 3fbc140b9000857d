"""Markdown tables of results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.store import metrics
from experiments.training import REPLAYED


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def mean_sd(values: Sequence[float]) -> str:
    """A cell such as `3.11 ± 0.06`; "–" if there are no values, "diverged" if one of them is not finite."""
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "diverged"
    digits = ".2f" if max(values) < 1000 else ".1e"
    return f"{np.mean(values):{digits}}" + (f" ± {np.std(values, ddof=1):{digits}}" if len(values) > 1 else "")


def replay(runs: Iterable[dict[str, Any]]) -> str:
    """A cell such as `3.11 → 3.12`: the metric of the runs whose schedule was replayed, and that of the replay."""
    followed = [run for run in runs if REPLAYED in run]
    return " → ".join(mean_sd(metrics(followed, *path)) for path in ((), (REPLAYED,))) if followed else "–"


def ends(runs: Sequence[dict[str, Any]], names: Iterable[str] | None = None) -> str:
    """A cell with the range over seeds of each value of level 0 after the last step, such as `0.01 to 0.03, 0.9`.

    A range rather than a mean, as values that are learned through their logarithm may lie decades apart.

    Args:
        runs: results of `training.train`.
        names: the hyperparameters; all that were recorded by default.
    """
    recorded = runs[0]["courses"] if runs else ()
    labels = [label for label in recorded if label.startswith("0.") and (names is None or label.removeprefix("0.") in names)]
    values = [[run["courses"][label][-1] for run in runs] for label in labels]
    ranges = [["not finite"] if None in column else [f"{end:.3g}" for end in (min(column), max(column))] for column in values]
    return ", ".join(" to ".join(dict.fromkeys(found)) for found in ranges)


def compare(cells: Mapping[str, Sequence[Sequence[float]]], ours: Iterable[str], others: Sequence[str]) -> str:
    """A table of how often the mean over seeds of one method is below that of another, over the cells that both have.

    Args:
        cells: the metrics of the seeds of each cell, by the label of the method.
        ours: labels of the methods that get a row.
        others: labels of the methods that get a column.
    """
    rows = []
    for one in ours:
        pairs = [[(np.mean(a), np.mean(b)) for a, b in zip(cells[one], cells[other], strict=True) if a and b] for other in others]
        rows.append([one, *(f"{sum(a < b for a, b in found)} of {len(found)}" for found in pairs)])
    return markdown(["lower in so many cells than", *others], rows)
