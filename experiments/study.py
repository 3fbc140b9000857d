"""What the scripts share: one training run, its replay on plain torch.optim, many runs in processes, results that survive a kill.

    store = Store(Path("results/x.json"), protocol="…", seeds=3)
    store.complete({"SGD | 0": partial(train, workload, "SGD(lr=0.01) / Adam", 0), …}, jobs=2)
    store.runs["SGD | 0"]["metric"], store.caption()

A task is sent to its process by pickle: workloads and optimizers are made from functions of a module and `functools.partial` of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import hyperopt
from experiments import data, models, provenance
from experiments.workloads import Workload, cifar10
from hyperopt import Hyper, HyperOptimizer, Recorder, Replay, batch_statistics

# What is stepped after each backward, in this order: optimizers, then their schedulers.
Make = Callable[[nn.Module], list[Any]]
POINTS = 200  # of a learned schedule and of the training loss, for TensorBoard
HELD, REPLAYED = "held", "replayed"
# Options that the scripts have in common.
Jobs = Annotated[int, typer.Option(min=1, help="processes of one thread each")]
Out = Annotated[Path, typer.Option(help="folder of the results")]
Log = Annotated[Path, typer.Option(help="folder of the TensorBoard logs, a folder for each run")]
Again = Annotated[list[str] | None, typer.Option(help="forget the runs whose key begins with this; may be repeated")]
Steps = Annotated[int | None, typer.Option(min=1, help="at most so many steps a run, to try the script")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
Figures = Annotated[bool, typer.Option(help="draw from the results that are there, train nothing")]


def train(
    workload: Workload,
    make: str | Hyper | Make,
    seed: int,
    *,
    after: Iterable[str] = (),
    evaluations: int = 1,
    points: int = 50,
    validation: bool = False,
    device: str = "cpu",
    log: Path | None = None,
    observe: Callable[[nn.Module, SummaryWriter, int], None] | None = None,
) -> dict[str, Any]:
    """One run.

    Args:
        workload: the model, its batches and what is measured; anything with the methods of `Workload`.
        make: a tower, its text, or a function of the model that makes what is stepped.
        seed: of the initial weights and the batches.
        after: what follows on plain torch.optim, from the same weights on the same batches: HELD, with the values at the end of this
            run, REPLAYED, with the value of each step; for a tower alone.
        evaluations: how often the metric is measured, the last time at the end.
        points: at most so many points of each learned schedule in the result.
        validation: measure on held-out training data.
        device: where it runs.
        log: folder for TensorBoard.
        observe: called with the model, a TensorBoard writer and the step after each evaluation, where `log` is given.

    Returns:
        metric (None: not finite), loss (of the last step; None: not finite), steps, seconds (of the steps alone), curve (step and
        metric of each evaluation), courses (up to `points` steps, and there each learned value by "<level>.<name>"; of torch's
        optimizers "0.lr"), and metric, loss, steps, seconds of what followed.
    """
    torch.manual_seed(seed)
    model = workload.model(seed, device)
    stepped = started(make, model)
    optimizers = [each for each in stepped if isinstance(each, Optimizer)]
    towers = [each for each in optimizers if isinstance(each, HyperOptimizer)]
    at = {math.ceil(k * workload.steps / evaluations) for k in range(1, evaluations + 1)}
    losses, curve, rates, seconds = [], [], [], 0.0
    for optimizer in optimizers:
        _switch(optimizer, "train")
    with ExitStack() as stack:
        every = 1 if after else max(1, workload.steps // POINTS)
        recorder = stack.enter_context(Recorder(towers[0], every)) if towers else None
        # purge_step: a second run into the same folder replaces the curves of the first.
        writer = stack.enter_context(SummaryWriter(str(log), purge_step=0)) if log else None
        hidden = True if multiprocessing.parent_process() else None  # None: shown on a terminal
        batches = workload.batches(seed, device, validation=validation)
        begin = time.perf_counter()
        for x, y in tqdm(batches, total=workload.steps, unit="step", leave=False, disable=hidden):
            model.zero_grad()
            loss = workload.loss(model, x, y)
            loss.backward()
            for i, each in enumerate(stepped):
                each.step()
                if i == 0 and not towers:  # what this step took; schedulers, behind the optimizers, put the next one in place
                    rates.append(float(each.param_groups[0]["lr"]))
            losses.append(loss.detach())
            # A tower skips a gradient that is not finite and goes on; after fifty of them nothing will come any more.
            if len(losses) % 50 == 0 and not torch.stack(losses[-50:]).isfinite().any():
                break
            if len(losses) in at and len(losses) < workload.steps:
                losses[-1].item()  # waits for the device, so that the time of these steps is counted
                seconds += time.perf_counter() - begin
                curve.append((len(losses), evaluate(workload, model, optimizers, seed, validation, device)))
                if writer and observe:
                    observe(model, writer, len(losses))
                begin = time.perf_counter()
        last = losses[-1].item()
        seconds += time.perf_counter() - begin
        metric = evaluate(workload, model, optimizers, seed, validation, device)
        curve.append((len(losses), metric))
        steps, columns = _learned(recorder) if recorder else (np.arange(1, len(rates) + 1), {"0.lr": np.array(rates)})
        if writer:
            measured = f"{'validation' if validation else 'test'} {workload.metric}"
            _write_scalars(writer, measured, torch.stack(losses).cpu().numpy(), curve, thin(steps, columns, POINTS))
            if observe:
                observe(model, writer, len(losses))
    found = {
        "metric": _finite(metric) if math.isfinite(last) else None,
        "loss": _finite(last),
        "steps": len(losses),
        "seconds": round(seconds, 2),
        "curve": {"step": [step for step, _ in curve], "metric": [_finite(value) for _, value in curve]},
        "courses": thin(steps, columns, points),
    }
    if recorder:
        values = {name.removeprefix("0."): column for name, column in recorder.values.items() if name.startswith("0.")}
        for what in after:
            shown = {name: column[-1:] for name, column in values.items()} if what == HELD else values
            again = train(workload, partial(replayed, towers[0].tower, shown), seed, validation=validation, device=device)
            found[what] = {name: again[name] for name in ("metric", "loss", "steps", "seconds")}
    return found


def started(make: str | Hyper | Make, model: nn.Module) -> list[Any]:
    """What is stepped, for this model."""
    if isinstance(make, (str, Hyper)):
        return [(Hyper.parse(make) if isinstance(make, str) else make).bind(model.parameters())]
    return make(model)


def auto(model: nn.Module, lr: float | None = None) -> list[Optimizer]:
    """What is recommended: `hyperopt.auto`."""
    return [hyperopt.auto(model, lr)]


def plain(tower: Hyper, params: Any) -> Optimizer:
    """torch's optimizer for the tower's level 0, from the same values; ours with nothing learned where torch has none."""
    rule = tower.rule
    make = getattr(torch.optim, type(rule).__name__, None)
    values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    if make is None or not values.pop("bias_correction", True):
        return tower.held().bind(params)
    if "beta1" in values:
        values["betas"] = values.pop("beta1"), values.pop("beta2")
    if "decoupled" in values:
        values["decoupled_weight_decay"] = values.pop("decoupled")
    return make(params, **values)


def reference(tower: Hyper, schedule: Callable[[Optimizer], Any] | None, model: nn.Module) -> list[Any]:
    """`plain`, and a scheduler of torch; as a task, partial(reference, tower, schedule)."""
    optimizer = plain(tower, model.parameters())
    return [optimizer, schedule(optimizer)] if schedule else [optimizer]


def replayed(tower: Hyper, values: Mapping[str, Any], model: nn.Module) -> list[Any]:
    """Recorded values of level 0 on `plain`."""
    optimizer = plain(tower, model.parameters())
    return [optimizer, Replay(optimizer, values)]


def evaluate(
    workload: Workload, model: nn.Module, optimizers: Iterable[Optimizer], seed: int = 0, validation: bool = False, device: str = "cpu"
) -> float:
    """The metric, of the averaged weights where an optimizer averages, with the statistics of BatchNorm taken anew for them."""
    with ExitStack() as stack:
        averages = False
        for optimizer in optimizers:
            if isinstance(optimizer, HyperOptimizer):
                stack.enter_context(optimizer.averaged())
                averages |= optimizer.tower.rule.average is not None
            elif _switch(optimizer, "eval"):
                stack.callback(_switch, optimizer, "train")
                averages = True
        if averages:
            some = islice(workload.batches(seed, device, validation=validation), 50)
            stack.enter_context(batch_statistics(model, some))
        return workload.evaluate(model, validation)


def _switch(optimizer: Optimizer, mode: str) -> bool:
    """The optimizers of the package schedulefree have the two modes of a module."""
    switch = getattr(optimizer, mode, None)
    if switch:
        switch()
    return bool(switch)


def _learned(recorder: Recorder) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps, and there what was learned, and lr whether learned or not."""
    kept = {**dict.fromkeys(recorder.hypergradients), "0.lr": None}
    values = recorder.values
    return recorder.steps, {name: values[name] for name in kept if name in values}


def thin(steps: np.ndarray, columns: Mapping[str, np.ndarray], points: int) -> dict[str, list[float]]:
    """`step` and every column at up to `points` of the steps, the first and the last among them."""
    at = np.unique(np.linspace(0, len(steps) - 1, min(points, len(steps))).round().astype(int))
    rounded = {name: [_finite(float(f"{value:.6g}")) for value in column[at]] for name, column in columns.items()}
    return {"step": steps[at].tolist(), **rounded}


def _finite(value: float) -> Any:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _write_scalars(writer: SummaryWriter, metric: str, losses: np.ndarray, curve: list[tuple[int, float]], courses: dict[str, Any]) -> None:
    step = 0
    for part in np.array_split(losses, min(POINTS, len(losses))):  # the mean of each part, at its last step
        step += len(part)
        writer.add_scalar("loss", part.mean(), step)
    for step, value in curve:
        writer.add_scalar(metric.replace(" ", "_").replace("%", "percent"), value, step)
    for name, column in courses.items():
        for step, value in zip(courses["step"], column, strict=True):
            if name != "step" and value is not None:
                writer.add_scalar(f"hyper/{name}", value, step)


def slug(key: str) -> str:
    """A key as the name of a folder."""
    return re.sub(r"[^\w.=()-]+", "_", key).strip("_")


def execute(tasks: Mapping[str, Callable[[], dict[str, Any]]], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The key and the result of each task, as they finish; each process has one thread.

    Args:
        tasks: what is called, by its key; with more than one job, something that can be pickled.
        jobs: processes; 1 stays in this one, with the threads that it has.
    """
    if jobs == 1:
        for key, task in tasks.items():
            yield key, task()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            waiting = {pool.submit(task): key for key, task in tasks.items()}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def write(result: Mapping[str, Any], path: Path, indent: int | None = None) -> None:
    """All at once: an interruption leaves the file as it was."""
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(result, indent=indent) + "\n")
    new.replace(path)


class Method(NamedTuple):
    """A way of training from a cell of a grid: what it is called, what `train` takes, and how it is drawn."""

    label: str
    make: Callable[..., Any]
    color: str
    style: str = "-"

    @property
    def look(self) -> dict[str, Any]:
        """For `band`."""
        return {"color": self.color, "linestyle": self.style, "label": self.label}


class Store:
    """The results of a script by key, in a JSON file that is written after every run and says where they come from.

    Args:
        path: the file; what it holds is taken over.
        protocol: what all runs have in common; a file of another protocol is not taken over.

    Raises:
        typer.BadParameter: the file holds runs of another protocol.
    """

    def __init__(self, path: Path, **protocol: Any) -> None:
        self.path = path
        self.result: dict[str, Any] = {**provenance.stamp(), "protocol": protocol, "runs": {}}
        if path.exists():
            self.result = json.loads(path.read_text())
            if self.result["protocol"] != json.loads(json.dumps(protocol)):
                raise typer.BadParameter(f"{path} holds runs of {self.result['protocol']}, not of {protocol}", param_hint="--out")

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The results by key."""
        return self.result["runs"]

    def complete(self, tasks: Mapping[str, Callable[[], dict[str, Any]]], jobs: int = 1) -> None:
        """Run the tasks whose results are missing, and write each result at once.

        Raises:
            typer.BadParameter: a data set is missing.
        """
        origin = provenance.origin()
        missing = {key: task for key, task in tasks.items() if key not in self.runs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for key, found in tqdm(execute(missing, jobs), total=len(missing), unit="run", disable=not missing):
                self.runs[key] = {**found, **origin}
                write(self.result, self.path)
        except data.DataNotFoundError as error:
            raise typer.BadParameter(str(error), param_hint="data") from error

    def forget(self, prefixes: Iterable[str]) -> None:
        """Drop the runs whose key begins with one of these."""
        for key in [key for key in self.runs if key.startswith(tuple(prefixes))]:
            del self.runs[key]

    def metrics(self, keys: Iterable[str], *path: str) -> list[float]:
        """The metric of each of these runs that is there, or of what followed it; infinite where it is not finite."""
        return metrics((self.runs[key] for key in keys if key in self.runs), *path)

    def seeds(self, name: str) -> list[dict[str, Any]]:
        """The runs `name | 0`, `name | 1`, … that are there, of a protocol with seeds."""
        keys = [f"{name} | {seed}" for seed in range(self.result["protocol"]["seeds"])]
        return [self.runs[key] for key in keys if key in self.runs]

    def caption(self) -> str:
        """Where the runs come from, on one line."""
        return provenance.caption(self.result)


def tasks(
    workload: Workload, makes: Mapping[str, str | Hyper | Make], seeds: int, log: Path, replay: Container[str] = (), **options: Any
) -> dict[str, Callable[[], dict[str, Any]]]:
    """`train` for every seed of everything in `makes`, by the keys of `Store.seeds`.

    Args:
        workload: what all of them train.
        makes: what trains it, by name.
        seeds: the first so many.
        log: folder for TensorBoard, with a folder for each run.
        replay: names of towers whose schedule, as the first seed learned it, is replayed on torch.optim.
        options: of `train`.
    """
    return {
        key: partial(train, workload, make, seed, after=(REPLAYED,) if seed == 0 and name in replay else (), log=log / slug(key), **options)
        for seed in range(seeds)
        for name, make in makes.items()
        for key in [f"{name} | {seed}"]
    }


def metrics(runs: Iterable[dict[str, Any]], *path: str) -> list[float]:
    """The metric of each run, or of what followed it where it did; infinite where it is not finite."""
    found = list(runs)
    for name in path:
        found = [run[name] for run in found if name in run]
    return [math.inf if run["metric"] is None else run["metric"] for run in found]


def compare(cells: Mapping[str, Sequence[Sequence[float]]], ours: Iterable[str], others: Sequence[str]) -> str:
    """How often the mean of the seeds of one method is below that of another, over the cells that both have, in Markdown.

    Args:
        cells: for each method by its label the metrics of the seeds, cell by cell.
        ours: labels that are compared with each of `others`.
        others: labels.
    """
    rows = []
    for one in ours:
        pairs = [[(np.mean(a), np.mean(b)) for a, b in zip(cells[one], cells[other], strict=True) if a and b] for other in others]
        rows.append([one, *(f"{sum(a < b for a, b in found)} of {len(found)}" for found in pairs)])
    return table(["lower in so many cells than", *others], rows)


def replay(runs: Iterable[dict[str, Any]]) -> str:
    """`3.11 → 3.12`: what those runs reach whose schedule was replayed, and what the replay reaches, in a table."""
    followed = [run for run in runs if REPLAYED in run]
    return " → ".join(mean_sd(metrics(followed, *path)) for path in ((), (REPLAYED,))) if followed else "–"


def ends(runs: Sequence[dict[str, Any]], names: Iterable[str] | None = None) -> str:
    """From the lowest to the highest seed, each recorded value of level 0 after the last step, or these, in a table.

    No mean: what is learned through its logarithm may lie decades apart.
    """
    recorded = runs[0]["courses"] if runs else ()
    labels = [label for label in recorded if label.startswith("0.") and (names is None or label.removeprefix("0.") in names)]
    values = [[run["courses"][label][-1] for run in runs] for label in labels]
    ranges = [["not finite"] if None in column else [f"{end:.3g}" for end in (min(column), max(column))] for column in values]
    return ", ".join(" to ".join(dict.fromkeys(found)) for found in ranges)


def courses(runs: Iterable[dict[str, Any]], name: str) -> list[tuple[list[float], list[float | None]]]:
    """A line for `band` from each run that recorded this hyperparameter."""
    return [(run["courses"]["step"], run["courses"][name]) for run in runs if name in run["courses"]]


def band(axes: Axes, lines: Iterable[tuple[Sequence[float], Sequence[float | None]]], top: float = math.inf, **look: Any) -> None:
    """The mean of lines, x and y, and a band from the lowest to the highest; a line that ends before the others is left out.

    Args:
        axes: where they are drawn.
        lines: a line for each seed.
        top: what is higher, or infinite, is drawn there.
        look: color, label and what else `plot` takes.
    """
    lines = list(lines)
    longest = max((len(x) for x, _ in lines), default=0)
    whole = [(x, y) for x, y in lines if len(x) == longest]
    if longest:
        xs, ys = whole[0][0], np.minimum(np.array([y for _, y in whole], dtype=float), top)
        (line,) = axes.plot(xs, ys.mean(0), **look)
        axes.fill_between(xs, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def mean_sd(values: Sequence[float]) -> str:
    """`3.11 ± 0.06` in a table; – without a run, "diverged" where one did."""
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "diverged"
    digits = ".2f" if max(values) < 1000 else ".1e"
    return f"{np.mean(values):{digits}}" + (f" ± {np.std(values, ddof=1):{digits}}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def against(axes: Axes, runs: Mapping[float, Sequence[dict[str, Any]]], top: float = math.inf, **look: Any) -> None:
    """The metric against where runs start, as `band` draws it; from each start the runs of all seeds."""
    at = [start for start, found in runs.items() if found]
    lines = zip(*(metrics(runs[start]) for start in at), strict=False)
    band(axes, [(at, line) for line in lines], top, marker="o", **look)


def finish(axes: Axes, fontsize: float = 7, **look: Any) -> None:
    """A grid, and a legend where a line has a label."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=fontsize, title_fontsize=fontsize, **look)


def decimal_ticks(axis: Axis) -> None:
    """Few and plain numbers on a logarithmic axis of one or two decades, 2.5 and not 2.5×10⁰."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7), numticks=30))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def publish(store: Store, text: str, draw: Callable[[Store, Path], None]) -> None:
    """Print a table, and write it and the figure beside the results.

    Raises:
        typer.BadParameter: there are no results.
    """
    if not store.runs:
        raise typer.BadParameter(f"{store.path} holds no runs: leave --figures out to make them", param_hint="--figures")
    store.path.with_suffix(".md").write_text(text)
    draw(store, store.path.with_suffix(".png"))
    print(text)


def cifar_app(
    script: str,
    epochs: int,
    plan: Callable[..., Mapping[str, Callable[[], dict[str, Any]]]],
    table: Callable[[Store], str],
    draw: Callable[[Store, Path], None],
) -> typer.Typer:
    """The command line of a script on CIFAR-10, with the networks of `models.CIFAR`.

    Args:
        script: its name, with which the names of its results begin.
        epochs: the default.
        plan: of the workload, the number of seeds, the folder of the logs and options of `train`: every run.
        table: the results in Markdown.
        draw: the figure.
    """

    def main(
        model: Annotated[str, typer.Option(help=f"one of {', '.join(models.CIFAR)}")] = "resnet20",
        images: Annotated[int, typer.Option(min=5, help="to train on, of 50,000; a fifth as many are tested on")] = 20_000,
        epochs: Annotated[int, typer.Option(min=1)] = epochs,
        seeds: Annotated[int, typer.Option(min=1)] = 2,
        steps: Steps = None,
        jobs: Jobs = 1,
        device: Device = "cpu",
        again: Again = None,
        out: Out = Path("experiments/results"),
        log: Log = Path("runs") / script,
        figures: Figures = False,
    ) -> None:
        """Run what is missing, print the table and draw the figure."""
        if model not in models.CIFAR:
            raise typer.BadParameter(f"{model!r} is none of {', '.join(models.CIFAR)}", param_hint="--model")
        torch.set_num_threads(1)
        workload = cifar10(model, images, epochs, steps)
        store = Store(out / f"{script}_{model}.json", title=workload.title, steps=workload.steps, seeds=seeds, device=device)
        store.forget(again or ())
        if not figures:
            # A test takes as long as a twelfth of an epoch.
            store.complete(plan(workload, seeds, log / model, evaluations=max(1, epochs // 10), device=device), jobs)
        publish(store, table(store), draw)

    # Plain click messages: an unknown model is one line, not a box.
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    return app
