"""Optimizers that learn their own hyperparameters while they train a model, in towers and trees of any height."""

from .domains import Domain, Interval, Positive, Real, UnitInterval
from .optimizable import Optimizable
from .optimizer import HyperOptimizer
from .record import Recorder
from .rule import Rule, Values, hyper
from .rules import SGD, Adam, AdamW
from .tower import Hyper

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Domain",
    "Hyper",
    "HyperOptimizer",
    "Interval",
    "Optimizable",
    "Positive",
    "Real",
    "Recorder",
    "Rule",
    "UnitInterval",
    "Values",
    "hyper",
]
