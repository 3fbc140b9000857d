"""The text of a tower, as in `Adam(lr=0.01) / SGD`: printed with what differs from the defaults, and read without eval."""

import ast
import dataclasses
import keyword
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .. import rules
from ..domains import Domain, UnitInterval
from ..feasible import Feasible
from ..rule import Rule
from ..rules.split import Split
from .level import Level

T = TypeVar("T")
# A chain of levels as it was written, from level 0 upwards: a rule with its keywords, or a chain for each of several hyperparameters.
Chain = list["tuple[Any, dict[str, Any]] | dict[str, Chain]"]

COMPOSITIONS = ("ScheduleFree", "Averaged")
# Characters of a text: a tree of 1,000 levels takes 10,000. Python's documentation warns that a text large enough may crash ast.parse.
LONGEST = 100_000
DEFAULTS = {
    "horizon": "default",
    "trust": "default",
    "prior": "default",
    "domains": {},
    "per": "group",
    "strategy": "tangents",
    "project": None,
    "maximize": False,
}
SHOWN = 200  # characters of a text that an error message quotes


def read(source: str, build: Callable[[Chain], T]) -> T:
    """What `build` makes of a text that `show` printed; ValueError for any other, of any size and depth, and TypeError for no text."""
    if not isinstance(source, str):
        raise TypeError(f"a tower is read from text such as 'Adam(lr=0.001) / SGD', got {source!r}")
    try:
        return build(_chain(_parsed(source), source))
    except ValueError:
        raise
    except Exception as error:  # a rule may raise anything when it is made with the values that were written
        raise ValueError(f"{_short(source)!r} is not a tower: {_reason(error)}; write one as in 'Adam(lr=0.001) / SGD'") from error


def read_set(source: str) -> Feasible:
    """Read a feasible set, such as Box(0.0, 1.0) or Ball(10.0); ValueError for any other text."""
    try:
        value = _value(_parsed(source), source)
        if not isinstance(value, Feasible):
            raise TypeError(f"it is a {type(value).__name__}")
    except Exception as error:
        text = f"project = {_short(source)!r} is not a set of weights: {_reason(error)}; give Box(lo, hi) or Ball(radius)"
        raise ValueError(text) from error
    return value


# ---- printing


def show(level: Level, at: int = 0) -> str:
    """The text of a tower, or of the part of one that stands `at` a level above 0, where rules have other defaults."""
    level.check_count()
    parts = []
    while True:
        parts.append(show_one(level, at))
        at += 1
        if level.is_tree():
            branches = (f"{names[0]}: {show(node, at)}" for names, node in level.above.items())
            return " / ".join([*parts, f"{{{', '.join(branches)}}}"])
        if not level.above:
            return " / ".join(parts)
        (level,) = level.above.values()


def show_one(level: Level, at: int) -> str:
    """The text of one level."""
    rule, declared = level.rule_at(at), level.rule.declared()
    defaults = {f.name: declared[f.name].above if at and f.name in declared else f.default for f in dataclasses.fields(rule)}
    words = [(name, getattr(rule, name), default) for name, default in defaults.items()]
    words.append(("learn", level.learn, level.learn if level.is_tree() else None))  # the branches of a tree say what is learned
    words += [(name, getattr(level, name), default) for name, default in DEFAULTS.items()]
    shown = ", ".join(f"{name}={_word(value)}" for name, value, default in words if value != default)
    name = type(rule).__name__
    return (name if name.isidentifier() or "(" in name else f"({name})") + (f"({shown})" if shown else "")


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_word(item)}" for name, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_word, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Domain | Feasible):
        given = [(getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
        while given and given[-1][0] == given[-1][1]:
            given.pop()
        return type(value).__name__ + (f"({', '.join(_word(item) for item, _ in given)})" if given else "")
    return value if isinstance(value, str) and _is_bare(value) else repr(value)


def _is_bare(value: str) -> bool:
    """Whether a string is read as itself without quotation marks."""
    return value.isidentifier() and value.isascii() and not (keyword.iskeyword(value) or value == "inf" or _domain_or_set(value))


# ---- reading


def _parsed(source: str) -> ast.expr:
    if len(source) > LONGEST:
        raise SyntaxError(f"it has {len(source)} characters, and may have {LONGEST}")
    try:
        return ast.parse(source.strip(), mode="eval").body
    except ValueError as error:  # a null byte, or half a character
        raise SyntaxError(str(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, (RecursionError, MemoryError)):
        return "it is nested too deeply"
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _chain(node: ast.expr, source: str) -> Chain:
    parts = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):  # in a loop: there may be more than Python can recurse into
        parts.append(node.right)
        node = node.left
    levels: Chain = [_level(node, source)]
    for part in reversed(parts):
        levels += [_mapping(part, source, _chain)] if isinstance(part, ast.Dict) else _chain(part, source)
    return levels


def _level(node: ast.expr, source: str) -> tuple[Any, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) and not _composes(node) else ast.Call(node, [], [])
    rule = _rule(call.func, source)
    names = [pair.arg for pair in call.keywords]
    if call.args or None in names:
        raise ValueError(f"{_code(call)} in {_short(source)!r}: every value needs its name, as in Adam(lr=0.001)")
    _check_distinct(names, source)
    return rule, {str(pair.arg): _value(pair.value, source) for pair in call.keywords}


def _composes(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMPOSITIONS


def _rule(node: ast.expr, source: str) -> Any:
    """A rule by its name, or a composition of rules such as ScheduleFree(Adam) or Muon | Adam."""
    if isinstance(node, ast.Call) and _composes(node):
        if len(node.args) != 1 or node.keywords:
            raise ValueError(f"{_code(node)} in {_short(source)!r}: it takes one rule, values go behind it, ScheduleFree(Adam)(lr=0.01)")
        return getattr(rules, _name(node.func, source))(_rule(node.args[0], source))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        if any(isinstance(side, ast.BinOp) for side in (node.left, node.right)):
            raise ValueError(f"{_code(node)} in {_short(source)!r}: two directions of one level are written (Muon | Adam) / Adam")
        return Split(_rule(node.left, source), _rule(node.right, source))
    name = _name(node, source)
    if name in rules.__all__ and name not in COMPOSITIONS:
        return getattr(rules, name)
    written = _subclasses(Rule, name)
    if not written:
        known = ", ".join(rules.__all__)
        raise ValueError(f"{_short(name)!r} in {_short(source)!r} is not a rule: there are {known}, and the rules that you define")
    return written[-1]


def _value(node: ast.expr, source: str) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, source) for item in node.elts)
    if isinstance(node, ast.Dict):
        return _mapping(node, source, _value)
    if isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else made() if (made := _domain_or_set(node.id)) else node.id
    if isinstance(node, ast.Call) and not node.keywords and (made := _domain_or_set(_name(node.func, source))):
        return made(*(_value(argument, source) for argument in node.args))
    raise ValueError(f"{_code(node)} in {_short(source)!r} is not a number, a name, a tuple, a mapping or a domain")


def _domain_or_set(name: str) -> Callable[..., Any] | None:
    if name == "UnitInterval":
        return UnitInterval
    written = _subclasses(Domain, name) + _subclasses(Feasible, name)
    return written[-1] if written else None


def _mapping(node: ast.Dict, source: str, read: Callable[[ast.expr, str], T]) -> dict[str, T]:
    names = [_name(key, source) for key in node.keys]
    _check_distinct(names, source)
    return {name: read(value, source) for name, value in zip(names, node.values, strict=True)}


def _name(node: ast.expr | None, source: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError(f"{_code(node)} in {_short(source)!r} is not a name")


def _check_distinct(names: list[Any], source: str) -> None:
    if len(set(names)) < len(names):
        repeated = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{_short(source)!r} gives {_short(repeated)} twice: give each name once")


def _subclasses(base: type, name: str) -> list[type]:
    found = [below for direct in base.__subclasses__() for below in (direct, *_subclasses(direct, name))]
    return [below for below in found if below.__name__ == name]


def _code(node: ast.AST | None) -> str:
    return repr(_short(ast.unparse(node)) if node else "**")


def _short(source: str) -> str:
    return source if len(source) <= SHOWN else f"{source[:SHOWN]}…"
