"""SGD on CIFAR-10 from every cell of the paper's grid of step sizes and momenta, with these values held or learned.

    python -m experiments.cifar --jobs 2                                    85 minutes on two cores beside other work; resumes
    python -m experiments.cifar --images 50000 --epochs 200 --device cuda   the whole protocol; the paper's longest runs have 500 epochs
    python -m experiments.cifar --model vgg16                               or resnet18, resnet32, resnet44, resnet56
    python -m experiments.cifar --figures                                   the table and the figure from existing results

Protocol: batch 128, images mirrored and shifted by up to 4 pixels, weight decay 1e-4, no decay schedule. The default for two cores is
ResNet-20, the first 20,000 training and 4,000 test images, 2 epochs and 2 seeds, while the paper has 50,000 images and 200 epochs: it
shows from which starts learning recovers, not how good the network can become. All runs of a seed have the same initial weights and the
same batches. The methods, each from every cell of alpha (lr) ∈ {.01, .1, 1} × mu (momentum) ∈ {.09, .9, .99}:

- held: torch.optim.SGD.
- paper: lr and momentum learned by SGD with horizon 1 and no trust, as the numbers themselves rather than through a logarithm or a
  sigmoid. The step sizes are alpha²·1e-3 and 1e-6 / (1 − mu).
- defaults: only lr learned, by Adam, with the defaults of this library. The schedule of the first seed is replayed on torch.optim.
- all: lr, momentum and weight decay learned by Adam, otherwise with defaults.

For comparison, torch.optim.SGD from (.1, .9) with the usual schedule, a tenth of lr after a half and again after three quarters of the
steps, and the recommended tower, hyperopt.auto, from its default lr.

Writes cifar_<model>.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import MultiStepLR

from experiments import cli, plots, tables, training
from experiments.store import Store, metrics
from experiments.workloads import Workload
from hyperopt import SGD, Adam, Hyper, Real

ALPHAS, MUS = (0.01, 0.1, 1.0), (0.09, 0.9, 0.99)
# The paper's test error in percent after 200 epochs, held and learned, read off its figure to about ±1.
PAPER = {(0.1, 0.9): (13.3, 9.5), (1.0, 0.9): (33, 9.4), (1.0, 0.99): (87, 19.5), (0.01, 0.09): (16, 16.5), (0.01, 0.99): (12, 11.3)}


def held(alpha: float, mu: float, **options: Any) -> Hyper:
    """SGD from the values of a cell."""
    return Hyper(SGD, lr=alpha, momentum=mu, weight_decay=1e-4, **options)


def paper(alpha: float, mu: float) -> Hyper:
    """The paper's settings."""
    tower = held(alpha, mu, learn=("lr", "momentum"), horizon=1, trust=None, domains={"lr": Real(), "momentum": Real()})
    return tower.stack(SGD, lr={"lr": alpha**2 * 1e-3, "momentum": 1e-6 / (1 - mu)}, trust=None)


METHODS = {
    "held": training.Method("torch.optim.SGD, held", lambda alpha, mu: partial(training.reference, held(alpha, mu), None), "C7"),
    "paper": training.Method("the paper's settings", paper, "C0", "--"),
    "defaults": training.Method("our defaults: lr", lambda alpha, mu: held(alpha, mu).stack(Adam), "C1"),
    "all": training.Method(
        "lr, momentum, weight decay",
        lambda alpha, mu: held(alpha, mu, learn=("lr", "momentum", "weight_decay")).stack(Adam),
        "C2",
        "-.",
    ),
}
HAND_MADE, RECOMMENDED = "hand-made schedule", "hyperopt.auto"


def references(steps: int) -> dict[str, Any]:
    """The methods outside the grid, which are trained once for each seed."""
    falls = partial(MultiStepLR, milestones=[math.ceil(steps / 2), math.ceil(steps * 3 / 4)], gamma=0.1)
    return {HAND_MADE: partial(training.reference, held(0.1, 0.9), falls), RECOMMENDED: training.auto}


def name(method: str, alpha: float, mu: float) -> str:
    """The key of a cell in the result file, without the seed."""
    return f"{method} | alpha {alpha:g}, mu {mu:g}"


def cells() -> Iterator[tuple[float, float]]:
    """The grid of alpha and mu."""
    yield from ((alpha, mu) for mu in MUS for alpha in ALPHAS)


def plan(workload: Workload, seeds: int, log: Path, **options: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key."""
    grid = {name(m, *cell): method.make(*cell) for m, method in METHODS.items() for cell in cells()}
    replay = {name("defaults", *cell) for cell in cells()}
    return training.tasks(workload, references(workload.steps) | grid, seeds, log, replay, **options)


def table(store: Store) -> str:
    """The results in Markdown: a row for each cell, then the methods outside the grid."""
    protocol = store.result["protocol"]
    head = ["alpha, mu", "paper: held → learned", *(method.label for method in METHODS.values())]
    head += ["our defaults, first seed → replayed", "their lr at the end", "all three at the end"]
    rows = []
    for cell in cells():
        theirs = " → ".join(f"{number:g}" for number in PAPER[cell]) if cell in PAPER else ""
        ours = [tables.mean_sd(errors(store, method, *cell)) for method in METHODS]
        ends = [tables.ends(store.seeds(name(method, *cell))) for method in ("defaults", "all")]
        rows.append(["{:g}, {:g}".format(*cell), theirs, *ours, tables.replay(store.seeds(name("defaults", *cell))), *ends])
    beside = "; ".join(f"{label} {tables.mean_sd(metrics(store.seeds(label)))}" for label in (HAND_MADE, RECOMMENDED))
    measured = {label: [errors(store, m, *cell) for cell in cells()] for m, (label, *_) in METHODS.items()}
    first, second, *ours = measured
    return (
        f"{protocol['title']}; test error in %, mean ± sd of up to {protocol['seeds']} seeds. The paper's numbers are those of ResNet-20 "
        f"after 200 epochs on 50,000 images, read off its figure, ±1.\n\n{tables.markdown(head, rows)}\n"
        f"Beside the grid: {beside}. The paper: hand-made schedule 8.3, learned 8.5, held 13 after 500 epochs.\n\n"
        f"{tables.compare(measured, ours, (first, second))}"
    )


def errors(store: Store, method: str, alpha: float, mu: float) -> list[float]:
    """The error of each seed, infinite if the run diverged."""
    return metrics(store.seeds(name(method, alpha, mu)))


def draw(store: Store, path: Path) -> None:
    """Draw the errors, the learned lr together with the hand-made schedule, and the other learned values."""
    protocol = store.result["protocol"]
    figure = Figure(figsize=(15, 13), layout="constrained")
    panels = figure.subplots(3, 3)
    for column, mu in enumerate(MUS):
        _errors(panels[0, column], store, mu)
        _rates(panels[1, column], store, mu)
    for axes, what in zip(panels[2], ("lr", "momentum", "weight_decay"), strict=True):
        _learned(axes, store, what)
    for row in panels[:2]:
        for axes in row[1:]:
            axes.sharey(row[0])
    figure.suptitle(
        f"SGD held and learned. {protocol['title']}; mean of up to {protocol['seeds']} seeds, bands from the lowest to the highest"
    )
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=64)


def _errors(axes: Axes, store: Store, mu: float) -> None:
    for m, method in METHODS.items():
        plots.against(axes, {alpha: store.seeds(name(m, alpha, mu)) for alpha in ALPHAS}, top=100, **method.line_style)
    for label, style in (HAND_MADE, ":"), (RECOMMENDED, "-."):
        if beside := metrics(store.seeds(label)):
            axes.axhline(min(float(np.mean(beside)), 100), color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="initial alpha (lr)", ylabel="test error, % (100: diverged)", title=f"from mu = {mu:g}")
    plots.decimal_ticks(axes.yaxis)
    plots.finish(axes)


def _rates(axes: Axes, store: Store, mu: float) -> None:
    for color, alpha in enumerate(ALPHAS):
        for m in "paper", "defaults":
            lines = plots.courses(store.seeds(name(m, alpha, mu)), "0.lr")
            label = f"{METHODS[m].label.partition(':')[0]}, from {alpha:g}"
            plots.band(axes, lines, color=f"C{color}", linestyle=METHODS[m].style, linewidth=1.2, label=label)
    plots.band(axes, plots.courses(store.seeds(HAND_MADE), "0.lr")[:1], color="black", linestyle=":", linewidth=1.5, label=HAND_MADE)
    axes.set(yscale="log", xlabel="step", ylabel="lr", title=f"learned lr from mu = {mu:g}")
    plots.finish(axes)


def _learned(axes: Axes, store: Store, what: str) -> None:
    """Plot one of the three values that were learned together, with a color for each alpha and a style for each mu."""
    for color, alpha in enumerate(ALPHAS):
        for style, mu in zip((":", "-", "--"), MUS, strict=True):
            lines = plots.courses(store.seeds(name("all", alpha, mu)), f"0.{what}")
            plots.band(axes, lines, color=f"C{color}", linestyle=style, linewidth=1.2, label=f"from {alpha:g}, {mu:g}")
    axes.set(yscale="logit" if what == "momentum" else "log", xlabel="step", ylabel=what, title=f"{what}, all three learned")
    plots.finish(axes, fontsize=6, title="alpha, mu")


app = cli.cifar_command("cifar", 2, plan, table, draw)

if __name__ == "__main__":
    app()
