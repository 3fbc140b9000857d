"""Trials of a search, run by any number of workers on any number of machines, over Optuna's storage.

    search = Search(storage="runs/tune/journal.log", name="…", axes=SPACES["Adam"].all, objective=…, trials=16)
    work(search)                                    # in any number of processes, see workers.py
    tally(load(search), search).feasible

Trial i is point i of a Sobol sequence, whoever runs it. Workers take the next point under a lock that is free again when its holder dies.
A worker that is killed stops the heartbeat of its trial: the trial is marked as failed, and its point is run once more. A point that was
lost twice, that diverged or that raised an error is infeasible, and another one follows at the end of the sequence, so that the points
depend on the seed and on nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import optuna
import torch
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.data import DataNotFoundError
from experiments.spaces import Axes, points
from experiments.storage import HEARTBEAT, alone, ignored, opened

ATTEMPTS = 2  # so many workers may die of a point
MOST = 4  # so many times the trials that are wanted are run at most to find enough that are feasible

Objective = Callable[[dict[str, float]], Mapping[str, Any]]


@dataclass(frozen=True)
class Search:
    """What the workers need to know; it can be pickled if the objective can.

    Args:
        storage: the file of a journal, absolute, or the URL of a PostgreSQL database.
        name: of the study.
        axes: the space.
        objective: takes a point and returns `value`, which is None if the point is infeasible, and other entries to keep.
        trials: number of feasible trials.
        seed: of the points.
        heartbeat: seconds between two signs of life.
    """

    storage: str
    name: str
    axes: Axes
    objective: Objective
    trials: int
    seed: int = 0
    heartbeat: float = HEARTBEAT

    def point(self, i: int) -> dict[str, float]:
        """The i-th point."""
        return _points(tuple(self.axes.items()), self.seed, MOST * self.trials)[i]


@lru_cache(maxsize=8)
def _points(axes: tuple[Any, ...], seed: int, count: int) -> list[dict[str, float]]:
    return points(dict(axes), seed, count)


def load(search: Search) -> optuna.Study:
    """The study of this search; it is made if there is none."""
    return optuna.create_study(
        storage=opened(search.storage, search.heartbeat), study_name=search.name, direction="minimize", load_if_exists=True
    )


# ---- what has been run


class Tally(NamedTuple):
    """The points of a search up to the last one that is needed, by what has become of them; each with its last trial."""

    feasible: dict[int, FrozenTrial]
    infeasible: dict[int, FrozenTrial]
    busy: list[int]
    open: list[int]
    short: bool  # too few points are feasible

    @property
    def finished(self) -> bool:
        return not self.busy and not self.open

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial; of equals, that of the first point."""
        return min(self.feasible.values(), key=lambda trial: trial.values[0]) if self.feasible else None


def tally(study: optuna.Study, search: Search) -> Tally:
    """What has become of the points of a search."""
    return counted(study.get_trials(deepcopy=False), search.trials)


def counted(trials: Iterable[FrozenTrial], wanted: int) -> Tally:
    """The same from the trials. The points are the shortest beginning of the sequence in which as many as are wanted are feasible."""
    attempts: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        if "point" in trial.user_attrs:
            attempts.setdefault(trial.user_attrs["point"], []).append(trial)
    found = Tally({}, {}, [], [], False)
    i = 0
    while i < wanted + len(found.infeasible):
        if i == MOST * wanted:
            return found._replace(short=True)
        tried = attempts.get(i, [])
        of = {trial.state: trial for trial in tried}
        lost = [trial for trial in tried if trial.state == TrialState.FAIL and "left" not in trial.user_attrs]
        if TrialState.COMPLETE in of:
            found.feasible[i] = of[TrialState.COMPLETE]
        elif TrialState.PRUNED in of:
            found.infeasible[i] = of[TrialState.PRUNED]
        elif TrialState.RUNNING in of or TrialState.WAITING in of:
            found.busy.append(i)
        elif len(lost) >= ATTEMPTS:
            found.infeasible[i] = lost[-1]
        else:
            found.open.append(i)
        i += 1
    return found


# ---- workers


def work(search: Search, told: Callable[[optuna.Study], Any] = lambda study: None) -> None:
    """Run trials until there are enough; `told` is called after each."""
    torch.set_num_threads(1)
    study = load(search)
    while True:
        with alone(search.storage):
            trial, finished = hand_out(study, search)
        if finished:
            return
        if trial:
            run(study, search, trial)
        else:  # others are at the last points: one of them may die, or its point may be infeasible
            time.sleep(min(0.5, search.heartbeat / 10))
        told(study)


def hand_out(study: optuna.Study, search: Search) -> tuple[Trial | None, bool]:
    """The next trial to run, if there is one, and whether all are finished. Only under the lock."""
    with ignored(ExperimentalWarning):
        optuna.storages.fail_stale_trials(study)
    now = tally(study, search)
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if now.finished or not (now.open or waiting):
        return None, now.finished
    if not waiting:  # otherwise a worker was killed between the next two lines
        study.enqueue_trial(search.point(now.open[0]), user_attrs={"point": now.open[0]})
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    # Before it runs: Optuna never finds a trial that had no heartbeat.
    study._storage.record_heartbeat(waiting[0]._trial_id)  # pyright: ignore[reportAttributeAccessIssue]
    with ignored(UserWarning):  # that ask is not for storages with a heartbeat: `run` keeps it up
        return study.ask(), False


def run(study: optuna.Study, search: Search, trial: Trial) -> None:
    """Run one trial and tell its result, unless it was taken for dead meanwhile: then it is run again, and that result counts."""
    with suppress(UpdateFinishedTrialError):
        point = {name: trial.suggest_float(name, axis.low, axis.high, log=axis.log) for name, axis in search.axes.items()}
        with get_heartbeat_thread(trial._trial_id, study._storage):
            try:
                found = outcome(search.objective, point)
            except BaseException:
                with suppress(UpdateFinishedTrialError):
                    trial.set_user_attr("left", True)  # not lost: any worker may begin it again at once
                    study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                raise
        value = found.pop("value")
        for name, entry in found.items():
            trial.set_user_attr(name, entry)
        feasible = value is not None and math.isfinite(value)
        study.tell(trial, value if feasible else None, None if feasible else TrialState.PRUNED, skip_if_finished=True)


def outcome(objective: Objective, point: dict[str, float]) -> dict[str, Any]:
    """What the objective returns; a point at which it raises an error is infeasible."""
    try:
        return dict(objective(point))
    except DataNotFoundError:  # no matter of the point
        raise
    except Exception as error:  # whatever a diverging run raises
        return {"value": None, "reason": repr(error)[:300]}
