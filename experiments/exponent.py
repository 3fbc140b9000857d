"""The exponent family on CIFAR-10: the step is m / v^(1/eta) with v the moving average of |g|^eta; eta is held at six values, or learned.

    python -m experiments.exponent --jobs 2       32 minutes on two cores; resumes if it was stopped
    python -m experiments.exponent --figures      the table and the figure from existing results

A thesis on adaptive learning rates trains ResNet-44 with lr 1e-3, beta1 1e-3 (hardly any momentum) and eta ∈ {1/3, 1/2, 1, 2, 3, 4}, with
and without the running maximum of v (for eta = 2 AMSGrad and Adam). It finds some eta ≠ 2 better and leaves open how to choose eta; it
gives no number that could be compared with this experiment. Protocol: batch 128, images mirrored and shifted by up to 4 pixels. The
default for two cores is ResNet-20, the first 20,000 training and 4,000 test images, one epoch and 2 seeds. All runs of a seed have the
same initial weights and the same batches. The methods, each from the six values of eta:

- held: lr 1e-3 and eta held, as in the thesis.
- eta: eta learned by Adam, lr held at 1e-3.
- lr: lr learned by Adam, eta held; only without the running maximum.
- both: lr and eta learned by Adam; only without the running maximum. The schedule of the first seed is replayed with nothing learned, on
  the rule of this library, as torch.optim has none with eta.

The setting of the thesis: python -m experiments.exponent --model resnet44 --images 50000 --epochs 200 --device cuda
All other hyperparameters have the defaults of this library. For comparison, torch.optim.Adam (lr 1e-3, its own betas) and the
recommended tower, hyperopt.auto.

Writes exponent_<model>.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import cli, plots, tables, training
from experiments.store import Store, metrics
from experiments.workloads import Workload
from hyperopt import Adam, Exponent, Hyper

ETAS = {"1/3": 1 / 3, "1/2": 1 / 2, "1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0}
MAXIMA = {False: "without the running max", True: "with the running max"}


def held(eta: float, running_max: bool, **options: Any) -> Hyper:
    """The setting of the thesis, from which every run starts."""
    return Hyper(Exponent, lr=1e-3, beta1=1e-3, eta=eta, running_max=running_max, **options)


# Without a prior, which would take eta back to 2, and with the horizon of lr: the question is where the hypergradients take it.
FREE: dict[str, Any] = {"prior": None, "horizon": 1000}
METHODS = {
    "held": training.Method("eta and lr held", held, "C7"),
    "eta": training.Method("eta learned", lambda eta, maximum: held(eta, maximum, learn="eta", **FREE).stack(Adam), "C0"),
    "lr": training.Method("lr learned", lambda eta, maximum: held(eta, maximum).stack(Adam), "C1", "--"),
    "both": training.Method(
        "lr and eta learned", lambda eta, maximum: held(eta, maximum, learn=("lr", "eta"), **FREE).stack(Adam), "C2", "-."
    ),
}
REFERENCES: dict[str, Any] = {
    "torch.optim.Adam": partial(training.reference, Hyper(Adam, lr=1e-3), None),
    "hyperopt.auto": training.auto,
}


def methods(maximum: bool) -> tuple[str, ...]:
    """The methods that are run with the running maximum, or without it."""
    return ("held", "eta") if maximum else tuple(METHODS)


def name(method: str, eta: str, maximum: bool) -> str:
    """The key of a cell in the result file, without the seed."""
    return f"{method} | eta {eta}{', running max' if maximum else ''}"


def cells() -> Iterator[tuple[str, str, bool]]:
    """All cells: method, eta, running maximum or not."""
    yield from ((method, eta, maximum) for maximum in MAXIMA for method in methods(maximum) for eta in ETAS)


def plan(workload: Workload, seeds: int, log: Path, **options: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key."""
    grid = {name(m, eta, maximum): METHODS[m].make(ETAS[eta], maximum) for m, eta, maximum in cells()}
    return training.tasks(workload, REFERENCES | grid, seeds, log, {name("both", eta, False) for eta in ETAS}, **options)


def errors(store: Store, method: str, eta: str, maximum: bool) -> list[float]:
    """The error of each seed, infinite if the run diverged."""
    return metrics(store.seeds(name(method, eta, maximum)))


def table(store: Store) -> str:
    """The results in Markdown: a row for each eta, without and with the running maximum; then the conclusion."""
    protocol = store.result["protocol"]
    head = ["eta", *(method.label for method in METHODS.values()), "both, first seed → replayed"]
    head += ["eta learned: eta at the end", "lr learned: lr", "both: lr, eta"]
    parts = [f"{protocol['title']}; test error in %, mean ± sd of {protocol['seeds']} seeds.\n"]
    for maximum, title in MAXIMA.items():
        rows = []
        for eta in ETAS:
            runs = {m: store.seeds(name(m, eta, maximum)) for m in METHODS}
            measured = [tables.mean_sd(metrics(runs[m])) if m in methods(maximum) else "" for m in METHODS]
            # Every run records lr, but only two methods learn it.
            ends = [tables.ends(runs[m], learned) for m, learned in (("eta", ["eta"]), ("lr", ["lr"]), ("both", ["lr", "eta"]))]
            rows.append([eta, *measured, "" if maximum else tables.replay(runs["both"]), *ends])
        parts += [f"{title.capitalize()}:\n", tables.markdown(head, rows)]
    beside = "; ".join(f"{label} {tables.mean_sd(metrics(store.seeds(label)))}" for label in REFERENCES)
    return "\n".join([*parts, f"Beside them: {beside}.\n", *answer(store)])


def answer(store: Store) -> list[str]:
    """How to choose eta, as lines of Markdown, from the runs without the running maximum; empty if one of them is missing."""
    means = {m: {eta: float(np.mean(errors(store, m, eta, False) or [np.nan])) for eta in ETAS} for m in METHODS}
    if any(np.isnan(value) for found in means.values() for value in found.values()):
        return []
    lines = ["How to choose eta, by what was measured without the running max, from the best to the worst of the six:\n"]
    worst = {}
    for m, found in means.items():
        low, worst[m] = min(found, key=found.__getitem__), max(found.values())
        high = max(found, key=found.__getitem__)
        ends = [run["courses"]["0.eta"][-1] for eta in ETAS for run in store.seeds(name(m, eta, False)) if "0.eta" in run["courses"]]
        moved = f"; eta ends between {min(ends):.2g} and {max(ends):.2g}" if ends else ""
        lines.append(f"- {METHODS[m].label}: {found[low]:.2f} % (from {low}) to {found[high]:.2f} % (from {high}){moved}.")
    safest = min(worst, key=worst.__getitem__)
    best = min(means["held"], key=means["held"].__getitem__)
    lines.append(
        f"\nWho does not want to try them all does best with {METHODS[safest].label}: at most {worst[safest]:.2f} % whatever eta is at "
        f"first. Trying all six, with lr held, finds eta = {best} and {means['held'][best]:.2f} %.\n"
    )
    return lines


def draw(store: Store, path: Path) -> None:
    """Draw the errors against eta and the learned etas, without and with the running maximum, and the learned lr."""
    protocol = store.result["protocol"]
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3)
    for row, (maximum, title) in zip(panels, MAXIMA.items(), strict=True):
        _errors(row[0], store, maximum, title)
        _learned(row[1], store, "eta", "eta", maximum, f"learned eta, lr held, {title}")
    panels[1, 0].sharey(panels[0, 0])
    _learned(panels[0, 2], store, "both", "eta", False, "learned eta, lr learned too, without the running max")
    _learned(panels[1, 2], store, "both", "lr", False, "learned lr, eta learned too, without the running max")
    figure.suptitle(f"The exponent family. {protocol['title']}; mean of {protocol['seeds']} seeds, bands from the lowest to the highest")
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=72)


def _errors(axes: Axes, store: Store, maximum: bool, title: str) -> None:
    for m in methods(maximum):
        plots.against(axes, {value: store.seeds(name(m, eta, maximum)) for eta, value in ETAS.items()}, top=100, **METHODS[m].line_style)
    for label, style in zip(REFERENCES, (":", "-."), strict=True):
        if beside := metrics(store.seeds(label)):
            axes.axhline(min(float(np.mean(beside)), 100), color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="eta at first", ylabel="test error, % (100: diverged)", title=title)
    axes.set_xticks(list(ETAS.values()), list(ETAS))
    axes.minorticks_off()
    plots.decimal_ticks(axes.yaxis)
    plots.finish(axes)


def _learned(axes: Axes, store: Store, method: str, what: str, maximum: bool, title: str) -> None:
    for eta in ETAS:
        lines = plots.courses(store.seeds(name(method, eta, maximum)), f"0.{what}")
        plots.band(axes, lines, linewidth=1.2, label=f"from eta {eta}")
    axes.set(yscale="log", xlabel="step", ylabel=what, title=title)
    axes.title.set_fontsize(10)
    if what == "eta":
        plots.decimal_ticks(axes.yaxis)
    plots.finish(axes)


app = cli.cifar_command("exponent", 1, plan, table, draw)

if __name__ == "__main__":
    app()
