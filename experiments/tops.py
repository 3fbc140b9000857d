"""Towers of height 1 to 3 from step sizes of the top between 1e-6 and 1e2: the more levels, the less the choice above all of them matters.

    python -m experiments.tops --jobs 2       45 minutes on a busy machine; resumes if it was stopped
    python -m experiments.tops --figures      the table and the figure from existing results

Adam at level 0, from its default lr of 1e-3, on three workloads: the MLP on MNIST (3 epochs, three seeds), ResNet-20 on 20,000 images of
CIFAR-10 (120 steps with batch 128, one seed), and the char-RNN on War and Peace (400 steps, one seed). Only the step size of the top is
chosen, which no level learns.

- paper: SGD on every level above, horizon 1, no trust, lr learned as the number itself rather than its logarithm; 1e-3 for the step sizes
  between level 0 and the top.
- defaults: Adam on every level above, with defaults.

Writes tops.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import cli, plots, provenance, tables, training
from experiments.store import Store, metrics
from experiments.workloads import WORKLOADS, Workload
from hyperopt import SGD, Adam, Hyper, Real

TOPS = [10.0**k for k in range(-6, 3)]
HEIGHTS = (1, 2, 3)
KINDS = {"defaults": "our defaults", "paper": "the paper's settings"}
# Workloads with the number of seeds.
PROBLEMS: dict[str, tuple[Workload, int]] = {
    "mlp": (WORKLOADS["m3"], 3),
    "rnn": (replace(WORKLOADS["r12"], title="War and Peace, char-RNN 2×128, batch 32×64, 400 steps", steps=400), 1),
    "resnet": (replace(WORKLOADS["c3"], title="CIFAR-10 (20,000 images), ResNet-20, batch 128, 120 steps", steps=120), 1),
}


def tower(kind: str, height: int, top: float) -> Hyper:
    """The tower of a cell."""
    if kind == "defaults":
        found = Hyper(Adam)
        for level in range(1, height + 1):
            found = found.stack(Adam, **({"lr": top} if level == height else {}))
        return found
    settings: dict[str, Any] = {"horizon": 1, "trust": None, "domains": {"lr": Real()}}
    found = Hyper(Adam, **settings)
    for level in range(1, height + 1):
        found = found.stack(SGD, lr=top if level == height else 1e-3, **settings)
    return found


def problem(name: str, steps: int | None) -> Workload:
    """The workload, shortened to `steps` if they are given."""
    workload, _ = PROBLEMS[name]
    return workload.shortened(steps)


def label(name: str, kind: str, height: int, top: float) -> str:
    """The key of a cell in the result file, without the seed."""
    return f"{name} | {kind} | {height} | {top:g}"


def plan(names: list[str], steps: int | None, device: str, log: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key, one workload after the other."""
    return {
        key: partial(
            training.train, problem(name, steps), tower(kind, height, top), seed, points=20, device=device, log=log / training.slug(key)
        )
        for name in names
        for kind in KINDS
        for seed in range(PROBLEMS[name][1])
        for height in HEIGHTS
        for top in TOPS
        for key in [f"{label(name, kind, height, top)} | {seed}"]
    }


def errors(store: Store, name: str, kind: str, height: int, top: float) -> list[float]:
    """The metric of each seed, infinite if the run diverged."""
    return metrics(store.seeds(label(name, kind, height, top)))


def present(store: Store) -> list[str]:
    """The workloads that have runs."""
    return [name for name in PROBLEMS if any(key.startswith(f"{name} |") for key in store.runs)]


def table(store: Store) -> str:
    """The results in Markdown: for each workload a row for each height and kind, with the worst mean over the best."""
    parts = []
    for name in present(store):
        workload, seeds = PROBLEMS[name]
        rows = []
        for kind in KINDS:
            for height in HEIGHTS:
                found = [errors(store, name, kind, height, top) for top in TOPS]
                means = [float(np.mean(each)) for each in found if each]
                ratio = f"{max(means) / min(means):.3g}" if len(means) == len(TOPS) else "–"
                rows.append([f"height {height}, {KINDS[kind]}", *(tables.mean_sd(each) for each in found), ratio])
        head = [f"test {workload.metric} from a top of", *(f"{top:.0e}" for top in TOPS), "worst / best"]
        title = problem(name, store.result["protocol"]["steps"]).title
        parts.append(f"{title}; {f'mean ± sd of {seeds} seeds' if seeds > 1 else 'one seed'}.\n\n{tables.markdown(head, rows).strip()}")
    return "\n\n".join(parts) + "\n"


def draw(store: Store, path: Path) -> None:
    """Draw a panel for each workload that has runs, with a line for each height and kind."""
    names = present(store)
    figure = Figure(figsize=(3 + 4.5 * len(names), 6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        workload, _ = PROBLEMS[name]
        for height in HEIGHTS:
            for kind, line in zip(KINDS, ("-", ":"), strict=True):
                runs = {top: store.seeds(label(name, kind, height, top)) for top in TOPS}
                style = {"color": f"C{height}", "markersize": 4, "linestyle": line}
                plots.against(axes, runs, top=1.1 * workload.guess, label=f"height {height}, {KINDS[kind]}", **style)
        axes.axhline(workload.guess, color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="step size of the top", ylabel=f"test {workload.metric}")
        axes.set_title(textwrap.fill(problem(name, store.result["protocol"]["steps"]).title, 60), fontsize=9)
        plots.decimal_ticks(axes.yaxis)
        plots.finish(axes)
    figure.suptitle(
        "Error against the step size of the top, by the height of the tower\nbands: from the best to the worst seed; "
        "grey dotted: blind guessing; at the top: as bad, or diverged",
        fontsize=9,
    )
    figure.supxlabel(provenance.caption(store.result, 120), fontsize=7)
    figure.savefig(path, dpi=72)


app = cli.problems_command("tops", {name: seeds for name, (_, seeds) in PROBLEMS.items()}, plan, table, draw)

if __name__ == "__main__":
    app()
