"""Sphinx: `make docs` builds the pages of docs/ and experiments/ into docs/_build.

The source folder is the repository's root, so that links and images in a page are the same paths here and on GitHub.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "hyperopt"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "experiments/README.md", "experiments/results/*.md"]
exclude_patterns = [".*", "data", "runs", "build", "dist", "docs/_build"]  # not searched at all
myst_heading_anchors = 3
highlight_language = "none"  # equations and commands, unless a block names its language
smartquotes_action = "D"  # dashes alone: quotes belong to code more often than not
toc_object_entries_show_parents = "hide"

autodoc_typehints = "none"  # the docstrings name types where they are not obvious
autodoc_member_order = "bysource"
nitpick_ignore_regex = [("py:exc", r"\w+Error")]  # Python's own

html_theme = "furo"
html_title = "hyperopt"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_extra_path = ["redirect"]  # from docs/_build/index.html to the first page


def to_rst(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read in the source: single backticks are code, and what is indented after a blank line is too."""
    lines[:] = _to_rst(lines)


def _to_rst(lines: list[str]) -> Iterator[str]:
    literal = example = False
    indent = 0  # of the last line of text
    blank = True
    for line in lines:
        depth = len(line) - len(line.lstrip())
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not line.strip():
            blank = True
        elif literal and depth > indent:
            blank = False
        else:
            literal = blank and depth > indent and not example
            if literal:
                yield from ("::", "")
            else:
                indent = depth
            blank = False
        yield line if literal or example else _escaped(line)


def _escaped(line: str) -> str:
    """Text between backticks as code, and outside of it nothing that is markup."""
    parts = line.split("`")
    if len(parts) % 2 == 0 or "``" in line:
        return line
    return "".join(f"``{part}``" if i % 2 else part.replace("|", r"\|").replace("*", r"\*") for i, part in enumerate(parts))


def name_results(_app: Sphinx, docname: str, source: list[str]) -> None:
    """The tables that the experiments write have no heading, and are reached from the page of the experiments alone."""
    if docname.startswith("experiments/results/"):
        source[0] = f"---\norphan: true\n---\n\n# {Path(docname).name}\n\n{source[0]}"


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
    app.connect("source-read", name_results)
