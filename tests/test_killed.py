"""A run that is killed at any moment, and started again, ends bit for bit where one ends that was left alone."""

import multiprocessing
import random
import time

import pytest
import torch
from small import differences, net, train

from hyperopt import Hyper

TOWERS = [
    "Adam / Adam / SGD",
    "Adam(learn=all, weight_decay=0.01) / Adam",
    "Adam / {lr: Adam / SGD, beta1: SGD(lr=0.1)}",
    "Adam(learn=(lr, beta1), per=tensor) / Adam",
    "SGD(lr=0.01, per=coordinate) / SGD",
    "ScheduleFree(Adam) / Adam",
    "Averaged(Adam)(learn=(lr, decay)) / Adam",
    "(Muon | Adam) / Adam",
    "Adam",
    "SGD(lr=0.01, momentum=0.9, horizon=inf) / SGD",
]
STEPS = 100
# To import torch takes seconds. Forks of a server that has done no more than that: a child of this process could not train in case it has
# threads of autograd, from any test before.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "hyperopt", "pytest"])


def run(folder, text):
    """Train with a checkpoint after each step, and go on from the last one if there is one."""
    model = net()
    optimizer = Hyper.parse(text).bind(model.named_parameters())
    path, start = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, STEPS):
        train(model, optimizer, range(step, step + 1))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, folder / "new.pt")
        (folder / "new.pt").replace(path)  # all of it or nothing, whenever the process ends


def run_killed(text, folder, kills, seed):
    """Run to the end; kill as many times, each after a random number of the steps that are left.

    Returns:
        The steps at which it was killed.
    """
    draw, at = random.Random(seed), []
    last = folder / "checkpoint.pt"
    for left in range(kills, 0, -1):
        before = at[-1] if at else 0
        wanted = before + draw.randint(1, max(1, (STEPS - before) // (left + 1)))
        process = started(folder, text)
        while process.is_alive() and not (last.exists() and _step(last) >= wanted):
            time.sleep(0.002 * draw.random())
        process.kill()
        process.join()
        assert process.exitcode == -9, "it was not killed under way"
        at.append(_step(last))
    process = started(folder, text)
    process.join()
    assert process.exitcode == 0
    return at


def started(folder, text):
    process = FORK.Process(target=run, args=(folder, text))
    process.start()
    return process


def _step(path):
    return torch.load(path, weights_only=True)["step"]


@pytest.mark.parametrize(
    ("text", "kills"),
    [("Adam(learn=all, weight_decay=0.01) / Adam", 3), *(pytest.param(text, 5, marks=pytest.mark.slow) for text in TOWERS)],
)
def test_a_killed_run_ends_where_an_undisturbed_one_ends(text, kills, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run(whole, text)
    at = run_killed(text, parts, kills, seed=kills)
    assert 0 < at[0] <= at[-1] < STEPS
    expected, found = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    assert differences(expected, found) == []
