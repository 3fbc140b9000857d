"""The experiments on CIFAR-10, texts and a GPT: models, protocols, what is learned from where; each script end to end on a few steps."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small import backward, net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from typer.testing import CliRunner

from experiments import char_rnn, cifar, data, exponent, gpt, models, plots, published, tables, training, workloads
from experiments.store import Store, metrics
from experiments.training import REPLAYED
from hyperopt import SGD, Adam, Hyper, HyperOptimizer, Real

SCRIPTS = {"cifar_resnet20": cifar, "exponent_resnet20": exponent, "char_rnn": char_rnn, "gpt": gpt}
SEEDS = 2


# ---- models and batches


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_vgg_and_resnet_for_32_pixels():
    # The usual counts for CIFAR-10: 14.7 and 11.2 million.
    assert size(models.vgg16()) == 14_728_266
    assert size(models.resnet18()) == 11_173_962
    x = torch.zeros(2, 3, 32, 32)
    assert models.vgg16()(x).shape == models.resnet18()(x).shape == (2, 10)
    # Three of its stages halve the pixels, and nothing before them.
    stages = nn.Sequential(*list(models.resnet18().children())[:-2])
    assert stages(x).shape == (2, 512, 4, 4)
    for make in models.vgg16, models.resnet18:
        first = next(module for module in make().modules() if isinstance(module, nn.Conv2d))
        assert first.weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.1)  # √(2 / fan-in), not torch's √(1 / (3·fan-in))
    assert list(models.CIFAR) == ["resnet20", "resnet32", "resnet44", "resnet56", "vgg16", "resnet18"]
    assert size(models.CIFAR["resnet44"]()) == 658_586


def test_images_are_moved_at_random_and_zeros_come_in():
    x = torch.rand(300, 3, 7, 5) + 1
    moved = workloads._shifted(x, 2, torch.Generator().manual_seed(0))
    assert torch.equal(moved, workloads._shifted(x, 2, torch.Generator().manual_seed(0)))
    wide, seen = nn.functional.pad(x, (2, 2, 2, 2)), []
    for image, padded in zip(moved, wide, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, padded[:, i : i + 7, j : j + 5])]
        assert len(fits) == 1
        seen += fits
    assert set(seen) == {(i, j) for i in range(5) for j in range(5)}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A HYPEROPT_DATA with 40 training and 20 test images of CIFAR-10."""
    folder = tmp_path / "data" / data.CIFAR10
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in "data_batch_1", "data_batch_2", "test_batch":
        pixels = torch.randint(256, (20, 3072), dtype=torch.uint8, generator=generator)
        (folder / name).write_bytes(pickle.dumps({"data": pixels.numpy(), "labels": [i % 10 for i in range(20)]}))
    monkeypatch.setenv("HYPEROPT_DATA", str(folder.parent))
    workloads._read_once.cache_clear()
    yield folder
    workloads._read_once.cache_clear()


def test_the_protocol_of_cifar(images, monkeypatch):
    workload = workloads.cifar10("resnet20", 40, 3)
    assert workload.steps == 3
    assert workloads.cifar10("resnet20", 20_000, 2).steps == 2 * 157
    assert workloads.cifar10("resnet20", 20_000, 2, steps=5).steps == 5
    x, _ = next(iter(workload.batches(0)))
    assert x.shape == (40, 3, 32, 32)
    assert not (x == 0).all(1).any(0)[8:24, 8:24].any()
    assert (x == 0).all(1)[:, 0].any(), "no image was moved down"
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    workload.evaluate(model)
    assert seen == [8]  # a fifth of 40
    for p in workload.model(0).parameters():
        assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last)


def tiny_text(device, validation=False):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(5, (n,), generator=generator).to(device) for n in (400, 60))
    return data.Text(train, test, "\nabcd")


def texts(steps, **changes):
    """A char-RNN on a text of five letters."""
    return replace(
        workloads.WORKLOADS["r12"],
        steps=steps,
        batch=2,
        length=6,
        blocks=(4, 8),
        make=partial(models.CharRNN, 5, 8),
        read=tiny_text,
        **changes,
    )


class Counts(nn.Module):
    """Predicts the letter after the last one, and remembers how many it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(50.0))
        self.shown = []

    def forward(self, x):
        self.shown.append(x.shape[1])
        return self.weight * nn.functional.one_hot((x + 1) % 5, 5)


def test_a_sample_is_what_the_model_says():
    model, workload = Counts(), texts(1)
    assert workload.sample(model, count=12) == "abcd\nabcd\nab"
    assert model.shown == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6]  # no more than the sequences of training
    drawn = workload.model(0)
    assert workload.sample(drawn, 50) == workload.sample(drawn, 50) != workload.sample(drawn, 50, seed=1)
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    assert workload.sample(model, count=12) == ""


# ---- what is run


def test_the_papers_sgd():
    text = "SGD(lr={}, momentum={}, weight_decay=0.0001, learn=(lr, momentum), horizon=1, trust=None, domains={{lr: Real, momentum: Real}})"
    above = " / SGD(lr={{lr: {}, momentum: {}}}, trust=None)"
    for alpha, mu, on_alpha, on_mu in (0.1, 0.9, 1e-5, 1e-5), (1, 0.99, 1e-3, 1e-4), (0.01, 0.09, 1e-7, 1e-6 / 0.91):
        tower = cifar.paper(alpha, mu)
        (top,) = tower.above.values()
        steps = top.rule.lr
        assert steps == pytest.approx({"lr": on_alpha, "momentum": on_mu})
        assert str(tower) == (text + above).format(alpha, mu, *steps.values())


def test_the_papers_adam_learns_betas_through_tanh():
    ours = char_rnn.paper(Adam, 2e-3)
    theirs = Hyper(Adam, lr=2e-3, learn=("lr", "beta1", "beta2"), horizon=1, trust=None, domains=published.DOMAINS[Adam])
    theirs = theirs.stack(SGD, lr={"lr": 2e-5, "beta1": 1e-4, "beta2": 2e-4}, trust=None)
    ends = []
    for tower in ours, theirs:
        model = net(torch.float64)
        optimizer = tower.bind(model.parameters())
        for step in range(100):
            backward(model, step)
            optimizer.step()
        ends.append(torch.stack([optimizer.hyperparameters()[f"0.{name}"] for name in ("lr", "beta1", "beta2")]))
    torch.testing.assert_close(*ends, rtol=1e-8, atol=0)
    moved = (ends[0] / torch.tensor([2e-3, 0.9, 0.999], dtype=torch.float64) - 1).abs()
    assert (moved > 1e-8).all(), "something was not learned: the comparison says nothing"
    assert ours.domains == {"lr": Real()}


def rates(make, steps):
    """The lr of each step."""
    optimizer, schedule = make(net())
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
    return optimizer, seen


def test_the_hand_made_schedule_falls_twice():
    optimizer, seen = rates(cifar.references(8)[cifar.HAND_MADE], 8)
    assert seen == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


def test_warm_up_and_cosine():
    optimizer, seen = rates(gpt.cosine(3e-3, 200), 200)
    assert seen[0] == pytest.approx(3e-3 / 25)
    assert max(seen) == pytest.approx(3e-3)
    assert np.argmax(seen) == 19  # the first tenth
    assert all(np.diff(seen[:20]) > 0)
    assert all(np.diff(seen[19:]) < 0)
    assert seen[-1] < 1e-3 * 3e-3
    assert seen[110] == pytest.approx(1.5e-3, rel=0.02)
    group = optimizer.param_groups[0]
    assert (group["decoupled_weight_decay"], group["weight_decay"], group["betas"]) == (True, 0.01, (0.9, 0.999))


def plans():
    log = Path("log")
    full = workloads.cifar10("resnet20", 20_000, 2)
    return {
        "cifar_resnet20": cifar.plan(full, SEEDS, log),
        "exponent_resnet20": exponent.plan(full, SEEDS, log),
        "char_rnn": char_rnn.plan(char_rnn.STEPS, SEEDS, log),
        "gpt": gpt.plan(gpt.workload(500, 16), SEEDS, log),
    }


COUNTS = {
    "cifar_resnet20": SEEDS * (4 * 9 + 2),
    "exponent_resnet20": SEEDS * (4 * 6 + 2 * 6 + 2),
    "char_rnn": 2 * 3 * (3 * SEEDS + 1),
    "gpt": SEEDS * (5 + 5 * 3),
}
REPLAYS = {"cifar_resnet20": 9, "exponent_resnet20": 6, "char_rnn": 3, "gpt": 6}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_cell_is_run_and_can_be_sent_to_a_process(name):
    plan = plans()[name]
    assert len(plan) == COUNTS[name]
    assert sum(bool(task.keywords["after"]) for task in plan.values()) == REPLAYS[name]
    assert all(key.endswith(" | 0") for key, task in plan.items() if task.keywords["after"])
    for key, task in plan.items():
        again = pickle.loads(pickle.dumps(task))
        assert again.args[2] == int(key[-1])
        (optimizer, *_) = training.bind(again.args[1], net())
        plain = " | held " in f" | {key}" or any(label in key for label in ("held | ", "cosine", "hand-made", "torch.optim"))
        if isinstance(optimizer, HyperOptimizer):
            assert bool(optimizer.tower.above) != plain, key
        else:
            assert plain, key


def test_the_whole_char_rnn_has_all_seeds():
    plan = char_rnn.plan(50_000, 3, Path("log"))
    assert len(plan) == 2 * 3 * 4 * 3
    assert all(task.args[0].steps == 50_000 for task in plan.values())


def test_cells_differ_as_they_should():
    text = {key: str(task.args[1]) for key, task in plans()["cifar_resnet20"].items()}
    assert text["defaults | alpha 1, mu 0.99 | 0"] == "SGD(lr=1.0, momentum=0.99, weight_decay=0.0001) / Adam"
    assert text["all | alpha 0.1, mu 0.9 | 0"] == (
        "SGD(lr=0.1, momentum=0.9, weight_decay=0.0001, learn=(lr, momentum, weight_decay)) / Adam"
    )
    text = {key: str(task.args[1]) for key, task in plans()["exponent_resnet20"].items()}
    assert (
        text["eta | eta 1/2, running max | 1"]
        == "Exponent(beta1=0.001, eta=0.5, running_max=True, learn=(eta,), horizon=1000, prior=None) / Adam"
    )
    assert text["both | eta 4 | 0"] == "Exponent(beta1=0.001, eta=4.0, learn=(lr, eta), horizon=1000, prior=None) / Adam"
    text = {key: str(task.args[1]) for key, task in plans()["gpt"].items()}
    assert text["all | 0.1 | 0"] == "Adam(lr=0.1, weight_decay=0.01, decoupled=True, learn=(lr, beta1, beta2, eps, weight_decay)) / Adam"


# ---- tables and figures


def run(metric, **courses):
    return {"metric": metric, "courses": {"step": [1, 2], **courses}, "curve": {"step": [2], "metric": [metric]}, "commit": "abc"}


def test_what_tables_are_made_of():
    runs = [run(1.0, **{"0.lr": [1, 2], "0.eta": [3, 4], "1.lr": [9, 9]}), run(2.0, **{"0.lr": [1, 4], "0.eta": [3, None]})]
    assert metrics(runs) == [1.0, 2.0]
    assert tables.ends(runs) == "2 to 4, not finite"
    assert tables.ends(runs[:1], ["eta"]) == "4"
    assert tables.ends([]) == ""
    assert tables.replay(runs) == "–"
    runs[1][REPLAYED] = {"metric": None}
    assert tables.replay(runs) == "2.00 → diverged"
    cells = {"a": [[1.0, 2.0], [5.0], [3.0]], "b": [[2.0], [4.0], []], "c": [[np.inf], [np.inf], [2.0]]}
    rows = tables.compare(cells, ["a"], ["b", "c"]).splitlines()
    assert rows[-1] == "| a | 1 of 2 | 2 of 3 |"


def test_a_band_is_the_mean_and_the_extent_of_whole_lines():
    axes = Figure().subplots()
    plots.band(axes, [([1, 2, 3], [1.0, 2.0, None]), ([1, 2, 3], [3.0, np.inf, 1.0]), ([1, 2], [9.0, 9.0])], top=6, color="C3")
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), [2, 4, np.nan])
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).y0 == pytest.approx(1)
    assert band.get_datalim(axes.transData).y1 == pytest.approx(6)
    plots.band(axes, [])
    plots.against(axes, {0.1: [run(1.0), run(3.0)], 1.0: [], 10.0: [run(None), run(4.0)]}, top=8)
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [0.1, 10])
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [2, 6])
    plots.finish(axes)
    assert axes.get_legend() is None


def test_the_answer_to_how_eta_is_chosen(tmp_path):
    store = Store(tmp_path / "x.json", seeds=1, title="title")
    error = {"held": [9, 8, 7, 4, 5, 60], "eta": [8, 7, 6, 5, 6, 7], "lr": [7, 7, 7, 5, 6, 6.5], "both": [5, 5, 5, 6, 5.5, 5]}
    assert exponent.answer(store) == []
    for method, values in error.items():
        for eta, value in zip(exponent.ETAS, values, strict=True):
            learned = {"0.eta": [2.0, exponent.ETAS[eta] / 2]} if method in ("eta", "both") else {}
            store.runs[f"{exponent.name(method, eta, False)} | 0"] = run(value, **learned)
    lines = "\n".join(exponent.answer(store))
    assert "- eta and lr held: 4.00 % (from 2) to 60.00 % (from 4)." in lines
    assert "- eta learned: 5.00 % (from 2) to 8.00 % (from 1/3); eta ends between 0.17 and 2." in lines
    assert "does best with lr and eta learned: at most 6.00 % whatever" in lines
    assert "finds eta = 2 and 4.00 %" in lines
    del store.runs["lr | eta 3 | 0"]
    assert exponent.answer(store) == []


def test_the_best_peak_is_the_mean_of_its_seeds(tmp_path):
    store = Store(tmp_path / "x.json", seeds=2)
    assert gpt.best(store) == gpt.PEAKS[0]
    for peak, losses in {3e-4: (1.0, 4.0), 3e-3: (2.0, 2.0), 3e-2: (None, 0.1)}.items():
        store.runs.update({f"{gpt.name('cosine', peak)} | {seed}": run(loss) for seed, loss in enumerate(losses)})
    assert gpt.best(store) == 3e-3


# ---- end to end


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


@pytest.fixture
def invoke(images, tmp_path, monkeypatch):
    """Calls a script on a model and data of its kind that take no time."""
    monkeypatch.setitem(models.CIFAR, "resnet20", small_net)
    monkeypatch.setattr(char_rnn, "workload", lambda text, steps: texts(steps, title=f"{text} of five letters"))
    monkeypatch.setattr(char_rnn, "SAMPLE", 20)
    monkeypatch.setattr(gpt, "workload", lambda steps, batch: texts(steps, title="five letters", metric="loss"))
    of_images = ["--images", "40", "--epochs", "9"]

    def call(name, *arguments, seeds=SEEDS):
        script = SCRIPTS[name]
        common = ["--steps", "6", "--seeds", str(seeds), "--out", str(tmp_path), "--log", str(tmp_path / "log")]
        return CliRunner().invoke(script.app, [*common, *(of_images if "resnet" in name else []), *arguments])

    return call


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_resumes_and_draws(invoke, tmp_path, name):
    path = tmp_path / f"{name}.json"
    assert "holds no runs" in invoke(name, "--figures").output
    outcome = invoke(name)
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads(path.read_text())["runs"]
    assert runs.keys() == plans()[name].keys()
    assert all(run["steps"] == 6 and run["commit"] for run in runs.values())
    assert sum(REPLAYED in run for run in runs.values()) == REPLAYS[name]
    for run in runs.values():
        if REPLAYED in run:
            assert run[REPLAYED]["loss"] == pytest.approx(run["loss"], rel=2e-3)
    text = path.with_suffix(".md").read_text()
    assert text in outcome.output
    assert "nan" not in text
    # Only what is missing is run, and drawing needs nothing but the file.
    before = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    path.with_suffix(".md").unlink()
    assert invoke(name, "--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".md").read_text() == text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    one = next(key for key in runs if key.endswith("1"))
    assert invoke(name, "--again", one).exit_code == 0
    again = json.loads(path.read_text())["runs"]
    assert again.keys() == runs.keys()
    assert list(again)[-1] == one
    assert again[one]["metric"] == runs[one]["metric"]
    assert "holds runs of" in invoke(name, seeds=3).output


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_of_what_is_there_so_far(invoke, tmp_path, name):
    key = next(key for key in plans()[name] if key.startswith(("all", "both", "auto")) or "| auto |" in key)
    path = tmp_path / f"{name}.json"
    invoke(name, "--steps", "2", seeds=1)
    result = json.loads(path.read_text())
    result["runs"] = {key: result["runs"][key]}
    path.write_text(json.dumps(result))
    outcome = invoke(name, "--steps", "2", "--figures", seeds=1)
    assert outcome.exit_code == 0, outcome.output
    assert "–" in outcome.output


def test_the_numbers_of_the_papers_stand_beside_ours(invoke, tmp_path):
    invoke("cifar_resnet20", seeds=1)
    result = json.loads((tmp_path / "cifar_resnet20.json").read_text())
    row = next(line for line in (tmp_path / "cifar_resnet20.md").read_text().splitlines() if line.startswith("| 0.1, 0.9 |"))
    ours = result["runs"]["held | alpha 0.1, mu 0.9 | 0"]["metric"]
    assert row.startswith(f"| 0.1, 0.9 | 13.3 → 9.5 | {ours:.2f} |")
    invoke("char_rnn", seeds=1)
    result = json.loads((tmp_path / "char_rnn.json").read_text())
    first, second = (line for line in (tmp_path / "char_rnn.md").read_text().splitlines() if line.startswith("| 0.002 |"))
    ours = [result["runs"][f"{text} | held | 0.002 | 0"]["metric"] for text in char_rnn.TEXTS]
    assert first.startswith(f"| 0.002 | 5.27 ± 0.31 | 5.41 ± 0.26 | {ours[0]:.2f} |")
    assert second.startswith(f"| 0.002 |  |  | {ours[1]:.2f} |")


def test_tensorboard_has_samples(invoke, tmp_path):
    assert invoke("char_rnn", "--steps", "4", seeds=1).exit_code == 0
    events = EventAccumulator(str(tmp_path / "log" / "war_and_peace_held_0.002_0"), size_guidance={"tensors": 0}).Reload()
    samples = events.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [1, 2, 3, 4]
    (text,) = samples[-1].tensor_proto.string_val
    assert set(text.decode()) <= set("\nabcd ")
    assert len(text.decode().replace(" ", "")) == 20


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_data_is_one_clean_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HYPEROPT_DATA", str(tmp_path))
    workloads._read_once.cache_clear()
    outcome = CliRunner().invoke(SCRIPTS[name].app, ["--steps", "1", "--out", str(tmp_path), "--log", str(tmp_path / "log")])
    assert outcome.exit_code == 2
    missing = "cifar-10-batches-py" if "resnet" in name else "text/warpeace_input.txt" if name == "char_rnn" else "text/tinyshakespeare.txt"
    assert f"{missing}: correct HYPEROPT_DATA" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("name", ["cifar_resnet20", "exponent_resnet20"])
def test_an_unknown_model_is_one_clean_line(name):
    outcome = CliRunner().invoke(SCRIPTS[name].app, ["--model", "alexnet"])
    assert outcome.exit_code == 2
    assert "'alexnet' is none of resnet20, resnet32, resnet44, resnet56, vgg16, resnet18" in outcome.output
