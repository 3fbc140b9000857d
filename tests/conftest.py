"""What every test shares: one thread in each worker, a fixed seed, and MNIST where this machine has it."""

import functools
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist already runs one worker a core


def _mnist() -> Path:
    return Path(os.environ.get("HYPEROPT_DATA") or "data") / "MNIST" / "raw"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; `make test-all` runs these too")
    config.addinivalue_line("markers", "one_in(n): of this test's parameters every nth is in each run, and the others are slow")
    config.addinivalue_line("markers", "needs_mnist: the test reads MNIST from HYPEROPT_DATA, or from ./data")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by these marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[object] = Counter()
    for item in items:
        if mark := item.get_closest_marker("one_in"):
            function = getattr(item, "function", None)
            if seen[function] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1
    if not _mnist().is_dir():
        skip = pytest.mark.skip(reason=f"no MNIST on this machine: {_mnist()} does not exist, set HYPEROPT_DATA to a folder with MNIST/raw")
        for item in items:
            if item.get_closest_marker("needs_mnist"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mnist():
    """MNIST as whole tensors; a test that asks for it is marked `needs_mnist`."""
    from experiments import data

    return data.load("mnist")


@pytest.fixture
def operations_of_torch(monkeypatch):
    """Optimizers bound in this test take their steps in operations of torch, and not in C++ where that is at hand."""
    monkeypatch.setattr("hyperopt.body.functions.installed", lambda: None)
    monkeypatch.setattr("hyperopt.body.functions.built", lambda: None)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile runs its graph operation by operation, for tests that do not ask what its kernels compute: no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
