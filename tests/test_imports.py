"""No file of the library imports itself by way of others, also where only a type is imported or inside a function."""

import ast
from pathlib import Path

import hyperopt

ROOT = Path(hyperopt.__file__).parent.parent
# The core's files, which still do; a file that no longer does is to be taken out.
CIRCULAR: set[str] = {f"hyperopt.{name}" for name in ("engine", "hypergradients", "optimizable", "part")}


def imports() -> dict[str, set[str]]:
    """The files of the library by their module names, and what each imports; packages' own files have no part in it."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "hyperopt").rglob("*.py")}
    found = {}
    for name, path in paths.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = name.split(".")[: -node.level] if node.level else []
                module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
                found[name] |= {module, *(f"{module}.{alias.name}" for alias in node.names)} & paths.keys()
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & paths.keys()
    return found


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen, left = set(), [start]
    while left:
        new = edges[left.pop()] - seen
        seen |= new
        left += new
    return seen


def test_no_file_imports_itself_by_way_of_others():
    edges = imports()
    assert len(edges) > 30
    assert edges["hyperopt.spec.tower"] >= {"hyperopt.optimizer", "hyperopt.spec.level", "hyperopt.spec.text"}
    assert {name for name in edges if name in reached(name, edges)} <= CIRCULAR


def test_a_circle_is_found():
    assert reached("a", {"a": {"b"}, "b": {"c"}, "c": {"a"}}) == {"a", "b", "c"}
    assert reached("a", {"a": {"b"}, "b": set()}) == {"b"}
