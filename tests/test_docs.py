"""What the documentation shows runs: docstring examples, the README's code blocks, and the table of rules."""

import dataclasses
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from cases import CASES

import hyperopt
from hyperopt import Interval, Positive, Rule, ScheduleFree

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


def rules_table() -> str:
    """The README's table: what each rule can learn, from the rules themselves and from the rows that the tests run on."""
    late = {type(case.rule): case.late for case in CASES if case.late}
    lines = [
        "| rule | learned in (0, 1), by the logit | learned above 0, by the logarithm | only at horizon > 1 | options |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = [getattr(hyperopt, name) for name in hyperopt.__all__]
    classes = [rule for rule in found if isinstance(rule, type) and issubclass(rule, Rule) and rule is not Rule]
    for rule in sorted([*classes, ScheduleFree(hyperopt.Adam), ScheduleFree(hyperopt.SGD)], key=lambda rule: rule.__name__.lower()):
        declared = rule.declared()
        options = [f.name for f in dataclasses.fields(rule) if f.name not in declared]
        spaces = [[name for name, d in declared.items() if isinstance(d.domain, kind)] for kind in (Interval, Positive)]
        assert sum(map(len, spaces)) == len(declared), f"{rule.__name__} has a domain that the table has no column for"
        cells = [*spaces, late.get(rule, ()), options]
        lines.append(f"| `{rule.__name__}` | " + " | ".join(", ".join(f"`{name}`" for name in cell) or "–" for cell in cells) + " |")
    return "\n".join(lines)


def test_the_readme_has_the_table_of_rules():
    assert rules_table() in README.read_text(), f"put this table into the README:\n\n{rules_table()}\n"
