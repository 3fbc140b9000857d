"""`HyperOptimizer`: a bound tower with the face of torch.optim."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import adopt, checkpoint, driven, held_out, roles
from .group import Group
from .param_group import check_arguments, check_parameters, check_scheduler, defaults, prepared, with_names
from .rules.black_box import BlackBox
from .spec.level import Level

# A user's torch.compile around a training step leaves these methods out. Traced, what they keep in Python would be compiled anew in each
# step. torch.optim does the same; torch.compiler.disable would import the compiler with this module, which takes two seconds.
UNTRACED = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]


class HyperOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that learns its own hyperparameters.

    A plain `loss.backward()` and `step()`: no graph is kept, gradients are never changed, and nothing waits for the device unless another
    optimizer is driven. `param_groups[i]["lr"]`, `["beta1"]` … are the live values; assigning to one is noticed at the next step.

    Arguments and errors are those of `Hyper.bind`, which makes it.

    >>> import torch
    >>> from hyperopt import Hyper, Adam, SGD
    >>> w = torch.ones(3, requires_grad=True)
    >>> optimizer = Hyper(Adam, lr=1e-5).stack(SGD).bind([w])
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     w.square().sum().backward()
    ...     optimizer.step()
    >>> bool(optimizer.hyperparameters()["0.lr"] > 1e-5)
    True
    """

    def __init__(self, tower: Level, params: Any, *, compile: bool = False, hyper_every: int = 1, schedule: bool = False) -> None:
        check_arguments(params, compile, hyper_every, schedule)
        self.tower, self.compile, self.hyper_every, self.schedule = tower, compile, hyper_every, schedule
        self._bound: list[Group] = []
        self._averaged = False
        self.driven: adopt.Driven | None = None
        if isinstance(params, torch.nn.Module):
            params = [roles.group_of(params, tower.rule.parts, elementwise=tower.rule.elementwise)]
        source = tower.source
        if source is not None:
            params = adopt.groups_of(source, tower.rule)
            self.tower = tower.released()  # so that a copy or a pickle does not drag the old optimizer along
        super().__init__(params, defaults(tower.rule))
        if source is not None:
            self.state.update(adopt.state_of(source))
            self._groups()
            if isinstance(tower.rule, BlackBox):
                self.driven = adopt.Driven(source, resolve=bool(tower.learning))

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "_wrapped_by_lr_sched"):  # torch's schedulers first wrap `step`
            check_scheduler(self.tower, self.schedule)
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with a tower of their own; values in the group override the tower's at level 0."""
        if self.driven is not None:
            raise ValueError(f"{self.tower.rule} is driven as a whole: add the parameters to it before a tower is made from it")
        super().add_param_group(with_names(prepared(param_group, self.tower), self.param_groups))
        added = self.param_groups[-1]
        if "momentum" not in self.tower.rule.declared():
            added.pop("momentum", None)
        try:
            check_parameters(added["params"])
            self._bound.append(Group(self.tower, added, self.state, compile=self.compile, schedule=self.schedule))
        except BaseException:
            self.param_groups.pop()
            raise

    @UNTRACED
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every level. A gradient that is not finite leaves everything as it was, and is counted in `skipped`.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim.

        Raises:
            TypeError: a sparse gradient.
            ValueError: a number outside its domain was assigned to a parameter group (a tensor outside is ignored without a host sync); a
                parameter was replaced or changed and has a state of another shape. Nothing is changed.
        """
        self._check_outside("step()")
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.no_grad():
            driven.step(self.driven, self._groups(), self.hyper_every)
        return loss

    @UNTRACED
    def hyper_backward(self, loss: Tensor) -> None:
        """Let the next step learn its hyperparameters from this loss, on held-out data for example, instead of the training loss.

        Its gradient is pulled through the tangents of the weights as they are; under `averaged()` through those of the averaged weights,
        which makes the decay of an average learnable. Parameters and their .grad stay as they are. Of several processes
        the gradients are averaged, if the loss comes from the wrapped model. Hypergradients of several calls before a step add up. With
        bind(…, hyper_every=…) larger than the run, nothing is learned from the training loss. Before the first step there are no
        tangents, and nothing is learned.

        Args:
            loss: 0-d, made from the model as it is now.

        Raises:
            RuntimeError: a tower that learns nothing, or strategy="graph".
            ValueError: a loss that is not one number that depends on the parameters.

        >>> import torch
        >>> from hyperopt import Adam, Averaged, Hyper
        >>> w = torch.ones(3, requires_grad=True)
        >>> optimizer = Hyper(Averaged(Adam), learn="decay").stack(Adam).bind([w])
        >>> for _ in range(5):
        ...     w.grad = 2 * w.detach()
        ...     optimizer.step()
        ...     with optimizer.averaged():
        ...         optimizer.hyper_backward(w.square().sum())
        >>> bool(optimizer.hyperparameters()["0.decay"] < 0.98)  # on the way down the latest weights are the best
        True
        """
        held_out.learn(loss, self._groups(), averaged=self._averaged)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the parameters hold the averaged weights, to evaluate with; they come back bit for bit.

        It does nothing for a rule that does not average, and may be nested. The statistics of BatchNorm belong to other weights:
        `batch_statistics(model, batches)` recomputes them. With FSDP2, call `model.reshard()` at the end: its root keeps what it gathered.

        Raises:
            RuntimeError: a step inside, or a checkpoint, a copy or a pickle, which would hold other weights than training goes on from.
        """
        pairs = self._averages()
        if not pairs:
            yield
            return
        kept = [p.detach().clone() for p, _ in pairs]
        with torch.no_grad():
            torch._foreach_copy_([p for p, _ in pairs], [average for _, average in pairs])  # pyright: ignore[reportPrivateImportUsage]
        self._averaged = True
        try:
            yield
        finally:
            self._averaged = False
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in pairs], kept)  # pyright: ignore[reportPrivateImportUsage]

    def hyperparameters(self) -> dict[str, Tensor]:
        """Every hyperparameter of every level, learned or held, by "<level>.<name>"; detached copies, no host sync."""
        return self._named(lambda node: {name: h.value for name, h in node.hypers.own.items()})

    def hypergradients(self) -> dict[str, Tensor]:
        """The hypergradient of every learned hyperparameter in raw space, as of the last step; detached copies, no host sync."""
        return self._named(lambda node: node.q)

    @property
    def skipped(self) -> dict[str, int]:
        """How many steps were left out for a gradient, and how many hypergradients, that were not finite."""
        steps, hypergradients = zip(*(group.tower["skipped"] for group in self._bound or self._groups()), strict=True)
        return {"gradients": max(map(int, steps)), "hypergradients": sum(map(int, hypergradients))}

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; tensors and plain values only, so that torch.load(weights_only=True) reads it.

        Raises:
            RuntimeError: inside `averaged()`, or with strategy="graph", whose autograd graph cannot be saved.
        """
        self._check_saves()
        driven = {"driven": self.driven.optimizer.state_dict()} if self.driven else {}
        return checkpoint.whole(super().state_dict() | driven, self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint; training then goes on bit for bit. Where both sides name their parameters, they are matched by name.

        Raises:
            ValueError: a checkpoint of another tower, format, shapes or names, without a group's feasible set, with a part missing, or
                with values that this optimizer cannot have written; nothing is changed then.
            RuntimeError: inside `averaged()`.
        """
        self._check_outside("load_state_dict()")
        final: dict[str, Any] = {}
        before = self.state, self.param_groups, self._groups()

        def inspect(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            final.update(checkpoint.fitted(given, self.tower, before[2], self.driven and self.driven.optimizer))
            return final

        handle = self.register_load_state_dict_pre_hook(inspect)
        try:
            super().load_state_dict(checkpoint.mapping(state_dict))
            self.state.update(checkpoint.states(final, [p for group in self.param_groups for p in group["params"]]))
            self._groups()
            if self.driven is not None:
                self.driven.optimizer.load_state_dict(final["driven"])
        except BaseException:
            self.state, self.param_groups, self._bound = before
            raise
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._check_saves()
        return super().__getstate__() | {n: getattr(self, n) for n in ("tower", "compile", "hyper_every", "schedule", "driven")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_bound": [], "_averaged": False})

    def __repr__(self) -> str:
        tensors = sum(len(group["params"]) for group in self.param_groups)
        head = f"HyperOptimizer({self.tower}, {tensors} tensors in {len(self.param_groups)} groups)"
        return "\n".join([head, *(line for group in self.param_groups for line in roles.shown(group, self.tower.rule.parts))])

    @UNTRACED
    def _groups(self) -> list[Group]:
        tower, state, how = self.tower, self.state, {"compile": self.compile, "schedule": self.schedule}
        if len(self._bound) != len(self.param_groups):
            self._bound = [Group(tower, group, state, **how) for group in self.param_groups]
        self._bound = [bound.current(tower, group, state, **how) for bound, group in zip(self._bound, self.param_groups, strict=True)]
        return self._bound

    @UNTRACED
    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        return [] if self._averaged else [pair for group in self._groups() for pair in group.averages()]

    def _check_outside(self, what: str) -> None:
        if self._averaged:
            raise RuntimeError(f"{what} inside averaged(): the parameters hold the averaged weights there; leave the context first")

    def _check_saves(self) -> None:
        self._check_outside("a checkpoint or a copy")
        if any(not group.tree.saves() for group in self._groups()):
            raise RuntimeError("strategy='graph' holds an autograd graph, which cannot be saved: strategy='tangents' computes the same")

    @UNTRACED
    def _named(self, of: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        groups, out = self._bound or self._groups(), {}  # what was replaced since is the next step's business
        for i, group in enumerate(groups):
            suffix = f"[{i}]" if len(groups) > 1 else ""
            for label, node in sorted(group.nodes.items()):
                out |= {f"{label}.{name}{suffix}": value.detach().clone() for name, value in of(node).items()}
        return out
