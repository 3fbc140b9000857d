"""Rules that are others with other defaults."""

import importlib
import sys
from functools import partial
from typing import Any

from .rule import Rule


class Variant(partial[Rule]):
    """A rule with other defaults, under a name of its own: `AdamW = Variant(Adam, …)`, a module's global."""

    @property
    def __name__(self) -> str:
        return next(name for name, value in vars(sys.modules[self.func.__module__]).items() if value is self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and pickled as classes are, by name, so that there is only one of it.
        return _named, (self.func.__module__, self.__name__)


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
