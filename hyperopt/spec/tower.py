"""`Hyper`: what a user writes to specify a tower of optimizers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import adopt
from ..domains import Domain
from ..feasible import Feasible
from ..optimizer import HyperOptimizer
from ..rules.black_box import BlackBox
from . import text
from .arguments import as_rule, named, names_of, plain
from .level import MOST, Level


class Hyper(Level):
    """A tower or tree of optimizers in which each level learns hyperparameters of the level below; immutable.

        x ← rule(x, g, h),      h ← rule_above(h, q),      q = gᵀ ∂x/∂h: the hypergradient of h

    Args:
        rule: the optimizer of this level: a rule (class or instance), the torch.optim class of the same name, or a live torch.optim
            optimizer, whose groups, values and state `bind()` takes over. A live optimizer without a rule in this library, such as SOAP,
            continues to run itself: only its lr is learned, from the displacement of the weights.
        learn: hyperparameters of this level for the level above to learn: a name, names, or "all" for each one whose value is strictly
            inside its domain. Default: lr alone.
        horizon: number of past steps that a hyperparameter of this level is held responsible for, from 1 to math.inf: one for all that
            are learned, or a mapping such as {"lr": 1000, "beta1": 1}; those that are not in it keep their defaults. The tangent ∂x/∂h
            decays by a factor of 1 − 1/horizon per step; 1 is the paper's method. Default: as the rule declares them, 1 for betas and
            other decays, otherwise 1000; 500 for ScheduleFree.
        trust: largest change in one step of what this level moves, while its lr is learned. At level 0 it is relative to the norm of the
            weights (default 0.03; ScheduleFree 0.1, reached linearly over the first 20 steps, also for a value that is given). Above
            level 0 it is the change of a raw hyperparameter (default 0.5). None: no limit.
        prior: in every step, everything learned but the lr of level 0 returns to its usual value by this fraction of the distance, 1/prior;
            at least 1, default 30. The usual value is the rule's default, see `docs/guards.md`. None: never, also where trust is None and
            no prior is given.
        domains: for hyperparameters of this level, the space in which they are learned, where it is not the rule's own.
        per: one learned value per "group" of parameters (default), per "tensor" or per "coordinate".
        strategy: "tangents" (default), or "graph" for the paper's autograd graph: a slow reference for horizon 1, with host syncs.
        project: a set such as Box(0, 1) or Ball(10) that the weights of each group stay in: after every step they move to its nearest
            point, in the rule's metric. Level 0 only; a parameter group may have a "project" of its own. Default: None.
        maximize: ascend instead of descend; level 0 only. Default: False.
        hyperparameters: values for the rule of this level, such as lr=1e-3; betas=(0.9, 0.999) sets beta1 and beta2.

    Raises:
        ValueError: a value outside its domain, a name that the rule does not have, a learned value on the boundary of its domain.
        TypeError: not a rule, or a value that is not a number.

    Source: Chandra, Xie, Ragan-Kelley and Meijer, NeurIPS 2022 (arXiv 1909.13371).

    >>> from hyperopt import Hyper, Adam, SGD
    >>> Hyper(Adam, lr=1e-5, learn=("lr", "beta1")).stack(SGD)
    Hyper('Adam(lr=1e-05, learn=(lr, beta1)) / SGD')
    """

    def __init__(
        self,
        rule: Any,
        *,
        learn: Iterable[str] | str | None = None,
        horizon: float | Mapping[str, float] | str = "default",
        trust: float | str | None = "default",
        prior: float | str | None = "default",
        domains: Mapping[str, Domain] | None = None,
        per: str = "group",
        strategy: str = "tangents",
        project: Feasible | None = None,
        maximize: bool = False,
        **hyperparameters: Any,
    ) -> None:
        source = rule if isinstance(rule, torch.optim.Optimizer) else None
        if source is not None:
            if hyperparameters:
                given = ", ".join(hyperparameters)
                raise ValueError(f"{given} was given for a live optimizer, which brings its own values: assign to its param_groups instead")
            rule, maximize = adopt.rule_of(source), maximize or bool(source.param_groups[0].get("maximize"))
        values = named(hyperparameters)
        made = as_rule(rule, values)
        vars(self).update(rule=made, given=frozenset(values), learn=names_of(learn), source=source, above={}, height=0, depth=0, count=1)
        vars(self).update(horizon=plain(horizon, "horizon"), trust=plain(trust), prior=plain(prior))
        vars(self).update(domains={} if domains is None else plain(domains), per=per, strategy=strategy, project=project, maximize=maximize)
        self.check()
        if isinstance(self.learn, tuple) and self.learn:
            self.check_learned(self.learn)

    def stack(self, rule: Any = None, /, **keywords: Any) -> "Hyper":
        """Add one level on top, which learns the hyperparameters of the level below it.

        Args:
            rule: one optimizer for all of them, as for `Hyper`, or a tower. Without it, `keywords` give each learned hyperparameter its
                own optimizer: `.stack(lr=Adam, beta1=Hyper(SGD, lr=0.1))` is a tree. Further levels are added to every branch.
            keywords: as for `Hyper`; they describe the new level. A mapping gives each hyperparameter below its own value:
                `.stack(SGD, lr={"lr": 1e-5, "beta1": 1e-4})`.

        Raises:
            ValueError: nothing below can be learned, a name that the level below does not have, a learned value on the boundary, a
                height above 1,000.
            TypeError: no optimizer at all, or keywords beside a level that is finished.

        >>> from hyperopt import Hyper, Adam, SGD
        >>> Hyper(Adam).stack(lr=Adam, beta1=SGD).stack(SGD)
        Hyper('Adam / {lr: Adam / SGD, beta1: SGD / SGD}')
        """
        if rule is None and not keywords:
            raise TypeError("stack() needs an optimizer: .stack(SGD), or one for each hyperparameter: .stack(lr=SGD, beta1=Adam)")
        if self.above:
            new: dict[int, Hyper] = {}
            for node in self.nodes():
                uppers = {names: new[id(upper)] for names, upper in node.above.items()}
                new[id(node)] = node.under(uppers) if uppers else node.stack(rule, **keywords)
            return new[id(self)]
        if not self.rule.declared():
            raise ValueError(f"nothing can be stacked on {type(self.rule).__name__}: it has no hyperparameters to learn")
        if rule is None:
            if self.learn not in (None, "all") and set(self.learn) != set(keywords):
                raise ValueError(f"learn={self.learn} does not match the branches {tuple(keywords)}: leave learn out, they imply it")
            below, nodes = self._but(learn=tuple(keywords)), {(name,): node for name, node in keywords.items()}
        else:
            if isinstance(rule, Hyper) and keywords:
                raise TypeError(f"{', '.join(keywords)} was given beside a finished level: write it there, .stack(Hyper(SGD, lr=0.1))")
            node = rule if isinstance(rule, Hyper) else Hyper(rule, **keywords)
            below = self._but(learn=tuple(steps[0])) if self.learn is None and (steps := node.mappings()) else self
            nodes = {below.learned: node}
        below.check_learned(below.learned)
        return below.under({names: _upper(node, names) for names, node in nodes.items()})

    def bind(self, params: Any = None, *, compile: bool = False, hyper_every: int = 1, schedule: bool = False) -> HyperOptimizer:
        """Make the optimizer of this tower, a `torch.optim.Optimizer` over `params`.

        Args:
            params: a module, or tensors, named tensors or group dicts, as for torch.optim; a group may have its own values. `Muon`, alone
                or beside another rule, reads from a module which of its tensors are matrices. None for a tower made from a live optimizer.
            compile: fuse each step with torch.compile; on a CPU the most common step runs in hand-written C++. Default: False.
            hyper_every: step the levels above level 0 on every k-th step only. Default: 1.
            schedule: `param_groups[…]["lr"]` belongs to a scheduler, which scales the learned lr: a step is taken at what stands there
                times the learned lr, relative to the lr that the group was bound with. Without it, what is written there replaces the
                learned lr. A held lr is not affected. Default: False.

        Raises:
            ValueError: no parameters, a parameter given twice, a value outside its domain, an unknown name in a group, a tower of a
                height above 200 or more than 10,000 levels.
            TypeError: no params, or params for a tower made from a live optimizer, which has its own; such an optimizer without a rule
                here, of which lr is learned, over parameters in half precision.

        >>> import torch
        >>> from hyperopt import Adam, Hyper
        >>> Hyper(Adam).stack(Adam).bind(torch.nn.Linear(2, 1).parameters())
        HyperOptimizer(Adam / Adam, 2 tensors in 1 groups)
        """
        self.check_bound()
        for name in self.rule.declared():
            if isinstance(self.rule.value(name), Mapping):
                given = f"{type(self.rule).__name__}({name}={self.rule.value(name)!r})"
                raise ValueError(f"{given} is at level 0, where nothing is below that has these names: give one number")
        if isinstance(self.rule, BlackBox) and self.source is None:
            name = self.rule.optimizer
            raise ValueError(f"{self.rule} needs a live {name} to drive: Hyper({name}(model.parameters())).stack(…).bind()")
        if (params is None) == (self.source is None):
            remedy = "pass model.parameters()" if params is None else "call bind() without params, it has its own"
            raise TypeError(f"bind() needs the parameters from one place: {remedy}")
        return HyperOptimizer(self, params, compile=compile, hyper_every=hyper_every, schedule=schedule)

    @classmethod
    def parse(cls, source: str) -> "Hyper":
        """Read the tower that `str` printed, without eval.

        Raises:
            ValueError: text that is not a tower, or has more than 100,000 characters, naming the part that is not understood.
            TypeError: not text.

        >>> from hyperopt import Hyper
        >>> str(Hyper.parse("Adam(lr=0.01) / {lr: Adam, beta1: SGD(lr=0.1)}"))
        'Adam(lr=0.01) / {lr: Adam, beta1: SGD(lr=0.1)}'
        """
        return text.read(source, _built)

    def __str__(self) -> str:
        return text.show(self)

    def __repr__(self) -> str:
        return f"Hyper({str(self)!r})" if self.count <= MOST else f"<Hyper of {self.count:.3g} levels>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hyper) or (self.height, self.count) != (other.height, other.count):
            return False
        known: dict[Any, int] = {}

        def number(tower: Hyper) -> int:
            # Level by level: with branches that are shared, the text of a whole tower may be longer than memory.
            of: dict[int, int] = {}
            for node in tower.nodes():
                uppers = tuple((names, of[id(upper)]) for names, upper in node.above.items())
                # Equal texts are not enough: a user's rule may have the name of another one.
                key = text.show_one(node, int(node is not tower)), type(node.rule), uppers
                of[id(node)] = known.setdefault(key, len(known))
            return of[id(tower)]

        return self is other or number(self) == number(other)

    def __hash__(self) -> int:
        return hash((text.show_one(self, 0), self.height, self.count))


def _upper(node: Any, names: tuple[str, ...]) -> Hyper:
    """The node that is to learn the hyperparameters `names`."""
    node = node if isinstance(node, Hyper) else Hyper(node)
    if node.maximize:
        raise ValueError("maximize=True belongs to level 0: every level above it descends the loss that level 0 is given")
    if node.project is not None:
        raise ValueError(f"project={node.project!r} belongs to level 0: the levels above it move hyperparameters, which have domains")
    if node.source is not None:
        raise ValueError("a live optimizer has parameters of its own and can only be level 0: stack its class instead")
    for mapping in node.mappings():
        if set(mapping) != set(names):
            raise ValueError(f"a value was given for each of {tuple(mapping)}, but {names} are learned: name the same")
    return node


def _built(chain: text.Chain, top: Any = None) -> Any:
    """The tower of a chain that was read, with `top` above it: a tower, or one for each of several hyperparameters."""
    for written in reversed(chain):  # downwards, as every level that is added at the top would copy all levels below
        if isinstance(written, dict):
            top = {name: _built(branch, top) for name, branch in written.items()}
        else:
            rule, keywords = written
            level = Hyper(rule, **keywords)
            top = level if top is None else level.stack(**top) if isinstance(top, dict) else level.stack(top)
    return top
