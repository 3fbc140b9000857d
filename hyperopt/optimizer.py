"""`HyperOptimizer`: a bound tower with the face of torch.optim."""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import adopt, checkpoint
from .group import Group
from .rule import check
from .rules.black_box import BlackBox
from .spec.level import Level

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HyperOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that learns its own hyperparameters; made by `Hyper.bind`.

    A plain `loss.backward()` and `step()`: no graph is kept, gradients are read and never changed, and nothing waits for
    the device (but where another optimizer is driven).
    `param_groups[i]["lr"]`, `["beta1"]` … are the live values; assigning to one is noticed at the next step.

    Args:
        tower: the specification.
        params: tensors, named tensors or group dicts.
        compile: fuse each step with torch.compile; on a CPU the most used one is made by hand.
        hyper_every: step the levels above only on every k-th step.

    Raises:
        ValueError: no parameters, a parameter given twice, a value outside its domain, an unknown name in a group.
        TypeError: a complex parameter, a `compile` that is not True or False.

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

    def __init__(self, tower: Level, params: Any, *, compile: bool = False, hyper_every: int = 1) -> None:
        if isinstance(params, (torch.nn.Module, str)) or callable(params):
            raise TypeError(f"params must be parameters, got {type(params).__name__}: pass model.parameters()")
        if isinstance(hyper_every, bool) or not isinstance(hyper_every, int) or hyper_every < 1:
            raise ValueError(f"hyper_every = {hyper_every!r} must be a whole number of steps, at least 1")
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {compile!r}")
        self.tower, self.compile, self.hyper_every = tower, compile, hyper_every
        self._bound: list[Group] = []
        self._averaged = False
        self.driven: adopt.Driven | None = None
        source = tower.source
        if source is not None:
            params = adopt.groups_of(source, tower.rule)
            # The tower itself stays a plain value: a copy or a pickle of this optimizer does not drag the old one along.
            self.tower = tower.released()
        super().__init__(params, {name: tower.rule.value(name) for name in tower.rule.declared()})
        if source is not None:
            self.state.update(adopt.state_of(source))
            self._rebuild()
            if isinstance(tower.rule, BlackBox):
                self.driven = adopt.Driven(source, resolve=bool(tower.learning))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with a tower of their own; values in the group override the tower's at level 0."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group is a dictionary, {{'params': parameters}}, got {type(param_group).__name__}")
        if "params" not in param_group:
            raise ValueError(f"a parameter group needs an entry 'params', got only {', '.join(map(repr, param_group))}")
        if self.driven is not None:
            raise ValueError(f"{self.tower.rule} is driven as a whole: add the parameters to it before a tower is made from it")
        group = dict(param_group)
        if "betas" in group:
            group["beta1"], group["beta2"] = group.pop("betas")
        known = self.tower.rule.declared()
        for name in group.keys() - {"params", "param_names", "initial_lr", "name", "project"} - known.keys():
            raise ValueError(f"a parameter group has an unknown entry {name!r}: {type(self.tower.rule).__name__} has {', '.join(known)}")
        for name in group.keys() & known.keys():
            check(f"a parameter group's {name}", group[name], self.tower.domain(name))
        self.tower.replace(**{name: group[name] for name in group.keys() & known.keys()})
        if group.get("project") is not None:
            self.tower.inside(group["project"])
            group["project"] = str(group["project"])  # plain, so that a checkpoint is read with weights_only=True
        if not isinstance(group["params"], (Tensor, Set)):
            group["params"] = list(group["params"])
            tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            repeated = len({id(p) for p in tensors}) < len(tensors)
        else:
            repeated = False  # torch makes a list of one tensor, and refuses a set, which has no order
        if repeated:
            raise ValueError("a parameter group holds the same parameter twice: give each tensor once, as model.parameters() does")
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            if not added["params"]:
                raise ValueError("a parameter group has an empty parameter list: give at least one tensor")
            for p in added["params"]:
                if p.dtype not in DTYPES:
                    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                    raise TypeError(f"a parameter of dtype {p.dtype} cannot be trained here: give real floating-point tensors, {names}")
                if hasattr(p, "to_local"):
                    raise TypeError("a sharded parameter (DTensor, as FSDP2 makes them) cannot be trained here: DDP's whole ones can")
            self._bound.append(Group(self.tower, added, self.state, compile=self.compile))
        except BaseException:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every level. A gradient that is not finite leaves everything as it was, and is counted in `skipped`.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim.

        Raises:
            TypeError: a sparse gradient.
            ValueError: a number assigned to a parameter group that lies outside its domain (a tensor is not looked at, as that
                would wait for the device: what lies outside is ignored).
        """
        self._check_outside("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        bound = self._groups()
        for group in bound:
            group.check()
        if self.driven is not None:
            self._drive(bound)
            return
        groups = [group for group in bound if group.collect()]
        ok = None if len(groups) < 2 else _every(group.finite() for group in groups)
        for group in groups:
            group.step(ok, self.hyper_every)

    def _drive(self, bound: list[Group]) -> None:
        """A step whose directions another optimizer makes."""
        grads = [p.grad for group in bound for p in group.params if p.grad is not None]
        if not grads:
            return
        # The one wait for the device: the other optimizer must not see a gradient that is not finite.
        finite = all(bool(g.sum(dtype=torch.promote_types(g.dtype, torch.float32)).isfinite()) for g in grads)
        directions = {p: torch.zeros_like(p) for group in bound for p in group.params}
        directions |= self.driven.directions() if finite and self.driven is not None else {}
        groups = [group for group in bound if group.collect(directions)]
        ok = _every(group.finite() for group in groups) * float(finite)
        ok = ok * float(all(bool(d.sum().isfinite()) for d in directions.values()))
        for group in groups:
            group.step(ok, self.hyper_every)

    def hyper_backward(self, loss: Tensor) -> None:
        """Let the next step learn its hyperparameters from this loss, on held-out data say, and not from the training loss.

        Its gradient is pulled through the tangents of the weights as they are, under `averaged()` (where `ScheduleFree` is to be
        evaluated) through those of the averaged weights, which is what makes the decay of an average learnable. Parameters and their
        .grad are left alone. Called several times before a step, the hypergradients add up. With bind(…, hyper_every=…) larger than
        the run, nothing is ever learned from the training loss. Before the first step there are no tangents, and nothing is learned.

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
        groups = self._groups()
        if not self.tower.above:
            raise RuntimeError(f"{self.tower} learns nothing: stack an optimizer on it, .stack(Adam)")
        if self.tower.strategy == "graph":
            raise RuntimeError("strategy='graph' has no tangents for another loss: give strategy='tangents'")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}, requires_grad {loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"hyper_backward needs a loss of one number that depends on the parameters, got {got}")
        params = [p for group in groups for p in group.params if p.requires_grad]
        grads: dict[Tensor, Tensor | None] = {p: None for group in groups for p in group.params}
        grads |= dict(zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True))
        if all(g is None for g in grads.values()):
            raise ValueError("hyper_backward was given a loss that depends on none of the parameters: make it from the model as it is now")
        for group in groups:
            group.hold_out(grads, group.rule.average or "x" if self._averaged else "x")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the parameters hold the averaged weights, to evaluate with; they come back bit for bit.

        Does nothing for a rule that does not average, and may be nested. Statistics of BatchNorm belong to other weights then:
        `batch_statistics(model, batches)` takes them anew.

        Raises:
            RuntimeError: a step inside; the optimizer saved, loaded, copied or pickled inside, as the model beside it would have other
                weights than it goes on from.
        """
        found = [(p, group.average(p)) for group in self._groups() for p in group.params] if not self._averaged else []
        pairs = [(p, average) for p, average in found if average is not None]
        if self._averaged or not pairs:
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
        groups = self._groups()
        gradients = max(int(g.tower["skipped"][0]) for g in groups)
        return {"gradients": gradients, "hypergradients": sum(int(g.tower["skipped"][1]) for g in groups)}

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; tensors and plain values only, so that torch.load(weights_only=True) reads it.

        Raises:
            RuntimeError: inside `averaged()`; with strategy="graph", whose autograd graph cannot be saved.
        """
        self._check_saves()
        driven = {"driven": self.driven.optimizer.state_dict()} if self.driven else {}
        return super().state_dict() | driven

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint; training then goes on bit for bit.

        Raises:
            ValueError: a checkpoint of another tower, of parameters of other shapes, without the feasible set that a group has, or
                with a value outside its domain; nothing is changed then.
            RuntimeError: inside `averaged()`.
        """
        self._check_outside("load_state_dict()")
        final: dict[str, Any] = {}

        def inspect(_: Optimizer, given: dict[str, Any]) -> None:
            try:
                checkpoint.check(given, self.tower, self.param_groups, driven=self.driven is not None)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"this is not the checkpoint of a HyperOptimizer, or a part of it is missing: {error!r}") from error
            final.update(given)

        before = self.state, self.param_groups, self._bound
        handle = self.register_load_state_dict_pre_hook(inspect)
        try:
            super().load_state_dict(state_dict)
            # torch casts state to the parameter's dtype, which would round float32 tangents to bfloat16.
            ids = [i for group in final["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, p in zip(ids, params, strict=True):
                if i in final["state"]:
                    self.state[p] = {key: value.to(p.device, copy=True) for key, value in final["state"][i].items()}
            self._rebuild()
            if self.driven is not None:
                self.driven.optimizer.load_state_dict(final["driven"])
        except BaseException:
            self.state, self.param_groups, self._bound = before
            raise
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._check_saves()
        kept = {name: getattr(self, name) for name in ("tower", "compile", "hyper_every", "driven")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bound = []
        self._averaged = False

    def __repr__(self) -> str:
        tensors = sum(len(group["params"]) for group in self.param_groups)
        return f"HyperOptimizer({self.tower}, {tensors} tensors in {len(self.param_groups)} groups)"

    def _groups(self) -> list[Group]:
        if len(self._bound) != len(self.param_groups):
            self._rebuild()
        return self._bound

    def _rebuild(self) -> None:
        self._bound = [Group(self.tower, group, self.state, compile=self.compile) for group in self.param_groups]

    def _check_outside(self, what: str) -> None:
        if self._averaged:
            raise RuntimeError(f"{what} inside averaged(): the parameters hold the averaged weights there; leave the context first")

    def _check_saves(self) -> None:
        self._check_outside("a checkpoint or a copy")
        if any(not group.saves() for group in self._groups()):
            raise RuntimeError("strategy='graph' holds an autograd graph, which cannot be saved: strategy='tangents' computes the same")

    def _named(self, of: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        out = {}
        groups = self._groups()
        for i, group in enumerate(groups):
            suffix = f"[{i}]" if len(groups) > 1 else ""
            for label, node in sorted(group.nodes.items()):
                out |= {f"{label}.{name}{suffix}": value.detach().clone() for name, value in of(node).items()}
        return out


def _every(numbers: Iterable[Tensor]) -> Tensor:
    """The product of 0-d tensors, which may be on several devices."""
    first, *rest = numbers
    for number in rest:
        first = first * number.to(first)
    return first
