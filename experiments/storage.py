"""Where the trials of a search are kept: Optuna's journal file or PostgreSQL, with a heartbeat, and locks that end with their holder."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import TrialState

HEARTBEAT = 10  # seconds
MISSED = 3  # so many heartbeats of a worker that is taken for dead
KEY = 0x68797065  # of PostgreSQL's advisory lock: "hype"


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

    def __init__(self, path: str, heartbeat: float) -> None:
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

    def get_heartbeat_interval(self) -> Any:  # Optuna's thread waits for so long, whole seconds or not
        return self.heartbeat

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


@lru_cache(maxsize=4)
def opened(storage: str, heartbeat: float = HEARTBEAT) -> Journal | RDBStorage:
    """The storage, once for each process."""
    if "://" not in storage:
        return Journal(storage, heartbeat)
    whole = math.ceil(heartbeat)
    # Alone: of two processes that make its tables at the same time one fails.
    with alone(storage), ignored(ExperimentalWarning):
        return RDBStorage(storage, heartbeat_interval=whole, grace_period=MISSED * whole)


@contextmanager
def alone(storage: str) -> Iterator[None]:
    """Hold the lock under which points are handed out."""
    if "://" not in storage:
        with FileLock(storage + ".hand"):
            yield
        return
    with _engine(storage).begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": KEY})
        yield


@lru_cache(maxsize=4)
def _engine(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url)


@contextmanager
def ignored(category: type[Warning]) -> Iterator[None]:
    """Ignore warnings of a category."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
