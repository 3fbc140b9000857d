"""ADOPT's claim: on the toy problem of its paper it converges whatever beta2 is, where Adam goes to the wrong end."""

import json

import pytest
from typer.testing import CliRunner

from experiments import adopt_toy

STEPS, EARLY = 100_000, 20_000
SMALL = [i for i, beta2 in enumerate(adopt_toy.BETAS) if beta2 <= 0.9]


@pytest.fixture(scope="module")
def gradients():
    return adopt_toy.gradients(STEPS, 10)


def test_the_gradients_mean_1_so_that_the_solution_is_minus_1(gradients):
    assert set(gradients.unique().tolist()) == {-10.0, 100.0}
    assert gradients.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_adopt_converges_for_every_beta2_adam_does_not_and_amsgrad_is_in_between(gradients):
    xs = adopt_toy.run(adopt_toy.RULES["ADOPT"], gradients)
    adam, amsgrad = (adopt_toy.final(adopt_toy.run(adopt_toy.RULES[name], gradients[:EARLY])) for name in ("Adam", "AMSGrad"))
    early = adopt_toy.final(xs[:EARLY])
    assert max(adopt_toy.final(xs)) < -0.97
    for i in SMALL:
        assert adam[i] > 0.9
        assert early[i] < amsgrad[i] < 0.5 < adam[i]


def test_script_writes_its_table_and_its_figure(tmp_path):
    app = adopt_toy.typer.Typer()
    app.command()(adopt_toy.main)
    outcome = CliRunner().invoke(app, ["--steps", "200", "--seeds", "2", "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "adopt_toy.json").read_text())
    assert result["rules"].keys() == adopt_toy.RULES.keys()
    assert all(len(found["final"]) == len(adopt_toy.BETAS) for found in result["rules"].values())
    assert (tmp_path / "adopt_toy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(outcome.output.splitlines()) == 1 + len(adopt_toy.RULES)
