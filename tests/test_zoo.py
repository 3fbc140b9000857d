"""The zoo: its tasks, the arithmetic of its table, and the script end to end on a few steps."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from experiments import robustness, zoo
from experiments.store import Store
from experiments.zoo_tasks import TASKS, Problem, Score
from hyperopt import Hyper

AUTO, FEW = robustness.RECOMMENDED, ("curve fit", "drift")


def weights(problem):
    return torch.cat([p.detach().flatten() for model, _ in problem.parts for p in model.parameters()])


# ---- tasks


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_seed_determines_a_task_which_takes_two_steps_with_every_method(task):
    problem = task.problem(0)
    begin = weights(problem)
    losses = [loss(step).item() for step in range(2) for _, loss in problem.parts]
    torch.rand(1)  # the state of the global generator does not matter
    problem = task.problem(0)
    assert torch.equal(weights(problem), begin)
    assert losses == [loss(step).item() for step in range(2) for _, loss in problem.parts]
    assert task.muon == all(robustness.hidden(model)[0] for model, _ in problem.parts)
    for name, method in zoo.METHODS.items():
        if zoo.applies(name, task.name):
            before = weights(problem)
            stepped = [robustness.stepped(method.how, method.lrs[-1], 2, model) for model, _ in problem.parts]
            zoo.fit(problem, stepped, 2)
            assert math.isfinite(zoo.measure(problem, stepped).metric), name
            assert not torch.equal(weights(problem), before), name


@pytest.mark.parametrize("name", ["drift", "curve fit", "GAN ring", "MLP digits"])
def test_another_seed_is_another_run(name):
    a, b, again = (TASKS[name].problem(seed).parts[0][1](0).item() for seed in (0, 1, 0))
    assert a == again != b


def test_there_are_twenty_tasks_with_a_sentence_each():
    assert len(TASKS) == 20
    assert all(task.description.endswith(".") and task.name == name for name, task in TASKS.items())


# ---- one run


def test_a_run_is_measured_with_the_average_of_the_weights():
    found = zoo.train(zoo.Run("drift", AUTO, 1e-3, 0), steps=80)
    assert found.keys() == {"metric", "steps", "seconds", "courses"}
    assert found["courses"]["step"] == list(range(2, 81, 2))
    assert len(set(found["courses"]["0.lr"])) > 20
    problem = TASKS["curve fit"].problem(0)
    stepped = [[Hyper.parse("ScheduleFree(Adam)(lr=0.1)").bind(problem.parts[0][0].parameters())]]
    zoo.fit(problem, stepped, 20)
    with torch.no_grad():
        last = problem.measure().metric
    assert zoo.measure(problem, stepped).metric > 1.01 * last  # the loss falls: the average is behind


def test_the_lr_of_a_cosine_falls_to_zero():
    problem = TASKS["drift"].problem(0)
    stepped = [robustness.stepped(zoo.METHODS[name].how, 0.1, 10, problem.parts[0][0]) for name in ("Adam, cosine", "Adam")]
    zoo.fit(problem, stepped[:1], 10)
    zoo.fit(problem, stepped[1:], 10)
    assert [group[0].param_groups[0]["lr"] for group in stepped] == [pytest.approx(0, abs=1e-9), 0.1]


def breaks(seed):
    def loss(step):
        if step:
            raise RuntimeError("no convergence")
        return model(torch.ones(1, 1)).sum()

    model = nn.Linear(1, 1)
    return Problem([(model, loss)], lambda: Score(1.0))


def overflows(seed):
    model = nn.Linear(1, 1)
    return Problem([(model, lambda _: model(torch.ones(1, 1)).sum() * math.inf)], lambda: Score(1.0))


def test_a_run_that_fails_or_diverges_is_kept_and_shown(tmp_path, monkeypatch):
    results = Store(tmp_path / "zoo.json", steps=2)
    for name, make in {"curve fit": breaks, "drift": overflows}.items():
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], make=make))
        for lr in zoo.GRID:
            run = zoo.Run(name, "Adam", lr, 0)
            results.runs[run.key] = {**zoo.train(run, steps=2), "machine": "", "torch": "", "commit": ""}
            assert results.runs[run.key]["metric"] is None
            assert ("error" in results.runs[run.key]) == (make is breaks)
    shown = zoo.text(results).splitlines()
    assert "| curve fit | Adam: diverged | diverged | – |" in " ".join(shown)
    assert "| drift | Adam: diverged | diverged | – |" in " ".join(shown)
    failed = [line for line in shown if line.startswith("- Failed")]
    assert failed[0] == "- Failed: curve fit | Adam | 0.0001 | 0: `RuntimeError('no convergence')`."
    assert len(failed) == len(zoo.GRID)


# ---- the table


def runs(*cells):
    """The runs of a file: task, method, and metrics by seed for each of its lrs."""
    return {
        zoo.Run(task, name, lr, seed).key: {"metric": metric}
        for task, name, metrics in cells
        for lr, seeds in zip(zoo.METHODS[name].lrs, metrics, strict=True)
        for seed, metric in enumerate(seeds)
    }


FOUND = runs(
    ("curve fit", "Adam", [(9.0,), (3.0, 5.0), (6.0,), (None,)]),  # the best is a mean of 4 at 1e-3
    ("curve fit", "Prodigy", [(4.5,)]),
    ("curve fit", AUTO, [(4.4,), (2.0,), (3.0,)]),
    ("curve fit", "Adam / Adam", [(8.0,), (4.0,), (None, 1.0)]),
    ("plateau", "Adam", [(1.0,), (1.0,), (0.002, 0.0), (1.0,)]),
    ("plateau", AUTO, [(0.0,), (0.0004,), (0.0008,)]),
    ("plateau", "Adam / Adam", [(0.003,), (0.001,), (0.002,)]),
    ("drift", "Schedule-Free AdamW", [(2.0,)]),
    ("drift", AUTO, [(1.0,), (3.0,), (2.0,)]),
)


def test_ratios_are_those_of_the_worst_start_to_the_best_peer():
    table = zoo.rows(FOUND)
    assert list(table) == ["drift", "plateau", "curve fit"]  # the order of the tasks
    fit, plateau, drift = (table[name] for name in ("curve fit", "plateau", "drift"))
    assert [row.best for row in (fit, plateau, drift)] == ["Adam", "Adam", "Schedule-Free AdamW"]
    assert fit.peers == {"Adam": (4.0, 1e-3), "Prodigy": (4.5, 1e-6)}
    assert fit.ratios == {AUTO: pytest.approx((0.5, 1.1)), "Adam / Adam": (1.0, math.inf)}
    assert plateau.ratios[AUTO] == pytest.approx((0.5, 0.9))  # with a floor of .001 on both sides
    assert plateau.ratios["Adam / Adam"] == pytest.approx((1.0, 2.0))
    assert drift.ratios == {AUTO: (0.5, 1.5)}
    assert zoo.counts(table, AUTO) == (2, 1, 0, 3)
    assert zoo.counts(table, "Adam / Adam") == (0, 0, 2, 2)
    assert zoo.ratio(1.0, math.inf, 0.0) == 0.0
    assert math.isnan(zoo.ratio(math.inf, math.inf, 0.0))


def test_what_is_not_finished_has_no_best_and_no_worst():
    for gone in zoo.Run("curve fit", "Adam", 1e-4, 0), zoo.Run("curve fit", AUTO, 1.0, 0):
        row = zoo.rows({key: run for key, run in FOUND.items() if key != gone.key})["curve fit"]
        assert row.best == ("Prodigy" if gone.method == "Adam" else "Adam")
        assert (AUTO in row.ratios) == (gone.method == "Adam")


def test_the_table_in_markdown(tmp_path):
    results = Store(tmp_path / "zoo.json", steps=None)
    results.runs.update(FOUND)
    lines = zoo.text(results).splitlines()
    assert lines[0].startswith("The zoo, mean of 1 to 2 seeds. ")
    assert "| curve fit | Adam: 4 | 4 (0.001) | – | 4.5 | – | – | – | 2 to 4.4 | 1.1 | 4 to diverged | diverged |" in lines
    assert "| drift | Schedule-Free AdamW: 2 | – | – | – | 2 | – | – | 1 to 3 | 1.5 | – | – |" in lines
    counted = "within 10 % of the best peer from its worst start: 2 of 3; better: 1; twice as bad or worse: 0."
    assert f"- `hyperopt.auto`: {counted}" in lines
    zoo.draw(results, tmp_path / "zoo.png")  # with an infinite ratio, and rows without a tower
    assert (tmp_path / "zoo.png").stat().st_size < 300_000


# ---- the script


def invoke(out, *arguments):
    only = [each for task in FEW for each in ("--tasks", task)]
    return CliRunner().invoke(zoo.app, [*only, "--seeds", "1", "--steps", "4", "--out", str(out), *arguments])


def test_the_script_runs_resumes_and_draws(tmp_path):
    path = tmp_path / "zoo.json"
    assert "holds no runs" in invoke(tmp_path, "--figures").output
    outcome = invoke(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(path.read_text())
    assert len(result["runs"]) == len(FEW) * (3 + 3 + 4 + 4 + 1 + 1)  # neither task has matrices for Muon
    assert result["command"].startswith("python -m experiments.")
    assert path.with_suffix(".md").read_text() in outcome.output
    first = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    assert invoke(tmp_path).exit_code == 0
    assert path.stat().st_mtime_ns == first, "finished runs were run again"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.with_suffix(".png").stat().st_size < 300_000

    gone = zoo.Run("drift", AUTO, 1.0, 0).key
    kept = {key: {**run, "commit": "earlier"} for key, run in result["runs"].items() if key != gone}
    path.write_text(json.dumps({**result, "runs": kept}))
    assert invoke(tmp_path).exit_code == 0
    runs = json.loads(path.read_text())["runs"]
    assert {key for key, run in runs.items() if run["commit"] != "earlier"} == {gone}
    assert runs[gone]["metric"] == result["runs"][gone]["metric"]
    assert "holds runs of" in invoke(tmp_path, "--steps", "5").output


def test_another_tower_gets_a_column(tmp_path):
    tower = "SGD(lr={lr}) / Adam"
    outcome = invoke(tmp_path, "--methods", "Prodigy", "--tower", tower)
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads((tmp_path / "zoo.json").read_text())["runs"]
    assert runs.keys() == {zoo.Run(task, *cell, 0).key for task in FEW for cell in [("Prodigy", 1e-6), *((tower, lr) for lr in zoo.STARTS)]}
    assert f"| {tower} | worst / best peer |" in outcome.output
    assert f"- `{tower}`: within 10 % of the best peer from its worst start:" in outcome.output
    assert f"- `{tower}`" in invoke(tmp_path, "--figures").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "drfit"], "'drfit' is none of 'linreg ill (full batch)'"),
        (["--methods", "Adam / SGD"], "'Adam / SGD' is none of 'hyperopt.auto'"),
        (["--tower", "Adam / Adam"], "no tower with {lr} where the start goes"),
        (["--tower", "Nonsense(lr={lr})"], "Invalid value for --tower: "),
        (["--device", "cuda"], "'cuda' is not cpu"),
    ],
)
def test_a_bad_option_is_one_clean_line(arguments, message, tmp_path):
    outcome = invoke(tmp_path / "never", *arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "never").exists()
