"""Tune all hyperparameters of a rule on a workload, after Choi et al. (2019, arXiv 1910.05446), by any number of workers.

    python -m experiments.tune --workload digits --rule Adam --trials 16 --out runs/tune      resumes if it was stopped

The points are those of a scrambled Sobol sequence in the rule's space (spaces.py). A trial trains on them from the same initial weights on
the same batches, without the held-out part of the training data, on which it is measured and the best trial is chosen. Trials that diverge
or fail are counted and replaced. Workers of this machine (--jobs), of others (the same command with --storage) and of a Ray cluster (--ray)
share the trials through Optuna's storage (trials.py, storage.py, workers.py).

Writes <study>.json, .csv, .md (the table) and .png to --out, whose journal.log holds the study unless --storage is given.
"""

from __future__ import annotations

import csv
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import optuna
import sqlalchemy
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sqlalchemy.exc import SQLAlchemyError
from torch import nn

from experiments import cli, data, plots, provenance, spaces, store, tables, training, trials, workers
from experiments.bootstrap import best_of
from experiments.storage import HEARTBEAT, MISSED, opened
from experiments.store import Store
from experiments.trials import Search, Tally
from experiments.workloads import SMALL, WORKLOADS, Workload
from hyperopt import Hyper, HyperOptimizer

PROBLEMS = SMALL | WORKLOADS
JOURNAL = "journal.log"


# ---- one trial


def bound(tower: Hyper, model: nn.Module) -> list[HyperOptimizer]:
    """The optimizer of a rule, as a `make` of `training.train`; Muon reads from the model which tensors are hidden matrices."""
    return [tower.bind(model)]


def train(workload: Workload, space: spaces.Space, device: str, point: Mapping[str, float], commit: str = "unknown") -> dict[str, Any]:
    """One trial: `value`, the metric on validation data, None if it is not finite; `test`; the hyperparameters; steps and seconds.

    `commit` is that of the code, which a worker of Ray cannot find out.
    """
    tower = space.tower(point)
    found = training.train(workload, partial(bound, tower), 0, validation=True, tested=True, device=device)
    kept = {name: found[name] for name in ("test", "steps", "seconds")}
    return {"value": found["metric"], **kept, "rule": str(tower), **provenance.origin(), "commit": commit}


# ---- a study


def search(
    workload: Workload,
    rule: str,
    trials_: int,
    *,
    storage: str,
    only: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    heartbeat: int = HEARTBEAT,
) -> Search:
    """The search for the values of a rule on a workload; ValueError if there is no such rule or hyperparameter."""
    space = spaces.named(rule)
    axes = space.axes(only)
    name = " | ".join([workload.name, rule, " ".join(only) or "all", str(seed)])
    objective = partial(train, workload, space, device, commit=provenance.origin()["commit"])
    return Search(storage, name, axes, objective, trials_, seed, heartbeat)


def protocol(workload: Workload, rule: str, found: Search) -> dict[str, Any]:
    """What all trials of a study have in common."""
    axes = {name: [axis.low, axis.high, "log" if axis.log else "linear"] for name, axis in found.axes.items()}
    text = spaces.named(rule).text
    return {"workload": workload.title, "metric": workload.metric, "steps": workload.steps, "rule": text, "axes": axes, "seed": found.seed}


def agree(study: optuna.Study, common: Mapping[str, Any]) -> None:
    """Write down what the trials of a study have in common; ValueError if there are trials of another protocol."""
    before = study.user_attrs.get("protocol")
    if before is None:
        study.set_user_attr("protocol", dict(common))
    elif before != dict(common):
        differing = [name for name in common if before.get(name) != common[name]]
        raise ValueError(f"the study {study.study_name!r} holds trials with another {', '.join(differing)}")


def rows(found: Tally) -> dict[str, dict[str, Any]]:
    """The trials by point, for JSON."""
    each = {}
    for i, trial in sorted((found.feasible | found.infeasible).items()):
        value = trial.values[0] if i in found.feasible else None
        reason = {} if i in found.feasible else {"reason": trial.user_attrs.get("reason", reason_of(trial))}
        kept = {name: entry for name, entry in trial.user_attrs.items() if name not in ("point", "reason")}
        each[str(i)] = {"point": trial.params, "metric": value, **kept, **reason}
    return each


def reason_of(trial: optuna.trial.FrozenTrial) -> str:
    """Why a trial that raised no error is infeasible."""
    return "diverged" if trial.state == optuna.trial.TrialState.PRUNED else f"{trials.ATTEMPTS} workers died of it"


def feasible(runs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The feasible trials, in the order of their points."""
    return [run for run in runs.values() if run["metric"] is not None]


# ---- table and figure


def text(results: Store, borders: Callable[[Mapping[str, float]], list[str]]) -> str:
    """What was found, in Markdown."""
    common, runs = results.result["protocol"], results.runs
    good = feasible(runs)
    lines = [
        f"{common['workload']}; {common['rule']}: {len(good)} feasible trials of {len(runs)}, seed {common['seed']}. "
        f"Validation {common['metric']}.\n"
    ]
    if not good:
        return "\n".join([*lines, "No trial is feasible: the space is too wide, or the rule fails.", ""])
    best = min(good, key=lambda run: run["metric"])
    curve = best_of([run["metric"] for run in good])
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, len(good)) if k <= len(good)})
    cells = [[str(k), *(f"{column[k - 1]:.2f}" for column in curve)] for k in ks]
    return "\n".join(
        [
            *lines,
            tables.markdown(["best of", "mean", "5th percentile", "95th percentile"], cells),
            f"- Best: `{best['rule']}`, validation {best['metric']:.2f}, test {number(best['test'])}.",
            *(f"- Border: {line}." for line in borders(best["point"]) or ["the best trial is inside the space, away from its ends"]),
            *(f"- Infeasible: point {i}: `{run['reason']}`." for i, run in runs.items() if run["metric"] is None),
            "",
        ]
    )


def number(value: float | None) -> str:
    """A metric in a sentence."""
    return "not finite" if value is None else f"{value:.2f}"


def write_csv(results: Store, path: Path) -> None:
    """All trials as a table; a number that is missing is an empty cell."""
    axes = results.result["protocol"]["axes"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", *axes, "rule", "validation", "test", "seconds", "reason"])
        for i, run in results.runs.items():
            rest = [run.get(name) for name in ("rule", "metric", "test", "seconds", "reason")]
            writer.writerow([i, *(run["point"].get(name) for name in axes), *("" if cell is None else cell for cell in rest)])


def draw(results: Store, path: Path) -> None:
    """Draw the best of K against K, and the trials along each axis."""
    common, good = results.result["protocol"], feasible(results.runs)
    axes = common["axes"]
    columns = min(4, len(axes) + 1)
    lines = -(-(len(axes) + 1) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.8 + 2.8 * lines), layout="constrained")
    first, *others = figure.subplots(lines, columns, squeeze=False).ravel()
    if good:
        draw_curve(first, [run["metric"] for run in good], color="C0")
    first.set(xlabel="K", ylabel=f"validation {common['metric']}", title="best of K trials")
    plots.finish(first)
    for each, (name, (low, high, scale)) in zip(others, axes.items(), strict=False):
        each.plot([run["point"][name] for run in good], [run["metric"] for run in good], ".")
        each.set(xscale=scale, xlim=(low, high), xlabel=name)
        plots.finish(each)
    for each in others[len(axes) :]:
        each.axis("off")
    figure.suptitle(f"{common['workload']}; {common['rule']}: {len(good)} trials", fontsize=10)
    figure.supxlabel(provenance.caption(results.result, 50 * columns), fontsize=6)
    figure.savefig(path, dpi=100)


def draw_curve(axes: Axes, metrics: Sequence[float], shade: float = 0.2, **line_style: Any) -> None:
    """Draw the mean of the best of K with a band from the 5th to the 95th percentile."""
    curve = best_of(metrics)
    ks = range(1, len(metrics) + 1)
    (line,) = axes.plot(ks, curve.mean, **line_style)
    axes.fill_between(ks, curve.low, curve.high, color=line.get_color(), alpha=shade, linewidth=0)


# ---- command line


def checked_storage(url: str | None) -> str | None:
    """The same with a driver; typer.BadParameter unless it is the URL of a PostgreSQL database that answers."""
    if url is None:
        return None
    remedy = "give postgresql://user:password@host/database, or leave it out for a journal in --out"
    shown = url
    try:
        parsed = sqlalchemy.make_url(url)
        shown = str(parsed)  # without the password
        if parsed.get_backend_name() != "postgresql":
            raise typer.BadParameter(f"{shown!r} is no PostgreSQL database: {remedy}", param_hint="--storage")
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg2")  # which the extra tune installs
        sqlalchemy.create_engine(parsed).connect().close()
    except ImportError as error:
        raise typer.BadParameter(f"{shown!r} needs a driver: pip install psycopg2-binary ({error})", param_hint="--storage") from error
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise typer.BadParameter(f"{shown!r} cannot be used: {reason}: {remedy}", param_hint="--storage") from error
    return parsed.render_as_string(hide_password=False)


def checked_ray(address: str | None) -> str | None:
    """The same; typer.BadParameter unless Ray is installed and something answers at the address. Ray itself would try for ever."""
    if address is None:
        return None
    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            remedy = "give auto, local (a cluster of this machine alone), or host:port of the head of a cluster"
            raise typer.BadParameter(f"{address!r} does not answer: {error}: {remedy}", param_hint="--ray") from error
    if find_spec("ray") is None:
        raise typer.BadParameter(f"{address!r} needs Ray: pip install ray", param_hint="--ray")
    return address


def checked_trials(count: int) -> int:
    """The same; typer.BadParameter unless it is at least 1."""
    if count < 1:
        raise typer.BadParameter(f"{count} trials are too few: give at least 1", param_hint="--trials")
    return count


def chosen_workload(name: str, steps: int | None = None) -> Workload:
    """The workload of this name, cut to fewer steps if they are given."""
    if name not in PROBLEMS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(PROBLEMS)}", param_hint="--workload")
    found = PROBLEMS[name]
    return replace(found, steps=steps, title=f"{found.title}, only {steps} steps of it") if steps else found


def readable(workload: Workload, device: str = "cpu") -> None:
    """Read the data once; typer.BadParameter if they are missing."""
    try:
        next(workload.batches(0, device, validation=True))
    except data.DataNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="data") from error


Trials = Annotated[int, typer.Option("--trials", callback=checked_trials, help="number of feasible trials of a rule, best a power of two")]
Storage = Annotated[str | None, typer.Option(callback=checked_storage, help="URL of a PostgreSQL database; default: a journal in --out")]
Ray = Annotated[str | None, typer.Option(callback=checked_ray, help="address of a Ray cluster, auto for the one of this machine")]
Heartbeat = Annotated[int, typer.Option(min=1, help=f"seconds between signs of life; a worker is dead after {MISSED} without one")]


def main(
    workload: Annotated[str, typer.Option(help=f"one of {', '.join(PROBLEMS)}")] = "digits",
    rule: Annotated[str, typer.Option(help=f"one of {', '.join(spaces.SPACES)}, or the text of any other rule")] = "Adam",
    trials_: Trials = 16,
    only: Annotated[list[str] | None, typer.Option(help="only this hyperparameter; may be repeated")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="of the points")] = 0,
    steps: cli.Steps = None,
    jobs: cli.Jobs = 1,
    device: cli.Device = "cpu",
    storage: Storage = None,
    ray: Ray = None,
    heartbeat: Heartbeat = HEARTBEAT,
    resume: Annotated[bool, typer.Option(help="go on with the trials that are there; otherwise they are deleted")] = True,
    out: Annotated[Path, typer.Option(callback=cli.folder, help="folder of the study and its summary")] = Path("runs/tune"),
    figures: cli.Figures = False,
) -> None:
    """Run the trials that are missing, print the table and draw the figure."""
    problem = chosen_workload(workload, steps)
    try:
        found = search(
            problem,
            rule,
            trials_,
            storage=storage or str(out.absolute() / JOURNAL),
            only=only or (),
            seed=seed,
            device=device,
            heartbeat=heartbeat,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only" if "is not searched" in str(error) else "--rule") from error
    torch.set_num_threads(1)
    common = protocol(problem, rule, found)
    path = out / f"{training.slug(found.name)}.json"
    if not resume and not figures:
        path.unlink(missing_ok=True)
    results = Store(path, **common)
    if not figures:
        readable(problem, device)
        tally = tuned(found, common, resume=resume, jobs=jobs, ray=ray)
        if tally.short:
            print(f"Only {len(tally.feasible)} of {trials.MOST * trials_} trials are feasible: narrow the space, or look at the reasons.")
        results.result["runs"] = rows(tally)
        store.write(results.result, path)
        write_csv(results, path.with_suffix(".csv"))
    cli.publish(results, text(results, partial(spaces.named(rule).borders, found.axes)), draw)


def tuned(found: Search, common: Mapping[str, Any], *, resume: bool = True, jobs: int = 1, ray: str | None = None) -> Tally:
    """Run what is missing of a search; typer.BadParameter if its study is of another protocol."""
    if not resume and found.name in optuna.get_all_study_names(opened(found.storage, found.heartbeat)):
        optuna.delete_study(study_name=found.name, storage=opened(found.storage, found.heartbeat))
    try:
        agree(trials.load(found), common)
    except ValueError as error:
        raise typer.BadParameter(f"{error}: choose another --out or --storage, or --no-resume", param_hint="--out") from error
    try:
        return workers.complete(found, jobs, ray)
    except ConnectionError as error:  # of "auto"
        raise typer.BadParameter(
            f"{ray!r}: no Ray cluster is running here: begin one with `ray start --head`", param_hint="--ray"
        ) from error


app = cli.command(main)

if __name__ == "__main__":
    app()
