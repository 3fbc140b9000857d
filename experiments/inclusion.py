"""Is a more general rule never worse, once everything is tuned? And how many trials is one run of a tower worth?

    python -m experiments.inclusion --trials 16          resumes if it was stopped; --figures only draws; more trials later are added

After Choi et al. (2019, arXiv 1910.05446): nine rules on a small CNN and a small char-RNN, with (a) lr alone tuned and the other values at
their defaults, and (b) everything tuned, each with the same number of trials (tune.py), in the spaces of spaces.py. The rules are ranked by
the validation metric of their best trial. The error bars are the 5th and 95th percentile of the best of resampled trials, of which none
counts as worse than blind guessing.

The towers hyperopt.auto and `Adam / Adam` are not tuned: they run as they are, with several seeds. Trials have the first of these seeds.

Writes inclusion.json (after every study), .md (the rankings), .png (bars) and inclusion_trials.png (best of K against one run of a tower)
to experiments/results. The studies are in --log, whose journal.log can be opened with optuna-dashboard, or in --storage.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure

from experiments import cli, plots, provenance, store, tables, training, tune
from experiments.bootstrap import best_of, equal_trials
from experiments.spaces import SPACES
from experiments.storage import HEARTBEAT
from experiments.store import Store
from experiments.workloads import Workload

WORKLOADS = ("cnn_small", "rnn_small")
MODES = {"lr": ("lr",), "all": ()}  # what is searched: these hyperparameters, or all
MODE_TITLES = {"lr": "lr alone tuned", "all": "everything tuned"}
TOWERS: dict[str, Any] = {"hyperopt.auto": training.auto, "Adam / Adam": "Adam / Adam"}
# The general rule contains the special one, exactly or as a limit; tests/test_inclusion.py shows it.
INCLUSIONS = (
    *(("SGD", "Momentum"), ("SGD", "Nesterov"), ("Momentum", "RMSprop"), ("Momentum", "Adam"), ("Nesterov", "NAdam")),
    *((special, "Unified") for special in ("Momentum", "Nesterov", "Adam", "ADOPT")),
)
LARGEST = 64  # the K up to which the best of K is drawn


class Cell(NamedTuple):
    """A rule on a workload, with lr alone or everything tuned."""

    workload: str
    rule: str
    mode: str

    @property
    def key(self) -> str:
        """Its key in the result file. SGD has only lr: its two studies are one."""
        return f"{self.workload} | {self.rule} | {'lr' if self.rule == 'SGD' else self.mode}"


def cells(workloads: Iterable[str], rules: Iterable[str]) -> list[Cell]:
    """All cells."""
    return [Cell(workload, rule, mode) for mode in MODES for rule in rules for workload in workloads]


def tower_key(workload: str, tower: str, seed: int) -> str:
    """The key of a tower's run."""
    return f"{workload} | {tower} | {seed}"


def run_tower(workload: Workload, tower: str, seed: int, device: str) -> dict[str, Any]:
    """One run of a tower, measured as a trial is."""
    found = training.train(workload, TOWERS[tower], seed, validation=True, tested=True, device=device)
    return {name: found[name] for name in ("metric", "test", "steps", "seconds")}


# ---- what was found


class Score(NamedTuple):
    """Validation metric of the best trial, 5th and 95th percentile of it, and its test metric."""

    best: float
    low: float
    high: float
    test: float


def metrics(results: Store, cell: Cell) -> list[float]:
    """The validation metrics of the feasible trials of a cell, in the order of their points; none is worse than blind guessing.

    Without that bound, one perplexity of 1e20 would make the mean of every resample that has it meaningless.
    """
    guess = tune.PROBLEMS[cell.workload].guess
    return [min(run["metric"], guess) for run in tune.feasible(results.runs.get(cell.key, {}).get("trials", {}))]


def score(results: Store, cell: Cell) -> Score | None:
    """The score of a cell; None if it has not been run."""
    found = tune.feasible(results.runs.get(cell.key, {}).get("trials", {}))
    if not found:
        return None
    curve = best_of(metrics(results, cell))
    best = min(found, key=lambda run: run["metric"])
    return Score(best["metric"], curve.low[-1], curve.high[-1], best["test"])


def verdict(special: Score, general: Score) -> str:
    """Whether the general rule is not worse than the special one."""
    if general.best <= special.best:
        return "yes"
    return "no, but within the error bars" if general.best <= special.high else "no"


def towers(results: Store, workload: str) -> dict[str, list[float]]:
    """The validation metrics of the seeds of each tower."""
    seeds = results.result["protocol"]["seeds"]
    found = {name: results.metrics(tower_key(workload, name, seed) for seed in range(seeds)) for name in TOWERS}
    return {name: values for name, values in found.items() if values}


def worth(results: Store, workload: str, tower: str) -> dict[str, tuple[int | None, int]]:
    """For each rule with everything tuned, how many trials one run of the tower equals, and how many were run."""
    mean = statistics.fmean(towers(results, workload)[tower])
    found = {rule: metrics(results, Cell(workload, rule, "all")) for rule in SPACES}
    return {rule: (equal_trials(best_of(values), mean), len(values)) for rule, values in found.items() if values}


# ---- tables


def text(results: Store) -> str:
    """The rankings, the inclusions, and what a tower is worth, in Markdown."""
    return "\n".join(part for workload in WORKLOADS for part in section(results, workload))


def section(results: Store, workload: str) -> list[str]:
    """The part on one workload."""
    found = {mode: {rule: each for rule in SPACES if (each := score(results, Cell(workload, rule, mode)))} for mode in MODES}
    if not any(found.values()):
        return []
    counts = sorted({len(metrics(results, Cell(workload, rule, mode))) for mode in MODES for rule in found[mode]})
    problem = tune.PROBLEMS[workload]
    head = ["rank", *(cell for mode in MODES for cell in (MODE_TITLES[mode], problem.metric, "test"))]
    ranked = {mode: sorted(found[mode], key=lambda rule: found[mode][rule].best) for mode in MODES}
    rows = []
    for i in range(max(map(len, ranked.values()))):
        row = [str(i + 1)]
        for mode in MODES:
            rule = ranked[mode][i] if i < len(ranked[mode]) else None
            each = found[mode][rule] if rule else None
            row += [rule, f"{each.best:.2f} ({each.low:.2f} to {each.high:.2f})", f"{each.test:.2f}"] if rule and each else ["–"] * 3
        rows.append(row)
    parts = [
        f"## {problem.title}\n\nValidation {problem.metric} of the best of {' to '.join(map(str, counts))} trials, "
        f"with 5th and 95th percentile; lower is better.\n",
        tables.markdown(head, rows),
        tables.markdown(["not worse", *MODE_TITLES.values()], inclusions(found)),
    ]
    for tower, values in towers(results, workload).items():
        parts.append(f"{tower_sentence(results, workload, tower, values)}\n")
    parts += [f"- Border, {line}" for rule in SPACES for line in borders(results, Cell(workload, rule, "all"))]
    infeasible = {cell.key: missing for cell in cells([workload], SPACES) if (missing := lost(results, cell))}
    parts.append("- Infeasible trials, replaced: " + ("; ".join(f"{key}: {n}" for key, n in infeasible.items()) or "none") + ".\n")
    return parts


def inclusions(found: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    """A row for each inclusion whose two rules have been run."""
    rows = []
    for special, general in INCLUSIONS:
        scores = [(found[mode].get(special), found[mode].get(general)) for mode in MODES]
        rows.append([f"{general} than {special}", *(verdict(one, two) if one and two else "–" for one, two in scores)])
    return rows


def tower_sentence(results: Store, workload: str, tower: str, values: list[float]) -> str:
    """What one run of a tower is worth."""
    equal = [f"{k} of {rule}" if k else f"more than {n} of {rule}" for rule, (k, n) in worth(results, workload, tower).items()]
    spread = f", {min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
    return (
        f"One run of `{tower}`, untuned ({statistics.fmean(values):.2f}, mean of {len(values)} seeds{spread}), equals so many trials with "
        f"everything tuned: {', '.join(equal)}."
    )


def borders(results: Store, cell: Cell) -> list[str]:
    """Where the best trial of a cell is at an end of its space."""
    found = tune.feasible(results.runs.get(cell.key, {}).get("trials", {}))
    if not found:
        return []
    space = SPACES[cell.rule]
    best = min(found, key=lambda run: run["metric"])
    return [f"{cell.rule}: {line}." for line in space.borders(space.axes(MODES[cell.mode]), best["point"])]


def lost(results: Store, cell: Cell) -> int:
    """The number of infeasible trials of a cell."""
    found = results.runs.get(cell.key, {}).get("trials", {})
    return len(found) - len(tune.feasible(found))


# ---- figures


def draw(results: Store, path: Path) -> None:
    """Draw both figures."""
    draw_bars(results, path)
    draw_trials(results, path.with_name(f"{path.stem}_trials.png"))


def draw_bars(results: Store, path: Path) -> None:
    """The rankings: bars of both modes side by side, in the order of the rules."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axes, workload in zip(figure.subplots(1, len(WORKLOADS), squeeze=False)[0], WORKLOADS, strict=True):
        problem = tune.PROBLEMS[workload]
        for shift, (mode, label) in zip((-0.2, 0.2), MODE_TITLES.items(), strict=True):
            found = {i: each for i, rule in enumerate(SPACES) if (each := score(results, Cell(workload, rule, mode)))}
            best = [each.best for each in found.values()]
            # A resample may miss the best trial and cannot find a better one: bars reach upwards only.
            above = [max(0.0, each.high - each.best) for each in found.values()]
            axes.bar(
                [i + shift for i in found], best, 0.4, yerr=[[0.0] * len(best), above], label=label, capsize=2, error_kw={"linewidth": 1}
            )
        for i, (tower, values) in enumerate(towers(results, workload).items()):
            axes.axhline(statistics.fmean(values), color="black", linestyle="-:"[i], linewidth=1.2, label=f"{tower}, one run, untuned")
        axes.set_xticks(range(len(SPACES)), list(SPACES), rotation=30, ha="right")
        axes.set(title=problem.title, ylabel=f"validation {problem.metric}, best trial")
        plots.finish(axes, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.supxlabel(provenance.caption(results.result, 200), fontsize=7)
    figure.savefig(path, dpi=110)


def draw_trials(results: Store, path: Path) -> None:
    """The best of K trials with everything tuned, and one run of each tower."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, workload in zip(figure.subplots(1, len(WORKLOADS), squeeze=False)[0], WORKLOADS, strict=True):
        problem, lowest = tune.PROBLEMS[workload], []
        for i, rule in enumerate(SPACES):
            if values := metrics(results, Cell(workload, rule, "all")):
                tune.draw_curve(axes, values[:LARGEST], shade=0.07, color=f"C{i}", label=rule)
                lowest.append(min(values))
        for i, (tower, values) in enumerate(towers(results, workload).items()):
            axes.axhline(statistics.fmean(values), color="black", linestyle="-:"[i], linewidth=2, label=f"{tower}, one run")
            axes.axhspan(min(values), max(values), color="black", alpha=0.12, linewidth=0)
            lowest.append(min(values))
        ticks = [2**k for k in range(7)]
        axes.set(xscale="log", yscale="log", xlim=(1, LARGEST), xlabel="K", ylabel=f"validation {problem.metric}", title=problem.title)
        axes.set_xticks(ticks, labels=list(map(str, ticks)))
        axes.minorticks_off()
        if lowest:
            axes.set_ylim(0.95 * min(lowest), min(problem.guess, 5 * min(lowest)))
        plots.decimal_ticks(axes.yaxis)
        plots.finish(axes, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle("The best of K trials of a rule, everything tuned (mean, 5th to 95th percentile), and one run of a tower, untuned")
    figure.supxlabel(provenance.caption(results.result, 200), fontsize=7)
    figure.savefig(path, dpi=110)


# ---- command line


def complete(results: Store, cell: Cell, problem: Workload, wanted: int, options: Mapping[str, Any], **how: Any) -> None:
    """Run what is missing of a cell."""
    if len(metrics(results, cell)) >= wanted:
        return
    found = tune.search(problem, cell.rule, wanted, only=MODES["lr"] if cell.rule == "SGD" else MODES[cell.mode], **options)
    tally = tune.tuned(found, tune.protocol(problem, cell.rule, found), **how)
    results.runs[cell.key] = {"trials": tune.rows(tally), **provenance.origin()}
    results.result["command"] = provenance.stamp()["command"]  # of the last one: an earlier one may have had fewer trials
    store.write(results.result, results.path)


def main(
    trials_: tune.Trials = 16,
    rule: Annotated[list[str] | None, typer.Option(help="only this rule; may be repeated")] = None,
    seeds: cli.Seeds = 3,
    steps: cli.Steps = None,
    jobs: cli.Jobs = 1,
    device: cli.Device = "cpu",
    storage: tune.Storage = None,
    ray: tune.Ray = None,
    heartbeat: tune.Heartbeat = HEARTBEAT,
    out: cli.Out = cli.RESULTS,
    log: Annotated[Path, typer.Option(callback=cli.folder, help="folder of the studies")] = Path("runs/inclusion"),
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the rankings and draw both figures."""
    for name in rule or ():
        if name not in SPACES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(SPACES)}", param_hint="--rule")
    torch.set_num_threads(1)
    results = Store(out / "inclusion.json", steps=steps, seeds=seeds)
    problems = {name: tune.chosen_workload(name, steps) for name in WORKLOADS}
    if not figures:
        for problem in problems.values():
            tune.readable(problem, device)
        results.complete(
            {
                tower_key(name, tower, seed): partial(run_tower, problem, tower, seed, device)
                for seed in range(seeds)
                for name, problem in problems.items()
                for tower in TOWERS
            }
        )
        options = {"storage": storage or str(log.absolute() / tune.JOURNAL), "device": device, "heartbeat": heartbeat}
        for cell in cells(WORKLOADS, rule or SPACES):
            complete(results, cell, problems[cell.workload], trials_, options, jobs=jobs, ray=ray)
    cli.publish(results, text(results), draw)


app = cli.command(main)

if __name__ == "__main__":
    app()
