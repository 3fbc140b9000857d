"""Whether a tower that starts near Adam and learns the coefficients of Unified, which contains other rules, finds one better than Adam.

    python -m experiments.unified                33 minutes on one core of a busy machine; resumes if it was stopped
    python -m experiments.unified --figures      the table and the figure from existing results

Four workloads: the MLP on MNIST (3 epochs, three seeds), the char-RNN on War and Peace (400 steps, two seeds), ResNet-20 on 20,000 images
of CIFAR-10 (120 steps with batch 128, one seed) and the small GPT on tinyshakespeare (250 steps with batch 32, one seed). All towers have
an lr of 1e-3 at first and Adam with defaults as their level 1. All runs of a seed have the same initial weights and the same batches.

- Adam: `Adam / Adam`, lr alone learned.
- prior: Unified instead of Adam, with damping 1e-8, nesterov, amsgrad and adopt .01 and correction .99 at first, all five learned beside
  lr. The defaults of the last four, which are Adam's, lie on the boundary of their domain, where nothing can be learned. The logit of a
  coefficient moves by at most .005 in a step and returns to its start by a thirtieth of the distance, so that it stays within .15 of it.
- no prior: the same with prior=None. In 400 steps, a logit can move by 2.

In float32 the smallest damping that is learned is 7.2e-8, so that damping jumps there in the first step. In the committed
runs the prior still took it back below, where checkpoints could not hold it.

Of every run, the learned lr is replayed on torch.optim.Adam, whose other values are its defaults. A run that is better than its replay
owes it to the coefficients; one that is better than `Adam / Adam` may owe it to another lr. All towers are compiled, which makes the steps
of Unified up to four times as fast.

Writes unified.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from experiments import cli, plots, provenance, tables, training
from experiments.store import Store, metrics
from experiments.training import REPLAYED
from experiments.workloads import WORKLOADS, Workload
from hyperopt import Adam, Hyper, Unified

START = {"damping": 1e-8, "nesterov": 0.01, "amsgrad": 0.01, "adopt": 0.01, "correction": 0.99}
_UNIFIED = partial(Hyper, Unified, **START, learn=("lr", *START))
METHODS = {
    "adam": ("Adam, lr alone", Hyper(Adam).stack(Adam)),
    "prior": ("Unified", _UNIFIED().stack(Adam)),
    "free": ("Unified, no prior", _UNIFIED(prior=None).stack(Adam)),
}
# Workloads with the number of seeds.
PROBLEMS: dict[str, tuple[Workload, int]] = {
    "mlp": (WORKLOADS["m3"], 3),
    "rnn": (replace(WORKLOADS["r12"], title="War and Peace, char-RNN 2×128, batch 32×64, 400 steps", steps=400), 2),
    "resnet": (replace(WORKLOADS["c3"], title="CIFAR-10 (20,000 images), ResNet-20, batch 128, 120 steps", steps=120), 1),
    "gpt": (replace(WORKLOADS["gpt"], title="tinyshakespeare, GPT 4×128, batch 32×128, 250 steps", steps=250), 1),
}


def compiled(tower: Hyper, model: nn.Module) -> list[Any]:
    """The tower with compiled steps; `partial(compiled, tower)` is a `make` of `training.train`."""
    return [tower.bind(model.parameters(), compile=True)]


def plan(names: list[str], steps: int | None, device: str, log: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key, the first seed of all workloads before the second."""
    return {
        key: partial(
            training.train,
            PROBLEMS[name][0].shortened(steps),
            partial(compiled, tower),
            seed,
            after=(REPLAYED,),
            twin=Hyper(Adam),
            device=device,
            log=log / training.slug(key),
        )
        for seed in range(max(seeds for _, seeds in PROBLEMS.values()))
        for name in names
        if seed < PROBLEMS[name][1]
        for method, (_, tower) in METHODS.items()
        for key in [f"{name} | {method} | {seed}"]
    }


def present(store: Store) -> list[str]:
    """The workloads that have runs."""
    return [name for name in PROBLEMS if any(key.startswith(f"{name} |") for key in store.runs)]


def table(store: Store) -> str:
    """The results in Markdown: a row for each workload and method."""
    rows = []
    for name in present(store):
        for method, (label, _) in METHODS.items():
            runs = store.seeds(f"{name} | {method}")
            workload = PROBLEMS[name][0].shortened(store.result["protocol"]["steps"])
            measured = [tables.mean_sd(metrics(runs, *path)) for path in ((), (REPLAYED,))]
            values = [tables.ends(runs, [each]) for each in ("lr", *START)]
            rows.append([workload.title, str(len(runs)), f"test {workload.metric}", label, *measured, *values])
    head = [
        "workload",
        "seeds",
        "metric",
        "learned",
        "tower",
        "its lr on torch.optim.Adam",
        *(f"{each} at the end" for each in ("lr", *START)),
    ]
    return f"Mean ± sd over seeds, and the range over seeds of the learned values.\n\n{tables.markdown(head, rows)}"


def draw(store: Store, path: Path) -> None:
    """Draw a panel for each coefficient, with a line for each workload, with and without the prior."""
    figure = Figure(figsize=(3 * len(START), 4.2), layout="constrained")
    panels = figure.subplots(1, len(START), sharey=True)
    for axes, what in zip(panels, START, strict=True):
        _paths(axes, store, what)
    panels[0].set_ylabel("logit − logit at the start")
    panels[0].legend(fontsize=8)
    figure.suptitle(
        "Learned coefficients of Unified: solid without a prior, dotted with it; mean of the seeds, bands from the lowest to the highest",
        fontsize=10,
    )
    figure.supxlabel(provenance.caption(store.result, 200), fontsize=7)
    figure.savefig(path, dpi=72)


def _paths(axes: Axes, store: Store, what: str) -> None:
    for color, name in enumerate(PROBLEMS):
        for method, style in ("free", "-"), ("prior", ":"):
            lines = [
                (steps, _logit(values) - _logit([START[what]]))
                for steps, values in plots.courses(store.seeds(f"{name} | {method}"), f"0.{what}")
            ]
            plots.band(axes, lines, color=f"C{color}", linestyle=style, label=name if method == "free" else None)
    axes.set_title(f"{what}, from {START[what]:g}", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _logit(values: Any) -> Any:
    p = np.array(values, dtype=float)
    return np.log(p) - np.log1p(-p)


app = cli.problems_command("unified", {name: seeds for name, (_, seeds) in PROBLEMS.items()}, plan, table, draw)

if __name__ == "__main__":
    app()
