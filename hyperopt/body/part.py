"""What the body of a node has to know of the node, and the ways in which its steps are run."""

from dataclasses import dataclass, field

from ..feasible import Feasible
from ..hyperparameter import Hyperparameters
from ..rule import Rule
from ..tangents import Tangents
from .shards import Ranks

EAGER, WHOLE, STAGES = "eager", "whole", "stages"  # not compiled; compiled in one piece; each stage compiled for itself


@dataclass(frozen=True)
class Part:
    """What a node does, as its body has to know it: its level, rule and hyperparameters, how Z' is made, the trust, the feasible set,
    and the ranks that the weights are sharded over."""

    level: int
    rule: Rule
    hypers: Hyperparameters
    tangents: Tangents
    trust: float | None = None
    feasible: Feasible | None = None
    compiled: bool = False
    ranks: Ranks = field(default_factory=Ranks)
