"""The table of what learning one hyperparameter wins back: nothing left out of it, and its arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments import data, provenance, useful

STAMP = {"command": "python -m experiments.useful", "machine": "a machine", "torch": "2.11", "commit": "0", "measured": "test"}
RESULT = Path(useful.__file__).parent / "results" / "useful.json"


def test_committed_result_has_every_row_seed_and_field():
    result = json.loads(RESULT.read_text())
    assert result["seeds"] >= 3
    assert result["epochs"] == 3
    assert result["measured"] == "test"
    rows = {(row["variant"], row["rule"], row["name"], row["dataset"]): row for row in result["table"]}
    assert rows.keys() == {(v, c.rule, c.name, d) for v in ("lr held", "lr learned") for c in useful.CASES for d in ("mnist", "fashion")}
    assert {(c.rule, c.name, c.good, c.bad) for c in useful.CASES} == {
        ("Adam", "eps", 1e-8, 1.0),
        ("Adam", "beta2", 0.999, 0.1),
        ("Exponent", "eta", 2.0, 4.0),
        ("ADOPT", "clip", 1.0, 1e-3),
    }
    for case in useful.CASES:
        for variant in useful.VARIANTS:
            for what, tower in useful.towers(case, variant).items():
                for dataset in useful.DATASETS:
                    for seed in range(result["seeds"]):
                        run = result["runs"][useful.key(dataset, tower, seed)]
                        assert run["steps"][-1] == 705
                        assert 0 < run["error"] < 100
                        learned = ({case.name} if what == "learned" else set()) | ({"lr"} if variant == "lr learned" else set())
                        assert run["courses"].keys() == learned
                        assert all(len(course) == len(run["steps"]) for course in run["courses"].values())
    # The table follows from the runs, and says why where less than half was recovered.
    assert result["table"] == json.loads(json.dumps(useful.table(result["runs"], result["seeds"])))
    assert all(row["why"] for row in result["table"] if row["verdict"] in useful.FAILURES)


def runs(errors):
    """A result file's runs with these errors for good, bad and learned, the same in every row, one for each seed."""
    return {
        useful.key(dataset, tower, seed): {"error": error, "steps": [1, 2], "courses": {case.name: [0.5, 0.25 + seed], "lr": [1.0, 1.0]}}
        for dataset in useful.DATASETS
        for variant in useful.VARIANTS
        for case in reversed(useful.CASES)  # Adam's eps and beta2 share their good runs
        for what, tower in useful.towers(case, variant).items()
        for seed, error in enumerate(errors[what])
    }


def test_recovered_is_the_share_of_the_lost_error():
    rows = useful.table(runs({"good": [2.0, 4.0], "bad": [12.0, 14.0], "learned": [4.0, 7.0]}), 2)
    assert len(rows) == 16
    for row in rows:
        assert row["good"] == {"mean": 3.0, "sd": pytest.approx(2**0.5)}
        assert row["lost"] == 10
        assert row["recovered"] == pytest.approx((13 - 5.5) / 10)
        assert row["verdict"] == "at least half"
        assert row["end"] == [0.25, 1.25]
    assert all("| 75 % |" in line for line in useful.show(rows, "test")[2:])


@pytest.mark.parametrize(
    ("good", "bad", "learned", "recovered", "verdict"),
    [
        ([3.0, 3.0], [13.0, 13.0], [13.0, 13.0], 0.0, "less than half"),
        ([3.0, 3.0], [13.0, 13.0], [23.0, 23.0], -1.0, "less than half"),
        ([3.0, 3.0], [13.0, 13.0], [2.0, 2.0], 1.1, "at least half"),
        ([3.0, 3.0], [2.0, 2.0], [2.0, 2.0], None, "nothing lost"),
        ([3.0, 3.0], [2.0, 2.0], [9.0, 9.0], None, "nothing lost, learning harms"),
        ([3.0, 3.0], [2.0, 2.0], [2.0, 9.0], None, "nothing lost, learning harms"),  # one seed is enough
        ([2.0, 4.0], [4.0, 6.0], [3.0, 3.0], None, "nothing lost"),  # 2 lost, and standard deviations of √2 each
    ],
)
def test_verdict(good, bad, learned, recovered, verdict):
    row = useful.judge(good, bad, learned)
    assert row["recovered"] == (None if recovered is None else pytest.approx(recovered))
    assert row["verdict"] == verdict


@pytest.mark.parametrize("variant", useful.VARIANTS)
@pytest.mark.parametrize("case", useful.CASES, ids=lambda case: case.name)
def test_each_tower_learns_what_its_row_says(case, variant):
    images = data.load("digits")
    images = data.Data(images.train_x[:1280], images.train_y[:1280], images.test_x, images.test_y)
    for what, tower in useful.towers(case, variant).items():
        run = useful.train(tower, images, seed=0, epochs=2)
        assert run["steps"] == [1, 6, 10]
        assert 0 < run["error"] < 100
        assert torch.tensor(run["loss"]).isfinite()
        assert ("lr" in run["courses"]) == (variant == "lr learned")
        assert (case.name in run["courses"]) == (what == "learned")
        if what == "learned":
            course = run["courses"][case.name]
            assert course[0] == pytest.approx(case.bad)  # the first step is taken with the value that was given
            assert course[-1] != course[0]


def test_script_draws_from_the_results_that_are_there(tmp_path):
    made = runs({"good": [3.0, 3.1], "bad": [40.0, 39.0], "learned": [5.0, 5.1]})
    (tmp_path / "useful.json").write_text(json.dumps({**STAMP, "epochs": 3, "seeds": 2, "runs": made}))
    app = useful.typer.Typer()
    app.command()(useful.main)
    outcome = CliRunner().invoke(app, ["--seeds", "2", "--figures", "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "useful.json").read_text())
    assert len(result["table"]) == 16
    assert (tmp_path / "useful.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len([line for line in outcome.output.splitlines() if line.startswith("| ")]) == 2 + 16


def test_again_forgets_the_runs_of_a_tower_alone(tmp_path, monkeypatch):
    path = tmp_path / "useful.json"
    made = runs({"good": [3.0], "bad": [40.0], "learned": [5.0]})
    path.write_text(json.dumps({**STAMP, "epochs": 3, "seeds": 1, "runs": made}))
    app = useful.typer.Typer()
    app.command()(useful.main)
    new = {"error": 7.0, "steps": [1, 2], "courses": {"lr": [1.0, 1.0]}}
    trained = []
    monkeypatch.setattr(data, "load", lambda name, validation: name)
    monkeypatch.setattr(useful, "train", lambda tower, images, seed, epochs: trained.append((tower, images)) or new)
    outcome = CliRunner().invoke(app, ["--seeds", "1", "--again", "Adam(eps=1) / Adam", "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert trained == [("Adam(eps=1) / Adam", "mnist"), ("Adam(eps=1) / Adam", "fashion")]
    result = json.loads(path.read_text())
    assert {key for key, run in result["runs"].items() if run["error"] == 7} == {f"{d} | Adam(eps=1) / Adam | 0" for d in useful.DATASETS}
    commits = {run.get("commit") for run in result["runs"].values()}
    assert len(commits) == 2
    assert all((commit or STAMP["commit"]) in provenance.caption(result) for commit in commits)
    before = path.read_text()
    outcome = CliRunner().invoke(app, ["--again", "Adam(eps=2) / Adam", "--out", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "Adam(eps=2) / Adam" in outcome.output
    assert path.read_text() == before
