"""Every row of Table 1 of Gradient Descent: The Ultimate Optimizer, on MNIST: the paper's numbers beside ours.

    python -m experiments.mnist_table --jobs 2       70 minutes on two cores, beside other work; resumes if it was stopped
    python -m experiments.mnist_table --figures      the table and the figure from existing results

Protocol: MLP 784-128-10, tanh, batch 256, inputs in [0, 1], cross entropy, 3 seeds; 30 epochs in rows of SGD and 5 in the others, as in
the paper. All runs of a seed have the same initial weights and the same batches. Each row of the paper is run in several ways ("readings"),
one in each column:

- authors: the authors' published code, on the model of its example, which has a tanh on the output too.
- paper: their settings in this library, on the same model: horizon 1, no trust, alpha (lr) learned as the number itself (RMSProp: through
  its square root), decays through (tanh + 1) / 2, and the step sizes of the table or, if it gives none, of the published code.
- defaults: the same rules from the same values, otherwise with the defaults of this library, on the same model.
- paper, linear and defaults, linear: the same without the tanh on the output.

For Adam the caption of the table says beta2 = .99 and the published code has .999: authors and paper are run with both. After each tower,
torch.optim is run with the learned values held, as in the paper, and on the linear model also with the whole learned schedule.

Writes mnist_table.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from experiments import cli, models, plots, tables, training
from experiments.published import DOMAINS, Authors, mlp_tanh
from experiments.store import Store, metrics
from experiments.training import HELD, REPLAYED
from experiments.workloads import WORKLOADS, Workload
from hyperopt import SGD, Adagrad, Adam, Hyper, RMSprop, Rule

EPOCH = 235  # steps
ALPHA = ("lr",)


class Paper(NamedTuple):
    """A number of the paper: test error in percent, mean and standard deviation of 3 runs."""

    mean: float
    sd: float


class Row(NamedTuple):
    """A row of the paper's table: a tower, or a plain optimizer if there is no `above`."""

    rule: type[Rule]
    tower: Paper
    learn: tuple[str, ...] = ALPHA
    above: type[Rule] | None = None
    step: float = 0.0  # step size of the optimizer above
    held: Paper | None = None
    beta2: float = 0.999

    @property
    def name(self) -> str:
        """The name of the row, unique in the table."""
        beta2 = f", beta2={self.beta2:g}" if self.beta2 != 0.999 else ""
        base = f"{self.rule.__name__}({START[self.rule]:g}{beta2})"
        return f"{base}, {' '.join(self.learn)} / {self.above.__name__}({self.step:g})" if self.above else base

    @property
    def epochs(self) -> int:
        """Number of epochs, as in the paper."""
        return 30 if self.rule is SGD else 5


START: dict[type[Rule], float] = {SGD: 0.01, Adam: 0.001, Adagrad: 0.01, RMSprop: 0.01}
BETAS, GAMMA = ("lr", "beta1", "beta2"), ("lr", "alpha")
ADAM = (
    Row(Adam, Paper(4.67, 0.06)),
    Row(Adam, Paper(3.03, 0.02), BETAS, SGD, 1e-5, Paper(3.11, 0.06)),
    Row(Adam, Paper(3.12, 0.04), ALPHA, SGD, 1e-5, Paper(3.47, 0.02)),
    Row(Adam, Paper(3.05, 0.09), BETAS, Adam, 1e-3, Paper(3.24, 0.13)),
    Row(Adam, Paper(3.04, 0.08), ALPHA, Adam, 1e-3, Paper(3.08, 0.12)),
)
ROWS = [
    Row(SGD, Paper(8.99, 0.05)),
    Row(SGD, Paper(4.81, 0.10), ALPHA, SGD, 0.01, Paper(5.44, 0.10)),
    Row(SGD, Paper(4.86, 0.06), ALPHA, Adam, 0.1, Paper(2.80, 0.09)),
    Row(SGD, Paper(4.85, 0.21), ALPHA, Adagrad, 0.01, Paper(5.17, 0.03)),
    Row(SGD, Paper(4.52, 0.02), ALPHA, RMSprop, 0.1, Paper(2.52, 0.07)),
    *ADAM,
    *(row._replace(beta2=0.99) for row in ADAM),
    Row(Adagrad, Paper(7.40, 0.08)),
    Row(Adagrad, Paper(6.90, 0.16), ALPHA, SGD, 0.01, Paper(7.75, 0.06)),
    Row(Adagrad, Paper(5.03, 0.23), ALPHA, Adagrad, 0.01, Paper(6.67, 0.08)),
    Row(RMSprop, Paper(4.19, 0.47)),
    Row(RMSprop, Paper(3.55, 0.23), ALPHA, SGD, 1e-4, Paper(3.93, 0.70)),
    Row(RMSprop, Paper(3.33, 0.07), GAMMA, SGD, 1e-4, Paper(3.25, 0.09)),
    Row(RMSprop, Paper(3.42, 0.45), ALPHA, RMSprop, 1e-4, Paper(3.60, 0.04)),
    Row(RMSprop, Paper(2.96, 0.11), GAMMA, RMSprop, 1e-4, Paper(3.65, 0.36)),
]
# In the published code AdaGrad's sum starts at .1, and RMSProp divides by √(v + 1e-8); √v + 1e-4 equals that at v = 0.
EXTRA: dict[type[Rule], dict[str, float]] = {Adagrad: {"initial_accumulator_value": 0.1}, RMSprop: {"eps": 1e-4}}
DIFFERENCES = (
    "What is left between the paper's settings here and the authors' code: their Adam starts v at 1e-8 and not at 0, which makes its first "
    "few hundred steps smaller where gradients are small, and above level 0 it counts one step more, the first, for which there is no "
    "hypergradient; their RMSProp has its eps under the root. But for these, every row is equal to theirs over 30 steps "
    "(tests/test_study.py). What the tanh on the output makes of a row is what the columns without it (linear) show."
)


def authors(row: Row, model: nn.Module) -> list[Any]:
    """The authors' code, as a `make` of `training.train`."""
    return [Authors(model, row.rule, START[row.rule], row.learn, row.above, row.step, row.beta2)]


def paper(row: Row) -> Hyper:
    """The paper's settings in this library."""
    tower = Hyper(
        row.rule, lr=START[row.rule], learn=row.learn, horizon=1, trust=None, domains=DOMAINS[row.rule], **_published(row.rule, row)
    )
    return tower.stack(row.above, lr=row.step, trust=None, **_published(row.above, row)) if row.above else tower


def _published(rule: type[Rule], row: Row) -> dict[str, Any]:
    """The values in which the published code differs from our defaults."""
    return EXTRA.get(rule, {}) | ({"beta2": row.beta2} if rule is Adam else {})


def defaults(row: Row) -> Hyper:
    """The same rules from the same start, with our defaults."""
    tower = Hyper(row.rule, lr=START[row.rule], learn=row.learn)
    return tower.stack(row.above) if row.above else tower


class Reading(NamedTuple):
    """A way to run a row, shown in a column of the table."""

    make: Callable[[Row], Any]
    model: Callable[[], nn.Sequential]
    after: tuple[str, ...]
    color: str
    marker: str


READINGS = {
    "authors": Reading(lambda row: partial(authors, row), mlp_tanh, (), "C7", "x"),
    "paper": Reading(paper, mlp_tanh, (HELD,), "C0", "o"),
    "defaults": Reading(defaults, mlp_tanh, (HELD,), "C1", "o"),
    "paper, linear": Reading(paper, models.mlp, (HELD, REPLAYED), "C0", "^"),
    "defaults, linear": Reading(defaults, models.mlp, (HELD, REPLAYED), "C1", "^"),
}


def readings(row: Row) -> list[str]:
    """The readings that are run for a row. beta2 = .99 has no run of our defaults: it is there to find out what the paper used."""
    return [name for name in READINGS if row.beta2 == 0.999 or name in ("authors", "paper")]


def label(row: Row, reading: str) -> str:
    """The key in the result file, without the seed."""
    return f"{row.name} | {reading}"


def workload(row: Row, reading: str, steps: int | None) -> Workload:
    """MNIST for as many epochs as in the paper, but no more than `steps` steps."""
    count = min(row.epochs * EPOCH, steps or row.epochs * EPOCH)
    title = f"MNIST, MLP 784-128-10, batch 256, {row.epochs} epochs"
    return replace(WORKLOADS["m3"], title=title, steps=count, make=READINGS[reading].model)


def plan(seeds: int, steps: int | None, log: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key."""
    return {
        key: partial(
            training.train,
            workload(row, reading, steps),
            READINGS[reading].make(row),
            seed,
            after=READINGS[reading].after if row.above else (),
            log=log / training.slug(key),
        )
        for seed in range(seeds)
        for row in ROWS
        for reading in readings(row)
        for key in [f"{label(row, reading)} | {seed}"]
    }


def errors(store: Store, row: Row, reading: str, *path: str) -> list[float]:
    """The error of each seed, infinite if the run diverged; `path` as in `metrics`."""
    return metrics(store.seeds(label(row, reading)), *path)


def lands(ours: list[float], theirs: Paper) -> bool:
    """Whether our mean is within two standard deviations of theirs (the larger of ours and theirs), or within half a point."""
    sd = max(theirs.sd, float(np.std(ours, ddof=1)) if len(ours) > 1 else 0.0)
    return abs(float(np.mean(ours)) - theirs.mean) <= max(2 * sd, 0.5)


def beats(ours: list[float], theirs: list[float]) -> str:
    """Whether the mean error of our defaults is below that of the paper's tower."""
    if not ours or not theirs:
        return "–"
    return "yes" if np.mean(ours) < np.mean(theirs) else "no"


def verdict(ours: list[float], theirs: list[float], number: Paper | None) -> str:
    """Whether the paper's settings reproduce the paper's number and, if not, whether the authors' own code does."""
    if not ours or not number:
        return "–"
    if lands(ours, number):
        return "yes"
    if not theirs or lands(theirs, number):
        return "no"
    return "no, nor does the authors' code" + (", which agrees" if lands(ours, Paper(float(np.mean(theirs)), 0.0)) else "")


def table(store: Store) -> str:
    """The results in Markdown: each row of the paper, followed by torch.optim with the learned values and with the schedule."""
    head = ["test error, %", "paper", *READINGS, "paper's number reached", "defaults better", "linear too"]
    lines = []
    for row in ROWS:
        better = [beats(errors(store, row, f"defaults{end}"), errors(store, row, f"paper{end}")) for end in ("", ", linear")]
        cells = [tables.mean_sd(errors(store, row, reading)) for reading in READINGS]
        reached = verdict(errors(store, row, "paper"), errors(store, row, "authors"), row.tower)
        lines.append([row.name, _written(row.tower), *cells, reached, *(better if row.above else ["", ""])])
        if row.above:
            held = [tables.mean_sd(errors(store, row, reading, HELD)) + _ends(store, row, reading) for reading in READINGS]
            reached = verdict(errors(store, row, "paper", HELD), [], row.held)
            lines.append(["→ learned values held", _written(row.held), *held, reached, "", ""])
            if row.beta2 == 0.999:
                cells = [tables.mean_sd(errors(store, row, reading, REPLAYED)) for reading in READINGS]
                lines.append(["→ learned schedule replayed", "", *cells, "", "", ""])
    protocol = store.result["protocol"]
    shortened = f", at most {protocol['steps']} steps" if protocol["steps"] else ""
    title = (
        f"MNIST, MLP 784-128-10, batch 256, rows of SGD 30 epochs, the others 5{shortened}; test error in %, mean ± sd of "
        f"{protocol['seeds']} seeds. In parentheses the learned values at the end. Reached: within 2 sd, or 0.5 points."
    )
    towers = [row for row in ROWS if row.above and row.beta2 == 0.999]
    compared = [
        (row, end, beats(errors(store, row, f"defaults{end}"), errors(store, row, f"paper{end}")))
        for row in towers
        for end in ("", ", linear")
    ]
    wins = sum(better == "yes" for _, _, better in compared)
    count = f"Our defaults are better than the paper's settings in {wins} of {len(compared)} towers and models."
    return f"{title}\n\n{tables.markdown(head, lines)}\n{count} {DIFFERENCES}\n"


def _written(number: Paper | None) -> str:
    return f"{number.mean:.2f} ± {number.sd:.2f}" if number else ""


def _ends(store: Store, row: Row, reading: str) -> str:
    shown = tables.ends(store.seeds(label(row, reading)))
    return f" ({shown})" if shown else ""


def draw(store: Store, path: Path) -> None:
    """Draw the table as points on the left, and the learned learning rates on the right."""
    seeds = store.result["protocol"]["seeds"]
    figure = Figure(figsize=(15, 11), layout="constrained")
    left, *panels = figure.subplot_mosaic([["t", "a", "b"], ["t", "c", "d"]], width_ratios=[1.5, 1, 1]).values()
    for offset, (reading, style) in zip(np.linspace(-0.3, 0.3, len(READINGS)), READINGS.items(), strict=True):
        points = [(i, measured) for i, row in enumerate(ROWS) if (measured := errors(store, row, reading)) and np.isfinite(measured).all()]
        ys, means, sds = ([i + offset for i, _ in points], [np.mean(e) for _, e in points], [_sd(e) for _, e in points])
        left.errorbar(means, ys, xerr=sds, fmt=style.marker, color=style.color, markersize=5, capsize=2, linewidth=1, label=reading)
    left.errorbar(
        [row.tower.mean for row in ROWS],
        range(len(ROWS)),
        xerr=[row.tower.sd for row in ROWS],
        fmt="D",
        color="black",
        markersize=5,
        capsize=2,
        label="the paper's number",
    )
    left.set_yticks(range(len(ROWS)), [row.name for row in ROWS], fontsize=8)
    left.invert_yaxis()
    left.set(xscale="log", xlabel=f"test error, % (mean ± sd of {seeds} seeds)")
    plots.decimal_ticks(left.xaxis)
    left.grid(alpha=0.3)
    left.legend(
        fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.05), title="linear: no tanh on the output", title_fontsize=8
    )
    for axes, rule in zip(panels, START, strict=True):
        _courses(axes, store, [row for row in ROWS if row.rule is rule and row.above and row.beta2 == 0.999])
    figure.suptitle("Table 1 of Gradient Descent: The Ultimate Optimizer on MNIST, and what each tower learned")
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=72)


def _courses(axes: Axes, store: Store, rows: Iterable[Row]) -> None:
    """Plot the learned lr of these towers."""
    for color, row in enumerate(rows):
        for reading, style in ("paper, linear", "--"), ("defaults, linear", "-"):
            shown = f"{row.name.partition(', ')[2]}, {reading.partition(',')[0]}"
            lines = plots.courses(store.seeds(label(row, reading)), "0.lr")
            plots.band(axes, lines, color=f"C{color}", linestyle=style, linewidth=1.2, label=shown)
        axes.set_title(f"{row.rule.__name__} from lr {START[row.rule]:g}, no tanh on the output", fontsize=9)
    axes.set(yscale="log", xlabel="step", ylabel="learned lr (band: seeds)")
    plots.finish(axes, fontsize=6)


def _sd(errors: list[float]) -> float:
    return float(np.std(errors, ddof=1)) if len(errors) > 1 else 0.0


def main(
    seeds: cli.Seeds = 3,
    steps: cli.Steps = None,
    jobs: cli.Jobs = 1,
    again: cli.Again = None,
    out: cli.Out = cli.RESULTS,
    log: cli.Log = Path("runs/mnist_table"),
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the table and draw the figure."""
    torch.set_num_threads(1)
    store = Store(out / "mnist_table.json", seeds=seeds, steps=steps)
    store.forget(again or ())
    if not figures:
        store.complete(plan(seeds, steps, log), jobs)
    cli.publish(store, table(store), draw)


app = cli.command(main)

if __name__ == "__main__":
    app()
