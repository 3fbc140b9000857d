"""Every tower of the table of rules gives the weights and hyperparameters that the first edition gave."""

import json

import first_edition
import pytest
import torch

from hyperopt import Adam, Hyper

RECORD = json.loads(first_edition.RECORD.read_text())
TOWERS = first_edition.towers()
# Of the norm.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", TOWERS)
def test_gives_what_the_first_edition_gave(name, dtype):
    found, expected = first_edition.run(TOWERS[name], first_edition.DTYPES[dtype]), RECORD[f"{name}, {dtype}"]
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        a, b = torch.tensor(found[key], dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
        error = float((a - b).norm() / b.norm())
        assert error <= TOLERANCE[dtype], f"{key}: off by {error:.1e}"


def test_its_checkpoints_are_refused_with_the_reason():
    def tensors(value):
        if isinstance(value, dict):
            return torch.tensor(value["tensor"]) if "tensor" in value else {key: tensors(v) for key, v in value.items()}
        return [tensors(v) for v in value] if isinstance(value, list) else value

    saved = tensors(json.loads(first_edition.RECORD.with_name("first_edition_checkpoint.json").read_text()))
    saved["state"] = {int(key): state for key, state in saved["state"].items()}
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = Hyper(Adam, lr=0.01).stack(Adam).bind([w])
    before = optimizer.hyperparameters()
    with pytest.raises(ValueError, match=r"format 1 and this version of hyperopt reads 3: go on from it with the version that wrote it"):
        optimizer.load_state_dict(saved)
    assert optimizer.hyperparameters() == before
