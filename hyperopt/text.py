"""The textual form of a tower: `Adam(lr=0.01) / SGD`, printed with what differs from the defaults and read without eval."""

import ast
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import rules
from .domains import Domain, Interval, Positive, Real, UnitInterval
from .feasible import Ball, Box, Feasible
from .rule import Rule

if TYPE_CHECKING:
    from .tower import Hyper

DOMAINS: dict[str, Callable[..., Domain]] = {"Positive": Positive, "UnitInterval": UnitInterval, "Interval": Interval, "Real": Real}
COMPOSITIONS = ("ScheduleFree", "Averaged")
SETS: dict[str, Callable[..., Feasible]] = {"Box": Box, "Ball": Ball}
OPTIONS = ("learn", "horizon", "trust", "domains", "per", "strategy", "project", "maximize")


def show(tower: "Hyper", level: int) -> str:
    """The text of a tower whose lowest node stands at `level`; rules have other defaults above level 0."""
    plain = type(tower)(type(tower.rule))
    rule, defaults = tower.rule_at(level), plain.rule_at(level)
    pairs = [(f.name, getattr(rule, f.name), getattr(defaults, f.name)) for f in dataclasses.fields(rule)]
    pairs += [(name, getattr(tower, name), getattr(plain, name)) for name in OPTIONS]
    tree = tower.is_tree()
    if tree:
        # The branches say what is learned.
        pairs = [pair for pair in pairs if pair[0] != "learn"]
    words = [f"{name}={_word(value)}" for name, value, default in pairs if value != default]
    shown = type(rule).__name__ + (f"({', '.join(words)})" if words else "")
    above = {names[0]: show(node, level + 1) for names, node in tower.above.items()}
    if tree:
        return f"{shown} / {{{', '.join(f'{name}: {node}' for name, node in above.items())}}}"
    return " / ".join([shown, *above.values()])


def read(source: str, hyper: type["Hyper"]) -> "Hyper":
    """The tower that `show` printed.

    Raises:
        ValueError: naming the part that is not understood.
        TypeError: what is no text.
    """
    if not isinstance(source, str):
        raise TypeError(f"a tower is read from text such as 'Adam(lr=0.001) / SGD', got {source!r}")
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{source!r} is not a tower: {error.msg}; write one as in 'Adam(lr=0.001) / SGD'") from None
    try:
        return _tower(tree, source, hyper)
    except TypeError as error:
        raise ValueError(f"{source!r} is not a tower: {error}") from None


def read_set(source: str) -> Feasible:
    """The set that was printed as `source`: Box(0.0, 1.0) or Ball(10.0).

    Raises:
        ValueError: text that is no set.
    """
    try:
        value = _value(ast.parse(source, mode="eval").body, source)
    except (SyntaxError, TypeError):
        value = None
    except ValueError as error:
        raise ValueError(f"project = {source!r}: {error}; give Box(lo, hi) or Ball(radius)") from None
    if not isinstance(value, Feasible):
        raise ValueError(f"project = {source!r} is not a set of weights: give Box(lo, hi) or Ball(radius)")
    return value


def _tower(node: ast.expr, source: str, hyper: type["Hyper"]) -> "Hyper":
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        below = _tower(node.left, source, hyper)
        if isinstance(node.right, ast.Dict):
            names = _distinct([_name(key, source) for key in node.right.keys], source)
            return below.stack(**{name: _tower(value, source, hyper) for name, value in zip(names, node.right.values, strict=True)})
        return below.stack(_tower(node.right, source, hyper))
    call = node if isinstance(node, ast.Call) and not _composes(node) else ast.Call(node, [], [])
    rule = _rule(call.func, source)
    if call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(f"{ast.unparse(call)!r} in {source!r}: every value needs its name, as in Adam(lr=0.001)")
    _distinct([str(k.arg) for k in call.keywords], source)
    return hyper(rule, **{str(k.arg): _value(k.value, source) for k in call.keywords})


def _composes(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMPOSITIONS


def _rule(node: ast.expr, source: str) -> Any:
    """A rule by its name, or a composition of rules such as ScheduleFree(Adam)."""
    if isinstance(node, ast.Call) and _composes(node):
        if len(node.args) != 1 or node.keywords:
            raise ValueError(
                f"{ast.unparse(node)!r} in {source!r}: it takes one rule, and values go behind it, as in ScheduleFree(Adam)(lr=0.01)"
            )
        return getattr(rules, _name(node.func, source))(_rule(node.args[0], source))
    name = _name(node, source)
    if name in rules.__all__ and name not in COMPOSITIONS:
        return getattr(rules, name)
    written = [rule for rule in _subclasses(Rule) if rule.__name__ == name]
    if not written:
        raise ValueError(f"{name!r} in {source!r} is not a rule: there are {', '.join(rules.__all__)}, and the rules that you define")
    return written[-1]


def _subclasses(rule: type[Rule]) -> list[type[Rule]]:
    return [found for below in rule.__subclasses__() for found in (below, *_subclasses(below))]


def _value(node: ast.expr, source: str) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, source) for item in node.elts)
    if isinstance(node, ast.Dict):
        names = _distinct([_name(key, source) for key in node.keys], source)
        return {name: _value(value, source) for name, value in zip(names, node.values, strict=True)}
    if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id in DOMAINS):
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = _name(call.func, source)
        if name in DOMAINS | SETS and not call.keywords:
            return (DOMAINS | SETS)[name](*(_value(argument, source) for argument in call.args))
    if isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else node.id
    raise ValueError(f"{ast.unparse(node)!r} in {source!r} is not a number, a name, a tuple, a mapping or a domain")


def _name(node: ast.expr | None, source: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError(f"{ast.unparse(node) if node else '**'!r} in {source!r} is not a name")


def _distinct(names: list[str], source: str) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"{source!r} gives one of {', '.join(names)} twice")
    return names


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_word(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Interval):
        return f"Interval({float(value.low)!r}, {float(value.high)!r})"
    if isinstance(value, Domain):
        return repr(value).removesuffix("()")
    return value if isinstance(value, str) else repr(value)
