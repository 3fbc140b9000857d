"""The scripts of experiments/, end to end on scikit-learn's digits."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from experiments import data, mnist, models
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
