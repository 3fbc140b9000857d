"""Command lines of the scripts: common options, and a command that prints its errors on one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from experiments import models
from experiments.store import Store
from experiments.workloads import cifar10

RESULTS = Path("experiments/results")


def device(name: str) -> str:
    """The same; typer.BadParameter unless it is a device that this machine has."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise typer.BadParameter(f"{name!r} cannot be used here, give cpu, cuda or cuda:1: {reason}", param_hint="--device") from error
    return name


def folder(path: Path) -> Path:
    """The same; typer.BadParameter unless it is a folder that can be written to, or can be made."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file: give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{there} cannot be written to: give another folder")
    return path


Seeds = Annotated[int, typer.Option(min=1, help="number of seeds")]
Steps = Annotated[int | None, typer.Option(min=1, help="stop each run after this many steps, to try the script")]
Jobs = Annotated[int, typer.Option(min=1, help="number of processes, of one thread each")]
Device = Annotated[str, typer.Option(callback=device, help="cpu, cuda, …")]
Again = Annotated[list[str] | None, typer.Option(help="forget the runs whose key begins with this; may be repeated")]
Out = Annotated[Path, typer.Option(callback=folder, help="folder of the results")]
Log = Annotated[Path, typer.Option(callback=folder, help="folder of the TensorBoard logs, which has a folder for each run")]
Figures = Annotated[bool, typer.Option(help="only draw the figure and the table from existing results")]


def command(main: Callable[..., None]) -> typer.Typer:
    """The command line of a script; an invalid option is reported on one line, without a box or a traceback."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    return app


def publish(store: Store, text: str, draw: Callable[[Store, Path], None]) -> None:
    """Print the table of an experiment, and write it and the figure beside the results.

    Raises:
        typer.BadParameter: there are no results.
    """
    if not store.runs:
        raise typer.BadParameter(f"{store.path} holds no runs: leave --figures out to make them", param_hint="--figures")
    store.path.with_suffix(".md").write_text(text)
    draw(store, store.path.with_suffix(".png"))
    print(text)


def cifar_command(
    script: str,
    epochs: int,
    plan: Callable[..., Mapping[str, Callable[[], dict[str, Any]]]],
    table: Callable[[Store], str],
    draw: Callable[[Store, Path], None],
) -> typer.Typer:
    """The command line of a script that trains the networks of `models.CIFAR` on CIFAR-10.

    Args:
        script: name of the script; the names of its results begin with it.
        epochs: default number of epochs.
        plan: returns all runs by key, from the workload, the number of seeds, the folder of the logs and options of `training.train`.
        table: returns the results in Markdown.
        draw: draws the figure.
    """

    def main(
        model: Annotated[str, typer.Option(help=f"one of {', '.join(models.CIFAR)}")] = "resnet20",
        images: Annotated[int, typer.Option(min=5, help="training images, up to 50,000; a fifth as many test images are used")] = 20_000,
        epochs: Annotated[int, typer.Option(min=1)] = epochs,
        seeds: Seeds = 2,
        steps: Steps = None,
        jobs: Jobs = 1,
        device: Device = "cpu",
        again: Again = None,
        out: Out = RESULTS,
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
            # An evaluation takes as long as a twelfth of an epoch.
            store.complete(plan(workload, seeds, log / model, evaluations=max(1, epochs // 10), device=device), jobs)
        publish(store, table(store), draw)

    return command(main)


def problems_command(
    script: str,
    seeds: Mapping[str, int],
    plan: Callable[[list[str], int | None, str, Path], Mapping[str, Callable[[], dict[str, Any]]]],
    table: Callable[[Store], str],
    draw: Callable[[Store, Path], None],
    alone: Callable[[list[str], int | None, str], Mapping[str, Callable[[], dict[str, Any]]]] | None = None,
) -> typer.Typer:
    """The command line of a script that trains on several workloads.

    Args:
        script: name of the script, which its results have too.
        seeds: number of seeds of each workload, by name.
        plan: returns all runs by key, from the names of the workloads, the number of steps if not the protocol's, the device, and the
            folder of the logs.
        table: returns the results in Markdown.
        draw: draws the figure.
        alone: returns measurements that run after all others and one at a time, as times do, from the first three arguments of `plan`.
    """

    def main(
        workload: list[str] | None = None,
        steps: Annotated[int | None, typer.Option(min=1, help="steps of each run, in place of the protocol's")] = None,
        jobs: Jobs = 1,
        device: Device = "cpu",
        again: Again = None,
        out: Out = RESULTS,
        log: Log = Path("runs") / script,
        figures: Figures = False,
    ) -> None:
        """Run what is missing, print the table and draw the figure."""
        names = workload or list(seeds)
        if unknown := set(names) - set(seeds):
            raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(seeds)}", param_hint="--workload")
        torch.set_num_threads(1)
        store = Store(out / f"{script}.json", steps=steps, seeds=max(seeds.values()), device=device)
        store.forget(again or ())
        if not figures:
            store.complete(plan(names, steps, device, log), jobs)
            store.complete(alone(names, steps, device) if alone else {})
        publish(store, table(store), draw)

    # Not in the signature, where an annotation is text and cannot name what is local.
    only = typer.Option(help=f"only this one of {', '.join(seeds)}; may be repeated")
    main.__annotations__["workload"] = Annotated[list[str] | None, only]
    return command(main)
