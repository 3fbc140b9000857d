"""AdamW on a small GPT with its hyperparameters held or learned, compared with AdamW with warm-up and cosine at its best learning rate.

    python -m experiments.gpt --jobs 2                                44 minutes on two cores beside other work; resumes
    python -m experiments.gpt --steps 5000 --batch 64 --device cuda   longer, on a GPU
    python -m experiments.gpt --figures                               the table and the figure from existing results

Protocol: tinyshakespeare, 4 layers of width 128 with 4 heads, batches of 16 sequences of 128 characters from random positions in the first
nine tenths of the text, 500 steps, 2 seeds. The metric is the validation loss in nats per character, over 256 blocks of 128 characters
of the last tenth. All runs of a seed have the same initial weights and the same batches. Hyperparameters that are not mentioned have
AdamW's defaults: betas .9 and .999, eps 1e-8, weight decay .01.

- cosine: torch.optim.AdamW with a warm-up over the first tenth of the steps and a cosine down to 0 (OneCycleLR), for five peaks of lr
  from 3e-4 to 3e-2. The best peak is chosen on the data on which it is measured, which favours this method.

The other methods, each from lr = 1e-5, 1e-3 and 1e-1:

- held: torch.optim.AdamW.
- paper: lr, as the number itself, and both betas learned by SGD with horizon 1, no trust and the step sizes of the paper's char-RNN.
- defaults: only lr learned, by Adam, with the defaults of this library.
- all: lr, both betas, eps and weight decay learned by Adam, otherwise with defaults.
- auto: the recommended tower, hyperopt.auto.

The schedules learned by the first seed of defaults and of all are replayed on torch.optim.

Writes gpt.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import OneCycleLR

from experiments import cli, plots, tables, training
from experiments.char_rnn import paper
from experiments.store import Store, metrics
from experiments.workloads import WORKLOADS, Workload
from hyperopt import Adam, AdamW, Hyper

STARTS, PEAKS = (1e-5, 1e-3, 1e-1), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LEARNED = ("lr", "beta1", "beta2", "eps", "weight_decay")


def cosine(peak: float, steps: int) -> Any:
    """AdamW with warm-up and cosine, as a `make` of `training.train`."""
    schedule = partial(OneCycleLR, max_lr=peak, total_steps=max(2, steps), pct_start=0.1, cycle_momentum=False)
    return partial(training.reference, Hyper(AdamW, lr=peak), schedule)


METHODS = {
    "cosine": training.Method("torch.optim.AdamW, warm-up and cosine", cosine, "black", ":"),
    "held": training.Method("torch.optim.AdamW, held", lambda lr, _: partial(training.reference, Hyper(AdamW, lr=lr), None), "C7"),
    "paper": training.Method("the paper's settings", lambda lr, _: paper(AdamW, lr), "C0", "--"),
    "defaults": training.Method("our defaults: AdamW / Adam", lambda lr, _: Hyper(AdamW, lr=lr).stack(Adam), "C1"),
    "all": training.Method("lr, betas, eps, weight decay", lambda lr, _: Hyper(AdamW, lr=lr, learn=LEARNED).stack(Adam), "C3", "-."),
    "auto": training.Method("hyperopt.auto", lambda lr, _: partial(training.auto, lr=lr), "C2", "-."),
}


def starts(method: str) -> tuple[float, ...]:
    """The initial learning rates of a method; for cosine, the peaks."""
    return PEAKS if method == "cosine" else STARTS


def name(method: str, lr: float) -> str:
    """The key of a cell in the result file, without the seed."""
    return f"{method} | {lr:g}"


def cells() -> Iterator[tuple[str, float]]:
    """Every method from each of its starts."""
    yield from ((method, lr) for method in METHODS for lr in starts(method))


def workload(steps: int, batch: int) -> Workload:
    """The GPT on tinyshakespeare."""
    title = f"tinyshakespeare, GPT 4×128, batch {batch}×128, {steps:,} steps"
    return replace(WORKLOADS["gpt"], title=title, steps=steps, batch=batch, blocks=(256, 128))


def plan(workload: Workload, seeds: int, log: Path, **options: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key."""
    grid = {name(m, lr): METHODS[m].make(lr, workload.steps) for m, lr in cells()}
    return training.tasks(workload, grid, seeds, log, {name(m, lr) for m, lr in cells() if m in ("defaults", "all")}, **options)


def best(store: Store) -> float:
    """The best peak of AdamW with warm-up and cosine."""
    found = {lr: metrics(store.seeds(name("cosine", lr))) for lr in PEAKS}
    return min((lr for lr in PEAKS if found[lr]), key=lambda lr: float(np.mean(found[lr])), default=PEAKS[0])


def table(store: Store) -> str:
    """The results in Markdown: a row for each initial learning rate, then AdamW with warm-up and cosine."""
    protocol = store.result["protocol"]
    (_, (cosine, *_)), *others = METHODS.items()
    head = ["validation loss from lr", *(method.label for _, method in others), "AdamW / Adam, first seed → replayed"]
    head += ["all, first seed → replayed", "AdamW / Adam: lr at the end", f"all: {', '.join(LEARNED)} at the end"]
    rows = []
    for lr in STARTS:
        cells = [tables.mean_sd(metrics(store.seeds(name(m, lr)))) for m, _ in others]
        learned = [store.seeds(name(m, lr)) for m in ("defaults", "all")]
        rows.append([f"{lr:g}", *cells, *map(tables.replay, learned), *map(tables.ends, learned)])
    tuned = [[f"{lr:g}", tables.mean_sd(metrics(store.seeds(name("cosine", lr))))] for lr in PEAKS]
    measured = {method.label: [metrics(store.seeds(name(m, lr))) for lr in STARTS] for m, method in others}
    first, second, *ours = measured
    target = f"{cosine}, at its best lr {best(store):g}"
    measured[target] = [metrics(store.seeds(name("cosine", best(store))))] * len(STARTS)
    return (
        f"{protocol['title']}; nats per character, mean ± sd of {protocol['seeds']} seeds.\n\n{tables.markdown(head, rows)}\n"
        f"{tables.markdown(['from a peak lr of', cosine], tuned)}\n{tables.compare(measured, ours, (first, second, target))}"
    )


def draw(store: Store, path: Path) -> None:
    """Draw the loss against lr and against the step, the learned lr together with the cosine, and the other learned values."""
    protocol = store.result["protocol"]
    figure = Figure(figsize=(15, 10), layout="constrained")
    panels = figure.subplots(2, 2)
    for m, method in METHODS.items():
        plots.against(panels[0, 0], {lr: store.seeds(name(m, lr)) for lr in starts(m)}, top=WORKLOADS["gpt"].guess, **method.line_style)
        at = best(store) if m == "cosine" else 1e-3
        curves = [(run["curve"]["step"], run["curve"]["metric"]) for run in store.seeds(name(m, at))]
        look: dict[str, Any] = {**method.line_style, "label": f"{method.label}, from {at:g}"}
        plots.band(panels[0, 1], curves, marker=".", **look)
    ylabel = "validation loss, nats per character"
    panels[0, 0].set(xscale="log", xlabel="initial lr; of the cosine its peak", ylabel=ylabel, title="after the last step (top: diverged)")
    panels[0, 1].set(xlabel="step", ylabel=ylabel, title="loss against the step")
    _rates(panels[1, 0], store)
    _others(panels[1, 1], store)
    for axes in panels.flat:
        plots.finish(axes, **({"fontsize": 6, "ncols": 3, "loc": "lower left"} if axes is panels[1, 0] else {}))
    figure.suptitle(f"{protocol['title']}; mean of {protocol['seeds']} seeds, bands from the lowest to the highest")
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=72)


def _rates(axes: Axes, store: Store) -> None:
    for color, lr in enumerate(STARTS):
        for m, style in ("paper", "--"), ("defaults", "-"), ("all", ":"), ("auto", "-."):
            lines = plots.courses(store.seeds(name(m, lr)), "0.lr")
            plots.band(axes, lines, color=f"C{color}", linestyle=style, linewidth=1.2, label=f"{m}, from {lr:g}")
    lines = plots.courses(store.seeds(name("cosine", best(store))), "0.lr")[:1]
    plots.band(axes, lines, color="black", linewidth=1.5, label=f"cosine, the best: {best(store):g}")
    axes.set(yscale="log", xlabel="step", ylabel="lr", title="learned lr (where it falls below 0, as the paper's may, there is no line)")


def _others(axes: Axes, store: Store) -> None:
    """Plot how far each value learned beside lr has moved, relative to its start; for a beta, 1 − beta."""
    for color, what in enumerate(LEARNED[1:]):
        for style, lr in zip((":", "-", "--"), STARTS, strict=True):
            beta = what.startswith("beta")
            lines = [
                (steps, [None if value is None else (1 - value) / (1 - column[0]) if beta else value / column[0] for value in column])
                for steps, column in plots.courses(store.seeds(name("all", lr)), f"0.{what}")
                if column[0] is not None
            ]
            label = f"{'1 − ' if beta else ''}{what}, from lr {lr:g}"
            plots.band(axes, lines, color=f"C{color}", linestyle=style, linewidth=1.2, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="value / value of the first step", title="what is learned beside lr")


def main(
    steps: Annotated[int, typer.Option(min=1, help="steps of each run")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="sequences of 128 characters")] = 16,
    seeds: cli.Seeds = 2,
    jobs: cli.Jobs = 1,
    device: cli.Device = "cpu",
    again: cli.Again = None,
    out: cli.Out = cli.RESULTS,
    log: cli.Log = Path("runs/gpt"),
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the table and draw the figure."""
    torch.set_num_threads(1)
    chosen = workload(steps, batch)
    store = Store(out / "gpt.json", title=chosen.title, seeds=seeds, device=device)
    store.forget(again or ())
    if not figures:
        store.complete(plan(chosen, seeds, log, evaluations=5, device=device), jobs)
    cli.publish(store, table(store), draw)


app = cli.command(main)

if __name__ == "__main__":
    app()
