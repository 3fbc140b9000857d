"""What the papers' experiments share, and the scripts of the MNIST table and of the heights, end to end on a few steps."""

import copy
import json
import math
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from gradient_descent_the_ultimate_optimizer import gdtuo
from small import backward, net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import StepLR
from typer import BadParameter
from typer.testing import CliRunner

from experiments import data, heights, mnist_table, models, pool, provenance, published, tables, tops, training, unified, workloads
from experiments.store import Store
from experiments.training import HELD, REPLAYED
from experiments.workloads import WORKLOADS
from hyperopt import SGD, Adam, AdamW, Hyper, RMSprop, ScheduleFree, batch_statistics


def digits(device, validation=False):
    """Digits, as wide as MNIST."""
    whole = data.load("digits", device, validation=validation)
    wide = [nn.functional.pad(x, (0, 784 - 64)) for x in (whole.train_x, whole.test_x)]
    return data.Data(wide[0], whole.train_y, wide[1], whole.test_y)


@pytest.fixture
def small():
    """m3's MLP on the digits, a few steps."""
    return replace(WORKLOADS["m3"], steps=30, make=partial(models.mlp, 784, 16), read=digits)


# ---- one run


def test_a_tower_and_what_follows_on_plain_torch(small):
    found = training.train(small, "Adam(lr=1e-3, learn=(lr, beta1)) / Adam(lr=0.05)", 1, after=(HELD, REPLAYED), evaluations=3)
    assert found["curve"]["step"] == [10, 20, 30]
    assert found["curve"]["metric"][-1] == found["metric"]
    assert found["courses"].keys() == {"step", "0.lr", "0.beta1"}
    assert found["courses"]["step"] == list(range(1, 31))
    lrs = found["courses"]["0.lr"]
    assert max(lrs) > 1.5 * min(lrs), "nothing was learned: the comparisons below say nothing"
    assert found[REPLAYED]["loss"] == pytest.approx(found["loss"], rel=1e-4)
    assert found[REPLAYED]["metric"] == found["metric"]
    constant = training.train(small, f"Adam(lr={lrs[-1]}, beta1={found['courses']['0.beta1'][-1]})", 1)
    assert found[HELD]["loss"] == pytest.approx(constant["loss"], rel=1e-3)
    assert abs(found[HELD]["loss"] - found["loss"]) > 0.01 * found["loss"]
    other = training.train(small, "Adam(lr=1e-3, learn=(lr, beta1)) / Adam(lr=0.05)", 2)
    assert other["loss"] != found["loss"]


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return [optimizer, StepLR(optimizer, 10, 0.1)]


def test_a_schedule_of_torch_is_recorded_as_it_was_used(small):
    found = training.train(small, stepped, 0)
    assert found["courses"]["0.lr"] == [1.0] * 10 + [0.1] * 10 + [0.01] * 10


def test_what_diverges_is_recorded_as_such_in_json(small):
    found = training.train(replace(small, steps=200), "SGD(lr=1e38)", 0)
    assert found["metric"] is None
    assert found["loss"] is None
    assert found["steps"] < 200
    assert "NaN" not in json.dumps(found)


def normed():
    return nn.Sequential(nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10))


class ByLoss(workloads.Workload):
    """Measured by the loss, which tells apart what has the same error."""

    @torch.no_grad()
    def evaluate(self, model, validation=False):
        model.eval()
        images = digits("cpu")
        loss = self.loss(model, images.test_x, images.test_y).item()
        model.train()
        return loss


def test_an_average_is_evaluated_with_statistics_of_its_own(small):
    workload = ByLoss(**{**vars(small), "make": normed})
    tower = Hyper(ScheduleFree(Adam), lr=1e-2).stack(Adam)
    found = training.train(workload, tower, 0, evaluations=2)
    model = workload.model(0)
    optimizer = tower.bind(model.parameters())
    for x, y in workload.batches(0):
        optimizer.zero_grad()
        workload.loss(model, x, y).backward()
        optimizer.step()
    others = [workload.evaluate(model)]
    with batch_statistics(model, workload.batches(0)):
        others.append(workload.evaluate(model))
    with optimizer.averaged():
        others.append(workload.evaluate(model))
        with batch_statistics(model, workload.batches(0)):
            assert found["metric"] == workload.evaluate(model)
    assert found["metric"] not in others, "the comparison says nothing"


@pytest.mark.parametrize(("metric", "tag"), [("error %", "test_error_percent"), ("loss", "test_loss")])
def test_tensorboard_and_the_observer(small, tmp_path, metric, tag):
    seen = []

    def observe(model, writer, step):
        seen.append(step)
        writer.add_scalar("observed", step, step)

    training.train(replace(small, metric=metric), "SGD / Adam", 0, evaluations=2, log=tmp_path, observe=observe)
    assert seen == [15, 30]
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("observed")] == [(15, 15), (30, 30)]
    assert [e.step for e in events.Scalars(tag)] == [15, 30]
    assert len(events.Scalars("loss")) == len(events.Scalars("hyper/0.lr")) == 30


def test_a_long_run_is_thinned_and_keeps_its_ends():
    columns = training.thin(torch.arange(1, 1001).numpy(), {"0.lr": torch.arange(1000).double().numpy()}, points=7)
    assert len(columns["step"]) == len(columns["0.lr"]) == 7
    assert (columns["step"][0], columns["step"][-1]) == (1, 1000)
    assert columns["0.lr"] == [step - 1 for step in columns["step"]]


@pytest.mark.parametrize(
    "tower",
    [
        Hyper(SGD, lr=0.1, momentum=0.9, nesterov=True),
        Hyper(AdamW, lr=0.02, beta1=0.5),
        Hyper(Adam, amsgrad=True),
        Hyper(RMSprop, centered=True),
        Hyper(Adam, bias_correction=False),
    ],
    ids=str,
)
def test_plain_is_level_0(tower):
    models_, optimizers = [net(), net()], []
    for model, make in zip(models_, (tower.bind, partial(training.plain, tower.stack(SGD))), strict=True):
        optimizers.append(make(model.parameters()))
        for step in range(10):
            backward(model, step)
            optimizers[-1].step()
    assert isinstance(optimizers[1], torch.optim.Optimizer)
    for p, q in zip(models_[0].parameters(), models_[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- many runs


def ok(value):
    return {"metric": value}


class Killed(BaseException):
    """As a signal is, no Exception."""


def fail():
    raise Killed


def test_a_store_goes_on_where_it_was_killed(tmp_path):
    path = tmp_path / "results" / "x.json"
    store = Store(path, steps=3)
    with pytest.raises(Killed):
        store.complete({"a": partial(ok, 1.0), "b": fail, "c": partial(ok, 3.0)})
    assert json.loads(path.read_text())["runs"].keys() == {"a"}
    again = Store(path, steps=3)
    again.complete({"a": fail, "b": partial(ok, None), "c": partial(ok, 3.0)})
    assert Store(path, steps=3).metrics(["a", "b", "c", "d"]) == [1.0, math.inf, 3.0]
    before = path.stat().st_mtime_ns
    again.complete({"a": fail})
    assert path.stat().st_mtime_ns == before
    assert list(path.parent.iterdir()) == [path]
    again.forget(["b", "c"])
    assert again.runs.keys() == {"a"}
    for part in again.result["machine"], again.result["commit"], "torch":
        assert part in again.caption()
    with pytest.raises(BadParameter, match=r"holds runs of \{'steps': 3\}, not of \{'steps': 4\}"):
        Store(path, steps=4)


def test_a_caption_names_every_machine_torch_and_commit(monkeypatch, tmp_path):
    store = Store(tmp_path / "x.json")
    store.result |= {"command": "first", "machine": "slow", "torch": "2.11", "commit": "aaa"}
    store.runs["of before machines were kept"] = {"metric": 1.0, "commit": "bbb"}
    monkeypatch.setattr(provenance, "origin", lambda: {"machine": "fast", "torch": "2.14", "commit": "ccc"})
    store.complete({"new": partial(ok, 2.0), "newer": partial(ok, 3.0)})
    caption = "first · slow · torch 2.11; fast · torch 2.14 · commit bbb, ccc"
    assert Store(store.path).caption() == caption
    lines = provenance.caption(store.result, 30).splitlines()  # under a figure that is no wider
    assert " ".join(lines) == caption
    assert len(lines) > 1
    assert max(map(len, lines)) <= 30


def test_processes_have_one_thread_and_read_data_once(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = dict(pool.execute({"threads": torch.get_num_threads, "other": partial(ok, 1.0)}, jobs=2))
    assert found == {"threads": 1, "other": {"metric": 1.0}}
    workload = replace(WORKLOADS["m3"], read=partial(data.load, "digits"))
    next(workload.batches(0))
    before = workloads._read_once.cache_info()
    next(pickle.loads(pickle.dumps(workload)).batches(0))
    after = workloads._read_once.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 0)


def test_missing_data_is_one_clean_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPEROPT_DATA", str(tmp_path))
    workloads._read_once.cache_clear()
    for app in mnist_table.app, heights.app:
        outcome = CliRunner().invoke(app, ["--steps", "1", "--out", str(tmp_path), "--log", str(tmp_path / "log")])
        assert outcome.exit_code == 2
        assert "MNIST/raw: correct HYPEROPT_DATA" in outcome.output
        assert "Traceback" not in outcome.output


def test_numbers_in_tables():
    assert tables.mean_sd([]) == "–"
    assert tables.mean_sd([1.0, math.inf]) == "diverged"
    assert tables.mean_sd([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert tables.mean_sd([1.5]) == "1.50"
    assert tables.mean_sd([2.3e30]) == "2.3e+30"
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert training.slug("SGD(0.01), lr / Adam(0.1) | paper | 0") == "SGD(0.01)_lr_Adam(0.1)_paper_0"


# ---- the MNIST table


def trained(make):
    model = net()
    optimizer = make(model)
    for step in range(30):
        backward(model, step)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), float(optimizer.param_groups[0]["lr"])


class Unguarded(published.Authors):
    """Their code without what guards its roots, v that starts at 1e-8 and eps under the root, and the upper Adam's t counted as ours."""

    def __init__(self, *settings):
        super().__init__(*settings)
        for level in self.level0, self.level0.optimizer:
            for name, value in {"eps": 1e-30, "log_eps": -30.0}.items():
                if hasattr(level, name):
                    setattr(level, name, value)
        self.first = True

    def step(self):
        super().step()
        above = self.level0.optimizer
        if self.first and hasattr(above, "num_stepments"):
            above.num_stepments = 0  # they count the first step, for which there is no hypergradient
        self.first = False


@pytest.mark.parametrize("row", mnist_table.ROWS, ids=lambda row: row.name)
def test_the_papers_settings_are_the_authors_code(row, monkeypatch):
    monkeypatch.setitem(mnist_table.EXTRA, RMSprop, {"eps": 1e-12})
    monkeypatch.setitem(mnist_table.EXTRA, Adam, {"eps": 1e-12})
    monkeypatch.setattr(mnist_table, "Authors", Unguarded)
    ours, lr = trained(lambda model: mnist_table.paper(row).bind(model.parameters()))
    theirs, expected = trained(lambda model: mnist_table.authors(row, model)[0])
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert lr == pytest.approx(expected, rel=1e-3)
    assert bool(row.above) == (abs(lr / mnist_table.START[row.rule] - 1) > 0.01)


def test_domains_of_the_paper():
    value = torch.tensor([0.001, 0.5, 0.99, 0.999])
    square, tanh = published.Square(), published.Tanh()
    torch.testing.assert_close(square.raw(value), value.sqrt())
    torch.testing.assert_close(square.value(-square.raw(value)), value)
    torch.testing.assert_close(tanh.raw(value), gdtuo.Adam.unclamp(value), rtol=1e-4, atol=0)
    torch.testing.assert_close(tanh.value(tanh.raw(value)), gdtuo.Adam.clamp(tanh.raw(value)))
    torch.testing.assert_close(tanh.complement(tanh.raw(value)), 1 - value)
    for domain in square, tanh:
        low, high = domain.raw_limits(torch.float32)
        ends = domain.value(torch.tensor([low, high]))
        assert ends.isfinite().all()
        assert all(map(domain.inside, ends.tolist()))


def test_the_rows_of_the_paper():
    rows = mnist_table.ROWS
    assert len({row.name for row in rows}) == len(rows) == 18 + 5
    assert [len(mnist_table.readings(row)) for row in rows] == [5] * 10 + [2] * 5 + [5] * 8
    assert all(bool(row.above) == bool(row.held) for row in rows)
    row = rows[2]
    assert str(mnist_table.paper(row)) == "SGD(lr=0.01, learn=(lr,), horizon=1, trust=None, domains={lr: Real}) / Adam(trust=None)"
    assert str(mnist_table.defaults(row)) == "SGD(lr=0.01, learn=(lr,)) / Adam"
    assert mnist_table.lands([5.3], mnist_table.Paper(4.81, 0.1))
    assert not mnist_table.lands([5.4], mnist_table.Paper(4.81, 0.1))
    assert mnist_table.lands([5.4], mnist_table.Paper(4.81, 0.3))
    verdicts = [mnist_table.verdict(*case, mnist_table.Paper(5.0, 0.1)) for case in (([5.1], [9.0]), ([6.0], [5.0]), ([6.0], [6.1]))]
    assert verdicts == ["yes", "no", "no, nor does the authors' code, which agrees"]
    assert mnist_table.verdict([6.0], [8.0], mnist_table.Paper(5.0, 0.1)) == "no, nor does the authors' code"
    assert (mnist_table.beats([1.0], [2.0]), mnist_table.beats([2.0], [1.0]), mnist_table.beats([], [1.0])) == ("yes", "no", "–")


def test_mnist_table_runs_resumes_and_draws(small, tmp_path, monkeypatch):
    monkeypatch.setitem(mnist_table.WORKLOADS, "m3", small)
    path = tmp_path / "mnist_table.json"

    def invoke(*arguments):
        return CliRunner().invoke(
            mnist_table.app, ["--steps", "3", "--seeds", "1", "--out", str(tmp_path), "--log", str(tmp_path / "log"), *arguments]
        )

    assert "holds no runs" in invoke("--figures").output
    outcome = invoke()
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 18 * 5 + 5 * 2
    assert len(list((tmp_path / "log").iterdir())) == len(runs)
    tower = runs["SGD(0.01), lr / Adam(0.1) | defaults, linear | 0"]
    assert tower[REPLAYED]["loss"] == pytest.approx(tower["loss"], rel=1e-4)
    assert not {HELD, REPLAYED} & runs["SGD(0.01) | paper | 0"].keys()
    assert HELD in runs["Adam(0.001, beta2=0.99), lr / Adam(0.001) | paper | 0"]
    text = path.with_suffix(".md").read_text()
    assert text in outcome.output
    row = next(line for line in text.splitlines() if line.startswith("| SGD(0.01), lr / Adam(0.1)"))
    assert f"| 4.86 ± 0.06 | {runs['SGD(0.01), lr / Adam(0.1) | authors | 0']['metric']:.2f} |" in row
    before = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    assert invoke("--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert invoke("--again", "SGD").exit_code == 0
    assert json.loads(path.read_text())["runs"].keys() == runs.keys()
    assert path.stat().st_mtime_ns > before
    assert "holds runs of" in invoke("--steps", "4").output


# ---- heights


def test_towers_of_the_papers_figure():
    assert heights.steps_above("mlp", 1e-2) == [1e-2] * 3
    assert heights.steps_above("rnn", 1e-4) == pytest.approx([1e-2, 1e-4, 1e-6])
    assert heights.steps_above("resnet", 1e-3) == pytest.approx([1e-6, 1e-7, 1e-8])
    assert heights.tower("rnn", "paper", 0, 0.1).height == 0
    text = "Adam(lr=0.1, horizon=1, trust=None, domains={lr: Real}) / SGD(lr=0.0001, horizon=1, trust=None, domains={lr: Real})"
    assert str(heights.tower("rnn", "paper", 1, 0.1)) == text
    assert str(heights.tower("mlp", "defaults", 3, 1e-8)) == "SGD(lr=1e-08) / Adam / Adam / Adam"
    assert len(heights.plan(["resnet"], 1, "cpu", Path("log"))) == 11 + 3 * 2 * 11
    assert [len(line) for line in heights.PAPER] == [11] * 4


@pytest.fixture
def problems(small, monkeypatch):
    """The three problems, on the digits."""
    for name, problem in copy.copy(heights.PROBLEMS).items():
        monkeypatch.setitem(heights.PROBLEMS, name, problem._replace(workload=replace(small, title=name), timed=2))


def test_heights_run_resume_and_draw(problems, tmp_path):
    path = tmp_path / "heights.json"

    def invoke(*arguments):
        return CliRunner().invoke(heights.app, ["--steps", "5", "--out", str(tmp_path), "--log", str(tmp_path / "log"), *arguments])

    outcome = invoke("--workload", "mlp")
    assert outcome.exit_code == 0, outcome.output
    assert len(json.loads(path.read_text())["runs"]) == 2 * 77 + 1
    assert invoke().exit_code == 0
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 4 * 77 + 3
    assert REPLAYED in runs["mlp | paper | 1 | 0.01 | 0"]
    assert REPLAYED not in runs["mlp | paper | 1 | 0.01 | 1"]
    assert runs["mlp | paper | 3 | 0.1 | 0"]["courses"].keys() == {"step", "0.lr", "1.lr", "2.lr"}
    assert runs["rnn | time"]["ms"].keys() == {"torch", *(f"{kind} {height}" for kind in heights.KINDS for height in range(4))}
    text = path.with_suffix(".md").read_text()
    assert f"Our defaults are better in {sum_of(runs, 'resnet')} of 33 cells" in text
    before = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    assert invoke("--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def sum_of(runs, name):
    """In how many cells the defaults have the smaller error, from the file itself."""

    def metric(kind, height, start):
        value = runs[f"{name} | {kind} | {height} | {start:g} | 0"]["metric"]
        return math.inf if value is None else value

    return sum(metric("defaults", h, s) < metric("paper", h, s) for h in (1, 2, 3) for s in heights.STARTS)


def test_unknown_workload_is_one_clean_line():
    outcome = CliRunner().invoke(heights.app, ["--workload", "cnn"])
    assert outcome.exit_code == 2
    assert "cnn is none of mlp, resnet, rnn" in outcome.output


# ---- tops


def test_towers_differ_in_the_step_size_of_the_top_alone():
    assert str(tops.tower("defaults", 1, 0.5)) == "Adam / Adam(lr=0.5)"
    assert str(tops.tower("defaults", 3, 1e-6)) == "Adam / Adam / Adam / Adam(lr=1e-06)"
    paper = ", horizon=1, trust=None, domains={lr: Real})"
    assert str(tops.tower("paper", 2, 0.1)) == f"Adam({paper[2:]} / SGD(lr=0.001{paper} / SGD(lr=0.1{paper}"
    assert len(tops.plan(["mlp"], 1, "cpu", Path("log"))) == 3 * len(tops.plan(["rnn"], 1, "cpu", Path("log"))) == 3 * 54


def test_tops_run_resume_and_draw(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tops, "PROBLEMS", {name: (replace(small, title=name), 1) for name in tops.PROBLEMS})
    path = tmp_path / "tops.json"

    def invoke(*arguments):
        return CliRunner().invoke(tops.app, ["--steps", "3", "--out", str(tmp_path), "--log", str(tmp_path / "log"), *arguments])

    outcome = invoke("--workload", "mlp")
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 54
    cells = [runs[f"mlp | defaults | 1 | {top:g} | 0"]["metric"] for top in tops.TOPS]
    text = path.with_suffix(".md").read_text()
    assert "rnn" not in text
    line = next(line for line in text.splitlines() if line.startswith("| height 1, our defaults |"))
    assert [float(cell.split("±")[0]) for cell in line.split("|")[2:11]] == pytest.approx(cells, abs=5e-3)
    assert float(line.split("|")[11]) == pytest.approx(max(cells) / min(cells), rel=5e-3)
    before = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    assert invoke("--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    outcome = CliRunner().invoke(tops.app, ["--workload", "cnn"])
    assert outcome.exit_code == 2
    assert "cnn is none of mlp, rnn, resnet" in outcome.output


# ---- unified


def test_a_rule_without_a_twin_is_followed_by_that_of_another(small):
    spec = "Unified(nesterov=0.01, learn=(lr, nesterov)) / Adam"
    found = training.train(small, spec, 1, after=(HELD, REPLAYED), twin=Hyper(Adam))
    lrs = found["courses"]["0.lr"]
    assert max(lrs) > 1.5 * min(lrs), "nothing was learned: the comparisons below say nothing"
    by_hand = training.train(small, partial(training.replayed, Hyper(Adam), {"lr": lrs}), 1)
    assert found[REPLAYED]["loss"] == pytest.approx(by_hand["loss"], rel=1e-4)
    assert found[HELD]["loss"] == pytest.approx(training.train(small, f"Adam(lr={lrs[-1]})", 1)["loss"], rel=1e-3)
    assert found[REPLAYED]["loss"] != found["loss"], "nesterov was replayed too"


def test_the_towers_of_unified_learn_all_coefficients_with_and_without_the_prior():
    (_, adam), (_, prior), (_, free) = unified.METHODS.values()
    assert str(adam) == "Adam / Adam"
    assert prior.learned == free.learned == ("lr", "damping", "nesterov", "amsgrad", "adopt", "correction")
    assert (prior.prior_steps(), free.prior_steps()) == (30, None)
    assert len(unified.plan(["mlp"], 1, "cpu", Path("log"))) == 3 * len(unified.plan(["resnet"], 1, "cpu", Path("log"))) == 9


def test_unified_runs_resumes_and_draws(small, tmp_path, monkeypatch):
    monkeypatch.setattr(unified, "PROBLEMS", {name: (replace(small, title=name), 1) for name in unified.PROBLEMS})
    # Compiling takes longer than these steps.
    monkeypatch.setattr(unified, "compiled", lambda tower, model: [tower.bind(model.parameters())])
    path = tmp_path / "unified.json"

    def invoke(*arguments):
        return CliRunner().invoke(unified.app, ["--steps", "3", "--out", str(tmp_path), "--log", str(tmp_path / "log"), *arguments])

    outcome = invoke("--workload", "gpt")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(path.read_text())["runs"].keys() == {f"gpt | {method} | 0" for method in unified.METHODS}
    assert invoke().exit_code == 0
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 4 * 3
    rows = [line.split(" | ") for line in path.with_suffix(".md").read_text().splitlines()[4:]]
    for row, run in zip(rows, (runs[f"{name} | {method} | 0"] for name in unified.PROBLEMS for method in unified.METHODS), strict=True):
        assert row[4:6] == [f"{run['metric']:.2f}", f"{run[REPLAYED]['metric']:.2f}"]
    before = path.stat().st_mtime_ns
    path.with_suffix(".png").unlink()
    assert invoke("--figures").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
