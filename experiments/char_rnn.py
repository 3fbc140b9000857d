"""Adam on the char-RNN of Gradient Descent: The Ultimate Optimizer, held and learned, from the paper's three initial learning rates.

    python -m experiments.char_rnn --jobs 2                                47 minutes on two cores; resumes if it was stopped
    python -m experiments.char_rnn --steps 50000 --seeds 3 --device cuda   the paper's 50,000 steps
    python -m experiments.char_rnn --figures                               the tables and the figure from existing results

Protocol: War and Peace and tinyshakespeare, embedding 128, LSTM 2×128, batches of 32 sequences of 64 characters from random positions in
the first nine tenths of the text, 4,000 steps, 2 seeds. The metric is the perplexity on the first 64,000 characters of the last tenth,
read as 64 streams that each begin with a zero state. All runs of a seed have the same initial weights and the same batches. The methods,
each from alpha (lr) = 1e-4, 2e-3 and 1e-2:

- held: torch.optim.Adam.
- paper: lr and both betas learned by SGD with horizon 1 and no trust; lr is learned as the number itself rather than its logarithm. The
  step sizes are alpha·1e-2, 1e-4 and 2e-4. The paper learns a beta through (tanh(r) + 1) / 2, which is the sigmoid of 2r, and this
  library through the sigmoid, so that the same change of the beta takes four times the step size here.
- defaults: only lr learned, by Adam, with the defaults of this library. On War and Peace the schedule of the first seed is replayed on
  torch.optim.
- auto: the recommended tower, hyperopt.auto. To save time only the first seed is run, but all seeds with --steps above 4,000.

TensorBoard has a text sampled from the model after each quarter of the steps.

Writes char_rnn.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from experiments import cli, data, models, plots, tables, training
from experiments.store import Store, metrics
from experiments.workloads import WORKLOADS, Workload
from hyperopt import SGD, Adam, Hyper, Real

STEPS = 4000
SAMPLE = 200  # characters
ALPHAS = (1e-4, 2e-3, 1e-2)
# The paper's perplexity on War and Peace after 50,000 steps, held and learned: mean and standard deviation.
PAPER = {1e-4: ((8.71, 0.91), (6.51, 0.88)), 2e-3: ((5.27, 0.31), (5.41, 0.26)), 1e-2: ((5.77, 0.34), (5.45, 0.76))}
# Text: title, characters of its alphabet.
TEXTS = {"war_and_peace": ("War and Peace", 82), "tinyshakespeare": ("tinyshakespeare", 65)}


def paper(rule: Any, alpha: float) -> Hyper:
    """The paper's settings for Adam or a variant of it."""
    # strategy="graph" equals tangents up to rounding, and is cheaper for three hyperparameters at horizon 1.
    options: dict[str, Any] = {"horizon": 1, "trust": None, "domains": {"lr": Real()}, "strategy": "graph"}
    tower = Hyper(rule, lr=alpha, learn=("lr", "beta1", "beta2"), **options)
    return tower.stack(SGD, lr={"lr": alpha * 1e-2, "beta1": 4 * 1e-4, "beta2": 4 * 2e-4}, trust=None)


METHODS = {
    "held": training.Method("torch.optim.Adam, held", lambda alpha: partial(training.reference, Hyper(Adam, lr=alpha), None), "C7"),
    "paper": training.Method("the paper's settings", partial(paper, Adam), "C0", "--"),
    "defaults": training.Method("our defaults: Adam / Adam", lambda alpha: Hyper(Adam, lr=alpha).stack(Adam), "C1"),
    "auto": training.Method("hyperopt.auto", lambda alpha: partial(training.auto, lr=alpha), "C2", "-."),
}


def name(text: str, method: str, alpha: float) -> str:
    """The key of the runs in the result file, without the seed."""
    return f"{text} | {method} | {alpha:g}"


def workload(text: str, steps: int) -> Workload:
    """The char-RNN on a text."""
    title, alphabet = TEXTS[text]
    return replace(
        WORKLOADS["r12"],
        title=f"{title}, char-RNN 2×128, batch 32×64, {steps:,} steps",
        steps=steps,
        make=partial(models.CharRNN, alphabet),
        read=partial(data.text, text),
    )


def write_sample(workload: Workload, model: nn.Module, writer: SummaryWriter, step: int) -> None:
    """Write a text sampled from the model to TensorBoard; the indent makes Markdown keep its line breaks."""
    writer.add_text("sample", "    " + workload.sample(model, SAMPLE).replace("\n", "\n    "), step)


def plan(steps: int, seeds: int, log: Path, **options: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key, those on the paper's text first."""
    found = {}
    for text in TEXTS:
        chosen = workload(text, steps)
        replay = [name(text, "defaults", alpha) for alpha in ALPHAS if text == "war_and_peace"]
        for m, method in METHODS.items():
            makes = {name(text, m, alpha): method.make(alpha) for alpha in ALPHAS}
            count = 1 if m == "auto" and steps <= STEPS else seeds
            found |= training.tasks(chosen, makes, count, log, replay, observe=partial(write_sample, chosen), **options)
    return found


def table(store: Store) -> str:
    """The results in Markdown: for each text a row for each initial learning rate."""
    protocol = store.result["protocol"]
    head = ["test perplexity from alpha", "paper: held", "paper: learned", *(m.label for m in METHODS.values())]
    parts = []
    for text in TEXTS:
        rows = []
        for alpha in ALPHAS:
            theirs = ["{:.2f} ± {:.2f}".format(*number) for number in PAPER[alpha]] if text == "war_and_peace" else ["", ""]
            runs = {m: store.seeds(name(text, m, alpha)) for m in METHODS}
            cells = [tables.mean_sd(metrics(found)) for found in runs.values()]
            values = [tables.ends(runs[m]) for m in ("paper", "defaults", "auto")]
            rows.append([f"{alpha:g}", *theirs, *cells, tables.replay(runs["defaults"]), *values])
        columns = [
            *head,
            "Adam / Adam, first seed → replayed",
            "paper's settings: lr, betas at the end",
            "Adam / Adam: lr",
            "hyperopt.auto: lr",
        ]
        title = f"{workload(text, protocol['steps']).title}; mean ± sd of {protocol['seeds']} seeds, where they were run."
        parts.append(f"{title}\n\n{tables.markdown(columns, rows)}")
    measured = {
        method.label: [metrics(store.seeds(name(text, m, alpha))) for text in TEXTS for alpha in ALPHAS] for m, method in METHODS.items()
    }
    first, second, *ours = measured
    return "\n".join([*parts, "The paper's numbers are those after 50,000 steps.\n", tables.compare(measured, ours, (first, second))])


def draw(store: Store, path: Path) -> None:
    """Draw a row for each text: perplexity against the initial lr and against the step, and the learned lr."""
    protocol = store.result["protocol"]
    figure = Figure(figsize=(16, 9), layout="constrained")
    for row, text in zip(figure.subplots(len(TEXTS), 3), TEXTS, strict=True):
        _sensitivity(row[0], store, text)
        _curves(row[1], store, text, 2e-3)
        _rates(row[2], store, text)
    figure.suptitle(f"char-RNN, {protocol['steps']:,} steps; mean of up to {protocol['seeds']} seeds, bands from the lowest to the highest")
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=72)


def _sensitivity(axes: Axes, store: Store, text: str) -> None:
    top = workload(text, 1).guess
    for m, method in METHODS.items():
        plots.against(axes, {alpha: store.seeds(name(text, m, alpha)) for alpha in ALPHAS}, top=top, **method.line_style)
    if text == "war_and_peace":
        for i, (what, color) in enumerate((("held", "C7"), ("learned", "C0"))):
            means, sds = zip(*(PAPER[alpha][i] for alpha in ALPHAS), strict=True)
            label = f"paper, {what}, 50,000 steps"
            axes.errorbar(ALPHAS, means, yerr=sds, fmt="D", color=color, capsize=3, markersize=5, markerfacecolor="white", label=label)
    axes.set(xscale="log", yscale="log", xlabel="initial alpha (lr)", ylabel="test perplexity", title=TEXTS[text][0])
    plots.decimal_ticks(axes.yaxis)
    plots.finish(axes)


def _curves(axes: Axes, store: Store, text: str, alpha: float) -> None:
    for m, method in METHODS.items():
        lines = [(run["curve"]["step"], run["curve"]["metric"]) for run in store.seeds(name(text, m, alpha))]
        plots.band(axes, lines, marker=".", **method.line_style)
    axes.set(yscale="log", xlabel="step", ylabel="test perplexity", title=f"{TEXTS[text][0]}, from {alpha:g}")
    plots.decimal_ticks(axes.yaxis)
    plots.finish(axes)


def _rates(axes: Axes, store: Store, text: str) -> None:
    for color, alpha in enumerate(ALPHAS):
        for m in ("paper", "defaults", "auto"):
            lines = plots.courses(store.seeds(name(text, m, alpha)), "0.lr")
            plots.band(axes, lines, color=f"C{color}", linestyle=METHODS[m].style, linewidth=1.2, label=f"{m}, from {alpha:g}")
    axes.set(yscale="log", xlabel="step", ylabel="lr", title=f"{TEXTS[text][0]}, learned lr")
    plots.finish(axes)


def main(
    steps: Annotated[int, typer.Option(min=1, help="steps of each run; the paper has 50,000")] = STEPS,
    seeds: cli.Seeds = 2,
    jobs: cli.Jobs = 1,
    device: cli.Device = "cpu",
    again: cli.Again = None,
    out: cli.Out = cli.RESULTS,
    log: cli.Log = Path("runs/char_rnn"),
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the tables and draw the figure."""
    torch.set_num_threads(1)
    store = Store(out / "char_rnn.json", steps=steps, seeds=seeds, device=device)
    store.forget(again or ())
    if not figures:
        store.complete(plan(steps, seeds, log, evaluations=4, device=device), jobs)
    cli.publish(store, table(store), draw)


app = cli.command(main)

if __name__ == "__main__":
    app()
