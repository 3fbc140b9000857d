"""PyTorch optimizers that learn their own hyperparameters by gradient descent while they train a model.

>>> import hyperopt, torch
>>> hyperopt.Hyper(hyperopt.Adam).stack(hyperopt.SGD).bind(torch.nn.Linear(2, 1).parameters())
HyperOptimizer(Adam / SGD, 2 tensors in 1 groups)
"""

from . import rules
from .batch_norm import batch_statistics
from .domains import Domain, Interval, Positive, Real, UnitInterval
from .feasible import Ball, Box
from .optimizable import Optimizable
from .optimizer import HyperOptimizer
from .recommended import auto
from .record import Recorder
from .replay import Replay
from .rule import Rule, Values, hyper
from .rules import *  # noqa: F403 - what rules.__all__ names
from .rules.split import Split
from .spec.tower import Hyper

__version__ = "0.1.0"

# fmt: off
__all__ = [
    *rules.__all__, "Ball", "Box", "Domain", "Hyper", "HyperOptimizer", "Interval", "Optimizable", "Positive", "Real", "Recorder", "Replay",
    "Rule", "Split", "UnitInterval", "Values", "auto", "batch_statistics", "hyper",
]
# fmt: on
