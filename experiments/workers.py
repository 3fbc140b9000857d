"""Workers for the trials of a search: this process, several of this machine, or those of a Ray cluster.

complete(search, jobs=4)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from tqdm import tqdm

from experiments.trials import Search, Tally, load, tally, work


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
    import ray  # pyright: ignore[reportMissingImports]

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
