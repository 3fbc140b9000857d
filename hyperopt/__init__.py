"""PyTorch optimizers that learn their own hyperparameters by gradient descent while they train a model.

>>> import hyperopt, torch
>>> hyperopt.Hyper(hyperopt.Adam).stack(hyperopt.SGD).bind(torch.nn.Linear(2, 1).parameters())
HyperOptimizer(Adam / SGD, 2 tensors in 1 groups)
"""

from .batch_norm import batch_statistics
from .domains import Domain, Interval, Positive, Real, UnitInterval
from .feasible import Ball, Box
from .optimizable import Optimizable
from .optimizer import HyperOptimizer
from .recommended import auto
from .record import Recorder
from .replay import Replay
from .rule import Rule, Values, hyper
from .rules import (
    ADOPT,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Adan,
    AdaShift,
    Averaged,
    Exponent,
    Lion,
    NAdam,
    Padam,
    RAdam,
    RMSprop,
    ScheduleFree,
    Unified,
    Yogi,
)
from .spec.tower import Hyper

__all__ = [
    "ADOPT",
    "SGD",
    "AdaShift",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "Averaged",
    "Ball",
    "Box",
    "Domain",
    "Exponent",
    "Hyper",
    "HyperOptimizer",
    "Interval",
    "Lion",
    "NAdam",
    "Optimizable",
    "Padam",
    "Positive",
    "RAdam",
    "RMSprop",
    "Real",
    "Recorder",
    "Replay",
    "Rule",
    "ScheduleFree",
    "Unified",
    "UnitInterval",
    "Values",
    "Yogi",
    "auto",
    "batch_statistics",
    "hyper",
]
