"""What the documentation shows runs: docstring examples, the pages' code blocks and links, and the table of rules."""

import dataclasses
import doctest
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES

import hyperopt
from hyperopt import ADOPT, SGD, Adam, AdaShift, Averaged, Hyper, Interval, Lion, Positive, Rule, ScheduleFree, Yogi

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
FOLDERS = [ROOT / name / "README.md" for name in ("experiments", "examples")]
MODULES = ["hyperopt", *(m.name for m in pkgutil.walk_packages(hyperopt.__path__, "hyperopt.") if not m.name.endswith("._passes"))]
FRAMEWORKS = {"hyperopt.integrations.lightning": "lightning", "hyperopt.integrations.transformers": "transformers"}
NEEDS = re.compile(r"\A<!-- needs: (.+) -->\n")  # the first line of a page whose blocks run only where these packages are installed
FENCED = re.compile(r"^```(\w*).*?\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def without(*packages: str) -> Any:
    """The mark of a test that needs packages; they may warn of what they like."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    skip = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
    return [skip, pytest.mark.filterwarnings("ignore")] if packages else []


def modules() -> list[Any]:
    return [pytest.param(name, marks=without(FRAMEWORKS[name]) if name in FRAMEWORKS else []) for name in MODULES]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_docstring_examples():
    examples = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES if name not in FRAMEWORKS)
    assert examples > 10


def blocks(page: Path) -> list[str]:
    return [text for language, text in FENCED.findall(page.read_text()) if language == "python"]


def pages() -> list[Any]:
    """The pages with blocks to run, each with the packages that it needs."""
    needed = {page: (found := NEEDS.match(page.read_text())) and found[1].split(", ") for page in PAGES if blocks(page)}
    return [pytest.param(page, marks=without(*packages or ()), id=page.name) for page, packages in needed.items()]


@pytest.mark.parametrize("page", pages())
def test_blocks_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


def test_pages_say_what_they_need():
    """Where a package is missing that a page imports and does not name, its blocks fail and are not skipped."""
    assert {page.values[0].stem for page in pages() if page.marks} == {"lightning", "transformers", "accelerate", "loggers"}


def test_the_readme_is_short_and_runs():
    assert len(README.read_text().splitlines()) <= 160, "move what is new to a page in docs/"
    assert len(blocks(README)) >= 2


def test_every_public_object_has_a_docstring_and_an_entry_in_all():
    for name in hyperopt.__all__:
        assert getattr(hyperopt, name).__doc__, name


def test_every_public_object_is_in_the_reference():
    directives = " ".join(line for name in ("rules", "api") for line in (DOCS / f"{name}.md").read_text().splitlines() if "::" in line)
    documented = set(re.findall(r":: hyperopt\.(\w+)", directives))
    assert documented == set(hyperopt.__all__)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *FOLDERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_their_anchors_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCED.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_both_tables_of_contents():
    index = (DOCS / "index.md").read_text()
    (listed,) = [text.split() for _, text in FENCED.findall(index) if ":hidden:" in text]
    for page in PAGES:
        if page not in (README, DOCS / "index.md"):
            assert page.stem in listed
            assert f"]({page.name})" in index
            assert f"](docs/{page.name})" in README.read_text()


SPHINX = ("sphinx", "myst_parser", "furo")


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in SPHINX), reason=f"needs {', '.join(SPHINX)}: the extra docs")
def test_the_pages_build_without_a_warning(tmp_path):
    # As `make docs`, but nothing is written.
    options = ["-q", "-W", "--keep-going", "-n", "-b", "dummy", "-c", str(DOCS)]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options, str(ROOT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What cannot be learned, and why: options are not numbers; the others make no difference that a gradient could see.
NOT_LEARNABLE = {
    AdaShift: {"n": "a whole number"},
    ADOPT: {"clip, clip_power": "not used with `clipped=False`"},
    Lion: {"beta1, beta2": "while `eps` is 0, as a sign has no derivative"},
    Yogi: {"v0": "used once, before the first step"},
    Averaged(Adam): {"decay": "training gradients never see the average (those of `hyper_backward` do)"},
}


def rules_table() -> str:
    """The table of docs/rules.md: what each rule can learn, from the rules themselves and from the rows that the tests run on."""
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
        not_learnable |= {", ".join(choices): "options" if len(choices) > 1 else "an option"} if choices else {}
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


def test_the_page_of_the_rules_has_the_table():
    assert rules_table() in (DOCS / "rules.md").read_text(), f"put this table into docs/rules.md:\n\n{rules_table()}\n"
