"""`Hyper`: the specification of a tower of optimizers, what a user writes and prints and stores."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import adopt, text
from .arguments import as_rule, check_learned, check_options, domains_of, names_of, numbers_in, plain
from .domains import Domain
from .feasible import Feasible
from .rule import Rule
from .rules.black_box import BlackBox

if TYPE_CHECKING:
    from .optimizer import HyperOptimizer

# Above level 0: change of a raw hyperparameter in a step. Where level 1 learns its lr too, 0.1 does better: on MNIST validation data
# Adam / Adam / Adam ends at 2.9 % with it and at 4.3 % with 0.5, which lets the lr of level 0 jump about; at height 1 they are equal.
TRUST_ABOVE = 0.5


class Hyper:
    """A tower or tree of optimizers in which each level learns the hyperparameters of the level below; immutable.

    Args:
        rule: the optimizer of this level: a rule of this library (class or instance), the torch.optim class of the same name,
            or a live torch.optim optimizer, whose groups, values and state are taken over by `bind()`. One without a rule here
            (Muon, say, or anybody's) goes on as it is, and its lr alone is learned, through its displacement.
        learn: which of this level's hyperparameters the level above learns: names, or "all" for every one whose value lies
            strictly inside its domain. Default: lr alone.
        horizon: for how many past steps a hyperparameter of this level is held responsible, in steps, 1 to math.inf. 1 is
            the paper. Default 1000, of ScheduleFree 500.
        trust: the largest move of this level's x in one step while its lr is learned: at level 0 relative to the size of the
            weights (default 0.03; ScheduleFree 0.1, and it grows to its value, given or not, over the first 20 steps), above it the
            change of a raw hyperparameter (default 0.5); None for no limit.
        domains: for hyperparameters of this level, the space in which they are learned if not the rule's own.
        per: one learned value per "group" of parameters, per "tensor" or per "coordinate".
        strategy: "tangents", or "graph" for the paper's autograd graph, a slow reference at horizon 1 that waits for the device.
        project: a set such as Box(0, 1) or Ball(10) in which the weights of each group stay: after every step they are moved to
            its nearest point, in the rule's metric; level 0 only. A group may have a "project" of its own.
        maximize: ascend instead of descend; level 0 only.
        hyperparameters: values for this level's rule, such as lr=1e-3; betas=(0.9, 0.999) stands for beta1 and beta2.

    Raises:
        ValueError: a value outside its domain, a name the rule does not have, a learned value on the boundary of its domain.
        TypeError: a rule that is not one, a value that is not a number.

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
        horizon: float | str = "default",
        trust: float | str | None = "default",
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
        made = as_rule(rule, hyperparameters)
        self._set(
            source=source,
            rule=made,
            given=frozenset(hyperparameters),
            learn=names_of(learn),
            horizon=plain(made.horizon if horizon == "default" else horizon),
            trust=plain(trust),
            domains=domains_of(domains),
            per=per,
            strategy=strategy,
            project=project,
            maximize=maximize,
            above={},
        )
        check_options(self)

    def stack(self, rule: Any = None, /, **keywords: Any) -> "Hyper":
        """One level more, which learns the hyperparameters of the level below.

        Args:
            rule: one optimizer for all of them; or none, and for each hyperparameter learned an optimizer of its own:
                `.stack(lr=Adam, beta1=Hyper(SGD, lr=0.1))` is a tree, and further levels go on top of each branch.
            keywords: as for `Hyper`, describing the new level. A step size for each hyperparameter below:
                `.stack(SGD, lr={"lr": 1e-5, "beta1": 1e-4})`.

        Raises:
            ValueError: nothing below can be learned, a name that the level below does not have, a value on the boundary.
        """
        if rule is None and not keywords:
            raise TypeError("stack() needs an optimizer: .stack(SGD), or one for each hyperparameter: .stack(lr=SGD, beta1=Adam)")
        if self.above:
            return self._but(above={names: node.stack(rule, **keywords) for names, node in self.above.items()})
        if not self.rule.declared():
            raise ValueError(f"nothing can be stacked on {type(self.rule).__name__}: it has no hyperparameters to learn")
        if rule is None:
            branches = {name: _upper(node, (name,)) for name, node in keywords.items()}
            if self.learn is not None and self.learn != "all" and set(self.learn) != set(branches):
                raise ValueError(f"learn={self.learn} does not match the branches {tuple(branches)}: leave learn out, they say it already")
            below = self._but(learn=tuple(branches))
            check_learned(below, below.learned)
            return below._but(above={(name,): node for name, node in branches.items()})
        if isinstance(rule, Hyper) and keywords:
            raise TypeError(f"{', '.join(keywords)} was given beside a finished level: write it there, as in .stack(Hyper(SGD, lr=0.1))")
        node = rule if isinstance(rule, Hyper) else Hyper(rule, **keywords)
        steps = node.mappings()
        below = self._but(learn=tuple(steps[0])) if steps and self.learn is None else self
        names = below.learned
        check_learned(below, names)
        return below._but(above={names: _upper(node, names)})

    def bind(self, params: Any = None, *, compile: bool = False, hyper_every: int = 1) -> "HyperOptimizer":
        """The optimizer itself, a `torch.optim.Optimizer` over `params`.

        Args:
            params: tensors, named tensors or group dicts, as for torch.optim; a group may give its own values. None for a
                tower made from a live optimizer.
            compile: fuse each step with torch.compile; on a CPU the most used one is made by hand.
            hyper_every: step the levels above only on every k-th step.

        Raises:
            ValueError: no parameters, a parameter given twice, a value outside its domain, an unknown name in a group.
            TypeError: no params, or params for a tower made from a live optimizer, which has its own.
        """
        from .optimizer import HyperOptimizer

        for name in self.rule.declared():
            if isinstance(self.rule.value(name), Mapping):
                given = f"{type(self.rule).__name__}({name}={self.rule.value(name)!r})"
                raise ValueError(f"{given}: level 0 moves weights, which have no such names; give one number")
        if isinstance(self.rule, BlackBox) and self.source is None:
            name = self.rule.optimizer
            raise ValueError(f"{self.rule} needs a live {name} to drive: Hyper({name}(model.parameters())).stack(…).bind()")
        if (params is None) == (self.source is None):
            remedy = "pass model.parameters()" if params is None else "call bind() without params, it has its own"
            raise TypeError(f"bind() needs the parameters from one place: {remedy}")
        return HyperOptimizer(self, params, compile=compile, hyper_every=hyper_every)

    def replace(self, **hyperparameters: Any) -> "Hyper":
        """The same tower with other values at level 0."""
        return self._but(rule=as_rule(self.rule, hyperparameters), given=self.given | set(hyperparameters))._checked()

    def held(self, **hyperparameters: Any) -> "Hyper":
        """Level 0 alone, with nothing learned, and these values: what a plain run with learned values is started from."""
        return self.replace(**hyperparameters)._but(above={}, learn=None, source=None)

    def released(self) -> "Hyper":
        """The same tower without the live optimizer that it was made from."""
        return self._but(source=None)

    def inside(self, project: Feasible) -> "Hyper":
        """The same tower with the weights kept inside a set."""
        tower = self._but(project=project)
        check_options(tower)
        return tower

    @property
    def height(self) -> int:
        """The number of levels above level 0."""
        return 1 + max(node.height for node in self.above.values()) if self.above else 0

    @property
    def learned(self) -> tuple[str, ...]:
        """The names of this level's hyperparameters that are learned once something is stacked on it."""
        if self.learn is None:
            return ("lr",)
        if self.learn == "all":
            return tuple(n for n in self.rule.declared() if all(self.domain(n).inside(v) for v in numbers_in(self.rule.value(n))))
        return tuple(self.learn)

    @property
    def learning(self) -> tuple[str, ...]:
        """The names of this level's hyperparameters that are learned as the tower stands: none at the top."""
        return self.learned if self.above else ()

    def domain(self, name: str) -> Domain:
        """The space in which a hyperparameter of this level is learned."""
        return self.domains[name] if name in self.domains else self.rule.declared()[name].domain

    def trust_at(self, level: int) -> float | None:
        """The trust of this node where it stands at `level`."""
        if isinstance(self.trust, str):
            return TRUST_ABOVE if level else self.rule.trust
        return self.trust

    def rule_at(self, level: int) -> Rule:
        """The rule of this node where it stands at `level`: above level 0 a rule has defaults of its own for raw space."""
        if level == 0:
            return self.rule
        above = {n: d.above for n, d in self.rule.declared().items() if n not in self.given and self.rule.value(n) == d.default}
        return dataclasses.replace(self.rule, **above)

    @classmethod
    def parse(cls, source: str) -> "Hyper":
        """The tower that `str` printed as `source`; read without eval.

        Raises:
            ValueError: text that is not a tower, naming the part that is not understood.

        >>> from hyperopt import Hyper
        >>> str(Hyper.parse("Adam(lr=0.01) / {lr: Adam, beta1: SGD(lr=0.1)}"))
        'Adam(lr=0.01) / {lr: Adam, beta1: SGD(lr=0.1)}'
        """
        return text.read(source, cls)

    def structure(self) -> str:
        """The tower's text without any value: what a checkpoint must have in common with the tower that reads it."""
        options = [f"{f.name}={getattr(self.rule, f.name)}" for f in dataclasses.fields(self.rule) if f.name not in self.rule.declared()]
        learned = [f"{name} in {self.domain(name)}" for name in self.learning]
        words = [*options, f"per {self.per}", f"horizon {self.horizon:g}", f"learned: {', '.join(learned) or 'nothing'}"]
        return f"{type(self.rule).__name__}({'; '.join(words)})" + "".join(
            f" / {{{', '.join(names)}: {node.structure()}}}" for names, node in self.above.items()
        )

    def __str__(self) -> str:
        return text.show(self, 0)

    def __repr__(self) -> str:
        return f"Hyper({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hyper):
            return False
        # Two rules may have the same name, as a user's own SGD does.
        return str(self) == str(other) and type(self.rule) is type(other.rule) and self.above == other.above

    def __hash__(self) -> int:
        return hash(str(self))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a tower does not change: Hyper(…).replace({name}=…) or a new Hyper gives another one")

    # ---- what follows is private

    source: torch.optim.Optimizer | None
    rule: Rule
    given: frozenset[str]
    learn: tuple[str, ...] | str | None
    horizon: float
    trust: float | str | None
    domains: dict[str, Domain]
    per: str
    strategy: str
    project: Feasible | None
    maximize: bool
    above: "dict[tuple[str, ...], Hyper]"

    def _set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def _but(self, **changes: Any) -> "Hyper":
        new = object.__new__(Hyper)
        new._set(**{**self.__dict__, **changes})
        return new

    def _checked(self) -> "Hyper":
        if self.above:
            check_learned(self, self.learned)
        return self

    def mappings(self) -> list[Mapping[str, float]]:
        """The values of this level that were given for each hyperparameter below."""
        return [v for v in (self.rule.value(name) for name in self.rule.declared()) if isinstance(v, Mapping)]

    def is_tree(self) -> bool:
        """Whether the learned hyperparameters have optimizers of their own."""
        return len(self.above) > 1 or any(names != self.learned for names in self.above)


def _upper(node: Any, names: tuple[str, ...]) -> Hyper:
    """A node that is put above the hyperparameters `names`."""
    node = node if isinstance(node, Hyper) else Hyper(node)
    if node.maximize:
        raise ValueError("maximize=True belongs to level 0: every level above descends the loss that level 0 is given")
    if node.project is not None:
        raise ValueError(f"project={node.project!r} belongs to level 0: the levels above move hyperparameters, which have domains")
    if node.source is not None:
        raise ValueError("a live optimizer has parameters of its own and can only be level 0: stack its class instead")
    for mapping in node.mappings():
        if set(mapping) != set(names):
            raise ValueError(f"a value was given for each of {tuple(mapping)}, but {names} are learned: name the same")
    return node
