"""Results of many runs in one JSON file, which is written after every run: a script that was stopped continues where it was.

store = Store(Path("results/x.json"), title="…", seeds=3)
store.complete({"SGD | 0": partial(train, workload, "SGD(lr=0.01) / Adam", 0), …}, jobs=2)
store.runs["SGD | 0"]["metric"], store.seeds("SGD"), store.caption()
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from experiments import data, pool, provenance

Tasks = Mapping[str, Callable[[], dict[str, Any]]]


class Store:
    """The runs of an experiment by key, with where they come from.

    Args:
        path: the JSON file; the runs that it holds are kept.
        protocol: what all runs have in common.

    Raises:
        typer.BadParameter: the file holds runs of another protocol.
    """

    def __init__(self, path: Path, **protocol: Any) -> None:
        self.path = path
        self.result: dict[str, Any] = {**provenance.stamp(), "protocol": protocol, "runs": {}}
        if path.exists():
            self.result = read(path)
            if self.result["protocol"] != json.loads(json.dumps(protocol)):
                raise typer.BadParameter(f"{path} holds runs of {self.result['protocol']}, not of {protocol}", param_hint="--out")

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The result of each run, by key."""
        return self.result["runs"]

    def complete(self, tasks: Tasks, jobs: int = 1) -> None:
        """`run_missing` for the results of this store."""
        run_missing(self.result, self.path, tasks, jobs)

    def forget(self, prefixes: Iterable[str]) -> None:
        """Drop the runs whose key begins with one of these; typer.BadParameter for one that none of the runs begins with."""
        for prefix in prefixes if self.runs else ():
            if not any(key.startswith(prefix) for key in self.runs):
                remedy = f"give the beginning of a key, such as {next(iter(self.runs))!r}"
                raise typer.BadParameter(f"no run in {self.path} begins with {prefix!r}: {remedy}", param_hint="--again")
        for key in [key for key in self.runs if key.startswith(tuple(prefixes))]:
            del self.runs[key]

    def metrics(self, keys: Iterable[str], *path: str) -> list[float]:
        """`metrics` of the runs with these keys; keys without a run are left out."""
        return metrics((self.runs[key] for key in keys if key in self.runs), *path)

    def seeds(self, name: str) -> list[dict[str, Any]]:
        """The existing runs among `name | 0`, `name | 1`, …, for the number of `seeds` in the protocol."""
        keys = [f"{name} | {seed}" for seed in range(self.result["protocol"]["seeds"])]
        return [self.runs[key] for key in keys if key in self.runs]

    def caption(self) -> str:
        """The commands, machines and commits of the runs, on one line."""
        return provenance.caption(self.result)


def run_missing(result: dict[str, Any], path: Path, tasks: Tasks, jobs: int = 1, indent: int | None = None) -> None:
    """Run the tasks that have no entry in `result["runs"]`, and write the file after each of them.

    Args:
        result: changed in place; each new run gets the machine, the torch version and the commit of this process.
        path: the JSON file of `result`; its folder is created.
        tasks: callables by the key of their run.
        jobs: number of processes, see `pool.execute`.
        indent: of the file.

    Raises:
        typer.BadParameter: a data set is missing.
    """
    origin = provenance.origin()
    missing = {key: task for key, task in tasks.items() if key not in result["runs"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for key, run in tqdm(
            pool.execute(missing, jobs), total=len(missing), unit="run", disable=None if missing else True
        ):  # None: shown on a terminal alone
            result["runs"][key] = {**run, **origin}
            write(result, path, indent)
    except data.DataNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="data") from error


def read(path: Path) -> dict[str, Any]:
    """The results in a JSON file; typer.BadParameter if it holds none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be read, move it away or give another folder: {error}", param_hint="--out") from error
    if not isinstance(result, dict):
        raise typer.BadParameter(f"{path} holds no results: move it away or give another folder", param_hint="--out")
    return result


def write(result: Mapping[str, Any], path: Path, indent: int | None = None) -> None:
    """Write a JSON file atomically: an interruption leaves the old file intact."""
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(result, indent=indent) + "\n")
    new.replace(path)


def metrics(runs: Iterable[dict[str, Any]], *path: str) -> list[float]:
    """The metric of each run, infinite if it was not finite.

    Args:
        runs: results of `training.train`.
        path: keys that lead to the second run whose metric is meant, such as REPLAYED; a run without it is left out.
    """
    found = list(runs)
    for name in path:
        found = [run[name] for run in found if name in run]
    return [math.inf if run["metric"] is None else run["metric"] for run in found]
