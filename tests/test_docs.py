"""What the documentation shows runs: docstring examples, the README's code blocks, and the table of rules."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import hyperopt

README = Path(__file__).parent.parent / "README.md"
MODULES = ["hyperopt", *(m.name for m in pkgutil.walk_packages(hyperopt.__path__, "hyperopt."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_docstring_examples():
    examples = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES)
    assert examples > 10


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_blocks_run_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks():
        exec(compile(block, str(README), "exec"), namespace)
    assert len(blocks()) >= 4


def test_every_public_object_has_a_docstring_and_an_entry_in_all():
    for name in hyperopt.__all__:
        assert getattr(hyperopt, name).__doc__, name


def test_readme_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
