"""The scripts of experiments/, end to end on scikit-learn's digits."""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from experiments import data, mnist, models, robustness, store
from experiments.pool import execute
from experiments.workloads import WORKLOADS
from hyperopt import HyperOptimizer, driven
from hyperopt.record import read_csv

EPOCHS, STEPS = 4, 4 * 6  # 1,438 digits in batches of 256


def run(*arguments: object):
    return CliRunner().invoke(mnist.app, [str(argument) for argument in ("--dataset", "digits", "--epochs", EPOCHS, *arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the script: its output and its folder."""
    out = tmp_path_factory.mktemp("mnist")
    outcome = run("--tower", "Adam(lr=1e-4) / Adam(lr=0.3)", "--device", "cpu", "--out", out)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output, out


def scalars(folder, tag):
    return [(event.step, event.value) for event in EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars(tag)]


def test_closing_table_compares_three_runs(finished):
    output, out = finished
    rows = [line for line in output.splitlines() if line.startswith(("this tower", "its rule, initial", "its rule, learned"))]
    runs = json.loads((out / "result.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["tower", "initial", "learned"]
    assert len(rows) == 3
    for row, run in zip(rows, runs, strict=True):
        assert f" {run['error']:.2f} " in row
        assert f"lr {run['hyperparameters']['0.lr']:.6g}" in row
        assert len(run["errors"]) == EPOCHS
        assert run["errors"][-1] == run["error"]
    tower, initial, learned = (run["hyperparameters"]["0.lr"] for run in runs)
    assert initial == pytest.approx(1e-4)
    assert tower > 1e-3, "the lr was not learned"
    assert learned == pytest.approx(tower)
    errors = [run["error"] for run in runs]
    assert errors[0] < errors[1]  # learning from a lr that is too small pays within four epochs
    assert errors[2] < errors[1]


def test_tensorboard_log_holds_every_step(finished):
    _, out = finished
    learned = scalars(out / "tensorboard" / "tower", "hyper/0.lr")
    assert [step for step, _ in learned] == list(range(1, STEPS + 1))
    assert len(scalars(out / "tensorboard" / "tower", "hypergradient/0.lr")) == STEPS - 1
    assert len({value for _, value in learned}) > STEPS // 2
    for name in "tower", "initial", "learned":
        assert [step for step, _ in scalars(out / "tensorboard" / name, "loss")] == list(range(1, STEPS + 1))
        assert [step for step, _ in scalars(out / "tensorboard" / name, "error")] == list(range(6, STEPS + 1, 6))


def test_csv_and_png(finished):
    _, out = finished
    columns = read_csv(out / "hyperparameters.csv")
    assert columns["step"].tolist() == list(range(1, STEPS + 1))
    logged = [value for _, value in scalars(out / "tensorboard" / "tower", "hyper/0.lr")]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(columns["0.lr"]).float(), rtol=0, atol=0)
    assert (out / "hyperparameters.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_second_run_into_the_same_folder_replaces_the_first(tmp_path):
    for _ in range(2):
        assert run("--tower", "SGD", "--out", tmp_path).exit_code == 0
    folder = tmp_path / "tensorboard" / "tower"
    assert len(list(folder.iterdir())) == 2
    assert [step for step, _ in scalars(folder, "loss")] == list(range(1, STEPS + 1))


def test_same_seed_same_result(tmp_path):
    def errors(folder, seed):
        assert run("--tower", "SGD(lr=0.5)", "--seed", seed, "--out", tmp_path / folder).exit_code == 0
        (only,) = json.loads((tmp_path / folder / "result.json").read_text())["runs"]  # nothing stacked: nothing to compare with
        return only["errors"]

    first = errors("a", 0)
    assert first == errors("b", 0)
    assert first != errors("c", 1)


@pytest.mark.parametrize("text", ["Adam(lr=-1) / SGD", "Adam / Nonsense", "Adam(("])
def test_bad_tower_is_one_clean_line(text, tmp_path):
    outcome = run("--tower", text, "--out", tmp_path / "never")
    assert outcome.exit_code == 2
    assert "Invalid value for --tower: " in outcome.output
    assert "Traceback" not in outcome.output
    assert len(outcome.output.strip().splitlines()[-1]) > len("Error: Invalid value for --tower: ")
    assert not (tmp_path / "never").exists()


def test_missing_data_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPEROPT_DATA", str(tmp_path))
    outcome = run("--dataset", "fashion", "--out", tmp_path / "never")
    assert outcome.exit_code == 2
    for part in "fashion", str(tmp_path), "FashionMNIST/raw", "correct HYPEROPT_DATA":
        assert part in outcome.output
    with pytest.raises(data.DataNotFoundError):
        data.load("mnist")
    with pytest.raises(ValueError, match="dataset='cifar' must be one of mnist, fashion, digits"):
        data.load("cifar")


def test_missing_data_without_network_names_the_remedy(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def offline(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.delenv("HYPEROPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MNIST, "download", offline)
    with pytest.raises(data.DataNotFoundError, match=r"connect to the network, or set HYPEROPT_DATA to a folder that contains MNIST/raw"):
        data.load("mnist")


def test_digits_are_normalised_split_once_and_validated_apart():
    whole, again, held = data.load("digits"), data.load("digits"), data.load("digits", validation=True)
    assert whole.train_x.shape == (1438, 64)
    assert whole.test_x.shape == (359, 64)
    assert (whole.train_x.dtype, whole.train_y.dtype) == (torch.float32, torch.int64)
    assert (whole.train_x.min(), whole.train_x.max()) == (0, 1)
    assert torch.equal(whole.train_x, again.train_x)
    assert set(whole.test_y.tolist()) == set(range(10))
    # Validation images are training images; together with the rest they are the training set.
    assert torch.equal(torch.cat([held.train_x, held.test_x]), whole.train_x)
    assert torch.equal(torch.cat([held.train_y, held.test_y]), whole.train_y)


def test_the_papers_model():
    model = models.mlp()
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(128, 784), (128,), (10, 128), (10,)]
    assert model(torch.zeros(3, 784)).shape == (3, 10)


def test_the_other_models():
    def size(model):
        return sum(parameter.numel() for parameter in model.parameters())

    # He et al.: 0.27, 0.46, 0.66 and 0.85 million.
    assert [size(models.resnet(depth)) for depth in (20, 32, 44, 56)] == [269_722, 464_154, 658_586, 853_018]
    assert models.resnet(20)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert models.cnn()(torch.zeros(2, 784)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"depth=21 must be 6n \+ 2"):
        models.resnet(21)


@pytest.mark.parametrize("model", [models.CharRNN(7), models.GPT(7, context=9)], ids=lambda model: type(model).__name__)
def test_models_of_text_do_not_see_the_character_they_predict(model):
    x = torch.randint(7, (2, 9))
    later = x.clone()
    later[:, 5:] = (x[:, 5:] + 1) % 7
    outputs, others = model(x), model(later)
    assert outputs.shape == (2, 9, 7)
    torch.testing.assert_close(outputs[:, :5], others[:, :5])
    assert not torch.allclose(outputs[:, 5], others[:, 5])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A HYPEROPT_DATA with a little of CIFAR-10 and of a text."""
    batches = tmp_path / data.CIFAR10
    batches.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in "data_batch_1", "data_batch_2", "test_batch":
        pixels = torch.randint(256, (10, 3072), dtype=torch.uint8, generator=generator)
        (batches / name).write_bytes(pickle.dumps({"data": pixels.numpy(), "labels": list(range(10))}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_bytes(b"\xef\xbb\xbf" + b"First Citizen:\r\n" * 200)
    monkeypatch.setenv("HYPEROPT_DATA", str(tmp_path))
    return tmp_path


def test_cifar10_is_read_from_whatever_files_are_there(folder):
    whole, held = data.cifar10(), data.cifar10(validation=True)
    assert whole.train_x.shape == (20, 3, 32, 32)
    assert whole.test_x.shape == (10, 3, 32, 32)
    assert (whole.train_x.dtype, whole.train_y.dtype) == (torch.float32, torch.int64)
    assert whole.train_x.mean().abs() < 0.3
    assert torch.equal(torch.cat([held.train_x, held.test_x]), whole.train_x)
    assert len(held.test_x) == 4
    assert torch.equal(data.cifar10(images=5).train_x, whole.train_x[:5])
    with pytest.raises(data.DataNotFoundError, match="holds 20 training images of the 21 that are needed"):
        data.cifar10(images=21)
    (folder / data.CIFAR10 / "test_batch").unlink()
    with pytest.raises(data.DataNotFoundError, match=f"has to contain {data.CIFAR10}: correct HYPEROPT_DATA"):
        data.cifar10()


def test_texts_are_characters_in_three_parts(folder):
    whole, held = data.text("tinyshakespeare"), data.text("tinyshakespeare", validation=True)
    assert whole.alphabet == "\n :CFeinrstz"
    assert len(whole.train) + len(whole.test) == 200 * 15
    assert "".join(whole.alphabet[i] for i in whole.train[:15]) == "First Citizen:\n"
    assert torch.equal(torch.cat([held.train, held.test]), whole.train)
    assert len(held.test) == len(whole.test)
    with pytest.raises(data.DataNotFoundError, match=r"has to contain text/warpeace_input.txt"):
        data.text("war_and_peace")
    with pytest.raises(ValueError, match="text='bible' must be one of war_and_peace, tinyshakespeare"):
        data.text("bible")


def test_text_without_network_names_the_remedy(tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.delenv("HYPEROPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    with pytest.raises(data.DataNotFoundError, match=r"connect to the network, or set HYPEROPT_DATA to a folder that contains text/tiny"):
        data.text("tinyshakespeare")


@pytest.fixture
def small():
    """m3's MLP on the digits, a few steps."""
    return replace(
        WORKLOADS["m3"],
        steps=8,
        make=lambda: models.mlp(64, 16),
        read=lambda device, validation: data.load("digits", device, validation=validation),
    )


def test_a_seed_is_one_beginning_for_every_method(small):
    assert torch.equal(small.model(1)[0].weight, small.model(1)[0].weight)
    assert not torch.equal(small.model(0)[0].weight, small.model(1)[0].weight)
    first, again, other = (list(small.batches(seed)) for seed in (0, 0, 1))
    assert len(first) == small.steps
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    held = data.load("digits", validation=True)
    seen = torch.cat([x for x, _ in small.batches(0, validation=True)])
    assert len(seen.unique(dim=0)) <= len(held.train_x)


@pytest.mark.parametrize("method", robustness.METHODS)
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_every_method_trains(small, method):
    before = small.evaluate(small.model(0))
    found = robustness.train(robustness.Run(method, 1e-2, 0), replace(small, steps=40))
    assert found["steps"] == 40
    assert 0 <= found["metric"] < before


def test_a_run_that_diverges_is_recorded_as_such(small):
    found = robustness.train(robustness.Run("SGD(momentum=0.9), cosine", 1e38, 0), replace(small, steps=200))
    assert found["metric"] is None
    assert found["steps"] < 200


def test_the_grid_of_a_peer_grows_until_its_best_is_inside():
    method, runs = robustness.METHODS["Adam, cosine"], {}
    error = {lr: abs(i - robustness.GRID.index(1e-5)) for i, lr in enumerate(robustness.GRID)}
    while True:
        cells, best = robustness.window("Adam, cosine", method, runs, full=False)
        if best:
            break
        for cell in cells:
            runs[robustness.Run("Adam, cosine", cell, 0, validation=True).key] = {"metric": error[cell] if cell < 1e-2 else None}
    assert best == 1e-5
    assert cells == [lr for lr in robustness.GRID if 3e-6 <= lr <= 3e-2]


def test_muon_is_left_out_where_a_cpu_is_too_slow_for_it():
    always = {"m3", "m3_30", "r12", "gpt", "r12_10000", "gpt_1500"}  # ResNet-20 has no matrix

    def has(device, full):
        plans = {name: robustness.plan(w, {}, full, device=device) for name, w in WORKLOADS.items()}
        return {name for name, planned in plans.items() if any(run.method == "Muon, cosine" for run in planned)}

    assert has("cpu", full=False) == always
    assert has("cuda", full=False) == has("cpu", full=True) == always | {"cnn"}


def test_robustness_is_resumed_and_drawn(small, tmp_path, monkeypatch):
    monkeypatch.setitem(robustness.WORKLOADS, "cnn", replace(small, name="cnn"))
    path = tmp_path / "robustness_cnn.json"

    def invoke(*arguments):
        only = ("--method", "Adam, cosine", "--method", robustness.RECOMMENDED, "--steps", "8")
        return CliRunner().invoke(robustness.app, ["--workload", "cnn", "--out", str(tmp_path), *only, *arguments])

    assert invoke().exit_code == 0
    runs = json.loads(path.read_text())["runs"]
    peer = [key for key in runs if key.startswith("Adam, cosine | ")]
    assert len([key for key in peer if key.endswith("validation")]) >= 5
    assert len([key for key in peer if not key.endswith("validation")]) in (5, 6)  # the best cell may be one of the five starts
    assert len(runs) == len(peer) + 5 * 2
    before = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    outcome = invoke()
    assert outcome.exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.with_suffix(".md").read_text() in outcome.output
    assert invoke("--again", robustness.RECOMMENDED).exit_code == 0
    assert json.loads(path.read_text())["runs"].keys() == runs.keys()
    assert path.stat().st_mtime_ns > before
    assert "choose another --out" in invoke("--steps", "9").output


def test_any_tower_is_put_beside_them_by_its_text(small, tmp_path, monkeypatch):
    monkeypatch.setitem(robustness.WORKLOADS, "cnn", replace(small, name="cnn"))

    def invoke(text):
        return CliRunner().invoke(
            robustness.app, ["--workload", "cnn", "--out", str(tmp_path), "--method", text, "--steps", "4", "--validation"]
        )

    text = "Adam(lr={lr}, eps=0.01) / Adam"
    outcome = invoke(text)
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads((tmp_path / "robustness_cnn_validation.json").read_text())["runs"]
    assert list(runs) == [robustness.Run(text, start, 0, validation=True).key for start in robustness.FEW]
    assert runs[f"{text} | 0.001 | 0 | validation"]["metric"] != runs[f"{text} | 1e-08 | 0 | validation"]["metric"]
    (row,) = [line for line in outcome.output.splitlines() if line.startswith(f"| {text} |")]
    assert len([cell for cell in row.split("|") if cell.strip()]) == 1 + len(robustness.FEW) + 2
    assert (tmp_path / "robustness_cnn_validation.png").exists()
    assert invoke("Adam(lr={lr}) / {lr: Adam}").exit_code == 0
    assert "no tower with {lr} where the start goes" in invoke("Adam / Adam(lr=3)").output
    assert "{eps}" in invoke("Adam(lr={lr}, eps={eps}) / Adam").output
    assert "'Adamant' in" in invoke("Adamant(lr={lr})").output


def test_the_worst_start_is_named_when_all_are_there():
    keys = [robustness.Run("Prodigy", start, 0).key for start in robustness.FEW]
    result = {"validation": False, "full": False, "runs": {key: {"metric": 3.0 + i} for i, key in enumerate(keys)}}

    def row():
        (found,) = [line for line in robustness.table(result, WORKLOADS["c3"]).splitlines() if line.startswith("| Prodigy |")]
        return [cell.strip() for cell in found.strip("|").split("|")][-3:]

    assert row() == ["7.00", "2.33", ""]
    del result["runs"][keys[2]]
    assert row() == ["", "", ""]


def test_unknown_workload_is_one_clean_line():
    outcome = CliRunner().invoke(robustness.app, ["--workload", "m4"])
    assert outcome.exit_code == 2
    assert "'m4' is none of m3, r12, c3, cnn, gpt" in outcome.output


ROWS = {
    "MNIST, error %": "m3",
    "char-RNN, perplexity": "r12",
    "simple CNN, error %": "cnn",
    "ResNet-20, error %": "c3",
    "GPT, loss": "gpt",
    "GPT, 1,500 steps, loss": "gpt_1500",
}


@pytest.mark.parametrize(("label", "name"), ROWS.items(), ids=ROWS.values())
def test_the_readme_of_the_experiments_has_the_results(label, name):
    folder = Path(robustness.__file__).parent
    lines = robustness.summary(json.loads((folder / "results" / f"robustness_{name}.json").read_text()), WORKLOADS[name])
    text = (folder / "README.md").read_text()
    head, (row,) = next(re.finditer(r"^\| workload \|.*$", text, re.M)), re.findall(rf"^\| {re.escape(label)} \|.*$", text, re.M)
    methods, cells = ([cell.strip(" `") for cell in line.strip("|").split("|")][1:] for line in (head[0], row))
    assert methods[0] == robustness.RECOMMENDED
    means = {start: score.mean for start, score in lines[methods[0]].scores.items()} if methods[0] in lines else {}
    several = f"{min(means.values()):.2f} to {max(means.values()):.2f}" if len(means) > 1 else ""
    assert cells[0] == (several or " and ".join(f"{mean:.2f} from {start:g}" for start, mean in means.items()) or "not run")
    for method, cell in zip(methods[1:], cells[1:], strict=True):
        best, at, worst = re.fullmatch(r"([\d.]+) \(([\d.e-]+)\); (\S+)", cell).groups()
        scores, (cell_lr, score) = lines[method]
        found = max(score.mean for score in scores.values())
        assert (float(at), best) == (cell_lr, f"{score.mean:.2f}")
        assert abs(float(worst) - found) <= 0.5 if math.isfinite(found) else worst == "diverged"


# ---- the command lines


SCRIPTS = [
    "adopt_toy",
    "bench",
    "char_rnn",
    "cifar",
    "exponent",
    "gpt",
    "heights",
    "held_out",
    "inclusion",
    "mnist",
    "mnist_table",
    "robustness",
    "tops",
    "tune",
    "unified",
    "useful",
    "zoo",
]


def command(name, *arguments):
    app = importlib.import_module(f"experiments.{name}").app
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(name):
    return command(name, "--help").output


def is_one_line_for(outcome, option):
    assert outcome.exit_code == 2, outcome.output
    assert "Traceback" not in outcome.output
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("Error: ")]
    assert f"Invalid value for {option}: " in line.replace("'", "")
    return True


def test_every_script_with_a_command_line_is_listed():
    folder = Path(mnist.__file__).parent
    assert sorted(path.stem for path in folder.glob("*.py") if "\napp = " in path.read_text()) == SCRIPTS
    assert not [path.name for path in folder.glob("*.py") if "typer.run(" in path.read_text()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_options_are_one_clean_line(name, tmp_path):
    (tmp_path / "file").touch()
    shown = options(name)
    assert "--out" in shown
    assert is_one_line_for(command(name, "--out", tmp_path / "file"), "--out")
    below = command(name, "--out", tmp_path / "file" / "below")
    assert is_one_line_for(below, "--out")
    assert f"{tmp_path / 'file'} is a file: give a folder" in below.output
    if "--device" in shown:
        for device in "nonsense", "cuda:99", "cpu:x", "meta", "":
            assert is_one_line_for(command(name, "--device", device, "--out", tmp_path), "--device")
    if "--seed " in shown:
        for seed in "-1", str(2**63), "one":
            assert is_one_line_for(command(name, "--seed", seed, "--out", tmp_path), "--seed")
    if "--seeds " in shown:
        assert is_one_line_for(command(name, "--seeds", "0", "--out", tmp_path), "--seeds")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_to_is_one_clean_line(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    outcome = command("mnist", "--out", tmp_path / "new")
    assert is_one_line_for(outcome, "--out")
    assert f"{tmp_path} cannot be written to: give another folder" in outcome.output


@pytest.mark.parametrize("text", ["{", "[]"])
@pytest.mark.parametrize(
    ("name", "file"), [("heights", "heights"), ("robustness", "robustness_m3"), ("useful", "useful"), ("bench", "bench")]
)
def test_results_that_cannot_be_read_are_one_clean_line(name, file, text, tmp_path):
    (tmp_path / f"{file}.json").write_text(text)
    outcome = command(name, "--figures", "--out", tmp_path)
    assert is_one_line_for(outcome, "--out")
    assert "give another folder" in outcome.output
    assert (tmp_path / f"{file}.json").read_text() == text


def test_a_tower_that_averages_is_evaluated_with_its_average(tmp_path, monkeypatch):
    inside = []
    kept = HyperOptimizer.averaged

    def seen(self):
        inside.append(self.tower)
        return kept(self)

    monkeypatch.setattr(HyperOptimizer, "averaged", seen)
    outcome = run("--tower", "ScheduleFree(Adam)(lr=0.01) / Adam", "--device", "cpu", "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert len(inside) == 3 * EPOCHS
    assert {str(tower).partition("(lr")[0] for tower in inside} == {"ScheduleFree(Adam)"}


def test_there_is_no_progress_bar_without_a_terminal(finished):
    output, _ = finished
    assert "step/s" not in output
    assert "\r" not in output


def interrupted(monkeypatch, after):
    """Ctrl-C in a step of `experiments.mnist`."""
    calls = []

    def step(*arguments):
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return kept(*arguments)

    kept = driven.step  # torch wraps the optimizer's own
    monkeypatch.setattr(driven, "step", step)


@pytest.mark.parametrize(("after", "names", "count"), [(8, ["tower"], 8), (STEPS + 1, ["tower", "initial"], 1), (STEPS, ["tower"], None)])
def test_ctrl_c_leaves_what_was_learned_so_far(after, names, count, tmp_path, monkeypatch):
    interrupted(monkeypatch, after)
    outcome = run("--tower", "Adam / Adam", "--device", "cpu", "--out", tmp_path)
    assert outcome.exit_code == 130
    assert "Traceback" not in outcome.output
    assert "Interrupted: this is what there was until then." in outcome.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert [run["run"] for run in result["runs"]] == names
    assert result["runs"][-1].get("stopped_after") == count
    assert len(read_csv(tmp_path / "hyperparameters.csv")["step"]) == min(after, STEPS)
    assert (tmp_path / "hyperparameters.png").exists()


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path, monkeypatch):
    interrupted(monkeypatch, 0)
    outcome = run("--device", "cpu", "--out", tmp_path)
    assert outcome.exit_code in (1, 130)
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "result.json").exists()


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    store.write({"runs": 1}, path)

    def interrupted(*_):
        raise KeyboardInterrupt

    for name in "replace", "write_text":
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.write({"runs": 2}, path)
        assert json.loads(path.read_text()) == {"runs": 1}
    folder = Path(mnist.__file__).parent
    assert [file.name for file in folder.glob("*.py") if "json.dump" in file.read_text()] == ["store.py"]


def test_to_forget_what_is_not_there_is_an_error(tmp_path):
    kept = store.Store(tmp_path / "results.json", seeds=1)
    kept.forget(["a"])  # nothing was run yet
    kept.runs.update({"task | a | 0": {}, "task | b | 0": {}})
    with pytest.raises(
        typer.BadParameter, match=r"no run in .*results.json begins with 'b': give the beginning of a key, such as 'task \| a"
    ):
        kept.forget(["task | a", "b"])
    assert len(kept.runs) == 2
    kept.forget(["task | a"])
    assert list(kept.runs) == ["task | b | 0"]


def slow(seconds):
    time.sleep(seconds)
    return {"metric": seconds}


INTERRUPTED = """
import sys
from functools import partial
from pathlib import Path
sys.path[:0] = {path!r}
from experiments.store import Store
from test_experiments import slow

if __name__ == "__main__":
    try:
        Store(Path({out!r})).complete({{"a": partial(slow, 0), "b": partial(slow, 500)}}, jobs=2)
    except KeyboardInterrupt:
        sys.exit(77)
"""


def test_ctrl_c_ends_the_processes_of_a_pool_and_keeps_the_runs_that_are_done(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "results.json"
    script.write_text(INTERRUPTED.format(path=[str(Path(mnist.__file__).parent.parent), str(Path(__file__).parent)], out=str(out)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        begin = time.monotonic()
        while not out.exists() and time.monotonic() < begin + 120:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 77, errors
    assert not errors, errors  # no traceback, and no progress bar without a terminal
    assert list(json.loads(out.read_text())["runs"]) == ["a"]


def late(path):
    time.sleep(20)
    path.touch()


def test_a_pool_that_is_left_early_ends_its_processes(tmp_path):
    for _ in execute({"a": partial(slow, 0), "b": partial(late, tmp_path / "late")}, jobs=2):
        break
    for process in multiprocessing.active_children():
        process.join()
    assert not (tmp_path / "late").exists()
