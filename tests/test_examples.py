"""The examples: each improves in a few steps with either optimizer, and the page has the results that were measured."""

import importlib
import json
import re
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from examples import compare, lstm, nanogpt, reinforce, vae, wgan
from experiments import data, models
from experiments.store import Store

both = pytest.mark.parametrize("optimizer", compare.OPTIMIZERS)


@pytest.fixture
def digits(monkeypatch):
    """Handwritten digits of 8×8 pixels in place of MNIST, enlarged to its 28×28."""
    few = data.load("digits")

    def large(x):
        return torch.nn.functional.interpolate(x.view(-1, 1, 8, 8), size=28).flatten(1)

    found = data.Data(large(few.train_x), few.train_y, large(few.test_x), few.test_y)
    monkeypatch.setattr(data, "load", lambda name: found)


@pytest.fixture
def text(monkeypatch):
    """A text in which each word says what the next one is."""
    words = [f"w{i * i % 47}" for i in range(12_000)]
    characters = " ".join(words)
    alphabet = "".join(sorted(set(characters)))
    indices = torch.tensor([alphabet.index(c) for c in characters])
    end = len(indices) * 9 // 10
    monkeypatch.setattr(data, "text", lambda name: data.Text(indices[:end], indices[end:], alphabet))


@both
def test_vae(optimizer, digits):
    start = vae.train(optimizer, steps=0)
    assert vae.train(optimizer, epochs=9, steps=30) < 0.8 * start


@both
def test_wgan(optimizer, digits):
    start = wgan.train(optimizer, steps=0)
    assert wgan.train(optimizer, steps=60) < 0.9 * start


@both
def test_lstm(optimizer, text):
    start, end = (lstm.train(optimizer, epochs, count=3000) for epochs in (0, 6))
    assert end < 0.7 * start


@both
def test_reinforce(optimizer):
    assert reinforce.train(optimizer, steps=30) > 2 * reinforce.train(optimizer, steps=0)


@both
def test_nanogpt(optimizer, text, monkeypatch):
    monkeypatch.setattr(models, "GPT", partial(models.GPT, layers=2, width=32))
    start, end = (nanogpt.train(optimizer, steps) for steps in (0, 40))
    assert end < start - 0.5


# ---- the comparison

ROW = {"metric": 2.0, "seconds": 1.0}


def invoke(*arguments):
    return CliRunner().invoke(compare.app, [str(argument) for argument in arguments])


def test_the_comparison_runs_resumes_and_prints(tmp_path, monkeypatch):
    ran = []

    def run(name, optimizer, seed):
        ran.append((name, optimizer, seed))
        return {**ROW, "metric": 2.0 if optimizer == "usual" else 3.0}

    monkeypatch.setattr(compare, "run", run)
    arguments = ("--seeds", 1, "--only", "vae", "--only", "reinforce", "--out", tmp_path / "x.json")
    outcome = invoke(*arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "| 2.00 | 3.00 | 1.50 | no |" in outcome.output
    assert "| 2 | 3 | 0.67 | yes |" in outcome.output, "longer episodes are better"
    assert invoke(*arguments).output == outcome.output
    assert len(ran) == 4, "finished runs were run again"
    assert invoke(*arguments, "--again", "vae | usual").output == outcome.output
    assert len(ran) == 5


def test_unknown_example_is_one_clean_line():
    outcome = invoke("--only", "cnn")
    assert outcome.exit_code == 2
    assert "'cnn' is none of vae, wgan, lstm, reinforce, nanogpt" in outcome.output


def test_the_page_has_the_results():
    path = compare.FOLDER / "results.json"
    store = Store(path, **json.loads(path.read_text())["protocol"])
    assert compare.table(store) in compare.README.read_text()


@pytest.mark.parametrize("name", compare.EXAMPLES)
def test_the_command_line_says_what_was_trained(name, monkeypatch):
    example = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(example, "train", lambda optimizer, length, seed: 1.5 + seed)
    outcome = CliRunner().invoke(example.app, ["--optimizer", "usual", "--seed", "2"])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.startswith(f"{name}, usual, ")
    assert re.search(r"\b(3\.50*|4)\b", outcome.output)
    assert CliRunner().invoke(example.app, ["--optimizer", "other"]).exit_code == 2
