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
from hyperopt import ADOPT, SGD, Adam, AdaShift, Averaged, Hyper, Interval, Lion, Positive, Rule, ScheduleFree, Yogi

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


# What cannot be learned, and why: options are choices and not numbers; the others make no difference that a gradient could see.
NOT_LEARNABLE = {
    AdaShift: {"n": "a whole number"},
    ADOPT: {"clip, clip_power": "with `clipped=False` they are not used"},
    Lion: {"beta1, beta2": "while `eps` is 0: a sign has no derivative"},
    Yogi: {"v0": "used once, before the first step"},
    Averaged(Adam): {"decay": "training gradients never see the average (`hyper_backward` does)"},
}


def rules_table() -> str:
    """The README's table: what each rule can learn, from the rules themselves and from the rows that the tests run on."""
    late = {type(case.rule): case.late for case in CASES if case.late}
    lines = [
        "| rule | by default | in (0, 1), by the logit | above 0, by the logarithm | only at horizon > 1 | not learnable, and why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = [getattr(hyperopt, name) for name in hyperopt.__all__]
    classes = [rule for rule in found if isinstance(rule, type) and issubclass(rule, Rule) and rule is not Rule]
    composed = [ScheduleFree(Adam), ScheduleFree(SGD), Averaged(Adam)]
    for rule in sorted([*classes, *composed], key=lambda rule: rule.__name__.lower()):
        declared = rule.declared()
        default = Hyper(rule).stack(SGD).learning
        not_learnable = dict(NOT_LEARNABLE.get(rule, {}))
        never = {"decay"} if rule is Averaged(Adam) else set()
        spaces = [[n for n, d in declared.items() if isinstance(d.domain, kind) and n not in default] for kind in (Interval, Positive)]
        assert sum(map(len, spaces)) + len(default) == len(declared), f"{rule.__name__} has a domain that the table has no column for"
        spaces = [[n for n in space if n not in never] for space in spaces]
        choices = [f.name for f in dataclasses.fields(rule) if f.name not in declared and f.name not in not_learnable]
        not_learnable |= {", ".join(choices): "choices" if len(choices) > 1 else "a choice"} if choices else {}
        reasons = "; ".join(f"{', '.join(f'`{n}`' for n in names.split(', '))}: {why}" for names, why in not_learnable.items())
        cells = [", ".join(f"`{name}`" for name in cell) or "–" for cell in (default, *spaces, late.get(rule, ()))]
        lines.append(f"| `{rule.__name__}` | {' | '.join(cells)} | {reasons or '–'} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("rule", "names"),
    [(ADOPT(clipped=False), ("clip", "clip_power")), (Lion(), ("beta1", "beta2")), (Averaged(Adam, decay=0.5), ("decay",))],
    ids=lambda value: type(value).__name__,
)
def test_what_the_table_calls_not_learnable_has_no_hypergradient(rule, names):
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Hyper(rule, learn=("lr", *names)).stack(SGD).bind([w])
    for step in range(5):
        w.grad = w.detach() * (step + 1)
        optimizer.step()
    found = optimizer.hypergradients()
    assert found["0.lr"] != 0
    assert all(found[f"0.{name}"] == 0 for name in names)


def test_the_readme_has_the_table_of_rules():
    assert rules_table() in README.read_text(), f"put this table into the README:\n\n{rules_table()}\n"
