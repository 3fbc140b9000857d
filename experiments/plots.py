"""Plots of results: curves with a band over seeds, and axes that look alike in every figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullLocator

from experiments.store import metrics


def band(axes: Axes, lines: Iterable[tuple[Sequence[float], Sequence[float | None]]], top: float = math.inf, **line_style: Any) -> None:
    """Plot the mean of several lines and a band from the lowest to the highest. Lines shorter than the longest are left out.

    Args:
        axes: where to plot.
        lines: x and y of each line, usually one for each seed.
        top: larger values, infinity included, are drawn at this height.
        line_style: color, label and other keyword arguments of `Axes.plot`.
    """
    lines = list(lines)
    longest = max((len(x) for x, _ in lines), default=0)
    whole = [(x, y) for x, y in lines if len(x) == longest]
    if longest:
        xs, ys = whole[0][0], np.minimum(np.array([y for _, y in whole], dtype=float), top)
        (line,) = axes.plot(xs, ys.mean(0), **line_style)
        axes.fill_between(xs, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def courses(runs: Iterable[dict[str, Any]], name: str) -> list[tuple[list[float], list[float | None]]]:
    """The learned schedule of a hyperparameter, "0.lr" for instance, as a line of `band` for each run that recorded it."""
    return [(run["courses"]["step"], run["courses"][name]) for run in runs if name in run["courses"]]


def against(axes: Axes, runs: Mapping[float, Sequence[dict[str, Any]]], top: float = math.inf, **line_style: Any) -> None:
    """Plot the metric against the value from which runs start, with `band`; `runs` holds the runs of all seeds by that value."""
    at = [start for start, found in runs.items() if found]
    lines = zip(*(metrics(runs[start]) for start in at), strict=False)
    band(axes, [(at, line) for line in lines], top, marker="o", **line_style)


def finish(axes: Axes, fontsize: float = 7, **legend: Any) -> None:
    """Add a grid and, if a line has a label, a legend."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=fontsize, title_fontsize=fontsize, **legend)


def decimal_ticks(axis: Axis) -> None:
    """Label a logarithmic axis of one or two decades with a few decimal numbers: 2.5 rather than 2.5×10⁰."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7), numticks=30))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
