"""Every tower of the table of rules gives the weights and hyperparameters that the first edition gave."""

import json

import first_edition
import pytest
import torch

RECORD = json.loads(first_edition.RECORD.read_text())
TOWERS = first_edition.towers()
# Of the norm. The average of Schedule-Free is recomputed in float32, from weights that are rounded, and not stored.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
RECOMPUTED = 1e-4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", TOWERS)
def test_gives_what_the_first_edition_gave(name, dtype):
    found, expected = first_edition.run(TOWERS[name], first_edition.DTYPES[dtype]), RECORD[f"{name}, {dtype}"]
    tolerance = RECOMPUTED if name.startswith("schedule-free") and dtype == "float32" else TOLERANCE[dtype]
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        a, b = torch.tensor(found[key], dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
        error = float((a - b).norm() / b.norm())
        assert error <= tolerance, f"{key}: off by {error:.1e}"
