"""The benchmark measures what it says, and its table belongs to its numbers."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch

from experiments import bench
from hyperopt.body import functions

RESULTS = Path(bench.__file__).parent / "results"


def test_ratios_are_to_the_reference_and_a_failure_is_reported():
    def make(name):
        if name == "broken":
            raise RuntimeError("does not run\nat all")
        return lambda: time.sleep({bench.REFERENCE: 0.002, "slow": 0.02}[name])

    rows = bench.interleaved(make, [bench.REFERENCE, "slow", "broken"], 3, 0.004, "cpu")
    assert rows[bench.REFERENCE]["ratio"] == 1
    assert rows["slow"]["ratio"] > 2
    assert rows["slow"]["ms"]["min"] <= rows["slow"]["ms"]["median"] <= rows["slow"]["ms"]["max"]
    assert rows["broken"] == {"failed": "does not run"}


@pytest.mark.parametrize("name", [name for name in bench.EVERYTHING if name != "gdtuo"])
def test_every_row_is_what_it_says(name):
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    optimizer = bench.optimizer(name, [w])
    optimizer.step()
    assert not torch.equal(w, torch.ones(3))
    if name in bench.TOWERS:
        assert optimizer.compile == ("compiled" in name)
        assert (optimizer.tower.trust is None) == ("trust=None" in name or "four" in name)
        assert len(optimizer.tower.learning) == (4 if "four" in name else 1)


def test_memory_is_that_of_the_state():
    # m, v and no more; Z beside them, and a direction where it is not computed in C++. Of Schedule-Free v, z and two tangents.
    native = functions.installed() is not None
    assert bench.peak(bench.REFERENCE, "cpu") == pytest.approx(2, abs=0.05)
    assert bench.peak("eager", "cpu") == pytest.approx(3 if native else 4, abs=0.1)
    assert bench.peak("eager, Schedule-Free", "cpu") == pytest.approx(4 if native else 4.5, abs=0.1)


@pytest.mark.parametrize(("name", "parts"), [("bench", set(bench.PARTS)), ("bench_cuda", {"trainings"})])
def test_the_table_is_that_of_the_numbers(name, parts, tmp_path):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert parts <= result.keys()
    assert bench.table(result) + "\n" == (RESULTS / f"{name}.md").read_text()
    bench.draw(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert all(math.isfinite(row["ratio"]) for row in result.get("heights", {}).values())


SHOWN = {
    "`torch.optim.Adam(foreach=True)`": "torch Adam, foreach",
    "`schedulefree`": "schedulefree",
    "`prodigyopt`": "prodigyopt",
    "the paper's own package (four learned)": "gdtuo",
    "`Adam / Adam`": "eager",
    "`Adam / Adam`, `bind(…, compile=True)`": "compiled",
    "`ScheduleFree(Adam) / Adam`": "eager, Schedule-Free",
    "`ScheduleFree(Adam) / Adam`, `bind(…, compile=True)`": "compiled, Schedule-Free",
}


@pytest.mark.parametrize(("page", "names"), [("README.md", ["bench"]), ("docs/performance.md", ["bench", "bench_cuda"])])
def test_the_pages_have_these_numbers(page, names):
    lines = (RESULTS.parents[1] / page).read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("| | MLP, batch 256 |")]
    for head, name in zip(heads, names, strict=True):
        trainings = json.loads((RESULTS / f"{name}.json").read_text())["trainings"]
        assert lines[head] == f"| | {' | '.join(trainings)} |"
        rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :]))
        assert len(rows) >= 5
        for row in rows:
            label, *cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert cells == [f"{column[SHOWN[label]]['ratio']:.2f}" for column in trainings.values()], label
