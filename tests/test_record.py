"""The recorder: what was sampled is what the optimizer had, at the step it had it, in every format."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from hyperopt import Adam, Hyper, Replay, record
from hyperopt.record import Recorder, read_csv

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Scripted(torch.optim.SGD):
    """An optimizer whose lr is 10, 20, 30 … by the step, and whose hypergradient −1, −2, … exists from the second step on."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        self.device, self.count = device, 0

    def step(self, closure=None):
        self.count += 1

    def hyperparameters(self):
        lr = torch.full((), 10.0 * self.count, device=self.device)
        return {"0.lr": lr, "0.beta1": torch.full((2, 3), 0.5, device=self.device), "1.lr": lr.double() / 3}

    def hypergradients(self):
        return {"0.lr": torch.full((), 1.0 - self.count, device=self.device)} if self.count > 1 else {}


def train(tower: Hyper, steps: int, **options) -> tuple[Recorder, list[dict[str, float]]]:
    """A recorder that followed a regression, and what the optimizer itself said after each step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    x, y = torch.randn(32, 5), torch.randn(32, 1)
    optimizer = tower.bind(model.parameters())
    seen = []
    with Recorder(optimizer, **options) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            seen.append({key: value.item() for key, value in optimizer.hyperparameters().items()})
    return recorder, seen


def test_samples_every_step_of_a_tower():
    recorder, seen = train(Hyper(Adam).stack(Adam), steps=20)
    assert recorder.steps.tolist() == list(range(1, 21))
    assert set(recorder.values) == set(seen[0]) > {"0.lr", "0.beta1", "1.lr"}
    for key, column in recorder.values.items():
        np.testing.assert_array_equal(column, [values[key] for values in seen], err_msg=key)
    assert len(set(recorder.values["0.lr"])) > 10, "the tower did not learn: the comparison above says nothing"
    assert set(recorder.hypergradients) == {"0.lr"}
    assert np.isnan(recorder.hypergradients["0.lr"]).tolist() == [True] + [False] * 19


def descended(optimizer, recorder_of=Recorder, steps=1, **options):
    with recorder_of(optimizer, **options) as recorder:
        for _ in range(steps):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = p.detach().clone()
            optimizer.step()
    return recorder


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("early", [False, True])
def test_a_resumed_run_goes_on_counting(every, early):
    tower = Hyper(Adam).stack(Adam)
    first, again = (tower.bind([torch.nn.Parameter(torch.ones(3))]) for _ in range(2))
    descended(first, steps=10)
    recorder = Recorder(again, every=every) if early else None
    again.load_state_dict(first.state_dict())
    recorder = descended(again, steps=7, **({"recorder_of": lambda o: recorder} if early else {"every": every}))
    assert recorder.steps.tolist() == [step for step in range(11, 18) if step % every == 0]


def test_steps_without_a_gradient_are_counted_and_going_back_too():
    optimizer = Hyper(Adam).stack(Adam).bind([torch.nn.Parameter(torch.ones(3))])
    young = copy.deepcopy(optimizer.state_dict())
    with Recorder(optimizer) as recorder:
        optimizer.step()
        optimizer.step()
        descended(optimizer, steps=2)
        optimizer.load_state_dict(young)
        optimizer.step()
    assert recorder.steps.tolist() == [1, 2, 3, 4, 5]


def test_a_group_that_is_added_is_recorded_under_one_name_and_replayed(tmp_path):
    old, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Hyper(Adam).stack(Adam).bind([old])
    with Recorder(optimizer) as recorder:
        descended(optimizer, steps=3)
        optimizer.add_param_group({"params": [new], "lr": 0.5})
        descended(optimizer, steps=2)
    recorder.to_csv(tmp_path / "schedule.csv")
    assert "0.lr" not in recorder.values
    assert np.isfinite(recorder.values["0.lr[0]"]).all()
    assert np.isnan(recorder.values["0.lr[1]"]).tolist() == [True] * 3 + [False] * 2
    for source in (recorder, tmp_path / "schedule.csv"):
        plain = torch.optim.Adam([{"params": [old]}, {"params": [new]}])
        schedule = Replay(plain, source, names=("lr",))
        assert plain.param_groups[1]["lr"] == pytest.approx(recorder.values["0.lr[1]"][3])
        schedule.step()
        assert plain.param_groups[0]["lr"] == pytest.approx(recorder.values["0.lr[0]"][1])


def test_samples_across_blocks_with_keys_that_appear_late(monkeypatch):
    monkeypatch.setattr(record, "ROWS", 4)
    optimizer = Scripted()
    recorder = Recorder(optimizer)
    for _ in range(11):
        optimizer.step()
    steps = np.arange(1, 12)
    np.testing.assert_array_equal(recorder.values["0.lr"], 10.0 * steps)
    np.testing.assert_array_equal(recorder.values["0.beta1"], np.full(11, 0.5))
    np.testing.assert_array_equal(recorder.values["1.lr"], 10.0 * steps / 3)  # float64, not rounded to the others' float32
    np.testing.assert_array_equal(recorder.hypergradients["0.lr"], [np.nan, *(1.0 - steps[1:])])


def test_every_and_close():
    optimizer = Scripted()
    with Recorder(optimizer, every=3) as recorder:
        for _ in range(10):
            optimizer.step()
    optimizer.step()
    assert recorder.steps.tolist() == [3, 6, 9]
    assert recorder.values["0.lr"].tolist() == [30, 60, 90]
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        Recorder(optimizer, every=0)


def test_sampling_never_reads_a_value():
    # A tensor on the meta device has no value: reading one raises, copying does not.
    optimizer = Scripted(device="meta")
    recorder = Recorder(optimizer)
    for _ in range(5):
        optimizer.step()
    assert recorder.steps.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(NotImplementedError):
        _ = recorder.values


def test_recording_changes_no_bit():
    recorder, recorded = train(Hyper(Adam).stack(Adam), steps=20)
    _, sparse = train(Hyper(Adam).stack(Adam), steps=20, every=1000)
    assert recorded == sparse
    assert len(recorder.steps) == 20


def test_tensorboard_is_incremental(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    optimizer = Scripted()
    recorder = Recorder(optimizer)
    with SummaryWriter(str(tmp_path)) as writer:
        for _ in range(3):
            for _ in range(4):
                optimizer.step()
            recorder.to_tensorboard(writer)
        recorder.to_tensorboard(writer)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"hyper/0.lr", "hyper/0.beta1", "hyper/1.lr", "hypergradient/0.lr"}
    assert [(e.step, e.value) for e in events.Scalars("hyper/0.lr")] == [(n, 10.0 * n) for n in range(1, 13)]
    assert [(e.step, e.value) for e in events.Scalars("hypergradient/0.lr")] == [(n, 1.0 - n) for n in range(2, 13)]


def test_csv_round_trip(tmp_path):
    recorder, _ = train(Hyper(Adam).stack(Adam), steps=15)
    recorder.to_csv(tmp_path / "learned.csv")
    columns = read_csv(tmp_path / "learned.csv")
    assert next(iter(columns)) == "step"
    assert columns["step"].tolist() == recorder.steps.tolist()
    expected = recorder.values | {f"hypergradient/{key}": column for key, column in recorder.hypergradients.items()}
    assert set(columns) == {"step", *expected}
    for key, column in expected.items():
        np.testing.assert_array_equal(columns[key].astype(np.float32), column.astype(np.float32), err_msg=key)


def test_csv_of_nothing(tmp_path):
    Recorder(Scripted()).to_csv(tmp_path / "empty.csv")
    assert list(read_csv(tmp_path / "empty.csv")) == ["step"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line needs a column 'step'"),
        ("hello\n1\n", "first line needs a column 'step'"),
        ("step,0.lr\n1,0.1\n2\n", "line 3: 2 numbers are needed"),
        ("step,0.lr\n1,0.1,7\n", "line 2: 2 numbers are needed"),
        ("step,0.lr\n1,abc\n", "line 2: .*'abc'"),
    ],
)
def test_a_file_that_is_no_schedule_is_named_with_the_line(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.csv.*" + message):
        read_csv(tmp_path / "bad.csv")


def test_a_folder_is_no_writer():
    with pytest.raises(TypeError, match=r"needs a writer, such as SummaryWriter.*got 'runs'"):
        Recorder(Scripted()).to_tensorboard("runs")


def test_png_draws_what_moved(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: drawn.append(self))
    recorder, _ = train(Hyper(Adam, learn=("lr", "beta1", "beta2")).stack(Adam), steps=30)
    recorder.to_png(tmp_path / "unwritten.png", title="a title")
    (figure,) = drawn
    panels = {axis.get_ylabel(): axis for axis in figure.axes}
    assert set(panels) == {"lr", "1 − beta1", "1 − beta2"}  # eps, weight decay and the upper lr stay where they are
    assert {axis.get_xlabel() for axis in panels.values()} == {"step"}
    assert panels["lr"].get_yscale() == "log"
    assert [text.get_text() for text in panels["lr"].get_legend().get_texts()] == ["level 0"]
    np.testing.assert_array_equal(panels["1 − beta2"].lines[0].get_ydata(), 1 - recorder.values["0.beta2"])
    assert figure.get_suptitle() == "a title"


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_png_of_little_is_still_a_picture(tmp_path, steps):
    optimizer = Scripted()
    recorder = Recorder(optimizer)
    for _ in range(steps):
        optimizer.step()
    recorder.to_png(tmp_path / "few.png")
    assert (tmp_path / "few.png").read_bytes().startswith(PNG_SIGNATURE)


def test_png_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hyperopt-torch\[experiments\]"):
        Recorder(Scripted()).to_png(tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()


def test_importing_the_library_imports_no_plotting():
    code = "import sys, hyperopt, hyperopt.record; print([m for m in ('matplotlib', 'tensorboard', 'typer') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
