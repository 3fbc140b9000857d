"""The benchmark measures what it says, and its table belongs to its numbers."""

import json
import time
from pathlib import Path

import pytest
import torch

from experiments import bench

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
    # m, v and no more; Z and a direction beside them.
    assert bench.peak(bench.REFERENCE, "cpu") == pytest.approx(2, abs=0.05)
    assert bench.peak("eager", "cpu") == pytest.approx(4, abs=0.1)


def test_the_table_is_that_of_the_numbers(tmp_path):
    result = json.loads((RESULTS / "bench.json").read_text())
    assert set(bench.PARTS) <= result.keys()
    assert bench.table(result) + "\n" == (RESULTS / "bench.md").read_text()
    bench.draw(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert torch.isfinite(torch.tensor([row["ratio"] for row in result["heights"].values()])).all()
