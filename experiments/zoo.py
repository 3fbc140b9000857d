"""Twenty ordinary training problems: how near does hyperopt.auto come to tuned optimizers, if it starts from a bad lr?

    python -m experiments.zoo --jobs 2                              resumes if it was stopped; --figures only draws
    python -m experiments.zoo --tasks drift --tasks "GAN ring"      only these tasks
    python -m experiments.zoo --methods hyperopt.auto               only this method
    python -m experiments.zoo --tower "SGD(lr={lr}) / Adam"         all methods, and this tower

The tasks are those of experiments/zoo_tasks.py. All methods have the same initial weights and the same batches for a seed. On each task,

- the peers are tuned: torch.optim.Adam and, where there are hidden matrices, torch.optim.Muon have the best of four lrs, with lr constant
  or falling to 0 along a cosine. The best lr is chosen by the metric that is reported, which favours the peers. Prodigy and Schedule-Free
  have the defaults of their packages.
- hyperopt.auto, `Adam / Adam` and other towers are not: they run from three starts, and the worst of them counts.

The ratio of a method on a task is its metric, from its worst start, over that of the best peer; lower is better. Some tasks have a floor,
below which differences mean nothing: it is added to both metrics.

Writes zoo.json (after every run), .md (the table) and .png to experiments/results.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim import Optimizer

from experiments import cli, plots, provenance, robustness, store, tables, training
from experiments.store import Store
from experiments.zoo_tasks import TASKS, Problem, Score
from hyperopt import HyperOptimizer, Recorder

STARTS = (1e-6, 1e-3, 1.0)
GRID = (1e-4, 1e-3, 1e-2, 1e-1)
POINTS = 40  # points of each learned schedule
WIDEST = 100.0  # larger ratios are drawn at this one


class Method(NamedTuple):
    """A way of training, with the values of lr from which it is run."""

    how: robustness.Method
    lrs: tuple[float, ...]


def constant(method: robustness.Method) -> robustness.Method:
    """The method without a schedule."""
    return replace(method, cosine=False)


ADAM, MUON = (robustness.PEERS[f"{name}, cosine"] for name in ("Adam", "Muon"))
PEERS = {
    "Adam": Method(constant(ADAM), GRID),
    "Adam, cosine": Method(ADAM, GRID),
    "Prodigy": Method(robustness.PEERS["Prodigy"], (1e-6,)),  # d0, the default of the package
    "Schedule-Free AdamW": Method(robustness.PEERS["Schedule-Free AdamW"], (0.0025,)),  # the default of the package
    "Muon": Method(constant(MUON), GRID),
    "Muon, cosine": Method(MUON, GRID),
}
TOWERS = {name: Method(robustness.TOWERS[name], STARTS) for name in (robustness.RECOMMENDED, "Adam / Adam")}
METHODS = TOWERS | PEERS


def named(texts: Iterable[str]) -> dict[str, Method]:
    """The towers among these names, with {lr} in place of the start."""
    return {name: Method(how, STARTS) for name, how in robustness.named(texts).items()}


def applies(method: str, task: str) -> bool:
    """Whether the method is for the models of the task: Muon is for hidden matrices."""
    return TASKS[task].muon or not method.startswith("Muon")


# ---- one run


class Run(NamedTuple):
    """One run of a method, given by its name, or of a tower, given by its text."""

    task: str
    method: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """Its key in the result file."""
        return f"{self.task} | {self.method} | {self.lr:g} | {self.seed}"


def train(run: Run, steps: int | None = None) -> dict[str, Any]:
    """One run, of all steps of the task or of fewer.

    Returns:
        A dict for JSON: the `metric`, None if it is not finite; `error_rate` of classifiers; `steps`; `seconds`; `courses`, the learned lr
        against the step, if a tower was trained (of a GAN, the lr of the generator); and `error`, if the run raised one.
    """
    task = TASKS[run.task]
    method = (METHODS | named([run.method]))[run.method]
    steps = steps or task.steps
    torch.manual_seed(run.seed)
    problem = task.problem(run.seed)
    stepped = [robustness.stepped(method.how, run.lr, steps, model) for model, _ in problem.parts]
    towers = [each for each in optimizers(stepped) if isinstance(each, HyperOptimizer)]
    recorder = Recorder(towers[-1], every=max(1, steps // POINTS)) if towers else None
    failure, score = {}, Score(math.nan)
    begin = time.perf_counter()
    try:
        fit(problem, stepped, steps)
        score = measure(problem, stepped)
    except Exception as error:  # whatever a diverging run raises: it is counted as failed, and the other runs go on
        failure = {"error": repr(error)[:300]}
    seconds = time.perf_counter() - begin
    rate = {} if score.error_rate is None else {"error_rate": score.error_rate}
    courses = {"courses": training.thin(recorder.steps, {"0.lr": recorder.values["0.lr"]}, POINTS)} if recorder else {}
    metric = score.metric if math.isfinite(score.metric) else None
    return {"metric": metric, **rate, "steps": steps, "seconds": round(seconds, 2), **courses, **failure}


Stepped = list[list[Any]]  # the optimizers and schedulers of each model of a problem


def optimizers(stepped: Stepped) -> list[Optimizer]:
    """The optimizers of all models, without schedulers."""
    return [each for group in stepped for each in group if isinstance(each, Optimizer)]


def fit(problem: Problem, stepped: Stepped, steps: int) -> None:
    """Train the models of a problem."""
    for optimizer in optimizers(stepped):
        training.switch_mode(optimizer, "train")
    for step in range(steps):
        for (model, loss), group in zip(problem.parts, stepped, strict=True):
            model.zero_grad()
            loss(step).backward()
            for each in group:
                each.step()


@torch.no_grad()
def measure(problem: Problem, stepped: Stepped) -> Score:
    """The score, with averaged weights if an optimizer averages them; NaN if weights are not finite."""
    with training.averaged(optimizers(stepped)):
        score = problem.measure()
        # A policy of NaN has a finite cost: argmax returns some action.
        finite = all(p.isfinite().all() for model, _ in problem.parts for p in model.parameters())
    return score if finite else Score(math.nan)


# ---- the runs of a file


def plan(tasks: Iterable[str], methods: Mapping[str, Method], seeds: int) -> list[Run]:
    """All runs of these methods on these tasks: every task with the first seed, then with the next one."""
    return [
        Run(task, name, lr, seed)
        for seed in range(seeds)
        for task in tasks
        for name, method in methods.items()
        if applies(name, task)
        for lr in method.lrs
    ]


Means = dict[float, float]


def means(runs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Means]]:
    """The mean metric over seeds by task, method and lr, infinite if a seed diverged or failed.

    A method whose lrs have not all been run on a task is left out there: its best or worst is not known yet.
    """
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for key, run in runs.items():
        task, method, lr, _ = key.split(" | ")
        found.setdefault((task, method, float(lr)), []).append(run)
    every = METHODS | named(method for _, method, _ in found)
    table = {}
    for task in TASKS:
        for name, method in every.items():
            cells = {lr: store.metrics(found[task, name, lr]) for lr in method.lrs if (task, name, lr) in found}
            if len(cells) == len(method.lrs):
                table.setdefault(task, {})[name] = {lr: statistics.fmean(metrics) for lr, metrics in cells.items()}
    return table


class Row(NamedTuple):
    """A task: the best result of each peer and its lr, and the ratios of each tower from its best and its worst start."""

    peers: dict[str, tuple[float, float]]  # metric, lr
    towers: dict[str, Means]
    ratios: dict[str, tuple[float, float]]

    @property
    def best(self) -> str:
        """The name of the best peer."""
        return min(self.peers, key=lambda name: self.peers[name])


def rows(runs: Mapping[str, dict[str, Any]]) -> dict[str, Row]:
    """The rows of the table by task. Without a peer there are no ratios."""
    table = {}
    for task, methods in means(runs).items():
        peers = {name: min((metric, lr) for lr, metric in found.items()) for name, found in methods.items() if name in PEERS}
        towers = {name: found for name, found in methods.items() if name not in PEERS}
        ratios = {}
        if peers:
            best, floor = min(peers.values())[0], TASKS[task].floor
            ratios = {
                name: (ratio(min(found.values()), best, floor), ratio(max(found.values()), best, floor)) for name, found in towers.items()
            }
        table[task] = Row(peers, towers, ratios)
    return table


def ratio(metric: float, best: float, floor: float) -> float:
    """The metric over that of the best peer, both raised by the floor; NaN if both diverged."""
    return (metric + floor) / (best + floor)


class Counts(NamedTuple):
    """On how many tasks the worst start of a tower is near the best peer, better, or far behind, and the number of tasks."""

    within: int
    better: int
    twice: int
    tasks: int


def counts(table: Mapping[str, Row], tower: str) -> Counts:
    """The summary of a tower."""
    worst = [row.ratios[tower][1] for row in table.values() if tower in row.ratios]
    return Counts(sum(x <= 1.1 for x in worst), sum(x < 1 for x in worst), sum(x >= 2 for x in worst), len(worst))


def compared(table: Mapping[str, Row]) -> list[str]:
    """The towers that were run: those of `TOWERS`, then others."""
    return list(dict.fromkeys([*TOWERS, *(name for row in table.values() for name in row.towers)]))


# ---- table and figure


def number(value: float) -> str:
    """A cell of the table."""
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def text(results: Store) -> str:
    """The table, what it says in numbers, the failed runs, and the tasks, in Markdown."""
    table = rows(results.runs)
    towers = compared(table)
    head = ["task", "best peer", *PEERS, *(cell for tower in towers for cell in (tower, "worst / best peer"))]
    lines = []
    for task, row in table.items():
        line = [task, f"{row.best}: {number(row.peers[row.best][0])}" if row.peers else "–"]
        for name, method in PEERS.items():
            metric, lr = row.peers.get(name, (None, 0.0))
            at = f" ({lr:g})" if len(method.lrs) > 1 else ""
            line.append("–" if metric is None else number(metric) + (at if math.isfinite(metric) else ""))
        for tower in towers:
            found = row.towers.get(tower, {}).values()
            line.append(" to ".join(dict.fromkeys([number(min(found)), number(max(found))])) if found else "–")
            line.append(number(row.ratios[tower][1]) if tower in row.ratios else "–")
        lines.append(line)
    return "\n".join(
        [
            f"{title(results)}. Lower is better. Peers: the best of their lrs, in brackets. Towers: best to worst start.\n",
            tables.markdown(head, lines),
            *(summary(tower, counts(table, tower)) for tower in towers),
            *failures(results.runs),
            "",
            *(f"- **{task}**: {TASKS[task].description} {TASKS[task].steps:,} steps; {TASKS[task].metric}." for task in table),
            "",
        ]
    )


def title(results: Store) -> str:
    """What was run."""
    found = Counter(key.rpartition(" | ")[0] for key in results.runs).values() or [0]
    seeds = " to ".join(map(str, sorted({min(found), max(found)})))
    steps = results.result["protocol"]["steps"]
    return f"The zoo, mean of {seeds} seed{'' if seeds == '1' else 's'}" + (f", only {steps} steps of each task" if steps else "")


def summary(tower: str, found: Counts) -> str:
    """A tower's counts as an entry of a list."""
    return (
        f"- `{tower}`: within 10 % of the best peer from its worst start: {found.within} of {found.tasks}; "
        f"better: {found.better}; twice as bad or worse: {found.twice}."
    )


def failures(runs: Mapping[str, dict[str, Any]]) -> list[str]:
    """The runs that raised an error, as entries of a list."""
    return [f"- Failed: {key}: `{run['error']}`." for key, run in runs.items() if "error" in run]


def draw(results: Store, path: Path) -> None:
    """Draw the ratio to the best peer on each task, from the best to the worst start of each tower."""
    table = rows(results.runs)
    towers = compared(table)
    lowest = min((low for row in table.values() for low, _ in row.ratios.values() if low > 0), default=1.0)
    figure = Figure(figsize=(11, 2 + 0.42 * len(table)), layout="constrained")
    axes = figure.subplots()
    for i, tower in enumerate(towers):
        color = "black" if tower == robustness.RECOMMENDED else f"C{i}"
        draw_tower(axes, tower, table, 0.6 * ((i + 0.5) / len(towers) - 0.5), color)
    for x, style in (1.0, "-"), (1.1, "--"), (2.0, ":"):
        axes.axvline(x, color="grey", linestyle=style, linewidth=1)
    axes.set(xscale="log", xlim=(min(0.5, 0.8 * lowest), 1.15 * WIDEST), ylim=(len(table) - 0.4, -0.6))
    axes.set_xticks([0.5, 1, 1.1, 2, 5, 10, WIDEST], labels=["0.5", "1", "\n1.1", "2", "5", "10", f"≥ {WIDEST:g}\nor diverged"])
    axes.minorticks_off()
    axes.set_yticks(range(len(table)), [f"{task}  ({row.best})" if row.peers else task for task, row in table.items()])
    axes.set_xlabel("metric over that of the best peer, which is named in brackets; bar: all starts, mark: worst start")
    plots.finish(axes, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(towers))
    figure.suptitle(f"{title(results)}; lower is better")
    figure.supxlabel(provenance.caption(results.result, 150), fontsize=7)
    figure.savefig(path, dpi=100)


def draw_tower(axes: Axes, tower: str, table: Mapping[str, Row], shift: float, color: str) -> None:
    """Draw the ratios of one tower, moved by `shift` from the middle of each row."""
    ratios = {i + shift: row.ratios[tower] for i, row in enumerate(table.values()) if tower in row.ratios}
    ends = {y: (min(low, WIDEST), min(high, WIDEST)) for y, (low, high) in ratios.items() if not math.isnan(high)}
    axes.hlines(list(ends), [low for low, _ in ends.values()], [high for _, high in ends.values()], color=color, linewidth=3, alpha=0.5)
    near = {y: high for y, (_, high) in ends.items() if high < WIDEST}
    far = [y for y in ends if y not in near]
    axes.plot(list(near.values()), list(near), "o", color=color, markersize=6, label=tower)
    axes.plot([WIDEST] * len(far), far, ">", color=color, markersize=6)


# ---- command line


def chosen(names: Iterable[str] | None, known: Iterable[str], option: str) -> list[str]:
    """These names, in the order of the known ones; all of them if no name is given."""
    known = list(known)
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(map(repr, known))}", param_hint=option)
    return [name for name in known if not names or name in names]


def main(
    tasks: Annotated[list[str] | None, typer.Option(help="only this task; may be repeated")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="only this method; may be repeated")] = None,
    tower: Annotated[list[str] | None, typer.Option(help="also this tower, with {lr} in place of the start; may be repeated")] = None,
    seeds: cli.Seeds = 3,
    steps: cli.Steps = None,
    jobs: cli.Jobs = 1,
    device: Annotated[str, typer.Option(help="only cpu: the models are too small for anything else")] = "cpu",
    again: cli.Again = None,
    out: cli.Out = cli.RESULTS,
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the table and draw the figure."""
    if device != "cpu":
        raise typer.BadParameter(f"{device!r} is not cpu, where all tasks run", param_hint="--device")
    for each in tower or ():
        robustness.check_tower(each, "--tower")
    ways = {name: METHODS[name] for name in chosen(methods, METHODS, "--methods")} | named(tower or ())
    runs = plan(chosen(tasks, TASKS, "--tasks"), ways, seeds)
    torch.set_num_threads(1)
    results = Store(out / "zoo.json", steps=steps)
    results.forget(again or ())
    if not figures:
        results.complete({run.key: partial(train, run, steps) for run in runs}, jobs)
    cli.publish(results, text(results), draw)


app = cli.command(main)

if __name__ == "__main__":
    app()
