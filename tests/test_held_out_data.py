"""The experiment on held-out data: which images each method learns from, and its results."""

import json

import pytest
import torch
from typer.testing import CliRunner

from experiments import data, held_out

DATASET = "mnist"


def images(relabel=slice(0)):
    """Forty images to train on and forty held out, of which some have another label than the others of their kind."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(80, 784, generator=draw)
    y = torch.randint(10, (80,), generator=draw)
    y[relabel] = (y[relabel] + 1) % 10
    return data.Data(x, y, x[:30], y[:30])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(held_out, "IMAGES", 40)
    monkeypatch.setattr(held_out, "METHODS", {k: (*m[:3], m[3] // 25) for k, m in held_out.METHODS.items()})
    monkeypatch.setattr(held_out, "load", lambda name, validation: images())


@pytest.mark.parametrize("method", held_out.METHODS)
@pytest.mark.parametrize(
    ("which", "learners"), [("held out", {"lr held-out", "held-out", "all images"}), ("training", set(held_out.METHODS))]
)
def test_each_method_learns_from_its_images(method, which, learners, monkeypatch):
    courses = []
    for relabel in (slice(0), slice(40, 80) if which == "held out" else slice(40)):
        monkeypatch.setattr(held_out, "load", lambda name, validation, relabel=relabel: images(relabel))
        courses.append(held_out.train(DATASET, method, 0.1, 0, 20, False)["courses"])
    moved = {name for name in ("0.lr", "0.weight_decay") if len(set(courses[0][name])) > 1}
    assert moved == ({"0.lr", "0.weight_decay"} if method in ("training", "held-out") else {"0.lr"})
    assert (courses[0] != courses[1]) == (method in learners)


def test_it_runs_resumes_and_draws(tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(held_out.app, ["--steps", "4", "--seeds", "2", "--out", str(tmp_path), *arguments])

    assert "holds no runs" in invoke("--figures").output
    outcome = invoke()
    assert outcome.exit_code == 0, outcome.output
    path = tmp_path / "held_out.json"
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 2 * len(list(held_out.cells()))
    text = path.with_suffix(".md").read_text()
    assert text in outcome.output
    mean = sum(runs[f"mnist | held-out | 0.1 | {seed}"]["loss"] for seed in (0, 1)) / 2
    row = next(line for line in text.splitlines() if line.startswith("| both from the held-out loss: test loss"))
    assert row.split(" | ")[3].startswith(f"{mean:.2f} ±")
    path.with_suffix(".png").unlink()
    before = path.stat().st_mtime_ns
    assert invoke("--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "holds runs of" in invoke("--seeds", "3").output
