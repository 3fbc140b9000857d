"""The metric of each method against the initial learning rate, from 1e-8 to 1e2, on one workload: robustness to a bad start.

    python -m experiments.robustness --workload m3          resumes if it was stopped; --figures only draws

The workloads are those of experiments/workloads.py. All methods have the same initial weights and the same batches for a seed. Which
method is run from which starts ("start": the initial lr), with how many seeds:

- ScheduleFree(Adam) / Adam: from eleven decades with three seeds on m3 and r12, from five of these decades with two seeds on the other
  workloads; hyperopt.auto alike, but on r12 from five decades, and on m3_30 with three seeds.
- every other method: from the same five decades with one seed; and, for peers and Adam with a held lr, from the best lr of a half-decade
  grid (three seeds on m3 and r12, otherwise one). The best lr is chosen on held-out training data with one seed.
- on m3 moreover all towers from all eleven decades with three seeds, and Adam's other hyperparameters from bad values.
- --full runs everything from every start. Muon on the CNN is run only on a GPU or with --full.

Prodigy and D-Adaptation have no lr; in its place they start from d0, their initial estimate of the distance to the solution.

Any other tower can be compared: pass its text with {lr} in place of the start. With --validation, runs are measured on held-out training
data, on which choices should be made: --validation --method "ScheduleFree(Adam)(lr={lr}, eps=1e-4) / Adam".

Writes robustness_<workload>.json (after every run), .md (the table) and .png to experiments/results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import dadaptation
import prodigyopt
import schedulefree
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments import cli, plots, provenance, store, tables, training
from experiments.workloads import WORKLOADS, Workload
from hyperopt import Hyper

Make = Callable[[nn.Module, float], list[Optimizer]]


@dataclass(frozen=True)
class Method:
    """A way of training: the text of a tower, or a function that builds optimizers from the model and the lr."""

    make: str | Make
    grid: float | None = None  # middle of the half-decade grid that is searched for the best lr; None: not searched
    cosine: bool = False  # lr falls to 0 over the run


def hidden(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden matrices, for which Muon is meant, and the other parameters: embeddings, head, vectors, convolutions."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings]
    inside = matrices[:-1]  # the last one is the head
    kept = {id(p) for p in inside}
    return inside, [p for p in model.parameters() if id(p) not in kept]


def muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the hidden matrices and Adam for the rest, with updates of the same scale, so that they can share one lr."""
    inside, others = hidden(model)
    return [
        torch.optim.Muon(inside, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(others, lr=lr),
    ]


# The paper learns lr as the number itself, and the betas, at horizon 1, with a step size that its authors tuned for the MLP.
PAPER = "Adam(lr={lr}, learn=(lr, beta1, beta2), horizon=1, trust=None, domains={lr: Real}) / SGD(lr=1e-5, trust=None)"
RECOMMENDED, FREE = "hyperopt.auto", "ScheduleFree(Adam) / Adam"
TOWERS = {
    "Adam": Method("Adam(lr={lr})", grid=3e-3),
    "Adam / SGD, the paper's settings": Method(PAPER),
    "Adam / SGD": Method("Adam(lr={lr}) / SGD"),
    "Adam / Adam": Method("Adam(lr={lr}) / Adam"),
    "SGD(momentum=0.9) / Adam": Method("SGD(lr={lr}, momentum=0.9) / Adam"),
    FREE: Method("ScheduleFree(Adam)(lr={lr}) / Adam"),
    RECOMMENDED: Method(training.auto),
}
PEERS = {
    "Schedule-Free AdamW": Method(lambda model, lr: [schedulefree.AdamWScheduleFree(model.parameters(), lr=lr)], grid=1e-2),
    "Prodigy": Method(lambda model, lr: [prodigyopt.Prodigy(model.parameters(), d0=lr)], grid=1e-4),
    "D-Adapt Adam": Method(lambda model, lr: [dadaptation.DAdaptAdam(model.parameters(), d0=lr)], grid=1e-4),
    "Adam, cosine": Method(lambda model, lr: [torch.optim.Adam(model.parameters(), lr=lr)], grid=3e-3, cosine=True),
    "SGD(momentum=0.9), cosine": Method(
        lambda model, lr: [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)], grid=1e-1, cosine=True
    ),
    "Muon, cosine": Method(muon, grid=1e-2, cosine=True),
}
METHODS = TOWERS | PEERS
STARTS = [10.0**k for k in range(-8, 3)]
FEW = [1e-8, 1e-5, 1e-3, 1e-1, 1e2]
GRID = [float(f"{digit}e{k}") for k in range(-8, 3) for digit in (1, 3)][:-1]
# Number of elements above which a matrix is too large for Muon on a CPU. Orthogonalising that of the CNN, 1024×3136, takes 76 billion
# operations in bfloat16 in every step, and a CPU without bfloat16 arithmetic does one or two of them per nanosecond.
HEAVY = 2**20
LARGE = ("m3", "r12")  # workloads with more starts and seeds
# Bad values of Adam's other hyperparameters; lr has torch's default.
BAD = {"beta1": (0.1, 0.99, 0.999), "beta2": (0.5, 0.9, 0.99999), "eps": (1e-4, 1e-2, 1.0)}
BAD_TOWERS = {
    "Adam": "Adam(lr=0.001, {name}={value})",
    "Adam / Adam": "Adam(lr=0.001, {name}={value}) / Adam",
    "the same, learning it too": "Adam(lr=0.001, {name}={value}, learn=(lr, {name})) / Adam",
    FREE: "ScheduleFree(Adam)(lr=0.001, {name}={value}) / Adam",
    "ScheduleFree(Adam) / Adam, learning it too": "ScheduleFree(Adam)(lr=0.001, {name}={value}, learn=(lr, {name})) / Adam",
}


class Run(NamedTuple):
    """One run of a method, given by its name, or of a tower, given by its text."""

    method: str
    start: float
    seed: int
    validation: bool = False

    @property
    def key(self) -> str:
        """Its key in the result file."""
        return f"{self.method} | {self.start:g} | {self.seed}" + (" | validation" if self.validation else "")


def started_at(text: str, lr: float) -> str:
    """The text of a tower with the start in place of {lr}; other braces belong to the tower."""
    return text.replace("{lr}", repr(lr), 1)


def stepped(method: Method, lr: float, steps: int, model: nn.Module) -> list[Any]:
    """The optimizers of a method and their schedulers, as a `make` of `training.train`."""
    if isinstance(method.make, str):
        return [Hyper.parse(started_at(method.make, lr)).bind(model.parameters())]
    optimizers = method.make(model, lr)
    return [*optimizers, *(CosineAnnealingLR(optimizer, steps) for optimizer in optimizers if method.cosine)]


def train(run: Run, workload: Workload, device: str = "cpu") -> dict[str, Any]:
    """One run: final metric (None if not finite), last training loss, steps, seconds, device and, for a tower, the final lr."""
    method = METHODS.get(run.method) or Method(run.method)
    make = partial(stepped, method, run.start, workload.steps)
    found = training.train(workload, make, run.seed, validation=run.validation, device=device)
    kept = {name: found[name] for name in ("metric", "loss", "steps", "seconds")}
    learned = {"lr": found["courses"]["0.lr"][-1]} if run.method == RECOMMENDED or isinstance(method.make, str) else {}
    return {**kept, **learned, "device": device}


def methods(workload: Workload, device: str | None = None) -> dict[str, Method]:
    """The methods that apply to this workload and, if a device is given, that are not too slow on it."""
    left_out = set()
    matrices = hidden(workload.model(0))[0]
    if workload.name != "m3":
        left_out.add("Adam / SGD")  # one workload is enough to show its limits
    if not hasattr(torch.optim, "Muon") or not matrices or (device == "cpu" and max(p.numel() for p in matrices) > HEAVY):
        left_out.add("Muon, cosine")
    return {name: method for name, method in METHODS.items() if name not in left_out}


def named(names: Iterable[str]) -> dict[str, Method]:
    """The methods among these names that are the text of a tower, with {lr} in place of the start."""
    return {name: Method(name) for name in names if "{lr}" in name}


def extent(name: str, workload: Workload, full: bool) -> tuple[list[float], int]:
    """The starts and the number of seeds of a method."""
    large = workload.name in LARGE
    several = name in (RECOMMENDED, FREE)
    if name == RECOMMENDED and workload.name == "r12" and not full:
        return FEW, 3
    if full or (several and large) or (name in TOWERS and workload.name == "m3"):
        return STARTS, 3
    return FEW, (3 if workload.name == "m3_30" else 2) if several else 1


def window(name: str, method: Method, runs: dict[str, Any], full: bool) -> tuple[list[float], float | None]:
    """The part of the half-decade grid that has to be run, and its best lr, or None as long as runs are missing.

    It has two values on either side of the middle, and is extended as long as the best value lies on its border.
    """
    middle = GRID.index(method.grid) if method.grid else 0
    low, high = (0, len(GRID) - 1) if full else (middle - 2, middle + 2)
    while True:
        cells = GRID[low : high + 1]
        found = [runs.get(Run(name, cell, 0, validation=True).key) for cell in cells]
        if None in found:
            return cells, None
        scores = [math.inf if run["metric"] is None else run["metric"] for run in found if run]
        best = scores.index(min(scores))
        if best == 0 and low > 0:
            low -= 1
        elif best == len(cells) - 1 and high < len(GRID) - 1:
            high += 1
        else:
            return cells, cells[best]


def plan(
    workload: Workload, runs: dict[str, Any], full: bool, only: Iterable[str] = (), validation: bool = False, device: str = "cpu"
) -> list[Run]:
    """The runs that can be done now; those at the best lr of a grid follow once the grid is done."""
    planned: list[Run] = []
    for name, method in (methods(workload, None if full else device) | named(only)).items():
        if only and name not in only:
            continue
        starts, seeds = extent(name, workload, full)
        planned += [Run(name, start, seed, validation) for start in starts for seed in range(seeds)]
        if method.grid:
            cells, best = window(name, method, runs, full)
            planned += [Run(name, cell, 0, validation=True) for cell in cells]
            if best:
                planned += [Run(name, best, seed, validation) for seed in range(best_seeds(workload, full))]
    if workload.name == "m3" and not only:
        planned += [Run(text, 1e-3, seed, validation) for text in bad_towers() for seed in range(3)]
    return [run for run in dict.fromkeys(planned) if run.key not in runs]


def best_seeds(workload: Workload, full: bool) -> int:
    """The number of seeds at the best lr of a grid."""
    return 3 if full or workload.name in LARGE else 1


def bad_towers() -> Iterator[str]:
    """The towers with a bad value of another hyperparameter, which are in the second table of m3."""
    for name, values in BAD.items():
        for value in values:
            for text in BAD_TOWERS.values():
                yield text.format(name=name, value=value)


class Score(NamedTuple):
    """Mean, best and worst metric over the seeds of a cell; infinite if a run diverged."""

    mean: float
    low: float
    high: float


def score(runs: dict[str, Any], name: str, start: float, seeds: int, validation: bool) -> Score | None:
    """The score of a cell over its finished seeds; None if there are none."""
    found = [runs[key] for seed in range(seeds) if (key := Run(name, start, seed, validation).key) in runs]
    values = [math.inf if run["metric"] is None else run["metric"] for run in found]
    return Score(statistics.mean(values), min(values), max(values)) if values else None


class Line(NamedTuple):
    """The results of a method: its score at each start, and the best lr of its grid with the score there."""

    scores: dict[float, Score]
    best: tuple[float, Score] | None


def summary(result: dict[str, Any], workload: Workload) -> dict[str, Line]:
    """The results of each method that has been run."""
    runs, full, validation = result["runs"], result["full"], result["validation"]
    lines = {}
    for name, method in (methods(workload) | named(key.split(" | ")[0] for key in runs)).items():
        starts, seeds = extent(name, workload, full)
        scores = {start: found for start in starts if (found := score(runs, name, start, seeds, validation))}
        cell = window(name, method, runs, full)[1] if method.grid else None
        found = score(runs, name, cell, best_seeds(workload, full), validation) if cell else None
        if scores or found:
            lines[name] = Line(scores, (cell, found) if cell and found else None)
    return lines


def table(result: dict[str, Any], workload: Workload) -> str:
    """The results in Markdown."""
    measured = f"{'validation' if result['validation'] else 'test'} {workload.metric}"

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if math.isfinite(value) else "diverged"

    head = [f"{measured} from lr", *(f"{start:.0e}" for start in STARTS), "worst", "worst / best", "best of the grid"]
    rows = []
    for name, (scores, best) in summary(result, workload).items():
        means = [found.mean for found in scores.values()]
        finished = len(means) == len(extent(name, workload, result["full"])[0])
        spread = [cell(max(means)), cell(max(means) / min(means) if math.isfinite(max(means)) else math.inf)] if finished else ["", ""]
        tuned = f"{cell(best[1].mean)} at {best[0]:g}" if best else ""
        rows.append([name, *(cell(scores[start].mean) if start in scores else "" for start in STARTS), *spread, tuned])
    text = f"{workload.title}; mean of the seeds.\n\n{tables.markdown(head, rows)}"
    bad = {
        f"{name} {value:g}": [
            score(result["runs"], tower.format(name=name, value=value), 1e-3, 3, result["validation"]) for tower in BAD_TOWERS.values()
        ]
        for name, values in BAD.items()
        for value in values
    }
    if workload.name == "m3" and any(map(any, bad.values())):
        rows = [[start, *(cell(s and s.mean) for s in scores)] for start, scores in bad.items()]
        text += "\nFrom lr 1e-3 and one bad value of another hyperparameter; mean of 3 seeds.\n\n"
        text += tables.markdown([f"{measured} from", *BAD_TOWERS], rows)
    return text


def draw(result: dict[str, Any], workload: Workload, path: Path) -> None:
    """Draw towers on the left, peers and hyperopt.auto on the right: the mean over seeds with a band from best to worst."""
    lines = summary(result, workload)
    top = 1.15 * workload.guess  # worse results and diverged runs are drawn at this height
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, names in (left, [*TOWERS, *(name for name in lines if name not in METHODS)]), (right, {RECOMMENDED: None, **PEERS}):
        for number, name in enumerate(names):
            if name in lines:
                recommended = name == RECOMMENDED
                draw_line(axes, name, lines[name], top, "black" if recommended else f"C{number}", 2.5 if recommended else 1.2)
        axes.set(
            xscale="log", yscale="log", xlabel="initial lr (Prodigy, D-Adapt: d0)" if axes is right else "initial lr", xlim=(5e-9, 2e2)
        )
        plots.decimal_ticks(axes.yaxis)
        axes.axhline(workload.guess, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
        if any(name in lines for name in names):
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)  # inside the axes it would cover lines
    left.set(title="towers", ylabel=f"{'validation' if result['validation'] else 'test'} {workload.metric}")
    right.set(title="peers; star: the best lr of a grid")
    left.set_ylim(top=top * 1.03)
    figure.suptitle(f"{workload.title}; dotted: blind guessing, at the top: as bad or diverged")
    figure.supxlabel(provenance.caption(result, 200), fontsize=7)
    figure.savefig(path, dpi=110)


def draw_line(axes: Axes, name: str, line: Line, top: float, color: str, width: float) -> None:
    """Draw the results of one method."""
    starts, scores = list(line.scores), list(line.scores.values())
    axes.plot(starts, [min(s.mean, top) for s in scores], marker="o", markersize=4, color=color, linewidth=width, label=name)
    axes.fill_between(starts, [min(s.low, top) for s in scores], [min(s.high, top) for s in scores], alpha=0.2, color=color)
    if line.best:
        axes.plot([line.best[0]], [min(line.best[1].mean, top)], marker="*", markersize=11, color=color)


def check(name: str) -> None:
    """Raise typer.BadParameter unless this is a method, a tower of `bad_towers` or the text of a tower with {lr}."""
    if name not in METHODS and name not in bad_towers():
        check_tower(name, "--method, --again", f"{name!r} is none of {', '.join(map(repr, METHODS))}, and ")


def check_tower(text: str, option: str, otherwise: str = "") -> None:
    """Raise typer.BadParameter for this option unless this is the text of a tower with {lr} in place of the start."""
    if "{lr}" not in text:
        raise typer.BadParameter(f"{otherwise or repr(text) + ' is '}no tower with {{lr}} where the start goes", param_hint=option)
    try:
        Hyper.parse(started_at(text, 1e-3))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def main(
    workload: Annotated[str, typer.Option(help=f"one of {', '.join(WORKLOADS)}")] = "m3",
    method: Annotated[
        list[str] | None, typer.Option(help="only this method, or this tower with {lr} in place of the start; may be repeated")
    ] = None,
    again: Annotated[list[str] | None, typer.Option(help="forget the results of this method or tower; may be repeated")] = None,
    full: Annotated[bool, typer.Option(help="every method from all eleven starts with 3 seeds, and the whole half-decade grid")] = False,
    validation: Annotated[bool, typer.Option(help="measure on held-out training data instead of the test data")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="number of steps of a run, to try the script")] = None,
    jobs: cli.Jobs = 1,
    device: cli.Device = "cpu",
    out: cli.Out = cli.RESULTS,
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the table and draw the figure."""
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"{workload!r} is none of {', '.join(WORKLOADS)}", param_hint="--workload")
    for name in (*(method or ()), *(again or ())):
        check(name)
    torch.set_num_threads(1)
    chosen = WORKLOADS[workload]
    if steps is not None:
        chosen = replace(chosen, steps=steps, title=f"{chosen.title}, only {steps} steps of it")
    path = out / f"robustness_{workload}{'_validation' if validation else ''}.json"
    if path.exists():
        result = store.read(path)
        if result["steps"] != chosen.steps:
            raise typer.BadParameter(f"{path} holds runs of {result['steps']} steps: choose another --out", param_hint="--steps")
    else:
        header = {"workload": workload, "protocol": chosen.title, "metric": chosen.metric, "steps": chosen.steps}
        result = {**provenance.stamp(), **header, "validation": validation, "full": full, "runs": {}}
    if not figures:
        result["full"] = full
    for key in [key for key in result["runs"] if key.partition(" | ")[0] in (again or ())]:
        del result["runs"][key]
    out.mkdir(parents=True, exist_ok=True)
    while not figures and (missing := plan(chosen, result["runs"], full, method or (), validation, device)):
        store.run_missing(result, path, {run.key: partial(train, run, chosen, device) for run in missing}, jobs, indent=1)
    text = table(result, chosen)
    path.with_suffix(".md").write_text(text)
    draw(result, chosen, path.with_suffix(".png"))
    print(text)


app = cli.command(main)

if __name__ == "__main__":
    app()
