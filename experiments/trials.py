"""Trials of a search, run by any number of workers on any number of machines, over Optuna's storage.

    search = Search(storage="runs/tune/journal.log", name="…", axes=SPACES["Adam"].all, objective=…, trials=16)
    complete(search, jobs=4)
    tally(load(search), search).feasible

Trial i is point i of a Sobol sequence, whoever runs it. Workers take the next point under a lock that is free again when its holder dies.
A worker that is killed stops the heartbeat of its trial: the trial is marked as failed, and its point is run once more. A point that was
lost twice, that diverged or that raised an error is infeasible, and another one follows at the end of the sequence, so that the points
depend on the seed and on nothing else.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import sqlalchemy
import torch
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat, get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from experiments.data import DataNotFoundError
from experiments.spaces import Axes, points

HEARTBEAT = 10  # seconds
MISSED = 3  # so many heartbeats of a worker that is taken for dead
ATTEMPTS = 2  # so many workers may die of a point
MOST = 4  # so many times the trials that are wanted are run at most to find enough that are feasible
KEY = 0x68797065  # of PostgreSQL's advisory lock: "hype"

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
    heartbeat: int = HEARTBEAT

    def point(self, i: int) -> dict[str, float]:
        """The i-th point."""
        return _points(tuple(self.axes.items()), self.seed, MOST * self.trials)[i]


@lru_cache(maxsize=8)
def _points(axes: tuple[Any, ...], seed: int, count: int) -> list[dict[str, float]]:
    return points(dict(axes), seed, count)


# ---- the storage


class Lock(BaseJournalFileLock):
    """A lock of the operating system. Optuna's own is a file, which stays for 30 seconds if its holder is killed."""

    def __init__(self, path: str) -> None:
        self._lock = FileLock(path + ".flock")

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class Journal(JournalStorage, BaseHeartbeat):
    """Optuna's journal with the heartbeat that Optuna keeps in databases only: the time of the last one, among a trial's attributes."""

    def __init__(self, path: str, heartbeat: int) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.heartbeat = heartbeat
        super().__init__(JournalFileBackend(path, Lock(path)))

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):  # others took it for dead
            self.set_trial_system_attr(trial_id, "heartbeat", time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        since = time.time() - MISSED * self.heartbeat
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return [trial._trial_id for trial in running if trial.system_attrs.get("heartbeat", 0.0) < since]

    def get_heartbeat_interval(self) -> int:
        return self.heartbeat

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


@lru_cache(maxsize=4)
def opened(storage: str, heartbeat: int = HEARTBEAT) -> Journal | RDBStorage:
    """The storage, once for each process."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in storage:
        return Journal(storage, heartbeat)
    return RDBStorage(storage, heartbeat_interval=heartbeat, grace_period=MISSED * heartbeat)


@contextmanager
def alone(storage: str) -> Iterator[None]:
    """Hold the lock under which points are handed out."""
    if "://" not in storage:
        with FileLock(storage + ".hand"):
            yield
        return
    database = opened(storage)
    assert isinstance(database, RDBStorage)
    with database.engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": KEY})
        yield


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


def work(search: Search, told: Callable[[optuna.Study], None] = lambda study: None) -> None:
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


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Leave on SIGTERM as on Ctrl-C, so that the trial under way is given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- all trials of a search


def complete(search: Search, jobs: int = 1, ray: str | None = None) -> Tally:
    """Run what is missing.

    Args:
        search: what is searched.
        jobs: number of workers, of one thread each; one alone works in this process.
        ray: the address of a Ray cluster whose processes are the workers, "auto" for the one of this machine; None: processes here.
    """
    study = load(search)
    with tqdm(total=search.trials, unit="trial", disable=None) as bar:  # None: shown on a terminal alone

        def show(study: optuna.Study) -> Tally:
            now = tally(study, search)
            bar.n = len(now.feasible)
            best = f"{now.best.values[0]:.4g}" if now.best else "none yet"
            bar.set_postfix(best=best, infeasible=len(now.infeasible))
            return now

        now = show(study)
        if now.finished:
            return now
        if ray:
            on_ray(search, jobs, ray, lambda: show(study))
        elif jobs == 1:
            with leaving_in_order():
                work(search, show)
        else:
            in_processes(search, jobs, lambda: show(study))
        return show(study)


def in_processes(search: Search, jobs: int, watch: Callable[[], Tally]) -> None:
    """Run trials in processes of this machine; one that is killed is replaced.

    Raises:
        RuntimeError: a worker ended with an error of its own.
    """
    context = multiprocessing.get_context("spawn")

    def started() -> Any:
        process = context.Process(target=_worker, args=(search,))
        process.start()
        return process

    workers = [started() for _ in range(jobs)]
    try:
        while not watch().finished:
            for i, worker in enumerate(workers):
                if worker.exitcode is not None and worker.exitcode > 0:
                    raise RuntimeError(f"a worker ended with status {worker.exitcode}; what it said is above")
                if worker.exitcode is not None and worker.exitcode < 0:
                    workers[i] = started()
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _worker(search: Search) -> None:
    with suppress(KeyboardInterrupt), leaving_in_order():
        work(search)


def on_ray(search: Search, jobs: int, address: str, watch: Callable[[], Any]) -> None:
    """Run trials in processes of a Ray cluster, which starts one that was killed anew.

    Every host needs the storage, the data sets and the packages; the code of hyperopt and of the experiments is sent to it.
    """
    import ray

    import experiments
    import hyperopt

    modules = [str(Path(str(package.__file__)).parent) for package in (hyperopt, experiments)]
    passed = {name: os.environ[name] for name in ("HYPEROPT_DATA", "OMP_WAIT_POLICY") if name in os.environ}
    ray.init(
        address=address,
        runtime_env={"py_modules": modules, "env_vars": {**passed, "OMP_NUM_THREADS": "1"}, "excludes": ["results", "__pycache__"]},
        log_to_driver=False,
    )
    try:
        left = [ray.remote(num_cpus=1, max_retries=-1)(work).remote(search) for _ in range(jobs)]
        while left:
            done, left = ray.wait(left, num_returns=len(left), timeout=0.5)
            ray.get(done)  # raises what a worker raised
            watch()
    finally:
        ray.shutdown()


@contextmanager
def ignored(category: type[Warning]) -> Iterator[None]:
    """Ignore warnings of a category."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
