"""Towers of height 0 to 3 from initial learning rates of 1e-8 to 1e2: how much each level reduces the sensitivity to lr, and its cost.

    python -m experiments.heights --jobs 2       66 minutes on two cores; resumes if it was stopped
    python -m experiments.heights --figures      the tables and the figure from existing results

Three workloads, each with the optimizer that the paper uses for it at level 0: the paper's MLP on MNIST (SGD, 30 epochs as in the paper,
two seeds), ResNet-20 on 20,000 images of CIFAR-10 (SGD, 120 steps with batch 128, one seed), and the char-RNN on War and Peace (Adam, 400
steps, one seed). The paper trains the last two for 200 epochs and 50,000 steps; on a faster machine, --workload and --steps do the same.
Every cell of the grid is run: 11 initial values of lr, 4 heights, and two kinds of towers.

- paper: SGD on every level above, horizon 1, no trust, lr learned as the number itself rather than its logarithm. On the MLP all levels
  have the step size alpha of level 0. On the other workloads the levels above have the step sizes that the paper gives: for alpha ≤ 1e-4
  [alpha·1e2, alpha, alpha·1e-2], for alpha ≥ 1e-3 [alpha·1e-3, alpha·1e-4, 1e-8].
- defaults: Adam on every level above, with defaults.

On the MLP the schedule that the first seed learned is replayed on torch.optim; for the other two workloads, experiments.cifar and
experiments.char_rnn do this. The paper's curves for the MLP were read off its figure; for the other two it has no numbers. Finally the
time of a training step is measured against the height, in a single process.

Writes heights.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import cli, plots, published, tables, training
from experiments.store import Store, metrics
from experiments.training import REPLAYED
from experiments.workloads import WORKLOADS, Workload
from hyperopt import SGD, Adam, Hyper, Real, Rule

STARTS = [10.0**k for k in range(-8, 3)]
HEIGHTS = range(4)
KINDS = {"paper": "the paper's step sizes", "defaults": "our defaults"}
# Error in percent of the MLP for each height and each start, read off the paper's figure to about ±1; None where it shows no point.
PAPER: list[list[float | None]] = [
    [89, 90, 87, 85, 36, 15, 9, None, 2.4, 3.2, None],
    [78, 33, 16, 10.6, 8.3, 6.0, 4.1, None, 4, 6.5, 58],
    [13.5, 10.4, 8.6, 7.4, 5.6, 4.2, 3.9, None, 4, 4, 59],
    [10.2, 8.8, 7.7, 6.5, 5.1, 4.1, 3.9, None, 4, 3.8, 29],
]
# Time that three levels add to the step of level 0, in percent, from the paper's figure.
PAPER_TIME = {"mlp": 3.4, "resnet": 6.2, "rnn": 5.0}


class Problem(NamedTuple):
    """A workload, the rule at level 0, the number of seeds, and the number of steps that are timed."""

    workload: Workload
    rule: type[Rule]
    seeds: int
    timed: int


PROBLEMS = {
    "mlp": Problem(
        replace(
            WORKLOADS["m3"],
            title="MNIST, MLP 784-128-10 with a tanh on the output, batch 256, 30 epochs",
            make=published.mlp_tanh,
            steps=30 * 235,
        ),
        SGD,
        seeds=2,
        timed=300,
    ),
    "resnet": Problem(
        replace(WORKLOADS["c3"], title="CIFAR-10 (20,000 images), ResNet-20, batch 128, 120 steps", steps=120), SGD, seeds=1, timed=8
    ),
    "rnn": Problem(
        replace(WORKLOADS["r12"], title="War and Peace, char-RNN 2×128, batch 32×64, 400 steps", steps=400), Adam, seeds=1, timed=40
    ),
}


def tower(name: str, kind: str, height: int, start: float) -> Hyper:
    """The tower of a cell."""
    rule = PROBLEMS[name].rule
    if kind == "defaults":
        found = Hyper(rule, lr=start)
        for _ in range(height):
            found = found.stack(Adam)
        return found
    settings: dict[str, Any] = {"horizon": 1, "trust": None, "domains": {"lr": Real()}}
    found = Hyper(rule, lr=start, **settings)
    for step in steps_above(name, start)[:height]:
        found = found.stack(SGD, lr=step, **settings)
    return found


def steps_above(name: str, start: float) -> list[float]:
    """The paper's step sizes of levels 1 to 3."""
    if name == "mlp":
        return [start] * 3
    if start < 3e-4:
        return [start * 1e2, start, start * 1e-2]
    return [start * 1e-3, start * 1e-4, 1e-8]


def label(name: str, kind: str, height: int, start: float) -> str:
    """The key of a cell in the result file, without the seed; at height 0 the two kinds are the same."""
    return f"{name} | {kind if height else 'no tower'} | {height} | {start:g}"


def problem(name: str, steps: int | None) -> Workload:
    """The workload, shortened to `steps` if they are given."""
    return PROBLEMS[name].workload.shortened(steps)


def plan(names: list[str], steps: int | None, device: str, log: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every run by its key, one workload after the other."""
    return {
        key: partial(
            training.train,
            problem(name, steps),
            tower(name, kind, height, start),
            seed,
            points=20,
            after=(REPLAYED,) if name == "mlp" and height and seed == 0 else (),
            device=device,
            log=log / training.slug(key),
        )
        for name in names
        for seed in range(PROBLEMS[name].seeds)
        for height in HEIGHTS
        for kind in kinds(height)
        for start in STARTS
        for key in [f"{label(name, kind, height, start)} | {seed}"]
    }


def kinds(height: int) -> list[str]:
    """The kinds of towers that are run at this height; at height 0 only one, as they are the same."""
    return list(KINDS) if height else ["paper"]


def times(name: str, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Median time of a training step in milliseconds over `steps` steps, for torch's optimizer and each kind and height, taking turns."""
    workload = PROBLEMS[name].workload
    towers = {f"{kind} {height}": tower(name, kind, height, 1e-3) for kind in KINDS for height in HEIGHTS}
    runs = {}
    for label, spec in {"torch": towers["paper 0"], **towers}.items():
        model = workload.model(0, device)
        runs[label] = model, training.plain(spec, model.parameters()) if label == "torch" else spec.bind(model.parameters()), []
    batches = workload.batches(0, device)
    for _ in range(steps + 2):
        x, y = next(batches)
        for model, optimizer, seconds in runs.values():
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = workload.loss(model, x, y)
            loss.backward()
            optimizer.step()
            next(model.parameters()).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - begin)
    return {"ms": {label: round(1e3 * statistics.median(seconds[2:]), 4) for label, (_, _, seconds) in runs.items()}}


def errors(store: Store, name: str, kind: str, height: int, start: float, *path: str) -> list[float]:
    """The metric of each seed, infinite if the run diverged; `path` as in `metrics`."""
    return metrics(store.seeds(label(name, kind, height, start)), *path)


def table(store: Store) -> str:
    """The results in Markdown: for each workload a row for each height and kind, then the times."""
    parts = []
    for name, (workload, rule, seeds, _) in PROBLEMS.items():
        rows = []
        for height in HEIGHTS:
            if name == "mlp":
                rows.append([f"height {height}, read off the paper's figure", *("" if e is None else f"{e:g}" for e in PAPER[height])])
            for kind in kinds(height):
                line = f"height {height}, {KINDS[kind]}" if height else "height 0"
                rows.append([line, *(tables.mean_sd(errors(store, name, kind, height, start)) for start in STARTS)])
                if name == "mlp" and height:
                    cells = [tables.mean_sd(errors(store, name, kind, height, start, REPLAYED)) for start in STARTS]
                    rows.append([f"{line}, first seed, schedule replayed", *cells])
        head = [f"test {workload.metric} from lr", *(f"{start:.0e}" for start in STARTS)]
        title = f"{_title(store, name)}, {rule.__name__} at level 0; {f'mean ± sd of {seeds} seeds' if seeds > 1 else 'one seed'}."
        parts += [title, tables.markdown(head, rows), _count(store, name)]
    return "\n\n".join(part.strip() for part in [*parts, _times(store)]) + "\n"


def _title(store: Store, name: str) -> str:
    return problem(name, store.result["protocol"]["steps"]).title


def _count(store: Store, name: str) -> str:
    """In how many cells the defaults are better, and in which they are not."""
    pairs = [(h, s, *(errors(store, name, kind, h, s) for kind in ("defaults", "paper"))) for h in HEIGHTS[1:] for s in STARTS]
    done = [(h, s, float(np.mean(ours)), float(np.mean(theirs))) for h, s, ours, theirs in pairs if ours and theirs]
    lost = [f"height {h} from {s:.0e} ({ours:.2f}, {theirs:.2f})" for h, s, ours, theirs in done if not ours < theirs]
    return f"Our defaults are better in {len(done) - len(lost)} of {len(done)} cells" + (f"; not in: {', '.join(lost)}." if lost else ".")


def _times(store: Store) -> str:
    rows = []
    for name in PROBLEMS:
        if run := store.runs.get(f"{name} | time"):
            ms = run["ms"]
            for kind in KINDS:
                base = ms[f"{kind} 0"]
                levels = [f"{ms[f'{kind} {h}']:.2f} ({100 * (ms[f'{kind} {h}'] / base - 1):+.1f} %)" for h in HEIGHTS[1:]]
                rows.append([f"{name}, {KINDS[kind]}", f"{ms['torch']:.2f}", f"{base:.2f}", *levels, f"+{PAPER_TIME[name]:g} %"])
    head = ["ms for a training step", "torch.optim", "height 0", *(f"height {h}" for h in HEIGHTS[1:]), "paper, height 3"]
    title = "Time, median; in parentheses what is added to height 0 of the same library, as the paper counts."
    return f"{title}\n\n{tables.markdown(head, rows)}"


def draw(store: Store, path: Path) -> None:
    """Draw a column for each workload: the paper's step sizes, our defaults, and the time of a step."""
    figure = Figure(figsize=(15, 12), layout="constrained")
    panels = figure.subplots(3, len(PROBLEMS), height_ratios=[3, 3, 2])
    for column, (name, (workload, rule, *_)) in enumerate(PROBLEMS.items()):
        for axes, kind in zip(panels[:2, column], KINDS, strict=True):
            _sensitivity(axes, store, name, kind)
            axes.set_title(f"{rule.__name__}, {KINDS[kind]}\n{textwrap.fill(_title(store, name), 60)}", fontsize=9)
        panels[1, column].sharey(panels[0, column])
        _time(panels[2, column], store, name)
        panels[0, column].set_ylim(bottom=_bottom(store, name), top=1.2 * workload.guess)
    figure.suptitle(
        "Error against the initial learning rate, by the height of the tower; bands: from the best to the worst seed; "
        "grey dotted: blind guessing; at the top: as bad, or diverged"
    )
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=72)


def _bottom(store: Store, name: str) -> float:
    measured = [run["metric"] for key, run in store.runs.items() if key.startswith(f"{name} |") and run.get("metric")]
    return 0.85 * min(measured, default=1.0)


def _sensitivity(axes: Axes, store: Store, name: str, kind: str) -> None:
    workload = PROBLEMS[name].workload
    for height in HEIGHTS:
        style = {"color": f"C{height}", "markersize": 4}
        runs = {start: store.seeds(label(name, kind, height, start)) for start in STARTS}
        plots.against(axes, runs, top=1.1 * workload.guess, label=f"height {height}", **style)
        if name == "mlp" and kind == "paper":
            read = [(start, error) for start, error in zip(STARTS, PAPER[height], strict=True) if error is not None]
            shown = "read off the paper's figure" if height == 0 else None
            axes.plot([s for s, _ in read], [e for _, e in read], "x:", linewidth=1, label=shown, **style)
    axes.axhline(workload.guess, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(5e-9, 2e2), xlabel="initial lr", ylabel=f"test {workload.metric}")
    plots.decimal_ticks(axes.yaxis)
    plots.finish(axes)


def _time(axes: Axes, store: Store, name: str) -> None:
    if run := store.runs.get(f"{name} | time"):
        for kind in KINDS:
            axes.plot(list(HEIGHTS), [run["ms"][f"{kind} {height}"] for height in HEIGHTS], "o-", label=KINDS[kind])
        axes.axhline(run["ms"]["torch"], color="black", linestyle=":", label=f"torch.optim.{PROBLEMS[name].rule.__name__}")
        axes.set_ylim(bottom=0)
    axes.set(xlabel="height of the tower", ylabel="ms for a training step", xticks=list(HEIGHTS))
    plots.finish(axes)


def timings(names: list[str], steps: int | None, device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """The measurements of time by their key."""
    return {f"{name} | time": partial(times, name, min(PROBLEMS[name].timed, steps or PROBLEMS[name].timed), device) for name in names}


app = cli.problems_command("heights", {name: each.seeds for name, each in PROBLEMS.items()}, plan, table, draw, alone=timings)

if __name__ == "__main__":
    app()
