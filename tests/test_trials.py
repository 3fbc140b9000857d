"""Searches by several workers that are killed, on a journal, on PostgreSQL and on Ray: nothing is lost, and nothing counts twice."""

import getpass
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from experiments import storage, trials, tune, workers
from experiments.spaces import Axis
from experiments.trials import Search

FORK = multiprocessing.get_context("fork")  # to import torch takes seconds
AXES = {"x": Axis(1e-3, 1.0), "y": Axis(-1.0, 1.0, log=False)}


def closed_form(point):
    return (math.log10(point["x"]) + 1) ** 2 + point["y"] ** 2


def quick(point, seconds=0.0, where=None, poison=None, infeasible=lambda point: False):
    """A trial: notes its process in `where` while it runs; `poison` is a value of y at which its worker is killed."""
    note = where and Path(where) / str(os.getpid())
    if note:
        note.touch()
    time.sleep(seconds)
    if point["y"] == poison:
        os.kill(os.getpid(), signal.SIGKILL)
    if note:
        note.unlink()
    if infeasible(point):
        raise FloatingPointError("no finite loss")
    return {"value": closed_form(point), "pid": os.getpid()}


def positive(point):
    return point["y"] > 0


def worker(search):
    """Another process that runs trials; what it inherits from this one it does not use."""

    def run():
        storage.opened.cache_clear()
        storage._engine.cache_clear()
        trials.work(search)

    process = FORK.Process(target=run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which the child uses none
        process.start()
    return process


def together(search, count):
    processes = [worker(search) for _ in range(count)]
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that never ends has None
        process.join()
    return codes


def all_trials(search):
    return trials.load(search).get_trials()


@pytest.fixture
def search(tmp_path):
    found = Search(str(tmp_path / "journal.log"), "s", AXES, quick, trials=8, heartbeat=0.3)
    found.point(0)  # processes inherit what this imports
    return found


def but(search, **changes):
    return Search(**{**vars(search), **changes})


def outcomes(search):
    """Of each point: the values, the metric and whether it was feasible; that every trial is of one is checked on the way."""
    tally = trials.tally(trials.load(search), search)
    assert tally.finished
    assert len(tally.feasible) == search.trials
    everything = tally.feasible | tally.infeasible
    assert sorted(everything) == list(range(len(everything)))
    for i, trial in everything.items():
        assert trial.params == pytest.approx(search.point(i))
    for trial in tally.feasible.values():
        assert trial.values == [pytest.approx(closed_form(trial.params))]
    told = Counter(t.user_attrs["point"] for t in all_trials(search) if t.state in (TrialState.COMPLETE, TrialState.PRUNED))
    assert max(told.values()) == 1, "a point was run twice to the end"
    return {i: (trial.params, trial.values, i in tally.feasible) for i, trial in everything.items()}


# ---- who runs which point


def test_one_worker_and_four_run_the_same_trials(search, tmp_path):
    search = but(search, objective=partial(quick, infeasible=positive))
    four = but(search, storage=str(tmp_path / "four.log"), objective=partial(quick, seconds=0.02, infeasible=positive))
    assert together(four, 4) == [0] * 4
    trials.work(search)
    assert outcomes(four) == outcomes(search)
    pids = {t.user_attrs["pid"] for t in all_trials(four) if t.state == TrialState.COMPLETE}
    assert len(pids) > 1, "one worker did everything: the comparison says nothing"
    other = but(search, name="other seed", seed=1)
    assert other.point(0) != search.point(0)


def test_infeasible_trials_are_counted_and_replaced(search):
    search = but(search, objective=partial(quick, infeasible=positive))
    trials.work(search)
    found = outcomes(search)
    bad = [i for i, (params, _, feasible) in found.items() if not feasible]
    assert bad == [i for i in range(len(found)) if search.point(i)["y"] > 0]
    assert len(bad) >= 4
    assert found[len(found) - 1][2], "the sequence goes on beyond the last trial that was needed"
    reasons = {t.user_attrs["reason"] for t in all_trials(search) if t.state == TrialState.PRUNED}
    assert reasons == {"FloatingPointError('no finite loss')"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_not_finite_is_infeasible_and_the_search_ends(search, value):
    search = but(search, objective=lambda point: {"value": value}, trials=3)
    trials.work(search)
    tally = trials.tally(trials.load(search), search)
    assert tally.short
    assert tally.finished
    assert tally.best is None
    assert len(tally.infeasible) == len(all_trials(search)) == 3 * trials.MOST


def test_more_trials_are_added_and_fewer_are_the_first(search):
    trials.work(search)
    before = outcomes(search)
    more = but(search, trials=12)
    trials.work(more)
    after = outcomes(more)
    assert len(all_trials(search)) == 12
    assert {i: after[i] for i in before} == before == outcomes(search)


# ---- workers that leave, die and join


def interrupt(point):
    raise KeyboardInterrupt


def test_an_interrupted_study_can_be_read_and_continued_at_once(search):
    trials.work(but(search, trials=3))
    with pytest.raises(KeyboardInterrupt):
        trials.work(but(search, objective=interrupt, heartbeat=1000))
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(search.storage))
    study = optuna.load_study(study_name="s", storage=journal)
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 3 + [TrialState.FAIL]
    assert study.best_value == pytest.approx(min(closed_form(search.point(i)) for i in range(3)))
    trials.work(search)  # nobody waits for a heartbeat: the trial was given back
    assert len(outcomes(search)) == 8
    for _ in range(trials.ATTEMPTS):
        with pytest.raises(KeyboardInterrupt):
            trials.work(but(search, objective=interrupt, trials=9))
    trials.work(but(search, trials=9))
    assert outcomes(but(search, trials=9))[8][2], "an interrupted trial was taken for a lost one"


def test_a_point_that_kills_its_workers_is_run_twice_then_failed_and_replaced(search):
    search = but(search, trials=4)
    deadly = but(search, objective=partial(quick, poison=search.point(1)["y"]))
    assert together(deadly, 1) == [-signal.SIGKILL]
    running = [t for t in all_trials(search) if t.state == TrialState.RUNNING]
    assert [t.user_attrs["point"] for t in running] == [1]
    assert sorted(together(deadly, 2)) == [-signal.SIGKILL, 0]
    found = outcomes(search)
    assert [i for i, each in found.items() if not each[2]] == [1]
    assert sorted(found) == [0, 1, 2, 3, 4]
    lost = [t for t in all_trials(search) if t.state == TrialState.FAIL]
    assert [t.user_attrs["point"] for t in lost] == [1, 1]
    assert lost[0].params == lost[1].params == pytest.approx(search.point(1))


def test_a_worker_that_was_taken_for_dead_does_not_count(search):
    """Its trial is run again meanwhile; its own result comes too late and is dropped."""

    def slow(point):
        others = trials.load(search)
        trial = next(t for t in others.get_trials() if t.state == TrialState.RUNNING)
        others.tell(trial.number, state=TrialState.FAIL)  # as another worker does that saw no heartbeat
        time.sleep(0.2)  # in which it goes on to give signs of life
        return {"value": -1.0, "pid": os.getpid()}

    search = but(search, heartbeat=0.05)
    study = trials.load(search)
    trial, _ = trials.hand_out(study, search)
    trials.run(study, but(search, objective=slow), trial)
    trials.work(search)
    outcomes(search)
    assert [t.user_attrs["point"] for t in all_trials(search)] == [0, 0, *range(1, 8)]


def test_a_worker_killed_while_it_took_a_point_loses_nothing(search):
    study = trials.load(search)
    study.enqueue_trial(search.point(0), user_attrs={"point": 0})  # and nothing more
    trials.work(search)
    assert len(outcomes(search)) == len(all_trials(search)) == 8


def test_the_heartbeat_keeps_a_long_trial_alive(search):
    search = but(search, trials=1, heartbeat=0.1, objective=partial(quick, seconds=1.0))
    assert together(search, 2) == [0, 0]
    assert [t.state for t in all_trials(search)] == [TrialState.COMPLETE]


def killed_at_random(search, folder, workers, kills, seed=0):
    """Run a search to its end while workers are killed in the middle of trials, and others join."""
    draw = random.Random(seed)
    folder.mkdir()
    search = but(search, objective=partial(quick, seconds=0.1, where=str(folder)))
    crew = [worker(search) for _ in range(workers)]
    for _ in range(kills):
        victim = draw.choice(crew)
        while victim.is_alive() and not (folder / str(victim.pid)).exists():
            time.sleep(0.001)
        victim.kill()
        victim.join()
        crew[crew.index(victim)] = worker(search)
    for each in crew:
        each.join()
        assert each.exitcode == 0
    outcomes(search)
    states = Counter(t.state for t in all_trials(search))
    assert states.keys() <= {TrialState.COMPLETE, TrialState.FAIL}
    assert 1 <= states[TrialState.FAIL] <= kills


def test_workers_killed_at_random_on_the_journal(search, tmp_path):
    killed_at_random(but(search, trials=12), tmp_path / "notes", workers=3, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_workers_killed_at_random_on_the_journal(search, tmp_path, seed):
    killed_at_random(but(search, trials=64), tmp_path / "notes", workers=4, kills=12, seed=seed)


def sleepy(point):
    """As `quick`, from a module that a new process can import."""
    time.sleep(0.2)
    return {"value": closed_form(point)}


@pytest.mark.slow
def test_a_killed_process_of_this_machine_is_replaced(search):
    search = but(search, objective=sleepy, trials=24)
    seen = []

    def watch():
        now = trials.tally(trials.load(search), search)
        children = multiprocessing.active_children()
        if len(now.feasible) > 3 and len(seen) < 2:
            seen.append(children[0].pid)
            children[0].kill()
        return now

    workers.in_processes(search, 2, watch)
    outcomes(search)
    assert len(seen) == 2


# ---- PostgreSQL


def binaries():
    """The folder of initdb and pg_ctl; None if PostgreSQL is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a server in a folder of its own."""
    folder = binaries()
    if folder is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    root = Path(tempfile.mkdtemp(prefix="hyperopt-pg-"))  # pytest's own folders are closed to other users
    user = getpass.getuser()
    asked = []
    if os.geteuid() == 0:  # as whom it refuses to run
        user = "postgres"
        shutil.chown(root, user)
        asked = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(*command):
        subprocess.run([*asked, *command], cwd=root, check=True, capture_output=True, text=True)

    call(folder / "initdb", "-D", root / "data", "-A", "trust", "-U", "tester", "--no-sync")
    options = f"-c listen_addresses= -c unix_socket_directories={root} -c port={port} -c fsync=off"
    call(folder / "pg_ctl", "-D", root / "data", "-o", options, "-l", root / "log", "-w", "start")
    try:
        yield f"postgresql+psycopg2://tester@/postgres?host={root}&port={port}"
    finally:
        storage.opened.cache_clear()
        storage._engine.cache_clear()
        call(folder / "pg_ctl", "-D", root / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_workers_killed_at_random_on_postgresql(search, tmp_path, postgresql, seed):
    killed_at_random(but(search, storage=postgresql, name=f"killed {seed}", trials=32), tmp_path / "notes", workers=4, kills=8, seed=seed)


@pytest.mark.slow
def test_one_worker_and_four_run_the_same_trials_on_postgresql(search, postgresql):
    search = but(search, objective=partial(quick, infeasible=positive), trials=16)
    four = but(search, storage=postgresql, objective=partial(quick, seconds=0.05, infeasible=positive))
    assert together(four, 4) == [0] * 4
    trials.work(search)
    assert outcomes(four) == outcomes(search)


@pytest.mark.slow
def test_a_point_that_kills_its_workers_is_failed_on_postgresql(search, postgresql):
    search = but(search, storage=postgresql, name="deadly", trials=4)
    deadly = but(search, objective=partial(quick, poison=search.point(1)["y"]))
    assert together(deadly, 1) == [-signal.SIGKILL]
    assert together(deadly, 1) == [-signal.SIGKILL]
    assert together(deadly, 1) == [0]
    assert [i for i, each in outcomes(search).items() if not each[2]] == [1]


@pytest.mark.slow
def test_the_command_on_postgresql(postgresql, tmp_path):
    url = postgresql.replace("+psycopg2", "")  # SQLAlchemy's own choice of a driver is another one
    arguments = ["--rule", "SGD", "--trials", "3", "--steps", "3", "--storage", url, "--out", str(tmp_path)]
    for _ in range(2):
        outcome = CliRunner().invoke(tune.app, arguments)
        assert outcome.exit_code == 0, outcome.output
        assert "3 feasible trials of 3" in outcome.output
    study = optuna.load_study(study_name="digits | SGD | all | 0", storage=postgresql)
    assert len(study.trials) == 3
    assert not (tmp_path / "journal.log").exists()


# ---- Ray


def dies_once(point, folder):
    """As `quick`, but the first worker of point 0 is killed."""
    mark = Path(folder) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": closed_form(point)}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray's own
def test_a_local_ray(search, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    search = but(search, objective=partial(dies_once, folder=str(tmp_path)), trials=6)
    tally = workers.complete(search, jobs=2, ray="local")
    assert tally.finished
    outcomes(search)
    assert [t.user_attrs["point"] for t in all_trials(search) if t.state == TrialState.FAIL] == [0]
