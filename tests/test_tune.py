"""Search spaces, the bootstrap, and the commands of the comparison, end to end on a few steps."""

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import optuna
import pytest
import torch
from typer.testing import CliRunner

from experiments import inclusion, spaces, training, trials, tune
from experiments.bootstrap import best_of, equal_trials
from experiments.spaces import SPACES, Axis
from experiments.store import Store
from experiments.workloads import SMALL
from hyperopt import Hyper, Interval, rules

# ---- spaces


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in SPACES for mode in ((), ("lr",))])
def test_both_ends_of_every_range_are_inside_the_domains(name, mode):
    space = SPACES[name]
    axes = space.axes(mode)
    for end in "low", "high":
        tower = space.tower({key: getattr(axis, end) * (1 - 1e-9 * (end == "high")) for key, axis in axes.items()})
        assert not tower.above
    assert all(isinstance(spaces.searched(key), str) and spaces.searched(key) in space.base.rule.declared() for key in axes)
    for key, axis in axes.items():  # decays are searched beside 1, and everything that spans decades on a log scale
        domain = space.base.rule.declared()[spaces.searched(key)].domain
        assert axis.log or isinstance(domain, Interval)


def test_a_point_of_a_coupled_space_is_the_rule_with_its_values():
    point = {"lr/eps": 0.5, "eps": 0.01, "1 - beta1": 0.2, "1 - beta2": 0.001}
    rule = SPACES["Adam"].tower(point).rule
    assert (rule.lr, rule.beta1, rule.beta2, rule.eps) == pytest.approx((0.005, 0.8, 0.999, 0.01))
    assert SPACES["Adam"].tower({"lr": 0.03}) == Hyper.parse("Adam(lr=0.03)")
    assert SPACES["Nesterov"].tower({"lr": 0.03, "1 - momentum": 0.25}) == Hyper.parse("SGD(lr=0.03, momentum=0.75, nesterov=True)")


def test_lr_without_eps_is_searched_itself():
    space = SPACES["Adam"]
    assert dict(space.axes(["lr"])) == {"lr": space.lr}
    assert dict(space.axes(["lr", "beta1"])) == {"lr": space.lr, "1 - beta1": space.all["1 - beta1"]}
    assert set(space.axes(["beta1"])) == {"1 - beta1"}
    assert set(space.axes(["lr", "eps"])) == {"lr/eps", "eps"}
    assert space.axes() == space.all
    with pytest.raises(ValueError, match="'momentum' is not searched for Adam: give some of lr, eps, beta1, beta2"):
        space.axes(["momentum"])


@pytest.mark.parametrize("name", [name for name in rules.__all__ if name not in ("Averaged", "ScheduleFree")] + ["ScheduleFree(Adam)"])
def test_every_rule_has_a_space_about_its_defaults(name):
    space = spaces.named(name)
    if name not in SPACES:
        rule = space.base.rule
        for key, axis in space.all.items():
            default = rule.value(key.removeprefix("1 - "))
            assert 0.4 < axis.share(1 - default if key.startswith("1 - ") else default) < 1
        assert {spaces.searched(key) for key in space.all} == {n for n, d in rule.declared().items() if d.domain.inside(rule.value(n))}
    space.tower(spaces.points(space.all, 0, 1)[0])


def test_points_are_a_scrambled_sobol_sequence():
    """Of the first 2^m points, one is in each 2^m-th part of every axis; their discrepancy is below that of chance."""
    axes = SPACES["Adam"].all
    found = spaces.points(axes, 3, 32)
    assert found[:5] == spaces.points(axes, 3, 5)
    assert found[0] != spaces.points(axes, 4, 1)[0]
    for name, axis in axes.items():
        shares = [axis.share(point[name]) for point in found]
        for m in range(6):
            assert sorted(int(share * 2**m) for share in shares[: 2**m]) == list(range(2**m))
        assert axis.low <= min(point[name] for point in found)
        assert max(point[name] for point in found) <= axis.high
    cube = np.array([[axis.share(point[name]) for name, axis in axes.items()] for point in found])
    chance = np.random.default_rng(0).random((20, *cube.shape))
    assert discrepancy(cube) < 0.7 * min(map(discrepancy, chance))


def discrepancy(x):
    """Centered L2 discrepancy, squared (Hickernell 1998)."""
    n, d = x.shape
    z = abs(x - 0.5)
    one = (1 + z / 2 - z**2 / 2).prod(1).sum()
    two = (1 + z[:, None] / 2 + z[None] / 2 - abs(x[:, None] - x[None]) / 2).prod(2).sum()
    return (13 / 12) ** d - 2 / n * one + two / n**2


def test_an_optimum_on_the_border_is_reported_with_the_side_to_widen():
    space = SPACES["Momentum"]
    inside = {"lr": 0.1, "1 - momentum": 0.1}
    assert space.borders(space.all, inside) == []
    assert space.borders(space.all, {**inside, "lr": 0.0015}) == ["lr = 0.0015 is at the lower end of 0.001 … 10: widen it down to 0.0001"]
    assert space.borders(space.all, {**inside, "lr": 8.0}) == ["lr = 8 is at the upper end of 0.001 … 10: widen it up to 100"]
    low = space.borders(space.all, {**inside, "1 - momentum": 0.011})
    assert low == ["1 - momentum = 0.011 is at the lower end of 0.01 … 1: widen it down to 0.001"]
    assert space.borders(space.all, {**inside, "1 - momentum": 0.99}) == []  # momentum 0, where its domain ends
    unified = SPACES["Unified"]
    assert unified.borders({"nesterov": Axis(0, 1, log=False)}, {"nesterov": 0.001}) == []
    assert len(unified.borders({"nesterov": Axis(0, 0.5, log=False)}, {"nesterov": 0.49})) == 1


# ---- bootstrap


def exact(values, k):
    """The expected best of k trials drawn with replacement."""
    n = len(values)
    above = [((n - i) / n) ** k for i in range(n + 1)]
    return sum(v * (above[i] - above[i + 1]) for i, v in enumerate(sorted(values)))


def test_the_bootstrap_is_the_closed_form():
    values = np.random.default_rng(1).lognormal(size=12).tolist()
    draws = 20_000
    curve = best_of(values, resamples=draws)
    n = len(values)
    for k in (1, 2, 5, 12):
        mean = exact(values, k)
        error = math.sqrt((exact([v * v for v in values], k) - mean**2) / draws)
        assert abs(curve.mean[k - 1] - mean) < 4 * error
        # The best of k is at most v_i with probability 1 - ((n - i)/n)^k.
        for share, found in ((0.05, curve.low[k - 1]), (0.95, curve.high[k - 1])):
            i = next(i for i in range(1, n + 1) if 1 - ((n - i) / n) ** k >= share)
            assert found == pytest.approx(sorted(values)[i - 1])
    assert all(a >= b for a, b in pairwise(curve.mean))
    assert best_of(values) == best_of(values)
    assert len(best_of([3.0]).mean) == 1


def test_the_metric_of_the_chosen_trial_is_reported():
    """Chosen on validation data and reported on test data; of equals, the first that was drawn."""
    validation, test = [3.0, 1.0, 2.0], [30.0, 10.0, 20.0]
    both = best_of(validation, test)
    assert both.mean == pytest.approx([10 * mean for mean in best_of(validation).mean])
    contrary = best_of(validation, [-v for v in validation])
    assert contrary.mean == pytest.approx([-mean for mean in best_of(validation).mean])


def test_how_many_trials_a_run_equals():
    curve = best_of([4.0, 3.0, 2.0, 1.0], resamples=10_000)
    assert [equal_trials(curve, metric) for metric in (9.0, 2.4, 2.0, 1.0)] == [1, 2, 2, None]


# ---- one trial, and the command


@pytest.fixture
def few(monkeypatch):
    """The digits for a few steps."""
    monkeypatch.setitem(tune.PROBLEMS, "digits", replace(SMALL["digits"], steps=20))


def invoke(out, *arguments):
    return CliRunner().invoke(tune.app, ["--out", str(out), *map(str, arguments)])


def test_a_trial_is_measured_on_validation_data_and_on_test_data():
    small = replace(SMALL["digits"], steps=30)
    found = tune.train(small, SPACES["Momentum"], "cpu", {"lr": 0.1})
    model = small.model(0)
    (optimizer,) = training.bind("SGD(lr=0.1, momentum=0.9)", model)
    for x, y in small.batches(0, validation=True):
        optimizer.zero_grad()
        small.loss(model, x, y).backward()
        optimizer.step()
    assert found["value"] == small.evaluate(model, validation=True)
    assert found["test"] == small.evaluate(model)
    assert found["value"] != found["test"]
    assert tune.train(small, SPACES["SGD"], "cpu", {"lr": 1e38})["value"] is None


def test_tune_runs_resumes_and_draws(few, tmp_path):
    outcome = invoke(tmp_path, "--rule", "Adam", "--trials", 4)
    assert outcome.exit_code == 0, outcome.output
    path = tmp_path / "digits_Adam_all_0.json"
    runs = json.loads(path.read_text())["runs"]
    assert list(runs) == ["0", "1", "2", "3"]
    text = path.with_suffix(".md").read_text()
    assert text in outcome.output
    best = min(runs.values(), key=lambda run: run["metric"])
    assert f"- Best: `{best['rule']}`, validation {best['metric']:.2f}, test {best['test']:.2f}." in text
    assert best["rule"] == str(SPACES["Adam"].tower(best["point"]))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    table = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
    assert [float(row["validation"]) for row in table] == [run["metric"] for run in runs.values()]
    assert {"1 - beta1", "lr/eps"} <= table[0].keys()
    # More trials: the first four are not run again.
    assert invoke(tmp_path, "--rule", "Adam", "--trials", 6).exit_code == 0
    more = json.loads(path.read_text())["runs"]
    assert {i: more[i] for i in runs} == runs
    assert len(more) == 6
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.load_study(study_name="digits | Adam | all | 0", storage=storage)  # as optuna-dashboard reads it
    assert len(study.trials) == 6
    assert study.best_value == min(run["metric"] for run in more.values())
    # Figures need no study.
    (tmp_path / "journal.log").unlink()
    path.with_suffix(".png").unlink()
    assert invoke(tmp_path, "--rule", "Adam", "--figures").exit_code == 0
    assert path.with_suffix(".png").exists()
    assert not (tmp_path / "journal.log").exists()
    assert "holds no runs" in invoke(tmp_path, "--rule", "SGD", "--figures").output


def test_another_protocol_needs_another_folder(few, tmp_path):
    assert invoke(tmp_path, "--rule", "SGD", "--trials", 2).exit_code == 0
    outcome = invoke(tmp_path, "--rule", "SGD", "--trials", 2, "--steps", 9)
    assert outcome.exit_code == 2
    assert "--out" in outcome.output
    (tmp_path / "digits_SGD_all_0.json").unlink()
    outcome = invoke(tmp_path, "--rule", "SGD", "--trials", 2, "--steps", 9)
    assert "holds trials with another workload, steps: choose another --out or --storage, or --no-resume" in outcome.output
    assert invoke(tmp_path, "--rule", "SGD", "--trials", 2, "--steps", 9, "--no-resume").exit_code == 0
    runs = json.loads((tmp_path / "digits_SGD_all_0.json").read_text())["runs"]
    assert [run["steps"] for run in runs.values()] == [9, 9]


def test_trials_that_fail_are_listed_and_replaced(few, tmp_path, monkeypatch):
    honest = tune.train

    def failing(workload, space, device, point, commit):
        if point["lr"] > 1:
            raise FloatingPointError("planted")
        return honest(workload, space, device, point, commit)

    monkeypatch.setattr(tune, "train", failing)
    outcome = invoke(tmp_path, "--rule", "SGD", "--trials", 4)
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads((tmp_path / "digits_SGD_all_0.json").read_text())["runs"]
    failed = [i for i, run in runs.items() if run["metric"] is None]
    assert failed
    assert len(runs) - len(failed) == 4
    assert f"4 feasible trials of {len(runs)}" in outcome.output
    assert f"- Infeasible: point {failed[0]}: `FloatingPointError('planted')`." in outcome.output


BAD = {
    "rule": (("--rule", "Adamm"), "--rule", "Adamm"),
    "tower": (("--rule", "Adam / Adam"), "--rule", "give its rule alone"),
    "only": (("--only", "momentum"), "--only", "give some of lr, eps, beta1, beta2"),
    "workload": (("--workload", "imagenet"), "--workload", "'imagenet' is none of digits"),
    "trials": (("--trials", "0"), "--trials", "0 trials are too few: give at least 1"),
    "sqlite": (("--storage", "sqlite:///x.db"), "--storage", "no PostgreSQL database: give postgresql://"),
    "no url": (("--storage", "here"), "--storage", "give postgresql://"),
    "no server": (("--storage", "postgresql://u@127.0.0.1:1/x"), "--storage", "cannot be used"),
    "driver": (("--storage", "postgresql+nonsense://u@h/x"), "--storage", "give postgresql://"),
    "password": (("--storage", "postgresql://u:secret@127.0.0.1:1/x"), "--storage", "u:***@127.0.0.1"),
    "ray": (("--ray", "127.0.0.1:1"), "--ray", "'127.0.0.1:1' does not answer"),
    "ray address": (("--ray", "nowhere"), "--ray", "give auto, local"),
}


@pytest.mark.parametrize(("arguments", "names", "says"), BAD.values(), ids=BAD)
def test_bad_arguments_are_one_clean_line(arguments, names, says, tmp_path):
    outcome = invoke(tmp_path / "never", *arguments)
    assert outcome.exit_code == 2
    line = outcome.output.strip().splitlines()[-1]
    assert f"Invalid value for {names}" in line or f"Invalid value for '{names}'" in line
    assert says in line
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "never").exists()


def test_a_cluster_without_ray_installed_is_one_clean_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    outcome = invoke(tmp_path / "never", "--ray", "auto")
    assert outcome.exit_code == 2
    assert "Invalid value for --ray: 'auto' needs Ray: pip install ray" in outcome.output
    assert not (tmp_path / "never").exists()


# ---- inclusion


@pytest.fixture
def digits_only(monkeypatch):
    """Both workloads are the digits, for a few steps."""
    for name in inclusion.WORKLOADS:
        monkeypatch.setitem(tune.PROBLEMS, name, replace(SMALL["digits"], name=name, title=name, steps=8))


def test_inclusion_runs_resumes_and_draws(digits_only, tmp_path):
    def call(*arguments):
        chosen = [part for rule in ("SGD", "Adam") for part in ("--rule", rule)]
        folders = ["--out", str(tmp_path), "--log", str(tmp_path / "log"), "--seeds", "2"]
        return CliRunner().invoke(inclusion.app, [*folders, *chosen, *arguments])

    outcome = call("--trials", "2")
    assert outcome.exit_code == 0, outcome.output
    path = tmp_path / "inclusion.json"
    result = json.loads(path.read_text())
    assert len(result["runs"]) == 2 * (2 * 2 + 3)  # towers by seeds; SGD's two studies are one
    text = path.with_suffix(".md").read_text()
    assert text in outcome.output
    results = Store(path, steps=None, seeds=2)
    for name in inclusion.WORKLOADS:
        scores = {rule: inclusion.score(results, inclusion.Cell(name, rule, "all")) for rule in ("SGD", "Adam")}
        best = min(scores, key=lambda rule: scores[rule].best)
        trials_ = result["runs"][f"{name} | Adam | all"]["trials"].values()
        assert scores["Adam"].best == min(run["metric"] for run in trials_)
        row = next(line for line in text[text.index(f"## {name}") :].splitlines() if line.startswith("| 1 |"))
        assert row.split(" | ")[4] == best
    for picture in "inclusion.png", "inclusion_trials.png":
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    before = path.stat().st_mtime_ns
    assert call("--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert call("--trials", "3").exit_code == 0
    after = json.loads(path.read_text())["runs"]
    for key, run in result["runs"].items():
        for i, trial in run.get("trials", {}).items():
            assert after[key]["trials"][i] == trial
    assert {len(run["trials"]) for run in after.values() if "trials" in run} == {3}


def test_verdicts_and_worth():
    def score(best, low, high):
        return inclusion.Score(best, low, high, best)

    special = score(2.0, 2.0, 3.0)
    cases = (score(1.9, 1.9, 5.0), score(2.5, 2.5, 4.0), score(3.5, 3.5, 4.0))
    assert [inclusion.verdict(special, general) for general in cases] == ["yes", "no, but within the error bars", "no"]
    found = {mode: {"SGD": special, "Momentum": cases[0]} for mode in inclusion.MODES}
    assert inclusion.inclusions(found)[0] == ["Momentum than SGD", "yes", "yes"]
    assert inclusion.inclusions(found)[1] == ["Nesterov than SGD", "–", "–"]


def test_a_tower_is_compared_with_the_mean_of_its_seeds(tmp_path):
    results = Store(tmp_path / "x.json", steps=None, seeds=2)
    values = [4.0, 3.0, 2.0, 1.0]
    results.runs["cnn_small | Adam | all"] = {"trials": {str(i): {"metric": v, "test": v} for i, v in enumerate(values)}}
    for seed, metric in enumerate((1.0, 3.2)):
        results.runs[f"cnn_small | hyperopt.auto | {seed}"] = {"metric": metric}
    assert inclusion.worth(results, "cnn_small", "hyperopt.auto") == {"Adam": (equal_trials(best_of(values), 2.1), 4)}
    results.runs["rnn_small | Adam | lr"] = {"trials": {"0": {"metric": 1e20, "test": 1e20}, "1": {"metric": 5.0, "test": 6.0}}}
    assert inclusion.metrics(results, inclusion.Cell("rnn_small", "Adam", "lr")) == [82, 5.0]  # no worse than guessing
    assert inclusion.score(results, inclusion.Cell("rnn_small", "Adam", "lr")) == inclusion.Score(5.0, 5.0, 82.0, 6.0)
    sentence = inclusion.tower_sentence(results, "cnn_small", "hyperopt.auto", [1.0, 3.2])
    assert "One run of `hyperopt.auto`, untuned (2.10, mean of 2 seeds, 1.00 to 3.20)" in sentence
    assert "2 of Adam" in sentence


def test_missing_data_stop_a_search_and_are_no_infeasible_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPEROPT_DATA", str(tmp_path))
    outcome = invoke(tmp_path / "out", "--workload", "cnn_small")
    assert outcome.exit_code == 2
    assert "correct HYPEROPT_DATA" in outcome.output
    axes = SPACES["SGD"].all
    search = trials.Search(str(tmp_path / "journal.log"), "s", axes, missing, trials=2)
    with pytest.raises(tune.data.DataNotFoundError):
        trials.work(search)
    assert trials.tally(trials.load(search), search).open == [0, 1]


def missing(point):
    raise tune.data.DataNotFoundError("gone")


def test_the_small_workloads_fit_their_models(monkeypatch):
    digits = SMALL["digits"]
    x, _ = next(digits.batches(0))
    assert digits.model(0)(x).shape == (64, 10)
    assert SMALL["cnn_small"].model(0)(torch.zeros(2, 784)).shape == (2, 10)
    assert SMALL["rnn_small"].model(0)(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 82)
